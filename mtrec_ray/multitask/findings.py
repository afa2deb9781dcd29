"""What follows from the cells of a study: gains on test, affinities, groups, the best of the grid.

Everything is chosen on valid; test numbers are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mtrec_ray.multitask import results as r
from mtrec_ray.multitask.cells import PLAIN, Cell
from mtrec_ray.multitask.grouping import TOLERANCE, affinities, best_partitions, recommend
from mtrec_ray.multitask.objective import mean_gain
from mtrec_ray.multitask.study import Study, StudyError

LARGE = ("resamples", "history", "gradients", "losses")
"""What stays in the cells' own files."""
Groups = Sequence[Sequence[str]]


def execute(study: Study) -> dict[str, Any]:
    """Train everything -> what tasks.json holds. Raises StudyError when not even a joint model could be trained."""
    first, tasks = study.bench.config.seed, study.bench.tasks
    study.run("screen, tasks alone", study.singles(first))
    screened = [study.joint(first), *(study.group(g, first) for g in study.screened_groups() if g != tasks)]
    study.run("screen, groups and grid", screened + [study.variant(v, first) for v in study.variants()])
    if study.cell(study.joint(first)) is None:
        error = study.found[study.key(study.joint(first))]["error"]
        raise StudyError(f"the joint model could not be trained, so there is nothing to report: {error}")
    grid = _grid(study, first)
    grouping = _grouping(study, first)
    seeds = study.seeds(study.plan.seeds)
    groups = [tuple(g) for g in grouping["screened"]["groups"]]
    chosen = [tuple(v) for v in grid.get("finalists", [])]
    study.run("finalists, tasks alone", [c for s in seeds for c in study.singles(s)])
    finalists = [c for s in seeds for c in [study.joint(s), *(study.group(g, s) for g in groups if g != tasks)]]
    study.run("finalists, models", finalists + [study.variant(v, s) for s in seeds for v in chosen])
    _decide_groups(study, grouping, groups, seeds)
    _decide_grid(study, grid, chosen, seeds)
    return {
        "tasks": {t: {"kind": study.bench.config.tasks[t].kind, "metric": study.bench.metrics[t]} for t in tasks},
        "gradients": r.gradients(study.cell(study.joint(first))),
        "joint": _joint(study, seeds),
        "leave_one_out": _leave_one_out(study, first),
        "grouping": grouping,
        "grid": grid,
        "seeds": seeds,
        "cells": [{k: v for k, v in f.items() if k not in LARGE} for f in study.found.values()],
        "failed": [f"{f['cell']['name']}: {f['error']}" for f in study.found.values() if "error" in f],
    }  # fmt: skip


def _joint(study: Study, seeds: Sequence[int]) -> dict[str, Any]:
    """Test gains of the joint model over the single-task models, over the seeds of both."""
    return _against_singles(study, [study.joint(s) for s in seeds], seeds)


def _against_singles(study: Study, models: Sequence[Cell], seeds: Sequence[int]) -> dict[str, Any]:
    config, metrics = study.bench.config, study.bench.metrics
    a: dict[str, Any] = {}
    for task in study.bench.tasks:
        a |= r.test_values(study.cells([study.bench.single(task, s) for s in seeds]), config, 0)
    b = r.test_values(study.cells(models), config, 1)
    return r.summarise_gains(r.gain_resamples(b, a, metrics), a, b)


def _leave_one_out(study: Study, seed: int) -> dict[str, Any]:
    """Task left out -> test gains of the joint model over the model without it: what it brings to the others."""
    joint = study.cells([study.joint(seed)])
    out = {}
    for left in study.bench.tasks:
        rest = study.cells([study.group([t for t in study.bench.tasks if t != left], seed)])
        if rest:
            out[left] = r.compare_cells(joint, rest, study.bench.config, study.bench.metrics)
    return out


def _screened_gains(study: Study, seed: int) -> dict[frozenset[str], dict[str, float]]:
    """Gains on valid of every group that was screened."""
    reference = study.reference(seed)
    out = {}
    for names in study.screened_groups():
        cell = study.joint(seed) if names == study.bench.tasks else study.group(names, seed)
        found = r.valid_gains(study.cell(cell), reference, study.bench.metrics)
        if found:
            out[frozenset(names)] = found
    return out


def _grouping(study: Study, seed: int) -> dict[str, Any]:
    tasks, measured = study.bench.tasks, _screened_gains(study, seed)
    affinity_TT = affinities(tasks, measured)
    partitions = best_partitions(tasks, affinity_TT, measured)
    return {
        "measured": [{"tasks": [t for t in tasks if t in g], "valid_gains": m} for g, m in measured.items()],
        "affinity": {a: {b: float(affinity_TT[i, j]) for j, b in enumerate(tasks) if j != i} for i, a in enumerate(tasks)},
        "partitions": [p.facts() for p in partitions], "tolerance": TOLERANCE,
        "screened": recommend(partitions).facts(),
    }  # fmt: skip


