"""Tables of a log as units that can be read in parallel, with every row's position kept.

A unit is a CSV or atomic file, or one row group of a Parquet file. A row's number is
(index of the file among the sorted files) · 2^40 + (position in the file), so that the order of the log
survives any order of reading.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mtrec_ray.config import TableConfig
from mtrec_ray.storage import list_files, resolve

ROW = "__row__"
_SUFFIX = {"parquet": ".parquet", "csv": ".csv", "recbole": ""}


class SourceError(ValueError):
    """A table that cannot be read as configured."""


@dataclass(frozen=True)
class Unit:
    """A piece of a table, read by one task."""

    number: int
    path: str
    file_index: int
    row_group: int | None
    first_row: int


def list_units(table: TableConfig, needed: list[str], what: str) -> list[Unit]:
    """Units of a table, after checking that every file has the needed columns.

    needed: names as used inside; `table.columns` maps them to the file's.
    Raises SourceError naming the file and the column.
    """
    filesystem, path = resolve(table.path)
    info = filesystem.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise SourceError(f"{what}: {table.path} does not exist")
    paths = [path] if info.is_file else list_files(table.path, _SUFFIX[table.format])
    if not paths:
        raise SourceError(f"{what}: {table.path} holds no {table.format} files")
    units: list[Unit] = []
    for file_index, p in enumerate(paths):
        names, groups = _describe(table, filesystem, p, what)
        for name in needed:
            column = table.columns.get(name, name)
            if column not in names:
                raise SourceError(
                    f"{what}: {p} has no column {column!r} (needed as {name!r}); it has {sorted(names)}. "
                    f"Map it in data.{what}.columns"
                )
        first = 0
        for group, rows in groups:
            units.append(Unit(len(units), p, file_index, group, first))
            first += rows
    return units


def _describe(
    table: TableConfig, filesystem: pafs.FileSystem, path: str, what: str
) -> tuple[set[str], list[tuple[int | None, int]]]:
    try:
        if table.format == "parquet":
            with filesystem.open_input_file(path) as source:
                metadata = pq.ParquetFile(source).metadata
            groups: list[tuple[int | None, int]] = [(g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
            return set(metadata.schema.to_arrow_schema().names), groups
        with filesystem.open_input_stream(path) as source:
            names = _header(table, source)
        if not names:
            raise SourceError(f"{what}: {path} is empty")
        return {_plain(table, n) for n in names}, [(None, 0)]
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{what}: {path} cannot be read as {table.format}: {error}") from None


def _delimiter(table: TableConfig) -> str:
    return table.delimiter or ("\t" if table.format == "recbole" else ",")


def _plain(table: TableConfig, name: str) -> str:
    return name.split(":", 1)[0] if table.format == "recbole" else name


def _header(table: TableConfig, source: pa.NativeFile) -> list[str]:
    """Column names of a CSV or atomic file's first line; empty for an empty file."""
    line = source.read(1 << 16).decode("utf-8-sig", errors="replace").split("\n", 1)[0].rstrip("\r")
    quoting: Literal[0, 3] = csv.QUOTE_NONE if table.format == "recbole" else csv.QUOTE_MINIMAL
    return [n.strip() for n in next(csv.reader([line], delimiter=_delimiter(table), quoting=quoting), [])]


def read_unit(table: TableConfig, unit: Unit, needed: list[str]) -> Iterator[tuple[pa.Table, list[tuple[int, str]]]]:
    """Stream a unit -> (table of `needed` columns and ROW, rows that are not even a row: (row, text)).

    CSV columns come as strings (typing is the validation's work); Parquet columns as they are.
    Raises SourceError naming the file when it breaks while it is read.
    """
    try:
        yield from _read_unit(table, unit, needed)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"{unit.path} cannot be read as {table.format}: {error}") from None


