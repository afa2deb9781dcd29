"""The wide term of a profile: a linear model on the bag of visible items (Wide & Deep, Cheng et al. 2016, arXiv 1606.07792)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrec_ray.models.batch import HistoryBatch

SCALE = 10.0
"""Bags have unit length and hold about a hundred items: in such units weights are of the size that AdamW moves."""


@dataclass(frozen=True)
class Bags:
    """Distinct items of B users, user by user."""

    row_E: Tensor
    """int64, the user of each entry."""
    item_E: Tensor
    """int64 catalogue positions."""
    n: int
    """B."""

    @classmethod
    def of_lists(cls, visible: Sequence[NDArray[np.int64]]) -> Bags:
        """visible: distinct catalogue positions of each user."""
        row = np.repeat(np.arange(len(visible)), [len(v) for v in visible])
        item = np.concatenate([np.zeros(0, np.int64), *visible])
        return cls(torch.from_numpy(row), torch.from_numpy(item), len(visible))

    def to(self, device: torch.device) -> Bags:
        return Bags(self.row_E.to(device), self.item_E.to(device), self.n)

    @classmethod
    def of_windows(cls, history: HistoryBatch, window_W: Tensor) -> Bags:
        """What some windows show at their ends."""
        item_WS = history.item_BS[window_W]
        shown_WS = torch.arange(item_WS.shape[1], device=item_WS.device) < history.length_B[window_W, None]
        row, place = shown_WS.nonzero(as_tuple=True)
        pairs = torch.unique(torch.stack([row, item_WS[row, place]]), dim=1)
        return cls(pairs[0], pairs[1], len(window_W))


class Wide(nn.Module):
    """logit = Σ over the bag of weight(item) · idf(item), divided by the length of the bag's idf vector.

    That is multinomial logistic regression on tf-idf (Salton & Buckley 1988) with binary term frequencies and rows of unit
    length. Items without a training event are left out. idf = 1 + log((1 + most events) / (1 + events)), from the training
    catalogue: `count_items`.
    """

    idf_N: Tensor

    def __init__(self, n_train_items: int, n_classes: int) -> None:
        super().__init__()
        self.weight = nn.Embedding(n_train_items, n_classes)
        nn.init.zeros_(self.weight.weight)
        self.register_buffer("idf_N", torch.ones(n_train_items), persistent=False)

    def count_items(self, count_N: NDArray[np.int64]) -> None:
        """count_N: training events of every training item."""
        idf = 1 + np.log((1 + count_N.max(initial=0)) / (1 + count_N))
        self.idf_N.copy_(torch.from_numpy(idf[: len(self.idf_N)].astype(np.float32)))

    def forward(self, bags: Bags) -> Tensor:
        """-> (B, classes); zeros for an empty bag."""
        known = bags.item_E < len(self.idf_N)
        row_E, item_E = bags.row_E[known], bags.item_E[known]
        idf_E = self.idf_N[item_E]
        length_B = idf_E.new_zeros(bags.n).index_add(0, row_E, idf_E.square()).sqrt().clamp(min=1e-6)
        share_E = SCALE * idf_E / length_B[row_E]
        logit_EC = self.weight(item_E) * share_E[:, None]
        return logit_EC.new_zeros(bags.n, logit_EC.shape[1]).index_add(0, row_E, logit_EC)

    def penalty(self) -> Tensor:
        """Half the squared length of the weights, in the units of bags of unit length."""
        return 0.5 * (SCALE * self.weight.weight).square().sum()
