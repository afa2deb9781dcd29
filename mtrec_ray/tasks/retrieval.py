"""retrieval: which item comes next, by the full softmax over the items that could be recommended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, RetrievalTask
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, Task
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Retrieval(Task):
    """−log softmax(query · item) per positive target, one row of logits per distinct (window, position).

    Other positives of the same moment stay in the denominator. Where seen items are never recommended
    (exclude_seen), the items of the visible history leave it: the model need not learn to push down what the
    seen filter removes anyway.
    """

    def __init__(self, name: str, width: int, exclude_seen: bool) -> None:
        super().__init__()
        self.name, self.exclude_seen = name, exclude_seen
        self.query = nn.Linear(width, width)

    @classmethod
    def build(cls, name: str, config: RetrievalTask, schema: LogSchema, model: ModelConfig) -> Retrieval:
        return cls(name, model.width, schema.exclude_seen)

    def count(self, batch: Batch) -> Tensor:
        return batch.targets.positive_M.sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        targets, L = batch.targets, forward.state_BLD.shape[1]
        positive = targets.positive_M
        item_P = targets.item_M[positive]
        place_P = targets.window_M[positive] * L + targets.pos_M[positive]
        place_R, row_P = torch.unique(place_P, return_inverse=True)
        state_RD = forward.state_BLD.flatten(0, 1)[place_R]
        logit_RN = self.query(state_RD) @ forward.item_vec_ND.T
        if self.exclude_seen:
            seen_RN = torch.zeros(logit_RN.shape, dtype=torch.bool, device=logit_RN.device)
            item_RS = batch.history.item_BS[place_R // L]
            visible_RS = torch.arange(item_RS.shape[1], device=item_RS.device) < (place_R % L)[:, None]
            r, s = visible_RS.nonzero(as_tuple=True)
            seen_RN[r, item_RS[r, s]] = True
            seen_RN[row_P, item_P] = False  # a target that comes back is what happened, filter or not
            logit_RN = logit_RN.masked_fill(seen_RN, float("-inf"))
        return -F.log_softmax(logit_RN, dim=1)[row_P, item_P].sum()


class RetrievalJudge(Judge):
    """Ranks of the relevant items in the full catalogue, in retrieval order and in the final order; properties of the lists."""

    main = "ndcg@10"
    nothing = "no positive target"
    final = ("ndcg@10", "hr@10", "mrr")

    def reduce(self, r: Reduction) -> None:
        answers, name = r.answers, self.name
        if answers.rank is not None:
            self._ranks(r, answers.rank, m.RANKING, "")
            self._ranks(r, answers.rank if answers.final_rank is None else answers.final_rank, self.final, "final_")
        if not r.part.by_item:
            for metric, value_B in r.lists.items():
                r.per_user(f"{name}/{metric}", value_B)
        if answers.top is not None and r.is_whole:
            shown = answers.top[answers.top >= 0]
            r.out.sums[f"{name}/exposure"] = np.bincount(shown, minlength=len(r.over.predictor.popularity_N)).astype(np.float64)

    def _ranks(self, r: Reduction, rank_P: NDArray[np.int64], names: tuple[str, ...], prefix: str) -> None:
        pair = r.part.pair
        found = m.ranking_metrics(r.facts.pair_moment[pair], rank_P[pair], len(r.facts))
        for metric in names:
            r.per_user(f"{self.name}/{prefix}{metric}", found[metric])
        if not prefix:
            r.out.sums[f"{self.name}/moments"] = np.array([float((~np.isnan(found["mrr"])).sum())])

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        name = self.name
        if not statistics.counted(f"{name}/mrr"):
            return {}
        metrics = (*m.RANKING, *[f"final_{n}" for n in self.final], *m.LISTS)
        found = {n: statistics.mean(f"{name}/{n}") for n in metrics if statistics.counted(f"{name}/{n}")}
        found |= {"n": statistics.sums[f"{name}/mrr"][:1, 1], "moments": statistics.sums[f"{name}/moments"]}
        exposure = statistics.sums.get(f"{name}/exposure")
        if exposure is not None and exposure.any():
            found |= {"coverage@10": np.array([(exposure > 0).mean()]), "gini@10": np.array([m.gini(exposure)])}
        return found


KIND = Kind("retrieval", RetrievalTask, Retrieval, RetrievalJudge)
