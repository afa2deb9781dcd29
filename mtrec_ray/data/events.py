"""Pass 1 of prepare: rows of the three tables are read, validated and sent to their partition; partitions are settled.

Every function is one task: it works on one unit or one partition, writes files named by it, and returns counts.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray import hashing, storage
from mtrec_ray.config import DataConfig, RunConfig
from mtrec_ray.data import long, shuffle, sources
from mtrec_ray.data.catalogue import check_unique, item_columns, user_columns
from mtrec_ray.data.ids import sample, sorted_dictionary
from mtrec_ray.data.lineage import Before, forgotten_hash
from mtrec_ray.data.partition import hash_ids, user_partition
from mtrec_ray.data.validate import (
    ITEM,
    TIME,
    USER,
    event_schema,
    list_columns,
    needed_columns,
    quarantine_broken,
    quarantine_rows,
    row_schema,
    validate,
)
from mtrec_ray.privacy import Pseudonyms

ROW = sources.ROW
PIECE_ROWS = 1 << 20
"""Rows that a task holds before they go to the shuffle's files."""
BAD_ROWS = 1 << 17
"""Bad rows that a task holds before they go to a quarantine file."""
BYTES_PER_ROW = 40
"""Of a text file, whose rows nobody has counted."""


@dataclass(frozen=True)
class Job:
    """What every task of a preparation knows."""

    config: RunConfig
    prefix: str
    partitions: int
    units: dict[str, list[sources.Unit]] = field(default_factory=dict)
    """Units of the tables interactions, items and users."""
    known_items: NDArray[np.uint64] | None = None
    """Sorted hashes of the items table's ids."""
    pseudonyms: Pseudonyms | None = None
    forgotten: frozenset[str] = frozenset()
    """Hashes of users whose events are left out (jobs.forget)."""
    before: Before | None = None
    """The published data that are appended to."""
    log_end: int = 0
    """Time of the log's newest good row, ms; known once the log is read."""

    @property
    def data(self) -> DataConfig:
        return self.config.data

    def part(self, kind: str, number: int) -> str:
        return storage.join(self.prefix, kind, f"part-{number:05d}.parquet")

    def work(self, *parts: str) -> str:
        """A place for what only this preparation reads."""
        return storage.join(self.prefix, "_work", *parts)

    def having(self, **fields: Any) -> Job:
        return replace(self, **fields)


def pseudonymised(job: Job, table: pa.Table) -> pa.Table:
    """The table with pseudonyms for user ids."""
    assert job.pseudonyms is not None
    place = table.column_names.index(USER)
    return table.set_column(place, USER, job.pseudonyms.column(sources.id_strings(table[USER])))


# --------------------------------------------------------------------------- the tables of items and users


def read_table_unit(job: Job, place: tuple[str, int]) -> dict[str, Any]:
    """A unit of the items or users table, as strings -> rows, a sample of its ids and their hashes.

    Users go to their partition, items to a file of the unit. Raises SourceError for missing ids and broken rows.
    """
    what, number = place
    config = job.data.items if what == "items" else job.data.users
    columns = item_columns(job.data) if what == "items" else user_columns(job.data)
    assert config is not None
    unit, key = job.units[what][number], columns[0]
    table = sources.read_strings(config, unit, columns, what, bool(job.data.pseudonyms or job.data.sensitive))
    if table[key].null_count:
        first = pc.index(table[key].is_null(), True).as_py()
        raise sources.SourceError(f"{what}: {unit.path}: {table[key].null_count} row(s) without {key}; the first is row {first}")
    if what == "users":
        if job.pseudonyms is not None:
            table = pseudonymised(job, table)
        part = user_partition(table[key], job.partitions)
        shuffle.write_piece(job.work("users", f"unit-{number:06d}.arrow"), table, part, job.partitions)
        return {"rows": len(table), "sample": [], "hashes": np.zeros(0, np.uint64)}
    table = table.sort_by(key)
    storage.write_table(job.work("items", f"unit-{number:06d}.parquet"), table)
    ids = table[key].combine_chunks()
    hashes = hash_ids(ids) if job.data.unknown_items == "quarantine" else np.zeros(0, np.uint64)
    return {"rows": len(table), "sample": sample(ids) if len(ids) else [], "hashes": hashes}


def users_of(job: Job, number: int) -> pa.Table | None:
    """The users table's rows of a partition; None without a users table. Raises SourceError for a doubled id."""
    if job.data.users is None:
        return None
    found = shuffle.read_partition(job.work("users"), number)
    if found is None:
        return pa.table({n: pa.array([], pa.string()) for n in user_columns(job.data)})
    check_unique(found, "user_id", "users", job.data.sensitive_names)
    return found


