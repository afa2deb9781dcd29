"""Exact top-k by inner product (docs/retrieval.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NONE = -1
"""Stands where there is no further item."""
LARGE = 8192
"""Items from which on faiss selects: below, its blocks gain nothing."""
FEW = 8
"""Queries up to which one product and a sort are faster in a large catalogue too."""
AT_ONCE = 1024
"""Queries searched together."""
OVER_FETCHED = 1024
"""Excluded items of a row up to which more is fetched instead of the row being sorted."""


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
        return torch.zeros_like(score_BN[:, :0], dtype=torch.int64), score_BN[:, :0]
    # one more than asked for: where it equals the last one, others may share its score, and the first ones count
    more_BK, item_BK = _largest(score_BN, min(k + 1, N))
    crowded = more_BK[:, k - 1] == more_BK[:, -1] if k < N else torch.zeros_like(more_BK[:, 0], dtype=torch.bool)
    item_BK, _ = torch.sort(item_BK[:, :k], dim=1)
    score_BK = torch.gather(score_BN, 1, item_BK)
    score_BK, order = torch.sort(score_BK, dim=1, descending=True, stable=True)
    item_BK = torch.gather(item_BK, 1, order)
    crowded &= ~torch.isneginf(score_BK[:, -1])
    if crowded.any():
        full_score, full_item = torch.sort(score_BN[crowded], dim=1, descending=True, stable=True)
        score_BK[crowded], item_BK[crowded] = full_score[:, :k], full_item[:, :k]
    return torch.where(torch.isneginf(score_BK), NONE, item_BK), score_BK


class RecallError(ValueError):
    """An index that finds less than it must."""


class Index(Protocol):
    """What searches a catalogue."""

    kind: str

    def __len__(self) -> int: ...

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ExactIndex.search."""


class ExactIndex:
    """Inner products of queries with every item vector of the catalogue.

    A small catalogue, and every one on a GPU, is a matrix product and a sort; a large one on a CPU is searched by faiss, which
    selects while it multiplies: no score matrix of all items is ever made, and no copy of the vectors. Both give the same
    items in the same order: ties go by position.
    """

    kind = "exact"

    def __init__(self, item_vec_ND: Tensor) -> None:
        self.item_vec_ND = item_vec_ND.contiguous()
        # NaN is never selected by faiss, and must not hide
        self.selects = item_vec_ND.device.type == "cpu" and len(item_vec_ND) >= LARGE and bool(torch.isfinite(item_vec_ND).all())

    def __len__(self) -> int:
        return len(self.item_vec_ND)

    def scores(self, query_BD: Tensor) -> Tensor:
        """score_BN."""
        return query_BD @ self.item_vec_ND.T

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Best k items of each row that are not excluded -> (item_BK, score_BK) on the CPU, min(k, N) wide, NONE where a row has
        fewer.

        exclude: catalogue positions of each row, ascending; allowed_N: no row gets other items; None: all are.
        """
        B, k = len(query_BD), min(k, len(self))
        if not k:
            return torch.zeros(B, 0, dtype=torch.int64), torch.zeros(B, 0)
        if allowed_N is not None:
            return self._filtered(query_BD, k, exclude, allowed_N)
        search = self._search if self.selects and B >= FEW else self._sort
        found = [search(query_BD[b : b + AT_ONCE], k, exclude[b : b + AT_ONCE]) for b in range(0, max(B, 1), AT_ONCE)]
        return torch.cat([item for item, _ in found]), torch.cat([score for _, score in found])

    def _filtered(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """The allowed items are a catalogue of their own, unless that costs a single query more than a look at all of them."""
        position = np.flatnonzero(allowed_N)
        if len(query_BD) < FEW and 2 * len(position) > len(self):
            score_BN = self.scores(query_BD)
            score_BN[:, torch.from_numpy(~allowed_N)] = float("-inf")
            item_BK, score_BK = top_k(mask_items(score_BN, exclude), k)
            return item_BK.cpu(), score_BK.cpu()
        part = ExactIndex(self.item_vec_ND[torch.from_numpy(position).to(self.item_vec_ND.device)])
        inside = [np.searchsorted(position, items[allowed_N[items]]) for items in exclude]
        item_BK, score_BK = part.search(query_BD, k, inside)
        item_BK = torch.where(item_BK == NONE, NONE, torch.from_numpy(np.append(position, NONE))[item_BK])
        more = (0, k - item_BK.shape[1])
        return torch.nn.functional.pad(item_BK, more, value=NONE), torch.nn.functional.pad(score_BK, more, value=float("-inf"))

    def _sort(self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
        item_BK, score_BK = top_k(mask_items(self.scores(query_BD), exclude), k)
        return item_BK.cpu(), score_BK.cpu()

    def _search(self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
        """faiss finds as many more as a row excludes; rows for which that does not settle it are sorted."""
        F = fetched(k, exclude, len(self))
        found = inner_products(query_BD.numpy(), self.item_vec_ND.numpy(), F)
        item_BK, score_BK, unsettled = pick(*found, k, exclude, len(self))
        unsettled |= (score_BK[:, -1] == found[0].min(1)) & (len(self) > F)  # the last score may go on beyond those found
        unsettled |= ~np.isfinite(query_BD.numpy()).all(1)
        return self.sort_rows(query_BD, k, exclude, unsettled, item_BK, score_BK)

    def sort_rows(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], rows_B: NDArray[np.bool_],
        item_BK: NDArray[np.int64], score_BK: NDArray[np.float32], allowed_N: NDArray[np.bool_] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Put the exact answer into some rows."""
        for row in np.flatnonzero(rows_B).tolist():
            item, score = self.search(query_BD[row : row + 1], k, exclude[row : row + 1], allowed_N)
            item_BK[row], score_BK[row] = item[0].numpy(), score[0].numpy()
        return torch.from_numpy(item_BK), torch.from_numpy(score_BK)


