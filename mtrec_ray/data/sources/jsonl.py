"""JSON Lines: one object per line. Dots in a column's name address nested objects; a missing key is null.

A block of lines goes through Arrow's parser with the types that the block's first lines show. Arrow refuses whatever
does not fit them exactly, and then the block is read line by line: mixed types, numbers beyond 64 bits,
lines that are no JSON. So the fast way never changes a value.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson
from numpy.typing import NDArray

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources.base import COMPRESSED, Block, Broken, Description, File, SourceError, Unit

_BLOCK = 8 << 20
_LONGEST_LINE = 64 << 20
_HEAD = 1 << 16
_STRINGS = pa.list_(pa.string())
_KINDS = ((bool, pa.bool_()), (int, pa.int64()), (float, pa.float64()), (str, pa.string()))
_SHOWN = 100  # lines whose types stand for the block


def suffixes() -> tuple[str, ...]:
    return tuple(ending + c for ending in (".jsonl", ".ndjson", ".json") for c in COMPRESSED)


def describe(table: TableConfig, file: File) -> Description:
    """Columns of the first lines; since keys may be missing there, a column that they lack may still come."""
    with file.stream() as stream:
        head = b""
        while len(head) < _HEAD and (piece := stream.read(_HEAD)):
            head += piece
    lines = _without_mark(head).split(b"\n")
    whole = lines if len(head) < _HEAD else lines[:-1]
    columns: dict[str, pa.DataType | None] = {}
    for line in whole:
        for name, value in _flat(_object(line) or {}):
            known = columns.setdefault(name, None)
            if value is not None and (known is None or pa.types.is_nested(known)):  # one plain value makes a plain column
                columns[name] = _kind(value)
    return Description(columns, [(None, None)], complete=False)


def read(table: TableConfig, file: File, unit: Unit, columns: list[str], lists: Set[str]) -> Iterator[Block]:
    with file.stream() as stream:
        first = unit.base
        for text in _blocks(stream, file.path):
            starts = _line_starts(text)
            numbers = first + np.arange(len(starts), dtype=np.int64)
            first += len(starts)
            filled = _filled(text, starts)
            block = _fast(text, columns, int(filled.sum()), lists)
            if block is not None:
                yield block, numbers[filled], []
            else:
                yield _slow(text, columns, first - len(starts), lists)


def _blocks(stream: pa.NativeFile, path: str) -> Iterator[bytes]:
    """Blocks of whole lines."""
    kept, at_start = b"", True
    while piece := stream.read(_BLOCK):
        text = kept + piece
        if at_start:
            text, at_start = _without_mark(text), False
        end = text.rfind(b"\n") + 1
        kept = text[end:]
        if len(kept) > _LONGEST_LINE:
            raise SourceError(f"{path}: a line is longer than {_LONGEST_LINE >> 20} MiB; JSON Lines hold one object per line")
        if end:
            yield text[:end]
    if kept:
        yield kept


def _without_mark(text: bytes) -> bytes:
    return text.removeprefix(b"\xef\xbb\xbf")


def _line_starts(text: bytes) -> NDArray[np.int64]:
    ends = np.flatnonzero(np.frombuffer(text, np.uint8) == 10)
    starts = np.concatenate([[0], ends + 1])
    return starts[:-1] if text.endswith(b"\n") else starts


def _filled(text: bytes, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which lines hold more than white space."""
    lengths = np.diff(np.append(starts, len(text)))
    filled = lengths > 8
    for index in np.flatnonzero(~filled):
        filled[index] = bool(text[starts[index] : starts[index] + lengths[index]].strip())
    return filled


# --------------------------------------------------------------------------- Arrow's parser


def _fast(text: bytes, columns: list[str], rows: int, lists: Set[str]) -> pa.Table | None:
    """The block by Arrow's parser; None where it is not as its first lines are."""
    shown = [_object(line) for line in text[: 1 << 20].split(b"\n", _SHOWN)[:_SHOWN]]
    kinds: dict[str, pa.DataType] = {}
    for name in columns:
        values = [v for row in shown if (v := _value(row, name)) is not None] or _sought(text, name)
        found = {_kind(v) for v in values}
        if found <= {pa.int64(), pa.float64()} and len(found) == 2:
            found = {pa.float64()}
        if len(found) > 1 or (any(pa.types.is_nested(k) for k in found) and not (name in lists and found == {_STRINGS})):
            return None
        kinds[name] = found.pop() if found else pa.null()
    schema = _schema(kinds)
    if schema is None:
        return None
    try:
        parsed = pajson.read_json(
            io.BytesIO(text),
            read_options=pajson.ReadOptions(use_threads=False, block_size=len(text) + 1),
            parse_options=pajson.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        if len(parsed) != rows:
            return None
        parsed.validate(full=True)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, UnicodeDecodeError):
        return None
    block = pa.table({name: _pick(parsed, name) for name in columns}) if columns else parsed
    for column in block.columns:
        if pa.types.is_floating(column.type) and pc.any(pc.greater_equal(pc.abs(column), 2.0**53)).as_py():
            return None  # a whole number among fractions may have lost digits
    return block


