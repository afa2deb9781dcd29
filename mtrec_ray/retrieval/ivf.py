"""Approximate top-k: the catalogue in lists around centres, of which a query looks at the nearest (faiss IVF, docs/retrieval.md).

Jégou, Douze, Schmid: Product quantization for nearest neighbor search (2011), section IV, with eight bits a number in the lists: a
search reads a quarter of the memory. Twice as many as asked for are found there and scored again with the vectors as they are, so
scores are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.retrieval.exact import ExactIndex, RecallError, fetched, pick

RESCORED = 2
"""Times as many as asked for that are found with eight bits."""
AT_ONCE = 64
"""Queries searched together: what they score again is gathered, some 10 MB of it."""
PER_LIST = 40
"""Items that a list has on average at least; with fewer its centre is no centre of anything."""


class IvfIndex:
    """A faiss index of the catalogue's vectors, and in how many of its lists a query looks."""

    kind = "ivf"

    def __init__(self, lists: Any, item_vec_ND: Tensor, probes: int, facts: dict[str, Any] | None = None) -> None:
        """lists: a trained and filled faiss.IndexIVFScalarQuantizer; facts: what is known of its recall."""
        self.lists, self.probes, self.facts = lists, probes, facts or {}
        self.exact = ExactIndex(item_vec_ND.cpu())

    def __len__(self) -> int:
        return len(self.exact)

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ExactIndex.search, and as complete: a row that the lists leave with fewer than k items is searched exactly.

        Behind a filter a query looks into as many more lists as leaves it as many allowed items to look at; a filter that
        allows no more than that is a small catalogue, searched exactly.
        """
        import faiss

        query_BD, k, probes = query_BD.cpu(), min(k, len(self)), self.probes
        if not k or not len(query_BD):
            return torch.zeros(len(query_BD), k, dtype=torch.int64), torch.zeros(len(query_BD), k)
        if allowed_N is not None:
            share = float(allowed_N.mean())
            if share * self.lists.nlist <= self.probes:
                return self.exact.search(query_BD, k, exclude, allowed_N)
            probes = min(math.ceil(self.probes / share), self.lists.nlist)
        faiss.omp_set_num_threads(torch.get_num_threads())
        found = []
        for begin in range(0, len(query_BD), AT_ONCE):
            query, out = query_BD[begin : begin + AT_ONCE], exclude[begin : begin + AT_ONCE]
            score_BF, item_BF = self.near(query, fetched(k, out, len(self)), probes, allowed_N)
            item_BK, score_BK, unsettled = pick(score_BF, item_BF, k, out, len(self))
            unsettled |= ~np.isfinite(query.numpy()).all(1)
            found.append(self.exact.sort_rows(query, k, out, unsettled, item_BK, score_BK, allowed_N))
        return torch.cat([item for item, _ in found]), torch.cat([score for _, score in found])

    def near(
        self, query_BD: Tensor, k: int, probes: int, allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k best allowed ones in so many lists, descending -> (score_BK, item_BK), -1 where there are fewer."""
        import faiss

        bits = None if allowed_N is None else np.packbits(allowed_N, bitorder="little")
        selector = None if bits is None else faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg, arg-type]
        how = faiss.SearchParametersIVF(nprobe=probes, sel=selector)  # type: ignore[call-arg]
        _, item_BF = self.lists.search(np.ascontiguousarray(query_BD.numpy()), min(RESCORED * k, len(self)), params=how)
        score_BF = torch.bmm(self.exact.item_vec_ND[torch.from_numpy(item_BF)], query_BD[:, :, None])[:, :, 0].numpy()
        score_BF[item_BF < 0] = -np.inf  # -1 took the last item's vector
        order = np.argsort(-score_BF, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(score_BF, order, 1), np.take_along_axis(item_BF, order, 1)

    def save(self) -> bytes:
        import faiss

        return bytes(faiss.serialize_index(self.lists).tobytes())

    @classmethod
    def load(cls, content: bytes | Path, item_vec_ND: Tensor, facts: dict[str, Any]) -> IvfIndex:
        """content: of `save`, or a local file of it, which is memory-mapped and shared by processes."""
        import faiss

        if isinstance(content, Path):
            lists = faiss.read_index(str(content), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        else:
            lists = faiss.deserialize_index(np.frombuffer(content, np.uint8))
        return cls(lists, item_vec_ND, int(facts["probes"]), facts)


def list_count(items: int, wanted: int | None) -> int:
    return max(1, min(wanted or round(4 * math.sqrt(items)), items // PER_LIST))


def build_ivf(
    item_vec_ND: Tensor,
    query_QD: Tensor,
    k: int,
    *,
    lists: int | None = None,
    recall: float = 0.98,
    min_recall: float = 0.95,
    seed: int = 0,
) -> IvfIndex:
    """Divide the catalogue, and find in how many lists the queries must look.

    query_QD: what will be asked; every second query tunes, the others measure. k: candidates that recall is about.
    Raises RecallError when the measured recall is below min_recall or there is nothing to measure it with, ValueError for vectors
    that are no numbers.
    """
    import faiss

    if len(query_QD) < 2:
        raise RecallError(f"index: {len(query_QD)} users to tune it on and to measure it with; take more, or set index.kind: exact")
    vectors = np.ascontiguousarray(item_vec_ND.cpu().numpy())
    if not np.isfinite(vectors).all():
        raise ValueError("item vectors contain NaN or infinity: the model is broken")
    n_lists, k = list_count(len(vectors), lists), min(k, len(vectors))
    faiss.omp_set_num_threads(torch.get_num_threads())
    found = IvfIndex(_divided(vectors, n_lists, seed), item_vec_ND, 1)
    tuning, judging = query_QD.cpu()[::2], query_QD.cpu()[1::2]
    truth = _items(found.exact, tuning, k)
    probes = 1
    while probes < n_lists and recall_of(found, tuning, truth, probes) < recall:
        probes = min(2 * probes, n_lists)
    low = probes // 2  # between the last two powers of two
    while probes - low > max(1, probes // 16):
        middle = (low + probes) // 2
        if recall_of(found, tuning, truth, middle) < recall:
            low = middle
        else:
            probes = middle
    measured = recall_of(found, judging, _items(found.exact, judging, k), probes)
    found.probes = probes
    found.facts = {"lists": n_lists, "probes": probes, "recall": measured, "recall_at": k, "queries": len(judging)}
    if measured < min_recall:
        raise RecallError(
            f"index: {measured:.3f} of the exact {k} candidates are found in {probes} of {n_lists} lists, less than min_recall "
            f"{min_recall}; raise index.recall, or set index.kind: exact"
        )
    return found


def _divided(vector_ND: NDArray[np.float32], n_lists: int, seed: int) -> Any:
    """The lists. An item is in that of the nearest centre, and a query looks where its inner product with the centre is largest:
    with inner products on both sides the longest centres draw most items, and every query."""
    import faiss

    D = vector_ND.shape[1]
    means = faiss.Kmeans(D, n_lists, niter=10, seed=seed + 1, min_points_per_centroid=1, max_points_per_centroid=64)
    means.train(vector_ND)
    nearest = np.ascontiguousarray(means.index.search(vector_ND, 1)[1][:, 0])
    centres = faiss.IndexFlatIP(D)
    centres.add(np.asarray(means.centroids))
    lists = faiss.IndexIVFScalarQuantizer(centres, D, n_lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, False)
    lists.train(vector_ND)  # the eight bits; the centres are there
    lists.add_core(len(vector_ND), faiss.swig_ptr(vector_ND), None, faiss.swig_ptr(nearest))
    return lists


def recall_of(index: IvfIndex, query_QD: Tensor, truth_QK: NDArray[np.int64], probes: int) -> float:
    """Share of the exact top k that is found when so many lists are looked at; a row of too few is not made up for."""
    k = truth_QK.shape[1]
    item_QK = np.concatenate([index.near(part, k, probes)[1] for part in torch.split(query_QD, AT_ONCE)])
    hits = [len(np.intersect1d(a, b)) for a, b in zip(item_QK, truth_QK, strict=True)]
    return float(np.mean(hits) / truth_QK.shape[1])


def _items(index: ExactIndex, query_QD: Tensor, k: int) -> NDArray[np.int64]:
    return index.search(query_QD, k, [np.zeros(0, np.int64)] * len(query_QD))[0].numpy()
