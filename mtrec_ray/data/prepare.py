"""prepare: sources -> validated events -> id map and fitted transforms -> windows, as Ray Data jobs.

Each step is a set of independent tasks, one per piece, that write files named by the piece (a task that is run again
writes the same file again) and return counts. The driver holds counts and samples, and eight bytes per item where
unknown items are quarantined; never rows or ids.

  1. events.py   units of the log are read and validated, bad rows quarantined, good rows sent to their user's
                 partition (shuffle.py); partitions are sorted, duplicates quarantined   -> events/part-*.parquet
  2. fit.py      the time cuts; sums over training events                                -> schema.json
  3. build.py    items get their numbers (ids.py); partitions become windows, moments and the history store
                                                               -> windows/*, store/, catalogue.parquet

Nothing is visible before the manifest is written.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pyarrow.parquet as pq

from mtrec_ray import lock, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data import build, fit, ids, lineage, sources
from mtrec_ray.data import events as stage
from mtrec_ray.data.catalogue import item_columns, user_columns
from mtrec_ray.data.events import Job
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.maturity import maturity_hours
from mtrec_ray.data.validate import list_columns, needed_columns
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.schema import LogSchema

log = logging.getLogger(__name__)

__all__ = ["DataError", "prepare"]

_EVENTS_PER_PARTITION = 1_000_000
_ITEMS_PER_RANGE = 4_000_000
_TEST_HASH_TARGETS = 2_000_000
_SECONDS_LIKE_MS = (300_000_000, 5_000_000_000)
"""Times of 1979 to 2128 in seconds, read as milliseconds."""

Item = TypeVar("Item")
R = TypeVar("R")


def prepare(config: RunConfig, root: str, append: bool = False) -> storage.Directory:
    """Prepare the log of a config into `root`; what is already there for the same inputs is reused.

    append: files of the log that are not part of the published data yet join them. The result is that of preparing
    everything at once, but training items keep the numbers that they had.
    Raises SourceError, DataError, PseudonymKeyError, StorageError: nothing is published then.
    """
    with lock.only_writer(root):
        return _prepare(config, storage.Directory(root), append)


def _prepare(config: RunConfig, directory: storage.Directory, append: bool) -> storage.Directory:
    published = _published(directory, append)
    files = lineage.listed(config)
    units = _units(config)
    parts = lineage.covered(config, directory.root, published, files)
    covers = lineage.covers(parts)
    if published is not None and published["covers"] == covers:
        fit.check_labels(config, LogSchema.model_validate_json(storage.read_bytes(directory.path("schema.json"))).labels)
        log.info("prepare: reused %s", directory.root)
        return directory
    before, inputs, key, units_before = None, covers, None, 0
    if append and published is not None:
        before, units["interactions"] = lineage.appended(parts, published, directory.prefix, units["interactions"])
        inputs, key = storage.fingerprint([covers, published["inputs"]]), published["pseudonym_key"]
        units_before, partitions = int(published["units"]), int(published["partitions"])
        log.info("prepare: %d new piece(s) of the log join %d", len(units["interactions"]), units_before)
    else:
        partitions = _partitions(config, units["interactions"])
    pseudonyms = None if config.data.pseudonyms is None else Pseudonyms.load(config.data.pseudonyms, key)
    lineage.check_forgotten(directory.root, None if pseudonyms is None else pseudonyms.fingerprint)
    job = Job(
        config, directory.begin(inputs), partitions, units, pseudonyms=pseudonyms, forgotten=lineage.forgotten(directory.root),
        before=before,
    )  # fmt: skip
    try:
        facts = _run(job)
    except BaseException:
        for name in ("_work", "events", "rows", "windows", "store", "catalogue.parquet"):  # the quarantine says what was wrong
            storage.delete(storage.join(job.prefix, name))
        raise
    storage.delete(job.work())
    ancestors = [] if published is None else [*dict.fromkeys([*published["ancestors"], published["inputs"]])]
    paths = (before.files if before else {}) | {u.file_index: u.path for u in units["interactions"]}
    order = [paths.get(i, "") for i in range(max(paths, default=-1) + 1)]  # a file without a row group has a place too
    directory.publish(
        inputs, kind="data", covers=covers, covered=parts, partitions=partitions, order=order, ancestors=ancestors,
        units=units_before + len(units["interactions"]),
        generation=before.generation if before else 0, test_sha256=_test_hash(job.prefix, facts["rows"]), **facts,
    )  # fmt: skip
    log.info("prepare: %s", facts["rows"])
    return directory


def _published(directory: storage.Directory, append: bool) -> dict[str, Any] | None:
    """The manifest of what is there; what cannot be read is as if it were not, and is no ground to append to."""
    try:
        return directory.manifest
    except storage.StorageError:
        if append and storage.exists(storage.join(directory.root, "manifest.json")):
            raise
        return None


def _units(config: RunConfig) -> dict[str, list[sources.Unit]]:
    data = config.data
    units = {"interactions": sources.list_units(data.interactions, needed_columns(data), "interactions", list_columns(data))}
    if data.items is not None:
        units["items"] = sources.list_units(data.items, item_columns(data), "items", set(item_columns(data)))
    if data.users is not None:
        units["users"] = sources.list_units(data.users, user_columns(data), "users", set(user_columns(data)))
    return units


def _partitions(config: RunConfig, units: list[sources.Unit]) -> int:
    """As many that a partition's million or so events fit a task; from four on, in fours, so that none works alone."""
    if config.data.partitions is not None:
        return config.data.partitions
    counted = sum(u.rows or 0 for u in units)
    packed = (".gz", ".zst", ".bz2")  # about three times as large once read
    text = {u.path: (u.size or 0) * (3 if u.path.endswith(packed) else 1) for u in units if u.rows is None}
    needed = -(-(counted + sum(text.values()) // stage.BYTES_PER_ROW) // _EVENTS_PER_PARTITION)
    return max(2, needed if needed < 4 else -(-needed // 4) * 4)


def _run(job: Job) -> dict[str, Any]:
    """All passes -> what the manifest says about the data."""
    samples = _read_tables(job)
    job = job.having(known_items=samples.pop("hashes"))
    rows, settled = _read_events(job)
    parts = [n for n, s in enumerate(settled) if s["events"]]
    known = job.before.settled if job.before else {}
    touched = [n for n in parts if settled[n]["found"] or str(n) not in known]
    log_end = rows.pop("log_end")
    job = job.having(log_end=log_end)
    cuts = _time_cuts(job, parts) if job.data.protocol == "time" else (0, 0)

    fitted = _in_order(fit.fit_partition, (job, cuts), range(job.partitions), "prepare: counts, partitions")
    together = fit.merge(job.data, fitted)
    rows["users_without_attributes"] = together.unattributed
    if not together.positives:
        raise DataError(f"no training event is a retrieval positive ({job.config.positive_expression!r})")
    ranges = max(1, -(-(together.items + samples["items"]) // _ITEMS_PER_RANGE))
    bounds = ids.splitters([*(f.sample for f in fitted), *samples["samples"]], ranges)
    since = together.last_shown - int(job.data.recent_days * 86_400_000)
    plan = build.Plan(job, bounds, cuts, since, parts=parts)
    numbered = _in_order(build.number_items, plan, range(len(bounds) + 1), "prepare: item ids, ranges")
    new, rest, hashes = (np.array(column) for column in zip(*numbered, strict=True))
    numbers = ids.Numbers.of(job.before.n_train_items if job.before else 0, new, rest)
    key_fingerprint = None if job.pseudonyms is None else job.pseudonyms.fingerprint
    schema = fit.fit_schema(job.config, together, numbers.items, numbers.train, key_fingerprint)
    rest_hash = sum(int(h) for h in hashes) % 2**64
    plan = replace(plan, numbers=numbers, schema=schema)
    if _only_touched_differ(job, schema, cuts, rest_hash):
        plan = replace(plan, touched=frozenset(touched))
    log.info("prepare: windows of %d of %d partitions are made", len(parts if plan.touched is None else touched), len(parts))

    counted = _in_order(build.build_windows, plan, parts, "prepare: windows, partitions")
    rows |= {key: sum(c[key] for c in counted) for key in counted[0]}
    if not rows["train_windows"]:
        raise DataError("no training events: the split leaves nothing to train on; check data.protocol and data.history")
    described = _in_order(build.build_range, plan, range(len(bounds) + 1), "prepare: catalogue, ranges")
    schema = schema.model_copy(update={"item_features": build.fit_item_features(job.data, described)})
    plan = replace(plan, schema=schema)
    _in_order(build.assemble_catalogue, plan, [0], "prepare: catalogue, files")
    storage.write_bytes(storage.join(job.prefix, "schema.json"), schema.model_dump_json(indent=1).encode())
    return {
        "rows": rows,
        "cuts": list(cuts),
        "log_end": log_end,
        "settled": {str(n): {k: v for k, v in s.items() if k != "found"} for n, s in enumerate(settled)},
        "parts": {str(n): c for n, c in zip(parts, counted, strict=True)},
        "rest_hash": str(rest_hash),
        "pseudonym_key": key_fingerprint,
        "n_train_items": numbers.train,
        "windows_made": len(parts if plan.touched is None else touched),
    }


def _only_touched_differ(job: Job, schema: LogSchema, cuts: tuple[int, int], rest_hash: int) -> bool:
    """Whether partitions without new rows have the windows that they had: the same split, numbers, transforms, users
    table, and no label that has matured since."""
    before = job.before
    if before is None or not before.same_users or (maturity_hours(job.data) and before.log_end != job.log_end):
        return False
    old = LogSchema.model_validate_json(storage.read_bytes(storage.join(before.prefix, "schema.json")))
    # statistics of labels and actions, and vocabularies of items, are not part of any window
    fitted = schema.model_copy(update={"labels": old.labels, "actions": old.actions, "item_features": old.item_features})
    return old == fitted and before.cuts == cuts and before.rest_hash == rest_hash


def _in_order(task: Callable[[Any, Item], R], shared: Any, items: Sequence[Item], what: str) -> list[R]:
    """Results of a task on every item, in the order of the items."""
    return [out for _, out in sorted(runtime.for_each(task, shared, list(items), what), key=lambda found: found[0])]


def _read_tables(job: Job) -> dict[str, Any]:
    """The tables of items and users -> sorted hashes of item ids, samples of them, their number."""
    places = [(what, n) for what in ("items", "users") for n in range(len(job.units.get(what, ())))]
    found = [out for _, out in sorted(runtime.for_each(stage.read_table_unit, job, places, "prepare: tables, pieces"))]
    kept = [out for (what, _), out in zip(places, found, strict=True) if what == "items"]
    hashes = None
    if job.data.items is not None and job.data.unknown_items == "quarantine":
        hashes = np.sort(np.concatenate([np.zeros(0, np.uint64), *[out["hashes"] for out in kept]]))
    return {"hashes": hashes, "samples": [out["sample"] for out in kept], "items": sum(out["rows"] for out in kept)}


def _read_events(job: Job) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """Pass 1 -> row counts and the time of the log's newest row; what was settled in each partition."""
    units = job.units["interactions"]
    groups = stage.groups_of_units(units)
    log.info("prepare: %d pieces of the log, read by %d tasks, into %d partitions", len(units), len(groups), job.partitions)
    read = _in_order(stage.read_events_units, job, groups, "prepare: log, tasks")
    _check_unit_of_time(job, [r for r in read if r["good"]])
    settled = _in_order(stage.settle_partition, job, range(job.partitions), "prepare: events, partitions")
    storage.delete(job.work("events"))
    if job.before is not None:
        for path in storage.list_files(storage.join(job.before.prefix, "quarantine"), ".parquet"):
            name = path.rsplit("/", 1)[1]
            storage.copy(storage.join(job.before.prefix, "quarantine", name), storage.join(job.prefix, "quarantine", name))
    good, found = sum(s["events"] for s in settled), sum(s["found"] for s in settled)
    assert found == sum(r["good"] for r in read), (found, read)
    quarantined, reasons, first = _quarantine(job)
    forgotten = (job.before.forgotten if job.before else 0) + sum(r["forgotten"] for r in read)
    counted: Counter[str] = Counter()  # what a long log's join says; no key where the log is wide
    for s in settled:
        counted.update({key: n for key, n in s.items() if key not in ("events", "found")})
    read_rows = good + quarantined + counted["matched"] + forgotten
    assert read_rows == (job.before.read if job.before else 0) + sum(r["read"] for r in read), (read_rows, job.before, read)
    if not read_rows:
        raise DataError(f"interactions: {job.data.interactions.path} has no rows")
    share = quarantined / read_rows
    if share > job.data.max_bad_share:
        worst = "; ".join(f"{n} × {r}" for r, n in reasons.most_common(5))
        raise DataError(
            f"{quarantined} of {read_rows} rows ({share:.1%}) are bad, more than data.max_bad_share "
            f"{job.data.max_bad_share:.1%}; nothing was published. Reasons: {worst}. First: {first}. "
            f"All of them: {storage.join(job.prefix, 'quarantine')}"
        )
    rows = {
        "read": read_rows,
        "events": good,
        "quarantined": quarantined,
        "reasons": dict(sorted(reasons.items())),
        "forgotten": forgotten,
        **counted,
        "log_end": max([r["latest"] for r in read if r["good"]] + ([job.before.log_end] if job.before else []), default=0),
    }
    return rows, settled


def _check_unit_of_time(job: Job, read: list[dict[str, Any]]) -> None:
    if not read or job.data.time_unit != "ms":
        return
    earliest, latest = min(r["earliest"] for r in read), max(r["latest"] for r in read)
    if _SECONDS_LIKE_MS[0] <= earliest and latest <= _SECONDS_LIKE_MS[1]:
        raise DataError(
            f"interactions: timestamps from {earliest} to {latest} read as milliseconds all lie in early 1970; "
            "they look like seconds: set data.time_unit: s"
        )


def _quarantine(job: Job) -> tuple[int, Counter[str], dict[str, Any] | None]:
    """How many rows are in quarantine, why, and the first of them; file by file."""
    root = storage.join(job.prefix, "quarantine")
    reasons: Counter[str] = Counter()
    rows, first = 0, None
    filesystem, _ = storage.resolve(root)
    for path in storage.list_files(root, ".parquet") if storage.exists(root) else []:
        table = pq.read_table(path, filesystem=filesystem, partitioning=None)
        reasons.update(table["reason"].to_pylist())
        first = first or table.slice(0, 1).to_pylist()[0]
        rows += len(table)
    return rows, reasons, first


def _time_cuts(job: Job, parts: list[int]) -> tuple[int, int]:
    """Times before which the configured shares of the events have passed: exact, by days, then by the seconds of the
    days that matter."""
    days, seconds = fit.Counts(), fit.Counts()
    for _, found in runtime.for_each(fit.count_days, job, parts, "prepare: days, partitions"):
        days.add(*found)
    wanted = fit.days_of_cuts(days, job.data.time_split)
    for _, found in runtime.for_each(fit.count_seconds, (job, wanted), parts, "prepare: times, partitions"):
        seconds.add(*found)
    return fit.cuts_of(days, seconds, job.data.time_split)


def _test_hash(prefix: str, rows: dict[str, Any]) -> str:
    """SHA-256 of the lines `user,item` of the test targets, users in numerical order where they are numbers.

    Of a log with millions of them, or of items: of the test windows' files instead, which depend on the number of
    partitions too."""
    catalogue = storage.join(prefix, "catalogue.parquet")
    if max(rows["test_targets"], storage.rows(catalogue)) > _TEST_HASH_TARGETS:
        return storage.file_fingerprint(storage.join(prefix, "windows", "test"))
    table = storage.read_table(storage.join(prefix, "windows", "test"), ["user_id", "target_item"])
    item_ids = storage.read_table(catalogue, ["item_id"])["item_id"].to_pylist()
    pairs = [(u, item_ids[i]) for u, items in zip(table[0].to_pylist(), table[1].to_pylist(), strict=True) for i in items]
    numeric = all(u.isdigit() for u, _ in pairs)
    pairs.sort(key=lambda p: int(p[0]) if numeric else p[0])  # type: ignore[arg-type, return-value]
    return storage.sha256("\n".join(f"{u},{i}" for u, i in pairs))
