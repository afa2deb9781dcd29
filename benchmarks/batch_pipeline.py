"""Batch scoring of a whole store against the sum of its stages: `python -m benchmarks.batch_pipeline`.

A store of 1,000,000 users (10 to 49 events shown, up to 30 before them) in 128 parts; catalogue of 10,000 items × 64; trunk of
two layers, width 64, window 50; the seen filter; 200 candidates; four pointwise tasks; the best 50 written
(benchmarks/many_users.py; the model is not trained). Every stage is run alone in one process on one thread, on the batches that
the stage before it left: read, histories (to integers), states (trunk), retrieve, heads, rows (tables), write. Their CPU seconds
per user add up to what a core could do if nothing stood between the stages.

Value: users per second of `score` with two actors (from the call to the published output, actors' start included) over 2 ÷ that
sum. Beside it: one actor on 100,000 users against two, and the peak memory (all processes' own and shared pages, PSS) at
100,000 and at all users.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch

from benchmarks.many_users import config_of, make_bundle, make_store
from benchmarks.report import finish
from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.scoring.batch import READ, score
from mtrec_ray.scoring.shards import verify
from mtrec_ray.scoring.tables import _TELLERS, Ask, Tally
from mtrec_ray.serving.history import histories_from_table

TARGET, SCALING, MEMORY = 0.8, 1.5, 1.1
STAGES = ("read", "histories", "states", "retrieve", "heads", "rows", "write")


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def stages_alone(config: RunConfig, root: str, part: str, folder: Path, rounds: int) -> dict[str, float]:
    """CPU seconds per user of every stage, the median of some rounds."""
    torch.set_num_threads(1)
    predictor, k, size = bundle.load(root), config.scoring.k, int(config.scoring.batch_users)

    def once() -> dict[str, float]:
        took: dict[str, float] = {}
        took["read"], pieces = cpu_seconds(lambda: list(storage.iter_tables(part, READ)))
        users = sum(map(len, pieces))
        blocks = [p.slice(b, size) for p in pieces for b in range(0, len(p), size)]
        took["histories"], encoded = cpu_seconds(lambda: [predictor.encode_histories(histories_from_table(b)) for b in blocks])
        took["states"], states = cpu_seconds(lambda: [predictor.encode_state(e.batch) for e in encoded])
        took["retrieve"], found = cpu_seconds(
            lambda: [predictor.retrieve(s, e.batch.length_B, e.seen, k) for s, e in zip(states, encoded, strict=True)]
        )

        def heads() -> list[Any]:
            out = []
            for state, candidates in zip(states, found, strict=True):
                predictions = predictor.score(state, candidates.item_BK, predictor.encode_context([{}] * len(state)))
                out.append(predictor.finalise(candidates, predictions, k))
            return out

        took["heads"], ranked = cpu_seconds(heads)
        # the teller retrieves and scores too: its own clock tells what its rows take
        tally, tell, tables = Tally(), _TELLERS["lists"](predictor, Ask("lists", k, size)), []
        for block, e, s in zip(blocks, encoded, states, strict=True):
            tables.append(tell(block["user_id"].combine_chunks(), e, s, tally))
        took["rows"] = tally.seconds["rows"]
        took["write"], _ = cpu_seconds(lambda: storage.write_tables(str(folder / "alone.parquet"), tables))
        assert len(ranked) == len(tables)
        return {stage: took[stage] / users for stage in STAGES}

    all_rounds = [once() for _ in range(rounds)]
    return {stage: float(np.median([r[stage] for r in all_rounds])) for stage in STAGES}


class Memory:
    """Peak of the proportional set sizes of this process and all below it, sampled every five seconds."""

    def __enter__(self) -> Memory:
        self.peak, self.at_peak, self._stop = 0, dict[str, int](), threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(5.0):
            sizes: dict[str, int] = {}
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    name = f"{process.name()} {process.pid}"
                    text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
                except (OSError, psutil.Error):  # it has ended
                    continue
                sizes[name] = sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
            if sum(sizes.values()) > self.peak:
                self.peak, self.at_peak = sum(sizes.values()), sizes


def timed_score(config: RunConfig, data: storage.Directory, root: str, out: Path) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    with Memory() as memory:
        started = time.perf_counter()
        counts = score(config, data, root, str(out))
        seconds = time.perf_counter() - started
    assert verify(str(out))["users"] == counts["users"]
    users = int(counts["users"])
    found: dict[str, Any] = {
        "users": users,
        "workers": config.scoring.workers,
        "seconds": seconds,
        "users_per_second": users / seconds,
    }
    found |= {"processes_mib": {n: round(v / 2**20) for n, v in memory.at_peak.items()}}
    found |= {"peak_pss_mib": memory.peak / 2**20, "stages": counts["seconds"], "bytes": counts["bytes"]}
    print(json.dumps(found), file=sys.stderr, flush=True)
    shutil.rmtree(out)
    return found


def measure(users: int, few: int, items: int, folder: Path) -> dict[str, Any]:
    one, two = (config_of(items, workers) for workers in (1, 2))
    root = make_bundle(two, items, folder)
    stores = {n: make_store(two, root, n, items, partitions, folder) for n, partitions in ((few, 32), (users, 128))}
    alone = stages_alone(two, root, storage.list_files(stores[few].path("store"))[0], folder, 3)
    per_user = sum(alone.values())
    ray.init(num_cpus=4, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    runs = {
        "warm": timed_score(two, stores[few], root, folder / "out"),  # Ray's first workers
        "one_actor": timed_score(one, stores[few], root, folder / "out"),
        "two_actors": timed_score(two, stores[few], root, folder / "out"),
        "all_users": timed_score(two, stores[users], root, folder / "out"),
    }
    ray.shutdown()
    possible = 2 / per_user
    return {
        "items": items, "stages_alone_us": {n: v * 1e6 for n, v in alone.items()}, "possible_per_second": possible, "runs": runs,
        "ratio": runs["all_users"]["users_per_second"] / possible,
        "two_over_one": runs["two_actors"]["users_per_second"] / runs["one_actor"]["users_per_second"],
        "memory": runs["all_users"]["peak_pss_mib"] / runs["two_actors"]["peak_pss_mib"],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Batch scoring of a whole store against the sum of its stages.")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100_000, help="users of the runs with one actor and with two")
    parser.add_argument("--items", type=int, default=10_000)
    args = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.users, args.few, args.items, Path(folder))
    ok = found["ratio"] >= TARGET and found["two_over_one"] >= SCALING and found["memory"] <= MEMORY
    target = f">= {TARGET}, two actors >= {SCALING} x one, memory <= {MEMORY} x"
    return finish("batch_pipeline", found["ratio"], "users per second over 2 / (CPU seconds per user)", target, ok, found)


if __name__ == "__main__":
    sys.exit(main())
