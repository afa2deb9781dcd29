"""The contract of a balancer: the weights λ of L = Σ λᵢ Lᵢ, the same on every rank (DESIGN §1.5)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Balancer(nn.Module):
    """λ for T tasks, held in `lambda_T`; a checkpoint keeps it with the other buffers.

    Everything that a balancer is shown is global (summed over ranks), so all ranks come to the same λ.
    """

    needs_gramian = False
    """Whether `see_gramian` decides λ."""
    needs_losses = False
    """Whether `see_losses` decides λ."""
    needs_losses_after = False
    """Whether `see_losses_after` wants the losses of the step's batch after the update: one more forward pass."""
    update_every = 1
    """Steps between two Gramians."""
    static_T: Tensor
    lambda_T: Tensor

    def __init__(self, static_T: Tensor) -> None:
        """static_T: λ as configured."""
        super().__init__()
        self.register_buffer("static_T", static_T, persistent=False)
        self.register_buffer("lambda_T", static_T.clone())

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        """The scalar to minimise.

        loss_T: this rank's share of the mean losses; present_T: 1 for tasks with labels in the global batch, split over the
        micro-batches of a step.
        """
        return (self.lambda_T * loss_T).sum()

    def current(self) -> Tensor:
        """λ now, for the log."""
        return self.lambda_T

    def see_gramian(self, gramian_TT: Tensor, step: int) -> None:
        """gramian_TT: float64, inner products of the tasks' gradients at the state; step: global optimiser step."""

    def see_losses(self, loss_T: Tensor, present_T: Tensor) -> None:
        """Mean losses of a step's batch, before λ is used."""

    def see_losses_after(self, loss_T: Tensor, present_T: Tensor) -> None:
        """Mean losses of the same batch after the update."""

    def end_epoch(self, loss_T: Tensor) -> None:
        """Mean losses of an epoch."""


class Static(Balancer):
    """static: λ as configured, the plain sum."""


def rescaled(weight_T: Tensor, static_T: Tensor, active_T: Tensor) -> Tensor | None:
    """Weights of the active tasks with the sum of the static λ that they replace; the others keep theirs.

    None where the weights are not finite or do not have a positive sum: they point nowhere.
    """
    total = weight_T[active_T].sum()
    if not bool(torch.isfinite(weight_T[active_T]).all()) or not float(total) > 1e-12:
        return None
    return torch.where(active_T, weight_T * (static_T[active_T].sum() / total), static_T)
