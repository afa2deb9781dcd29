"""Exact search that looks at all items in fewer bits, and scores the best of them again as they are.

int8 (a scale for every item and every query) is for single queries on a CPU with VNNI, where memory is what takes time; any other
CPU searches in float32, which is faster there. bf16 is for GPUs. `benchmarks.scoring_int8` measures both.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.models import int8
from mtrec_ray.models.int8 import product, rounded
from mtrec_ray.retrieval.exact import NONE, ExactIndex, RecallError, mask_items, top_k

log = logging.getLogger(__name__)

Precision = Literal["bf16", "int8"]
RESCORED = 2
"""Times as many as asked for that are scored again."""


class ReducedIndex(ExactIndex):
    """As ExactIndex, with a copy of the vectors in bf16 or int8 that few queries, and all on a GPU, read in their place."""

    def __init__(
        self, item_vec_ND: Tensor, precision: Precision, facts: dict[str, Any] | None = None, anywhere: bool = False
    ) -> None:
        """facts: what is known of its recall. anywhere: int8 even on a CPU that is slower with it, to measure that recall."""
        super().__init__(item_vec_ND)
        self.precision, self.facts = precision, facts or {}
        self.in_float32 = precision == "int8" and not (int8.NATIVE or anywhere)
        if precision == "int8" and item_vec_ND.device.type != "cpu":
            raise ValueError("index.precision: int8 is for CPUs; take bf16 on a GPU")
        if self.in_float32:
            log.warning("index.precision: int8 is slower than float32 on this CPU, which has no VNNI: searching in float32")
        elif precision == "int8":
            self.reduced_ND, scale_N1 = rounded(self.item_vec_ND)
            self.scale_N = scale_N1[:, 0].contiguous()
        else:
            self.reduced_ND = self.item_vec_ND.bfloat16()

    def _sort(self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]]) -> tuple[Tensor, Tensor]:
        if self.in_float32:
            return super()._sort(query_BD, k, exclude)
        near_BF, _ = top_k(mask_items(self.near_scores(query_BD), exclude), min(RESCORED * k, len(self)))
        score_BF = torch.bmm(self.item_vec_ND[near_BF.clamp(min=0)], query_BD[:, :, None])[:, :, 0]
        score_BF[near_BF == NONE] = float("-inf")
        place_BF = torch.argsort(near_BF, dim=1)  # ties by position
        near_BF, score_BF = near_BF.gather(1, place_BF), score_BF.gather(1, place_BF)
        score_BK, order = torch.sort(score_BF, dim=1, descending=True, stable=True)
        return near_BF.gather(1, order[:, :k]).cpu(), score_BK[:, :k].cpu()

    def near_scores(self, query_BD: Tensor) -> Tensor:
        """score_BN in fewer bits, of each query in a unit of its own."""
        if self.precision == "bf16":
            return (query_BD.bfloat16() @ self.reduced_ND.T).float()
        query_int8_BD, _ = rounded(query_BD)
        return product(query_int8_BD, self.reduced_ND.T) * self.scale_N


def build_reduced(item_vec_ND: Tensor, query_QD: Tensor, k: int, precision: Precision, min_recall: float) -> ReducedIndex:
    """query_QD: what will be asked, to measure the share of the exact k candidates that is found. Raises RecallError when that is
    below min_recall, or there is nothing to measure it with."""
    if not len(query_QD):
        raise RecallError("index: there are no users to measure it with; take precision: float32")
    index, k = ReducedIndex(item_vec_ND, precision, anywhere=True), min(k, len(item_vec_ND))
    nothing = [np.zeros(0, np.int64)]
    hits = 0
    for query_1D in torch.split(query_QD, 1):  # one by one, as it is for
        near, exact = (
            top[0][0].numpy() for top in (index.search(query_1D, k, nothing), ExactIndex(item_vec_ND).search(query_1D, k, nothing))
        )
        hits += len(np.intersect1d(near, exact))
    found = hits / (k * len(query_QD))
    index.facts = {"precision": precision, "recall": found, "recall_at": k, "queries": len(query_QD)}
    if found < min_recall:
        raise RecallError(
            f"index: {found:.3f} of the exact {k} candidates are found in {precision}, less than min_recall {min_recall}; take "
            "precision: float32"
        )
    return index
