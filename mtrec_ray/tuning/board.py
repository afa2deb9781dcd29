"""The board: notes what trials report, decides which go on, says how it stands. No Ray: the halving is handed in."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from mtrec_ray.tuning.trials import OVER, Epoch, Trial, ranked, save

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between lines about trials that are running."""


class Halving(Protocol):
    """Successive halving over the best values so far."""

    def goes_on(self, trial: str, epoch: int, score: float) -> bool:
        """Note a trial's score after an epoch -> whether it goes on."""


class Board:
    """All trials of a stage, and the files that keep them."""

    def __init__(self, folder: str, trials: Sequence[Trial], epochs: Mapping[str, int], halving: Halving | None) -> None:
        """epochs: trial -> its last epoch. What is kept of earlier calls is told to the halving again."""
        self.folder, self.halving, self.epochs = folder, halving, epochs
        self.trials = {t.name: t for t in trials}
        self.waiting = [t.name for t in trials if t.state not in OVER]
        self.started = self.told = time.monotonic()
        self.total, self.over = len(self.waiting), 0
        for trial in trials:
            known = Trial(trial.number, trial.values, trial.monitor, trial.seed)
            for epoch in trial.history:
                known.add(epoch)
                self._goes_on(known)

    def report(self, name: str, result: Mapping[str, Any]) -> bool:
        """Note what a trial reports -> whether it goes on."""
        trial = self.trials[name]
        if trial.state in OVER:  # Tune says its last word twice
            return True
        if "error" in result:
            self.fail(name, str(result["error"]))
            return True  # it ends by itself
        if result.get("finished"):
            self._end(trial, "done")
            return True
        valid = {k.removeprefix("valid/"): float(v) for k, v in result.items() if k.startswith("valid/") and math.isfinite(v)}
        trial.state = "unfinished"
        trial.add(Epoch(int(result["epoch"]), round(float(result["seconds"]), 3), valid))
        if not self._goes_on(trial):
            self._end(trial, "stopped")
            return False
        save(self.folder, trial)
        if time.monotonic() - self.told > EVERY:
            self._tell(f"trial {name} at epoch {trial.epochs}/{self.epochs[name]}")
        return True

    def fail(self, name: str, why: str) -> None:
        trial = self.trials[name]
        if trial.state not in OVER:
            trial.message = why
            self._end(trial, "failed")

    def _goes_on(self, trial: Trial) -> bool:
        """The start is measured like all others and never stopped: what is found is compared with it. Nobody is stopped in the
        last epoch."""
        if self.halving is None or trial.best is None:
            return True
        goes_on = self.halving.goes_on(trial.name, trial.epochs, trial.score)
        return goes_on or trial.number == 0 or trial.epochs >= self.epochs[trial.name]

    def _end(self, trial: Trial, state: Any) -> None:
        trial.state = state
        save(self.folder, trial)
        self.over += 1
        what = f"{state} at epoch {trial.epochs}/{self.epochs[trial.name]}"
        value = f": {trial.monitor} {trial.value:.4f}" if trial.value is not None and state != "failed" else ""
        self._tell(f"trial {trial.name} {what}{value}" + (f": {trial.message}" if trial.message else ""))

    def _tell(self, what: str) -> None:
        self.told = time.monotonic()
        spent = self.told - self.started
        left = "" if not self.over else f", about {spent / self.over * (self.total - self.over) / 60:.0f} min left"
        best = ranked(list(self.trials.values()))
        leader = f"best {best[0].value:.4f} by {best[0].name} | " if best else ""
        log.info("%s | %s%d of %d, %.0f min%s", what, leader, self.over, self.total, spent / 60, left)
