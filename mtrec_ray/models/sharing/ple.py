"""ple: progressive layered extraction (Tang et al. 2020, Progressive Layered Extraction (PLE): A Novel Multi-Task Learning
(MTL) Model for Personalized Recommendations)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Inputs, Sharing, StackedLinear, divide


@dataclass
class Streams:
    """What one level hands to the next; a level reads it by the same two methods as `Inputs`."""

    tasks: Tensor
    """(..., T, H)."""
    shared: Tensor
    """(..., H)."""

    def linear(self, layer: nn.Linear) -> Tensor:
        return layer(self.shared)  # type: ignore[no-any-return]

    def stacked(self, layer: StackedLinear) -> Tensor:
        return layer(self.tasks)  # type: ignore[no-any-return]


class Level(nn.Module):
    """Private experts P_t of each task and shared experts S, mixed for each task over its own and the shared ones:

    h_t = Σ softmax(G_t x_t) · [P_t(x_t), S(x_s)], and, unless the level is the last,
    h_s = Σ softmax(G_s x_s) · [P_1(x_1), …, P_T(x_T), S(x_s)]

    where x_t, x_s are h_t, h_s of the level below and x at the first. An expert is the MLP of shared_bottom.
    """

    def __init__(self, config: ModelConfig, tasks: int, width: int, last: bool) -> None:
        super().__init__()
        H, self.tasks, self.private, self.shared = config.sharing_width, tasks, config.task_experts, config.experts
        self.private_first = StackedLinear(tasks, width, self.private * H)
        self.private_second = StackedLinear(tasks * self.private, H, H)
        self.shared_first = nn.Linear(width, self.shared * H)
        self.shared_second = StackedLinear(self.shared, H, H)
        self.gate = StackedLinear(tasks, width, self.private + self.shared)
        self.shared_gate = None if last else nn.Linear(width, tasks * self.private + self.shared)
        self.dropout = nn.Dropout(config.dropout)

    def gates(self, x: Inputs | Streams) -> Tensor:
        """Weights of a task's own and of the shared experts (..., T, private + shared); they sum to 1."""
        return torch.softmax(x.stacked(self.gate), dim=-1)

    def experts(self, hidden: Tensor, second: StackedLinear) -> Tensor:
        """First layers of n experts (..., n · H) -> the experts (..., n, H)."""
        return F.gelu(second(self.dropout(F.gelu(divide(hidden, second.n)))))

    def forward(self, x: Inputs | Streams) -> tuple[Tensor, Tensor | None]:
        """-> h_t (..., T, H) and h_s (..., H) or None."""
        private = self.experts(x.stacked(self.private_first).flatten(-2), self.private_second)
        shared = self.experts(x.linear(self.shared_first), self.shared_second)
        h = self.weights(x) @ torch.cat([private, shared], dim=-2)
        return h[..., : self.tasks, :], None if self.shared_gate is None else h[..., self.tasks, :]

    def weights(self, x: Inputs | Streams) -> Tensor:
        """One row per stream and one column per expert, so that all are mixed in one product: (..., T or T + 1, T · P + S).
        A task's row is 0 at the others' private experts."""
        gates, T = self.gates(x), self.tasks
        own = gates[..., None, : self.private] * torch.eye(T, device=gates.device, dtype=gates.dtype)[..., None]
        weights = torch.cat([own.flatten(-2), gates[..., self.private :]], dim=-1)
        if self.shared_gate is None:
            return weights
        return torch.cat([weights, torch.softmax(x.linear(self.shared_gate), dim=-1)[..., None, :]], dim=-2)


class PLE(Sharing):
    """`sharing_layers` levels, each with `experts` shared experts and `task_experts` private ones per task."""

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__(config, tasks, context_width)
        widths = [3 * config.width + context_width] + [config.sharing_width] * (self.depth(config) - 1)
        last = len(widths) - 1
        self.levels = nn.ModuleList(Level(config, len(tasks), width, i == last) for i, width in enumerate(widths))

    def depth(self, config: ModelConfig) -> int:
        """Levels."""
        return config.sharing_layers

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        x: Inputs | Streams = Inputs(state, item, context)
        for level in self.levels:
            tasks, shared = level(x)
            if shared is None:
                break
            x = Streams(tasks, shared)
        return self.by_task(tasks)
