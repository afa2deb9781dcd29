"""regression: a number such as a rating, by its error in units of its training standard deviation, or by bins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig, RegressionTask
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LabelStats, LogSchema
from mtrec_ray.tasks.base import Forward, PointwiseTask
from mtrec_ray.tasks.judge import FloatArray, Kind, LabelJudge

if TYPE_CHECKING:
    from mtrec_ray.evaluation.reduce import Reduction


class Regression(PointwiseTask):
    """ŷ = mean + std · head; the loss is that of head − (y − mean) / std: its square, or Huber's (1964).

    With bins, the head is a softmax over them and ŷ their mean under it; the loss is cross-entropy against the label as two
    neighbouring bins (two-hot), which for labels that are bins is the plain softmax loss. Regression by classification can
    be better and is steadier (Imani & White 2018, arXiv 1806.04613; Farebrother et al. 2024, arXiv 2403.03950).
    """

    bins_C: Tensor | None

    def __init__(
        self, name: str, label: str, stats: LabelStats, shared_width: int, delta: float | None = None, bins: tuple[float, ...] = ()
    ) -> None:
        """delta: of Huber's loss; None: squared error."""
        super().__init__()
        self.name, self.label, self.delta = name, label, delta
        self.mean, self.std = stats.mean, max(stats.std, 1e-6)
        self.head = nn.Linear(shared_width, len(bins) or 1)
        self.register_buffer("bins_C", torch.tensor(bins) if bins else None, persistent=False)

    @classmethod
    def build(cls, name: str, config: RegressionTask, schema: LogSchema, model: ModelConfig) -> Regression:
        delta = config.delta if config.loss == "huber" else None
        return cls(name, config.label, schema.labels[config.label], model.sharing_width, delta, config.bins or ())

    def count(self, batch: Batch) -> Tensor:
        return (~torch.isnan(batch.targets.labels_M[self.label])).sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        y = batch.targets.labels_M[self.label]
        valid = ~torch.isnan(y)
        head = self.head(forward.shared[self.name][valid])
        if self.bins_C is not None:
            return -(two_hot(y[valid], self.bins_C) * F.log_softmax(head, dim=-1)).sum()
        error = head.squeeze(-1) - (y[valid] - self.mean) / self.std
        if self.delta is None:
            return error.square().sum()
        return F.huber_loss(error, torch.zeros_like(error), reduction="sum", delta=self.delta)

    def predict(self, shared: Tensor) -> Tensor:
        head = self.head(shared)
        if self.bins_C is not None:
            return torch.softmax(head, dim=-1) @ self.bins_C
        return self.mean + self.std * head.squeeze(-1)

    def final(self, prediction: Tensor) -> Tensor:
        return (prediction - self.mean) / self.std


def two_hot(y_M: Tensor, bins_C: Tensor) -> Tensor:
    """Numbers as shares of their two neighbouring bins, whose mean they are; beyond the ends, the end -> (M, C)."""
    y_M = y_M.clamp(bins_C[0], bins_C[-1])
    above = torch.searchsorted(bins_C, y_M).clamp(min=1)
    low, high = bins_C[above - 1], bins_C[above]
    share = (y_M - low) / (high - low)
    out = y_M.new_zeros(len(y_M), len(bins_C))
    return out.scatter(1, above[:, None] - 1, (1 - share)[:, None]).scatter(1, above[:, None], share[:, None])


class RegressionJudge(LabelJudge):
    """RMSE and mean absolute error over events."""

    main = "rmse"

    def reduce(self, r: Reduction) -> None:
        found = r.points(self.name)
        if found is None:
            return
        user_T, label, prediction = found
        r.per_event(f"{self.name}/rmse", user_T, (prediction - label) ** 2)
        r.per_event(f"{self.name}/mae", user_T, np.abs(prediction - label))

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if not statistics.counted(f"{self.name}/rmse"):
            return {}
        return {
            "rmse": np.sqrt(statistics.mean(f"{self.name}/rmse")),
            "mae": statistics.mean(f"{self.name}/mae"),
            "n": statistics.sums[f"{self.name}/rmse"][:1, 1],
        }


KIND = Kind("regression", RegressionTask, Regression, RegressionJudge)
