"""multilabel: several binary labels as one task with one head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, MultilabelTask
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import Column, FloatArray, Judge, Kind

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Multilabel(PointwiseTask):
    """p_c = sigmoid(head_c). A pair of target and label counts once; one without its label is masked, never read as 0.

    The one number per item is the mean of the probabilities.
    """

    several_numbers = True

    def __init__(self, name: str, labels: tuple[str, ...], shared_width: int) -> None:
        super().__init__()
        self.name, self.labels = name, labels
        self.head = nn.Linear(shared_width, len(labels))

    @classmethod
    def build(cls, name: str, config: MultilabelTask, schema: LogSchema, model: ModelConfig) -> Multilabel:
        return cls(name, config.labels, model.sharing_width)

    def _label_MC(self, batch: Batch) -> Tensor:
        return torch.stack([batch.targets.labels_M[n] for n in self.labels], dim=1)

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(self._label_MC(batch))).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y_MC = self._label_MC(batch)
        valid = ~torch.isnan(y_MC)
        logit = self.head(forward.shared[self.name])[valid]
        return F.binary_cross_entropy_with_logits(logit, y_MC[valid], reduction="sum")

    def distribution(self, shared: Tensor) -> Tensor:
        """A probability per label; they need not add up to 1."""
        return torch.sigmoid(self.head(shared))

    def predict(self, shared: Tensor) -> Tensor:
        return self.distribution(shared).mean(-1)

    def final(self, prediction: Tensor) -> Tensor:
        return torch.logit(prediction, eps=1e-7)


class MultilabelJudge(Judge):
    """AUC of each label and their mean (macro), of all pairs of target and label together (micro); log loss per pair."""

    main = "macro_auc"
    nothing = "no target with any of the labels"
    proportions = True

    def label(self, column: Column) -> FloatArray | None:
        return np.stack([column(f"label_{n}") for n in self.config.labels], axis=1).astype(np.float64)

    def columns(self, label: FloatArray, schema: LogSchema) -> FloatArray | None:
        return label

    def assemble(self, column_TC: FloatArray) -> FloatArray:
        return column_TC

    def reduce(self, r: Reduction) -> None:
        found = r.points(self.name)
        if found is None:
            return
        user_T, label_TC, p_TC = found
        there = ~np.isnan(label_TC)
        event, which = np.nonzero(there)
        label, p, user = label_TC[there], p_TC[there], user_T[event]
        clipped = np.clip(p, 1e-7, 1 - 1e-7)
        r.per_event(f"{self.name}/logloss", user, -(label * np.log(clipped) + (1 - label) * np.log1p(-clipped)))
        for c, name in enumerate(self.config.labels):
            mine = which == c
            r.out.scores[f"{self.name}/auc:{name}"] = Scores(label[mine] > 0.5, p[mine], r.hashes[user[mine]])

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if not statistics.counted(f"{self.name}/logloss"):
            return {}
        per_label = {n: statistics.scores[f"{self.name}/auc:{n}"] for n in self.config.labels}
        pooled = Scores.join(list(per_label.values()))
        found = {f"auc:{n}": scores.auc(resampler) for n, scores in per_label.items()}
        known = [v for v in found.values() if not np.isnan(v[0])]
        if known:
            length = min(map(len, known))  # a label of few users has no resamples
            found["macro_auc"] = np.mean([v[:length] for v in known], axis=0)
        return found | {
            "micro_auc": pooled.auc(resampler),
            "logloss": statistics.mean(f"{self.name}/logloss"),
            "n": statistics.sums[f"{self.name}/logloss"][:1, 1],
        }


KIND = Kind("multilabel", MultilabelTask, Multilabel, MultilabelJudge)
