"""Rows of a log -> typed events, and a reason for every row that is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig, LabelConfig
from mtrec_ray.config.features import FeatureConfig
from mtrec_ray.config.long import shown_column
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.data.sources import ROW, id_strings, list_strings
from mtrec_ray.expressions import Expression
from mtrec_ray.features import MAX_TEXT, MAX_VALUES, NUMBER, TEXT, TEXTS, clean_lists, clean_texts
from mtrec_ray.privacy import withhold

ROW_BITS = 40
"""A row's number is (index of its file) · 2^40 + (its place in the file)."""
USER, ITEM, TIME = "user_id", "item_id", "timestamp"
TYPE, VALUE, REQUEST = "long:type", "long:value", "long:request"
"""Columns of a long log's rows, under names that no label can have."""
_TO_MS = {"s": 1000.0, "ms": 1.0, "us": 1e-3, "ns": 1e-6}
_DAY_MS = 86_400_000
_LATEST_MS = 7_258_118_400_000  # the year 2200: a later time is a wrong unit

QUARANTINE = pa.schema(
    [(ROW, pa.int64()), ("file", pa.string()), ("reason", pa.string()), (USER, pa.string()), ("raw", pa.string())]
)

_FEATURE_TYPES = {"categorical": TEXT, "multihot": TEXTS, "text": TEXT}


def needed_columns(data: DataConfig) -> list[str]:
    """Columns of the log that the configuration reads."""
    plain = [n for n, label in data.labels.items() if label.expression is None]
    if data.long is not None:
        return list(dict.fromkeys([USER, ITEM, TIME, *data.long.columns, *data.context]))
    return [USER, ITEM, TIME, *plain, *data.context]


def row_schema(data: DataConfig) -> pa.Schema:
    """Arrow schema of validated rows: of a wide log, those of its events; of a long log, those that long.py joins."""
    if data.long is None:
        return event_schema(data)
    own = [(TYPE, pa.string()), (VALUE, pa.float64()), (REQUEST, pa.string())]
    ids = [(USER, pa.string()), (ITEM, pa.string()), (TIME, pa.int64()), (ROW, pa.int64())]
    features = [(n, _FEATURE_TYPES.get(feature.kind, NUMBER)) for n, feature in data.context.items()]
    return pa.schema([*ids, *own, *features])


def event_schema(data: DataConfig) -> pa.Schema:
    """Arrow schema of events: ids, int64 milliseconds, row, float64 labels, features (text, texts or
    numbers); of a long log, the labels as the history shows them too."""
    shown = [] if data.long is None else [(shown_column(n), pa.float64()) for n in data.labels]
    return pa.schema(
        [
            (USER, pa.string()),
            (ITEM, pa.string()),
            (TIME, pa.int64()),
            (ROW, pa.int64()),
            *[(n, pa.float64()) for n in data.labels],
            *shown,
            *[(n, _FEATURE_TYPES.get(feature.kind, NUMBER)) for n, feature in data.context.items()],
        ]
    )


_Mark = Callable[[NDArray[np.bool_], str], None]
"""Where rows are bad, and why."""


def list_columns(data: DataConfig) -> set[str]:
    """Columns of the log that may hold a list of values."""
    return {n for n, feature in data.context.items() if feature.kind == "multihot"}


class _Reasons:
    """The first reason why each row is bad; 0 is none."""

    def __init__(self, rows: int) -> None:
        self.code = np.zeros(rows, np.int16)
        self.texts: list[str | None] = [None]

    def mark(self, bad: NDArray[np.bool_], why: str) -> None:
        if bad.any():
            self.texts.append(why)
            self.code[bad & (self.code == 0)] = len(self.texts) - 1

    @property
    def bad(self) -> NDArray[np.bool_]:
        return self.code != 0

    def text(self) -> NDArray[np.object_]:
        return np.array(self.texts, dtype=object)[self.code]