def fetched(k: int, exclude: Sequence[NDArray[Any]], N: int) -> int:
    """How many are searched for, so that k are left where none excludes more than OVER_FETCHED: one more than that, since where it
    equals the last one, others may share its score."""
    return min(k + max((len(e) for e in exclude if len(e) <= OVER_FETCHED), default=0) + 1, N)


def pick(
    score_BF: NDArray[np.float32], item_BF: NDArray[np.int64], k: int, exclude: Sequence[NDArray[Any]], N: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.bool_]]:
    """What faiss found, descending, -1 where there was nothing -> the best k that are not excluded, ties by position, and the rows
    where fewer were left though the catalogue of N has more."""
    for row in np.flatnonzero((score_BF[:, 1:] == score_BF[:, :-1]).any(1)).tolist():
        order = np.lexsort((np.where(item_BF[row] < 0, N, item_BF[row]), -score_BF[row]))
        score_BF[row], item_BF[row] = score_BF[row][order], item_BF[row][order]
    allowed_BF = item_BF >= 0
    out = np.zeros(N + 1, bool)  # the last one is -1's
    for row, items in enumerate(exclude):
        if len(items):
            out[items] = True
            allowed_BF[row] &= ~out[item_BF[row]]
            out[items] = False
    place = np.argsort(~allowed_BF, axis=1, kind="stable")[:, :k]  # allowed ones first, in their order
    item_BK, score_BK = np.take_along_axis(item_BF, place, 1), np.take_along_axis(score_BF, place, 1)
    there = np.take_along_axis(allowed_BF, place, 1)
    item_BK[~there], score_BK[~there] = NONE, float("-inf")
    return item_BK, score_BK, ~there[:, -1] & (item_BF.shape[1] < N)


def merge(found: Sequence[tuple[Tensor, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """What was found in parts of a catalogue, by the catalogue's positions -> the best k of all, ties by position."""
    item_BM, score_BM = torch.cat([item for item, _ in found], 1), torch.cat([score for _, score in found], 1)
    by_item = torch.argsort(item_BM, dim=1, stable=True)
    order = by_item.gather(1, torch.argsort(score_BM.gather(1, by_item), dim=1, descending=True, stable=True))[:, :k]
    return item_BM.gather(1, order), score_BM.gather(1, order)


def inner_products(
    query_BD: NDArray[np.float32], item_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k largest of each row, descending -> (score_BK, item_BK): faiss, on as many threads as torch has."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    faiss.cvar.distance_compute_blas_threshold = 8  # its own takes the slow path for hundreds of queries
    return faiss.knn(np.ascontiguousarray(query_BD), item_ND, k, metric=faiss.METRIC_INNER_PRODUCT)  # type: ignore[no-any-return]