# --------------------------------------------------------------------------- the log


def groups_of_units(units: list[sources.Unit]) -> list[tuple[int, int]]:
    """Consecutive units that one task reads, as ranges of places: small files and row groups together, up to a piece."""
    starts, rows = [0], 0
    for place, unit in enumerate(units):
        size = unit.rows if unit.rows is not None else (unit.size or 0) // BYTES_PER_ROW
        if rows and rows + size > PIECE_ROWS:
            starts.append(place)
            rows = 0
        rows += size
    return list(itertools.pairwise([*starts, len(units)])) if units else []


def read_events_units(job: Job, places: tuple[int, int]) -> dict[str, Any]:
    """Read and validate some units of the log; good rows go to the shuffle's files, bad ones to the quarantine."""
    units = job.units["interactions"][slice(*places)]
    name = units[0].number
    held: list[pa.Table] = []
    rejected: list[pa.Table] = []
    good_rows = bad_rows = forgotten = pieces = 0

    def send() -> None:
        nonlocal pieces
        table = pa.concat_tables(held)
        part = user_partition(table[USER], job.partitions)
        shuffle.write_piece(job.work("events", f"unit-{name:06d}-{pieces:04d}.arrow"), table, part, job.partitions)
        pieces += 1
        held.clear()

    def set_aside() -> None:
        nonlocal bad_rows
        bad = pa.concat_tables(rejected)
        if len(bad):
            storage.write_table(storage.join(job.prefix, "quarantine", f"part-{name:05d}-{bad_rows:010d}.parquet"), bad)
        bad_rows += len(bad)
        rejected.clear()

    now = time.time_ns() // 1_000_000
    earliest, latest = [], []
    needed, lists = needed_columns(job.data), list_columns(job.data)
    blocks = ((u, *block) for u in units for block in sources.read_unit(job.data.interactions, u, needed, lists))
    for unit, table, broken in blocks:
        if job.pseudonyms is not None:
            table = pseudonymised(job, table)
        remembered = _without_forgotten(job, table)
        forgotten, table = forgotten + len(table) - len(remembered), remembered
        good, bad = validate(table, job.data, unit.path, job.known_items, now)
        rejected.append(bad)
        if broken:
            secret = bool(job.data.pseudonyms or job.data.sensitive or job.forgotten)
            rejected.append(quarantine_broken(unit.path, broken, job.data, secret))
        if len(good):
            span = pc.min_max(good[TIME]).as_py()
            earliest.append(span["min"])
            latest.append(span["max"])
            held.append(good)
            good_rows += len(good)
        if sum(map(len, held)) >= PIECE_ROWS:
            send()
        if sum(map(len, rejected)) >= BAD_ROWS:
            set_aside()
    if held:
        send()
    if rejected:
        set_aside()
    return {
        "read": good_rows + bad_rows + forgotten,
        "good": good_rows,
        "forgotten": forgotten,
        "earliest": min(earliest, default=None),
        "latest": max(latest, default=None),
    }


def settle_partition(job: Job, number: int) -> dict[str, int]:
    """Sort a partition by (user, time, row), quarantine unknown users and duplicates, join a long log's rows, write it.

    -> its events, how many rows were found, and what the join says. Appended rows join the partition's rows of before;
    a partition that has none is taken as it is, unless a user was forgotten there since: then it is counted anew.
    """
    events, before = shuffle.read_partition(job.work("events"), number), _before(job, number)
    if events is None or not len(events):
        if before is None:
            return {"events": 0, "found": 0}
        assert job.before is not None
        if str(number) in job.before.settled:
            return _as_before(job, number)
        events = row_schema(job.data).empty_table()
    found, counts, rejected = len(events), dict[str, int](), list[pa.Table]()
    files = {u.file_index: u.path for u in job.units["interactions"]} | (job.before.files if job.before else {})

    def without(rows: pa.Table, bad: NDArray[np.bool_], why: str) -> pa.Table:
        if not bad.any():
            return rows
        reason: NDArray[np.object_] = np.array([why] * len(rows), dtype=object)
        rejected.append(quarantine_rows(rows, files, bad, reason, job.data.sensitive_names))
        return rows.filter(pa.array(~bad))

    users = users_of(job, number)
    if users is not None and job.data.unknown_users == "quarantine":
        known = pc.is_in(events[USER], value_set=users["user_id"].combine_chunks())
        events = without(events, ~known.to_numpy(), "user_id is not in the users table")
    if before is not None:
        events = pa.concat_tables([storage.read_table(before).cast(events.schema), events])
    events = _sorted(_encoded(events))
    events = without(events, duplicates(events), "duplicate event")
    if job.data.long is not None:
        rows, joined = events, long.join(events, job.data)
        if job.data.long.unmatched == "quarantine":
            rows = without(rows, joined.unmatched, f"{job.data.long.type} matches no {job.data.long.impression}")
        storage.write_table(job.part("rows", number), rows)  # what an append joins anew
        events, counts = joined.events, joined.counts()
        if job.data.long.unmatched == "quarantine" and job.before is not None:  # those of before are no rows any more
            counts["unmatched"] += job.before.settled.get(str(number), {}).get("unmatched", 0)
    if rejected:
        generation = job.before.generation if job.before else 0
        storage.write_table(job.part("quarantine", 1_000_000 * (generation + 1) + number), pa.concat_tables(rejected))
    if len(events):
        storage.write_table(job.part("events", number), events)
    return {"events": len(events), "found": found, **counts}