def validate(
    table: pa.Table, data: DataConfig, file: str, known_items: NDArray[np.uint64] | None = None, now_ms: int | None = None
) -> tuple[pa.Table, pa.Table]:
    """Rows as read -> (events, quarantined rows). Every row is in exactly one of the two.

    known_items: sorted hashes of the items table's ids; two ids with one hash pass for each other (one in 10^13 with a
    million unknown ids beside a million known ones), which leaves an item without a text. now_ms: later events than
    this and a day are in the future. The first reason that applies is kept. Missing labels are fine (they are masked
    later).
    """
    reasons = _Reasons(len(table))
    mark = reasons.mark
    users, items = id_strings(table[USER]), id_strings(table[ITEM])
    mark(users.is_null().to_numpy(), "user_id is missing")
    mark(items.is_null().to_numpy(), "item_id is missing")
    time = _milliseconds(table[TIME], data.time_unit)
    mark(_empty(table[TIME]), "timestamp is missing")
    number = "an ISO 8601 time" if data.time_unit == "iso" else "a number"
    mark(np.isnan(time), f"timestamp is not {number}")
    mark((time < 0) | (time > _LATEST_MS), f"timestamp is outside 1970 to 2200 (time_unit {data.time_unit})")
    if now_ms is not None:
        mark(time > now_ms + _DAY_MS, "timestamp is in the future")
    labels: dict[str, NDArray[np.float64]] = {}
    long: dict[str, pa.Array | pa.ChunkedArray] = {}
    if data.long is not None:
        long = _long_columns(table, data, mark)
    else:
        for name, label in data.labels.items():
            if label.expression is None:
                values, present = _numbers(table[name]), _present(table[name])
                _check_label(name, label, values, present, mark)
                labels[name] = values
    features = {name: _feature(table, name, feature, mark) for name, feature in data.context.items()}
    if known_items is not None and data.unknown_items == "quarantine":
        hashed = hash_ids(items)
        place = np.minimum(np.searchsorted(known_items, hashed), max(len(known_items) - 1, 0))
        known = known_items[place] == hashed if len(known_items) else np.zeros(len(hashed), bool)
        mark(~known, "item_id is not in the items table")

    bad = reasons.bad
    columns: dict[str, pa.Array | pa.ChunkedArray] = {USER: users, ITEM: items, ROW: table[ROW], **long}
    columns |= features
    if not bad.any():
        rejected = QUARANTINE.empty_table()
    else:
        rejected = quarantine_rows(table, file, bad, reasons.text(), data.sensitive_names)
        good = np.flatnonzero(~bad)
        columns = {name: values.take(pa.array(good)) for name, values in columns.items()}
        time = time[good]
        labels = {name: values[good] for name, values in labels.items()}
    columns[TIME] = pa.array(time.astype(np.int64))
    if data.long is None:
        columns |= {name: pa.array(values) for name, values in derive(labels, data, len(time)).items()}
    schema = row_schema(data)
    return pa.table({name: columns[name] for name in schema.names}, schema=schema), rejected


def quarantine_broken(file: str, broken: list[tuple[int, str]], data: DataConfig, secret: bool) -> pa.Table:
    """Rows that are not even a row, in the quarantine's form. secret: their text may not be kept."""
    rows, texts = zip(*broken, strict=True)
    n, why = len(rows), "not a JSON object" if data.interactions.format == "jsonl" else "wrong number of columns"
    columns = [pa.array(rows, pa.int64()), [file] * n, [why] * n, [None] * n, ["(withheld)"] * n if secret else list(texts)]
    return pa.table(columns, schema=QUARANTINE)


def _check_label(name: str, label: LabelConfig, values: NDArray[np.float64], present: NDArray[np.bool_], mark: _Mark) -> None:
    """Mark the values of a label that cannot be, where it is present."""
    mark(present & ~np.isfinite(values), f"{name} is not a number")
    mark(present & (np.abs(values) > np.finfo(np.float32).max), f"{name} is too large for a 32-bit number")
    if label.kind == "binary":
        mark(present & (values != 0) & (values != 1), f"{name} is not 0 or 1")
    _check_limits(name, label.min, label.max, values, present, mark)
    if label.values is not None:
        mark(present & ~np.isin(values, label.values), f"{name} is not one of its values")


def _check_limits(
    name: str, low: float | None, high: float | None, values: NDArray[np.float64], present: NDArray[np.bool_], mark: _Mark
) -> None:
    if low is not None:
        mark(present & (values < low), f"{name} is below {low:g}")
    if high is not None:
        mark(present & (values > high), f"{name} is above {high:g}")


