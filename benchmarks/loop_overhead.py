"""What Ray Train and the cached feed cost: `python -m benchmarks.loop_overhead [--events N]`.

The same training step on the same synthetic windows (100 events each): (a) in plain Python over batches that were
collated into memory beforehand, (b) by one Ray Train worker from the memory-mapped cached feed. Both run alternately,
after 20 warm-up steps; start-up is reported apart. Value: events per second of (b) ÷ (a), medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.report import finish
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.schema import ActionSpec, LabelStats, LogSchema

WINDOW, ITEMS, WARM_UP, STEPS, ROUNDS = 100, 2000, 20, 40, 3


def make_config() -> RunConfig:
    return parse_config({
        "name": "overhead",
        "data": {"interactions": {"path": "unused"}, "labels": {"rating": {}}, "window": WINDOW, "same_time": "order"},
        "tasks": {"retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating", "weight": 0.3}},
        "train": {"workers": 1},
    })  # fmt: skip


def make_schema() -> LogSchema:
    stats = LabelStats(count=1, mean=3.0, std=1.4)
    return LogSchema(window=WINDOW, same_time="order", exclude_seen=False, protocol="time", labels={"rating": stats},
                     actions=(ActionSpec(name="rating", mean=3.0, std=1.4),), n_items=ITEMS, n_train_items=ITEMS)  # fmt: skip


def make_windows(events: int) -> pa.Table:
    """Synthetic windows of 99 events, each of them a target."""
    n, per = events // (WINDOW - 1), WINDOW - 1
    rng = np.random.default_rng(0)

    def ragged(values: Any) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, n * per + 1, per, dtype=np.int32)), pa.array(values))

    item = (ITEMS * rng.random(n * per) ** 3).astype(np.int32)
    clock = np.tile(np.arange(per) * 60_000, n).astype(np.int64)
    rating = rng.integers(1, 6, n * per).astype(np.float32)
    empty = pa.ListArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), pa.array([], pa.int32()))
    return pa.table({
        "user_id": pa.array([str(i) for i in range(n)]), "window": np.zeros(n, np.int32),
        "profile_weight": np.ones(n, np.float32), "fold": np.zeros(n, np.int8),
        "history_item": ragged(item), "history_time": ragged(clock), "history_row": ragged(np.arange(n * per)),
        "history_action_rating": ragged(rating), "target_item": ragged(item), "target_time": ragged(clock),
        "target_row": ragged(np.arange(n * per)), "target_pos": ragged(np.tile(np.arange(per, dtype=np.int32), n)),
        "target_split": ragged(np.zeros(n * per, np.int8)), "target_positive": ragged(np.ones(n * per, np.int8)),
        "label_rating": ragged(rating), "seen_item": empty,
    })  # fmt: skip


def measure(settings: dict[str, Any]) -> float:
    """Events per second of the loop's own step, from memory or from the cached feed, after the warm-up."""
    import torch

    from mtrec_ray.training.feed import WindowCache
    from mtrec_ray.training.step import build_losses, build_optimizer, distribute, train_step
    from mtrec_ray.training.worker import build_feed, build_model

    torch.set_num_threads(1)
    config, schema = make_config(), make_schema()
    model = build_model(config, schema, None).train()
    losses: Any = build_losses(config, model)
    optimizer = build_optimizer(losses, config.train)
    if settings["distributed"]:
        losses = distribute(losses)
    cache = WindowCache.open(WindowCache.build(settings["windows"], settings["cache"]))
    steps = build_feed(config, schema, cache, 0, 1).epoch(0)
    if settings["memory"]:
        batches = [next(steps) for _ in range(WARM_UP + STEPS)]
        steps = iter(batches)
    events, started = 0, 0.0
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            started = time.perf_counter()
        micro = next(steps)
        train_step(losses, optimizer, micro)
        if step >= WARM_UP:
            events += sum(len(b.targets) for b in micro)
    return events / (time.perf_counter() - started)


def _worker(settings: dict[str, Any]) -> None:
    rate = measure(settings)
    Path(settings["out"]).write_text(json.dumps(rate))


def through_ray_train(settings: dict[str, Any], folder: Path) -> tuple[float, float]:
    """-> (events per second, seconds of everything around the loop)."""
    from ray.train import RunConfig as RayRunConfig
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    started = time.perf_counter()
    TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RayRunConfig(storage_path=str(folder / "ray"), name=str(time.time_ns())),
    ).fit()
    rate = float(json.loads(Path(settings["out"]).read_text()))
    whole = time.perf_counter() - started
    return rate, whole - (WARM_UP + STEPS) * 32 * (WINDOW - 1) / rate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_overhead")
    parser.add_argument("--events", type=int, default=1_000_000)
    args = parser.parse_args()
    from mtrec_ray import runtime, storage

    runtime.connect()
    plain: list[float] = []
    ray_train: list[float] = []
    start_up: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage.write_table(folder / "windows" / "part-00000.parquet", make_windows(args.events))
        base = {"windows": str(folder / "windows"), "cache": str(folder / "cache"), "out": str(folder / "rate.json")}
        for _ in range(ROUNDS):
            plain.append(measure(base | {"memory": True, "distributed": False}))
            rate, around = through_ray_train(base | {"memory": False, "distributed": True}, folder)
            ray_train.append(rate)
            start_up.append(around)
    value = median(ray_train) / median(plain)
    detail = {"events": args.events, "steps": STEPS, "warm_up": WARM_UP, "plain_events_per_second": plain,
              "ray_train_events_per_second": ray_train, "start_up_seconds": start_up}  # fmt: skip
    return finish("loop_overhead", value, "ratio", ">= 0.85", value >= 0.85, detail)


if __name__ == "__main__":
    sys.exit(main())
