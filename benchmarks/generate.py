"""A synthetic log of any size with known truth: `python -m benchmarks.generate --events N --out DIR`.

    --seed S --users U --items I --days D   the world (defaults: 0, N ÷ 200, N ÷ 200, 30)
    --files F                               files of N ÷ F impressions; default about a million
    --split-days                            a directory per day: log/day=2024-01-01/part-00000.parquet
    --format long                           impressions, clicks, purchases and ratings as rows of their own
    --dirty SHARE                           bad rows of known kinds are added

It writes DIR/log/, items.parquet, users.parquet, run.yaml (mtrec_ray runs it), truth/ (vectors) and, last, truth.json
(parameters and exact counts). What is clicked and why: benchmarks/world.py; `click_probability` gives the true probability
of every row of a log, and so the best AUC that a model could have.

A log is a list of requests in the order of time. A request shows a slate of three to six items at one time, with positions
from 1; the last slate of a chunk of 131,072 impressions may be shorter. Columns: user_id, item_id, timestamp (int64 ms),
request_id, position, device (1 % missing), price, propensity, click, purchase (0 or 1), rating (1-5, often missing).
In the long format event_type and value take the labels' place; an impression's value is missing; clicks come seconds, purchases
minutes to hours, ratings hours to days after the impression, and carry its user_id, item_id and request_id.

Guaranteed: with the same version of numpy the same parameters give the same rows in the same order, however they are cut into
files and directories. --dirty adds rows to a log and leaves all others as they are. Another number of events is another log.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from benchmarks.impressions import LABELS, log_pieces
from benchmarks.world import DAY_MS, DEVICES, START_MS, Floats, Ints, Parameters, World, numbers

ROW_GROUP = 1 << 20


class _Files:
    """Writes rows into log/[day=.../]part-*.parquet, a new file whenever (day, part) changes."""

    def __init__(self, folder: Path, per_file: int, split_days: bool) -> None:
        self.folder, self.per_file, self.split_days = folder, per_file, split_days
        self._key: tuple[int, int] | None = None
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def add(self, table: pa.Table, number: Ints, day: Ints) -> None:
        part, day = number // self.per_file, day if self.split_days else np.zeros(len(day), np.int64)
        starts = np.flatnonzero(np.concatenate([[True], (np.diff(part) != 0) | (np.diff(day) != 0)]))
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True):
            key = (int(day[start]), int(part[start]))
            if key != self._key:
                self.close()
                self._key = key
            self._waiting.append(table.slice(start, end - start))
            if sum(map(len, self._waiting)) >= ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        assert self._key is not None
        table = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        if self._writer is None:
            date = np.datetime64(START_MS + self._key[0] * DAY_MS, "ms").astype("datetime64[D]")
            folder = self.folder / f"day={date}" if self.split_days else self.folder
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(folder / f"part-{self._key[1]:05d}.parquet", table.schema, compression="zstd")
        self._writer.write_table(table, row_group_size=ROW_GROUP)

    def close(self) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()
        self._writer = None


def run_config(folder: Path, window: int = 100) -> dict[str, Any]:
    """The configuration that mtrec_ray runs on the wide format."""
    return {
        "name": "generated",
        "data": {
            "interactions": {"format": "parquet", "path": str(folder / "log")},
            "items": {"format": "parquet", "path": str(folder / "items.parquet")},
            "users": {"format": "parquet", "path": str(folder / "users.parquet")},
            "time_unit": "ms",
            "labels": {"click": {"kind": "binary"}, "purchase": {"kind": "binary"}, "rating": {"min": 1, "max": 5}},
            "history": "click > 0",
            "context": ["device"],
            "attributes": {
                "gender": {"column": "gender"},
                "age_group": {"column": "age", "bins": [25, 35, 50]},
                "segment": {"column": "segment"},
            },
            "text": {"template": "{title}. {category}", "title": "title", "columns": ["category"]},
            "same_time": "group",
            "protocol": "time",
            "window": window,
        },
        "tasks": {
            "retrieval": {"kind": "retrieval"},
            "click": {"kind": "binary", "label": "click", "weight": 0.5},
            "purchase": {"kind": "binary", "label": "purchase", "weight": 0.5},
            "rating": {"kind": "regression", "label": "rating", "weight": 0.3},
        },
    }


def generate(parameters: Parameters, out: str | Path, files: int | None = None, split_days: bool = False) -> dict[str, Any]:
    """Write a log into `out` -> what truth.json says. A folder that holds the same log, complete, is kept as it is.

    Raises ValueError for a folder that holds something else.
    """
    folder = Path(out).absolute()
    cut = {"files": files or max(1, round(parameters.events / ROW_GROUP)), "split_days": split_days}
    asked = {"parameters": asdict(parameters), "numpy": np.__version__} | cut
    if (folder / "truth.json").exists():
        truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
        if {k: truth.get(k) for k in asked} == asked:
            return truth
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than this log, or a part of it; delete it or name another folder")
    world = World(parameters)
    counts: Counter[str] = Counter(dict.fromkeys(LABELS, 0))
    dirty: Counter[str] = Counter()
    (folder / "truth").mkdir(parents=True)
    pq.write_table(world.items_table(), folder / "items.parquet", compression="zstd")
    pq.write_table(world.users_table(), folder / "users.parquet", compression="zstd")
    for name, table in world.truth_tables().items():
        pq.write_table(table, folder / "truth" / f"{name}.parquet", compression="zstd")
    log = _Files(folder / "log", -(-parameters.events // cut["files"]), split_days)
    for piece in log_pieces(world, counts, dirty):
        log.add(*piece)
    log.close()
    if not parameters.long:
        (folder / "run.yaml").write_text(yaml.safe_dump(run_config(folder), sort_keys=False), encoding="utf-8")
    rows = counts["impression"] + (sum(counts[n] for n in LABELS) if parameters.long else 0)
    truth = asked | {
        "rows": int(rows) + sum(dirty.values()),
        "counts": {k: int(v) for k, v in counts.items()},
        "dirty": dict(dirty),
        "start_ms": START_MS,
        "click_probability": "benchmarks.generate.click_probability(folder, rows of the log)",
    }
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    return truth


def click_probability(folder: str | Path, table: pa.Table) -> Floats:
    """The true probability of a click for clean rows of the log in `folder` (any format's impressions)."""
    truth = json.loads((Path(folder) / "truth.json").read_text(encoding="utf-8"))
    world = World(Parameters(**truth["parameters"]))
    item, when = numbers(table["item_id"]), table["timestamp"].to_numpy()
    affinity = world.affinity(numbers(table["user_id"]), item, world.passed(when))
    device = pc.index_in(table["device"], value_set=pa.array(DEVICES)).fill_null(len(DEVICES)).to_numpy()
    return world.click_probability(affinity, item, table["position"].to_numpy(), device)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate", description="A synthetic log with known truth.")
    parser.add_argument("--events", type=lambda text: int(float(text)), required=True, help="impressions, such as 1000000 or 1e6")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=0)
    parser.add_argument("--items", type=int, default=0)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--files", type=int)
    parser.add_argument("--split-days", action="store_true")
    parser.add_argument("--format", choices=["wide", "long"], default="wide")
    parser.add_argument("--dirty", type=float, default=0.0)
    args = parser.parse_args()
    begun = time.perf_counter()
    try:
        parameters = Parameters(args.events, args.seed, args.users, args.items, args.days, args.dirty, args.format == "long")
        truth = generate(parameters, args.out, args.files, args.split_days)
    except ValueError as error:
        parser.error(str(error))
    seconds = time.perf_counter() - begun
    print(json.dumps({k: truth[k] for k in ("rows", "counts", "dirty")} | {"seconds": round(seconds, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
