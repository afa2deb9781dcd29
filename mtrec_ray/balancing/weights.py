"""Weights λ of L = Σ λᵢ Lᵢ from losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.config import BalancingConfig


class Static(nn.Module):
    """λ as configured."""

    static_T: Tensor

    def __init__(self, static_T: Tensor) -> None:
        super().__init__()
        self.register_buffer("static_T", static_T)

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        """loss_T: per-task losses (this rank's share of the global mean); present_T: tasks with labels in the
        global batch; -> the scalar to minimise."""
        return (self.static_T * loss_T).sum()

    def current(self) -> Tensor:
        """λ now, for the log."""
        return self.static_T


class Uncertainty(nn.Module):
    """λ · exp(-s) L + λ · s / 2 with a learned log-variance s per task (Kendall et al. 2018, arXiv 1705.07115).

    The term of s counts only when the task has labels in the global batch. s takes no weight decay.
    """

    static_T: Tensor

    def __init__(self, static_T: Tensor) -> None:
        super().__init__()
        self.register_buffer("static_T", static_T)
        self.log_variance_T = nn.Parameter(torch.zeros_like(static_T))

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        s = self.log_variance_T
        return (self.static_T * (torch.exp(-s) * loss_T + 0.5 * s * present_T)).sum()

    def current(self) -> Tensor:
        return self.static_T * torch.exp(-self.log_variance_T.detach())


def build_balancer(config: BalancingConfig, weights: list[float]) -> Static | Uncertainty:
    static_T = torch.tensor(weights)
    return Uncertainty(static_T) if config.kind == "uncertainty" else Static(static_T)
