"""What the readers of all formats share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray

from mtrec_ray.config import TableConfig

ROW = "__row__"
FILE_BITS = 40
"""A row's number is file_index << FILE_BITS | position in the file."""

Broken = list[tuple[int, str]]
"""Rows that are not even a row: (number, text)."""
Block = tuple[pa.Table, NDArray[np.int64], Broken]
"""Columns under the file's names, the rows' numbers, and the broken rows met on the way."""


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
    rows: int | None = None
    """Rows of the row group when it was listed."""
    size: int | None = None
    """Bytes of the file when it was listed."""
    modified: int | None = None
    """The file's time of change when it was listed."""
    partition: tuple[tuple[str, str | None], ...] = ()
    """Columns that the path holds: `day=2024-01-01`."""

    @property
    def base(self) -> int:
        """Number of the unit's first row."""
        return (self.file_index << FILE_BITS) + self.first_row


@dataclass(frozen=True)
class File:
    """A file of a filesystem; streams are decompressed by the name's ending."""

    filesystem: pafs.FileSystem
    path: str

    def stream(self) -> pa.NativeFile:
        return self.filesystem.open_input_stream(self.path)

    def random_access(self) -> pa.NativeFile:
        return self.filesystem.open_input_file(self.path)

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True)
class Description:
    """What can be known of a file without reading its rows."""

    columns: Mapping[str, pa.DataType | None]
    """Names and, where the format has them, types."""
    pieces: list[tuple[int | None, int | None]]
    """(row group, its rows) of every unit of the file."""
    complete: bool = True
    """Whether a column that is not listed is surely absent."""
    double: frozenset[str] = frozenset()
    """Names that occur more than once."""


def doubled(names: Sequence[str]) -> frozenset[str]:
    return frozenset(n for n, count in Counter(names).items() if count > 1)


class Format(Protocol):
    """A module that reads one format."""

    def suffixes(self) -> tuple[str, ...]:
        """Endings of the names that a directory is searched for."""

    def describe(self, table: TableConfig, file: File) -> Description: ...

    def read(self, table: TableConfig, file: File, unit: Unit, columns: list[str], lists: Set[str]) -> Iterator[Block]:
        """Rows of a unit in order. columns: under the file's names; lists: those that may hold lists."""


COMPRESSED = ("", ".gz", ".zst", ".bz2")
