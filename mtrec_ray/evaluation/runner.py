"""evaluate: the distributed runner. Ray Data actors measure the test moments; the driver sums up and reports."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import numpy as np
import ray
import torch

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.evaluation import baselines as b
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.evaluate import Records, evaluate_windows, summarise
from mtrec_ray.training.feed import WindowCache

log = logging.getLogger(__name__)


class EvaluationError(ValueError):
    """An evaluation that would give no honest number."""


class _Actor:
    """One predictor per actor; a row is a part of the split's windows."""

    def __init__(self, bundle_prefix: str, batch_windows: int) -> None:
        torch.set_num_threads(1)
        self.predictor, self.batch_windows = bundle.load(bundle_prefix, verify=False), batch_windows

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        cache = WindowCache.from_table(storage.read_table(row["part"]))
        return {"records": pickle.dumps(evaluate_windows(self.predictor, cache, np.arange(len(cache)), self.batch_windows))}


def measure(config: RunConfig, data: storage.Directory, bundle_prefix: str, split: str) -> Records:
    """Records of a whole split, measured by Ray Data actors part by part."""
    parts = storage.list_files(data.path("windows", split), ".parquet")
    dataset = ray.data.from_items([{"part": p} for p in parts], override_num_blocks=len(parts)).map(
        _Actor,
        fn_constructor_args=(bundle_prefix, config.evaluation.batch_windows),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(len(parts), 2)),
    )
    return Records.merge([pickle.loads(r["records"]) for r in runtime.collect(dataset, f"evaluate: {split}, parts", len(parts))])


def evaluate(config: RunConfig, data: storage.Directory, bundle_prefix: str) -> dict[str, Any]:
    """Test metrics of model and baselines, slices and the paired comparison -> the content of metrics.json.

    Raises EvaluationError when the split has no test targets.
    """
    predictor = bundle.load(bundle_prefix)
    train, valid, test = (WindowCache.from_table(storage.read_table(data.path("windows", s))) for s in ("train", "valid", "test"))
    if not len(test):
        raise EvaluationError(f"protocol {config.data.protocol} leaves no test targets; nothing can be evaluated")
    records = measure(config, data, bundle_prefix, "test")
    folds = config.evaluation.profile_folds_test
    model = summarise(predictor, records, folds)
    log.info("evaluate: model %s", model[config.retrieval_task])

    catalogue = storage.read_table(data.path("catalogue.parquet"), ["count", "recent_count"])
    count, recent = (catalogue[c].to_numpy().astype(np.float64) for c in ("count", "recent_count"))
    rankers = b.fit_rankers(config.evaluation.baselines, predictor, count, recent, train, valid)
    retrieval = config.retrieval_task
    # baselines see the same moments in the cache's order; the model's records may come in another: compare by user
    _, order = np.unique(np.array(test.user_ids.to_pylist(), dtype=object), return_inverse=True)
    _, model_order = np.unique(records.user, return_inverse=True)
    results: dict[str, dict[str, dict[str, float]]] = {}
    per_user: dict[str, Any] = {}
    for name, (ranker, chosen) in rankers.items():
        per_moment = b.evaluate_ranker(ranker, predictor, test)
        results[name] = {retrieval: m.ranking_summary(order, per_moment) | chosen}
        per_user[name] = m.user_means(order, per_moment["ndcg@10"])
        similarity = next((n for n, t in config.tasks.items() if t.kind == "similarity"), None)
        if similarity is not None and isinstance(ranker, b.ItemKNN):
            results[name][similarity] = b.similar_items_hit(ranker.similarity, predictor, test)
    results |= {k: v for k, v in b.mean_baselines(predictor, train, test).items() if v}

    comparison: dict[str, Any] = {}
    if per_user and config.evaluation.bootstrap:
        best = max(per_user, key=lambda n: results[n][retrieval]["ndcg@10"])
        mine = m.user_means(model_order, records.retrieval["ndcg@10"])
        comparison = {"metric": "ndcg@10", "baseline": best, "level": 0.95, "resamples": config.evaluation.bootstrap}
        comparison |= m.paired_bootstrap(mine, per_user[best], config.evaluation.bootstrap, config.seed)

    known = set(train.user_ids.to_pylist())
    cold_user = np.array([u not in known for u in records.user], dtype=bool)
    masks = {"cold_user": cold_user, "warm_user": ~cold_user, "cold_item": records.slices["cold_item"]}
    slices = {
        name: {"moments": int(mask.sum()), **{t: s for t, s in summarise(predictor, records, folds, mask).items() if s}}
        for name, mask in masks.items()
    }
    return {
        "protocol": config.data.protocol,
        "same_time": config.data.same_time,
        "exclude_seen": config.data.exclude_seen,
        "test_sha256": data.manifest["test_sha256"],
        "bundle": predictor.fingerprint,
        "model": model,
        "baselines": results,
        "comparison": comparison,
        "slices": slices,
    }
