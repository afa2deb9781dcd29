"""`tasks`: one class per kind, with what it refuses. A kind is registered in mtrec_ray/tasks (docs/tasks.md)."""

from __future__ import annotations

import itertools
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
    loss: Literal["mse", "huber"] = "mse"
    """Of the error in units of the label's training standard deviation."""
    delta: float = Field(default=1.0, gt=0)
    """`huber` only: errors above it count linearly."""
    bins: tuple[float, ...] | None = None
    """Increasing values such as [1, 2, 3, 4, 5]: the model tells a distribution over them, whose mean is the prediction, and
    is trained by cross-entropy. A label between two of them counts for both, by its distance; one beyond the ends for the
    end. Null: the model tells a number."""

    @property
    def labels_read(self) -> tuple[str, ...]:
        return (self.label,)

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        check_label(key, self.label, data)
        if self.bins is not None:
            if len(self.bins) < 2 or any(a >= b for a, b in itertools.pairwise(self.bins)):
                raise ValueError(f"{key}.bins: at least two increasing values are needed, such as [1, 2, 3, 4, 5]")
            if self.loss != "mse":
                raise ValueError(f"{key}.loss: with bins the loss is cross-entropy; take out loss: {self.loss}, or bins")
            outside = sorted(v for v in data.labels[self.label].values or () if not self.bins[0] <= v <= self.bins[-1])
            if outside:
                raise ValueError(f"{key}.bins: {outside} are values of {self.label!r}, but beyond the bins; add them")
        if self.loss != "huber" and self.delta != 1.0:
            raise ValueError(f"{key}.delta: it belongs to loss: huber")


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


class MulticlassTask(BaseTask):
    kind: Literal["multiclass"]
    label: str
    """A label with `values`: they are the classes."""

    @property
    def labels_read(self) -> tuple[str, ...]:
        return (self.label,)

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        check_label(key, self.label, data)
        if len(set(data.labels[self.label].values or ())) < 2:
            raise ValueError(
                f"{key}.label: {self.label!r} has no classes; list them as data.labels.{self.label}.values, such as [1, 2, 3, 4, 5]"
            )


class MultilabelTask(BaseTask):
    kind: Literal["multilabel"]
    labels: tuple[str, ...]
    """Binary labels that share a head; each is masked where it is missing."""

    @property
    def labels_read(self) -> tuple[str, ...]:
        return self.labels

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"{key}.labels: at least two different labels are needed; for one label say kind: binary")
        for label in self.labels:
            if label not in data.labels:
                raise ValueError(f"{key}.labels: {label!r} is not among data.labels {sorted(data.labels)}")
            if not is_binary(data.labels[label]):
                raise ValueError(f"{key}.labels: {label!r} is numeric; say kind: binary or derive it by a comparison")


class ProfileTask(BaseTask):
    kind: Literal["profile"]
    attribute: str | None = None
    """An attribute of the user ..."""
    interest: str | None = None
    """... or a column of data.item_features: over which of its values the user's later events will spread."""
    wide_penalty: float = Field(default=5e-4, ge=0)
    """`attribute` only: L2 penalty of the linear term on the visible items, beside the mean loss; about 1 / (3 · users)."""

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if (self.attribute is None) == (self.interest is None):
            raise ValueError(f"{key}: name either attribute (of the user) or interest (a column of data.item_features)")
        if self.attribute is not None and self.attribute not in data.attributes:
            raise ValueError(f"{key}.attribute: {self.attribute!r} is not among data.attributes {sorted(data.attributes)}")
        if self.interest is not None and self.interest not in data.item_features:
            raise ValueError(f"{key}.interest: {self.interest!r} is not among data.item_features {sorted(data.item_features)}")
        same = [n for n, t in tasks.items() if isinstance(t, ProfileTask) and _told(t) == _told(self)]
        if len(same) > 1:
            raise ValueError(f"{key}: tasks {same} tell the same; a profile has one distribution per attribute or column")


def _told(task: ProfileTask) -> tuple[str | None, str | None]:
    return task.attribute, task.interest


class ItemAttributeTask(BaseTask):
    kind: Literal["item_attribute"]
    column: str
    """A column of data.item_features, told from the item's vector."""

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if self.column not in data.item_features:
            raise ValueError(f"{key}.column: {self.column!r} is not among data.item_features {sorted(data.item_features)}")
        mapped = {} if data.items is None else data.items.columns
        read = {} if data.text is None else {mapped.get(n, n): n for n in data.text.fields}
        inside = read.get(mapped.get(self.column, self.column))
        if inside is not None:
            raise ValueError(
                f"{key}.column: {self.column!r} stands in data.text.template as {{{inside}}}, so the item's vector would read the "
                f"answer; take it out of the template, or the task out (kind: profile with interest may keep it)"
            )
        same = [n for n, t in tasks.items() if isinstance(t, ItemAttributeTask) and t.column == self.column]
        if len(same) > 1:
            raise ValueError(f"{key}.column: tasks {same} tell the same column; one is enough")


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
