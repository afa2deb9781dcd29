"""The study behind `jobs.tasks`: which cells are trained, in which order, and what follows from them.

    screen      one seed: every task alone, all together, all but one (pairs, where wanted), the grid of sharing × balancing
    finalists   more seeds of what the recommendation rests on: every task alone, all together, the recommended groups,
                the best of the grid, and the plain sum

Everything is chosen on valid; test numbers are reported. Nothing here imports Ray: cells run in this process unless the
caller hands in another way to run them.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mtrec_ray.multitask import results as r
from mtrec_ray.multitask.cells import MEAN_GAIN, PLAIN, Bench, Cell, run_cells
from mtrec_ray.multitask.grouping import MAX_TASKS, TOLERANCE, affinities, best_partitions, recommend
from mtrec_ray.multitask.objective import mean_gain

log = logging.getLogger(__name__)

Runner = Callable[[Bench, Sequence[Cell]], Iterator[tuple[int, dict[str, Any]]]]
"""Runs cells and gives (place, content) as they end."""


LARGE = ("resamples", "history", "gradients", "losses")
"""What stays in the cells' own files."""


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


class Study:
    """Runs the cells of a plan; finished ones are taken from their files."""

    def __init__(self, bench: Bench, plan: Plan, runner: Runner = run_cells, parallel: int = 1) -> None:
        if len(bench.tasks) < 2:
            raise StudyError(f"tasks: there is only {list(bench.tasks)}, so there is nothing to compare; declare a second task")
        if len(bench.tasks) > MAX_TASKS:
            raise StudyError(f"tasks: {len(bench.tasks)} are too many for the search for groups (at most {MAX_TASKS})")
        self.bench, self.plan, self.runner, self.parallel = bench, plan, runner, parallel
        self.found: dict[str, dict[str, Any]] = {}
        """Fingerprint -> content, of finished and failed cells."""
        self.seconds: list[float] = []

    # -- running

    def run(self, stage: str, cells: Sequence[Cell]) -> None:
        """Train what is missing of some cells, with a line and an estimate after each."""
        wanted = {self.bench.fingerprint(c): c for c in cells}
        for key, cell in wanted.items():
            if key not in self.found and (kept := self.bench.load(cell)) is not None:
                self.found[key] = kept
                self.seconds.append(float(kept["seconds"]))
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
            self.seconds.append(float(found["seconds"]))
            left = (time.perf_counter() - started) / done * (len(todo) - done)
            values = " ".join(f"{t}={found['valid'][t]:.4f}" for t in self.bench.tasks if t in found["valid"])
            log.info("%s: %d of %d, %s, %.0f s, best epoch %d, valid %s; about %s left in this stage", stage, done, len(todo),
                     found["cell"]["name"], found["seconds"], found["best_epoch"] + 1, values, _minutes(left))  # fmt: skip

    def cell(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell; None when it failed."""
        found = self.found.get(self.bench.fingerprint(cell))
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
        if not (self.plan.sharing or self.plan.balancing):
            return []
        plain = self.bench.plain
        sharing = dict.fromkeys([plain.sharing, *self.plan.sharing])
        balancing = dict.fromkeys([PLAIN, plain.balancing, *self.plan.balancing])
        return list(itertools.product(sharing, balancing))

    def variant(self, variant: tuple[str, str], seed: int) -> Cell:
        plain = self.bench.plain
        if variant == (plain.sharing, plain.balancing):
            return self.joint(seed)
        return self.group(self.bench.tasks, seed, sharing=variant[0], balancing=variant[1])

    # -- what follows

    def measured(self, seed: int) -> dict[frozenset[str], dict[str, float]]:
        """Gains on valid of every group that was screened."""
        reference = self.reference(seed)
        out = {}
        for names in self.screened_groups():
            cell = self.joint(seed) if names == self.bench.tasks else self.group(names, seed)
            found = r.valid_gains(self.cell(cell), reference, self.bench.metrics)
            if found:
                out[frozenset(names)] = found
        return out

    def execute(self) -> dict[str, Any]:
        """Train everything -> what tasks.json holds. Raises StudyError when not even a joint model could be trained."""
        first, tasks = self.bench.config.seed, self.bench.tasks
        self.run("screen, tasks alone", self.singles(first))
        self.run("screen, groups", [self.joint(first), *(self.group(g, first) for g in self.screened_groups() if g != tasks)])
        if self.cell(self.joint(first)) is None:
            error = self.found[self.bench.fingerprint(self.joint(first))]["error"]
            raise StudyError(f"the joint model could not be trained, so there is nothing to report: {error}")
        self.run("screen, grid", [self.variant(v, first) for v in self.variants()])
        grid = self._grid(first)
        grouping = self._grouping(first)
        seeds = self.seeds(self.plan.seeds)
        groups = [tuple(g) for g in grouping["screened"]["groups"]]
        chosen = [tuple(v) for v in grid.get("finalists", [])]
        self.run("finalists, tasks alone", [c for s in seeds for c in self.singles(s)])
        finalists = [c for s in seeds for c in [self.joint(s), *(self.group(g, s) for g in groups if g != tasks)]]
        self.run("finalists, models", finalists + [self.variant(v, s) for s in seeds for v in chosen])
        self._decide_groups(grouping, groups, seeds)
        self._decide_grid(grid, chosen, seeds)
        return {
            "tasks": {t: {"kind": self.bench.config.tasks[t].kind, "metric": self.bench.metrics[t]} for t in tasks},
            "gradients": r.gradients(self.cell(self.joint(first))),
            "joint": self._joint(seeds),
            "leave_one_out": self._leave_one_out(first),
            "grouping": grouping,
            "grid": grid,
            "seeds": seeds,
            "cells": [{k: v for k, v in f.items() if k not in LARGE} for f in self.found.values()],
            "failed": [f"{f['cell']['name']}: {f['error']}" for f in self.found.values() if "error" in f],
        }  # fmt: skip

    def _joint(self, seeds: Sequence[int]) -> dict[str, Any]:
        """Test gains of the joint model over the single-task models, over the seeds of both."""
        return self._against_singles([self.joint(s) for s in seeds], seeds)

    def _against_singles(self, models: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
        config, metrics = self.bench.config, self.bench.metrics
        a: dict[str, Any] = {}
        for task in self.bench.tasks:
            a |= r.test_values(self.cells([self.bench.single(task, s) for s in seeds]), config, 0)
        b = r.test_values(self.cells(models), config, 1)
        return r.summarise_gains(r.gain_resamples(b, a, metrics), a, b)

    def _leave_one_out(self, seed: int) -> dict[str, Any]:
        """Task left out -> test gains of the joint model over the model without it: what it brings to the others."""
        joint = self.cells([self.joint(seed)])
        out = {}
        for left in self.bench.tasks:
            rest = self.cells([self.group([t for t in self.bench.tasks if t != left], seed)])
            if rest:
                out[left] = r.compare_cells(joint, rest, self.bench.config, self.bench.metrics)
        return out

    def _grouping(self, seed: int) -> dict[str, Any]:
        tasks, measured = self.bench.tasks, self.measured(seed)
        affinity_TT = affinities(tasks, measured)
        partitions = best_partitions(tasks, affinity_TT, measured)
        return {
            "measured": [{"tasks": [t for t in tasks if t in g], "valid_gains": m} for g, m in measured.items()],
            "affinity": {a: {b: float(affinity_TT[i, j]) for j, b in enumerate(tasks) if j != i} for i, a in enumerate(tasks)},
            "partitions": [p.facts() for p in partitions], "tolerance": TOLERANCE,
            "screened": recommend(partitions).facts(),
        }  # fmt: skip

    def _partition_valid(self, groups: Sequence[Sequence[str]], seeds: Sequence[int]) -> float | None:
        """Mean relative gain on valid over tasks and seeds of a partition that was trained."""
        found = []
        for seed in seeds:
            cells = [self.joint(seed) if tuple(g) == self.bench.tasks else self.group(g, seed) for g in groups]
            values = {t: v for f in self.cells(cells) for t, v in f["valid"].items()}
            gain = mean_gain(values, self.reference(seed), self.bench.metrics)
            if gain is None or not set(self.reference(seed)) <= set(values):
                return None
            found.append(gain)
        return float(np.mean(found))

    def _decide_groups(self, grouping: dict[str, Any], screened: Sequence[tuple[str, ...]], seeds: Sequence[int]) -> None:
        """Among one model, the screened groups and one model per task: the fewest models within the tolerance, on valid."""
        tasks = self.bench.tasks
        candidates: dict[str, list[tuple[str, ...]]] = {
            "together": [tasks],
            "groups": list(screened),
            "alone": [(t,) for t in tasks],
        }
        rows: list[dict[str, Any]] = [
            {"name": n, "groups": [list(x) for x in g], "models": len(g), "valid_mean_gain": self._partition_valid(g, seeds)}
            for n, g in candidates.items()
        ]
        known = sorted((row for row in rows if row["valid_mean_gain"] is not None), key=lambda row: row["models"])
        top = max((row["valid_mean_gain"] for row in known), default=0.0)
        chosen = next((row for row in known if row["valid_mean_gain"] >= top - TOLERANCE), rows[0])
        grouping |= {"candidates": rows, "recommended": chosen["groups"], "seeds": list(seeds)}
        grouping["over_together"] = None if chosen["models"] == 1 else self._groups_over_joint(chosen["groups"], seeds)

    def _groups_over_joint(self, groups: Any, seeds: Sequence[int]) -> dict[str, Any]:
        """Test gains of the recommended groups over the one joint model."""
        config, metrics = self.bench.config, self.bench.metrics
        a = r.test_values(self.cells([self.joint(s) for s in seeds]), config, 0)
        b: dict[str, Any] = {}
        for group in groups:
            b |= r.test_values(self.cells([self.group(group, s) for s in seeds]), config, 1)
        return r.summarise_gains(r.gain_resamples(b, a, metrics), a, b)

    def _grid(self, seed: int) -> dict[str, Any]:
        """Every variant's valid mean gain (what is chosen by) and test gains; the best one and the plain sum are finalists."""
        rows: list[dict[str, Any]] = []
        for variant in self.variants():
            found = self.cell(self.variant(variant, seed))
            row: dict[str, Any] = {
                "sharing": variant[0],
                "balancing": variant[1],
                "valid_mean_gain": None,
                "seconds": None,
                "test": None,
            }
            if found is not None:
                row |= {"valid_mean_gain": found[f"valid_{MEAN_GAIN}"], "seconds": found["seconds"],
                        "test": self._against_singles([self.variant(variant, seed)], [seed])}  # fmt: skip
            rows.append(row)
        known = [row for row in rows if row["valid_mean_gain"] is not None]
        if not known:
            return {"rows": rows} if rows else {}
        best = max(known, key=lambda row: row["valid_mean_gain"])
        plain = (self.bench.plain.sharing, PLAIN)
        finalists = dict.fromkeys([(best["sharing"], best["balancing"]), plain])
        return {
            "rows": rows,
            "best": [best["sharing"], best["balancing"]],
            "plain": list(plain),
            "finalists": [list(f) for f in finalists],
        }

    def _decide_grid(self, grid: dict[str, Any], finalists: Sequence[Any], seeds: Sequence[int]) -> None:
        """The best of the grid against the plain sum, over all seeds: on valid it must win by the tolerance."""
        if not finalists:
            return
        best, plain = tuple(grid["best"]), tuple(grid["plain"])
        cells = {v: self.cells([self.variant(v, s) for s in seeds]) for v in dict.fromkeys([best, plain])}
        known = {v: [g for f in found if (g := f[f"valid_{MEAN_GAIN}"]) is not None] for v, found in cells.items()}
        gain = {v: float(np.mean(g)) for v, g in known.items() if g}
        wins = best != plain and gain.get(best, -np.inf) > gain.get(plain, -np.inf) + TOLERANCE
        grid["finalist_valid_mean_gain"] = {" ".join(v): g for v, g in gain.items()}
        grid["recommended"] = list(best if wins else plain)
        grid["over_plain"] = None
        if best != plain and all(cells.values()):
            grid["over_plain"] = r.compare_cells(cells[best], cells[plain], self.bench.config, self.bench.metrics)


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def fitting_epochs(seconds: Mapping[str, float], minutes: float, upper: int) -> int:
    """Epochs that fit a cell of the slowest model, a tenth kept for start and test; at least one, at most `upper`."""
    slowest = max(seconds.values())
    epochs = int(0.9 * 60 * minutes / slowest)
    if epochs < 1:
        log.warning("an epoch takes %.0f s, so a cell takes more than the %g min asked for; sample the data", slowest, minutes)
    return max(1, min(upper, epochs))
