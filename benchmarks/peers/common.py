"""What both peers' scripts share; it runs in their environments, so it imports nothing of this project."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any


def arguments() -> dict[str, Any]:
    """The settings, as JSON in the first argument."""
    settings: dict[str, Any] = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(settings["seed"])
    return settings


def clocks() -> tuple[float, float]:
    """Seconds on the wall and of this process's threads."""
    return time.perf_counter(), time.process_time()


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

    def say(self, targets: int, lists: dict[str, list[str]] | None = None) -> None:
        """One line for the benchmark."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = {"wall": self.wall, "seconds": self.processor, "targets": targets, "lists": lists, "peak_rss_mib": peak}
        print("POINT " + json.dumps(found), flush=True)
