"""Accepted events as files of the log, which `prepare --append` reads: the loop closes. It knows no Ray."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.serving.store import HistoryStore, StoredEvent

CURSOR = "_live.json"
"""In the target, hidden from readers of the log: the number of the last event that was written."""
AT_ONCE = 100_000
"""Events of a file."""
_PER_MS = {"ms": 1.0, "s": 0.001, "us": 1000.0, "ns": 1_000_000.0}


class ExportError(ValueError):
    """Events that cannot become rows of this log."""


def check_log(config: RunConfig) -> None:
    """Raises ExportError for a log that live events are no rows of."""
    data = config.data
    if data.interactions.format != "parquet":
        raise ExportError(
            f"data.interactions.format is {data.interactions.format}: events are written as Parquet, and --append reads files of "
            "the log's own format; keep the log as Parquet"
        )
    if data.long is not None:
        raise ExportError("data.long: the log has a row per type of event, and live events are rows with a column per label")
    if data.pseudonyms is not None:
        raise ExportError("data.pseudonyms: the store holds pseudonyms, and preparation would hash them once more")


def export_events(store: HistoryStore, config: RunConfig, target: str) -> int:
    """Events that came since the last call, as TARGET/live-NUMBER.parquet with the log's own columns -> how many.

    A call that was killed writes the same file again. Raises ExportError, StoreError, StorageError.
    """
    check_log(config)
    cursor_uri = storage.join(target, CURSOR)
    cursor = int(storage.read_json(cursor_uri)["number"]) if storage.exists(cursor_uri) else 0
    written = 0
    while True:
        found = store.log(cursor, AT_ONCE)
        if not found:
            return written
        # whole numbers of one width, so that files are read in the order of acceptance
        storage.write_table(storage.join(target, f"live-{found[0][0]:020d}.parquet"), rows_of([e for _, e in found], config))
        cursor = found[-1][0]
        storage.write_json(cursor_uri, {"number": cursor})
        written += len(found)


def rows_of(events: list[StoredEvent], config: RunConfig) -> pa.Table:
    """Events -> rows as the log has them: its own names, times in its unit."""
    data, named = config.data, config.data.interactions.columns
    if data.time_unit == "iso":
        times: pa.Array = pa.array([e.timestamp for e in events], pa.timestamp("ms", tz="UTC"))
    else:
        scale = _PER_MS[data.time_unit]
        exact = [e.timestamp * scale for e in events]
        times = pa.array(exact, pa.float64()) if scale < 1 else pa.array([int(t) for t in exact], pa.int64())
    columns: dict[str, pa.Array] = {
        "user_id": pa.array([e.user_id for e in events], pa.string()),
        "item_id": pa.array([e.item_id for e in events], pa.string()),
        "timestamp": times,
    }
    for name, label in data.labels.items():
        if label.expression is None:
            columns[name] = pa.array([e.actions.get(name) for e in events], pa.float64())
    kinds: dict[str, Any] = {"multihot": pa.list_(pa.string()), "numerical": pa.float64(), "kept": pa.float64()}
    for name, feature in data.context.items():
        columns[name] = pa.array([e.context.get(name) for e in events], kinds.get(feature.kind, pa.string()))
    return pa.table({named.get(name, name): column for name, column in columns.items()})


def is_url(store: str) -> bool:
    """Whether a store is named by a server's URL."""
    return re.match(r"(rediss?|unix)://", store) is not None
