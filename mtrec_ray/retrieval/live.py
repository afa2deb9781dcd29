"""Changes to a catalogue while it is served: items that joined it, and items that nobody gets any more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.retrieval.exact import OVER_FETCHED, ExactIndex, Index, merge
from mtrec_ray.retrieval.ivf import IvfIndex

FEW_GONE = OVER_FETCHED // 2
"""Items gone up to which each query fetches more instead of filtering."""


class GrownVectors:
    """Vectors of a catalogue and, behind them, of the items that joined it; looked up by position."""

    def __init__(self, item_vec_ND: Tensor, added_AD: Tensor) -> None:
        self.item_vec_ND, self.added_AD = item_vec_ND, added_AD

    def __len__(self) -> int:
        return len(self.item_vec_ND) + len(self.added_AD)

    def __getitem__(self, item: Tensor) -> Tensor:
        """Positions of any shape -> shape + (D,)."""
        N = len(self.item_vec_ND)
        found = self.item_vec_ND[item.clamp(max=N - 1)]
        joined = item >= N
        found[joined] = self.added_AD[item[joined] - N]
        return found


class LiveIndex:
    """An index of the catalogue as it was built, the items that joined it (searched exactly), and those that are gone.

    Searching it is searching the catalogue as it is now: the items that joined have the positions from N on.
    """

    def __init__(self, base: Index, added_AD: Tensor, gone: NDArray[np.int64]) -> None:
        """gone: positions, ascending, of the base and of the added ones."""
        self.base, self.gone = base, gone
        self.added = ExactIndex(added_AD.cpu() if isinstance(base, IvfIndex) else added_AD)
        self.kind = base.kind

    def __len__(self) -> int:
        return len(self.base) + len(self.added)

    def scores(self, query_BD: Tensor) -> Tensor:
        """score_BN of all items, -inf for those that are gone."""
        base = self.base.exact if isinstance(self.base, IvfIndex) else self.base
        assert isinstance(base, ExactIndex)
        score_BN = torch.cat([base.scores(query_BD), self.added.scores(query_BD)], 1)
        score_BN[:, torch.from_numpy(self.gone)] = float("-inf")
        return score_BN

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ExactIndex.search."""
        N, k = len(self.base), min(k, len(self))
        gone = self.gone
        if len(gone) > FEW_GONE:
            allowed_N = np.ones(len(self), bool) if allowed_N is None else allowed_N.copy()
            allowed_N[gone] = False
            gone = gone[:0]
        out = [np.union1d(items, gone) for items in exclude]
        before = [items[items < N] for items in out]
        joined = [items[items >= N] - N for items in out]
        allowed = (None, None) if allowed_N is None else (allowed_N[:N], allowed_N[N:])
        old = self.base.search(query_BD, k, before, allowed[0])
        new_item, new_score = self.added.search(query_BD.to(self.added.item_vec_ND.device), k, joined, allowed[1])
        return merge([old, (torch.where(new_item < 0, new_item, new_item + N), new_score)], k)
