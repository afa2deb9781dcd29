"""Sharing layers: (state, item vector, request context) of a target -> what the pointwise heads read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig


class SharedBottom(nn.Module):
    """One MLP for all pointwise tasks (Caruana 1997). Reads [state, item, state · item, context]."""

    def __init__(self, config: ModelConfig, context_width: int) -> None:
        super().__init__()
        self.width = config.sharing_width
        self.layers = nn.Sequential(
            nn.Linear(3 * config.width + context_width, config.sharing_width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.sharing_width, config.sharing_width),
            nn.GELU(),
        )

    def forward(self, state_MD: Tensor, item_MD: Tensor, context_MC: Tensor) -> Tensor:
        """-> shared_MH; any leading shape."""
        return self.layers(torch.cat([state_MD, item_MD, state_MD * item_MD, context_MC], dim=-1))  # type: ignore[no-any-return]
