"""prepare: sources -> validated events -> id maps and fitted transforms -> windows, as Ray Data jobs.

Three passes, each over independent pieces, each writing files named by the piece (a retried task writes the
same file again):

  1. units of the log are read and validated, bad rows quarantined, good rows sent to their user's partition,
     where they are sorted and duplicates quarantined                      -> events/part-*.parquet
  2. partitions are split; training counts and label statistics are summed  -> catalogue, schema.json
  3. partitions become windows, moments and the history store               -> windows/*, store/

Nothing is visible before the manifest is written.
"""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import ray

from mtrec_ray import runtime, storage
from mtrec_ray.config import DataConfig, RunConfig
from mtrec_ray.data import sources, windows
from mtrec_ray.data.catalogue import build_catalogue, read_items, read_users
from mtrec_ray.data.partition import user_partition
from mtrec_ray.data.validate import ITEM, QUARANTINE, TIME, USER, event_schema, needed_columns, quarantine_rows, validate
from mtrec_ray.expressions import Expression
from mtrec_ray.schema import AttributeSpec, ContextSpec, LabelStats, LogSchema, bin_names, fit_action

log = logging.getLogger(__name__)

ROW = sources.ROW
SPLITS = {windows.TRAIN: "train", windows.VALID: "valid", windows.TEST: "test"}
_BYTES_PER_PARTITION = 32 << 20


class DataError(ValueError):
    """A log that cannot be prepared; nothing has been published."""


def data_fingerprint(config: RunConfig) -> str:
    """Fingerprint of everything that prepared data depend on: the config's data part and the files' content."""
    data = config.data
    tables = [t for t in (data.interactions, data.items, data.users) if t is not None]
    return storage.fingerprint(
        {
            "schema_version": storage.SCHEMA_VERSION,
            "data": data.model_dump(mode="json"),
            "positive": config.positive_expression,
            "files": [storage.file_fingerprint(t.path) for t in tables],
        }
    )


def prepare(config: RunConfig, root: str) -> storage.Directory:
    """Prepare the log of a config into `root`; what is already there for the same inputs is reused.

    Raises SourceError, DataError: nothing is published then.
    """
    data = config.data
    directory = storage.Directory(root)
    needed = needed_columns(data)
    units = sources.list_units(data.interactions, needed, "interactions")
    items, users = read_items(data), read_users(data)
    inputs = data_fingerprint(config)
    if directory.is_published(inputs):
        log.info("prepare: reused %s", directory.root)
        return directory
    prefix = directory.begin(inputs)
    job = _Job(config, prefix, items, users)

    rows = _pass_events(job, units)
    cuts = _time_cuts(job, rows["events"]) if data.protocol == "time" else (0, 0)
    fitted = _pass_fit(job, cuts)
    catalogue, schema = _fit(job, fitted)
    storage.write_table(storage.join(prefix, "catalogue.parquet"), catalogue)
    storage.write_bytes(storage.join(prefix, "schema.json"), schema.model_dump_json(indent=1).encode())
    rows |= _pass_windows(job, cuts, catalogue, schema)
    if not rows["train_windows"]:
        raise DataError("no training events: the split leaves nothing to train on; check data.protocol and data.history")
    if not fitted["positives"]:
        raise DataError(f"no training event is a retrieval positive ({config.positive_expression!r})")
    rows["users_without_attributes"] = fitted["users_without_attributes"]
    directory.publish(
        inputs, kind="data", partitions=job.partitions, rows=rows, cuts=list(cuts), test_sha256=_test_hash(prefix, catalogue)
    )
    log.info("prepare: %s", rows)
    return directory


class _Job:
    """What every task of this job knows (sent to workers once)."""

    def __init__(self, config: RunConfig, prefix: str, items: pa.Table | None, users: pa.Table | None) -> None:
        self.config, self.prefix = config, prefix
        self.known_items = None if items is None else items["item_id"].combine_chunks()
        self.known_users = None if users is None else users["user_id"].combine_chunks()
        self.items, self.users = items, users
        self.partitions = 1

    @property
    def data(self) -> DataConfig:
        return self.config.data

    def part(self, kind: str, number: int) -> str:
        return storage.join(self.prefix, kind, f"part-{number:05d}.parquet")


