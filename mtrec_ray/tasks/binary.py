"""binary: whether something happens (click, like, purchase), by cross-entropy or focal loss, alone or at the end of a chain."""

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
from mtrec_ray.models.chains import logit_of_both
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import FloatArray, Kind, LabelJudge

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Binary(PointwiseTask):
    """p = sigmoid(logit), the probability of the event; a missing label is masked, never read as 0.

    Loss of a target, with s = logit where the label is 1 and −logit where it is 0, and w = `positive_weight` or 1:

    bce    −w · log sigmoid(s)
    focal  −w · (1 − sigmoid(s))^γ · log sigmoid(s)    (Lin et al. 2017, arXiv 1708.02002)

    A task that depends on another (models/chains.py) reads one number more than H, the logit of the event before; its own
    logit is that of the whole event, and so are its loss, on every target whose label is known, and its prediction.
    """

    def __init__(self, name: str, config: BinaryTask, shared_width: int) -> None:
        super().__init__()
        self.name, self.label, self.config = name, config.label, config
        self.head = nn.Linear(shared_width, 1)

    @classmethod
    def build(cls, name: str, config: BinaryTask, schema: LogSchema, model: ModelConfig) -> Binary:
        return cls(name, config, model.sharing_width)

    def logit(self, shared: Tensor) -> Tensor:
        """What the head reads (..., H), or (..., H + 1) at the end of a chain -> logit of the event (...)."""
        own: Tensor = self.head(shared[..., : self.head.in_features]).squeeze(-1)
        if self.config.depends_on and self.config.chain == "esmm":
            return logit_of_both(shared[..., -1], own)
        return own

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        shared, y = forward.shared[self.name][valid], y[valid]
        logit = self.logit(shared)
        loss = self.losses(logit, y).sum()
        if self.config.depends_on and self.config.chain == "aitm":
            excess = F.relu(torch.sigmoid(logit) - torch.sigmoid(shared[..., -1]))
            loss = loss + self.config.calibration * excess.sum()
        return loss

    def losses(self, logit: Tensor, y: Tensor) -> Tensor:
        """Loss of each target (M,)."""
        signed = torch.where(y > 0, logit, -logit)
        loss = -F.logsigmoid(signed)
        if self.config.loss == "focal":
            loss = loss * torch.exp(self.config.focal_gamma * F.logsigmoid(-signed))
        return torch.where(y > 0, self.config.positive_weight, 1.0) * loss

    def predict(self, shared: Tensor) -> Tensor:
        """Probability."""
        return torch.sigmoid(self.logit(shared))

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
