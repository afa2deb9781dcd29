"""Batch scoring killed again and again: `python -m benchmarks.batch_kill`.

80,000 users in 800 shards (benchmarks/many_users.py, a catalogue of 2,000 items). First `score` runs undisturbed. Then the same
output is made by jobs that are killed (SIGKILL) at 20 random moments, each begun again with one to three actors, until it is
published: in turns the driver, an actor (the job goes on by itself), the raylet of its machine. What a killed job left running
is left alone while the next one begins.

Value: shards begun more often than once, over all shards. ok only if the published tables are equal, in order, and `verify` finds
nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from benchmarks.many_users import config_of, make_bundle, make_store
from benchmarks.report import finish
from mtrec_ray import storage
from mtrec_ray.scoring import batch
from mtrec_ray.scoring.shards import verify

ITEMS, LIMIT = 2000, 0.10
KINDS = ("driver", "actor", "raylet")
PATIENCE = 180.0
"""Seconds until a job that neither ends nor works on is said to hang."""


class Noting(batch._Actor):
    """Notes every shard that it begins."""

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        with open(os.environ["BEGUN"], "a", encoding="utf-8") as file:
            file.write(f"{item['row']['name']}\n")
        return super().__call__(item)


def job(folder: Path, users: int, workers: int, out: str) -> None:
    """One call of `score` in a Ray of its own."""
    import ray

    batch._Actor = Noting  # type: ignore[misc]
    ray.init(num_cpus=4, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
    data = storage.Directory(str(folder / f"data-{users}"))
    batch.score(config_of(ITEMS, workers), data, str(folder / "bundle"), str(folder / out))


class Job:
    """A job in a process of its own, and what runs below it."""

    def __init__(self, folder: Path, users: int, workers: int, out: str) -> None:
        command = [sys.executable, "-m", "benchmarks.batch_kill", "--job", out, "--folder", str(folder)]
        command += ["--users", str(users), "--workers", str(workers)]
        environment = os.environ | {"BEGUN": str(folder / f"begun-{out}"), "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
        self.log = open(folder / "log", "a", encoding="utf-8")
        self.process = subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)
        self.below: list[psutil.Process] = []

    def look(self) -> None:
        """Remember what runs below, to end it when its parent is gone."""
        with contextlib.suppress(psutil.Error):
            self.below = list({*self.below, *psutil.Process(self.process.pid).children(recursive=True)})

    def named(self, words: str) -> list[psutil.Process]:
        found = []
        for process in self.below:
            try:
                if words in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def wait(self, seconds: float) -> int | None:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def end(self) -> None:
        for process in self.below:
            try:
                process.kill()
            except psutil.Error:
                continue
        self.process.kill()
        self.process.wait()
        self.log.close()


def entries(folder: Path) -> int:
    return len(list((folder / "killed" / "_draft").rglob("_done/*.json")))


def kill(run: Job, kind: str) -> str:
    """-> what was killed."""
    run.look()
    found = run.named("MapWorker") if kind == "actor" else run.named("raylet/raylet") if kind == "raylet" else []
    if kind != "driver" and found:
        found[0].send_signal(signal.SIGKILL)
        return kind
    run.process.send_signal(signal.SIGKILL)
    return "driver"


def killed_output(folder: Path, users: int, kills: int) -> dict[str, Any]:
    """The output of jobs that are killed."""
    rng = random.Random(0)
    done: list[dict[str, Any]] = []
    hung, jobs, before = 0, 0, None
    started = time.perf_counter()
    while not (folder / "killed" / "_manifest.json").exists():
        run = Job(folder, users, rng.choice([1, 2, 3]), "killed")
        jobs += 1
        seen, moved = entries(folder), time.perf_counter()
        while run.wait(0.05) is None:
            run.look()
            now = entries(folder)
            if now != seen:
                seen, moved = now, time.perf_counter()
                if before is not None:  # what the job before left running has had its time beside this one
                    before.end()
                    before = None
                if len(done) < kills:
                    time.sleep(rng.uniform(0.0, 1.0))
                    kind = kill(run, KINDS[len(done) % len(KINDS)])
                    done.append({"killed": kind, "shards": entries(folder), "seconds": time.perf_counter() - started})
                    print(json.dumps(done[-1]), file=sys.stderr, flush=True)
                    if kind != "actor":
                        break
            if time.perf_counter() - moved > PATIENCE:
                hung += 1
                break
        if run.wait(60) is None:  # a driver that lost its raylet ends by itself
            hung += 1
        if before is not None:
            before.end()
        before = run
    if before is not None:
        before.end()
    return {"kills": done, "jobs": jobs, "hung": hung, "seconds": time.perf_counter() - started}


def measure(users: int, partitions: int, kills: int, folder: Path) -> dict[str, Any]:
    config = config_of(ITEMS, 2)
    root = make_bundle(config, ITEMS, folder)
    make_store(config, root, users, ITEMS, partitions, folder)
    plain = Job(folder, users, 2, "plain")
    started = time.perf_counter()
    while plain.wait(1.0) is None:
        plain.look()
    seconds = time.perf_counter() - started
    plain.end()
    if plain.process.returncode:
        raise RuntimeError((folder / "log").read_text()[-3000:])
    found = killed_output(folder, users, kills)
    begun = (folder / "begun-killed").read_text().split()
    equal = pq.read_table(folder / "killed").equals(pq.read_table(folder / "plain"))
    counts = verify(str(folder / "killed"))
    return {
        "users": counts["users"], "shards": partitions, "begun": len(begun), "equal": equal,
        "repeated": (len(begun) - len(set(begun))) / partitions,
        "undisturbed_seconds": seconds, **found,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Batch scoring killed at random moments.")
    parser.add_argument("--users", type=int, default=80_000)
    parser.add_argument("--partitions", type=int, default=800)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, default=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job(args.folder, args.users, args.workers, args.job)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.users, args.partitions, args.kills, Path(folder))
    ok = found["equal"] and len(found["kills"]) == args.kills and found["repeated"] < LIMIT and not found["hung"]
    return finish("batch_kill", found["repeated"], "share of shards begun again", f"< {LIMIT}, equal outputs", ok, found)


if __name__ == "__main__":
    sys.exit(main())
