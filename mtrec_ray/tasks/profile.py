"""profile: an attribute of the user, read from the state at a window's end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, ProfileTask
from mtrec_ray.evaluation import statistics as st
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, Task
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Profile(Task):
    """Softmax over classes. Every window of a user weighs 1 / (the user's windows); the count is their sum.

    Users of the valid and test folds come with the class -1: masked.
    """

    def __init__(self, name: str, attribute: str, classes: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.name, self.attribute, self.classes = name, attribute, classes
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, len(classes))

    @classmethod
    def build(cls, name: str, config: ProfileTask, schema: LogSchema, model: ModelConfig) -> Profile:
        classes = next(a.classes for a in schema.attributes if a.name == config.attribute)
        return cls(name, config.attribute, classes, model.width)

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


class ProfileJudge(Judge):
    """Every user of the judged folds once: at the last moment with a label."""

    main = "accuracy"
    nothing = "no user of the test folds with the attribute"

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.attribute = config.attribute

    def reduce(self, r: Reduction) -> None:
        if r.part.by_item or self.name not in r.answers.profiles:
            return
        label = r.facts.attributes[self.config.attribute]
        judged = np.flatnonzero(r.part.moment & (label >= 0) & np.isin(r.facts.fold, r.over.folds))
        if not len(judged):
            return
        _, back = np.unique(r.user[judged][::-1], return_index=True)
        pick = judged[::-1][back]
        probability, user = r.answers.profiles[self.name][pick], r.user[pick]
        r.classes(self.name, label[pick], probability.argmax(1), probability.shape[1], user)
        if probability.shape[1] == 2:
            r.out.scores[f"{self.name}/auc"] = Scores(label[pick] == 1, probability[:, 1], r.hashes[user])

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if f"{self.name}/confusion" not in statistics.sums:
            return {}
        found = st.class_metrics(statistics.sums[f"{self.name}/classes"])
        if f"{self.name}/auc" in statistics.scores:
            found["auc"] = statistics.scores[f"{self.name}/auc"].auc(resampler)
        return found


KIND = Kind("profile", ProfileTask, Profile, ProfileJudge)