# --------------------------------------------------------------------------- pass 1


def _pass_events(job: _Job, units: list[sources.Unit]) -> dict[str, Any]:
    filesystem, _ = storage.resolve(job.data.interactions.path)
    size = sum(filesystem.get_file_info(p).size or 0 for p in {u.path for u in units})
    job.partitions = job.data.partitions or max(2, -(-size // _BYTES_PER_PARTITION))
    ref = ray.put(job)

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        me: _Job = ray.get(ref)
        for number in batch["unit"]:
            yield from _read_and_validate(me, units[int(number)])

    def settle(group: pa.Table) -> pa.Table:
        return _settle_partition(ray.get(ref), group)

    dataset = ray.data.from_items([{"unit": u.number} for u in units], override_num_blocks=len(units))
    events = dataset.map_batches(read, batch_size=1).groupby("__part__", num_partitions=job.partitions)
    log.info("prepare: reading %.1f MiB in %d pieces into %d partitions", size / 2**20, len(units), job.partitions)
    grouped = events.map_groups(settle, batch_format="pyarrow")
    settled = runtime.collect(grouped, "prepare: events, partitions", job.partitions)
    good, found = sum(int(r["events"]) for r in settled), sum(int(r["found"]) for r in settled)
    if storage.exists(storage.join(job.prefix, "quarantine")):
        quarantine = storage.read_table(storage.join(job.prefix, "quarantine"))
        reasons: Counter[str] = Counter(quarantine["reason"].to_pylist())
    else:
        quarantine, reasons = QUARANTINE.empty_table(), Counter()
    read_rows = good + len(quarantine)
    duplicates = reasons.get("duplicate event", 0)
    assert found == good + duplicates, (found, good, duplicates)
    if not read_rows:
        raise DataError(f"interactions: {job.data.interactions.path} has no rows")
    share = len(quarantine) / read_rows
    if share > job.data.max_bad_share:
        worst = "; ".join(f"{n} × {r}" for r, n in reasons.most_common(5))
        sample = quarantine.slice(0, 1).to_pylist()[0]
        raise DataError(
            f"{len(quarantine)} of {read_rows} rows ({share:.1%}) are bad, more than data.max_bad_share "
            f"{job.data.max_bad_share:.1%}; nothing was published. Reasons: {worst}. First: {sample}. "
            f"All of them: {storage.join(job.prefix, 'quarantine')}"
        )
    return {"read": read_rows, "events": good, "quarantined": len(quarantine), "reasons": dict(sorted(reasons.items()))}


def _read_and_validate(job: _Job, unit: sources.Unit) -> Iterator[pa.Table]:
    rejected: list[pa.Table] = []
    schema = event_schema(job.data).append(pa.field("__part__", pa.int32()))
    yield schema.empty_table()
    for table, broken in sources.read_unit(job.data.interactions, unit, needed_columns(job.data)):
        good, bad = validate(table, job.data, unit.path, job.known_items, job.known_users)
        rejected.append(bad)
        if broken:
            rows, texts = zip(*broken, strict=True)
            why = ["wrong number of columns"] * len(rows)
            rejected.append(pa.table([pa.array(rows, pa.int64()), [unit.path] * len(rows), why, list(texts)], schema=QUARANTINE))
        part = user_partition(good[USER].to_pandas().to_numpy(dtype=object), job.partitions)
        yield good.append_column(schema.field("__part__"), pa.array(part))
    bad = pa.concat_tables(rejected) if rejected else QUARANTINE.empty_table()
    if len(bad):
        storage.write_table(job.part("quarantine", unit.number), bad)


def _settle_partition(job: _Job, group: pa.Table) -> pa.Table:
    """Sort a partition by (user, time, row), quarantine duplicates, write it."""
    number = int(group["__part__"][0].as_py())
    events = group.drop_columns(["__part__"]).sort_by([(USER, "ascending"), (TIME, "ascending"), (ROW, "ascending")])
    keys = [n for n in events.column_names if n != ROW]
    double = events.select(keys).to_pandas().duplicated().to_numpy()
    if double.any():
        reason = np.full(len(events), "duplicate event", dtype=object)
        bad = quarantine_rows(events, "", double, reason)
        storage.write_table(job.part("quarantine", 1_000_000 + number), bad)
        events = events.filter(pa.array(~double))
    storage.write_table(job.part("events", number), events)
    return pa.table({"events": [len(events)], "found": [len(group)]})


# --------------------------------------------------------------------------- pass 2


def _over_partitions(job: _Job, what: str, function: Any) -> list[dict[str, Any]]:
    """Run function(job, partition number, events table) -> dict on every partition, in parallel.

    what: the pass, for progress lines."""
    ref = ray.put(job)
    numbers = [int(p.rsplit("-", 1)[1].split(".")[0]) for p in storage.list_files(storage.join(job.prefix, "events"))]

    def run(row: dict[str, Any]) -> dict[str, Any]:
        me: _Job = ray.get(ref)
        number = int(row["part"])
        return {"out": pickle.dumps(function(me, number, storage.read_table(me.part("events", number))))}

    dataset = ray.data.from_items([{"part": n} for n in numbers], override_num_blocks=max(1, len(numbers)))
    return [pickle.loads(r["out"]) for r in runtime.collect(dataset.map(run), f"prepare: {what}, partitions", len(numbers))]


def _time_cuts(job: _Job, n_events: int) -> tuple[int, int]:
    """Times at which the given shares of events have passed: exact, by counting events per distinct second."""

    def count(me: _Job, number: int, table: pa.Table) -> dict[str, Any]:
        seconds, counts = np.unique(table[TIME].to_numpy() // 1000, return_counts=True)
        return {"seconds": seconds, "counts": counts}

    parts = _over_partitions(job, "times", count)
    seconds, inverse = np.unique(np.concatenate([p["seconds"] for p in parts]), return_inverse=True)
    totals = np.bincount(inverse, weights=np.concatenate([p["counts"] for p in parts]))
    passed = np.concatenate([[0], np.cumsum(totals)])[:-1] / n_events
    place = np.minimum(np.searchsorted(passed, np.array(job.data.time_split)), len(seconds) - 1)
    first, second = (int(s) * 1000 for s in seconds[place])
    if not seconds[0] * 1000 < first < second:
        raise DataError(
            f"protocol time: the log's times cannot be cut at shares {list(job.data.time_split)} "
            f"({len(seconds)} distinct second(s)); use protocol leave_one_out or other shares"
        )
    return first, second


def to_events(config: RunConfig, table: pa.Table) -> windows.Events:
    """A sorted events table -> arrays."""
    data = config.data
    encoded = table[USER].combine_chunks().dictionary_encode()
    labels64 = {n: table[n].to_numpy() for n in data.labels}
    history = Expression(data.history_expression)(labels64)
    positive = Expression(config.positive_expression)(labels64)
    return windows.Events(
        user_ids=encoded.dictionary,
        user=encoded.indices.to_numpy().astype(np.int64),
        time=table[TIME].to_numpy(),
        row=table[ROW].to_numpy(),
        item_ids=table[ITEM].combine_chunks(),
        is_history=np.nan_to_num(history) != 0,
        is_positive=np.nan_to_num(positive) != 0,
        labels={n: v.astype(np.float32) for n, v in labels64.items()},
        context={n: table[n].combine_chunks() for n in data.context},
    )


def split_events(data: DataConfig, events: windows.Events, cuts: tuple[int, int]) -> np.ndarray:
    match data.protocol:
        case "time":
            return windows.split_by_time(events, *cuts)
        case "leave_one_out":
            return windows.split_leave_one_out(events)
        case "user_holdout":
            return windows.split_by_user(events, *data.holdout)
        case "item_holdout":
            return windows.split_by_item(events, *data.holdout)
        case "random":
            return windows.split_at_random(events, data.folds, data.fold)


def _pass_fit(job: _Job, cuts: tuple[int, int]) -> dict[str, Any]:
    """Sums over training events: counts per item, label statistics, vocabularies."""

    def fit(me: _Job, number: int, table: pa.Table) -> dict[str, Any]:
        events = to_events(me.config, table)
        train = split_events(me.data, events, cuts) == windows.TRAIN
        shown = train & events.is_history
        labels = {}
        for name, values in events.labels.items():
            v = values[train & ~np.isnan(values)].astype(np.float64)
            labels[name] = (len(v), float(v.sum()), float((v**2).sum()))
        unattributed = 0
        if me.known_users is not None:
            unattributed = pc.sum(pc.invert(pc.is_in(events.user_ids, value_set=me.known_users))).as_py() or 0
        return {
            "items": _count(events.item_ids, train),
            "positives": int((train & events.is_positive).sum()),
            "shown_times": (events.item_ids.take(pa.array(np.flatnonzero(shown))), events.time[shown]),
            "all_items": pc.unique(events.item_ids).to_pylist(),
            "labels": labels,
            "context": {n: pc.unique(v.filter(pa.array(train))).to_pylist() for n, v in events.context.items()},
            "history": _count(events.item_ids, shown),
            "unattributed": unattributed,
        }

    parts = _over_partitions(job, "counts", fit)
    trained: Counter[str] = Counter()
    history: Counter[str] = Counter()
    for part in parts:
        trained.update(part["items"])
        history.update(part["history"])
    last = max((int(p["shown_times"][1].max()) for p in parts if len(p["shown_times"][1])), default=0)
    since = last - int(job.data.recent_days * 86_400_000)
    recent: Counter[str] = Counter()
    for part in parts:
        ids, times = part["shown_times"]
        recent.update(_count(ids, times >= since))
    sums = {n: np.sum([p["labels"][n] for p in parts], axis=0) for n in job.data.labels}
    return {
        "trained": trained,
        "history": history,
        "recent": recent,
        "positives": sum(p["positives"] for p in parts),
        "all_items": np.array(sorted({i for p in parts for i in p["all_items"]}), dtype=object),
        "labels": sums,
        "context": {n: sorted({v for p in parts for v in p["context"][n] if v is not None}) for n in job.data.context},
        "users_without_attributes": sum(p["unattributed"] for p in parts),
    }


def _count(ids: pa.Array, mask: np.ndarray) -> dict[str, int]:
    counted = pc.value_counts(ids.filter(pa.array(mask)))
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))


def _fit(job: _Job, fitted: dict[str, Any]) -> tuple[pa.Table, LogSchema]:
    data = job.data
    # the training catalogue is the items with a training event; popularity counts their history events
    counts = {i: fitted["history"].get(i, 0) for i in fitted["trained"]}
    catalogue = build_catalogue(data, job.items, counts, fitted["recent"], fitted["all_items"])
    labels = {}
    for name, (n, total, squares) in fitted["labels"].items():
        mean = total / n if n else 0.0
        variance = max(squares / n - mean**2, 0.0) if n else 0.0
        labels[name] = LabelStats(count=int(n), mean=mean, std=float(np.sqrt(variance)))
    for name, task in job.config.tasks.items():
        if task.kind in ("regression", "binary") and not labels[task.label].count:
            raise DataError(f"tasks.{name}: no training event has the label {task.label!r}")
    attributes = []
    for name, attribute in data.attributes.items():
        if attribute.bins is not None:
            classes = bin_names(attribute.bins)
        else:
            assert job.users is not None
            classes = tuple(sorted(v for v in pc.unique(job.users[attribute.column]).to_pylist() if v is not None))
        attributes.append(AttributeSpec(name=name, classes=classes))
    schema = LogSchema(
        window=data.window,
        same_time=data.same_time,
        exclude_seen=data.exclude_seen,
        protocol=data.protocol,
        actions=tuple(fit_action(n, data.labels[n].values, data.labels[n].kind, labels[n]) for n in data.action_names),
        labels=labels,
        context=tuple(ContextSpec(name=n, values=tuple(fitted["context"][n])) for n in data.context),
        attributes=tuple(attributes),
        n_items=len(catalogue),
        n_train_items=len(counts),
    )
    return catalogue, schema


# --------------------------------------------------------------------------- pass 3


def user_fold(user_ids: pa.Array) -> np.ndarray:
    """Users hashed into ten folds, for profiles."""
    hashed = pd.util.hash_array(user_ids.to_pandas().to_numpy(dtype=object), hash_key="mtrec_ray_folds!", categorize=False)
    return ((hashed >> np.uint64(32)) % np.uint64(10)).astype(np.int8)


def _profile(job: _Job, schema: LogSchema, user_ids: pa.Array) -> dict[str, np.ndarray]:
    out = {}
    for spec in schema.attributes:
        attribute = job.data.attributes[spec.name]
        assert job.users is not None and job.known_users is not None
        values = job.users[attribute.column].combine_chunks().take(pc.index_in(user_ids, value_set=job.known_users))
        if attribute.bins is None:
            codes = pc.index_in(values, value_set=pa.array(spec.classes, pa.string())).fill_null(-1).to_numpy()
        else:
            numbers = pd.to_numeric(values.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
            codes = np.where(np.isnan(numbers), -1, np.digitize(numbers, attribute.bins))
        out[spec.name] = codes.astype(np.int32)
    return out


def _pass_windows(job: _Job, cuts: tuple[int, int], catalogue: pa.Table, schema: LogSchema) -> dict[str, int]:
    item_ids = ray.put(catalogue["item_id"].combine_chunks())

    def build(me: _Job, number: int, table: pa.Table) -> dict[str, int]:
        events = to_events(me.config, table)
        split = split_events(me.data, events, cuts)
        item = pc.index_in(events.item_ids, value_set=ray.get(item_ids)).to_numpy().astype(np.int32)
        context = {spec.name: spec.encode(events.context[spec.name].to_pylist()) for spec in schema.context}
        actions = [a.name for a in schema.actions]
        profile, fold = _profile(me, schema, events.user_ids), user_fold(events.user_ids)
        length, same_time = schema.window, schema.same_time
        counts: dict[str, int] = {"users": len(events.user_ids)}
        for which, name in SPLITS.items():
            if which == windows.TRAIN:
                layout = windows.train_layout(events, split, length, same_time)
            else:
                layout = windows.moment_layout(events, split, which, length, same_time, schema.protocol)
            out = windows.windows_table(layout, events, item, split, context, actions, profile, fold)
            storage.write_table(me.part(f"windows/{name}", number), out)
            counts |= {f"{name}_windows": len(out), f"{name}_targets": len(layout.target_event)}
        layout = windows.store_layout(events, split, me.data.protocol, length, same_time)
        storage.write_table(me.part("store", number), windows.store_table(layout, events, actions))
        return counts

    parts = _over_partitions(job, "windows", build)
    return {key: sum(p[key] for p in parts) for key in parts[0]}


def _test_hash(prefix: str, catalogue: pa.Table) -> str:
    """SHA-256 of the lines `user,item` of the test targets, users in numerical order where they are numbers."""
    table = storage.read_table(storage.join(prefix, "windows", "test"), ["user_id", "target_item"])
    ids = catalogue["item_id"].to_pylist()
    pairs = [(u, ids[i]) for u, items in zip(table[0].to_pylist(), table[1].to_pylist(), strict=True) for i in items]
    numeric = all(u.isdigit() for u, _ in pairs)
    pairs.sort(key=lambda p: int(p[0]) if numeric else p[0])  # type: ignore[arg-type, return-value]
    return storage.sha256("\n".join(f"{u},{i}" for u, i in pairs))
