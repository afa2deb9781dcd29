"""Batch scoring: top-k per user of the history store, by Ray Data actors through the predictor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.predictor import Predictor
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
    predictor: Predictor, store: pa.Table, k: int, batch_users: int, seconds: dict[str, float] | None = None
) -> tuple[pa.Table, int]:
    """Rows of the history store -> (user_id, item_id, rank, score, one column per task; users in the store's
    order, ranks from 1; and the number of users answered by the popularity list).

    seconds: gets what the stages took.
    """
    seconds = {} if seconds is None else seconds
    pieces, fallbacks = [], 0
    predictor.config.require_retrieval("batch scoring")
    names = [str(predictor.retrieval_name), *predictor.model.pointwise]
    ids = pa.array(predictor.item_ids, pa.string())
    for start in range(0, len(store), batch_users):
        block = store.slice(start, batch_users)
        with timed(seconds, "histories"):
            encoded = predictor.encode_histories(histories_from_table(block))
        with timed(seconds, "states"):
            state_BD = predictor.encode_state(encoded.batch)
        with timed(seconds, "retrieve"):
            candidates = predictor.retrieve(state_BD, encoded.batch.length_B, encoded.seen, k)
        with timed(seconds, "heads"):
            predictions = predictor.score(state_BD, candidates.item_BK, predictor.encode_context([{}] * len(block)))
            ranked = predictor.finalise(candidates, predictions, k)
        fallbacks += int((encoded.batch.length_B == 0).sum())
        item_BK = ranked.item_BK.numpy()
        keep = (item_BK != NONE).ravel()
        B, K = item_BK.shape
        columns: dict[str, Any] = {
            "user_id": block["user_id"].combine_chunks().take(pa.array(np.repeat(np.arange(B), K)[keep])),
            "item_id": ids.take(pa.array(item_BK.ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(ranked.score_BK.numpy().ravel()[keep]),
        }
        columns |= {n: pa.array(ranked.tasks_BK[n].numpy().ravel()[keep]) for n in names}
        pieces.append(pa.table(columns))
    table = pa.concat_tables(pieces) if pieces else pa.table({})
    return table.replace_schema_metadata({"bundle": predictor.fingerprint}), fallbacks


class _Actor:
    """One predictor per actor; a row is one part of the store and becomes one shard."""

    def __init__(self, bundle_uri: str, root: str, identity: dict[str, Any], batch_users: int, text_prefix: str | None) -> None:
        torch.set_num_threads(1)
        self.predictor = bundle.load(bundle_uri, verify=False)
        self.output, self.k, self.batch_users = Output(root, identity), int(identity["k"]), batch_users
        if text_prefix is not None:
            self.predictor.event_texts.known = EventTexts.open(text_prefix)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        seconds: dict[str, float] = {}
        with timed(seconds, "read"):
            store = storage.read_table(row["part"])
        table, fallbacks = score_table(self.predictor, store, self.k, self.batch_users, seconds)
        facts = {"users": len(store), "fallbacks": fallbacks, "seconds": seconds}
        self.output.write(shard_name(row["part"]), table, facts)
        return {"users": len(store)}


def shard_name(part: str) -> str:
    return part.rsplit("/", 1)[1].removesuffix(".parquet")


def score(
    config: RunConfig, data: storage.Directory, bundle_root: str, root: str, text_prefix: str | None = None
) -> dict[str, Any]:
    """Top lists of every user of the store as ROOT/part-*.parquet -> {"users", "rows", "fallbacks", "bytes", "seconds"}.

    A part of the store is a shard; what a killed call had finished is not done again, with whatever number of workers, and
    what was published before stays until all of the new one is there (shards.py). text_prefix: of the encode stage, so that the
    texts of histories are not encoded again.
    """
    identity = {
        "bundle": storage.Directory(bundle_root).manifest["fingerprint"],
        "data": data.manifest["inputs"],
        "k": config.scoring.k,
    }
    output = Output(root, identity)
    manifest = output.published()
    if manifest is not None:
        log.info("score: reused %s", root)
        storage.delete(storage.join(root, "_draft"))
        return dict(manifest["counts"])
    parts = storage.list_files(data.path("store"), ".parquet")
    done = output.begin()
    missing = [p for p in parts if shard_name(p) not in done]
    before = sum(int(entry["users"]) for entry in done.values())
    if done:
        log.info("score: %d of %d shards (%d users) were finished by a run before", len(done), len(parts), before)
    if missing:
        dataset = ray.data.from_items([{"part": p} for p in missing], override_num_blocks=len(missing)).map(
            _Actor,
            fn_constructor_args=(bundle_root, root, identity, config.scoring.batch_users, text_prefix),
            compute=ray.data.ActorPoolStrategy(size=min(config.scoring.workers, len(missing))),
        )
        progress = runtime.Progress("users", int(data.manifest["rows"]["users"]), before)
        runtime.collect(dataset, "score: shards", len(missing), progress=progress)
    counts = dict(output.publish([shard_name(p) for p in parts])["counts"])
    log.info("score: %s", counts)
    return counts
