"""What the peers' scripts share; it runs in their environments, so it imports nothing of this project.

A script trains one model with the settings of its first argument and says, once or along the way, what it would answer
(`Watch.say`). The log that it reads is `write_logs`' of the benchmark: train.csv (user, item, rating, like, place in the user's
order), valid.csv alike, and test.csv without the labels. Users and items are their places in the data.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARK = "POINT "

Answers = Mapping[str, Any]
"""`lists`: user -> ten items; `rating`, `like`: user -> prediction."""


def arguments() -> dict[str, Any]:
    """The settings, as JSON in the first argument."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    return settings


def one_thread(seed: int) -> None:
    """PyTorch with one thread and this seed."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(seed)


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of this process's threads."""
    return time.perf_counter(), time.process_time()


def peak_rss_mib() -> float:
    """The most memory that this process had resident (Linux). `ru_maxrss` would begin with that of the process that started it."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Watch:
    """Adds up both clocks over training alone."""

    def __init__(self) -> None:
        self.wall = self.processor = 0.0
        self.begun = clocks()

    def start(self) -> None:
        self.begun = clocks()

    def stop(self) -> None:
        now = clocks()
        self.wall += now[0] - self.begun[0]
        self.processor += now[1] - self.begun[1]

    def say(self, targets: int, valid: Answers | None = None, test: Answers | None = None) -> None:
        """One line for the benchmark: what the model of this moment answers."""
        found = {"wall": self.wall, "seconds": self.processor, "targets": targets, "valid": valid, "test": test}
        print(MARK + json.dumps(found | {"peak_rss_mib": peak_rss_mib()}), flush=True)


def read_points(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix(MARK)) for line in printed.splitlines() if line.startswith(MARK)]
