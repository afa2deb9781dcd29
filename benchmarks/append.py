"""A day appended against everything at once: `python -m benchmarks.append [--events N] [--work DIR]`.

A generated log of N events over 30 days, a file a day. Both are prepared by mtrec_ray on a local Ray: all 30 days at once, and
the last day into the other 29. Windows, cuts and counts must be the same. Value: seconds of the append ÷ seconds at once.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.generate import generate
from benchmarks.report import finish
from benchmarks.world import Parameters
from mtrec_ray.config import RunConfig, load_config

DAYS = 30


def timed(config: RunConfig, out: Path, append: bool = False) -> tuple[float, dict[str, object]]:
    from mtrec_ray.data.prepare import prepare

    started = time.perf_counter()
    manifest = prepare(config, str(out), append).manifest
    return time.perf_counter() - started, manifest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.append")
    parser.add_argument("--events", type=lambda v: int(float(v)), default=10_000_000)
    parser.add_argument("--work", help="folder that keeps the log for another run")
    args = parser.parse_args()
    from mtrec_ray import runtime

    with tempfile.TemporaryDirectory() as folder:
        work = Path(args.work or folder)
        log = work / f"days-{args.events}"
        generate(Parameters(args.events, days=DAYS), log, split_days=True)
        runtime.connect()
        config = load_config(log / "run.yaml")
        days = sorted(p for p in (log / "log").iterdir() if p.is_dir())
        last, away = days[-1], work / "away"
        out = [work / "once", work / "grown"]
        for old in (*out, away):
            shutil.rmtree(old, ignore_errors=True)
        timed(config, work / "warm")  # Ray's workers are up
        shutil.rmtree(work / "warm")
        at_once, whole = timed(config, out[0])
        shutil.move(last, away)
        before, _ = timed(config, out[1])
        shutil.move(away, last)
        appended, grown = timed(config, out[1], append=True)
        same = {key: whole[key] == grown[key] for key in ("rows", "cuts", "test_sha256", "covers")}
        for old in out:
            shutil.rmtree(old)
    return finish(
        "append", appended / at_once, "seconds ÷ all at once", "<= 1, same result", appended < at_once and all(same.values()),
        {"events": args.events, "days": len(days), "at_once": at_once, "without_last_day": before, "appended": appended,
         "same": same, "windows_made": grown["windows_made"], "partitions": grown["partitions"], "rows": grown["rows"]},
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
