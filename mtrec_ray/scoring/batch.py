"""Batch scoring by Ray Data actors through the predictor: lists, states and profiles of users, similar items."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data.partition import user_partition
from mtrec_ray.data.sources import id_strings
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.scoring.shards import Output
from mtrec_ray.scoring.tables import OF_USERS, profile_table, score_table, similar_table, state_table, timed
from mtrec_ray.training.worker import load_schema

log = logging.getLogger(__name__)

ITEMS = 10_000
"""Items of a shard of similar items."""


@dataclass(frozen=True)
class Wanted:
    """Users of a file."""

    parts: dict[int, list[str]]
    """Partition -> its users, sorted."""
    duplicates: int
    digest: str

    @property
    def count(self) -> int:
        return sum(map(len, self.parts.values()))


def read_users(config: RunConfig, data: storage.Directory) -> Wanted | None:
    """Users to score, by the ids that the prepared data hold; None for all of the store. Raises ScoringError, StorageError."""
    uri = config.scoring.users
    if uri is None:
        return None
    table = storage.read_table(uri)
    if "user_id" not in table.column_names:
        raise ScoringError(f"scoring.users: {uri} has no column user_id; it has {table.column_names}")
    ids = id_strings(table["user_id"]).combine_chunks()
    if ids.null_count:
        first = pc.index(ids.is_null(), True).as_py()
        raise ScoringError(f"scoring.users: {uri} has {ids.null_count} row(s) without user_id; the first is row {first}")
    if not len(ids):
        raise ScoringError(f"scoring.users: {uri} has no rows; leave it out to score every user")
    manifest, settings = data.manifest, config.data.pseudonyms
    if settings is not None:
        ids = Pseudonyms.load(settings, manifest["pseudonym_key"]).column(ids)
        ids = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
    distinct = ids.unique().sort()
    number = user_partition(distinct, int(manifest["partitions"]))
    parts = {int(n): distinct.filter(pa.array(number == n)).to_pylist() for n in np.unique(number)}
    return Wanted(parts, len(ids) - len(distinct), storage.fingerprint(distinct.to_pylist()))


class _Actor:
    """One predictor per actor; a row is one part of the store and becomes one shard."""

    def __init__(self, bundle_uri: str, root: str, identity: dict[str, Any], batch_users: int, text_prefix: str | None) -> None:
        torch.set_num_threads(1)
        self.predictor = bundle.load(bundle_uri, verify=False)
        self.output, self.k, self.batch_users = Output(root, identity), int(identity["k"]), batch_users
        self.what = identity.get("what", "lists")
        self.answer_strangers = identity.get("unknown_users") != "skip"
        if text_prefix is not None:
            self.predictor.event_texts.known = EventTexts.open(text_prefix)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        row = item["row"]
        seconds: dict[str, float] = {}
        strangers: list[str] = []
        if row["items"] is not None:
            begin, end = row["items"]
            similar = similar_table(self.predictor, begin, end, self.k, self.batch_users, seconds)
            self.output.write(shard_name(row["part"]), similar, {"items": end - begin, "seconds": seconds})
            return {"items": end - begin}
        with timed(seconds, "read"):
            store = storage.read_table(row["part"]) if row["there"] else NO_STORE
            if row["users"] is not None:
                asked = pa.array(list(row["users"]), pa.string())
                store = store.filter(pc.is_in(store["user_id"], value_set=asked))
                strangers = asked.filter(pc.invert(pc.is_in(asked, value_set=store["user_id"].combine_chunks()))).to_pylist()
        answered = strangers if self.answer_strangers else []
        if self.what == "lists":
            table, fallbacks = score_table(self.predictor, store, self.k, self.batch_users, seconds, answered)
        else:
            make = {"states": state_table, "profiles": profile_table}[self.what]
            table, fallbacks = make(self.predictor, store, self.batch_users, seconds, answered)
        facts = {"users": len(store) + len(answered), "unknown": len(strangers), "fallbacks": fallbacks, "seconds": seconds}
        self.output.write(shard_name(row["part"]), table, facts)
        return {"users": len(store) + len(strangers)}


NO_STORE = pa.table({"user_id": pa.array([], pa.string())})


class ScoringError(ValueError):
    """Users that cannot be read, or an output that the run does not have."""


def shard_name(part: str) -> str:
    return part.rsplit("/", 1)[1].removesuffix(".parquet")


def _parts(data: storage.Directory, wanted: Wanted | None) -> list[dict[str, Any]]:
    """Parts of the store, and of each the users to score (None: all)."""
    parts = storage.list_files(data.path("store"), ".parquet")
    if wanted is None:
        return [{"part": p, "there": True, "users": None, "items": None} for p in parts]
    there = {shard_name(p): p for p in parts}
    names = {number: f"part-{number:05d}" for number in wanted.parts}
    return [
        {"part": there.get(name, f"/{name}.parquet"), "there": name in there, "users": wanted.parts[number], "items": None}
        for number, name in names.items()
    ]


def _ranges(items: int) -> list[dict[str, Any]]:
    """Ranges of the catalogue's positions, each a shard."""
    bounds = [(b, min(b + ITEMS, items)) for b in range(0, items, ITEMS)]
    return [{"part": f"/part-{n:05d}.parquet", "there": False, "users": None, "items": list(r)} for n, r in enumerate(bounds)]