def _partition_valid(study: Study, groups: Groups, seeds: Sequence[int]) -> float | None:
    """Mean relative gain on valid over tasks and seeds of a partition that was trained."""
    found = []
    for seed in seeds:
        cells = [study.joint(seed) if tuple(g) == study.bench.tasks else study.group(g, seed) for g in groups]
        values = {t: v for f in study.cells(cells) for t, v in f["valid"].items()}
        gain = mean_gain(values, study.reference(seed), study.bench.metrics)
        if gain is None or not set(study.reference(seed)) <= set(values):
            return None
        found.append(gain)
    return float(np.mean(found))


def _decide_groups(study: Study, grouping: dict[str, Any], screened: Groups, seeds: Sequence[int]) -> None:
    """Among one model, the screened groups and one model per task: the fewest models within the tolerance, on valid."""
    tasks = study.bench.tasks
    candidates: dict[str, Groups] = {"together": [tasks], "groups": list(screened), "alone": [(t,) for t in tasks]}
    rows: list[dict[str, Any]] = [
        {"name": n, "groups": [list(x) for x in g], "models": len(g), "valid_mean_gain": _partition_valid(study, g, seeds)}
        for n, g in candidates.items()
    ]
    known = sorted((row for row in rows if row["valid_mean_gain"] is not None), key=lambda row: row["models"])
    top = max((row["valid_mean_gain"] for row in known), default=0.0)
    chosen = next((row for row in known if row["valid_mean_gain"] >= top - TOLERANCE), rows[0])
    grouping |= {"candidates": rows, "recommended": chosen["groups"], "seeds": list(seeds)}
    grouping["over_together"] = None if chosen["models"] == 1 else _groups_over_joint(study, chosen["groups"], seeds)


def _groups_over_joint(study: Study, groups: Groups, seeds: Sequence[int]) -> dict[str, Any]:
    """Test gains of the recommended groups over the one joint model."""
    config, metrics = study.bench.config, study.bench.metrics
    a = r.test_values(study.cells([study.joint(s) for s in seeds]), config, 0)
    b: dict[str, Any] = {}
    for group in groups:
        b |= r.test_values(study.cells([study.group(group, s) for s in seeds]), config, 1)
    return r.summarise_gains(r.gain_resamples(b, a, metrics), a, b)


def _grid(study: Study, seed: int) -> dict[str, Any]:
    """Every variant's valid mean gain (what is chosen by) and test gains; the best one and the plain sum are finalists."""
    rows: list[dict[str, Any]] = []
    for variant in study.variants():
        found = study.cell(study.variant(variant, seed))
        row = dict.fromkeys(("valid_mean_gain", "seconds", "test")) | {"sharing": variant[0], "balancing": variant[1]}
        if found is not None:
            row |= {"valid_mean_gain": found["valid_mean_gain"], "seconds": found["seconds"],
                    "test": _against_singles(study, [study.variant(variant, seed)], [seed])}  # fmt: skip
        rows.append(row)
    known = [row for row in rows if row["valid_mean_gain"] is not None]
    refused = [{"sharing": v[0], "balancing": v[1], "why": why} for v, why in study.refused.items()]
    if not known:
        return {"rows": rows, "refused": refused} if rows else {}
    best = max(known, key=lambda row: row["valid_mean_gain"])
    plain = (study.bench.plain.sharing, PLAIN)
    finalists = dict.fromkeys([(best["sharing"], best["balancing"]), plain])
    return {
        "rows": rows,
        "best": [best["sharing"], best["balancing"]],
        "plain": list(plain),
        "finalists": [list(f) for f in finalists],
        "refused": refused,
    }


def _decide_grid(study: Study, grid: dict[str, Any], finalists: Sequence[Any], seeds: Sequence[int]) -> None:
    """The best of the grid against the plain sum, over all seeds: on valid it must win by the tolerance."""
    if not finalists:
        return
    best, plain = tuple(grid["best"]), tuple(grid["plain"])
    cells = {v: study.cells([study.variant(v, s) for s in seeds]) for v in dict.fromkeys([best, plain])}
    known = {v: [g for f in found if (g := f["valid_mean_gain"]) is not None] for v, found in cells.items()}
    gain = {v: float(np.mean(g)) for v, g in known.items() if g}
    wins = best != plain and gain.get(best, -np.inf) > gain.get(plain, -np.inf) + TOLERANCE
    grid["finalist_valid_mean_gain"] = {" ".join(v): g for v, g in gain.items()}
    grid["recommended"] = list(best if wins else plain)
    grid["over_plain"] = None
    if best != plain and all(cells.values()):
        grid["over_plain"] = r.compare_cells(cells[best], cells[plain], study.bench.config, study.bench.metrics)
