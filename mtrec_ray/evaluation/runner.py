"""evaluate: the distributed runner. Ray Data actors measure parts of the test moments, or the driver where there are few; the
driver merges and reports."""

from __future__ import annotations

import io
import logging
import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.evaluation.baselines import RANKERS, Fitted, fit_rankers
from mtrec_ray.evaluation.evaluate import (
    MODEL,
    EvaluationError,
    Reduced,
    compare_with_baselines,
    evaluate_items,
    evaluate_part,
    intervals_of,
    merge_reduced,
    unmeasured,
)
from mtrec_ray.evaluation.measure import Model, System
from mtrec_ray.evaluation.reduce import WHOLE, Summary, points_of, summarise
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.evaluation.task_baselines import fit_task_baselines
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.feed import WindowCache

log = logging.getLogger(__name__)
FEW = 2_000_000
"""Test targets × items that the driver measures itself: one thread needs seconds for them, and so does the start of an actor.
A thousand items at least are counted, since each target's history is encoded too."""


class _Actor:
    """One predictor per actor; a row is a part of the split, which holds whole users."""

    def __init__(self, bundle_prefix: str, baselines: Any, resampler: Resampler, text_prefix: str | None) -> None:
        torch.set_num_threads(1)
        self.texts = _event_texts(text_prefix)
        self.predictor = bundle.load(bundle_prefix, verify=False)
        self.baselines, self.resampler = baselines, resampler

    @cached_property
    def systems(self) -> dict[str, System]:
        """Fetched by an actor that has work: one that starts when all is done would find them gone."""
        return {MODEL: Model(self.predictor), **ray.get(self.baselines[0])}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        cache = WindowCache.from_table(storage.read_table(row["part"]), self.texts)
        known = set(storage.read_table(row["train"], ["user_id"])["user_id"].to_pylist()) if row["train"] else set()
        folds = self.predictor.config.evaluation.profile_folds_test
        try:
            found = evaluate_part(self.systems, self.predictor, cache, known, self.resampler, folds)
        except ValueError as error:  # said by the driver, without Ray Data's wrapping
            return {"part": row["part"], "found": b"", "error": str(error)}
        return {"part": row["part"], "found": pickle.dumps(found), "error": ""}


def measure_split(
    data: storage.Directory,
    bundle_prefix: str,
    split: str,
    baselines: dict[str, System],
    resampler: Resampler,
    blocks: int | None = None,
    text_prefix: str | None = None,
) -> Reduced:
    """Statistics of a whole split, measured by Ray Data actors part by part and merged in the order of the parts, so
    that the number of blocks in flight changes no digit.

    blocks: actors at work (default: as many as parts and CPUs allow), 0: none, this process does it. text_prefix: of the encode
    stage, where the model reads texts of events. Raises EvaluationError when a system's scores are no numbers.
    """
    parts = storage.list_uris(data.path("windows", split), ".parquet")
    there = set(storage.list_uris(data.path("windows", "train"), ".parquet"))
    rows = []
    for part in parts:
        train = part.replace(f"/windows/{split}/", "/windows/train/")
        rows.append({"part": part, "train": train if train in there else ""})
    arguments = (bundle_prefix, [ray.put(baselines)], resampler, text_prefix)
    if blocks == 0:
        found = _here(arguments, rows)
    else:
        dataset = ray.data.from_items(rows, override_num_blocks=max(1, len(parts))).map(
            _Actor,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(min_size=blocks or 1, max_size=blocks or _room(len(parts))),
        )
        found = runtime.collect(dataset, f"evaluate: {split}, parts", len(parts))
    broken = sorted({str(r["error"]) for r in found if r["error"]})
    if broken:
        raise EvaluationError("; ".join(broken))
    return merge_reduced([pickle.loads(r["found"]) for r in sorted(found, key=lambda r: str(r["part"]))])


