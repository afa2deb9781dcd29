"""Accepted events as files of the log, which `prepare --append` reads: the loop closes. It knows no Ray."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.store import HistoryStore, StoredEvent

CURSOR, SHOWN_CURSOR = "_live.json", "_shown.json"
"""In the target, hidden from readers of the log: the number of the last event (list) that was written, and of which store."""
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
    """Events that came since the last call, as TARGET/live-NUMBER-STORE.parquet with the log's own columns -> how many.

    A call that was killed writes the same file again. Raises ExportError, StoreError, StorageError.
    """
    check_log(config)
    cursor_uri = storage.join(target, CURSOR)
    cursor = _number(store, cursor_uri)
    written = 0
    while True:
        found = store.log(cursor, AT_ONCE)
        if not found:
            return written
        storage.write_table(
            storage.join(target, f"live-{_name(found[0][0], store)}.parquet"), rows_of([e for _, e in found], config)
        )
        cursor = found[-1][0]
        storage.write_json(cursor_uri, {"number": cursor, "store": store.identity})
        written += len(found)


def export_lists(store: HistoryStore, target: str) -> int:
    """Lists that were shown since the last call, a row per place, as TARGET/shown-NUMBER-STORE.parquet -> how many lists.

    request_id, user_id, bundle, timestamp (ms UTC), position (from 1), item_id, score, propensity, tasks (a map).
    """
    written = 0
    for first, lists in _shown(store, target, None):
        storage.write_table(storage.join(target, f"shown-{_name(first, store)}.parquet"), list_rows(lists))
        written += len(lists)
    return written


def export_unanswered(store: HistoryStore, config: RunConfig, target: str, label: str, within_ms: int, now_ms: int) -> int:
    """Shown items on which no event of the user with LABEL followed in time, as rows of the log with LABEL = 0 -> how many.

    Features of the log that are called position and propensity get what the list says. A list is read when its time has passed.
    Raises ExportError, StoreError, StorageError.
    """
    check_log(config)
    if label not in config.data.labels or config.data.labels[label].kind != "binary":
        raise ExportError(
            f"{label!r} is no binary label of this log: {[n for n, v in config.data.labels.items() if v.kind == 'binary']}"
        )
    written = 0
    for first, lists in _shown(store, target, now_ms - within_ms):
        wanted = {(s.user_id, i) for s in lists for i in s.item_ids}
        answered: dict[tuple[str, str], list[int]] = {}
        number = 0
        while found := store.log(number, AT_ONCE):
            number = found[-1][0]
            for _, event in found:
                key = (event.user_id, event.item_id)
                if key in wanted and event.actions.get(label):
                    answered.setdefault(key, []).append(event.timestamp)
        rows = [
            StoredEvent(s.user_id, item, s.timestamp, None, {label: 0.0}, {"position": place, "propensity": chance})
            for s in lists
            for place, (item, chance) in enumerate(zip(s.item_ids, s.propensities, strict=True), 1)
            if not any(0 <= t - s.timestamp <= within_ms for t in answered.get((s.user_id, item), ()))
        ]
        storage.write_table(storage.join(target, f"unanswered-{_name(first, store)}.parquet"), rows_of(rows, config))
        written += len(rows)
    return written


def _shown(store: HistoryStore, target: str, before_ms: int | None) -> Iterator[tuple[int, list[ShownList]]]:
    """Lists behind the cursor of a directory, in pieces; the cursor moves when the next piece is asked for. before_ms: only those
    that were shown earlier."""
    cursor_uri = storage.join(target, SHOWN_CURSOR)
    cursor = _number(store, cursor_uri)
    while True:
        found = store.impressions(cursor, AT_ONCE // 10)
        if before_ms is not None:
            late = next((n for n, (_, s) in enumerate(found) if s.timestamp > before_ms), len(found))
            found = found[:late]
        if not found:
            return
        yield found[0][0], [s for _, s in found]
        cursor = found[-1][0]
        storage.write_json(cursor_uri, {"number": cursor, "store": store.identity})


def _number(store: HistoryStore, cursor_uri: str) -> int:
    """Of the last event (list) that was written; 0 at first. Raises ExportError where those were another store's."""
    if not storage.exists(cursor_uri):
        return 0
    found = storage.read_json(cursor_uri)
    if found.get("store", store.identity) != store.identity:
        raise ExportError(
            f"{storage.shown(cursor_uri)}: what was written here came from another store, whose numbers mean nothing in this one: "
            "events would be left out. Name that store (--store), or delete this file: then all that this store holds is written"
        )
    return int(found["number"])


def _name(number: int, store: HistoryStore) -> str:
    """Of a file: whole numbers of one width, so that files are read in the order of acceptance."""
    return f"{number:020d}-{store.identity[:8]}"


def list_rows(lists: list[ShownList]) -> pa.Table:
    places = [(s, n) for s in lists for n in range(len(s.item_ids))]
    return pa.table(
        {
            "request_id": pa.array([s.request_id for s, _ in places], pa.string()),
            "user_id": pa.array([s.user_id for s, _ in places], pa.string()),
            "bundle": pa.array([s.bundle for s, _ in places], pa.string()),
            "timestamp": pa.array([s.timestamp for s, _ in places], pa.int64()),
            "position": pa.array([n + 1 for _, n in places], pa.int32()),
            "item_id": pa.array([s.item_ids[n] for s, n in places], pa.string()),
            "score": pa.array([s.scores[n] for s, n in places], pa.float64()),
            "propensity": pa.array([s.propensities[n] for s, n in places], pa.float64()),
            "tasks": pa.array([list(s.tasks[n].items()) for s, n in places], pa.map_(pa.string(), pa.float64())),
        }
    )


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
        kind = kinds.get(feature.kind, pa.string())
        values = [e.context.get(name) for e in events]
        columns[name] = pa.array([str(v) if isinstance(v, int | float) and pa.types.is_string(kind) else v for v in values], kind)
    return pa.table({named.get(name, name): column for name, column in columns.items()})


def is_url(store: str) -> bool:
    """Whether a store is named by a server's URL."""
    return re.match(r"(rediss?|unix)://", store) is not None
