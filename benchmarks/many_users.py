"""A history store of any number of users and a bundle for it, for the measurements of batch scoring. The model is not trained:
what it takes to score does not depend on what it learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.data.partition import user_partition
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.schema import ActionSpec, LabelStats, LogSchema

WINDOW, POOL = 50, 4096
"""Positions of a history; distinct histories that users are given."""
NOW = 1_700_000_000_000


def config_of(items: int, workers: int, k: int = 50) -> RunConfig:
    """Width 64, two layers, four pointwise tasks beside retrieval, 200 candidates."""
    log = {"format": "csv", "path": "none.csv"}
    return parse_config({
        "name": "many_users",
        "data": {
            "interactions": log, "window": WINDOW, "exclude_seen": True, "history": "click > 0", "actions": ["click", "rating"],
            "labels": {n: {"kind": "binary"} for n in ("click", "like", "buy")} | {"rating": {"min": 1, "max": 5}},
        },
        "model": {"width": 64, "layers": 2, "heads": 2, "feed_forward": 256, "sharing_width": 64},
        "tasks": {
            "retrieval": {"kind": "retrieval"}, "click": {"kind": "binary", "label": "click", "final_weight": 0.5},
            "like": {"kind": "binary", "label": "like"}, "buy": {"kind": "binary", "label": "buy", "final_weight": 1.0},
            "rating": {"kind": "regression", "label": "rating"},
        },
        "ranking": {"candidates": 200},
        "scoring": {"k": k, "workers": workers},
    })  # fmt: skip


def make_bundle(config: RunConfig, items: int, folder: Path) -> str:
    """-> root of a published bundle."""
    torch.manual_seed(0)
    stats = {n: LabelStats(count=1, mean=0.5, std=0.5) for n in ("click", "like", "buy")}
    schema = LogSchema(
        window=WINDOW, same_time="order", exclude_seen=True, protocol="time",
        actions=(ActionSpec(name="click", values=(0.0, 1.0)), ActionSpec(name="rating", mean=3.5, std=1.0)),
        labels=stats | {"rating": LabelStats(count=1, mean=3.5, std=1.0)}, n_items=items, n_train_items=items,
    )  # fmt: skip
    count = (1e6 / np.arange(1, items + 1)).astype(np.int64)
    ids = [f"item{i:07d}" for i in range(items)]
    catalogue = pa.table({
        "item_id": ids, "trained": [True] * items, "count": count, "recent_count": count, "title": ids,
        "text": pa.nulls(items, pa.string()),
    })  # fmt: skip
    directory = storage.Directory(str(folder / "bundle"))
    prefix = directory.begin("b" * 64)
    fingerprint = bundle.write(prefix, config, schema, catalogue, Recommender(config, schema, None), None)
    storage.write_json(storage.join(prefix, "metrics.json"), {})
    directory.publish("b" * 64, kind="bundle", fingerprint=fingerprint)
    return directory.root


def make_store(config: RunConfig, bundle_root: str, users: int, items: int, partitions: int, folder: Path) -> storage.Directory:
    """Users with 10 to 49 events and up to 30 before them, in the partitions that their ids belong to."""
    rng = np.random.default_rng(0)
    directory = storage.Directory(str(folder / f"data-{users}"))
    prefix = directory.begin("d" * 64)
    schema = storage.read_bytes(storage.join(storage.Directory(bundle_root).prefix, "schema.json"))
    storage.write_bytes(storage.join(prefix, "schema.json"), schema)
    pool = _histories(rng, items)
    ids = pa.array([f"user{i:08d}" for i in range(users)])
    owner = user_partition(ids, partitions)
    for number in range(partitions):
        mine = ids.take(pa.array(np.flatnonzero(owner == number)))
        rows = pool.take(pa.array(rng.integers(0, POOL, len(mine)))).add_column(0, "user_id", mine)
        storage.write_tables(
            storage.join(prefix, "store", f"part-{number:05d}.parquet"),
            [rows.slice(i, 8192) for i in range(0, max(len(rows), 1), 8192)],
        )
    directory.publish("d" * 64, kind="data", partitions=partitions, rows={"users": users})
    return directory


def _histories(rng: np.random.Generator, items: int) -> pa.Table:
    lengths, older = rng.integers(10, WINDOW, POOL), rng.integers(0, 31, POOL)

    def drawn(size: NDArray[np.int64]) -> pa.Array:
        share = rng.random(int(size.sum())) ** 3  # popular items more often
        return pa.array([f"item{i:07d}" for i in (share * items).astype(np.int64).tolist()])

    def lists(size: NDArray[np.int64], values: pa.Array) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(np.append(0, np.cumsum(size)).astype(np.int32)), values)

    events, before = int(lengths.sum()), int(older.sum())
    return pa.table({
        "history_item_id": lists(lengths, drawn(lengths)),
        "history_time": lists(lengths, pa.array(NOW + np.arange(events, dtype=np.int64) * 60_000)),
        "seen_item_id": lists(older, drawn(older)),
        "seen_time": lists(older, pa.array(NOW - np.arange(before, dtype=np.int64)[::-1] * 60_000)),
        "history_action_click": lists(lengths, pa.array(np.ones(events))),
        "history_action_rating": lists(lengths, pa.array(rng.integers(1, 6, events).astype(np.float64))),
    })  # fmt: skip
