"""retrieval: which item comes next, by the full softmax over the training catalogue."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.models.batch import Batch
from mtrec_ray.tasks.base import Forward, Task


class Retrieval(Task):
    """−log softmax(query · item) per positive target, one row of logits per distinct (window, position).

    Other positives of the same moment stay in the denominator.
    """

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name = name
        self.query = nn.Linear(width, width)

    def count(self, batch: Batch) -> Tensor:
        return batch.targets.positive_M.sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        targets, L = batch.targets, forward.state_BLD.shape[1]
        positive = targets.positive_M
        place = targets.window_M[positive] * L + targets.pos_M[positive]
        distinct, row = torch.unique(place, return_inverse=True)
        state_RD = forward.state_BLD.flatten(0, 1)[distinct]
        log_p_RN = F.log_softmax(self.query(state_RD) @ forward.item_vec_ND.T, dim=1)
        return -log_p_RN[row, targets.item_M[positive]].sum()
