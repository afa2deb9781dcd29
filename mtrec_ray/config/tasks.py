"""`tasks`: one class per kind, with what it refuses. A kind is registered in mtrec_ray/tasks (docs/tasks.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.data import DataConfig, checked_expression, is_binary


def check_label(key: str, label: str, data: DataConfig) -> None:
    """Raises ValueError when the data have no such label."""
    if label not in data.labels:
        raise ValueError(f"{key}.label: {label!r} is not among data.labels {sorted(data.labels)}")


class BaseTask(Model):
    """What every kind of task has."""

    kind: str
    weight: float = Field(default=1.0, ge=0)
    """Static λ, and the start of learned weights."""
    final_weight: float | None = None
    """w in the final score Σ w·g. Default: 1 for retrieval, 0 for all others."""

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        """Raises ValueError, with the path of the key, for what contradicts the data or the other tasks."""

    @property
    def labels_read(self) -> tuple[str, ...]:
        """Labels that it is trained on."""
        return ()


class RetrievalTask(BaseTask):
    kind: Literal["retrieval"]
    positive: str | None = None
    """Expression over labels: which targets are positives. Default: the events that are history."""

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if self.positive is not None:
            checked_expression(self.positive, set(data.labels), f"{key}.positive")


class RegressionTask(BaseTask):
    kind: Literal["regression"]
    label: str

    @property
    def labels_read(self) -> tuple[str, ...]:
        return (self.label,)

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        check_label(key, self.label, data)


class BinaryTask(BaseTask):
    kind: Literal["binary"]
    label: str

    @property
    def labels_read(self) -> tuple[str, ...]:
        return (self.label,)

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        check_label(key, self.label, data)
        if not is_binary(data.labels[self.label]):
            raise ValueError(f"{key}.label: {self.label!r} is numeric; say kind: binary or derive it by a comparison")


class SimilarityTask(BaseTask):
    kind: Literal["similarity"]
    within_positions: Int = Field(default=3, ge=1)
    """A pair is a training positive and one of the last this many history events that it sees ..."""
    within_hours: float = Field(default=24.0, gt=0)
    """... and at most this many hours."""
    share: float = Field(default=0.25, gt=0, le=1)
    """Share of the targets that contribute a pair in an epoch."""
    temperature: float = Field(default=0.1, gt=0)


class ProfileTask(BaseTask):
    kind: Literal["profile"]
    attribute: str

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if self.attribute not in data.attributes:
            raise ValueError(f"{key}.attribute: {self.attribute!r} is not among data.attributes {sorted(data.attributes)}")


def _of_kind(value: Any) -> Any:
    """A task's mapping -> an object of its kind's class."""
    from mtrec_ray.tasks import KINDS  # a kind's file has its configuration and its model, so it stands above this one

    if isinstance(value, BaseTask) or not isinstance(value, Mapping):
        return value
    kind = value.get("kind")
    if kind is None:
        raise ValueError(f"kind is missing; it is one of {sorted(KINDS)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: {kind!r} is unknown; it is one of {sorted(KINDS)}")
    return KINDS[kind].config.model_validate(value)


TaskConfig = Annotated[SerializeAsAny[BaseTask], BeforeValidator(_of_kind)]
