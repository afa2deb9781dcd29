"""famo: fast adaptive multitask optimisation (Liu et al. 2023, arXiv 2306.03792, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrec_ray.balancing.base import Balancer, rescaled

FLOOR = 1e-8
"""Added to a loss before its logarithm."""


class Famo(Balancer):
    """λ ∝ z / L with z = softmax(ξ): every task's loss falls at the same relative rate.

    After the update, ξ ← Adam(ξ, Jᵀ δ) with δ = log L(before) - log L(after) on the same batch, J the softmax's Jacobian.
    λ is rescaled to the sum of the static λ. The ξ of a task without labels in the batch stays.
    """

    needs_losses = needs_losses_after = True

    logit_T: Tensor
    before_T: Tensor
    moments_2T: Tensor
    updates: Tensor

    def __init__(self, static_T: Tensor, learning_rate: float, decay: float) -> None:
        super().__init__(static_T)
        self.learning_rate, self.decay = learning_rate, decay
        self.register_buffer("logit_T", torch.zeros_like(static_T))
        self.register_buffer("before_T", torch.ones_like(static_T))
        self.register_buffer("moments_2T", torch.zeros(2, len(static_T)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def see_losses(self, loss_T: Tensor, present_T: Tensor) -> None:
        self.before_T.copy_(loss_T)
        active_T = self._active(present_T)
        share_T = self._share(active_T)
        found_T = rescaled(share_T / (loss_T + FLOOR), self.static_T, active_T)
        if found_T is not None:
            self.lambda_T.copy_(found_T)

    def see_losses_after(self, loss_T: Tensor, present_T: Tensor) -> None:
        active_T = self._active(present_T)
        if not bool(active_T.any()):
            return
        delta_T = torch.where(active_T, torch.log(self.before_T + FLOOR) - torch.log(loss_T + FLOOR), 0.0)
        share_T = self._share(active_T)
        gradient_T = share_T * (delta_T - (share_T * delta_T).sum()) + self.decay * self.logit_T
        self.updates += 1
        first_T, second_T = self.moments_2T
        first_T.lerp_(gradient_T, 1 - 0.9)
        second_T.lerp_(gradient_T**2, 1 - 0.999)
        steps = int(self.updates)
        mean_T, square_T = first_T / (1 - 0.9**steps), second_T / (1 - 0.999**steps)
        step_T = self.learning_rate * mean_T / (square_T.sqrt() + 1e-8)
        self.logit_T -= torch.where(active_T, step_T, 0.0)

    def _active(self, present_T: Tensor) -> Tensor:
        return (present_T > 0) & (self.static_T > 0)

    def _share(self, active_T: Tensor) -> Tensor:
        """z over the active tasks, 0 elsewhere."""
        return torch.softmax(self.logit_T.masked_fill(~active_T, float("-inf")), dim=0).nan_to_num(0.0)
