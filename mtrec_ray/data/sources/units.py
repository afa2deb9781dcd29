"""Listing a table's units, and reading them, whatever the format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from csv import Error as CsvError
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources import jsonl, movielens, parquet, text
from mtrec_ray.data.sources.base import ROW, Broken, Description, File, Format, SourceError, Unit
from mtrec_ray.data.sources.columns import id_strings, readable
from mtrec_ray.storage import resolve, shown

_FORMATS: dict[str, Format] = {"parquet": parquet, "csv": text, "recbole": text, "jsonl": jsonl, "movielens": movielens}
_REQUIRED = {"user_id", "item_id", "timestamp"}
_THREADS = 16  # object stores answer slowly, and many questions at once
_UNREADABLE = (pa.ArrowException, OSError, CsvError, EOFError, UnicodeError, MemoryError)
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"

T = TypeVar("T")


def list_units(table: TableConfig, needed: list[str], what: str, lists: Set[str] = frozenset()) -> list[Unit]:
    """Units of a table, after checking that every file has the needed columns. Reads footers and headers only.

    needed: names as used inside; `table.columns` maps them to the file's. lists: those that may hold lists of values.
    Raises SourceError naming the file and the column.
    """
    try:
        filesystem, root, infos = _files(table, what)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{what}: {shown(table.path)} cannot be listed: {error}") from None

    def describe(info: pafs.FileInfo) -> tuple[Description, dict[str, str | None]]:
        try:
            found = _FORMATS[table.format].describe(table, File(filesystem, info.path))
        except _UNREADABLE as error:
            raise SourceError(f"{what}: {info.path} cannot be read as {table.format}: {error}") from None
        except SourceError as error:
            raise SourceError(f"{what}: {error}") from None
        partition = _partition(info.path.removeprefix(root))
        _check(table, found, partition, needed, f"{what}: {info.path}", what, lists)
        return found, partition

    units: list[Unit] = []
    for index, (info, (found, partition)) in enumerate(zip(infos, _in_threads(describe, infos), strict=True)):
        size, modified = _stamp(filesystem, info)
        first = 0
        for group, rows in found.pieces:
            units.append(Unit(len(units), info.path, index, group, first, rows, size, modified, tuple(sorted(partition.items()))))
            first += rows or 0
    return units


def _files(table: TableConfig, what: str) -> tuple[pafs.FileSystem, str, list[pafs.FileInfo]]:
    """The filesystem, the path below which partitions are named, and the files in the order of their names."""
    filesystem, path = resolve(table.path)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise SourceError(f"{what}: {shown(table.path)} does not exist")
    if info.is_file:
        return filesystem, path, [info]
    if table.format == "movielens":
        raise SourceError(f"{what}: {shown(table.path)} is a directory; name one of its files: {', '.join(movielens.suffixes())}")
    suffixes = ("",) if table.format == "recbole" else _FORMATS[table.format].suffixes()
    infos = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    found = [i for i in infos if i.is_file and i.path.endswith(suffixes) and not _hidden(i.path.removeprefix(path))]
    if not found:
        raise SourceError(
            f"{what}: {shown(table.path)} holds no {table.format} files ({', '.join(s for s in suffixes if s) or 'any name'})"
        )
    return filesystem, path, sorted(found, key=lambda i: i.path)


def _hidden(relative: str) -> bool:
    return any(part.startswith((".", "_")) for part in relative.strip("/").split("/"))


def _partition(relative: str) -> dict[str, str | None]:
    """Columns of a Hive path: `/day=2024-01-01/part-0.parquet` gives day."""
    pairs = [part.split("=", 1) for part in relative.strip("/").split("/")[:-1] if "=" in part]
    return {unquote(k): None if v == _NO_VALUE else unquote(v) for k, v in pairs}


def _check(
    table: TableConfig,
    found: Description,
    partition: dict[str, str | None],
    needed: list[str],
    where: str,
    what: str,
    lists: Set[str],
) -> None:
    """Raise SourceError unless a file has every needed column once, with one value per row."""
    for name in needed:
        column = table.columns.get(name, name)
        if column in partition:
            continue
        if column in found.double:
            raise SourceError(f"{where} has the column {column!r} (needed as {name!r}) more than once")
        if column not in found.columns:
            if (found.complete or name in _REQUIRED) and (found.columns or found.complete):
                there = sorted({*found.columns, *partition})
                raise SourceError(
                    f"{where} has no column {column!r} (needed as {name!r}); it has {there}. Map it in data.{what}.columns"
                )
            continue
        kind = found.columns[column]
        if kind is not None and not readable(kind, name in lists and name not in _REQUIRED):
            object_ = table.format == "jsonl" and pa.types.is_struct(kind)
            cure = f"name one of its values, such as {column}.id" if object_ else "write it as text, a number or a timestamp"
            shown = "an object" if object_ else f"of type {kind}"
            raise SourceError(f"{where}: column {column!r} (needed as {name!r}) is {shown}, not one value per row; {cure}")


def _in_threads(function: Callable[[pafs.FileInfo], T], infos: list[pafs.FileInfo]) -> list[T]:
    """function of every file, in order; the first error, in that order, ends it."""
    if len(infos) == 1:
        return [function(infos[0])]
    pool = ThreadPoolExecutor(min(_THREADS, len(infos)), thread_name_prefix="list-units")
    try:
        return list(pool.map(function, infos))
    finally:
        pool.shutdown(cancel_futures=True)


def _stamp(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> tuple[int | None, int | None]:
    """(bytes, time of change) of a file. Object stores list milliseconds and answer a single question in seconds."""
    time = info.mtime_ns
    if time is not None and not isinstance(filesystem, pafs.LocalFileSystem):
        time //= 1_000_000_000
    return info.size, time


# --------------------------------------------------------------------------- reading


def read_unit(
    table: TableConfig, unit: Unit, needed: list[str], lists: Set[str] = frozenset()
) -> Iterator[tuple[pa.Table, Broken]]:
    """Stream a unit -> (table of `needed` columns and ROW, rows that are not even a row: (row, text)).

    Columns of text formats come as strings (typing is the validation's work); those of Parquet and JSON Lines as they are.
    Raises SourceError naming the file when it breaks, vanishes or was replaced since it was listed.
    """
    filesystem, _ = resolve(table.path)
    partition = dict(unit.partition)
    columns = {n: table.columns.get(n, n) for n in needed}
    inside = sorted({c for c in columns.values() if c not in partition})
    try:
        _check_unchanged(filesystem, unit)
        listed = {columns[n] for n in lists if n in columns}
        for block, rows, broken in _FORMATS[table.format].read(table, File(filesystem, unit.path), unit, inside, listed):
            constants = {c: pa.repeat(pa.scalar(v, pa.string()), len(rows)) for c, v in partition.items()}
            picked = pa.table({n: constants[c] if c in constants else block[c] for n, c in columns.items()})
            yield picked.append_column(ROW, pa.array(rows, pa.int64())), broken
    except _UNREADABLE as error:
        raise SourceError(f"{unit.path} cannot be read as {table.format}: {error}") from None


def _check_unchanged(filesystem: pafs.FileSystem, unit: Unit) -> None:
    info = filesystem.get_file_info(unit.path)
    if info.type == pafs.FileType.NotFound:
        raise SourceError(f"{unit.path} is gone; it was there when the table was listed")
    size, modified = _stamp(filesystem, info)
    if unit.size not in (None, size) or unit.modified not in (None, modified):
        raise SourceError(
            f"{unit.path} was replaced or changed since the table was listed (it had {unit.size} bytes, it has {size}); run again"
        )


def read_strings(table: TableConfig, unit: Unit, needed: list[str], what: str, secret: bool = False) -> pa.Table:
    """A whole unit of a small table (items, users) with `needed` columns as strings; lists are joined with ', '.

    Raises SourceError for a broken row, which such a table may not have; secret: without its text."""
    pieces = []
    for block, broken in read_unit(table, unit, needed, set(needed)):
        if broken:
            row, line = broken[0]
            shown = "(withheld)" if secret else repr(line)
            raise SourceError(f"{what}: {unit.path} row {row - unit.base} {_FAULT[table.format]}: {shown}")
        pieces.append(pa.table({n: id_strings(block[n]) for n in needed}))
    if not pieces:
        return pa.table({n: pa.array([], pa.string()) for n in needed})
    return pa.concat_tables(pieces)


_FAULT = {
    "jsonl": "is no JSON object with one value per column",
    "parquet": "holds bytes that are not UTF-8",
    **dict.fromkeys(("csv", "recbole", "movielens"), "has another number of columns, or bytes that are not UTF-8"),
}
