"""Sharing layers x balancers on ML-100K, with the whole conflict report: `python -m benchmarks.task_grid`.

What `python -m jobs.tasks --grid` does, its trainings in processes of this machine instead of Ray tasks. All is chosen on
valid; one seed for the screen, three for the finalists. Profiles are left out: 189 test users tell no variants apart.
Value: mean relative gain on test of the variant that won on valid over the plain weighted sum, three seeds. The pictures
(tasks.html) stay in the run directory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.multitask_vs_single import arguments, device_name, prepared
from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import load_config, parse_config
from mtrec_ray.multitask.cells import in_processes
from mtrec_ray.multitask.run import Settings, study_tasks
from mtrec_ray.multitask.study import Plan
from mtrec_ray.multitask.words import table

CONFIG = "jobs/configs/ml100k.yaml"
RUN = "runs/bench/multitask"
TASKS = ("retrieval", "rating", "like", "similar")
SHARING = ("shared_bottom", "mmoe", "ple", "pepnet")
BALANCING = ("static", "uncertainty", "famo", "aligned_mtl", "upgrad", "nash_mtl")


def shortened(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per variant: mean gains over the single-task models, and each task's on test."""
    rows = []
    for row in grid["rows"]:
        test = row["test"] or {"mean": {"gain": None}, "tasks": {}}
        rows.append({
            "sharing": row["sharing"], "balancing": row["balancing"], "seconds": row["seconds"],
            "valid_mean_gain": row["valid_mean_gain"], "test_mean_gain": test["mean"]["gain"],
            "test_gains": {t: g["gain"] for t, g in test["tasks"].items()},
        })  # fmt: skip
    return rows


def main() -> int:
    args = arguments("Sharing layers x balancers on ML-100K.", CONFIG, RUN, epochs=8).parse_args()
    if not args.prepared:
        fetch_ml100k(Path(".data/ml-100k"))
    if not prepared(args):
        return 2
    raw = load_config(args.config, args.overrides).model_dump(mode="json")
    config = parse_config(raw | {"tasks": {t: raw["tasks"][t] for t in TASKS}}, args.config)
    data, text = (storage.Directory(storage.join(args.run, name)) for name in ("data", "text"))
    settings = Settings(Plan(3, False, SHARING, BALANCING), epochs=args.epochs, parallel=args.parallel)
    with in_processes(args.parallel) as runner:
        found = study_tasks(config, data, text, args.out or storage.join(args.run, "grid"), settings, runner)
    print(table(found))
    grid = found["grid"]
    rows, over = shortened(grid), grid.get("over_plain") or {"mean": {"gain": 0.0}}
    detail = {k: found[k] for k in ("tasks", "joint", "leave_one_out", "gradients", "grouping", "settings", "seeds", "failed")} | {
        "grid": {k: grid[k] for k in ("best", "plain", "recommended", "finalist_valid_mean_gain", "over_plain", "refused")},
        "rows": rows, "overrides": args.overrides, "device": device_name(args),
    }  # fmt: skip
    wanted = len(SHARING) * len(BALANCING)
    done = sum(row["valid_mean_gain"] is not None for row in rows)
    return finish("task_grid", over["mean"]["gain"], "mean relative gain", f"all {wanted} variants trained", done == wanted, detail)


if __name__ == "__main__":
    sys.exit(main())
