"""Parquet: every row group is a unit."""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources.base import Block, Broken, Description, File, SourceError, Unit, doubled
from mtrec_ray.data.sources.columns import decode, settle

_ROWS = 1 << 17
_BUFFER = 8 << 20  # a column of a row group is read through a buffer, so that a huge row group does not fill memory


def suffixes() -> tuple[str, ...]:
    return (".parquet",)


def describe(table: TableConfig, file: File) -> Description:
    with file.random_access() as source:
        metadata = pq.ParquetFile(source).metadata
    schema = metadata.schema.to_arrow_schema()
    pieces: list[tuple[int | None, int | None]] = [(g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups)]
    return Description({f.name: f.type for f in schema}, pieces, double=doubled(schema.names))


def read(table: TableConfig, file: File, unit: Unit, columns: list[str], lists: Set[str]) -> Iterator[Block]:
    with file.random_access() as source:
        parquet = pq.ParquetFile(source, buffer_size=_BUFFER, page_checksum_verification=True)
        assert unit.row_group is not None
        groups = parquet.metadata.num_row_groups
        rows = parquet.metadata.row_group(unit.row_group).num_rows if unit.row_group < groups else None
        if unit.rows is not None and rows != unit.rows:
            raise SourceError(f"{file.path} was replaced while the table was read: row group {unit.row_group} had {unit.rows} rows")
        position = unit.base
        for batch in parquet.iter_batches(batch_size=_ROWS, row_groups=[unit.row_group], columns=columns, use_threads=False):
            block = pa.table({n: settle(pa.chunked_array([batch[n]])) for n in columns})
            numbers = np.arange(position, position + len(batch), dtype=np.int64)
            position += len(batch)
            broken: Broken = []
            block, numbers = decode(block, numbers, broken) if columns else (block, numbers)
            yield block, numbers, broken
        if rows is not None and position - unit.base != rows:
            raise SourceError(f"{file.path}: row group {unit.row_group} gave {position - unit.base} of its {rows} rows")
