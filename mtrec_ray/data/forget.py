"""Removing a user from what a run has written. No Ray here: one user is in one partition.

Prepared data are published anew without the user (what does not change is linked), top lists lose the user's rows, vectors of
texts that nobody else wrote go, and a hash of the id is kept so that a later preparation of the same log leaves the user out.
Weights cannot forget: the bundles that were trained with the user are listed, to be trained again.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec_ray import lock, storage
from mtrec_ray.data import lineage
from mtrec_ray.data.ids import sorted_dictionary
from mtrec_ray.data.partition import user_partition
from mtrec_ray.encoders.event_texts import HASHES, VECTORS, EventTexts, hashes_of_events, write_event_texts
from mtrec_ray.scoring.shards import published_files, replace_shard
from mtrec_ray.scoring.tables import FOLDERS, OF_USERS
from mtrec_ray.training.worker import window_cache

_BY_USER = ("events", "rows", "store", "windows/train", "windows/valid", "windows/test")


@dataclass
class Forgotten:
    """What was removed, and what still knows the user."""

    rows: dict[str, int] = field(default_factory=dict)
    """Place -> rows removed."""
    bundles: list[str] = field(default_factory=list)
    """Bundles that were trained with the user's events."""


def forget(run: str, user_ids: Sequence[str], others: Sequence[str] = ()) -> Forgotten:
    """Remove users, by the ids that the prepared data hold (pseudonyms where those are used).

    run: a run directory, that of nightly.py with all its nights; others: further run directories or bundles to look for bundles
    trained on these data.
    Raises StorageError when nothing is prepared there.
    """
    directory = storage.Directory(storage.join(run, "data"))
    _ = directory.manifest  # raises before anything is written where nothing is prepared
    with lock.only_writer(directory.root):
        return _forget(run, directory, user_ids, others)


def _forget(run: str, directory: storage.Directory, user_ids: Sequence[str], others: Sequence[str]) -> Forgotten:
    manifest, prefix = directory.manifest, directory.prefix
    out = Forgotten()
    uri = storage.join(directory.root, lineage.FORGOTTEN)
    known = lineage.forgotten(directory.root) | {lineage.forgotten_hash(u) for u in user_ids}
    storage.write_json(uri, {"users": sorted(known), "pseudonym_key": manifest["pseudonym_key"]})
    covered = manifest["covered"] | {"forgotten": sorted(known)}
    out.bundles = trained_with([*_runs(run), *others], {manifest["inputs"], *manifest["ancestors"]})
    wanted = pa.array(sorted(set(user_ids)), pa.string())
    places = {int(n) for n in user_partition(wanted, manifest["partitions"])}
    numbers = {f"part-{n:05d}.parquet" for n in places}
    if not _known(directory, wanted, numbers):  # data and what was trained on them stay as they are
        directory.amend(covered=covered, covers=lineage.covers(covered))
        out = Forgotten()
        _forget_texts(run, directory, out)  # of a user that an earlier call, killed since, took out of the data
        return out
    inputs = storage.fingerprint([manifest["inputs"], sorted(known)])
    target = directory.begin(inputs)
    targets: dict[str, int] = {}
    for name in manifest["files"]:
        kind, _, file = name.rpartition("/")
        source = storage.join(prefix, name)
        if kind == "quarantine" or (kind in _BY_USER and file in numbers):
            table = storage.read_table(source)
            kept = table.filter(_others(table, wanted))
            out.rows[kind] = out.rows.get(kind, 0) + len(table) - len(kept)
            if "target_item" in table.column_names:
                targets[kind] = targets.get(kind, 0) + _entries(table["target_item"]) - _entries(kept["target_item"])
            if len(kept) or kind != "quarantine":
                storage.write_table(storage.join(target, name), _with_own_dictionaries(kept))
        else:
            storage.copy(source, storage.join(target, name))
    rows = _counts(manifest["rows"], out.rows, targets)
    meta = {k: v for k, v in manifest.items() if k not in ("schema_version", "inputs", "prefix", "files")}
    ancestors = [*manifest["ancestors"], manifest["inputs"]]
    for counts in ("parts", "settled"):  # an append counts these partitions anew
        meta[counts] = {n: c for n, c in manifest[counts].items() if int(n) not in places}
    meta |= {"covered": covered, "covers": lineage.covers(covered), "rows": rows, "ancestors": ancestors}
    directory.publish(inputs, **meta)
    for earlier in ancestors:  # data that were appended to may have been trained on too
        for split in ("train", "valid"):
            shutil.rmtree(window_cache(storage.join(directory.root, earlier[:16]), split), ignore_errors=True)
    for one in _runs(run):
        _forget_scores(one, wanted, out)
    _forget_texts(run, directory, out)
    return out


def _runs(run: str) -> list[str]:
    """The run, its nights, and what each of them was compared with."""
    uri = storage.join(run, "nightly.json")
    nights = storage.read_json(uri)["nights"] if storage.exists(uri) else []
    folders = [storage.join(run, "nights", n["name"]) for n in nights]
    return [run, *(place for folder in folders for place in (folder, storage.join(folder, "incumbent")))]


