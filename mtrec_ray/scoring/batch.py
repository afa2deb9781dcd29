"""Batch scoring: top-k per user of the history store, by Ray Data actors through the predictor."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
from mtrec_ray.predictor import History, Predictor
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.retrieval.exact import NONE
from mtrec_ray.scoring.shards import Output
from mtrec_ray.serving.history import histories_from_table

log = logging.getLogger(__name__)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add what a stage takes."""
    started = time.perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - started


def score_table(
    predictor: Predictor,
    store: pa.Table,
    k: int,
    batch_users: int,
    seconds: dict[str, float] | None = None,
    strangers: Sequence[str] = (),
) -> tuple[pa.Table, int]:
    """Rows of the history store -> (user_id, item_id, rank, score, one column per task; users in the store's
    order, ranks from 1; and the number of users answered by the popularity list).

    seconds: gets what the stages took. strangers: users without a row in the store, behind those that have one.
    """
    seconds = {} if seconds is None else seconds
    pieces, fallbacks = [], 0
    predictor.config.require_retrieval("batch scoring")
    names = [str(predictor.retrieval_name), *predictor.model.pointwise]
    ids = pa.array(predictor.item_ids, pa.string())
    for user_ids, histories in _blocks(store, strangers, batch_users):
        with timed(seconds, "histories"):
            encoded = predictor.encode_histories(histories())
        with timed(seconds, "states"):
            state_BD = predictor.encode_state(encoded.batch)
        with timed(seconds, "retrieve"):
            candidates = predictor.retrieve(state_BD, encoded.batch.length_B, encoded.seen, k)
        with timed(seconds, "heads"):
            predictions = predictor.score(state_BD, candidates.item_BK, predictor.encode_context([{}] * len(user_ids)))
            ranked = predictor.finalise(candidates, predictions, k)
        fallbacks += int((encoded.batch.length_B == 0).sum())
        item_BK = ranked.item_BK.numpy()
        keep = (item_BK != NONE).ravel()
        B, K = item_BK.shape
        columns: dict[str, Any] = {
            "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), K)[keep])),
            "item_id": ids.take(pa.array(item_BK.ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(ranked.score_BK.numpy().ravel()[keep]),
        }
        columns |= {n: pa.array(ranked.tasks_BK[n].numpy().ravel()[keep]) for n in names}
        pieces.append(pa.table(columns))
    empty: dict[str, Any] = {"user_id": pa.string(), "item_id": pa.string(), "rank": pa.int32()}
    empty |= dict.fromkeys(["score", *names], pa.float32())
    table = pa.concat_tables(pieces) if pieces else pa.schema(empty).empty_table()
    return table.replace_schema_metadata({"bundle": predictor.fingerprint}), fallbacks


def _blocks(store: pa.Table, strangers: Sequence[str], batch_users: int) -> Iterator[tuple[pa.Array, Callable[[], list[History]]]]:
    """(user ids, what gives their histories), so many users at a time."""
    for start in range(0, len(store), batch_users):
        block = store.slice(start, batch_users)
        yield block["user_id"].combine_chunks(), partial(histories_from_table, block)
    for start in range(0, len(strangers), batch_users):
        some = pa.array(strangers[start : start + batch_users], pa.string())
        yield some, partial(list, [History()] * len(some))


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
        self.answer_strangers = identity.get("unknown_users") != "skip"
        if text_prefix is not None:
            self.predictor.event_texts.known = EventTexts.open(text_prefix)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        row = item["row"]
        seconds: dict[str, float] = {}
        strangers: list[str] = []
        with timed(seconds, "read"):
            store = storage.read_table(row["part"]) if row["there"] else NO_STORE
            if row["users"] is not None:
                asked = pa.array(list(row["users"]), pa.string())
                store = store.filter(pc.is_in(store["user_id"], value_set=asked))
                strangers = asked.filter(pc.invert(pc.is_in(asked, value_set=store["user_id"].combine_chunks()))).to_pylist()
        answered = strangers if self.answer_strangers else []
        table, fallbacks = score_table(self.predictor, store, self.k, self.batch_users, seconds, answered)
        facts = {"users": len(store) + len(answered), "unknown": len(strangers), "fallbacks": fallbacks, "seconds": seconds}
        self.output.write(shard_name(row["part"]), table, facts)
        return {"users": len(store) + len(strangers)}


NO_STORE = pa.table({"user_id": pa.array([], pa.string())})


class ScoringError(ValueError):
    """Users that cannot be read."""


def shard_name(part: str) -> str:
    return part.rsplit("/", 1)[1].removesuffix(".parquet")


def _parts(data: storage.Directory, wanted: Wanted | None) -> list[dict[str, Any]]:
    """Parts of the store, and of each the users to score (None: all)."""
    parts = storage.list_files(data.path("store"), ".parquet")
    if wanted is None:
        return [{"part": p, "there": True, "users": None} for p in parts]
    there = {shard_name(p): p for p in parts}
    names = {number: f"part-{number:05d}" for number in wanted.parts}
    return [
        {"part": there.get(name, f"/{name}.parquet"), "there": name in there, "users": wanted.parts[number]}
        for number, name in names.items()
    ]


def score(
    config: RunConfig, data: storage.Directory, bundle_root: str, root: str, text_prefix: str | None = None
) -> dict[str, Any]:
    """Top lists of every user of the store, or of those of a file, as ROOT/part-*.parquet -> {"users", "unknown", "rows",
    "fallbacks", "bytes", "seconds"}.

    A part of the store is a shard; what a killed call had finished is not done again, with whatever number of workers, and
    what was published before stays until all of the new one is there (shards.py). text_prefix: of the encode stage, so that the
    texts of histories are not encoded again.
    """
    wanted = read_users(config, data)
    identity: dict[str, Any] = {
        "bundle": storage.Directory(bundle_root).manifest["fingerprint"],
        "data": data.manifest["inputs"],
        "k": config.scoring.k,
    }
    if wanted is not None:
        identity |= {"users": wanted.digest, "unknown_users": config.scoring.unknown_users}
        log.info("score: %d users of %s, %d doubled", wanted.count, config.scoring.users, wanted.duplicates)
    output = Output(root, identity)
    manifest = output.published()
    if manifest is not None:
        log.info("score: reused %s", root)
        storage.delete(storage.join(root, "_draft"))
        return dict(manifest["counts"])
    parts = _parts(data, wanted)
    done = output.begin()
    missing = [p for p in parts if shard_name(p["part"]) not in done]
    before = sum(int(entry["users"]) for entry in done.values())
    if done:
        log.info("score: %d of %d shards (%d users) were finished by a run before", len(done), len(parts), before)
    if missing:
        dataset = ray.data.from_items([{"row": p} for p in missing], override_num_blocks=len(missing)).map(
            _Actor,
            fn_constructor_args=(bundle_root, root, identity, config.scoring.batch_users, text_prefix),
            compute=ray.data.ActorPoolStrategy(size=min(config.scoring.workers, len(missing))),
        )
        total = int(data.manifest["rows"]["users"]) if wanted is None else wanted.count
        progress = runtime.Progress("users", total, before)
        runtime.collect(dataset, "score: shards", len(missing), progress=progress)
    counts = dict(output.publish([shard_name(p["part"]) for p in parts])["counts"])
    log.info("score: %s", counts)
    return counts
