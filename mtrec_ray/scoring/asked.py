"""Files that say what to score (users, pairs, histories of their own), and where each row of them belongs. It knows no Ray.

A file of users or pairs is split by the partitions of the history store, piece by piece, so that nothing of its size passes
through one process; a file of histories is its own store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.data.partition import user_partition
from mtrec_ray.data.sources import id_strings
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.schema import LogSchema

ROWS = 1_000_000
"""Of a piece of a file, at most (one row group at least)."""
HISTORIES = 20_000
"""Of a shard of histories, at most (one row group at least)."""


class ScoringError(ValueError):
    """Something to score that cannot be read, or an output that the run does not have."""


@dataclass(frozen=True)
class Piece:
    """Some row groups of a Parquet file."""

    path: str
    """Without scheme."""
    row_groups: tuple[int, ...]
    rows: int


def pieces(uri: str, key: str, columns: Sequence[str], rows: int = ROWS) -> tuple[list[Piece], str]:
    """A Parquet file or a directory of them -> its pieces, and a fingerprint of what it holds (of the footers, which name
    offsets and statistics of every column). key: of the configuration, for errors. Raises ScoringError, StorageError."""
    filesystem, path = storage.resolve(uri)
    if not storage.exists(uri):
        raise storage.StorageError(f"{key}: {uri}: not found")
    paths = [path] if filesystem.get_file_info(path).is_file else storage.list_files(uri, ".parquet")
    if not paths:
        raise ScoringError(f"{key}: {uri} has no Parquet files")
    found, footers = [], []
    for file in paths:
        try:
            footer = pq.ParquetFile(file, filesystem=filesystem).metadata
        except pa.ArrowInvalid as error:
            raise ScoringError(f"{key}: {file} is not Parquet: {error}") from None
        names = footer.schema.to_arrow_schema().names
        for column in columns:
            if column not in names:
                raise ScoringError(f"{key}: {file} has no column {column}; it has {names}")
        groups, count = [], 0
        for number in range(footer.num_row_groups):
            groups.append(number)
            count += footer.row_group(number).num_rows
            if count >= rows or number == footer.num_row_groups - 1:
                found.append(Piece(file, tuple(groups), count))
                groups, count = [], 0
        footers.append({"rows": footer.num_rows, "bytes": filesystem.get_file_info(file).size, "footer": str(footer.to_dict())})
    if not sum(p.rows for p in found):
        raise ScoringError(f"{key}: {uri} has no rows; leave it out to score every user")
    return found, storage.fingerprint(footers)


def read_piece(uri: str, piece: Piece, columns: Sequence[str]) -> pa.Table:
    file = pq.ParquetFile(piece.path, filesystem=storage.resolve(uri)[0])
    return file.read_row_groups(list(piece.row_groups), columns=list(columns))


@dataclass(frozen=True)
class Split:
    """What a task needs to split pieces of a file of users or pairs."""

    uri: str
    key: str
    columns: tuple[str, ...]
    folder: str
    partitions: int
    pseudonyms: Pseudonyms | None


def split_piece(split: Split, numbered: tuple[int, Piece]) -> dict[int, int]:
    """Write the rows of a piece to FOLDER/PARTITION/NUMBER.parquet -> rows of every partition. Raises ScoringError for missing
    ids."""
    number, piece = numbered
    table = read_piece(split.uri, piece, split.columns)
    ids = {name: id_strings(table[name]).combine_chunks() for name in split.columns}
    for name, column in ids.items():
        if column.null_count:
            first = pc.index(column.is_null(), True).as_py()
            where = f"row {first} of row groups {piece.row_groups[0]} to {piece.row_groups[-1]}"
            raise ScoringError(f"{split.key}: {piece.path} has {column.null_count} row(s) without {name}; the first is {where}")
    if split.pseudonyms is not None:
        known_as = split.pseudonyms.column(ids["user_id"])
        ids["user_id"] = known_as.combine_chunks() if isinstance(known_as, pa.ChunkedArray) else known_as
    owner = user_partition(ids["user_id"], split.partitions)
    rows, out = pa.table(ids), {}
    for partition in np.unique(owner).tolist():
        mine = rows.filter(pa.array(owner == partition))
        storage.write_table(storage.join(split.folder, f"{partition:05d}", f"{number:06d}.parquet"), mine)
        out[int(partition)] = len(mine)
    return out


def asked_of(folder: str, partition: int) -> pa.Table:
    """All rows of a partition."""
    return storage.read_table(storage.join(folder, f"{partition:05d}"))


def distinct_rows(table: pa.Table) -> pa.Table:
    """Each row once, in the order of ids."""
    names = table.column_names
    return table.group_by(names).aggregate([]).select(names).sort_by([(n, "ascending") for n in names])


def histories(uri: str, schema: LogSchema) -> tuple[list[Piece], str]:
    """As pieces. Raises ScoringError for a file that is not of the store's form."""
    found, digest = pieces(uri, "scoring.histories", ("user_id", "history_item_id", "history_time"), HISTORIES)
    actions = {f"history_action_{a.name}" for a in schema.actions}
    context = {f"history_context_{c.name}" for c in schema.history_features}
    known = {"user_id", "history_item_id", "history_time", "seen_item_id", "seen_time"} | actions | context
    for path in dict.fromkeys(p.path for p in found):
        names = pq.read_schema(path, filesystem=storage.resolve(uri)[0]).names
        strange = sorted(set(names) - known)
        if strange:
            raise ScoringError(
                f"scoring.histories: {path} has columns that this model does not read: {strange}; known: {sorted(known)}"
            )
    return found, digest


