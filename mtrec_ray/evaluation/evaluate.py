"""Evaluate systems on a part of a split, and put merged statistics into words and numbers."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from mtrec_ray.evaluation.measure import Model, System, measure
from mtrec_ray.evaluation.reduce import COUNTS, WHOLE, Reducer, Summary, points_of, slices_of, summarise, whole
from mtrec_ray.evaluation.statistics import FloatArray, Resampler, Statistics, interval
from mtrec_ray.predictor import Predictor
from mtrec_ray.tasks import judges_of
from mtrec_ray.training.feed import WindowCache

MODEL = "model"
"""Name of the predictor among the systems."""
USERS_AT_ONCE = 1024
"""Users whose answers are in memory together."""

Reduced = dict[str, dict[str, Statistics]]
"""System -> slice -> statistics."""


class EvaluationError(ValueError):
    """An evaluation that would give no honest number."""


def user_blocks(user_ids: pa.Array, at_once: int) -> list[np.ndarray]:
    """Windows of whole users, at most so many users a block, in the order of their first windows."""
    codes = user_ids.dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    users = int(codes.max(initial=-1)) + 1
    edges = np.searchsorted(codes[order], np.arange(0, users + at_once, at_once))
    return [order[a:b] for a, b in itertools.pairwise(edges) if b > a]


def evaluate_part(
    systems: dict[str, System],
    predictor: Predictor,
    cache: WindowCache,
    known_users: set[str],
    resampler: Resampler,
    folds: tuple[int, ...],
    at_once: int = USERS_AT_ONCE,
) -> Reduced:
    """Statistics of every system on one part of a split; the part holds whole users.

    The whole of every system and the slices of the model are resampled; slices of baselines are plain numbers.
    """
    reducers = {n: Reducer(predictor, resampler, folds) for n in systems}
    plain = Reducer(predictor, Resampler(), folds)
    found: dict[str, dict[str, list[Statistics]]] = {n: {} for n in systems}
    for block in user_blocks(cache.user_ids, at_once):
        facts, answers = measure(systems, predictor, cache, block, predictor.config.evaluation.batch_windows)
        slices = slices_of(predictor, facts, known_users)
        for name, answer in answers.items():
            reduced = {WHOLE: reducers[name](facts, answer, {WHOLE: slices[WHOLE]}).get(WHOLE, Statistics())}
            rest = {n: s for n, s in slices.items() if n != WHOLE}
            reduced |= (reducers[name] if name == MODEL else plain)(facts, answer, rest)
            for part, statistics in reduced.items():
                found[name].setdefault(part, []).append(statistics)
    return {n: {part: Statistics.merge(values) for part, values in parts.items()} for n, parts in found.items()}


def evaluate_items(systems: dict[str, System], predictor: Predictor, resampler: Resampler, folds: tuple[int, ...]) -> Reduced:
    """Statistics of what is told of items; it depends on no split."""
    judges = judges_of(predictor.config.tasks).values()
    out: Reduced = {}
    for name, system in systems.items():
        answers = system.items()
        if answers:
            out[name] = {WHOLE: Statistics.merge([j.reduce_items(predictor, answers, folds, resampler) for j in judges])}
    return out


def merge_reduced(parts: list[Reduced]) -> Reduced:
    """Join the statistics of several parts, in the order given."""
    out: Reduced = {}
    for name in dict.fromkeys(n for p in parts for n in p):
        slices = dict.fromkeys(s for p in parts for s in p.get(name, {}))
        out[name] = {s: Statistics.merge([p[name][s] for p in parts if s in p.get(name, {})]) for s in slices}
    return out


def quick_statistics(predictor: Predictor, cache: WindowCache, index: np.ndarray, folds: tuple[int, ...]) -> Statistics:
    """The model alone, without lists, slices and resamples: what early stopping needs."""
    facts, answers = measure({MODEL: Model(predictor)}, predictor, cache, index, predictor.config.evaluation.batch_windows, False)
    reduced = Reducer(predictor, Resampler(), folds)(facts, answers[MODEL], {WHOLE: whole(facts)})
    return reduced.get(WHOLE, Statistics())


def quick_metrics(predictor: Predictor, statistics: Statistics, folds: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Merged statistics, and those of items -> metrics."""
    items = evaluate_items({MODEL: Model(predictor)}, predictor, Resampler(), folds)
    statistics = Statistics.merge([statistics, *[parts[WHOLE] for parts in items.values()]])
    return points_of(summarise(statistics, dict(predictor.config.tasks), Resampler()))


def intervals_of(summary: Summary) -> dict[str, dict[str, list[float]]]:
    """95 % intervals of the metrics that are resampled."""
    out: dict[str, dict[str, list[float]]] = {}
    for task, found in summary.items():
        ranges = {name: interval(values) for name, values in found.items() if name not in COUNTS}
        out[task] = {name: list(r) for name, r in ranges.items() if r is not None}
    return out


def difference(a_R: FloatArray, b_R: FloatArray) -> dict[str, float | None]:
    """a - b with its paired interval; no interval where there are too few users or resamples to say."""
    d = a_R[: len(b_R)] - b_R[: len(a_R)]
    found = interval(d)
    return {"difference": float(d[0]), "low": found and found[0], "high": found and found[1]}


def compare_with_baselines(summaries: dict[str, Summary], retrieval: str | None, resamples: int) -> dict[str, Any]:
    """NDCG@10 of the model minus that of the best ranking baseline; nothing without a retrieval task."""
    if retrieval is None:
        return {}
    rankers = {n: s[retrieval]["ndcg@10"] for n, s in summaries.items() if n != MODEL and "ndcg@10" in s.get(retrieval, {})}
    mine = summaries[MODEL].get(retrieval, {})
    if not rankers or "ndcg@10" not in mine or not resamples:
        return {}
    best = max(rankers, key=lambda n: rankers[n][0])
    out: dict[str, Any] = {"metric": "ndcg@10", "baseline": best, "level": 0.95, "resamples": resamples}
    return out | difference(mine["ndcg@10"], rankers[best]) | {"users": float(mine["n"][0])}


def unmeasured(summary: Summary, tasks: dict[str, Any]) -> dict[str, str]:
    """Task -> why it has no metric: a task without labels in the split gets no number, and that is said."""
    return {name: f"{judge.nothing} in this split" for name, judge in judges_of(tasks).items() if not summary.get(name)}
