"""retrieval: which item comes next, by the full softmax over the items that could be recommended."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.models.batch import Batch
from mtrec_ray.tasks.base import Forward, Task


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
