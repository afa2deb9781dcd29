"""What stops a run for good: a loss that is not finite, memory that does not suffice, rows that went missing.

The message says where (epoch, step, the rows of the global batch), why (the tasks) and what to do. Epochs and steps count
from 0. No checkpoint is written after such a step, so the last good one stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

SHOWN = 64
"""Rows of a batch that a message names."""
_CPU_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


class TrainingStopped(RuntimeError):
    """A run that cannot go on: going on from its checkpoint meets the same batch again."""


class Rows(Protocol):
    def rows(self, epoch: int, step: int, together: bool) -> list[str]:
        """The windows of a step's global batch in words. together: whether every rank asks now."""
        ...


class FiniteLoss:
    """Remembers the first step of an epoch whose loss was not finite, without waiting for the device at every step."""

    def __init__(self, tasks: list[str], device: torch.device) -> None:
        self.tasks = tasks
        self.step = torch.full((), -1, device=device)
        self.bad_T = torch.zeros(len(tasks), dtype=torch.bool, device=device)

    def note(self, step: int, loss_sum_T: Tensor) -> None:
        """loss_sum_T: loss sums over all ranks, so that every rank comes to the same finding."""
        bad_T = ~torch.isfinite(loss_sum_T)
        first = bad_T.any() & (self.step < 0)
        self.step = torch.where(first, step, self.step)
        self.bad_T = torch.where(first, bad_T, self.bad_T)

    def check(self, feed: Rows, epoch: int, kept: Callable[[], str]) -> None:
        """Wait for the device and raise TrainingStopped when a loss was not finite."""
        step = int(self.step)
        if step >= 0:
            tasks = [n for n, bad in zip(self.tasks, self.bad_T.tolist(), strict=True) if bad]
            all_at_once = len(tasks) == len(self.tasks) and step > 0
            update = f"All tasks at once: the update of step {step - 1} may have broken the weights. " if all_at_once else ""
            raise TrainingStopped(
                f"epoch {epoch}, step {step}: the loss of {tasks} is not finite. {update}Lower train.learning_rate, set "
                f"train.clip_norm, or look at the labels of these rows. {kept()}. {describe(feed.rows(epoch, step, True))}"
            )


def check_weights(weights: Iterator[Tensor], feed: Rows, epoch: int, step: int, kept: Callable[[], str]) -> None:
    """Raise TrainingStopped when the last update made a weight infinite though its loss was finite."""
    if not bool(torch.stack([torch.isfinite(w.detach()).all() for w in weights]).all()):
        raise TrainingStopped(
            f"epoch {epoch}, step {step}: the losses are finite, but the update left weights that are not. Lower "
            f"train.learning_rate or set train.clip_norm. {kept()}. {describe(feed.rows(epoch, step, True))}"
        )


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _CPU_MEMORY)


def is_compilation(error: BaseException) -> bool:
    """By name, since importing torch's compiler takes seconds."""
    return any(kind.__name__ == "BackendCompilerFailed" for kind in type(error).__mro__)


@contextlib.contextmanager
def step_errors(feed: Rows, epoch: int, step: int, kept: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error, and a trunk that cannot be compiled, into TrainingStopped with the cure."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_compilation(error):
            raise TrainingStopped(
                f"epoch {epoch}, step {step}: torch {torch.__version__} cannot compile the trunk here ({first}). Set "
                f"train.compile to false, or take another model.trunk. {kept()}"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise TrainingStopped(
            f"epoch {epoch}, step {step}: out of memory ({first}). Raise train.accumulate, or lower train.batch_windows, "
            f"data.window or model.width. {kept()}. {describe(feed.rows(epoch, step, False))}"
        ) from error


def describe(rows: list[str]) -> str:
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"The batch's {len(rows)} windows: {'; '.join(rows[:SHOWN])}{more}"
