"""Joint against single-task models on ML-100K under equal effort: `python -m benchmarks.multitask_vs_single`.

Retrieval (NDCG of the whole list), rating (RMSE) and like (AUC), leave-one-out. Both sides get the same optimiser steps a
training, the same trials (settings of TRIALS at the first seed, the best on valid goes on) and the same seeds. A
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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import load_config, parse_config
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER
from mtrec_ray.multitask.cells import Bench, Cell, in_processes
from mtrec_ray.multitask.results import compare_cells, gain_resamples, summarise_gains, test_values
from mtrec_ray.multitask.study import Plan, Runner, Study

CONFIG = "jobs/configs/ml100k.yaml"
RUN = "runs/bench/multitask"
METRICS = {"retrieval": "ndcg", "rating": "rmse", "like": "auc"}
SEEDS = 3
Trial = Mapping[str, Mapping[str, float]]
"""Part of the configuration -> key -> value."""
TRIALS: tuple[Trial, ...] = (
    {},
    {"train": {"learning_rate": 0.002}},
    {"model": {"dropout": 0.2}},
    {"train": {"learning_rate": 0.0005}},
)
ALLOWED = 0.03


@dataclass(frozen=True)
class Where:
    """Folders of prepared data, text vectors and cells."""

    data: str
    text: str
    out: str


def studies(
    config: str, overrides: list[str], trials: list[Trial], metrics: dict[str, str], where: Where, epochs: int, runner: Runner
) -> list[Study]:
    """One for each trial, over the same folder of cells."""
    found = []
    for trial in trials:
        changes = [f"{part}.{key}={value}" for part, values in trial.items() for key, value in values.items()]
        whole = load_config(config, [*overrides, *changes]).model_dump(mode="json")
        whole["tasks"] = {t: whole["tasks"][t] for t in metrics}
        found.append(Study(Bench(parse_config(whole, config), where.data, where.text, where.out, metrics, epochs), Plan(), runner))
    return found


def together(study: Study, seed: int, reference: dict[str, float]) -> Cell:
    return replace(study.bench.plain, seed=seed, reference=reference)


def run_all(stage: str, wanted: Sequence[tuple[Study, Sequence[Cell]]]) -> None:
    """Cells of several studies at once: their runner may have several processes."""
    with ThreadPoolExecutor(len(wanted)) as threads:
        for done in [threads.submit(study.run, stage, cells) for study, cells in wanted]:
            done.result()


def failed(trials: list[Study]) -> list[str]:
    return [f"{f['cell']['name']}: {f['error']}" for s in trials for f in s.found.values() if "error" in f]


def width(study: Study) -> dict[str, Any]:
    """Interval of the gain of a single-task model over the same one of another seed, its cells of seeds 0 and 1 trained."""
    out = {}
    for task in study.bench.metrics:
        a, b = ([found] for found in study.cells([study.bench.single(task, s) for s in (0, 1)]))
        out[task] = compare_cells(b, a, study.bench.config, study.bench.metrics)["tasks"][task]
        out[task]["half_width"] = (out[task]["high"] - out[task]["low"]) / 2
    return out


def run(trials: list[Study], seeds: Sequence[int]) -> dict[str, Any]:
    """Everything that is measured. Raises RuntimeError when a training failed."""
    first, metrics = seeds[0], trials[0].bench.metrics
    many = seeds[:2] if len(trials) > 1 else seeds  # two for the width; with one setting there is nothing to choose first
    alone = [trials[0].bench.single(t, seed) for t in metrics for seed in many]
    run_all("tasks alone", [(s, alone if s is trials[0] else [s.bench.single(t, first) for t in metrics]) for s in trials])
    _stop(trials)
    detail: dict[str, Any] = {"width": width(trials[0])}
    chosen: dict[str, Study] = {t: max(trials, key=lambda s, t=t: _own(s, t, first)) for t in metrics}  # type: ignore[misc]
    run_all("seeds alone", [(s, [s.bench.single(t, x) for t in metrics if chosen[t] is s for x in seeds]) for s in trials])
    _stop(trials)
    singles = {seed: {t: s.cells([s.bench.single(t, seed)])[0] for t, s in chosen.items()} for seed in seeds}
    references = {seed: {t: found["valid"][t] for t, found in by_task.items()} for seed, by_task in singles.items()}
    reference = references[first]
    run_all("trials together", [(s, [together(s, first, reference)]) for s in trials])
    _stop(trials)
    joint = max(trials, key=lambda s: float(s.cells([together(s, first, reference)])[0]["valid_mean_gain"]))
    cells = [together(joint, s, references[s]) for s in seeds]
    joint.run("seeds, together", cells)
    _stop(trials)
    config = joint.bench.config
    old: dict[str, Any] = {}
    for task in metrics:
        old |= test_values([singles[s][task] for s in seeds], config, 0)
    new = test_values(joint.cells(cells), config, 1)
    settings = trials[0].bench.config.model_dump(mode="json", include={"model", "tasks", "balancing", "train"})
    detail |= {
        "gains": summarise_gains(gain_resamples(new, old, metrics), old, new),
        "chosen": {t: trials.index(s) for t, s in chosen.items()} | {"together": trials.index(joint)},
        "alone": {t: [singles[s][t]["test"][t][m] for s in seeds] for t, m in metrics.items()},
        "together": {t: [c["test"][t][m] for c in joint.cells(cells)] for t, m in metrics.items()},
        "best_epochs": {t: [singles[s][t]["best_epoch"] + 1 for s in seeds] for t in metrics}
        | {"together": [c["best_epoch"] + 1 for c in joint.cells(cells)]},
        "steps": sorted({int(c["steps"]) for s in trials for c in s.found.values()}),
        "settings": settings,
    }  # fmt: skip
    assert len(detail["steps"]) == 1, "the budgets differ"
    detail["steps"] = detail["steps"][0]
    return detail


def _own(study: Study, task: str, seed: int) -> float:
    """The task's own valid metric, more is better."""
    value = float(study.cells([study.bench.single(task, seed)])[0]["valid"][task])
    return -value if study.bench.metrics[task] in LOWER_IS_BETTER else value