def _here(arguments: tuple[Any, ...], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What an actor does, in this process and with as many threads, so that it changes no digit."""
    threads = torch.get_num_threads()
    try:
        actor = _Actor(*arguments)
        return [actor(row) for row in rows]
    finally:
        torch.set_num_threads(threads)


def _event_texts(text_prefix: str | None) -> EventTexts | None:
    return None if text_prefix is None else EventTexts.open(text_prefix)


def _room(parts: int) -> int:
    """Actors that parts and cluster have room for."""
    return max(1, min(parts, int(ray.cluster_resources().get("CPU", 1)) - 1))


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    metrics: dict[str, Any]
    """The content of metrics.json."""
    slices: dict[str, Any]
    """System -> slice -> task -> metric -> value, of baselines too."""
    resamples: bytes
    """npz: `slice|task|metric` -> (R,) values of the model, for `jobs.compare`."""
    curves: bytes
    """npz: `system|task|confusion` and `system|task|calibration` of the data as they are."""


def evaluate(config: RunConfig, data: storage.Directory, bundle_prefix: str, text_prefix: str | None = None) -> Evaluation:
    """Test metrics of model and baselines with intervals, slices and the paired comparison.

    text_prefix: of the encode stage, where the model reads texts of events.
    Raises EvaluationError when the split has no test targets, BrokenScoresError when the model's numbers are none.
    """
    predictor = bundle.load(bundle_prefix)
    tests = storage.list_uris(data.path("windows", "test"), ".parquet")
    if not any(len(storage.read_table(p, ["window"])) for p in tests):
        raise EvaluationError(f"protocol {config.data.protocol} leaves no test targets; nothing can be evaluated")
    baselines, skipped = _fit(config, data, predictor, _event_texts(text_prefix))
    resampler = Resampler(config.evaluation.bootstrap, config.evaluation.seed)
    found = {n: f.system for n, f in baselines.items()}
    blocks = 0 if data.manifest["rows"]["test_targets"] * max(1000, len(predictor.item_ids)) <= FEW else None
    reduced = measure_split(data, bundle_prefix, "test", found, resampler, blocks, text_prefix)
    systems = {MODEL: Model(predictor), **{n: f.system for n, f in baselines.items()}}
    reduced = merge_reduced([reduced, evaluate_items(systems, predictor, resampler, config.evaluation.profile_folds_test)])
    return report_numbers(config, data, predictor, reduced, baselines, skipped, resampler)


def _fit(
    config: RunConfig, data: storage.Directory, predictor: Predictor, texts: EventTexts | None = None
) -> tuple[dict[str, Fitted], dict[str, str]]:
    train, valid = (WindowCache.from_table(storage.read_table(data.path("windows", s)), texts) for s in ("train", "valid"))
    table = storage.read_table(data.path("catalogue.parquet"), ["count", "recent_count"])
    catalogue = {c: table[c].to_numpy().astype(np.float64) for c in table.column_names}

    def progress(text: str) -> None:
        log.info("evaluate: %s", text)

    rankers = tuple(n for n in config.evaluation.baselines if n in RANKERS)
    wanted = rankers if config.retrieval_task is not None else ()
    if not len(valid):
        raise EvaluationError(f"protocol {config.data.protocol} leaves no valid targets; baselines cannot be tuned")
    baselines, skipped = fit_rankers(wanted, predictor, catalogue, train, valid, progress)
    skipped |= {n: "there is no task of kind retrieval" for n in rankers if n not in wanted}
    if "tasks" in config.evaluation.baselines:
        baselines |= fit_task_baselines(predictor, train, valid, progress)
    for name, why in skipped.items():
        log.warning("evaluate: baseline %s skipped: %s", name, why)
    return baselines, skipped


def report_numbers(
    config: RunConfig,
    data: storage.Directory,
    predictor: Predictor,
    reduced: Reduced,
    baselines: dict[str, Fitted],
    skipped: dict[str, str],
    resampler: Resampler,
) -> Evaluation:
    """Merged statistics -> everything that is written down."""
    tasks = dict(config.tasks)
    if WHOLE not in reduced.get(MODEL, {}):
        raise EvaluationError(f"protocol {config.data.protocol} leaves no test targets; nothing can be evaluated")
    none = Resampler()
    slices: dict[str, dict[str, Summary]] = {
        name: {s: summarise(found, tasks, resampler if name == MODEL or s == WHOLE else none) for s, found in parts.items()}
        for name, parts in reduced.items()
    }
    overall = {name: parts[WHOLE] for name, parts in slices.items()}
    missing = unmeasured(overall[MODEL], tasks)
    for task, why in missing.items():
        log.warning("evaluate: task %s is not measured: %s", task, why)
    plain = {n: {s: {t: v for t, v in points_of(x).items() if v} for s, x in parts.items()} for n, parts in slices.items()}
    retrieval = config.retrieval_task
    empty: dict[str, Any] = {n: {} if retrieval is None else {"moments": 0} for n in ("cold_user", "cold_item")}
    metrics = {
        "protocol": config.data.protocol,
        "same_time": config.data.same_time,
        "exclude_seen": config.data.exclude_seen,
        "test_sha256": data.manifest["test_sha256"],
        "data": data.manifest["inputs"],
        "bundle": predictor.fingerprint,
        "model": points_of(overall[MODEL]),
        "intervals": intervals_of(overall[MODEL]),
        "unmeasured": missing,
        "baselines": {n: plain[n][WHOLE] for n in baselines},
        "baseline_intervals": {n: intervals_of(overall[n]) for n in baselines},
        "tuning": {n: {"chosen": f.chosen, "tries": f.tries} for n, f in baselines.items()},
        "skipped": skipped,
        "comparison": compare_with_baselines(overall, retrieval, config.evaluation.bootstrap),
        "slices": empty | {s: _moments(reduced[MODEL][s].sums, retrieval) | plain[MODEL][s] for s in slices[MODEL] if s != WHOLE},
    }
    resamples = {
        f"{s}|{t}|{n}": v.astype(np.float32) for s, x in slices[MODEL].items() for t, found in x.items() for n, v in found.items()
    }
    curves = {}
    for name, parts in reduced.items():
        for key, value in parts[WHOLE].sums.items():
            task, _, kind = key.partition("/")
            if kind == "calibration":
                curves[f"{name}|{task}|{kind}"] = value[0]
            elif kind in ("confusion", "exposure"):
                curves[f"{name}|{task}|{kind}"] = value
    log.info("evaluate: model %s", metrics["model"] if retrieval is None else metrics["model"][retrieval])
    return Evaluation(metrics, plain, _npz(resamples), _npz(curves))


def _moments(sums: dict[str, Any], retrieval: str | None) -> dict[str, Any]:
    """How many moments were ranked, where any are."""
    found = sums.get(f"{retrieval}/moments")
    return {} if retrieval is None else {"moments": 0 if found is None else int(found[0])}


def _npz(arrays: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
