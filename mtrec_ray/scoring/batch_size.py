"""How many users an actor scores together, found by trial. It knows no Ray."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import psutil
import torch

log = logging.getLogger(__name__)

SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
GAIN = 1.05
"""A larger batch must be faster by so much to be worth its memory."""
SHARE = 0.5
"""Of the memory that is left, which the next trial may take."""


def best_batch(run: Callable[[int], None], sizes: Sequence[int] = SIZES) -> int:
    """run(n) scores n users. The smallest size after which two larger ones gain nothing, within memory.

    Each size is tried twice, and the second run is timed. Raises MemoryError when the smallest does not fit.
    """
    best, best_rate, idle, before = 0, 0.0, 0, _used()
    for size in sizes:
        try:
            run(size)
            started = time.perf_counter()
            run(size)
            rate = size / (time.perf_counter() - started)
        except (MemoryError, torch.OutOfMemoryError):
            break
        idle = 0 if rate > GAIN * best_rate else idle + 1
        if not idle:
            best, best_rate = size, rate
        if idle == 2 or 2 * max(0, _used() - before) > SHARE * _left():  # a doubled batch may take twice what this one took
            break
    if not best:
        raise MemoryError(f"scoring.batch_users: not even {sizes[0]} users fit into memory together")
    log.info("score: batches of %d users, %.0f per second", best, best_rate)
    return best


def _used() -> int:
    if _on_gpu():
        return int(torch.cuda.max_memory_allocated())
    return int(psutil.Process().memory_info().rss)


def _on_gpu() -> bool:
    return torch.cuda.is_available() and bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _left() -> int:
    if _on_gpu():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