def _long_columns(table: pa.Table, data: DataConfig, mark: _Mark) -> dict[str, pa.Array | pa.ChunkedArray]:
    """Type, value and request of a long log's rows; a value counts only where the type gives a numeric label."""
    long = data.long
    assert long is not None
    kind = id_strings(table[long.type])
    mark(kind.is_null().to_numpy(), f"{long.type} is missing")
    mark(~pc.is_in(kind, value_set=pa.array(long.types, pa.string())).to_numpy(), f"{long.type} is not one of {list(long.types)}")
    nothing = pa.nulls(len(table), pa.string())
    values, present = np.full(len(table), np.nan), np.zeros(len(table), bool)
    if long.value is not None:
        values, present = _numbers(table[long.value]), _present(table[long.value])
    binary = {long.labels[n] for n, label in data.labels.items() if n in long.labels and label.kind == "binary"}
    reads = np.zeros(len(table), bool)
    for name, type_ in long.labels.items():
        label = data.labels[name]
        if label.kind == "numeric":
            given = pc.equal(kind, type_).fill_null(False).to_numpy()
            if type_ not in binary:  # such a row says nothing else
                mark(given & ~present, f"{name} is missing")
            _check_label(name, label, values, given & present, mark)
            reads |= given
    request = nothing if long.request is None else id_strings(table[long.request])
    return {TYPE: kind, VALUE: pa.array(np.where(reads & present, values, np.nan)), REQUEST: request}


def _feature(table: pa.Table, name: str, feature: FeatureConfig, mark: _Mark) -> pa.Array | pa.ChunkedArray:
    """A feature's column in the form of the clean log; a missing number is null."""
    if feature.kind == "categorical":
        return id_strings(table[name])
    if feature.kind == "text":
        texts = clean_texts(id_strings(table[name]))
        mark(pc.greater(pc.utf8_length(texts), MAX_TEXT).fill_null(False).to_numpy(), f"{name} has more than {MAX_TEXT} characters")
        return texts
    if feature.kind == "multihot":
        lists, broken = list_strings(table[name])
        mark(broken, f"{name} holds bytes that are not UTF-8")
        lists = clean_lists(lists, feature.separator)
        mark(np.diff(lists.offsets.to_numpy()) > MAX_VALUES, f"{name} has more than {MAX_VALUES} values")
        return lists
    values, present = _numbers(table[name]), _present(table[name])
    mark(present & ~np.isfinite(values), f"{name} is not a number")
    _check_limits(name, feature.min, feature.max, values, present, mark)
    return pa.array(values, mask=~present)


def derive(plain: Mapping[str, NDArray[np.float64]], data: DataConfig, n: int) -> dict[str, NDArray[np.float64]]:
    """Add the labels that are expressions over others; n is the number of rows."""
    out: dict[str, NDArray[np.float64]] = {}
    for name, label in data.labels.items():
        if label.expression is None:
            out[name] = plain[name]
        else:
            out[name] = Expression(label.expression)(plain) if plain else np.full(n, np.nan)
    return out


def quarantine_rows(
    table: pa.Table,
    file: str | Mapping[int, str],
    bad: NDArray[np.bool_],
    reason: NDArray[np.object_],
    sensitive: frozenset[str] = frozenset(),
) -> pa.Table:
    """The bad rows of a table in the quarantine's form. file: its name, or the name of each index that rows carry."""
    where = np.flatnonzero(bad)
    rows = table[ROW].take(where).cast(pa.int64())
    files = [file] * len(where) if isinstance(file, str) else [file[r >> ROW_BITS] for r in rows.to_pylist()]
    raw_columns = [n for n in table.column_names if n != ROW]
    raw = table.select(raw_columns).take(where).to_pylist()
    return pa.table(
        {
            ROW: rows,
            "file": pa.array(files, pa.string()),
            "reason": pa.array([reason[i] for i in where], pa.string()),
            USER: pa.nulls(len(where), pa.string()) if USER in sensitive else id_strings(table[USER].take(where)),
            "raw": pa.array([repr(withhold(r, sensitive)) for r in raw], pa.string()),
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
    if unit == "iso":
        text = column.cast(pa.string()).to_pandas()
        times = pd.to_datetime(text, format="ISO8601", utc=True, errors="coerce").astype("datetime64[ms, UTC]")
        return np.where(times.isna(), np.nan, times.astype("int64")).astype(np.float64)
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


def _present(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where there is a value, a number or not."""
    present = ~_empty(column)
    if pa.types.is_floating(column.type):
        present &= ~np.isnan(column.to_numpy())
    return present


def _empty(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where there is no value: null, or the empty string of a quoted CSV field."""
    empty = column.is_null().to_numpy()
    if pa.types.is_string(column.type):
        empty |= pc.equal(column, "").fill_null(False).to_numpy()
    return np.asarray(empty, dtype=bool)