def as_store(table: pa.Table, where: str) -> pa.Table:
    """Histories of a file in the form of the store's rows: typed, without a missing list, in the order of time (ties as they
    stand). Raises ScoringError, which names the row."""
    columns: dict[str, Any] = {"user_id": id_strings(table["user_id"]).combine_chunks()}
    if columns["user_id"].null_count:
        raise ScoringError(f"{where}: {columns['user_id'].null_count} row(s) without user_id")
    lengths: NDArray[np.int64] | None = None
    more = [n for n in table.column_names if n.startswith(("history_action_", "history_context_"))]
    for name in ("history_item_id", "history_time", *more):
        column = _list_column(table, name, where)
        count = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        if lengths is None:
            lengths = count
        elif (count != lengths).any():
            row = int(np.flatnonzero(count != lengths)[0])
            raise ScoringError(f"{where}: row {row}: {name} has {count[row]} entries, history_item_id {lengths[row]}")
        columns[name] = column
    for name, kind in (("seen_item_id", pa.string()), ("seen_time", pa.int64())):
        given = name in table.column_names
        columns[name] = _list_column(table, name, where) if given else pa.array([[]] * len(table), pa.list_(kind))
    rows = pa.table(columns)
    assert lengths is not None
    times, owner = columns["history_time"], np.repeat(np.arange(len(table)), lengths)
    back = np.flatnonzero((np.diff(times.flatten().to_numpy()) < 0) & (owner[1:] == owner[:-1]))
    if len(back):
        row = int(owner[back[0]])
        raise ScoringError(f"{where}: row {row}: history_time is not ascending; sort the events of each user by time")
    return rows


def _list_column(table: pa.Table, name: str, where: str) -> pa.Array:
    column = table[name].combine_chunks()
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        raise ScoringError(f"{where}: {name} is {column.type}; expected a list for every user")
    column = pc.fill_null(column, pa.scalar([], column.type)) if column.null_count else column
    inner = pa.string() if name.endswith("_item_id") else pa.int64() if name.endswith("_time") else column.type.value_type
    try:
        column = column.cast(pa.list_(inner))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ScoringError(f"{where}: {name}: {error}") from None
    if name.endswith(("_item_id", "_time")) and column.values.null_count:
        raise ScoringError(f"{where}: {name} has missing entries")
    return column
