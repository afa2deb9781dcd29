"""Cells: one training each, all under one budget, each finished one a JSON file.

A cell is a group of tasks with a seed, sharing layers and a balancer. Every cell trains the same number of epochs, hence of
optimiser steps, on the same windows in the same order for the same seed, and keeps its best checkpoint on valid: a
single-task model by the task's own metric, a model of several tasks by the mean relative gain over the single-task models
of the same seed (or by train.monitor). The test split is measured once, at that checkpoint.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from mtrec_ray import storage
from mtrec_ray.config import GAIN, RunConfig, parse_config
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.evaluation.evaluate import MODEL, USERS_AT_ONCE, evaluate_items, user_blocks
from mtrec_ray.evaluation.measure import Model, measure
from mtrec_ray.evaluation.reduce import WHOLE, Reducer, Summary, points_of, summarise, whole
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.multitask.objective import mean_gain
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.loop import Fitted
from mtrec_ray.training.worker import build_model, device_of, load_schema, mapped_windows, run_worker, training_fingerprint

log = logging.getLogger(__name__)

VERSION = 1
"""Goes up when the meaning of a cell changes, so that older ones are not taken up."""
CHAIN = ("depends_on", "chain", "calibration")
"""Keys of a task that hang on another one."""
PLAIN = "static"
"""The balancer of the plain weighted sum."""

Select = Literal["mean_gain", "monitor"]


@dataclass(frozen=True)
class Cell:
    """One training."""

    tasks: tuple[str, ...]
    seed: int
    sharing: str
    balancing: str
    reference: Mapping[str, float] = field(default_factory=dict)
    """Task -> valid value of its single-task model of this seed; empty for a single-task cell."""
    record: bool = False
    """Whether gradient norms and cosines are kept."""

    @property
    def alone(self) -> bool:
        return len(self.tasks) == 1

    @property
    def name(self) -> str:
        return f"{'+'.join(self.tasks)}, {self.sharing}, {self.balancing}, seed {self.seed}"


@dataclass(frozen=True)
class Bench:
    """What all cells of a study share."""

    config: RunConfig
    data: str
    """Root of the prepared data."""
    text: str | None
    """Root of the text vectors."""
    out: str
    """Folder of the cells."""
    metrics: Mapping[str, str]
    """Task -> metric."""
    epochs: int
    select: Select = "mean_gain"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config.tasks)

    @property
    def plain(self) -> Cell:
        """All tasks with the declared sharing layers and balancer."""
        return Cell(self.tasks, self.config.seed, self.config.model.sharing, self.config.balancing.kind)

    def single(self, task: str, seed: int) -> Cell:
        return replace(self.plain, tasks=(task,), seed=seed, balancing=PLAIN)

    def cell_config(self, cell: Cell) -> RunConfig:
        """The configuration of a cell. A task alone has λ = 1 and no balancer; early stopping is off, in every cell."""
        raw = self.config.model_dump(mode="json")
        raw["tasks"] = {n: t for n, t in raw["tasks"].items() if n in cell.tasks}
        for task in raw["tasks"].values():
            if task.get("depends_on") is not None and task["depends_on"] not in cell.tasks:
                for key in CHAIN:  # a chain that is cut: the rest learns its label by itself
                    task.pop(key, None)
        if cell.alone:
            raw["tasks"][cell.tasks[0]]["weight"] = 1.0
        raw["seed"], raw["model"]["sharing"], raw["balancing"]["kind"] = cell.seed, cell.sharing, cell.balancing
        raw["balancing"]["record"] = cell.record
        reference = {f"{t}/{self.metrics[t]}": v for t, v in cell.reference.items() if t in cell.tasks and v != 0}
        raw["train"] |= {"epochs": self.epochs, "patience": self.epochs + raw["train"]["evaluate_every"], "reference": reference,
                         "monitor": self._monitor(cell, bool(reference)), "workers": 0, "feed": "cached",
                         "checkpoint_every": None}  # fmt: skip
        return parse_config(raw, f"cell {cell.name}")

    def _monitor(self, cell: Cell, reference: bool) -> str:
        """What chooses a cell's checkpoint."""
        declared = self.config.train.monitor
        if self.select == "monitor" and not cell.alone and declared.partition("/")[0] in cell.tasks:
            return declared
        return GAIN if reference else f"{cell.tasks[0]}/{self.metrics[cell.tasks[0]]}"

    def fingerprint(self, cell: Cell) -> str:
        """Of everything that the cell's numbers depend on."""
        config, data, text = self.cell_config(cell), storage.Directory(self.data), _directory(self.text)
        judged = config.evaluation.model_dump(mode="json", include={"bootstrap", "seed"})
        return storage.fingerprint({
            "version": VERSION, "training": training_fingerprint(config, data, text), "reference": dict(cell.reference),
            "metrics": {t: self.metrics[t] for t in cell.tasks}, "evaluation": judged,
            "ranking": config.ranking.model_dump(mode="json"),
        })  # fmt: skip

    def path(self, cell: Cell) -> str:
        return storage.join(self.out, f"{self.fingerprint(cell)[:24]}.json")

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell; None when it is missing, half-written or of another study."""
        path = self.path(cell)
        if not storage.exists(path):
            return None
        try:
            found = dict(storage.read_json(path))
        except (storage.StorageError, TypeError, ValueError) as error:
            log.warning("%s: not a finished cell (%s); it is trained anew", path, error)
            return None
        return found if found.get("fingerprint") == self.fingerprint(cell) and "resamples" in found else None


def _directory(root: str | None) -> storage.Directory | None:
    return None if root is None else storage.Directory(root)


def _prefix(root: str | None) -> str | None:
    return None if root is None else storage.Directory(root).prefix


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train and measure a cell, write its file -> its content. A failure is no file, and an answer with `error`."""
    started, cpu = time.perf_counter(), time.process_time()
    try:
        found = _run(bench, cell)
        found |= {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}
        storage.write_json(bench.path(cell), found)
        return found
    except Exception as error:  # whatever it is, the other cells go on
        log.debug("cell %s", cell.name, exc_info=True)
        return {"cell": facts(cell), "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - started}


def run_cells(bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One after the other in this process -> (place, content)."""
    for place, cell in enumerate(cells):
        yield place, run_cell(bench, cell)


@contextmanager
def in_processes(count: int) -> Iterator[Callable[[Bench, Sequence[Cell]], Iterator[tuple[int, dict[str, Any]]]]]:
    """A runner of cells in so many processes of this machine -> (place, content) as they end; one process is this one."""
    if count == 1:
        yield run_cells
        return
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:

        def run(bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
            places = {pool.submit(run_cell, bench, cell): place for place, cell in enumerate(cells)}
            for done in as_completed(places):
                yield places[done], done.result()

        yield run


def facts(cell: Cell) -> dict[str, Any]:
    return asdict(cell) | {"name": cell.name, "tasks": list(cell.tasks), "reference": dict(cell.reference)}


def _run(bench: Bench, cell: Cell) -> dict[str, Any]:
    config, reported = bench.cell_config(cell), []
    prefix = storage.Directory(bench.data).prefix
    metrics = {t: bench.metrics[t] for t in cell.tasks}
    fitted = run_worker(config, prefix, _prefix(bench.text), lambda _, scalars: reported.append(dict(scalars)))
    history = []
    for epoch, scalars in enumerate(reported):
        values = {t: scalars[f"valid/{t}/{n}"] for t, n in metrics.items() if f"valid/{t}/{n}" in scalars}
        history.append({"epoch": epoch, "values": values, "mean_gain": mean_gain(values, cell.reference, metrics)})
    texts = None if bench.text is None else EventTexts.open(storage.Directory(bench.text).prefix)
    windows = mapped_windows(prefix, "test", texts)
    test = judge(_predictor(bench, config, fitted), windows, config.evaluation.profile_folds_test)
    best = history[fitted.best_epoch]
    return {
        "fingerprint": bench.fingerprint(cell),
        "cell": facts(cell),
        "epochs": len(reported),
        "steps": int(sum(r["train/steps"] for r in reported)),
        "best_epoch": fitted.best_epoch,
        "valid": best["values"],
        "valid_mean_gain": best["mean_gain"],
        "history": history,
        "losses": [{n.split("/")[1]: v for n, v in r.items() if n.startswith("train/") and n.endswith("/loss")} for r in reported],
        "gradients": [{n.removeprefix("gradient/"): v for n, v in r.items() if n.startswith("gradient/")} for r in reported],
        "test": {t: {n: v for n, v in found.items() if np.isfinite(v)} for t, found in points_of(test).items()},
        "resamples": {t: [float(f"{v:.7g}") for v in test[t][n]] for t, n in metrics.items() if n in test.get(t, {})},
    }


def _predictor(bench: Bench, config: RunConfig, fitted: Fitted) -> Predictor:
    """A predictor with the best weights."""
    prefix, text = storage.Directory(bench.data).prefix, _prefix(bench.text)
    schema, catalogue = load_schema(prefix), storage.read_table(storage.join(prefix, "catalogue.parquet"))
    text_NE = fitted.text_NE
    if text_NE is None and text is not None:
        text_NE = load_text_vectors(text, catalogue)
    model = build_model(config, schema, text_NE)
    model.load_state_dict(fitted.best_state)
    model.to(device_of(config.train.use_gpu))
    with torch.no_grad():
        item_vec_ND = model.eval().item_vectors()
    return Predictor(config, schema, catalogue, model, item_vec_ND, fingerprint="cell")


def judge(predictor: Predictor, cache: WindowCache, folds: tuple[int, ...]) -> Summary:
    """Every task's metrics on a split (those told of items on the same folds), with the bootstrap's resamples; no lists and
    no slices."""
    settings = predictor.config.evaluation
    resampler = Resampler(settings.bootstrap, settings.seed)
    reducer, system, parts = Reducer(predictor, resampler, folds), Model(predictor), []
    for block in user_blocks(cache.user_ids, USERS_AT_ONCE):
        facts, answers = measure({MODEL: system}, predictor, cache, block, settings.batch_windows, lists=False)
        parts.append(reducer(facts, answers[MODEL], {WHOLE: whole(facts)}).get(WHOLE, Statistics()))
    parts += [found[WHOLE] for found in evaluate_items({MODEL: system}, predictor, resampler, folds).values()]
    return summarise(Statistics.merge(parts), dict(predictor.config.tasks), resampler)


def epoch_seconds(bench: Bench, cell: Cell) -> float:
    """Seconds of an epoch with its evaluation on valid, from one epoch of the cell."""
    config = replace(bench, epochs=1).cell_config(replace(cell, reference={}))
    ended: list[float] = []
    started = time.perf_counter()
    run_worker(config, storage.Directory(bench.data).prefix, _prefix(bench.text), lambda *_: ended.append(time.perf_counter()))
    return ended[0] - started
