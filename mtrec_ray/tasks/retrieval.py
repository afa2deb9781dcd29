"""retrieval: which item comes next, by softmax over the items that could be recommended, all of them or a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, RetrievalTask
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch, HistoryBatch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, Task
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind
from mtrec_ray.tasks.negatives import Negatives, column_of
from mtrec_ray.tasks.softmax import Hidden, softmax_loss

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


@dataclass
class Rows:
    """One row of logits per distinct (window, position), and the P positives that it must rank."""

    state_RD: Tensor
    window_R: Tensor
    pos_R: Tensor
    row_P: Tensor
    item_P: Tensor


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
        if config.negatives is None:
            return Retrieval(name, model.width, schema.exclude_seen)
        popularity = 0.75 if config.popularity is None else config.popularity
        alpha = 0.0 if config.loss == "gbce" else popularity
        negatives = Negatives(name, schema.n_train_items, config.negatives, alpha)
        if config.loss == "gbce":
            calibration = 0.75 if config.calibration is None else config.calibration
            return GeneralisedBce(name, model.width, schema.exclude_seen, negatives, calibration)
        return SampledSoftmax(name, model.width, schema.exclude_seen, negatives)

    def reads_items(self, batch: Batch) -> Tensor | None:
        return None

    def count(self, batch: Batch) -> Tensor:
        return batch.targets.positive_M.sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        rows, vec_ND = self.rows(forward, batch), forward.items.all_ND
        N = len(vec_ND)
        hidden = [Hidden(rows.row_P * N + rows.item_P)]
        if self.exclude_seen:
            hidden.append(self.seen(rows, batch.history.item_BS, N))
        return softmax_loss(self.query(rows.state_RD), vec_ND, rows.row_P, rows.item_P, N, hidden)

    def rows(self, forward: Forward, batch: Batch) -> Rows:
        targets, L = batch.targets, forward.state_BLD.shape[1]
        positive = targets.positive_M
        place_P = targets.window_M[positive] * L + targets.pos_M[positive]
        # a window's targets come in order, so equal places are neighbours; where they are not, a row is made twice
        place_R, row_P = torch.unique_consecutive(place_P, return_inverse=True)
        state_RD = F.embedding(place_R, forward.state_BLD.flatten(0, 1))  # its backward is faster than that of indexing
        return Rows(state_RD, place_R // L, place_R % L, row_P, targets.item_M[positive])

    def seen(self, rows: Rows, column_BS: Tensor, columns: int) -> Hidden:
        """The visible history of each row. column_BS: the column of each event's item, -1 where it has none."""
        column_RS = column_BS[rows.window_R]
        visible_RS = torch.arange(column_RS.shape[1], device=column_RS.device) < rows.pos_R[:, None]
        place_RS = torch.arange(len(column_RS), device=column_RS.device)[:, None] * columns + column_RS
        return Hidden(place_RS[visible_RS & (column_RS >= 0)])


class SampledRetrieval(Retrieval):
    """A loss over the positives of a moment and K negatives (see `Negatives`), one set of them for all rows of a step.

    A negative that is one of the row's positives is left out, and so are the items of the visible history with exclude_seen.
    """

    def __init__(self, name: str, width: int, exclude_seen: bool, negatives: Negatives) -> None:
        super().__init__(name, width, exclude_seen)
        self.negatives = negatives

    def fit_items(self, count_N: Tensor, seed: int) -> None:
        self.negatives.fit(count_N, seed)

    def reads_items(self, batch: Batch) -> Tensor | None:
        return self.negatives.draw(batch.step)[0]

    def hidden(self, rows: Rows, history: HistoryBatch, item_U: Tensor) -> list[Hidden]:
        """What is no negative of a row."""
        own_P = column_of(rows.item_P, item_U)
        hidden = [Hidden((rows.row_P * len(item_U) + own_P)[own_P >= 0])]
        return [*hidden, self.seen(rows, column_of(history.item_BS, item_U), len(item_U))] if self.exclude_seen else hidden


class SampledSoftmax(SampledRetrieval):
    """−log softmax with a sample in its denominator: e^s of every positive of the moment + Σ_negatives e^(s + log(n / (K q)))."""

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        rows = self.rows(forward, batch)
        item_U, count_U = self.negatives.draw(batch.step)
        vec_CD = forward.items[torch.cat([item_U, rows.item_P])]
        target_P = len(item_U) + _first(rows.item_P)
        hidden, bias_U = self.hidden(rows, batch.history, item_U), self.negatives.correction(item_U, count_U)
        return softmax_loss(self.query(rows.state_RD), vec_CD, rows.row_P, target_P, len(item_U), hidden, bias_U)


class GeneralisedBce(SampledRetrieval):
    """gBCE: −1 / (K + 1) · (β log σ(s⁺) + Σ_negatives log(1 − σ(s⁻))), β = a (t (1 − 1/a) + 1/a), a = K / (N − 1).

    Petrov & Macdonald 2023, gSASRec (arXiv 2308.07192). Negatives are uniform; t = 0 is plain BCE, t = 1 makes the
    probabilities those of training on all items. A negative drawn twice counts twice.
    """

    def __init__(self, name: str, width: int, exclude_seen: bool, negatives: Negatives, calibration: float) -> None:
        super().__init__(name, width, exclude_seen, negatives)
        self.calibration = calibration

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        rows, K = self.rows(forward, batch), self.negatives.draws
        item_U, count_U = self.negatives.draw(batch.step)
        query_RD = self.query(rows.state_RD)
        logit_RU = query_RD @ forward.items[item_U].T
        away = torch.zeros(logit_RU.numel(), dtype=torch.bool, device=logit_RU.device)
        for h in self.hidden(rows, batch.history, item_U):
            away[h.place] = True
        negative_RU = (F.softplus(logit_RU.float()) * count_U).masked_fill(away.view_as(logit_RU), 0.0)
        score_P = (F.embedding(rows.row_P, query_RD) * forward.items[rows.item_P]).sum(-1)
        a = min(1.0, K / max(1, len(self.negatives.cumulative_N) - 1))
        beta = a * (self.calibration * (1 - 1 / a) + 1 / a)
        row_sum_R = negative_RU.sum(1)
        return (row_sum_R[rows.row_P] - beta * F.logsigmoid(score_P.float())).sum() / (K + 1)


def _first(item_P: Tensor) -> Tensor:
    """The first place of each item among item_P, so that equal targets of a row have equal places."""
    item, inverse = torch.unique(item_P, return_inverse=True)
    place = torch.arange(len(item_P), device=item_P.device)
    return place.new_full((len(item),), len(item_P)).scatter_reduce_(0, inverse, place, "amin")[inverse]


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
