"""The study behind `jobs.tasks`: which cells there are, and how they are run.

    screen      one seed: every task alone, all together, all but one (pairs, where wanted), the grid of sharing × balancing
    finalists   more seeds of what the recommendation rests on: every task alone, all together, the recommended groups,
                the best of the grid, and the plain sum

What follows from them is in findings.py. Nothing here imports Ray: cells run in this process unless the caller hands in
another way to run them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mtrec_ray.multitask.cells import PLAIN, Bench, Cell, run_cells
from mtrec_ray.multitask.grouping import MAX_TASKS
from mtrec_ray.training.worker import check_machine

log = logging.getLogger(__name__)

Runner = Callable[[Bench, Sequence[Cell]], Iterator[tuple[int, dict[str, Any]]]]
"""Runs cells and gives (place, content) as they end."""


class StudyError(ValueError):
    """A study that makes no sense, or that has nothing to report."""


@dataclass(frozen=True)
class Plan:
    """What a study trains beside the cells that it always has."""

    seeds: int = 3
    """Of the finalists; 1 leaves it at the screen."""
    pairs: bool = False
    sharing: tuple[str, ...] = ()
    balancing: tuple[str, ...] = ()
    """Axes of the grid; both empty: no grid. The declared ones and the plain sum are always among them."""


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises StudyError for a number of tasks that no study can be made of."""
    if len(tasks) < 2:
        raise StudyError(f"tasks: there is only {list(tasks)}, so there is nothing to compare; declare a second task")
    if len(tasks) > MAX_TASKS:
        raise StudyError(f"tasks: {len(tasks)} are too many for the search for groups (at most {MAX_TASKS}); leave some out")


class Study:
    """Runs the cells of a plan; finished ones are taken from their files."""

    def __init__(self, bench: Bench, plan: Plan, runner: Runner = run_cells, parallel: int = 1) -> None:
        check_tasks(bench.tasks)
        self.bench, self.plan, self.runner, self.parallel = bench, plan, runner, parallel
        self.found: dict[str, dict[str, Any]] = {}
        """Fingerprint -> content, of finished and failed cells."""
        self.refused = self._refusals()
        """Variants of the grid that are left out -> why."""

        self._keys: dict[tuple[Any, ...], str] = {}

    def key(self, cell: Cell) -> str:
        """The cell's fingerprint, made once."""
        name = (cell.tasks, cell.seed, cell.sharing, cell.balancing, cell.record, tuple(cell.reference.items()))
        if name not in self._keys:
            self._keys[name] = self.bench.fingerprint(cell)
        return self._keys[name]

    # -- running

    def run(self, stage: str, cells: Sequence[Cell]) -> None:
        """Train what is missing of some cells, with a line and an estimate after each."""
        wanted = {self.key(c): c for c in cells}
        for key, cell in wanted.items():
            if key not in self.found and (kept := self.bench.load(cell)) is not None:
                self.found[key] = kept
        todo = {k: c for k, c in wanted.items() if k not in self.found}
        if not todo:
            return
        log.info("%s: %d cells, %d of them to be trained", stage, len(wanted), len(todo))
        keys, started = list(todo), time.perf_counter()
        for done, (place, found) in enumerate(self.runner(self.bench, list(todo.values())), 1):
            self.found[keys[place]] = found
            if "error" in found:
                log.error("%s: %d of %d failed: %s: %s", stage, done, len(todo), found["cell"]["name"], found["error"])
                continue
            left = (time.perf_counter() - started) / done * (len(todo) - done)
            values = " ".join(f"{t}={found['valid'][t]:.4f}" for t in self.bench.tasks if t in found["valid"])
            log.info("%s: %d of %d, %s, %.0f s, best epoch %d, valid %s; about %s left in this stage", stage, done, len(todo),
                     found["cell"]["name"], found["seconds"], found["best_epoch"] + 1, values, _minutes(left))  # fmt: skip

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell; None when it failed."""
        found = self.found.get(self.key(cell))
        return None if found is None or "error" in found else found

    def cells(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Those that finished."""
        return [f for c in cells if (f := self.cell(c)) is not None]

    # -- the cells

    def seeds(self, count: int) -> list[int]:
        return [self.bench.config.seed + i for i in range(count)]

    def singles(self, seed: int) -> list[Cell]:
        return [self.bench.single(t, seed) for t in self.bench.tasks]

    def reference(self, seed: int) -> dict[str, float]:
        """Task -> valid value of its single-task model."""
        found = {c.tasks[0]: self.cell(c) for c in self.singles(seed)}
        return {t: f["valid"][t] for t, f in found.items() if f is not None}

    def group(self, tasks: Sequence[str], seed: int, **change: Any) -> Cell:
        """A group of tasks as one model; a group of one is the single-task model."""
        names = tuple(t for t in self.bench.tasks if t in tasks)
        if len(names) == 1:
            return self.bench.single(names[0], seed)
        reference = {t: v for t, v in self.reference(seed).items() if t in names}
        return replace(self.bench.plain, tasks=names, seed=seed, reference=reference, **change)

    def joint(self, seed: int) -> Cell:
        """All tasks as declared; its first seed keeps the gradients."""
        return self.group(self.bench.tasks, seed, record=seed == self.bench.config.seed)

    def screened_groups(self) -> list[tuple[str, ...]]:
        """All tasks, all but one, and the pairs."""
        tasks = self.bench.tasks
        groups = [tasks, *(tuple(t for t in tasks if t != left) for left in tasks)]
        if self.plan.pairs:
            groups += list(itertools.combinations(tasks, 2))
        return [g for g in dict.fromkeys(groups) if len(g) > 1]

    def variants(self) -> list[tuple[str, str]]:
        """(sharing, balancing) of the grid; empty without one."""
        return [v for v in self._grid() if v not in self.refused]

    def _grid(self) -> list[tuple[str, str]]:
        if not (self.plan.sharing or self.plan.balancing):
            return []
        plain = self.bench.plain
        sharing = dict.fromkeys([plain.sharing, *self.plan.sharing])
        balancing = dict.fromkeys([PLAIN, plain.balancing, *self.plan.balancing])
        return list(itertools.product(sharing, balancing))

    def _refusals(self) -> dict[tuple[str, str], str]:
        """Variants that the configuration or this machine cannot have -> why."""
        out = {}
        for sharing, balancing in self._grid():
            try:
                check_machine(self.bench.cell_config(replace(self.bench.plain, sharing=sharing, balancing=balancing)))
            except (ValueError, RuntimeError) as error:
                log.warning("grid: %s with %s is left out: %s", sharing, balancing, error)
                out[sharing, balancing] = str(error)
        return out

    def variant(self, variant: tuple[str, str], seed: int) -> Cell:
        plain = self.bench.plain
        if variant == (plain.sharing, plain.balancing):
            return self.joint(seed)
        return self.group(self.bench.tasks, seed, sharing=variant[0], balancing=variant[1])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def fitting_epochs(seconds: Mapping[str, float], minutes: float, upper: int) -> int:
    """Epochs that fit a cell of the slowest model, a tenth kept for start and test; at least one, at most `upper`."""
    slowest = max(seconds.values())
    epochs = int(0.9 * 60 * minutes / slowest)
    if epochs < 1:
        log.warning("an epoch takes %.0f s, so a cell takes more than the %g min asked for; sample the data", slowest, minutes)
    return max(1, min(upper, epochs))
