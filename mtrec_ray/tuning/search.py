"""The Ray Tune adapter: trials as single-process training runs, ASHA, a budget.

Tune draws nothing and keeps nothing: the points are given (`space`), and the board's files are what a killed job goes on from,
since they hold each trial by itself and are replaced whole. Every trial has the loop's own checkpoints, one an epoch, until it
is over; a killed job repeats at most the epochs that were running.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.worker import run_identity, run_worker
from mtrec_ray.tuning.board import Board
from mtrec_ray.tuning.trials import OVER

log = logging.getLogger(__name__)

DEATHS = 1
"""Times that a trial whose process died is tried again."""


class AshaRungs:
    """Ray Tune's ASHA, asked directly, so that what earlier calls measured can be told to it again."""

    def __init__(self, epochs: int, first_rung: int | None, reduction: float) -> None:
        first = min(epochs, first_rung or max(1, round(epochs / reduction**2)))
        self.asha = ASHAScheduler(
            time_attr="epoch", metric="score", mode="max", max_t=epochs, grace_period=first, reduction_factor=reduction,
            stop_last_trials=False,
        )  # fmt: skip
        self.known: dict[str, Any] = {}

    def goes_on(self, trial: str, epoch: int, score: float) -> bool:
        if trial not in self.known:
            self.known[trial] = SimpleNamespace(trial_id=trial)
            self.asha.on_trial_add(None, self.known[trial])
        found = self.asha.on_trial_result(None, self.known[trial], {"epoch": epoch, "score": score})
        return bool(found != ASHAScheduler.STOP)


class _Scheduler(FIFOScheduler):
    """First come, first served; the board decides who goes on."""

    def __init__(self, board: Board) -> None:
        super().__init__()
        self.board = board

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return str(self.CONTINUE if self.board.report(trial.config["trial"], result) else self.STOP)


class _Deaths(tune.Callback):
    """Hears of trials whose process died for the last time."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = Path(trial.error_file).read_text().rpartition("Failure #")[2] if trial.error_file else ""
        why = (*told.splitlines()[1:], "no reason given")[0]
        self.board.fail(trial.config["trial"], f"its process died {DEATHS + 1} times, the last time: {why}")


def run_trials(
    board: Board,
    configs: Mapping[str, RunConfig],
    data: storage.Directory,
    text: storage.Directory | None,
    folder: str,
    parallel: int,
    minutes: float | None = None,
) -> None:
    """Train what is waiting on the board. Returns when all is over, the budget is spent, or Ctrl-C was pressed.

    configs: trial -> its configuration. folder: for what is kept while trials run.
    """
    if not board.waiting:
        return
    settings: dict[str, dict[str, Any]] = {
        name: {
            "config": configs[name].model_dump_json(),
            "data": data.prefix,
            "text": None if text is None else text.prefix,
            "checkpoints": storage.join(folder, "_checkpoints", name),
            "identity": run_identity(configs[name], data, text),
        }
        for name in board.waiting
    }
    first = configs[board.waiting[0]]

    def work(config: dict[str, Any]) -> None:
        _train(settings[config["trial"]])

    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the board keeps and tells everything
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    kept = storage.join(folder, "_tune")
    storage.delete(kept)
    tuner = tune.Tuner(
        tune.with_resources(work, {"cpu": 1, "gpu": int(first.train.use_gpu)}),
        param_space={"trial": tune.grid_search(board.waiting)},
        tune_config=tune.TuneConfig(
            scheduler=_Scheduler(board), max_concurrent_trials=parallel, time_budget_s=None if minutes is None else 60 * minutes,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=kept, verbose=0, failure_config=tune.FailureConfig(max_failures=DEATHS),
            callbacks=[_Deaths(board)],
        ),
    )  # fmt: skip
    tuner.fit()
    storage.delete(kept)
    for name, trial in board.trials.items():
        if trial.state in OVER:
            storage.delete(storage.join(folder, "_checkpoints", name))


def _train(settings: dict[str, Any]) -> None:
    """What the process of a trial runs. A mistake or a loss that is not finite is reported: trying again would not help."""
    logging.getLogger("mtrec_ray").setLevel(logging.WARNING)
    config = RunConfig.model_validate_json(settings["config"])
    since = time.perf_counter()

    def report(epoch: int, scalars: dict[str, float]) -> None:
        nonlocal since
        now = time.perf_counter()
        seconds, since = now - since, now
        tune.report({k: v for k, v in scalars.items() if k.startswith("valid/")} | {"epoch": epoch + 1, "seconds": seconds})

    checkpoints = Checkpoints(settings["checkpoints"], settings["identity"])
    try:
        run_worker(config, settings["data"], settings["text"], report, checkpoints)
    except Exception as error:
        tune.report({"error": f"{type(error).__name__}: {error}"})
        return
    tune.report({"finished": True})


def usable_cpus() -> int:
    """Trials that run beside each other by default: a machine's cores, or a cluster's CPUs."""
    if os.environ.get("RAY_ADDRESS"):
        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return max(1, os.cpu_count() or 1)
