"""Pass 3 of prepare: items get their numbers, partitions become windows and histories, ranges become the catalogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray import feature_fit, storage
from mtrec_ray.config import DataConfig
from mtrec_ray.data import ids, windows
from mtrec_ray.data.catalogue import catalogue_rows, item_columns
from mtrec_ray.data.events import Job, read_events, users_of
from mtrec_ray.data.fit import profile_codes, split_events, to_events
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.maturity import maturity_hours
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.features import CategoricalSpec, FeatureError, MultihotSpec
from mtrec_ray.item_features import column_name
from mtrec_ray.schema import LogSchema

SPLITS = {windows.TRAIN: "train", windows.VALID: "valid", windows.TEST: "test"}
_CODES = pa.schema([("kind", pa.int8()), ("rank", pa.int64())])
_RECENT = pa.schema([("item_id", pa.string()), ("recent", pa.int64())])
_LIST_ENTRIES = 8 << 20
"""List entries of windows that are in memory at once."""


@dataclass(frozen=True)
class Plan:
    """What the tasks of this pass know beside the job."""

    job: Job
    bounds: list[str]
    """Splitters of the ranges of item ids."""
    cuts: tuple[int, int] = (0, 0)
    recent_since: int = 0
    numbers: ids.Numbers | None = None
    schema: LogSchema | None = None
    parts: list[int] = field(default_factory=list)
    """Partitions that have events."""
    touched: frozenset[int] | None = None
    """Partitions whose windows differ from those of before the append; None: all."""


def _range(plan: Plan, kind: str, number: int) -> str:
    return plan.job.work(kind, f"range-{number:05d}.parquet")


# --------------------------------------------------------------------------- items


def number_items(plan: Plan, which: int) -> tuple[int, int, int]:
    """Number the items of one range, and tell every partition what its own became -> (new training items, others, sum
    of the others' hashes)."""
    job = plan.job
    lists = [ids.share(storage.read_table(job.work("distinct", f"part-{p:05d}.parquet")), plan.bounds, which) for p in plan.parts]
    others = [ids.share(t, plan.bounds, which)["item_id"].combine_chunks() for t in _item_units(plan, ["item_id"])]
    before = None
    if job.before is not None:
        table = storage.read_table(storage.join(job.before.prefix, "catalogue.parquet"), ["item_id"])
        table = table.slice(0, job.before.n_train_items)
        table = table.append_column("position", pa.array(np.arange(len(table))))
        before = ids.share(table, plan.bounds, which)
    found = ids.number_range(lists, others, before)
    codes = [pa.table([pa.array(found.kind[c]), pa.array(found.rank[c])], schema=_CODES) for c in found.codes]
    storage.write_batches(job.work("codes", f"range-{which:05d}.arrow"), _CODES, map(storage.one_batch, codes))
    columns = [found.item_ids, pa.array(found.kind), pa.array(found.rank), pa.array(found.count)]
    storage.write_table(_range(plan, "numbers", which), pa.table(columns, names=["item_id", "kind", "rank", "count"]))
    rest = found.item_ids.filter(pa.array(found.kind == ids.REST))
    return int((found.kind == ids.NEW).sum()), len(rest), int(hash_ids(rest).sum(dtype=np.uint64))


def _item_units(plan: Plan, columns: list[str]) -> Iterator[pa.Table]:
    """The items table, unit by unit; one of them is in memory."""
    root = plan.job.work("items")
    for path in storage.list_files(root, ".parquet") if plan.job.data.items is not None else ():
        yield storage.read_table(storage.join(root, path.rsplit("/", 1)[1]), columns)


def positions_of(plan: Plan, number: int) -> NDArray[np.int32]:
    """Catalogue positions of a partition's distinct items."""
    assert plan.numbers is not None
    place, found = plan.parts.index(number), []
    root = plan.job.work("codes")
    for which in range(len(plan.bounds) + 1):
        batch = storage.read_batch(storage.join(root, f"range-{which:05d}.arrow"), place)
        found.append(plan.numbers.positions(batch["kind"].to_numpy(), batch["rank"].to_numpy(), which))
    return np.concatenate(found).astype(np.int32)


def build_range(plan: Plan, which: int) -> dict[str, pa.Table]:
    """Catalogue rows of one range of items, their features as texts -> what the trained ones say of each (feature_fit.py)."""
    job = plan.job
    numbered = storage.read_table(_range(plan, "numbers", which))
    item_ids = numbered["item_id"].combine_chunks()
    total = np.zeros(len(item_ids), np.int64)
    for part in plan.parts:
        recent = ids.share(storage.read_table(job.work("recent", f"part-{part:05d}.parquet")), plan.bounds, which)
        total[pc.index_in(recent["item_id"].combine_chunks(), value_set=item_ids).to_numpy()] += recent["recent"].to_numpy()
    items = None
    if job.data.items is not None:
        shares = [ids.share(t, plan.bounds, which) for t in _item_units(plan, item_columns(job.data))]
        items = pa.concat_tables(shares) if shares else None
    kind = numbered["kind"].to_numpy()
    trained = kind != ids.REST
    rows = catalogue_rows(job.data, items, item_ids, trained, numbered["count"].to_numpy(), np.where(trained, total, 0))
    for name in ("kind", "rank"):
        rows = rows.append_column(name, numbered[name])
    storage.write_table(_range(plan, "catalogue", which), rows)
    known, nothing = rows.filter(rows["trained"]), np.zeros(0, np.int64)
    found = {}
    for name, feature in job.data.item_features.items():
        try:
            found[name] = feature_fit.count(feature.as_feature(), known[column_name(name)].combine_chunks(), nothing)
        except FeatureError as error:
            raise DataError(f"data.item_features.{name}: the column {error}") from None
    return found


def fit_item_features(data: DataConfig, parts: list[dict[str, pa.Table]]) -> tuple[CategoricalSpec | MultihotSpec, ...]:
    """What all ranges say -> vocabularies. Raises DataError for a column without two values."""
    out = []
    for name, feature in data.item_features.items():
        spec = feature_fit.fit(name, feature.as_feature(), feature_fit.merge(feature.as_feature(), [p[name] for p in parts]))
        assert isinstance(spec, CategoricalSpec | MultihotSpec)
        if len(spec.values) < 2:
            raise DataError(
                f"data.item_features.{name}: items with a training event have {len(spec.values)} value(s) that occur often enough, "
                "and at least two are needed; look at the column, its separator and min_count"
            )
        out.append(spec)
    return tuple(out)


def assemble_catalogue(plan: Plan, _: int) -> None:
    """catalogue.parquet in the order of positions, from the ranges, one after the other; item features become numbers."""
    assert plan.schema is not None
    specs = {column_name(s.name): s for s in plan.schema.item_features}

    def rows(kind: int) -> Iterator[pa.Table]:
        for which in range(len(plan.bounds) + 1):
            table = storage.read_table(_range(plan, "catalogue", which))
            yield table.filter(pc.equal(table["kind"], kind))

    def in_order() -> Iterator[pa.Table]:
        yield pa.concat_tables(rows(ids.OLD)).sort_by("rank")
        for kind in (ids.NEW, ids.REST):
            yield from rows(kind)

    def finished(table: pa.Table) -> pa.Table:
        for name, spec in specs.items():
            codes = spec.encode(table[name].combine_chunks())
            column = codes if isinstance(codes, pa.Array) else pa.array(codes)
            table = table.set_column(table.column_names.index(name), name, column)
        return table.drop_columns(["kind", "rank"])

    tables = (finished(table) for table in in_order())
    storage.write_tables(storage.join(plan.job.prefix, "catalogue.parquet"), tables)


# --------------------------------------------------------------------------- windows


def user_fold(user_ids: pa.Array) -> NDArray[np.int8]:
    """Users hashed into ten folds, for profiles."""
    hashed = pd.util.hash_array(user_ids.to_pandas().to_numpy(dtype=object), hash_key="mtrec_ray_folds!", categorize=False)
    return ((hashed >> np.uint64(32)) % np.uint64(10)).astype(np.int8)


def build_windows(plan: Plan, number: int) -> dict[str, int]:
    """Windows, moments and histories of one partition -> counts."""
    job, schema = plan.job, plan.schema
    assert schema is not None
    same = plan.touched is not None and number not in plan.touched
    table = read_events(job, number)
    assert len(table), f"{job.part('events', number)} has lost its events"
    events = to_events(job.config, table, job.log_end)
    split = split_events(job.data, events, plan.cuts)
    item_ids, codes = ids.sorted_dictionary(events.item_ids)
    if same:
        _write_recent(
            plan, number, item_ids, codes, (split == windows.TRAIN) & events.is_history & (events.time >= plan.recent_since)
        )
        return _as_before(job, number)
    item = positions_of(plan, number)[codes]
    encoded = {s.name: s.encode(events.context[s.name]) for s in schema.context if s.kind != "kept"}
    history = {f"history_context_{s.name}": encoded[s.name] for s in schema.history_features}
    targets = {f"target_context_{s.name}": encoded[s.name] for s in schema.request_features}
    kept = [s.name for s in schema.context if s.kind == "kept"]
    targets |= {f"target_kept_{n}": events.context[n].to_numpy(zero_copy_only=False) for n in kept}
    actions = [a.name for a in schema.actions]
    profile = profile_codes(job, schema, users_of(job, number), events.user_ids)
    fold = user_fold(events.user_ids)
    counts: dict[str, int] = {"users": len(events.user_ids)}
    for name in maturity_hours(job.data):
        counts[f"immature_{name}"] = int(np.isnan(events.labels[name]).sum() - np.isnan(table[name].to_numpy()).sum())
    for which, name in SPLITS.items():
        if which == windows.TRAIN:
            layout = windows.train_layout(events, split, schema.window, schema.same_time)
        else:
            layout = windows.moment_layout(events, split, which, schema.window, schema.same_time, schema.protocol)
        tables = (
            windows.windows_table(piece, events, item, split, history, targets, actions, profile, fold)
            for piece in layout.pieces(_LIST_ENTRIES)
        )
        storage.write_tables(job.part(f"windows/{name}", number), tables)
        counts |= {f"{name}_windows": len(layout), f"{name}_targets": len(layout.target_event)}
    layout = windows.store_layout(events, split, job.data.protocol, schema.window, schema.same_time)
    shown = [s.name for s in schema.history_features]
    stored = (windows.store_table(piece, events, actions, shown) for piece in layout.pieces(_LIST_ENTRIES))
    storage.write_tables(job.part("store", number), stored)

    recent = (split == windows.TRAIN) & events.is_history & (events.time >= plan.recent_since)
    _write_recent(plan, number, item_ids, codes, recent)
    return counts


def _write_recent(plan: Plan, number: int, item_ids: pa.Array, codes: NDArray[np.int64], recent: NDArray[np.bool_]) -> None:
    count = np.bincount(codes[recent], minlength=len(item_ids))
    there = np.flatnonzero(count)
    rows = pa.table([item_ids.take(pa.array(there)), pa.array(count[there])], schema=_RECENT)
    storage.write_table(plan.job.work("recent", f"part-{number:05d}.parquet"), rows)


def _as_before(job: Job, number: int) -> dict[str, int]:
    """Take a partition's windows and histories as they were before the append -> its counts."""
    assert job.before is not None
    for kind in (*(f"windows/{name}" for name in SPLITS.values()), "store"):
        storage.copy(storage.join(job.before.prefix, kind, f"part-{number:05d}.parquet"), job.part(kind, number))
    return job.before.parts[str(number)]
