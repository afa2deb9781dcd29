"""profile: an attribute of the user, or what the user will turn to (interest.py), from the state and the visible items."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, ProfileTask
from mtrec_ray.evaluation import statistics as st
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, UserTask
from mtrec_ray.tasks.interest import Interest, InterestJudge
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind
from mtrec_ray.tasks.wide import Bags, Wide

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


DEEP_PENALTY = 300.0
"""The penalty of the deep term, as a multiple of the wide one's."""


class Profile(UserTask):
    """Softmax over classes: a wide term on the visible items and a deep one on the state.

    Every window of a user weighs 1 / (the user's windows); the count is their sum. Users of the valid and test folds come
    with the class -1: masked. The wide term alone is trained as tf-idf logistic regression is, with its penalty. The deep
    term is trained on what that leaves, so that it does not stand in its way; it is linear, with dropout and a strong
    penalty, since states know every training user by heart.
    """

    def __init__(
        self,
        name: str,
        attribute: str,
        classes: tuple[str, ...],
        width: int,
        n_train_items: int,
        wide_penalty: float = 2.5e-4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.name, self.key, self.attribute, self.classes, self.wide_penalty = name, attribute, attribute, classes, wide_penalty
        self.wide = Wide(n_train_items, len(classes))
        self.bias = nn.Parameter(torch.zeros(len(classes)))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, len(classes), bias=False)
        nn.init.zeros_(self.head.weight)

    @classmethod
    def build(cls, name: str, config: ProfileTask, schema: LogSchema, model: ModelConfig) -> UserTask:
        if config.attribute is None:
            return Interest.build(name, config, schema, model)
        classes = next(a.classes for a in schema.attributes if a.name == config.attribute)
        return cls(name, config.attribute, classes, model.width, schema.n_train_items, config.wide_penalty, model.dropout)

    def read_catalogue(self, catalogue: pa.Table, schema: LogSchema, held_folds: tuple[int, ...]) -> None:
        self.wide.count_items(catalogue["count"].to_numpy()[: schema.n_train_items])

    def logits(self, state_BD: Tensor, bags: Bags) -> Tensor:
        return self.wide(bags) + self.bias + self._deep(state_BD)  # type: ignore[no-any-return]

    def _deep(self, state_BD: Tensor) -> Tensor:
        return self.head(self.dropout(state_BD))  # type: ignore[no-any-return]

    def count(self, batch: Batch) -> Tensor:
        return batch.profile_weight_B[batch.profile_B[self.attribute] >= 0].sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        label = batch.profile_B[self.attribute]
        valid = torch.nonzero(label >= 0).squeeze(-1)
        weight_W = batch.profile_weight_B[valid]
        wide_WC = self.wide(Bags.of_windows(batch.history, valid)) + self.bias
        deep_WC = self._deep(forward.state_BLD[valid, batch.history.length_B[valid]])
        both = F.cross_entropy(wide_WC.detach() + deep_WC, label[valid], reduction="none")
        alone = F.cross_entropy(wide_WC, label[valid], reduction="none")
        penalty = self.wide.penalty() + 0.5 * DEEP_PENALTY * self.head.weight.square().sum()
        return ((both + alone) * weight_W).sum() + self.wide_penalty * penalty * weight_W.sum()


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
        found = st.class_metrics(statistics, self.name)
        if f"{self.name}/auc" in statistics.scores:
            found["auc"] = statistics.scores[f"{self.name}/auc"].auc(resampler)
        return found


def judge_of(name: str, config: ProfileTask) -> Judge:
    return InterestJudge(name, config) if config.attribute is None else ProfileJudge(name, config)


KIND = Kind("profile", ProfileTask, Profile, judge_of)
