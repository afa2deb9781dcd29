"""One study from prepared data to tasks.json and tasks.html."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from mtrec_ray import lock, storage
from mtrec_ray.config import BalancingConfig, ModelConfig, RunConfig
from mtrec_ray.multitask.cells import Bench, Select, epoch_seconds, run_cells
from mtrec_ray.multitask.findings import execute
from mtrec_ray.multitask.objective import check_choices, choose_metrics
from mtrec_ray.multitask.results import seesaw
from mtrec_ray.multitask.study import Plan, Runner, Study, StudyError, check_tasks, fitting_epochs
from mtrec_ray.training.worker import load_schema

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What is asked of a study."""

    plan: Plan = field(default_factory=Plan)
    cell_minutes: float = 3.0
    epochs: int | None = None
    """Of every cell; None: as many as fit `cell_minutes`, at most train.epochs."""
    metrics: tuple[str, ...] = ()
    """TASK=METRIC."""
    select: Select = "mean_gain"
    seesaw: float | None = None
    """Share of its single-task model's value that a task may lose; None: no gate."""
    parallel: int = 1


SHARING: tuple[str, ...] = get_args(ModelConfig.model_fields["sharing"].annotation)
BALANCING: tuple[str, ...] = get_args(BalancingConfig.model_fields["kind"].annotation)


def axis(flag: str, names: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """`a,b` -> names of an axis of the grid. Raises StudyError for an unknown one."""
    chosen = tuple(n.strip() for n in names.split(",") if n.strip()) if names else ()
    unknown = [n for n in chosen if n not in known]
    if unknown:
        raise StudyError(f"{flag}: unknown {unknown}; there is {list(known)}")
    return chosen


def check(config: RunConfig, settings: Settings) -> None:
    """Raises StudyError or MetricError for what makes no sense, before anything is prepared."""
    check_tasks(tuple(config.tasks))
    check_choices(config, settings.metrics)
    if settings.seesaw is not None and not config.evaluation.bootstrap:
        raise StudyError("--seesaw: evaluation.bootstrap is 0, so there are no intervals to judge by; set it to 1000")


def study_tasks(
    config: RunConfig,
    data: storage.Directory,
    text: storage.Directory | None,
    out: str,
    settings: Settings,
    runner: Runner = run_cells,
) -> dict[str, Any]:
    """Run what is missing below `out`, write tasks.json and (where matplotlib and jinja2 are installed) tasks.html
    -> the content of tasks.json."""
    check(config, settings)
    with lock.only_writer(out):
        metrics = choose_metrics(config, load_schema(data.prefix), settings.metrics)
        bench = Bench(config, data.root, None if text is None else text.root, storage.absolute(storage.join(out, "cells")), metrics,
                      settings.epochs or 1, settings.select)  # fmt: skip
        if settings.epochs is None:
            bench = replace(bench, epochs=_budget(bench, settings, out))
        study = Study(bench, settings.plan, runner, settings.parallel)
        found = execute(study)
        broken, unknown = ([], []) if settings.seesaw is None else seesaw(found["joint"], settings.seesaw)
        absent = [] if settings.seesaw is None else [t for t in bench.tasks if t not in found["joint"]["tasks"]]
        unknown += [f"{t}: it has no joint or no single-task result" for t in absent]
        found |= {
            "name": config.name,
            "fingerprint": storage.fingerprint(sorted(study.found)),
            "data": data.manifest["inputs"],
            "config": config.model_dump(mode="json"),
            "settings": {
                "epochs": bench.epochs, "cell_minutes": settings.cell_minutes if settings.epochs is None else None,
                "seeds": settings.plan.seeds, "pairs": settings.plan.pairs, "select": settings.select, "seesaw": settings.seesaw,
                "monitor": config.train.monitor, "protocol": config.data.protocol, "resamples": config.evaluation.bootstrap,
            },
            "seesaw": {"allowed": settings.seesaw, "broken": broken, "not_judged": unknown},
        }  # fmt: skip
        storage.write_json(storage.join(out, "tasks.json"), found)
        _page(found, out)
        return found


def _page(found: dict[str, Any], out: str) -> None:
    try:
        from mtrec_ray.multitask.report import render
    except ModuleNotFoundError as error:
        log.info("no tasks.html, %s is missing: pip install 'mtrec_ray[report]'", error.name)
        return
    try:
        storage.write_bytes(storage.join(out, "tasks.html"), render(found).encode())
    except Exception:  # a picture that cannot be drawn must not cost the numbers
        log.exception("no tasks.html; the same command tries again and trains nothing anew")


def _budget(bench: Bench, settings: Settings, out: str) -> int:
    """Epochs of every cell: what fits `cell_minutes` with the slowest of the joint models. Measured once and kept, since
    other epochs would be other cells."""
    probe = Study(bench, settings.plan)
    first = bench.config.seed
    variants = probe.variants() or [(bench.plain.sharing, bench.plain.balancing)]
    cells = {" ".join(v): probe.variant(v, first) for v in variants}
    key = storage.fingerprint({n: bench.fingerprint(c) for n, c in cells.items()})
    uri = storage.join(out, "budget.json")
    kept: Any = {}
    if storage.exists(uri):
        try:
            kept = storage.read_json(uri)
        except storage.StorageError:
            kept = {}
    if kept.get("key") != key:
        seconds = {n: epoch_seconds(bench, c) for n, c in cells.items()}
        kept = {"key": key, "epoch_seconds": seconds}
        storage.write_json(uri, kept)
    epochs = fitting_epochs(kept["epoch_seconds"], settings.cell_minutes, bench.config.train.epochs)
    log.info("budget: %d epochs a cell, an epoch with evaluation takes %.1f s", epochs, max(kept["epoch_seconds"].values()))
    return epochs
