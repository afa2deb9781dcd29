"""Columns of any type -> the few types that the preparation knows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.data.sources.base import Broken, SourceError

_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_VALUES = (
    *_TEXT,
    *_BYTES,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_boolean,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_null,
)


def _is(kind: pa.DataType, checks: tuple) -> bool:
    return any(check(kind) for check in checks)


def readable(kind: pa.DataType, lists: bool) -> bool:
    """Whether a column of this type holds one value per row, or a list of values where `lists` allows them."""
    if pa.types.is_dictionary(kind) or (lists and _is(kind, _LISTS)):
        return readable(kind.value_type, False)
    return _is(kind, _VALUES)


def settle(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Dictionaries as their values, dates as timestamps, every kind of text as bytes that `decode` checks."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return settle(column.cast(kind.value_type))
    if pa.types.is_date(kind):
        return column.cast(pa.timestamp("ms"))
    if _is(kind, _TEXT) or _is(kind, _BYTES):
        return column.cast(pa.binary())
    return column


def decode(block: pa.Table, rows: NDArray[np.int64], broken: Broken) -> tuple[pa.Table, NDArray[np.int64]]:
    """Columns of bytes as strings. A row with bytes that are no UTF-8 goes to `broken`."""
    names = [n for n in block.column_names if pa.types.is_binary(block[n].type)]
    try:
        return _with_strings(block, names), rows
    except pa.ArrowInvalid:
        pass
    bad = np.zeros(len(block), dtype=bool)
    for name in names:
        bad |= [not _is_utf8(v) for v in block[name].to_pylist()]
    for index in np.flatnonzero(bad):
        values = [block[n][int(index)].as_py() for n in block.column_names]
        broken.append((int(rows[index]), ",".join(v.decode(errors="replace") if isinstance(v, bytes) else str(v) for v in values)))
    good = pa.array(~bad)
    return _with_strings(block.filter(good), names), rows[~bad]


def _with_strings(block: pa.Table, names: list[str]) -> pa.Table:
    return pa.table({n: block[n].cast(pa.string()) if n in names else block[n] for n in block.column_names})


def _is_utf8(value: bytes | None) -> bool:
    try:
        return value is None or bool(value.decode()) or True
    except UnicodeDecodeError:
        return False


def id_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as UTF-8 strings; whole-numbered floats lose their '.0', empty strings become null,
    the values of a list are joined with ', '.

    Raises SourceError for a column of a type that has no text.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        return id_strings(column.cast(kind.value_type))
    if _is(kind, _LISTS):
        texts = [None if v is None else ", ".join(v) for v in _list_strings(column)]
        column = pa.chunked_array([pa.array(texts, pa.string())])
    elif pa.types.is_floating(kind):
        column = _float_strings(column)
    elif not pa.types.is_string(kind):
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SourceError(f"a column of type {kind} cannot be read as text: {error}") from None
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)


def list_strings(column: pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Any column as lists of strings -> (lists, rows that hold bytes which are no UTF-8). One value is a list of one; missing
    values are not in lists."""
    if not _is(column.type, _LISTS):
        texts = id_strings(column).combine_chunks()
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(texts) + 1, dtype=np.int32)), texts)
        return lists, np.zeros(len(lists), bool)
    found, bad = [], []
    for chunk in column.chunks:
        lengths = pc.list_value_length(chunk).fill_null(0).to_numpy(zero_copy_only=False)
        values = settle(pa.chunked_array([chunk.flatten()])).combine_chunks()
        broken = np.zeros(len(chunk), bool)
        if pa.types.is_binary(values.type):
            values, wrong = _utf8(values)
            broken[np.repeat(np.arange(len(chunk)), lengths)[wrong]] = True
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        found.append(pa.ListArray.from_arrays(offsets, id_strings(pa.chunked_array([values])).combine_chunks()))
        bad.append(broken)
    if not found:
        return pa.array([], pa.list_(pa.string())), np.zeros(0, bool)
    return pa.concat_arrays(found), np.concatenate(bad)


def _utf8(values: pa.Array) -> tuple[pa.Array, NDArray[np.bool_]]:
    """Bytes as strings -> (strings, null where there is none; which ones are no UTF-8)."""
    try:
        return values.cast(pa.string()), np.zeros(len(values), bool)
    except pa.ArrowInvalid:
        wrong = np.array([not _is_utf8(v) for v in values.to_pylist()], bool)
        return pc.if_else(pa.array(wrong), pa.scalar(None, pa.binary()), values).cast(pa.string()), wrong


def _list_strings(column: pa.ChunkedArray) -> list[list[str] | None]:
    """Lists as lists of their values' strings, without the missing ones."""
    out: list[list[str] | None] = []
    for chunk in column.chunks:
        values = id_strings(pa.chunked_array([chunk.flatten()])).to_pylist()
        ends = np.cumsum(pc.list_value_length(chunk).fill_null(0).to_numpy(zero_copy_only=False))
        starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
        missing = chunk.is_null().to_numpy(zero_copy_only=False)
        for start, end, none in zip(starts, ends, missing, strict=True):
            out.append(None if none else [v for v in values[int(start) : int(end)] if v is not None])
    return out


def _float_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    values = column.cast(pa.float64()).combine_chunks().to_numpy(zero_copy_only=False)
    with np.errstate(invalid="ignore"):
        whole = (np.abs(values) < 2**53) & (values == np.floor(values))
    texts = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.string())
    if not whole.all():
        others = np.flatnonzero(~whole)
        odd = pa.array([None if np.isnan(v) else repr(float(v)) for v in values[others]], pa.string())
        texts = pc.replace_with_mask(texts, pa.array(~whole), odd)
    return pa.chunked_array([texts])
