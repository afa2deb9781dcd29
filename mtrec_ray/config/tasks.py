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
    loss: Literal["softmax", "sampled_softmax", "gbce"] = "softmax"
    """`softmax` over the whole training catalogue. With `negatives` instead of it: `sampled_softmax`, corrected by logQ, or
    `gbce` (arXiv 2308.07192), both for catalogues of tens of thousands of items and more. See docs/models.md."""
    negatives: Int | None = Field(default=None, ge=1)
    """K items drawn per step for all rows together; needed by `sampled_softmax` and `gbce`."""
    popularity: float | None = Field(default=None, ge=0, le=1)
    """`sampled_softmax`: negatives are drawn by (1 + training events)^popularity. Default: 0.75; 0 is uniform."""
    calibration: float | None = Field(default=None, ge=0, le=1)
    """`gbce`: t, from 0 (plain BCE) to 1 (calibrated). Default: 0.75."""

    def check(self, key: str, data: DataConfig, tasks: Mapping[str, BaseTask]) -> None:
        if self.loss == "softmax" and self.negatives is not None:
            raise ValueError(f"{key}.negatives: loss softmax reads all items; say loss: sampled_softmax or gbce, or leave it out")
        if self.loss != "softmax" and self.negatives is None:
            raise ValueError(f"{key}.negatives: loss {self.loss} needs a number of negatives, such as 512")
        if self.popularity is not None and self.loss != "sampled_softmax":
            raise ValueError(f"{key}.popularity: only loss sampled_softmax draws by popularity, not {self.loss}")
        if self.calibration is not None and self.loss != "gbce":
            raise ValueError(f"{key}.calibration: only loss gbce is calibrated, not {self.loss}")
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
    negatives: Int | None = Field(default=None, ge=1)
    """K items drawn per step by (1 + training events)^0.75 in place of the whole training catalogue, corrected by logQ."""


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
    wide_penalty: float = Field(default=2.5e-4, ge=0)
    """`attribute` only: L2 penalty of the linear term on the visible items, beside the mean loss: 1 / (C · users) in terms of
    scikit-learn. The default is C = 6 with 650 users; with many more users it should be smaller."""

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
