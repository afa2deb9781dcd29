"""similarity: items that belong together, by InfoNCE over the training catalogue (arXiv 1807.03748)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.models.batch import Batch
from mtrec_ray.tasks.base import Forward, Task


class Similarity(Task):
    """Cosine of projected item vectors; a pair is two training positives of one user close in time.

    The anchor itself is no candidate. The whole training catalogue is the denominator, so negatives are the
    same on every rank.
    """

    def __init__(self, name: str, width: int, temperature: float) -> None:
        super().__init__()
        self.name, self.temperature = name, temperature
        self.project = nn.Linear(width, width, bias=False)

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
