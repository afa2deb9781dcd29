"""Full-catalogue evaluation against the hardware: `python -m benchmarks.evaluate [--users N]`.

100,000 users × 100,000 items × 64 (synthetic vectors). Every core runs a process with one torch thread, for both sides:
(a) the bare matrix product and torch's `topk(100)` on batches of users, (b) what the evaluation does with the same vectors:
windows of the users, seen filter (50 items each), finite check, exact ranks of the targets, top lists, all ranking
metrics per user, slices, and 1,000 bootstrap resamples. Metrics at 100 need the exact ranks of the targets, not a list of
100; the lists are of ten. Both sides take turns, part by part of 4,096 users.
Value: users per second of (b) ÷ (a). ok needs the ratio and memory that does not grow with the users.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.report import finish
from mtrec_ray.config import parse_config
from mtrec_ray.evaluation.evaluate import MODEL, evaluate_part, merge_reduced
from mtrec_ray.evaluation.measure import Moments, System
from mtrec_ray.evaluation.reduce import WHOLE, points_of, summarise
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LogSchema
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.watch import Watch

ITEMS, WIDTH, SEEN, PART, BATCH, K = 100_000, 64, 50, 4096, 256, 100
TARGET = 0.7


class Vectors(System):
    """Scores of synthetic user vectors; no trunk, so that ranking alone is measured."""

    def __init__(self, user_UD: torch.Tensor, item_ND: torch.Tensor) -> None:
        self.user_UD, self.item_ND = user_UD, item_ND

    def scores(self, moments: Moments) -> torch.Tensor:
        return self.user_UD[torch.from_numpy(moments.index)] @ self.item_ND.T


def make_predictor(item_ND: torch.Tensor) -> Predictor:
    config = parse_config({
        "name": "evaluate",
        "data": {"interactions": {"path": "unused"}, "labels": {"click": {"kind": "binary"}}, "exclude_seen": True},
        "tasks": {"retrieval": {"kind": "retrieval"}}, "evaluation": {"batch_windows": BATCH},
        "model": {"width": WIDTH, "layers": 1},
    })  # fmt: skip
    schema = LogSchema(window=SEEN + 1, same_time="group", exclude_seen=True, protocol="time", labels={}, actions=(),
                       n_items=ITEMS, n_train_items=ITEMS)  # fmt: skip
    ids = [str(i) for i in range(ITEMS)]
    catalogue = pa.table({"item_id": ids, "title": ids, "count": np.arange(ITEMS, 0, -1)})
    return Predictor(config, schema, catalogue, Recommender(config, schema, None), item_ND, "synthetic")


def make_part(first: int, users: int) -> tuple[WindowCache, torch.Tensor]:
    """Windows of some users with SEEN history items and one target, and their vectors."""
    rng = np.random.default_rng(first)

    def ragged(values: Any, each: int) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(0, users * each + 1, max(each, 1), dtype=np.int32)), pa.array(values))

    n = users * SEEN
    table = pa.table({
        "user_id": [f"u{first + i}" for i in range(users)], "window": np.zeros(users, np.int32),
        "profile_weight": np.ones(users, np.float32), "fold": np.zeros(users, np.int8),
        "history_item": ragged(rng.integers(0, ITEMS, n).astype(np.int32), SEEN),
        "history_time": ragged(np.zeros(n, np.int64), SEEN),
        "target_item": ragged(rng.integers(0, ITEMS, users).astype(np.int32), 1),
        "target_pos": ragged(np.full(users, SEEN, np.int32), 1), "target_positive": ragged(np.ones(users, np.int8), 1),
        "seen_item": pa.ListArray.from_arrays(pa.array(np.zeros(users + 1, np.int32)), pa.array([], pa.int32())),
    })  # fmt: skip
    return WindowCache.from_table(table), torch.from_numpy(rng.standard_normal((users, WIDTH), dtype=np.float32))


def work(share: tuple[int, int]) -> dict[str, float]:
    """One process: its users, part by part, bare and evaluated in turns."""
    torch.set_num_threads(1)
    first, users = share
    item_ND = torch.from_numpy(np.random.default_rng(1).standard_normal((ITEMS, WIDTH), dtype=np.float32))
    predictor = make_predictor(item_ND)
    bare = evaluated = 0.0
    memory: list[float] = []
    merged: list[Any] = []
    for start in range(first, first + users, PART):
        cache, user_UD = make_part(start, min(PART, first + users - start))
        known = set(cache.user_ids.to_pylist())
        turns = (0, 1) if (start // PART) % 2 else (1, 0)
        for turn in turns:
            begun = time.perf_counter()
            if turn:
                for batch in torch.split(user_UD, BATCH):
                    torch.topk(batch @ item_ND.T, K, dim=1)
                bare += time.perf_counter() - begun
            else:
                with Watch(0.05) as watch:
                    merged.append(evaluate_part({MODEL: Vectors(user_UD, item_ND)}, predictor, cache, known, Resampler(1000), (0,)))
                    merged = [merge_reduced(merged)]
                evaluated += time.perf_counter() - begun
                memory.append(watch.peak_mib)
    found = points_of(summarise(merged[0][MODEL][WHOLE], dict(predictor.config.tasks), Resampler()))["retrieval"]
    half = len(memory) // 2
    return {"bare": bare, "evaluated": evaluated, "users": found["n"], "recall@100": found["recall@100"],
            "early_mib": max(memory[: max(1, half)]), "late_mib": max(memory[half:])}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Full-catalogue evaluation against the bare matrix product.")
    parser.add_argument("--users", type=int, default=100_000)
    args = parser.parse_args()
    processes = os.cpu_count() or 1
    each = -(-args.users // processes)
    shares = [(i * each, min(each, args.users - i * each)) for i in range(processes)]
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes to come, as Ray sets it for its actors
    with multiprocessing.get_context("spawn").Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        found = pool.map(work, shares)
    ratio = sum(f["bare"] for f in found) / sum(f["evaluated"] for f in found)
    grown = max(f["late_mib"] / f["early_mib"] for f in found)
    recall = sum(f["recall@100"] * f["users"] for f in found) / args.users
    detail = {
        "users": args.users, "items": ITEMS, "width": WIDTH, "seen": SEEN, "processes": processes, "per_process": found,
        "bare_users_per_second": args.users / max(f["bare"] for f in found),
        "evaluated_users_per_second": args.users / max(f["evaluated"] for f in found),
        "memory_late_over_early": grown, "recall@100": recall, "recall@100_of_chance": K / (ITEMS - SEEN),
    }  # fmt: skip
    ok = ratio >= TARGET and grown <= 1.1 and sum(f["users"] for f in found) == args.users
    return finish("evaluate", ratio, "ratio", f">= {TARGET} and memory flat in users (late ÷ early <= 1.1)", ok, detail)


if __name__ == "__main__":
    sys.exit(main())
