"""binary: whether something happens (click, like, purchase), by cross-entropy or focal loss, alone or at the end of a chain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import BinaryTask
from mtrec_ray.models.batch import Batch
from mtrec_ray.models.chains import logit_of_both
from mtrec_ray.tasks.base import Forward, PointwiseTask


class Binary(PointwiseTask):
    """p = sigmoid(logit), the probability of the event; a missing label is masked, never read as 0.

    Loss of a target, with s = logit where the label is 1 and −logit where it is 0, and w = `positive_weight` or 1:

    bce    −w · log sigmoid(s)
    focal  −w · (1 − sigmoid(s))^γ · log sigmoid(s)    (Lin et al. 2017, arXiv 1708.02002)

    A task that depends on another (models/chains.py) reads one number more than H, the logit of the event before; its own
    logit is that of the whole event, and so are its loss, on every target whose label is known, and its prediction.
    """

    def __init__(self, name: str, config: BinaryTask, shared_width: int) -> None:
        super().__init__()
        self.name, self.label, self.config = name, config.label, config
        self.head = nn.Linear(shared_width, 1)

    def logit(self, shared: Tensor) -> Tensor:
        """What the head reads (..., H), or (..., H + 1) at the end of a chain -> logit of the event (...)."""
        own: Tensor = self.head(shared[..., : self.head.in_features]).squeeze(-1)
        if self.config.depends_on and self.config.chain == "esmm":
            return logit_of_both(shared[..., -1], own)
        return own

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        shared, y = forward.shared[self.name][valid], y[valid]
        logit = self.logit(shared)
        loss = self.losses(logit, y).sum()
        if self.config.depends_on and self.config.chain == "aitm":
            excess = F.relu(torch.sigmoid(logit) - torch.sigmoid(shared[..., -1]))
            loss = loss + self.config.calibration * excess.sum()
        return loss

    def losses(self, logit: Tensor, y: Tensor) -> Tensor:
        """Loss of each target (M,)."""
        signed = torch.where(y > 0, logit, -logit)
        loss = -F.logsigmoid(signed)
        if self.config.loss == "focal":
            loss = loss * torch.exp(self.config.focal_gamma * F.logsigmoid(-signed))
        return torch.where(y > 0, self.config.positive_weight, 1.0) * loss

    def predict(self, shared: Tensor) -> Tensor:
        """Probability."""
        return torch.sigmoid(self.logit(shared))

    def final(self, prediction: Tensor) -> Tensor:
        return torch.logit(prediction, eps=1e-7)
