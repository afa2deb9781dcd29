"""mmoe: multi-gate mixture of experts (Ma et al. 2018, Modeling Task Relationships in Multi-task Learning with MMoE)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Inputs, Sharing, StackedLinear


class MMoE(Sharing):
    """h_t = Σ_e softmax(G_t x)_e · f_e(x), with E = `experts` experts f_e for all tasks and a gate G_t for each.

    An expert is the MLP of shared_bottom, so one expert alone is the shared bottom.
    """

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__(config, tasks, context_width)
        width, H = 3 * config.width + context_width, config.sharing_width
        self.first = StackedLinear(config.experts, width, H)
        self.second = StackedLinear(config.experts, H, H)
        self.gate = StackedLinear(len(tasks), width, config.experts)
        self.dropout = nn.Dropout(config.dropout)

    def gates(self, x: Inputs) -> Tensor:
        """Weights of the experts (..., T, E); they sum to 1."""
        return torch.softmax(x.stacked(self.gate), dim=-1)

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        x = Inputs(state, item, context)
        experts = F.gelu(self.second(self.dropout(F.gelu(x.stacked(self.first)))))
        return self.by_task(self.gates(x) @ experts)