def _before(job: Job, number: int) -> str | None:
    """The file of a partition's settled rows before an append."""
    if job.before is None:
        return None
    uri = storage.join(job.before.prefix, "events" if job.data.long is None else "rows", f"part-{number:05d}.parquet")
    return uri if storage.exists(uri) else None


def _as_before(job: Job, number: int) -> dict[str, int]:
    """A partition that no row was found for."""
    assert job.before is not None
    for kind in ("events", "rows"):
        uri = storage.join(job.before.prefix, kind, f"part-{number:05d}.parquet")
        if storage.exists(uri):
            storage.copy(uri, job.part(kind, number))
    return job.before.settled[str(number)] | {"found": 0}


def _sorted(events: pa.Table) -> pa.Table:
    """By user, time and row; ids are dictionaries in order."""
    time, row = events[TIME].to_numpy(), events[ROW].to_numpy()
    user = events[USER].combine_chunks().indices.to_numpy()
    keys = (time, user) if (np.diff(row) > 0).all() else (row, time, user)
    return events.take(pa.array(np.lexsort(keys)))


def _without_forgotten(job: Job, table: pa.Table) -> pa.Table:
    """Rows as they were read without those of forgotten users, good or bad."""
    if not job.forgotten:
        return table
    encoded = sources.id_strings(table[USER]).combine_chunks().dictionary_encode()
    gone = np.array([*(forgotten_hash(u) in job.forgotten for u in encoded.dictionary.to_pylist()), False])
    rows = gone[encoded.indices.fill_null(len(gone) - 1).to_numpy()]
    return table.filter(pa.array(~rows)) if rows.any() else table


def _encoded(events: pa.Table) -> pa.Table:
    """Ids as dictionaries in the order of their values."""
    for place, name in enumerate(events.column_names):
        if name in (USER, ITEM):
            values, codes = sorted_dictionary(events[name])
            events = events.set_column(place, name, pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), values))
    return events


def duplicates(events: pa.Table) -> NDArray[np.bool_]:
    """Events equal to an earlier one of the table in everything but the row, which are sorted by (user, time, row).

    Rows are compared in full where user, time and item have the hash of another row.
    """
    user, item = (events[n].combine_chunks().indices.to_numpy().astype(np.uint64) for n in (USER, ITEM))
    key = hashing.mix(events[TIME].to_numpy().astype(np.uint64) ^ hashing.mix((user << np.uint64(32)) | item))
    order = np.argsort(key, kind="stable")
    same = key[order][1:] == key[order][:-1]
    suspicious = np.zeros(len(events), bool)
    suspicious[order[1:][same]] = suspicious[order[:-1][same]] = True
    double = np.zeros(len(events), bool)
    rows = np.flatnonzero(suspicious)
    if len(rows):
        names = [n for n in events.column_names if n != ROW]
        frame = events.select(names).take(pa.array(rows)).to_pandas()
        for name in (n for n in names if pa.types.is_list(events.schema.field(n).type)):
            frame[name] = frame[name].map(tuple)
        double[rows] = frame.duplicated().to_numpy()
    return double


def read_events(job: Job, number: int) -> pa.Table:
    """A settled partition; ids are dictionaries in order of their values. An empty table where it has no events."""
    uri = job.part("events", number)
    if not storage.exists(uri):
        return _encoded(event_schema(job.data).empty_table())
    table = storage.read_table(uri)
    whole = [table[n].num_chunks == 1 for n in (USER, ITEM)]
    return table if all(whole) else _encoded(table.unify_dictionaries().combine_chunks())
