"""Rows of a log -> typed events, and a reason for every row that is none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.data.sources import ROW, id_strings
from mtrec_ray.expressions import Expression

USER, ITEM, TIME = "user_id", "item_id", "timestamp"
_TO_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
_LATEST_MS = 7_258_118_400_000  # the year 2200: a later time is a wrong unit

QUARANTINE = pa.schema([(ROW, pa.int64()), ("file", pa.string()), ("reason", pa.string()), ("raw", pa.string())])


def needed_columns(data: DataConfig) -> list[str]:
    """Columns of the log that the configuration reads."""
    plain = [n for n, label in data.labels.items() if label.expression is None]
    return [USER, ITEM, TIME, *plain, *data.context]


def event_schema(data: DataConfig) -> pa.Schema:
    """Arrow schema of validated events: ids, int64 milliseconds, row, float64 labels, context strings."""
    return pa.schema(
        [
            (USER, pa.string()),
            (ITEM, pa.string()),
            (TIME, pa.int64()),
            (ROW, pa.int64()),
            *[(n, pa.float64()) for n in data.labels],
            *[(n, pa.string()) for n in data.context],
        ]
    )


def validate(
    table: pa.Table, data: DataConfig, file: str, known_items: pa.Array | None, known_users: pa.Array | None
) -> tuple[pa.Table, pa.Table]:
    """Rows as read -> (events, quarantined rows). Every row is in exactly one of the two.

    The first reason that applies is kept. Missing labels are fine (they are masked later).
    """
    n = len(table)
    reason: NDArray[np.object_] = np.full(n, None, dtype=object)

    def mark(bad: NDArray[np.bool_], why: str) -> None:
        reason[bad & (reason == None)] = why  # noqa: E711

    users, items = id_strings(table[USER]), id_strings(table[ITEM])
    mark(users.is_null().to_numpy(), "user_id is missing")
    mark(items.is_null().to_numpy(), "item_id is missing")
    time = _milliseconds(table[TIME], data.time_unit)
    mark(_empty(table[TIME]), "timestamp is missing")
    mark(np.isnan(time), "timestamp is not a number")
    mark((time < 0) | (time > _LATEST_MS), f"timestamp is outside 1970 to 2200 (time_unit {data.time_unit})")
    labels: dict[str, NDArray[np.float64]] = {}
    for name, label in data.labels.items():
        if label.expression is not None:
            continue
        values = _numbers(table[name])
        present = ~_empty(table[name])
        if pa.types.is_floating(table[name].type):
            present &= ~np.isnan(table[name].to_numpy())
        mark(present & ~np.isfinite(values), f"{name} is not a number")
        if label.kind == "binary":
            mark(present & (values != 0) & (values != 1), f"{name} is not 0 or 1")
        if label.min is not None:
            mark(present & (values < label.min), f"{name} is below {label.min:g}")
        if label.max is not None:
            mark(present & (values > label.max), f"{name} is above {label.max:g}")
        if label.values is not None:
            mark(present & ~np.isin(values, label.values), f"{name} is not one of its values")
        labels[name] = values
    if known_items is not None and data.unknown_items == "quarantine":
        mark(~pc.is_in(items, value_set=known_items).to_numpy(), "item_id is not in the items table")
    if known_users is not None and data.unknown_users == "quarantine":
        mark(~pc.is_in(users, value_set=known_users).to_numpy(), "user_id is not in the users table")

    bad = np.array([r is not None for r in reason], dtype=bool)
    rejected = quarantine_rows(table, file, bad, reason)
    good = np.flatnonzero(~bad)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {
        USER: users.take(good),
        ITEM: items.take(good),
        TIME: pa.array(time[good].astype(np.int64)),
        ROW: table[ROW].take(good),
    }
    kept = {name: values[good] for name, values in labels.items()}
    columns |= {name: pa.array(values) for name, values in derive(kept, data, len(good)).items()}
    columns |= {name: id_strings(table[name]).take(good) for name in data.context}
    schema = event_schema(data)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema), rejected


def derive(plain: Mapping[str, NDArray[np.float64]], data: DataConfig, n: int) -> dict[str, NDArray[np.float64]]:
    """Add the labels that are expressions over others; n is the number of rows."""
    out: dict[str, NDArray[np.float64]] = {}
    for name, label in data.labels.items():
        if label.expression is None:
            out[name] = plain[name]
        else:
            out[name] = Expression(label.expression)(plain) if plain else np.full(n, np.nan)
    return out


def quarantine_rows(table: pa.Table, file: str, bad: NDArray[np.bool_], reason: NDArray[np.object_]) -> pa.Table:
    """The bad rows of a table in the quarantine's form."""
    where = np.flatnonzero(bad)
    raw_columns = [n for n in table.column_names if n != ROW]
    raw = table.select(raw_columns).take(where).to_pylist()
    return pa.table(
        {
            ROW: table[ROW].take(where).cast(pa.int64()),
            "file": pa.array([file] * len(where), pa.string()),
            "reason": pa.array([reason[i] for i in where], pa.string()),
            "raw": pa.array([repr(r) for r in raw], pa.string()),
        },
        schema=QUARANTINE,
    )


def _numbers(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64; NaN where missing or not a number."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return _numbers(column.cast(kind.value_type))
    if pa.types.is_boolean(kind):
        column = column.cast(pa.int8())
    if any(check(kind) for check in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.asarray(pd.to_numeric(column.to_pandas(), errors="coerce"), dtype=np.float64)
    return np.full(len(column), np.nan)


def _milliseconds(column: pa.ChunkedArray, unit: str) -> NDArray[np.float64]:
    if pa.types.is_timestamp(column.type):
        values = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()).cast(pa.float64())
        return np.asarray(values.to_numpy(), dtype=np.float64)
    if unit in ("us", "ns"):  # float64 cannot hold them: whole numbers are divided as such
        per_ms = 1_000 if unit == "us" else 1_000_000
        whole = column
        if pa.types.is_string(column.type):
            digits = pc.if_else(pc.match_substring_regex(column, "^-?[0-9]{1,18}$|^-?[0-8][0-9]{18}$"), column, None)
            whole = digits.cast(pa.int64())
        if pa.types.is_integer(whole.type):
            values = whole.combine_chunks()
            milliseconds = np.floor_divide(values.fill_null(0).to_numpy(), per_ms).astype(np.float64)
            return np.where(
                values.is_null().to_numpy(zero_copy_only=False), np.floor(_numbers(column) * _TO_MS[unit]), milliseconds
            )
    return np.floor(_numbers(column) * _TO_MS[unit])


def _empty(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where there is no value: null, or the empty string of a quoted CSV field."""
    empty = column.is_null().to_numpy()
    if pa.types.is_string(column.type):
        empty |= pc.equal(column, "").fill_null(False).to_numpy()
    return np.asarray(empty, dtype=bool)
