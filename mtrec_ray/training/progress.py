"""Where a run stands: the part of a checkpoint that is plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Progress:
    """The cursor and everything counted so far. All numbers are global: the same on every rank, for any number of ranks."""

    epoch: int = 0
    step: int = 0
    """Of the epoch; the next one to be done."""
    global_step: int = 0
    """Optimiser steps done; seeds every draw."""
    seconds: float = 0.0
    """In the epoch so far."""
    sums: list[float] = field(default_factory=list)
    """Of the epoch so far; see `EpochSums`."""

    rows_read: int = 0
    """Windows that the feeds had to give, over all finished epochs."""
    rows_trained: int = 0
    events: int = 0
    """Targets trained."""
    total_seconds: float = 0.0

    best_value: float = -math.inf
    best_epoch: int = -1
    bad_epochs: int = 0
    """Epochs since the best one."""

    def end_epoch(self, read: int, windows: int, targets: int, seconds: float) -> None:
        """Count the epoch that was just trained, and go to the start of the next one."""
        self.rows_read, self.rows_trained, self.events = self.rows_read + read, self.rows_trained + windows, self.events + targets
        self.total_seconds += seconds
        self.epoch, self.step, self.seconds, self.sums = self.epoch + 1, 0, 0.0, []


class EpochSums:
    """Loss sums and label counts per task, windows and targets, over the steps of an epoch. They stay on the device."""

    def __init__(self, tasks: int, device: torch.device, before: list[float]) -> None:
        """before: the sums of a checkpoint."""
        self.tasks = tasks
        self._sums_S = torch.tensor(before or [0.0] * (2 * tasks + 2), dtype=torch.float64, device=device)

    def add(self, loss_sum_T: Tensor, count_T: Tensor, size_2: Tensor) -> None:
        """Global values of one step; size_2: windows and targets."""
        self._sums_S += torch.cat([loss_sum_T, count_T, size_2])

    def values(self) -> list[float]:
        return [float(v) for v in self._sums_S.tolist()]

    @property
    def mean_loss_T(self) -> list[float]:
        sums = self.values()
        return [a / max(b, 1e-12) for a, b in zip(sums[: self.tasks], sums[self.tasks : -2], strict=True)]

    @property
    def windows(self) -> int:
        return int(self._sums_S[-2])

    @property
    def targets(self) -> int:
        return int(self._sums_S[-1])
