"""Preparation against a Polars program: `python -m benchmarks.prepare --events N [--rounds R]`, `--curve 1e6,1e7,1e8`.

A generated log with 0.1 % bad rows (benchmarks.generate) is prepared by mtrec_ray on a local Ray and by
benchmarks.polars_prepare, which does the same steps with the whole log in memory. Both take turns. Ray and its workers are up
before (a small log is prepared first, reported as warm_up_seconds) and idle while Polars works in a fresh process, whose clock
starts after its imports. The windows of sampled users and of the most active one must be those of
benchmarks.reference_windows, for both. Value: median seconds of mtrec_ray ÷ median seconds of Polars.

--curve prepares logs of several sizes with mtrec_ray alone. Value: the largest growth of time per decade of events.

Peak memory is of the largest single process, sampled: resident (counts shared pages of Ray's object store too) and private
(resident without shared pages). --work DIR keeps the logs for another run.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from benchmarks.generate import generate
from benchmarks.reference_windows import clean, difference, read_rows, read_windows, user_windows
from benchmarks.report import finish
from benchmarks.world import Parameters
from mtrec_ray import storage
from mtrec_ray.config import load_config
from mtrec_ray.watch import Watch

DIRTY, SAMPLED = 0.001, 200
MAX_RATIO, MIN_RATE, MAX_GROWTH, MAX_MIB = 5.0, 250_000, 11.0, 3072


class Memory(Watch):
    """Watch, and the peak of memory that one process has for itself."""

    private_mib = 0.0

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            for process in [me, *me.children(recursive=True)]:
                try:
                    info = process.memory_info()
                except psutil.Error:
                    continue
                self.peak_mib = max(self.peak_mib, info.rss / 2**20)
                self.private_mib = max(self.private_mib, (info.rss - getattr(info, "shared", 0)) / 2**20)
            if self._stop.wait(self.interval):
                return


def spilled_bytes() -> int:
    """Bytes that Ray has spilled so far, over all nodes."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    return int(get_memory_info_reply(get_state_from_address(None)).store_stats.spilled_bytes_total)


def run_ours(log: Path, out: Path) -> dict[str, Any]:
    """Prepare with mtrec_ray -> seconds, memory, spilled bytes, counts."""
    from mtrec_ray.data.prepare import prepare

    storage.delete(out)
    config, spilled = load_config(log / "run.yaml"), spilled_bytes()
    memory = Memory()
    with memory:
        directory = prepare(config, str(out))
    return {
        "seconds": memory.seconds, "peak_mib": memory.peak_mib, "private_mib": memory.private_mib,
        "spilled_bytes": spilled_bytes() - spilled, "rows": directory.manifest["rows"], "cuts": directory.manifest["cuts"],
    }  # fmt: skip


def run_polars(log: Path, out: Path) -> dict[str, Any]:
    """Prepare with Polars in a fresh process, on as many threads as there are cores."""
    storage.delete(out)
    command = [sys.executable, "-m", "benchmarks.polars_prepare", "--log", str(log), "--out", str(out)]
    environment = os.environ | {"POLARS_MAX_THREADS": str(os.cpu_count() or 1)}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def sample_users(log: Path) -> list[str]:
    """Users drawn at random, and the one with most rows."""
    ids = pq.read_table(log / "users.parquet", columns=["user_id"])["user_id"]
    drawn = np.random.default_rng(0).choice(len(ids), min(SAMPLED, len(ids)), replace=False)
    rows = np.zeros(len(ids), np.int64)
    for batch in ds.dataset(log / "log", format="parquet", partitioning=None).to_batches(columns=["user_id"]):
        known = pc.index_in(batch["user_id"], value_set=ids.combine_chunks()).drop_null()
        rows += np.bincount(known.to_numpy(), minlength=len(ids))
    return sorted({ids[int(i)].as_py() for i in [*drawn, rows.argmax()]})


def check_windows(log: Path, folders: dict[str, Path], cuts: tuple[int, int], window: int) -> dict[str, Any]:
    """Windows of sampled users against plain Python; what differs first, for each prepared folder, or null."""
    users = sample_users(log)
    known = set(pq.read_table(log / "items.parquet", columns=["item_id"])["item_id"].to_pylist())
    expected = {u: user_windows(clean(rows, known), cuts, window) for u, rows in read_rows(log / "log", users).items()}
    found: dict[str, Any] = {"users": len(users), "windows": sum(len(w) for parts in expected.values() for w in parts.values())}
    for name, folder in folders.items():
        items = pq.read_table(folder / "catalogue.parquet", columns=["item_id"])["item_id"].to_pylist()
        schema = json.loads((folder / "schema.json").read_text(encoding="utf-8"))
        devices = schema["device"] if "device" in schema else ["unknown", *schema["context"][0]["values"]]
        found[name] = difference(read_windows(folder / "windows", users, items, list(devices)), expected)
    return found


