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
    """Whether something happens; see docs/sharing.md for funnels."""

    kind: Literal["binary"]
    label: str
    loss: Literal["bce", "focal"] = "bce"
    """`focal`: targets that are predicted well already count less (Lin et al. 2017, arXiv 1708.02002). It ranks; its
    probabilities are pulled towards 1/2."""
    focal_gamma: float = Field(default=2.0, ge=0)
    """γ of `focal`; 0 is `bce`."""
    positive_weight: float = Field(default=1.0, gt=0)
    """Weight w of a positive in the loss, 1 for a negative. The predicted odds become w times the true ones:
    p / (1 − p) ÷ w undoes it. With w other than 1, log loss and calibration are therefore worse; AUC need not be."""
    depends_on: str | None = None
    """The binary task that must happen first, such as the click before the purchase. The prediction is then the probability
    of the whole event, trained over all impressions."""
    chain: Literal["esmm", "aitm"] = "esmm"
    """How a task with `depends_on` follows from the other. `esmm`: p = p(before) · p(this | before) (arXiv 1804.07931).
    `aitm`: p directly, from what the task before knows, by attention (arXiv 2105.08489). See mtrec_ray/models/chains.py."""
    calibration: float = Field(default=0.6, ge=0)
    """`aitm`: weight of the calibrator max(0, p − p(before)) in the loss; 0.6 is the paper's."""

    @property
    def labels_read(self) -> tuple[str, ...]:
        return (self.label,)

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        check_label(key, self.label, data)
        if not is_binary(data.labels[self.label]):
            raise ValueError(f"{key}.label: {self.label!r} is numeric; say kind: binary or derive it by a comparison")
        if self.depends_on is None:
            if self.chain != "esmm":
                raise ValueError(f"{key}.chain: {self.chain} needs depends_on: the task before this one")
            return
        name = key.removeprefix("tasks.")
        others = sorted(n for n, t in tasks.items() if isinstance(t, BinaryTask) and n != name)
        if self.depends_on == name:
            raise ValueError(f"{key}.depends_on: the task itself; name the task before it, one of {others}, or take the key out")
        if self.depends_on not in tasks:
            raise ValueError(f"{key}.depends_on: {self.depends_on!r} is not a task; the binary ones are {others}")
        if self.depends_on not in others:
            kind = tasks[self.depends_on].kind
            raise ValueError(f"{key}.depends_on: {self.depends_on!r} is of kind {kind}; the binary tasks are {others}")
        path: list[str] = [name]
        while isinstance(before := tasks.get(path[-1]), BinaryTask) and before.depends_on is not None:
            path.append(before.depends_on)
            if before.depends_on in path[:-1]:
                cycle = " → ".join(path[path.index(before.depends_on) :])
                raise ValueError(f"{key}.depends_on: a cycle, {cycle}; the first step of a funnel depends on nothing")


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
