"""What a balancer costs: `python -m benchmarks.balancer_cost`.

The loop's own optimiser step with five tasks (retrieval, rating, two binary ones, a profile) on the same batches in memory,
one thread, width 64, two layers, windows of 100, 2,000 items; all balancers take turns in every round. Value: the worst
median ratio to the plain sum among the Gramian methods; the loss-based ones stand beside it.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.loop_overhead import ITEMS, WINDOW, make_schema, make_windows
from benchmarks.report import finish
from mtrec_ray.balancing.gramian import GRAMIAN_KINDS
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.schema import AttributeSpec, LabelStats, LogSchema
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.step import Losses, build_losses, build_optimizer, train_step
from mtrec_ray.training.worker import build_feed, build_model

TARGET, ROUNDS, STEPS = 2.0, 5, 6
KINDS = ("static", "uncertainty", "dwa", "famo", *GRAMIAN_KINDS)


def five_tasks(kind: str) -> RunConfig:
    return parse_config({
        "name": "cost",
        "data": {
            "interactions": {"path": "unused"}, "users": {"path": "unused"}, "window": WINDOW, "same_time": "order",
            "labels": {"rating": {}, "like": {"kind": "binary"}, "buy": {"kind": "binary"}},
            "actions": ["rating"], "attributes": {"group": {"column": "group"}},
        },
        "tasks": {
            "retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating", "weight": 0.3},
            "like": {"kind": "binary", "label": "like", "weight": 0.1}, "buy": {"kind": "binary", "label": "buy", "weight": 0.1},
            "group": {"kind": "profile", "attribute": "group", "weight": 0.01},
        },
        "balancing": {"kind": kind}, "train": {"workers": 0},
    })  # fmt: skip


def five_labels(events: int) -> tuple[LogSchema, pa.Table]:
    table = make_windows(events)
    rating = table["label_rating"].combine_chunks()
    rng = np.random.default_rng(1)

    def labels(share: float) -> pa.Array:
        return pa.ListArray.from_arrays(rating.offsets, pa.array((rng.random(len(rating.flatten())) < share).astype(np.float32)))

    columns = {"label_like": labels(0.5), "label_buy": labels(0.05), "profile_group": pa.array(rng.integers(0, 4, len(table)))}
    for name, values in columns.items():
        table = table.append_column(name, values)
    stats = LabelStats(count=1, mean=0.5, std=0.5)
    schema = make_schema()
    schema = schema.model_copy(update={
        "labels": schema.labels | {"like": stats, "buy": stats},
        "attributes": (AttributeSpec(name="group", classes=("a", "b", "c", "d")),),
    })  # fmt: skip
    return schema, table


def main() -> int:
    torch.set_num_threads(1)
    schema, table = five_labels(64 * 32 * (WINDOW - 1))
    with tempfile.TemporaryDirectory() as folder:
        from mtrec_ray import storage

        storage.write_table(Path(folder) / "windows" / "part-00000.parquet", table)
        cache = WindowCache.open(WindowCache.build(str(Path(folder) / "windows"), Path(folder) / "cache"))
        steps = build_feed(five_tasks("static"), schema, cache, 0, 1).epoch(0)
        batches = [next(steps) for _ in range(STEPS)]
    runs: dict[str, tuple[Losses, Any]] = {}
    for kind in KINDS:
        config = five_tasks(kind)
        losses = build_losses(config, build_model(config, schema, None).train())
        runs[kind] = losses, build_optimizer(losses, config.train)
        train_step(*runs[kind], batches[0])  # warm-up
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS):
        for kind, (losses, optimizer) in runs.items():
            started = time.perf_counter()
            for micro in batches:
                train_step(losses, optimizer, micro)
            seconds[kind].append((time.perf_counter() - started) / STEPS)
    ratio = {k: median(a / b for a, b in zip(v, seconds["static"], strict=True)) for k, v in seconds.items()}
    worst = max(ratio[k] for k in GRAMIAN_KINDS)
    unsolved = {k: int(losses.balancer.unsolved) for k, (losses, _) in runs.items() if k in GRAMIAN_KINDS}  # type: ignore[arg-type]
    detail = {"ratio": ratio, "seconds_per_step": {k: median(v) for k, v in seconds.items()}, "raw": seconds, "unsolved": unsolved,
              "items": ITEMS, "window": WINDOW, "batch_windows": 32, "steps": STEPS, "rounds": ROUNDS}  # fmt: skip
    return finish("balancer_cost", worst, "× the plain sum", f"<= {TARGET}", worst <= TARGET, detail)


if __name__ == "__main__":
    sys.exit(main())
