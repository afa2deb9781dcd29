"""similarity: items that belong together, by InfoNCE over the training catalogue or a sample (arXiv 1807.03748)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, SimilarityTask
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, Task
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind
from mtrec_ray.tasks.negatives import Negatives, column_of
from mtrec_ray.tasks.softmax import Hidden, softmax_loss

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Similarity(Task):
    """Cosine of projected item vectors; a pair is two training positives of one user close in time.

    The anchor itself is no candidate. The whole training catalogue is the denominator, so negatives are the
    same on every rank; or `negatives`, drawn the same on every rank and corrected by logQ, stand for it.
    """

    reads_state = False

    def __init__(self, name: str, width: int, temperature: float, negatives: Negatives | None = None) -> None:
        super().__init__()
        self.name, self.temperature, self.negatives = name, temperature, negatives
        self.project = nn.Linear(width, width, bias=False)

    @classmethod
    def build(cls, name: str, config: SimilarityTask, schema: LogSchema, model: ModelConfig) -> Similarity:
        negatives = None if config.negatives is None else Negatives(name, schema.n_train_items, config.negatives, 0.75)
        return cls(name, model.width, config.temperature, negatives)

    def fit_items(self, count_N: Tensor, seed: int) -> None:
        if self.negatives is not None:
            self.negatives.fit(count_N, seed)

    def vectors(self, item_vec_ND: Tensor) -> Tensor:
        """Unit vectors whose inner product is the similarity in [-1, 1]."""
        return F.normalize(self.project(item_vec_ND), dim=-1)

    def reads_items(self, batch: Batch) -> Tensor | None:
        if self.negatives is None:
            return None
        return torch.cat([self.negatives.draw(batch.step)[0], batch.pair_anchor_P, batch.pair_positive_P])

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch.pair_anchor_P), device=batch.pair_anchor_P.device)

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        anchor_P, positive_P = batch.pair_anchor_P, batch.pair_positive_P
        row_P = torch.arange(len(anchor_P), device=anchor_P.device)
        if self.negatives is None:
            vec_ND = self.vectors(forward.items.all_ND)
            N = len(vec_ND)
            hidden = [Hidden(row_P * N + anchor_P), Hidden(row_P * N + positive_P)]
            return softmax_loss(F.embedding(anchor_P, vec_ND) / self.temperature, vec_ND, row_P, positive_P, N, hidden)
        item_U, count_U = self.negatives.draw(batch.step)
        U, P = len(item_U), len(anchor_P)
        vec_CD = self.vectors(forward.items[torch.cat([item_U, positive_P, anchor_P])])
        columns = [column_of(item_P, item_U) for item_P in (anchor_P, positive_P)]
        hidden = [Hidden((row_P * U + column_P)[column_P >= 0]) for column_P in columns]
        bias_U = self.negatives.correction(item_U, count_U)
        return softmax_loss(vec_CD[U + P :] / self.temperature, vec_CD[: U + P], row_P, U + row_P, U, hidden, bias_U)


class SimilarityJudge(Judge):
    """hit@10 of the target among the items most like the last one before it."""

    main = "hit@10"
    nothing = "no target with a history item before it"

    def reduce(self, r: Reduction) -> None:
        if r.answers.hit is not None:
            r.per_user(f"{self.name}/hit@10", r.answers.hit)

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        key = f"{self.name}/hit@10"
        return {"hit@10": statistics.mean(key), "n": statistics.sums[key][:1, 1]} if statistics.counted(key) else {}


KIND = Kind("similarity", SimilarityTask, Similarity, SimilarityJudge)
