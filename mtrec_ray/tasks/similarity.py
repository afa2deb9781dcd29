"""similarity: items that belong together, by InfoNCE over the training catalogue (arXiv 1807.03748)."""

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

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Similarity(Task):
    """Cosine of projected item vectors; a pair is two training positives of one user close in time.

    The anchor itself is no candidate. The whole training catalogue is the denominator, so negatives are the
    same on every rank.
    """

    reads_state = False

    def __init__(self, name: str, width: int, temperature: float) -> None:
        super().__init__()
        self.name, self.temperature = name, temperature
        self.project = nn.Linear(width, width, bias=False)

    @classmethod
    def build(cls, name: str, config: SimilarityTask, schema: LogSchema, model: ModelConfig) -> Similarity:
        return cls(name, model.width, config.temperature)

    def vectors(self, item_vec_ND: Tensor) -> Tensor:
        """Unit vectors whose inner product is the similarity in [-1, 1]."""
        return F.normalize(self.project(item_vec_ND), dim=-1)

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(len(batch.pair_anchor_P), device=batch.pair_anchor_P.device)

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        vec_ND = self.vectors(forward.item_vec_ND)
        logit_PN = vec_ND[batch.pair_anchor_P] @ vec_ND.T / self.temperature
        logit_PN = logit_PN.scatter(1, batch.pair_anchor_P[:, None], float("-inf"))
        return F.cross_entropy(logit_PN, batch.pair_positive_P, reduction="sum")


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
