"""Which tasks help each other, and which sharing and balancing suit them.

    python -m jobs.tasks --config jobs/configs/ml100k.yaml [--out runs/ml100k/tasks] [key=value ...]

Trains every task alone, all together, all but one, and what follows from these, under one budget; writes tasks.json and
tasks.html. A killed job goes on with the cells that are missing. Exit codes: 0; 2 bad input or a cell that failed;
3 a task loses more in the joint model than --seesaw allows.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ray.data import TaskPoolStrategy

from jobs.command import USER_ERRORS, plain
from mtrec_ray import runtime
from mtrec_ray.config import load_config
from mtrec_ray.multitask.cells import Bench, Cell, run_cell, run_cells
from mtrec_ray.multitask.run import BALANCING, SHARING, Settings, axis, check, study_tasks
from mtrec_ray.multitask.study import Plan, Runner
from mtrec_ray.multitask.words import table
from mtrec_ray.pipeline import run_stages

LIMIT_BROKEN = 3


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for name, level in {"ray": logging.WARNING, "httpx": logging.WARNING, "mtrec_ray.training": logging.WARNING}.items():
        logging.getLogger(name).setLevel(level)
    try:
        config = load_config(args.config, args.overrides)
        settings = _settings(args)
        check(config, settings)
        run = run_stages(config, args.run or f"runs/{config.name}", ("prepare", "encode") if config.encoder else ("prepare",))
        text = run.text if config.encoder else None
        found = study_tasks(config, run.data, text, args.out or run.path("tasks"), settings, _runner(args.parallel))
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    print(table(found))
    print(f"wrote {args.out or run.path('tasks')}/tasks.json and tasks.html")
    return verdict(found)


def verdict(found: dict[str, Any]) -> int:
    """Say what failed and what the gate found -> exit code."""
    gate = found["seesaw"]
    for sentence in found["failed"]:
        print(f"failed: {sentence}", file=sys.stderr)
    for sentence in gate["broken"]:
        print(f"limit broken: {sentence}", file=sys.stderr)
    for sentence in gate["not_judged"]:
        print(f"cannot be judged: {sentence}", file=sys.stderr)
    if found["failed"] or gate["not_judged"]:
        return 2
    return LIMIT_BROKEN if gate["broken"] else 0


def _settings(args: argparse.Namespace) -> Settings:
    sharing, balancing = axis("--sharing", args.sharing, SHARING), axis("--balancing", args.balancing, BALANCING)
    if args.grid:
        sharing, balancing = sharing or SHARING, balancing or BALANCING
    plan = Plan(args.seeds, args.pairs, sharing, balancing)
    return Settings(plan, args.cell_minutes, args.epochs, tuple(args.metric), args.select, args.seesaw, args.parallel)


def _runner(parallel: int) -> Runner:
    """Cells in this process, or as Ray tasks on the cluster that the stages are connected to."""
    if parallel == 1:
        return run_cells

    def in_ray(bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from runtime.for_each(
            run_cell,
            bench,
            list(cells),
            "tasks: cells",
            {"num_cpus": 1, "compute": TaskPoolStrategy(size=min(parallel, len(cells)))},
        )

    return in_ray


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.tasks", description="Which tasks help each other?")
    parser.add_argument("--config", required=True, help="YAML of the run, such as jobs/configs/ml100k.yaml")
    parser.add_argument("--run", help="run directory whose data and text are used or made (default runs/NAME)")
    parser.add_argument("--out", help="where cells, tasks.json and tasks.html go (default RUN/tasks)")
    parser.add_argument("--cell-minutes", type=_positive, default=3.0, metavar="M",
                        help="every cell gets the epochs that fit so many minutes of the slowest joint model (default 3)")
    parser.add_argument("--epochs", type=_count, metavar="N", help="epochs of every cell, instead of --cell-minutes")
    parser.add_argument("--seeds", type=_count, default=3, metavar="N", help="seeds of the finalists (default 3)")
    parser.add_argument("--pairs", action="store_true", help="train every pair of tasks too; better groups, T(T-1)/2 more cells")
    parser.add_argument("--grid", action="store_true", help="all sharing layers x all balancers, where the axes are not given")
    parser.add_argument("--sharing", metavar="A,B", help=f"sharing layers of the grid, of {', '.join(SHARING)}")
    parser.add_argument(
        "--balancing", metavar="A,B", help=f"balancers of the grid, of {', '.join(BALANCING)}; static is always there"
    )
    parser.add_argument(
        "--metric", action="append", default=[], metavar="TASK=METRIC", help="what a task is judged by; may be repeated"
    )
    parser.add_argument("--select", choices=("mean_gain", "monitor"), default="mean_gain",
                        help="what chooses the checkpoint of several tasks: mean relative gain (default) or train.monitor")
    parser.add_argument("--seesaw", type=_share, metavar="SHARE",
                        help="exit with 3 when a task may lose more than this share of its single-task value, such as 0.03")
    parser.add_argument("--parallel", type=_count, default=1, metavar="N", help="so many cells at once, as Ray tasks")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value, such as tasks.rating.weight=0.5")
    return parser
# fmt: on


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share from 0 to below 1, such as 0.03")
    return value


if __name__ == "__main__":
    sys.exit(main())
