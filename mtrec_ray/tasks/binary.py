"""binary: whether something happens (click, like, purchase), by binary cross-entropy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import BinaryTask, ModelConfig
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import FloatArray, Kind, LabelJudge

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Binary(PointwiseTask):
    """p = sigmoid(head); a missing label is masked, never read as 0."""

    def __init__(self, name: str, label: str, shared_width: int) -> None:
        super().__init__()
        self.name, self.label = name, label
        self.head = nn.Linear(shared_width, 1)

    @classmethod
    def build(cls, name: str, config: BinaryTask, schema: LogSchema, model: ModelConfig) -> Binary:
        return cls(name, config.label, model.sharing_width)

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        logit = self.head(forward.shared[self.name][valid]).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logit, y[valid], reduction="sum")

    def predict(self, shared: Tensor) -> Tensor:
        """Probability."""
        return torch.sigmoid(self.head(shared).squeeze(-1))

    def final(self, prediction: Tensor) -> Tensor:
        return torch.logit(prediction, eps=1e-7)


class BinaryJudge(LabelJudge):
    """AUC, log loss and calibration over events; AUC within users."""

    main = "auc"
    proportions = True

    def reduce(self, r: Reduction) -> None:
        found = r.points(self.name)
        if found is None:
            return
        user_T, label, prediction = found
        p = np.clip(prediction, 1e-7, 1 - 1e-7)
        r.per_event(f"{self.name}/logloss", user_T, -(label * np.log(p) + (1 - label) * np.log1p(-p)))
        r.per_event(f"{self.name}/label", user_T, label)
        positive = label > 0.5
        r.users(f"{self.name}/user_auc", m.user_auc(user_T, positive, prediction, len(r.hashes)))
        r.out.scores[f"{self.name}/auc"] = Scores(positive, prediction, r.hashes[user_T])
        bin_T = np.minimum((p * m.BINS).astype(np.int64), m.BINS - 1)
        table_U = np.zeros((len(r.hashes), m.BINS, 3))
        np.add.at(table_U, (user_T, bin_T), np.stack([np.ones(len(p)), label, p], axis=1))
        r.out.sums[f"{self.name}/calibration"] = np.tensordot(r.weight_UR, table_U, (0, 0))

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        """Normalised entropy: log loss over the entropy of the base rate (He et al. 2014). Expected calibration error:
        mean distance of prediction and label over equal-width bins (Naeini et al. 2015)."""
        name = self.name
        if not statistics.counted(f"{name}/logloss"):
            return {}
        logloss, rate = statistics.mean(f"{name}/logloss"), statistics.mean(f"{name}/label")
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        curve = statistics.sums[f"{name}/calibration"][: len(logloss)]
        total = curve[:, :, 0].sum(1)
        gap = np.abs(curve[:, :, 1] - curve[:, :, 2]).sum(1)
        out = {
            "logloss": logloss,
            "auc": statistics.scores[f"{name}/auc"].auc(resampler),
            "normalised_entropy": np.divide(logloss, entropy, out=np.full_like(logloss, np.nan), where=entropy > 0),
            "ece": np.divide(gap, total, out=np.full_like(gap, np.nan), where=total > 0),
            "n": statistics.sums[f"{name}/logloss"][:1, 1],
        }
        if statistics.counted(f"{name}/user_auc"):
            out["user_auc"] = statistics.mean(f"{name}/user_auc")
        return out


KIND = Kind("binary", BinaryTask, Binary, BinaryJudge)