def _known(directory: storage.Directory, wanted: pa.Array, numbers: set[str]) -> bool:
    """Whether prepared data hold anything of the users."""
    for name in directory.manifest["files"]:
        kind, _, file = name.rpartition("/")
        if kind == "quarantine" or (kind == "store" and file in numbers):
            table = storage.read_table(directory.path(name), ["user_id", *(["raw"] if kind == "quarantine" else [])])
            if not pc.all(_others(table, wanted)).as_py():
                return True
    return False


def _others(table: pa.Table, wanted: pa.Array) -> pa.ChunkedArray:
    """Rows that are none of the wanted users'; of a row that is not even one, where its text does not name them."""
    others = pc.invert(pc.fill_null(pc.is_in(table["user_id"].cast(pa.string()), value_set=wanted), False))
    if "raw" in table.column_names:
        for user_id in wanted.to_pylist():
            unnamed = pc.and_(table["user_id"].is_null(), pc.match_substring(table["raw"], user_id))
            others = pc.and_(others, pc.invert(pc.fill_null(unnamed, False)))
    return others


def _with_own_dictionaries(table: pa.Table) -> pa.Table:
    """Dictionaries in the order of their values that hold what the table uses: an id would stay in them."""
    for place, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            values, codes = sorted_dictionary(table[column.name].cast(column.type.value_type))
            table = table.set_column(place, column.name, pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), values))
    return table


def _entries(lists: pa.ChunkedArray) -> int:
    return int(pc.sum(pc.list_value_length(lists)).as_py() or 0)


def _counts(rows: dict[str, Any], removed: dict[str, int], targets: dict[str, int]) -> dict[str, Any]:
    """Row counts of the manifest without what was removed; it stands under `forgotten`.

    What a long log's join says of late and unmatched rows, and how many labels are immature, is counted by the next
    preparation.
    """
    out = dict(rows)
    for kind, key in (("events", "events"), ("quarantine", "quarantined"), ("store", "users")):
        out[key] = rows[key] - removed.get(kind, 0)
    for split in ("train", "valid", "test"):
        out[f"{split}_windows"] = rows[f"{split}_windows"] - removed.get(f"windows/{split}", 0)
        out[f"{split}_targets"] = rows[f"{split}_targets"] - targets.get(f"windows/{split}", 0)
    events = removed.get("events", 0)
    read = removed.get("rows", events)  # of a long log, a row is an event or a label of one
    if "matched" in rows:
        out["matched"] = rows["matched"] - (read - events)
    out["forgotten"] = rows["forgotten"] + read + removed.get("quarantine", 0)
    return out


def _forget_scores(run: str, wanted: pa.Array, out: Forgotten) -> None:
    """Rows of the users leave the top lists, shard by shard; each shard is replaced as a whole."""
    for what in OF_USERS:
        root = storage.join(run, FOLDERS[what])
        if storage.exists(root):
            _forget_rows(root, FOLDERS[what], wanted, out)


def _forget_rows(root: str, place: str, wanted: pa.Array, out: Forgotten) -> None:
    for path in published_files(root):
        name = path.rsplit("/", 1)[1].removesuffix(".parquet")
        table = storage.read_table(storage.join(root, f"{name}.parquet"))
        kept = table.filter(_others(table, wanted))
        if len(kept) < len(table):
            out.rows[place] = out.rows.get(place, 0) + len(table) - len(kept)
            replace_shard(root, name, kept)
    storage.delete(storage.join(root, "_draft"))  # of a scoring that was killed


def _forget_texts(run: str, data: storage.Directory, out: Forgotten) -> None:
    """Vectors of texts that no event has any more leave the encode stage's."""
    text = storage.Directory(storage.join(run, "text"))
    try:
        old = EventTexts.open(text.prefix)
    except storage.StorageError:  # nothing is encoded, or by another version
        return
    if old is None:
        return
    names = [n for n, f in data.manifest["covered"]["data"]["context"].items() if f["kind"] == "text"]
    keep = np.isin(old.hash_K, hashes_of_events(data, names))
    if keep.all():
        return
    out.rows["text"] = int((~keep).sum())
    hash_K, vec_KE = old.hash_K[keep], old.vec_KE[keep]
    manifest, prefix = text.manifest, text.prefix
    inputs = storage.fingerprint([manifest["inputs"], data.manifest["inputs"]])
    target = text.begin(inputs)
    for name in manifest["files"]:
        if name not in (HASHES, VECTORS):
            storage.copy(storage.join(prefix, name), storage.join(target, name))
    write_event_texts(target, hash_K, vec_KE)
    meta = {k: v for k, v in manifest.items() if k not in ("schema_version", "inputs", "prefix", "files")}
    text.publish(inputs, **meta | {"event_texts": len(hash_K)})
    storage.delete(storage.join(text.root, "_shards"))  # of an encoding that was killed


def trained_with(runs: Sequence[str], inputs: set[str]) -> list[str]:
    """Published bundles that say they were trained on one of these data: `RUN/bundle (fingerprint)`."""
    out = []
    for run in runs:
        for root in (storage.join(run, "bundle"), run):
            uri = storage.join(root, "manifest.json")
            if storage.exists(uri):
                manifest = storage.read_json(uri)
                if manifest.get("kind") == "bundle" and manifest.get("data") in inputs:
                    out.append(f"{root} ({manifest['fingerprint'][:12]})")
    return out
