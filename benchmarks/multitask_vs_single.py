"""Joint against single-task models on ML-100K under equal effort: `python -m benchmarks.multitask_vs_single`.

Retrieval (NDCG of the whole list), rating (RMSE) and like (AUC), leave-one-out. Both sides get the same optimiser steps a
training, the same trials (settings of TRIALS at the first seed, the best on valid goes on) and the same three seeds. A
single-task model selects trial and checkpoint by its own metric, the joint one by the mean relative gain over the
single-task models of its seed. Test gains are paired over users, with the seeds as a second level of resampling.

First the width of the interval is measured, between two seeds of the same single-task model: no comparison can be sharper.
Value: the worst 95 % bound of the relative gains. Every training is a file below runs/bench/multitask/cells, so a killed
benchmark goes on with what is missing.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import parse_config
from mtrec_ray.multitask.cells import Bench, Cell
from mtrec_ray.multitask.results import compare_cells, gain_resamples, summarise_gains, test_values
from mtrec_ray.multitask.study import Plan, Study

CONFIG = "jobs/configs/ml100k.yaml"
RUN = "runs/bench/multitask"
METRICS = {"retrieval": "ndcg", "rating": "rmse", "like": "auc"}
SEEDS = (0, 1, 2)
TRIALS: tuple[dict[str, dict[str, float]], ...] = (
    {},
    {"train": {"learning_rate": 0.0005}},
    {"train": {"learning_rate": 0.002}},
    {"model": {"dropout": 0.2}},
)
ALLOWED = 0.03


def studies(config: str, data: str, text: str, out: str, epochs: int, trials: int) -> list[Study]:
    """One for each trial, over the same folder of cells."""
    raw = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    raw["tasks"] = {t: raw["tasks"][t] for t in METRICS}
    found = []
    for trial in TRIALS[:trials]:
        changed = raw | {part: raw.get(part, {}) | values for part, values in trial.items()}
        found.append(Study(Bench(parse_config(changed, config), data, text, out, METRICS, epochs), Plan()))
    return found


def together(study: Study, seed: int, reference: dict[str, float]) -> Cell:
    return replace(study.bench.plain, seed=seed, reference=reference)


def failed(trials: list[Study]) -> list[str]:
    return [f"{f['cell']['name']}: {f['error']}" for s in trials for f in s.found.values() if "error" in f]


def width(study: Study) -> dict[str, Any]:
    """Interval of the gain of a single-task model over the same one of another seed."""
    out = {}
    for task in METRICS:
        cells = [study.bench.single(task, s) for s in SEEDS[:2]]
        study.run("width of the interval", cells)
        a, b = ([found] for found in study.cells(cells))
        out[task] = compare_cells(b, a, study.bench.config, METRICS)["tasks"][task]
        out[task]["half_width"] = (out[task]["high"] - out[task]["low"]) / 2
    return out


def run(trials: list[Study]) -> dict[str, Any]:
    """Everything that is measured. Raises RuntimeError when a training failed."""
    first = SEEDS[0]
    detail: dict[str, Any] = {"width": width(trials[0])}
    chosen: dict[str, Study] = {}
    for task in METRICS:
        for study in trials:
            study.run(f"trials, {task} alone", [study.bench.single(task, first)])
        _stop(trials)
        chosen[task] = max(trials, key=lambda s, t=task: _own(s, t, first))  # type: ignore[misc]
    singles: dict[int, dict[str, Any]] = {}
    for seed in SEEDS:
        for task, study in chosen.items():
            study.run("seeds, alone", [study.bench.single(task, seed)])
        _stop(trials)
        singles[seed] = {t: study.cells([study.bench.single(t, seed)])[0] for t, study in chosen.items()}
    references = {seed: {t: found["valid"][t] for t, found in by_task.items()} for seed, by_task in singles.items()}
    for study in trials:
        study.run("trials, together", [together(study, first, references[first])])
    _stop(trials)
    joint = max(trials, key=lambda s: float(s.cells([together(s, first, references[first])])[0]["valid_mean_gain"]))
    cells = [together(joint, s, references[s]) for s in SEEDS]
    joint.run("seeds, together", cells)
    _stop(trials)
    config = joint.bench.config
    old: dict[str, Any] = {}
    for task in METRICS:
        old |= test_values([singles[s][task] for s in SEEDS], config, 0)
    new = test_values(joint.cells(cells), config, 1)
    detail |= {
        "gains": summarise_gains(gain_resamples(new, old, METRICS), old, new),
        "chosen": {t: TRIALS[trials.index(s)] for t, s in chosen.items()} | {"together": TRIALS[trials.index(joint)]},
        "alone": {t: [singles[s][t]["test"][t][m] for s in SEEDS] for t, m in METRICS.items()},
        "together": {t: [c["test"][t][m] for c in joint.cells(cells)] for t, m in METRICS.items()},
        "steps": sorted({int(c["steps"]) for s in trials for c in s.found.values()}),
    }  # fmt: skip
    assert len(detail["steps"]) == 1, "the budgets differ"
    detail["steps"] = detail["steps"][0]
    return detail


def _own(study: Study, task: str, seed: int) -> float:
    """The task's own valid metric, more is better."""
    value = float(study.cells([study.bench.single(task, seed)])[0]["valid"][task])
    return -value if METRICS[task] == "rmse" else value


def _stop(trials: list[Study]) -> None:
    broken = failed(trials)
    if broken:
        raise RuntimeError("; ".join(broken))


def _from_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Joint against single-task models on ML-100K.")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--epochs", type=_from_one, default=25, help="of every training (default 25)")
    parser.add_argument(
        "--trials",
        type=int,
        choices=range(1, 1 + len(TRIALS)),
        default=len(TRIALS),
        help=f"settings tried on each side, 1 to {len(TRIALS)}",
    )
    parser.add_argument("--run", default=RUN, help="run directory of data and text")
    parser.add_argument("--out", help="folder of the trainings (default RUN/cells)")
    parser.add_argument("--prepared", action="store_true", help="take data and text of --run as they are")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mtrec_ray.training").setLevel(logging.WARNING)
    if not args.prepared:
        fetch_ml100k(Path(".data/ml-100k"))
        for stage in ("prepare", "encode"):
            command = [sys.executable, "-m", f"jobs.{stage}", "--config", args.config, "--out", args.run]
            if subprocess.run(command, check=False).returncode:
                print(f"{stage} failed", file=sys.stderr)
                return 2
    torch.set_num_threads(1)
    roots = [storage.absolute(storage.join(args.run, name)) for name in ("data", "text")]
    out = storage.absolute(args.out or storage.join(args.run, "cells"))
    trials = studies(args.config, roots[0], roots[1], out, args.epochs, args.trials)
    try:
        detail = run(trials)
    except RuntimeError as error:
        print(f"a training failed: {error}", file=sys.stderr)
        return 2
    lows = {t: g["low"] for t, g in detail["gains"]["tasks"].items()}
    worst = min(lows.values())
    detail |= {"epochs": args.epochs, "trials": len(trials), "seeds": list(SEEDS), "config": args.config}
    return finish("multitask_vs_single", worst, "worst 95 % bound of a relative gain", f">= {-ALLOWED}", worst >= -ALLOWED, detail)


if __name__ == "__main__":
    sys.exit(main())
