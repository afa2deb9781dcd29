"""multiclass: a label with few values, as a distribution over them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, MulticlassTask
from mtrec_ray.evaluation import statistics as st
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LabelStats, LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import FloatArray, Kind, LabelJudge

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Multiclass(PointwiseTask):
    """Softmax over the label's values; the one number per item is their expectation."""

    several_numbers = True
    values_C: Tensor

    def __init__(self, name: str, label: str, stats: LabelStats, shared_width: int) -> None:
        super().__init__()
        self.name, self.label = name, label
        self.mean, self.std = stats.mean, max(stats.std, 1e-6)
        self.register_buffer("values_C", torch.tensor(values_of(stats), dtype=torch.float32), persistent=False)
        self.head = nn.Linear(shared_width, len(self.values_C))

    @classmethod
    def build(cls, name: str, config: MulticlassTask, schema: LogSchema, model: ModelConfig) -> Multiclass:
        return cls(name, config.label, schema.labels[config.label], model.sharing_width)

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        place = (y[valid][:, None] - self.values_C).abs().argmin(1)  # prepare let through no other value
        return F.cross_entropy(self.head(forward.shared[self.name][valid]), place, reduction="sum")

    def distribution(self, shared: Tensor) -> Tensor:
        return torch.softmax(self.head(shared), dim=-1)

    def predict(self, shared: Tensor) -> Tensor:
        """The expected value."""
        return self.distribution(shared) @ self.values_C

    def final(self, prediction: Tensor) -> Tensor:
        return (prediction - self.mean) / self.std


def values_of(stats: LabelStats) -> NDArray[np.float64]:
    """The label's values, ascending. Raises ValueError where the data were prepared without them."""
    if stats.values is None:
        raise ValueError("a multiclass task needs data prepared with the label's values; run jobs.prepare again")
    return np.sort(np.array(stats.values))


class MulticlassJudge(LabelJudge):
    """Accuracy, F1 and log loss over events."""

    main = "accuracy"
    proportions = True

    def columns(self, label: FloatArray, schema: LogSchema) -> FloatArray | None:
        one_hot = (label[:, None] == values_of(schema.labels[self.config.label])).astype(np.float64)
        return np.where(np.isnan(label)[:, None], np.nan, one_hot)

    def assemble(self, column_TC: FloatArray) -> FloatArray:
        share = np.maximum(column_TC, 1e-9)
        return np.asarray(share / share.sum(1, keepdims=True))

    def reduce(self, r: Reduction) -> None:
        found = r.points(self.name)
        if found is None:
            return
        user_T, label, p_TC = found
        place = np.searchsorted(values_of(r.over.predictor.schema.labels[self.config.label]), label)
        r.per_event(f"{self.name}/logloss", user_T, -np.log(np.clip(p_TC[np.arange(len(place)), place], 1e-12, 1)))
        r.classes(self.name, place, p_TC.argmax(1), p_TC.shape[1], user_T)

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if not statistics.counted(f"{self.name}/logloss"):
            return {}
        found = st.class_metrics(statistics, self.name)
        return found | {"logloss": statistics.mean(f"{self.name}/logloss")}


KIND = Kind("multiclass", MulticlassTask, Multiclass, MulticlassJudge)
