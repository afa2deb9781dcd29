"""`tasks`: one class per kind, with what it refuses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mtrec_ray.config.base import Int, Model
from mtrec_ray.config.data import DataConfig, checked_expression, is_binary


def check_label(key: str, label: str, data: DataConfig) -> None:
    """Raises ValueError when the data have no such label."""
    if label not in data.labels:
        raise ValueError(f"{key}.label: {label!r} is not among data.labels {sorted(data.labels)}")


class BaseTask(Model):
    """What every kind of task has."""

    weight: float = Field(default=1.0, ge=0)
    """Static λ, and the start of learned weights."""
    final_weight: float | None = None
    """w in the final score Σ w·g. Default: 1 for retrieval, 0 for all others."""

    def check(self, key: str, data: DataConfig, tasks: dict[str, TaskConfig]) -> None:
        """Raises ValueError, with the path of the key, for what contradicts the data or the other tasks."""


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

    def check(self, key: str, data: DataConfig, tasks: dict[str, TaskConfig]) -> None:
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

    def check(self, key: str, data: DataConfig, tasks: dict[str, TaskConfig]) -> None:
        check_label(key, self.label, data)


class BinaryTask(BaseTask):
    kind: Literal["binary"]
    label: str

    def check(self, key: str, data: DataConfig, tasks: dict[str, TaskConfig]) -> None:
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
    negatives: Int | None = Field(default=None, ge=1)
    """K items drawn per step by (1 + training events)^0.75 in place of the whole training catalogue, corrected by logQ."""


class ProfileTask(BaseTask):
    kind: Literal["profile"]
    attribute: str

    def check(self, key: str, data: DataConfig, tasks: dict[str, TaskConfig]) -> None:
        if self.attribute not in data.attributes:
            raise ValueError(f"{key}.attribute: {self.attribute!r} is not among data.attributes {sorted(data.attributes)}")


TaskConfig = Annotated[RetrievalTask | RegressionTask | BinaryTask | SimilarityTask | ProfileTask, Field(discriminator="kind")]