def warm_up(work: Path) -> float:
    """Seconds of a first small preparation, which starts Ray's workers; what is measured finds them started."""
    log = work / "log-warm-up"
    generate(Parameters(20_000), log)
    return float(run_ours(log, work / "ours")["seconds"])


def make_log(work: Path, events: int) -> Path:
    log = work / f"log-{events}"
    begun = time.perf_counter()
    generate(Parameters(events, dirty=DIRTY), log)
    print(f"log of {events} events: {time.perf_counter() - begun:.1f} s", file=sys.stderr)
    for path in sorted((log / "log").rglob("*.parquet")):  # both find the files in the page cache
        path.read_bytes()
    return log


def prefix_of(out: Path) -> Path:
    return Path(storage.Directory(str(out)).prefix)


def compare(work: Path, events: int, rounds: int) -> int:
    log, started = make_log(work, events), warm_up(work)
    ours: list[dict[str, Any]] = []
    polars: list[dict[str, Any]] = []
    for number in range(rounds):
        turns = [(ours, run_ours, work / "ours"), (polars, run_polars, work / "polars")]
        for results, run, out in turns if number % 2 == 0 else turns[::-1]:
            results.append(run(log, out))
    window = load_config(log / "run.yaml").data.window
    cuts = (ours[0]["cuts"][0], ours[0]["cuts"][1])
    checked = check_windows(log, {"ours": prefix_of(work / "ours"), "polars": work / "polars"}, cuts, window)
    rows, theirs = ours[0]["rows"], polars[0]
    same = {
        "cuts": theirs["cuts"] == ours[0]["cuts"], "events": rows["events"] == theirs["events"] == events,
        "reasons": rows["reasons"] == theirs["reasons"],
        "windows": all(rows[f"{n}_windows"] == theirs["windows"][n] for n in theirs["windows"]),
    }  # fmt: skip
    equal = checked["ours"] is None and checked["polars"] is None and all(same.values())
    seconds, others = [o["seconds"] for o in ours], [p["total_seconds"] for p in polars]
    ratio, rate = median(seconds) / median(others), events / median(seconds)
    detail = {
        "events": events, "seconds": seconds, "polars_seconds": others, "events_per_second": rate,
        "polars_events_per_second": events / median(others), "peak_mib": max(o["peak_mib"] for o in ours),
        "private_mib": max(o["private_mib"] for o in ours), "polars_peak_mib": max(p["peak_mib"] for p in polars),
        "spilled_bytes": max(o["spilled_bytes"] for o in ours), "polars_step_seconds": polars[-1]["seconds"],
        "polars_cpu_seconds": polars[-1]["cpu_seconds"], "rows": rows, "windows_of_sampled_users": checked, "same": same,
        "warm_up_seconds": started,
    }  # fmt: skip
    target = f"<= {MAX_RATIO:g} at 10 M events, >= {MIN_RATE} events/s, equal windows"
    return finish("prepare", ratio, "seconds ÷ Polars' seconds", target, ratio <= MAX_RATIO and rate >= MIN_RATE and equal, detail)


def curve(work: Path, sizes: list[int]) -> int:
    points: list[dict[str, Any]] = []
    started = warm_up(work)
    for events in sizes:
        log = make_log(work, events)
        point = {"events": events} | run_ours(log, work / "ours")
        cuts = (point["cuts"][0], point["cuts"][1])
        window = load_config(log / "run.yaml").data.window
        point["windows_of_sampled_users"] = check_windows(log, {"ours": prefix_of(work / "ours")}, cuts, window)
        point["events_per_second"] = events / point["seconds"]
        if points:
            before = points[-1]
            decades = math.log10(events / before["events"])
            point["growth_per_decade"] = (point["seconds"] / before["seconds"]) ** (1 / decades)
        points.append(point)
        print(json.dumps(point), file=sys.stderr)
    growth = max((p["growth_per_decade"] for p in points[1:]), default=math.nan)
    peak = max(p["peak_mib"] for p in points)
    equal = all(p["windows_of_sampled_users"]["ours"] is None for p in points)
    target = f"<= {MAX_GROWTH:g} per decade, no process above {MAX_MIB} MiB, windows of sampled users equal"
    ok = growth <= MAX_GROWTH and peak <= MAX_MIB and equal
    return finish(
        "prepare_curve",
        growth,
        "growth of time per decade",
        target,
        ok,
        {"points": points, "peak_mib": peak, "warm_up_seconds": started},
    )


def number(text: str) -> int:
    return int(float(text))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare")
    parser.add_argument("--events", type=number, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--curve", type=lambda text: [number(t) for t in text.split(",")], help="sizes, such as 1e6,1e7,1e8")
    parser.add_argument("--work", help="folder for logs and what is prepared; default a temporary one")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from mtrec_ray import runtime

    runtime.connect()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary).absolute()
        work.mkdir(parents=True, exist_ok=True)
        return curve(work, sorted(args.curve)) if args.curve else compare(work, args.events, args.rounds)


if __name__ == "__main__":
    sys.exit(main())