def _sought(text: bytes, name: str) -> list[Any]:
    """A value of a column that the first lines lack, from the first lines that have its key."""
    place, key = -1, json.dumps(name.rsplit(".", 1)[-1], ensure_ascii=False).encode()
    for _ in range(_SHOWN):
        place = text.find(key, place + 1)
        if place < 0:
            break
        end = text.find(b"\n", place)
        value = _value(_object(text[text.rfind(b"\n", 0, place) + 1 : end if end >= 0 else len(text)]), name)
        if value is not None:
            return [value]
    return []


def _schema(kinds: dict[str, pa.DataType]) -> pa.Schema | None:
    """`a.b` as a struct; None where a name is both an object and a value."""
    tree: dict[str, Any] = {}
    for name, kind in kinds.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return None
        if leaf in node:
            return None
        node[leaf] = kind

    def build(node: Any) -> pa.DataType:
        return pa.struct([(n, build(v)) for n, v in node.items()]) if isinstance(node, dict) else node

    return pa.schema([(n, build(v)) for n, v in tree.items()])


def _pick(table: pa.Table, name: str) -> pa.ChunkedArray:
    top, *rest = name.split(".")
    return pc.struct_field(table[top], rest) if rest else table[top]


# --------------------------------------------------------------------------- line by line


def _slow(text: bytes, columns: list[str], first: int, lists: Set[str]) -> Block:
    numbers: list[int] = []
    broken: Broken = []
    values: dict[str, list[Any]] = {n: [] for n in columns}
    lines = text.split(b"\n")
    for number, line in enumerate(lines[:-1] if text.endswith(b"\n") else lines, start=first):
        if not line.strip():
            continue
        row = _object(line)
        picked = None if row is None else [_value(row, n) for n in columns]
        if picked is None or not all(_usable(v, n in lists) for v, n in zip(picked, columns, strict=True)):
            broken.append((number, line.decode(errors="replace").rstrip("\r")))
            continue
        numbers.append(number)
        for name, value in zip(columns, picked, strict=True):
            values[name].append(value)
    block = pa.table({n: _array(v) for n, v in values.items()})
    return block, np.array(numbers, np.int64), broken


def _object(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None where there is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _value(row: dict[str, Any] | None, name: str) -> Any:
    node: Any = row
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _flat(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        yield prefix + name, value
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")


def _kind(value: Any) -> pa.DataType:
    """Arrow type of a JSON value that is not null."""
    if isinstance(value, list):
        if any(isinstance(v, list | dict) for v in value):
            return pa.list_(pa.struct([]))
        return _STRINGS if all(isinstance(v, str) for v in value) else pa.list_(pa.null())
    if isinstance(value, dict):
        return pa.struct([])
    return next(kind for python, kind in _KINDS if isinstance(value, python))


def _usable(value: Any, lists: bool) -> bool:
    """Whether a value can stand in a column: one value, or a list of values where lists are allowed."""
    if isinstance(value, list):
        return lists and all(not isinstance(v, list | dict) and _usable(v, False) for v in value)
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # half a surrogate pair
            return False
    return not isinstance(value, dict)


def _array(values: list[Any]) -> pa.Array:
    """Values of one kind as that kind, of several as strings."""
    if any(isinstance(v, list) for v in values):
        texts = [v if v is None or isinstance(v, list) else [v] for v in values]
        return pa.array([None if v is None else [_text(x) for x in v if x is not None] for v in texts], pa.list_(pa.string()))
    numeric = all(v is None or isinstance(v, int | float) for v in values)
    if numeric and any(isinstance(v, bool) for v in values) and not all(v is None or isinstance(v, bool) for v in values):
        values = [None if v is None else v + 0 for v in values]  # true among numbers is 1
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if v is None else _text(v) for v in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return str(value)