def _read_unit(table: TableConfig, unit: Unit, needed: list[str]) -> Iterator[tuple[pa.Table, list[tuple[int, str]]]]:
    filesystem, _ = resolve(table.path)
    base = (unit.file_index << 40) + unit.first_row
    if table.format == "parquet":
        columns = [table.columns.get(n, n) for n in needed]
        with filesystem.open_input_file(unit.path) as source:
            file = pq.ParquetFile(source)
            for batch in file.iter_batches(batch_size=1 << 17, row_groups=[unit.row_group], columns=sorted(set(columns))):
                block = pa.Table.from_batches([batch])
                picked = pa.table({n: block[c] for n, c in zip(needed, columns, strict=True)})
                rows = pa.array(range(base, base + len(picked)), pa.int64())
                yield picked.append_column(ROW, rows), []
                base += len(picked)
        return

    broken: list[tuple[int, str]] = []

    def not_a_row(row: pacsv.InvalidRow) -> str:
        broken.append((-1 if row.number is None else base + row.number - 2, row.text or ""))
        return "skip"

    with filesystem.open_input_stream(unit.path) as source:
        names = _header(table, source)
    with filesystem.open_input_stream(unit.path) as source:
        start = source.read(1 << 16)
        if b"\n" not in start.rstrip(b"\r\n") and len(start) < 1 << 16:
            return  # a header alone
    by_plain = {_plain(table, n): n for n in names}
    columns = [by_plain[table.columns.get(n, n)] for n in needed]
    quote: str | bool = False if table.format == "recbole" else '"'
    with filesystem.open_input_stream(unit.path) as source:
        reader = pacsv.open_csv(
            source,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=8 << 20, column_names=names, skip_rows=1),
            parse_options=pacsv.ParseOptions(
                delimiter=_delimiter(table),
                quote_char=quote,
                newlines_in_values=table.format == "csv",
                invalid_row_handler=not_a_row,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={n: pa.string() for n in names},
                include_columns=sorted(set(columns)),
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )
        position = base
        skipped: list[int] = []  # numbers of the rows that are none, which no good row may take
        for batch in reader:
            block = pa.Table.from_batches([batch])
            picked = pa.table({n: block[c] for n, c in zip(needed, columns, strict=True)})
            skipped = sorted(n for n in {*skipped, *(number for number, _ in broken)} if n >= position)
            numbers = np.setdiff1d(np.arange(position, position + len(picked) + len(skipped)), skipped)[: len(picked)]
            position = int(numbers[-1]) + 1 if len(numbers) else position
            yield picked.append_column(ROW, pa.array(numbers, pa.int64())), broken.copy()
            broken.clear()
        if broken:
            empty = pa.table({n: pa.array([], pa.string()) for n in needed})
            yield empty.append_column(ROW, pa.array([], pa.int64())), broken.copy()


def read_all(table: TableConfig, needed: list[str], what: str) -> pa.Table:
    """A whole small table (items, users) with `needed` columns as strings."""
    pieces = []
    for unit in list_units(table, needed, what):
        for block, broken in read_unit(table, unit, needed):
            if broken:
                raise SourceError(f"{what}: {unit.path} has a row with another number of columns: {broken[0][1]!r}")
            pieces.append(pa.table({n: id_strings(block[n]) for n in needed}))
    if not pieces:
        return pa.table({n: pa.array([], pa.string()) for n in needed})
    return pa.concat_tables(pieces)


def id_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Any column as UTF-8 strings; whole-numbered floats lose their '.0', empty strings become null."""
    if pa.types.is_floating(column.type):
        values = column.cast(pa.float64()).to_numpy()
        text = [None if np.isnan(v) else str(int(v)) if abs(v) < 2**53 and v == int(v) else repr(float(v)) for v in values]
        return pa.chunked_array([pa.array(text, pa.string())])
    if not pa.types.is_string(column.type):
        column = column.cast(pa.string())
    return pc.if_else(pc.equal(column, ""), pa.scalar(None, pa.string()), column)