def check_output(config: RunConfig, what: str) -> None:
    """Raises ScoringError, NoRetrievalError for an output that the run's tasks do not give."""
    if what == "lists":
        config.require_retrieval("batch scoring")
    if what == "profiles" and not any(t.kind == "profile" for t in config.tasks.values()):
        raise ScoringError("profiles: the run has no task of kind profile; add one and train again")


def score(
    config: RunConfig,
    data: storage.Directory,
    bundle_root: str,
    root: str,
    text_prefix: str | None = None,
    what: str = "lists",
) -> dict[str, Any]:
    """Top lists (or states, or profiles) of every user of the store, or of those of a file, or similar items of every item, as
    ROOT/part-*.parquet -> {"users", "unknown", "items", "rows", "fallbacks", "bytes", "seconds"}.

    A part of the store is a shard; what a killed call had finished is not done again, with whatever number of workers, and
    what was published before stays until all of the new one is there (shards.py). text_prefix: of the encode stage, so that the
    texts of histories are not encoded again.
    """
    check_output(config, what)
    of_users = what in OF_USERS
    wanted = read_users(config, data) if of_users else None
    identity: dict[str, Any] = {
        "bundle": storage.Directory(bundle_root).manifest["fingerprint"],
        "data": data.manifest["inputs"],
        "k": config.scoring.k,
    }
    if what != "lists":
        identity["what"] = what
    if wanted is not None:
        identity |= {"users": wanted.digest, "unknown_users": config.scoring.unknown_users}
        log.info("score: %d users of %s, %d doubled", wanted.count, config.scoring.users, wanted.duplicates)
    output = Output(root, identity)
    manifest = output.published()
    if manifest is not None:
        log.info("score: reused %s", root)
        storage.delete(storage.join(root, "_draft"))
        return dict(manifest["counts"])
    n_items, n_users = load_schema(data.prefix).n_items, int(data.manifest["rows"]["users"])
    parts = _parts(data, wanted) if of_users else _ranges(n_items)
    done = output.begin()
    missing = [p for p in parts if shard_name(p["part"]) not in done]
    unit = "users" if of_users else "items"
    before = sum(int(entry[unit]) for entry in done.values())
    if done:
        log.info("score: %d of %d shards (%d %s) were finished by a run before", len(done), len(parts), before, unit)
    if missing:
        dataset = ray.data.from_items([{"row": p} for p in missing], override_num_blocks=len(missing)).map(
            _Actor,
            fn_constructor_args=(bundle_root, root, identity, config.scoring.batch_users, text_prefix),
            compute=ray.data.ActorPoolStrategy(size=min(config.scoring.workers, len(missing))),
        )
        total = wanted.count if wanted is not None else n_users if of_users else n_items
        progress = runtime.Progress(unit, total, before)
        runtime.collect(dataset, "score: shards", len(missing), progress=progress)
    counts = dict(output.publish([shard_name(p["part"]) for p in parts])["counts"])
    log.info("score: %s", counts)
    return counts
