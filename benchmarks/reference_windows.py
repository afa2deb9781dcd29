"""What windows are, in plain Python: one user at a time, one event after the other, for a generated log.

The independent implementation that benchmarks.prepare and the tests hold mtrec_ray and the Polars program against. Protocol
`time`, `same_time: group`, history = clicks. Windows are dictionaries of the columns of Parquet windows, with item ids and
device names in place of integers, and None where a value is missing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

Row = dict[str, Any]
Windows = dict[str, list[Row]]
"""train, valid, test -> a user's windows in order."""

LABELS = ("click", "purchase", "rating")
PARTS = ("train", "valid", "test")


def read_rows(log: Path, users: Collection[str]) -> dict[str, list[Row]]:
    """All rows of some users in the log's order; `row` is file · 2^40 + position."""
    wanted = pa.array(sorted(users), pa.string())
    columns = ["user_id", "item_id", "timestamp", *LABELS, "device"]
    found: dict[str, list[Row]] = {u: [] for u in users}
    for number, path in enumerate(sorted(log.rglob("*.parquet"))):
        position = 0
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(columns=columns):
            mask = pc.is_in(batch["user_id"], value_set=wanted)
            places = pc.indices_nonzero(mask).to_pylist()
            for place, row in zip(places, batch.filter(mask).to_pylist(), strict=True):
                found[row["user_id"]].append(row | {"row": (number << 40) + position + place})
            position += len(batch)
    return found


def clean(rows: Iterable[Row], known_items: Collection[str]) -> list[Row]:
    """Valid rows, each event once, sorted by (time, row). The user is known and the same for all."""
    seen: set[tuple[Any, ...]] = set()
    out = []
    for row in rows:
        if row["timestamp"] is None or not 0 <= row["timestamp"] <= 7_258_118_400_000:
            continue
        if row["item_id"] not in known_items or row["click"] not in (0, 1) or row["purchase"] not in (0, 1):
            continue
        if row["rating"] is not None and not 1 <= row["rating"] <= 5:
            continue
        what = (row["item_id"], row["timestamp"], row["click"], row["purchase"], row["rating"], row["device"])
        if what not in seen:
            seen.add(what)
            out.append(row)
    return sorted(out, key=lambda r: (r["timestamp"], r["row"]))


def user_windows(rows: list[Row], cuts: tuple[int, int], length: int) -> Windows:
    """A user's clean rows -> windows. Cuts: the times at which valid and test begin."""
    splits = [(r["timestamp"] >= cuts[0]) + (r["timestamp"] >= cuts[1]) for r in rows]
    out: Windows = {name: [] for name in PARTS}

    trained = [r for r, s in zip(rows, splits, strict=True) if s == 0]
    if trained:
        clicks = [r for r in trained if r["click"]]
        ends = [len(clicks)]
        while ends[0] > length - 1:  # more than a window shows: another one that ends half a window earlier
            ends.insert(0, ends[0] - length // 2)
        starts = [max(0, end - (length - 1)) for end in ends]
        targets: list[list[tuple[Row, int]]] = [[] for _ in ends]
        for row in trained:
            visible = sum(c["timestamp"] < row["timestamp"] for c in clicks)
            able = [w for w in range(len(ends)) if starts[w] <= visible <= ends[w]]
            best = max(able, key=lambda w: visible - starts[w])  # shows most history
            targets[best].append((row, visible - starts[best]))
        for window, (start, end) in enumerate(zip(starts, ends, strict=True)):
            out["train"].append(_window(window, clicks[start:end], targets[window], 0, []))

    for split, name in ((1, "valid"), (2, "test")):
        moments: dict[int, list[Row]] = {}
        for row, s in zip(rows, splits, strict=True):
            if s == split:
                moments.setdefault(row["timestamp"], []).append(row)
        known = 0  # of the older clicks: a moment lists those that the moment before did not
        for when, together in moments.items():
            clicks = [r for r in rows if r["click"] and r["timestamp"] < when]
            shown, older = clicks[-(length - 1) :], clicks[: -(length - 1)]
            out[name].append(_window(0, shown, [(r, len(shown)) for r in together], split, older[known:]))
            known = len(older)
    return out


def _window(number: int, history: list[Row], targets: list[tuple[Row, int]], split: int, older: list[Row]) -> Row:
    rows = [r for r, _ in targets]
    window: Row = {
        "window": number,
        "history_item": [r["item_id"] for r in history],
        "history_time": [r["timestamp"] for r in history],
        "history_row": [r["row"] for r in history],
        "history_context_device": [r["device"] for r in history],
        "target_item": [r["item_id"] for r in rows],
        "target_time": [r["timestamp"] for r in rows],
        "target_row": [r["row"] for r in rows],
        "target_pos": [k for _, k in targets],
        "target_split": [split] * len(rows),
        "target_context_device": [r["device"] for r in rows],
        "seen_item": [r["item_id"] for r in older],
    }
    window |= {f"history_action_{n}": [r[n] for r in history] for n in LABELS}
    window |= {f"label_{n}": [r[n] for r in rows] for n in LABELS}
    return window


def read_windows(folder: Path, users: Collection[str], item_ids: list[str], devices: list[str]) -> dict[str, Windows]:
    """Windows of some users from FOLDER/train, valid and test (directories or .parquet files), in words instead of integers."""
    out: dict[str, Windows] = {u: {name: [] for name in PARTS} for u in users}
    items, names = dict(enumerate(item_ids)), dict(enumerate([None, *devices]))
    for name in PARTS:
        path = folder / name if (folder / name).exists() else folder / f"{name}.parquet"
        table = ds.dataset(path, format="parquet").to_table(filter=pc.field("user_id").isin(sorted(users)))
        for window in table.to_pylist():
            user = window.pop("user_id")
            window.pop("fold", None)  # by a hash of each program's own
            for column, values in window.items():
                if column.endswith("_item"):
                    window[column] = [items[v] for v in values]
                elif column.endswith("_context_device"):
                    window[column] = [names[v] for v in values]
                elif column.startswith(("history_action_", "label_")):
                    window[column] = [None if math.isnan(v) else v for v in values]
            out[user][name].append(window)
        for windows in out.values():
            windows[name].sort(key=lambda w: (w["window"], w["target_time"][:1]))
    return out


def difference(found: dict[str, Windows], expected: dict[str, Windows]) -> str | None:
    """The first difference in the columns that `expected` has, in words; None when there is none."""
    for user, parts in expected.items():
        for name, windows in parts.items():
            others = found[user][name]
            if len(others) != len(windows):
                return f"{user}: {len(others)} {name} windows, expected {len(windows)}"
            for number, (window, other) in enumerate(zip(windows, others, strict=True)):
                for column, values in window.items():
                    if other[column] != values:
                        return f"{user}, {name} window {number}, {column}: {other[column]}, expected {values}"
    return None