def _stop(trials: list[Study]) -> None:
    broken = failed(trials)
    if broken:
        raise RuntimeError("; ".join(broken))


def main() -> int:
    parser = arguments("Joint against single-task models on ML-100K.", CONFIG, RUN, epochs=25)
    seeds_of(parser)
    parser.add_argument("--trials", type=int, choices=range(1, 1 + len(TRIALS)), default=len(TRIALS),
                        help=f"settings tried on each side, 1 to {len(TRIALS)}")  # fmt: skip
    args = parser.parse_args()
    if not args.prepared:
        fetch_ml100k(Path(".data/ml-100k"))
    detail = compare(args, TRIALS[: args.trials], METRICS)
    if detail is None:
        return 2
    worst = min(g["low"] for g in detail["gains"]["tasks"].values())
    balancer = detail["settings"]["balancing"]["kind"]
    name = "multitask_vs_single" if balancer == "static" else f"multitask_vs_single_{balancer}"
    return finish(name, worst, "worst 95 % bound of a relative gain", f">= {-ALLOWED}", worst >= -ALLOWED, detail)


def arguments(description: str, config: str, run: str, epochs: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", default=config)
    parser.add_argument("--epochs", type=_from_one, default=epochs, help=f"of every training (default {epochs})")
    parser.add_argument("--run", default=run, help="run directory of data and text")
    parser.add_argument("--out", help="folder of the trainings (default RUN/cells)")
    parser.add_argument("--parallel", type=_from_one, default=1, help="trainings at a time, a process each")
    parser.add_argument("--prepared", action="store_true", help="take data and text of --run as they are")
    parser.add_argument("overrides", nargs="*", help="key.path=value of the configuration, such as train.use_gpu=true")
    return parser


def seeds_of(parser: argparse.ArgumentParser) -> None:
    """The option that `compare` reads."""
    parser.add_argument("--seeds", type=int, choices=range(2, 21), default=SEEDS, metavar="N", help=f"2 to 20 (default {SEEDS})")


def prepared(args: argparse.Namespace) -> bool:
    """Data and text vectors of --run, made unless they are given; False when that failed, which was said."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("mtrec_ray.training").setLevel(logging.WARNING)
    for stage in () if args.prepared else ("prepare", "encode"):
        command = [sys.executable, "-m", f"jobs.{stage}", "--config", args.config, "--out", args.run]
        if subprocess.run(command, check=False).returncode:
            print(f"{stage} failed", file=sys.stderr)
            return False
    return True


def device_name(args: argparse.Namespace) -> str:
    return torch.cuda.get_device_name() if "train.use_gpu=true" in args.overrides else "cpu"


def compare(args: argparse.Namespace, trials: Sequence[Trial], metrics: dict[str, str]) -> dict[str, Any] | None:
    """Prepare, train and measure; None when something failed, which was said."""
    if not prepared(args):
        return None
    torch.set_num_threads(1)
    data, text = (storage.absolute(storage.join(args.run, name)) for name in ("data", "text"))
    where = Where(data, text, storage.absolute(args.out or storage.join(args.run, "cells")))
    seeds = range(args.seeds)
    with in_processes(args.parallel) as runner:
        try:
            detail = run(studies(args.config, args.overrides, list(trials), metrics, where, args.epochs, runner), seeds)
        except RuntimeError as error:
            print(f"a training failed: {error}", file=sys.stderr)
            return None
    return detail | {
        "epochs": args.epochs, "trials": list(trials), "seeds": list(seeds), "config": args.config, "overrides": args.overrides,
        "device": device_name(args),
    }  # fmt: skip


def _from_one(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
