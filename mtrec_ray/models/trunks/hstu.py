"""hstu: pointwise attention with relative positions and times (HSTU: Zhai et al. 2024, arXiv 2402.17152)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.dropout import Dropout
from mtrec_ray.models.trunks.base import Layer, Scope, Trunk

START = 0
"""Bucket of every pair with the start token, which has no time."""
BUCKETS = 66


def time_bucket(difference_ms: Tensor) -> Tensor:
    """|t_i - t_j|, int64 ms -> 1 + floor(2 · log2(1 + seconds)), so 1 is no gap and each doubling has two buckets."""
    seconds = difference_ms.abs().float() / 1000
    return (1 + (2 * torch.log2(1 + seconds)).long()).clamp_(max=BUCKETS - 1)


@dataclass
class Relative:
    """Indices of all pairs of a query and a key, and which pairs are hidden."""

    distance_BQK: Tensor
    bucket_BQK: Tensor
    hidden_BQK: Tensor


class _Lookup(torch.autograd.Function):
    """table[index] of a vector; many pairs share an entry, and counting sums their gradients at once."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.size = len(table)
        return table[index]

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return torch.bincount(index.flatten(), grad[0].flatten(), ctx.size).to(grad[0].dtype), None


def lookup(table: Tensor, index: Tensor) -> Tensor:
    return _Lookup.apply(table, index)  # type: ignore[no-any-return, no-untyped-call]


class HstuLayer(Layer):
    """U, V, Q, K = silu(W₁ norm(x)),   A_ij = silu(q_i · k_j + p_(i - j) + r_bucket(|t_i - t_j|)) / L for j ≤ i,   and
    x + W₂ (norm(A V) ⊙ U).

    p and r are shared by the heads, as in the authors' code. The paper pairs t_(i + 1), the request's time, with t_j; here
    only times of events are read, so that an answer does not depend on the clock. Pairs with the start token have a bucket
    of their own. There is no feed-forward: `feed_forward` is not used.
    """

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.heads, self.length = config.heads, length
        self.norm_in = nn.LayerNorm(config.width, eps=1e-6)
        self.uvqk = nn.Linear(config.width, 4 * config.width, bias=False)
        self.position_bias = nn.Parameter(torch.randn(length) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(BUCKETS) * 0.02)
        self.norm_attended = nn.LayerNorm(config.width, eps=1e-6)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BQD: Tensor, scope: Scope, index: int) -> Tensor:
        (B, Q, D), relative = x_BQD.shape, scope.relative
        u, v, q, k = F.silu(self.uvqk(self.norm_in(x_BQD))).chunk(4, dim=-1)
        q, k, v = (t.view(B, Q, self.heads, D // self.heads).transpose(1, 2) for t in (q, k, v))
        k, v = scope.known(index, k, v)
        bias_BQK = lookup(self.position_bias, relative.distance_BQK) + lookup(self.time_bias, relative.bucket_BQK)
        score = q @ k.transpose(-1, -2) + bias_BQK[:, None]
        weight = F.silu(score).masked_fill(relative.hidden_BQK[:, None], 0.0) / self.length
        attended = (weight @ v).transpose(1, 2).reshape(B, Q, D)
        return x_BQD + self.out(self.dropout(self.norm_attended(attended) * u))  # type: ignore[no-any-return]


class Hstu(Trunk):
    """No absolute positions: the relative position to the start token is one."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__(config, length, lambda: HstuLayer(config, length), position=False)

    def relate(self, scope: Scope) -> Relative:
        place = torch.arange(scope.time_BK.shape[1], device=scope.time_BK.device)
        distance_BQK = (scope.position_BQ[:, :, None] - place).clamp_(min=0)
        bucket_BQK = time_bucket(scope.time_BQ[:, :, None] - scope.time_BK[:, None, :])
        bucket_BQK = torch.where((place == 0) | (scope.position_BQ == 0)[:, :, None], START, bucket_BQK)
        return Relative(distance_BQK, bucket_BQK, ~scope.visible_BQK)
