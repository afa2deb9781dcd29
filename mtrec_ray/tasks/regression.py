"""regression: a number such as a rating, by squared error in units of its training standard deviation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LabelStats
from mtrec_ray.tasks.base import Forward, PointwiseTask


class Regression(PointwiseTask):
    """ŷ = mean + std · head; loss (head − (y − mean) / std)²."""

    def __init__(self, name: str, label: str, stats: LabelStats, shared_width: int) -> None:
        super().__init__()
        self.name, self.label = name, label
        self.mean, self.std = stats.mean, max(stats.std, 1e-6)
        self.head = nn.Linear(shared_width, 1)

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
