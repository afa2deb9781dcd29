"""binary: whether something happens (click, like, purchase), by binary cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.models.batch import Batch
from mtrec_ray.tasks.base import Forward, PointwiseTask


class Binary(PointwiseTask):
    """p = sigmoid(head); a missing label is masked, never read as 0."""

    def __init__(self, name: str, label: str, shared_width: int) -> None:
        super().__init__()
        self.name, self.label = name, label
        self.head = nn.Linear(shared_width, 1)

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        logit = self.head(forward.shared[self.name][valid]).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logit, y[valid], reduction="sum")

    def predict(self, shared: Tensor) -> Tensor:
        """Probability."""
        return torch.sigmoid(self.head(shared).squeeze(-1))

    def final(self, prediction: Tensor) -> Tensor:
        return torch.logit(prediction, eps=1e-7)
