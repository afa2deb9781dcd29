"""dwa: dynamic weight average (Liu et al. 2019, arXiv 1803.10704, equation 7)."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrec_ray.balancing.base import Balancer


class DynamicWeightAverage(Balancer):
    """λₜ = staticₜ · T exp(wₜ / τ) / Σ exp(w / τ), with wₜ = Lₜ(epoch - 1) / Lₜ(epoch - 2): who falls slowly gets more.

    w is 1 for the first two epochs, and for a task that had no loss in one of them.
    """

    before_2T: Tensor

    def __init__(self, static_T: Tensor, temperature: float) -> None:
        super().__init__(static_T)
        self.temperature = temperature
        self.register_buffer("before_2T", torch.zeros(2, len(static_T)))

    def end_epoch(self, loss_T: Tensor) -> None:
        last_T, older_T = loss_T.to(self.before_2T), self.before_2T[0]
        known_T = (last_T > 0) & (older_T > 0)
        ratio_T = torch.where(known_T, last_T / older_T.clamp(min=1e-12), 1.0)
        share_T = torch.softmax(ratio_T / self.temperature, dim=0)
        self.lambda_T.copy_(self.static_T * len(share_T) * share_T)
        self.before_2T.copy_(torch.stack([last_T, older_T]))
