"""shared_bottom: one MLP for all pointwise tasks (Caruana 1997, Multitask Learning)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Inputs, Sharing


class SharedBottom(Sharing):
    """h = MLP(x), the same for every task."""

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__(config, tasks, context_width)
        self.layers = nn.Sequential(
            nn.Linear(3 * config.width + context_width, config.sharing_width),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.sharing_width, config.sharing_width),
            nn.GELU(),
        )

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        first, *rest = self.layers
        shared = Inputs(state, item, context).linear(first)  # type: ignore[arg-type]
        for layer in rest:
            shared = layer(shared)
        return dict.fromkeys(self.tasks, shared)
