"""The contract of sharing layers: (state, item vector, request context) of a target -> what each pointwise head reads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtrec_ray.config import ModelConfig


class Sharing(nn.Module):
    """Built for the pointwise tasks by name; every task gets H = `sharing_width` numbers per target."""

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__()

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        """state, item (..., D), context (..., C), any leading shape -> task: shared (..., H)."""
        raise NotImplementedError
