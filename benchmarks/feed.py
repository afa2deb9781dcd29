"""Whether the feeds keep up with training: `python -m benchmarks.feed [--events N]`.

Targets per second that each feed delivers as tensors, against what the training step consumes from memory at the default
width, on the same synthetic windows of 100 events, one thread each. `cached` reads its memory map, `stream` reads Parquet
through Ray Data (read tasks have a core of their own, as in training) by the adapter's own split. A round delivers whole
epochs, so the start of Ray Data's execution counts. Rounds alternate. Value: the smaller of the two ratios, of medians.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import torch

from benchmarks.loop_overhead import WINDOW, make_config, make_schema, make_windows
from benchmarks.report import finish
from mtrec_ray import runtime, storage
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.feed import CachedFeed, Feed, WindowCache
from mtrec_ray.training.loop import Training
from mtrec_ray.training.step import build_losses, build_optimizer, train_step
from mtrec_ray.training.worker import build_feed, build_model, build_stream

TARGET, ROUNDS, FILES, WARM_UP, STEPS = 3.0, 5, 8, 10, 40


def training_rate(feed: CachedFeed) -> float:
    """Targets per second of the loop's own step on batches in memory."""
    config, schema = make_config(), make_schema()
    model = build_model(config, schema, None).train()
    losses: Any = build_losses(config, model)
    optimizer = build_optimizer(losses, config.train)
    steps = feed.epoch(0)
    batches = [next(steps) for _ in range(WARM_UP + STEPS)]
    for micro in batches[:WARM_UP]:
        train_step(losses, optimizer, micro)
    started = time.perf_counter()
    for micro in batches[WARM_UP:]:
        train_step(losses, optimizer, micro)
    return sum(len(b.targets) for micro in batches[WARM_UP:] for b in micro) / (time.perf_counter() - started)


def feed_rate(feed: Feed, epoch: int) -> tuple[float, float]:
    """-> (targets per second over an epoch, seconds until the first batch)."""
    started, first, targets, windows = time.perf_counter(), 0.0, 0, 0
    for micro in feed.epoch(epoch, 0, 0):
        first = first or time.perf_counter() - started
        targets += sum(len(b.targets) for b in micro)
        windows += sum(len(b.history) for b in micro)
    assert windows == feed.windows, (windows, feed.windows)
    return targets / (time.perf_counter() - started), first


def checkpoint_cost(folder: Path, items: int) -> dict[str, float]:
    """Seconds (median) and MiB of a checkpoint in mid-epoch: weights, Adam's two moments, the best weights."""
    config, schema = make_config(), make_schema().model_copy(update={"n_items": items, "n_train_items": items})
    run = Training(config, build_model(config, schema, None), 1, torch.device("cpu"))
    for parameter in run.losses.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()
    run.best_state = {k: v.clone() for k, v in run.kept.state_dict().items()}
    checkpoints, seconds = Checkpoints(folder), []
    for step in range(3):
        run.progress.step = step
        begun = time.perf_counter()
        name = checkpoints.save(run.state())
        seconds.append(time.perf_counter() - begun)
    return {"items": items, "seconds": median(seconds), "mib": (folder / name).stat().st_size / 2**20}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.feed")
    parser.add_argument("--events", type=int, default=2_000_000)
    args = parser.parse_args()
    from mtrec_ray.training.trainer import _dataset, _WholeSplit

    torch.set_num_threads(1)
    runtime.connect()
    config, schema = make_config(), make_schema()
    training: list[float] = []
    cached: list[float] = []
    streamed: list[float] = []
    waits: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = make_windows(args.events)
        for number in range(FILES):
            start, stop = number * len(table) // FILES, (number + 1) * len(table) // FILES
            storage.write_table(folder / "windows" / f"part-{number:05d}.parquet", table.slice(start, stop - start))
        windows = str(folder / "windows")
        begun = time.perf_counter()
        cache = WindowCache.open(WindowCache.build(windows, folder / "cache"))
        building = time.perf_counter() - begun
        (shards,) = _WholeSplit().configure({"train": _dataset(windows, config.seed)}, 1, None, None)

        def tables(epoch: int) -> Iterator[pa.Table]:
            return iter(shards["train"].iter_batches(batch_size=None, batch_format="pyarrow"))

        feed, stream = build_feed(config, schema, cache, 0, 1), build_stream(config, schema, windows, tables, 0, 1)
        feed_rate(stream, 0)  # Ray Data starts its workers once
        for round_ in range(1, ROUNDS + 1):
            training.append(training_rate(feed))
            cached.append(feed_rate(feed, round_)[0])
            rate, wait = feed_rate(stream, round_)
            streamed.append(rate)
            waits.append(wait)
        costs = [checkpoint_cost(folder / f"checkpoints-{items}", items) for items in (2_000, 100_000, 1_000_000)]
    ratios = {"cached": median(cached) / median(training), "stream": median(streamed) / median(training)}
    detail = {"events": args.events, "window": WINDOW, "width": config.model.width, "batch_windows": config.train.batch_windows,
              "training_targets_per_second": training, "cached_targets_per_second": cached,
              "stream_targets_per_second": streamed, "stream_seconds_to_first_batch": waits,
              "cache_build_seconds": building, "checkpoints": costs, "ratios": ratios}  # fmt: skip
    value = min(ratios.values())
    return finish("feed", value, "feed ÷ training, the smaller of two", f">= {TARGET:g}", value >= TARGET, detail)


if __name__ == "__main__":
    sys.exit(main())
