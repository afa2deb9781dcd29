"""uncertainty: learned log-variances (Kendall et al. 2018, arXiv 1705.07115)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.balancing.base import Balancer


class Uncertainty(Balancer):
    """L = Σ λ (exp(-s) L + s / 2) with a learned log-variance s per task.

    The term of s counts only when the task has labels in the global batch. s takes no weight decay.
    """

    def __init__(self, static_T: Tensor) -> None:
        super().__init__(static_T)
        self.log_variance_T = nn.Parameter(torch.zeros_like(static_T))

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        s = self.log_variance_T
        return (self.static_T * (torch.exp(-s) * loss_T + 0.5 * s * present_T)).sum()

    def current(self) -> Tensor:
        return self.static_T * torch.exp(-self.log_variance_T.detach())
