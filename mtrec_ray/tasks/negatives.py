"""Negatives: a few items that stand for the whole catalogue, the same on every rank and for every row of a step."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn


class Negatives(nn.Module):
    """K draws with replacement from q(i) ∝ (1 + training events of i)^α; α = 0 is uniform.

    Drawn from (seed, task, step) alone. Items drawn twice become one column that counts twice: with n_i draws of item i,
    Σ_i n_i / (K q_i) e^{s_i} is an unbiased estimate of the whole denominator Σ e^{s_i}, so log(n_i / (K q_i)) is added to
    the logit (sampled softmax with logQ correction: Bengio & Senécal 2008; Yi et al. 2019, Sampling-Bias-Corrected Neural
    Modeling for Large Corpus Item Recommendations). The target is always in the denominator and so has no correction
    (arXiv 2507.09331).
    """

    cumulative_N: Tensor

    def __init__(self, name: str, n_items: int, draws: int, alpha: float) -> None:
        super().__init__()
        self.draws, self.alpha, self.seed, self.salt = draws, alpha, 0, zlib.crc32(name.encode())
        self.register_buffer("cumulative_N", torch.arange(1, n_items + 1, dtype=torch.float64) / n_items, persistent=False)

    def fit(self, count_N: Tensor, seed: int) -> None:
        """count_N: training events of every item; needed before training alone, uniform without it."""
        weight_N = (1 + count_N.double()) ** self.alpha
        self.cumulative_N.copy_(weight_N.cumsum(0) / weight_N.sum())
        self.seed = seed

    def probability(self, item: Tensor) -> Tensor:
        """q of some items, float64."""
        return self.cumulative_N[item] - torch.where(item > 0, self.cumulative_N[item - 1], 0.0)

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """-> distinct items, ascending, item_U int64, and how often each was drawn, count_U."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step * 4_099 + self.salt) % 2**63)
        u = torch.rand(self.draws, generator=generator, dtype=torch.float64).to(self.cumulative_N.device)
        item = torch.searchsorted(self.cumulative_N, u, right=True).clamp_(max=len(self.cumulative_N) - 1)
        return torch.unique(item, return_counts=True)

    def correction(self, item_U: Tensor, count_U: Tensor) -> Tensor:
        """log(n / (K q)), float32."""
        return torch.log(count_U / (self.draws * self.probability(item_U))).float()


def column_of(item: Tensor, item_U: Tensor) -> Tensor:
    """The column of each item among the ascending item_U, -1 where it is none."""
    column = torch.searchsorted(item_U, item).clamp_(max=len(item_U) - 1)
    return torch.where(item_U[column] == item, column, -1)
