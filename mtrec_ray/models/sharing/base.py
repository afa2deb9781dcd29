"""The contract of sharing layers: (state, item vector, request context) of a target -> what each pointwise head reads.

All read the same input x = [state, item, state · item, context], as `Inputs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig

MANY = 32
"""From this many items per state on, a first layer is folded into one matrix per state (`Inputs.linear`)."""


class Sharing(nn.Module):
    """Built for the pointwise tasks by name; every task gets H = `sharing_width` numbers per target.

    This class itself is what a model without pointwise tasks has: no layer.
    """

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__()
        self.tasks = tuple(tasks)

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        """state, item (M, D), context (M, C) -> task: shared (M, H);
        state (B, 1, D), item (B, K, D), context (B, 1, C) -> task: shared (B, K, H)."""
        assert not self.tasks
        return {}

    def by_task(self, shared: Tensor) -> dict[str, Tensor]:
        """(..., T, H) -> task: (..., H)."""
        return dict(zip(self.tasks, shared.unbind(-2), strict=True))


class Inputs:
    """x = [state, item, state · item, context] of each target, of width 3 D + C."""

    def __init__(self, state: Tensor, item: Tensor, context: Tensor) -> None:
        self.state, self.item, self.context = state, item, context
        self.folded = state.shape != item.shape and item.shape[-2] >= MANY
        self.x = None if self.folded else self.joined()

    def joined(self) -> Tensor:
        """x (..., 3 D + C)."""
        leading = self.item.shape[:-1]
        state, context = self.state.expand_as(self.item), self.context.expand(*leading, -1)
        return torch.cat([state, self.item, self.state * self.item, context], dim=-1)

    def linear(self, layer: nn.Linear) -> Tensor:
        """W x + b -> (..., out).

        W = [S, I, P, C]. For many items of one state it is (I + P diag(state)) item + (S state + C context + b): the matrix
        and the vector are formed once per state, and nothing of width 3 D + C per item.
        """
        return self.apply(layer.weight, layer.bias)

    def stacked(self, layer: StackedLinear) -> Tensor:
        """n maps of the same x -> (..., n, out)."""
        return divide(self.apply(layer.weight.flatten(0, 1), layer.bias), layer.n)

    def apply(self, weight: Tensor, bias: Tensor) -> Tensor:
        if self.x is not None:
            return F.linear(self.x, weight, bias)
        D = self.item.shape[-1]
        S, I, P, C = torch.split(weight, [D, D, D, self.context.shape[-1]], dim=1)  # noqa: E741
        matrix = I + P * self.state  # (B, out, D)
        once = F.linear(self.state, S, bias) + F.linear(self.context, C)
        return self.item @ matrix.transpose(-1, -2) + once


def divide(x: Tensor, n: int) -> Tensor:
    """(..., n · width) -> (..., n, width)."""
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


class StackedLinear(nn.Module):
    """n linear maps side by side, (..., n, width) -> (..., n, out), in one batched product."""

    def __init__(self, n: int, width: int, out: int) -> None:
        super().__init__()
        self.n = n
        bound = width**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(n, out, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(n * out).uniform_(-bound, bound))  # flat: one dimension has no weight decay

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...ni,noi->...no", x, self.weight) + divide(self.bias, self.n)
