"""regression: a number such as a rating, by squared error in units of its training standard deviation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig, RegressionTask
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LabelStats, LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import FloatArray, Kind, LabelJudge

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Regression(PointwiseTask):
    """ŷ = mean + std · head; loss (head − (y − mean) / std)²."""

    def __init__(self, name: str, label: str, stats: LabelStats, shared_width: int) -> None:
        super().__init__()
        self.name, self.label = name, label
        self.mean, self.std = stats.mean, max(stats.std, 1e-6)
        self.head = nn.Linear(shared_width, 1)

    @classmethod
    def build(cls, name: str, config: RegressionTask, schema: LogSchema, model: ModelConfig) -> Regression:
        return cls(name, config.label, schema.labels[config.label], model.sharing_width)

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        error = self.head(forward.shared[self.name][valid]).squeeze(-1) - (y[valid] - self.mean) / self.std
        return error.square().sum()

    def predict(self, shared: Tensor) -> Tensor:
        return self.mean + self.std * self.head(shared).squeeze(-1)

    def final(self, prediction: Tensor) -> Tensor:
        return (prediction - self.mean) / self.std


class RegressionJudge(LabelJudge):
    """RMSE and mean absolute error over events."""

    main = "rmse"

    def reduce(self, r: Reduction) -> None:
        found = r.points(self.name)
        if found is None:
            return
        user_T, label, prediction = found
        r.per_event(f"{self.name}/rmse", user_T, (prediction - label) ** 2)
        r.per_event(f"{self.name}/mae", user_T, np.abs(prediction - label))

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if not statistics.counted(f"{self.name}/rmse"):
            return {}
        return {
            "rmse": np.sqrt(statistics.mean(f"{self.name}/rmse")),
            "mae": statistics.mean(f"{self.name}/mae"),
            "n": statistics.sums[f"{self.name}/rmse"][:1, 1],
        }


KIND = Kind("regression", RegressionTask, Regression, RegressionJudge)
