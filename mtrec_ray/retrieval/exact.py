"""Exact top-k by inner product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NONE = -1
"""Stands where there is no further item."""


def mask_items(score_BN: Tensor, exclude: Sequence[NDArray[np.integer]]) -> Tensor:  # type: ignore[type-arg]
    """Set the excluded items of each row to -inf, in place."""
    row = np.repeat(np.arange(len(exclude)), [len(e) for e in exclude])
    if len(row):
        items = np.concatenate([np.asarray(e, dtype=np.int64) for e in exclude])
        score_BN[torch.from_numpy(row), torch.from_numpy(items)] = float("-inf")
    return score_BN


def count_where(score_BN: Tensor, value_B: Tensor, compare: Callable[..., Any]) -> Tensor:
    """How many scores of each row compare (np.equal, np.greater_equal) with the row's value -> int64 (B,).

    On a CPU NumPy counts row by row: the comparison stays in cache, which is ten times as fast as torch's.
    """
    if score_BN.device.type != "cpu":
        value_B1 = value_B[:, None]
        return ((score_BN == value_B1) if compare is np.equal else (score_BN >= value_B1)).sum(1)
    counts = [np.count_nonzero(compare(row, value)) for row, value in zip(score_BN.numpy(), value_B.numpy(), strict=True)]
    return torch.tensor(counts, dtype=torch.int64)


def _largest(score_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row in descending order -> (score_BK, item_BK); among equals any of them.

    In a wide row only the k blocks with the largest maxima can hold them, and finding maxima is a plain pass over
    memory: two to three times as fast as torch.topk over 100,000 scores.
    """
    B, N = score_BN.shape
    width = int(np.sqrt(N / k) / 3)
    if N < 4096 or width < 4:
        return torch.topk(score_BN, k, dim=1)
    blocks = N // width
    # block j holds the items j, j + blocks, j + 2 blocks, ..., so that the maximum runs along whole rows
    best = torch.topk(score_BN[:, : blocks * width].view(B, width, blocks).amax(1), k, dim=1, sorted=False).indices
    item_BC = (best[:, None, :] + (torch.arange(width, device=best.device) * blocks)[None, :, None]).flatten(1)
    tail = torch.arange(blocks * width, N, device=best.device).expand(B, -1)
    item_BC = torch.cat([item_BC, tail], dim=1)
    score_BK, place = torch.topk(score_BN.gather(1, item_BC), k, dim=1)
    return score_BK, item_BC.gather(1, place)


def top_k(score_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each row, ties by position -> (item_BK int64, score_BK), min(k, N) wide.

    -inf is no candidate: NONE, -inf. NaN is the best of all, so that it cannot hide.
    """
    N = score_BN.shape[1]
    k = min(k, N)
    if not k:
        return torch.zeros(len(score_BN), 0, dtype=torch.int64), score_BN[:, :0]
    # one more than asked for: where it equals the last one, others may share its score, and the first ones count
    more_BK, item_BK = _largest(score_BN, min(k + 1, N))
    crowded = more_BK[:, k - 1] == more_BK[:, -1] if k < N else torch.zeros(len(score_BN), dtype=torch.bool)
    item_BK, _ = torch.sort(item_BK[:, :k], dim=1)
    score_BK = torch.gather(score_BN, 1, item_BK)
    score_BK, order = torch.sort(score_BK, dim=1, descending=True, stable=True)
    item_BK = torch.gather(item_BK, 1, order)
    crowded &= ~torch.isneginf(score_BK[:, -1])
    if crowded.any():
        full_score, full_item = torch.sort(score_BN[crowded], dim=1, descending=True, stable=True)
        score_BK[crowded], item_BK[crowded] = full_score[:, :k], full_item[:, :k]
    return torch.where(torch.isneginf(score_BK), NONE, item_BK), score_BK


class ExactIndex:
    """Inner products of queries with every item vector of the catalogue."""

    kind = "exact"

    def __init__(self, item_vec_ND: Tensor) -> None:
        self.item_vec_ND = item_vec_ND

    def __len__(self) -> int:
        return len(self.item_vec_ND)

    def scores(self, query_BD: Tensor) -> Tensor:
        """score_BN."""
        return query_BD @ self.item_vec_ND.T

    def search(self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[np.integer]]) -> tuple[Tensor, Tensor]:  # type: ignore[type-arg]
        """Best k items of each row that are not excluded -> (item_BK, score_BK), min(k, N) wide, NONE
        where a row has fewer."""
        return top_k(mask_items(self.scores(query_BD), exclude), k)
