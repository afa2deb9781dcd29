"""profile: an attribute of the user, read from the state at a window's end."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.models.batch import Batch
from mtrec_ray.tasks.base import Forward, Task


class Profile(Task):
    """Softmax over classes. Every window of a user weighs 1 / (the user's windows); the count is their sum.

    Users of the valid and test folds come with the class -1: masked.
    """

    def __init__(self, name: str, attribute: str, classes: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.name, self.attribute, self.classes = name, attribute, classes
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, len(classes))

    def logits(self, state_BD: Tensor) -> Tensor:
        return self.head(F.gelu(self.project(state_BD)))  # type: ignore[no-any-return]

    def count(self, batch: Batch) -> Tensor:
        return batch.profile_weight_B[batch.profile_B[self.attribute] >= 0].sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        label = batch.profile_B[self.attribute]
        valid = torch.nonzero(label >= 0).squeeze(-1)
        state_BD = forward.state_BLD[valid, batch.history.length_B[valid]]
        loss = F.cross_entropy(self.logits(state_BD), label[valid], reduction="none")
        return (loss * batch.profile_weight_B[valid]).sum()
