"""Cells: one training each, all under one budget, each finished one a JSON file.

A cell is a group of tasks with a seed, sharing layers and a balancer. Every cell trains the same number of epochs, hence of
optimiser steps, on the same windows in the same order for the same seed, and keeps its best checkpoint on valid: a
single-task model by the task's own metric, a model of several tasks by the mean relative gain over the single-task models
of the same seed (or by train.monitor). The test split is measured once, at that checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch

from mtrec_ray import storage
from mtrec_ray.config import BalancingConfig, RunConfig, parse_config
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.evaluation.evaluate import MODEL, USERS_AT_ONCE, user_blocks
from mtrec_ray.evaluation.measure import Model, measure
from mtrec_ray.evaluation.reduce import WHOLE, Reducer, Summary, points_of, summarise, whole
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.multitask.objective import mean_gain
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.loop import Fitted, Metrics, Report, fit
from mtrec_ray.training.worker import (
    build_feed,
    build_model,
    load_schema,
    mapped_windows,
    training_fingerprint,
    valid_evaluator,
)

log = logging.getLogger(__name__)

VERSION = 1
"""Goes up when the meaning of a cell changes, so that older ones are not taken up."""
MEAN_GAIN = "mean_gain"
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
            if "depends_on" in task:  # a chain that is cut: the rest learns its label by itself
                task["depends_on"] = _still_there(task["depends_on"], cell.tasks)
        if cell.alone:
            raw["tasks"][cell.tasks[0]]["weight"] = 1.0
        raw["seed"], raw["model"]["sharing"], raw["balancing"]["kind"] = cell.seed, cell.sharing, cell.balancing
        if "record" in BalancingConfig.model_fields:
            raw["balancing"]["record"] = cell.record
        monitor = self.config.train.monitor
        if cell.alone:
            monitor = f"{cell.tasks[0]}/{self.metrics[cell.tasks[0]]}"
        elif self.select == MEAN_GAIN or monitor.partition("/")[0] not in cell.tasks:
            monitor = f"{cell.tasks[0]}/{MEAN_GAIN}"
        raw["train"] |= {"epochs": self.epochs, "patience": self.epochs + raw["train"]["evaluate_every"], "monitor": monitor,
                         "workers": 0, "feed": "cached", "checkpoint_every": None}  # fmt: skip
        return parse_config(raw, f"cell {cell.name}")

    def fingerprint(self, cell: Cell) -> str:
        """Of everything that the cell's numbers depend on."""
        config, data, text = self.cell_config(cell), storage.Directory(self.data), _directory(self.text)
        judged = config.evaluation.model_dump(mode="json", include={"bootstrap", "seed"})
        return storage.fingerprint({
            "version": VERSION, "training": training_fingerprint(config, data, text), "reference": dict(cell.reference),
            "metrics": {t: self.metrics[t] for t in cell.tasks}, "evaluation": judged,
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


def _still_there(names: Any, tasks: Sequence[str]) -> Any:
    if isinstance(names, list):
        return [n for n in names if n in tasks]
    return names if names in tasks else None


def _directory(root: str | None) -> storage.Directory | None:
    return None if root is None else storage.Directory(root)


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """Train and measure a cell, write its file -> its content. A failure is no file, and an answer with `error`."""
    started = time.perf_counter()
    try:
        found = _run(bench, cell) | {"seconds": round(time.perf_counter() - started, 2)}
        storage.write_json(bench.path(cell), found)
        return found
    except Exception as error:  # whatever it is, the other cells go on
        log.debug("cell %s", cell.name, exc_info=True)
        return {"cell": _facts(cell), "error": f"{type(error).__name__}: {error}", "seconds": time.perf_counter() - started}


def run_cells(bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
    """One after the other in this process -> (place, content)."""
    for place, cell in enumerate(cells):
        yield place, run_cell(bench, cell)


def _facts(cell: Cell) -> dict[str, Any]:
    return asdict(cell) | {"name": cell.name, "tasks": list(cell.tasks), "reference": dict(cell.reference)}


def _run(bench: Bench, cell: Cell) -> dict[str, Any]:
    config = bench.cell_config(cell)
    metrics = {t: bench.metrics[t] for t in cell.tasks}
    history: list[dict[str, Any]] = []
    reported: list[dict[str, float]] = []

    def judged(valid: Metrics) -> Metrics:
        """Valid metrics with the mean gain among those of the first task, where the loop's monitor finds it."""
        values = {t: valid[t][name] for t, name in metrics.items() if name in valid.get(t, {})}
        gain = mean_gain(values, cell.reference, metrics)
        history.append({"epoch": len(reported), "values": values, MEAN_GAIN: gain})
        first = cell.tasks[0]
        return valid | {first: valid.get(first, {}) | {MEAN_GAIN: 0.0 if gain is None else gain}}

    fitted, predictor = _fit(bench, config, judged, lambda _, scalars: reported.append(dict(scalars)))
    test = judge(predictor, mapped_windows(storage.Directory(bench.data).prefix, "test"), config.evaluation.profile_folds_test)
    best = next(h for h in history if h["epoch"] == fitted.best_epoch)
    return {
        "fingerprint": bench.fingerprint(cell),
        "cell": _facts(cell),
        "epochs": len(reported),
        "steps": int(sum(r["train/steps"] for r in reported)),
        "best_epoch": fitted.best_epoch,
        "valid": best["values"],
        "valid_mean_gain": best[MEAN_GAIN],
        "history": history,
        "losses": [{n.split("/")[1]: v for n, v in r.items() if n.startswith("train/") and n.endswith("/loss")} for r in reported],
        "gradients": [{n.removeprefix("gradient/"): v for n, v in r.items() if n.startswith("gradient/")} for r in reported],
        "test": {t: {n: v for n, v in found.items() if np.isfinite(v)} for t, found in points_of(test).items()},
        "resamples": {t: [float(f"{v:.7g}") for v in test[t][n]] for t, n in metrics.items() if n in test.get(t, {})},
    }


def _fit(bench: Bench, config: RunConfig, judged: Any, report: Report) -> tuple[Fitted, Predictor]:
    """Train in this process -> (how it went, a predictor with the best weights)."""
    torch.set_num_threads(config.train.threads)
    prefix, text = storage.Directory(bench.data).prefix, _directory(bench.text)
    schema = load_schema(prefix)
    catalogue = storage.read_table(storage.join(prefix, "catalogue.parquet"))
    text_NE = None if text is None else load_text_vectors(text.prefix, catalogue)
    model = build_model(config, schema, text_NE)
    model.item_tower.residual.name_items(hash_ids(catalogue["item_id"].slice(0, schema.n_train_items)))
    valid = valid_evaluator(config, schema, catalogue, mapped_windows(prefix, "valid"))
    feed = build_feed(config, schema, mapped_windows(prefix, "train"), 0, 1)
    device = torch.device("cuda", torch.cuda.current_device()) if config.train.use_gpu else torch.device("cpu")

    def evaluate(kept: Recommender) -> Metrics:
        found: Metrics = judged(valid(kept))
        return found

    fitted = fit(config, model, feed, evaluate, report, None, device)
    model = model.cpu()
    model.load_state_dict(fitted.best_state)
    with torch.no_grad():
        item_vec_ND = model.eval().item_vectors()
    return fitted, Predictor(config, schema, catalogue, model, item_vec_ND, fingerprint="cell")


def judge(predictor: Predictor, cache: WindowCache, folds: tuple[int, ...]) -> Summary:
    """Every task's metrics on a split, with the bootstrap's resamples; no lists and no slices."""
    settings = predictor.config.evaluation
    resampler = Resampler(settings.bootstrap, settings.seed)
    reducer, system, parts = Reducer(predictor, resampler, folds), Model(predictor), []
    for block in user_blocks(cache.user_ids, USERS_AT_ONCE):
        facts, answers = measure({MODEL: system}, predictor, cache, block, settings.batch_windows, lists=False)
        parts.append(reducer(facts, answers[MODEL], {WHOLE: whole(facts)}).get(WHOLE, Statistics()))
    return summarise(Statistics.merge(parts), dict(predictor.config.tasks), resampler)


def epoch_seconds(bench: Bench, cell: Cell) -> float:
    """Seconds of an epoch with its evaluation on valid, from one epoch of the cell."""
    config = replace(bench, epochs=1).cell_config(replace(cell, reference={}))
    started = time.perf_counter()
    ended: list[float] = []
    _fit(
        bench,
        config,
        lambda valid: {t: v | {MEAN_GAIN: 0.0} for t, v in valid.items()},
        lambda *_: ended.append(time.perf_counter()),
    )
    return ended[0] - started
