"""Batch scoring: top-k per user of the history store, by Ray Data actors through the predictor."""

from __future__ import annotations

import logging
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
from mtrec_ray.serving.history import histories_from_table

log = logging.getLogger(__name__)


def score_table(predictor: Predictor, store: pa.Table, k: int, batch_users: int) -> tuple[pa.Table, int]:
    """Rows of the history store -> (user_id, item_id, rank, score, one column per task; users in the store's
    order, ranks from 1; and the number of users answered by the popularity list)."""
    pieces, fallbacks = [], 0
    predictor.config.require_retrieval("batch scoring")
    names = [str(predictor.retrieval_name), *predictor.model.pointwise]
    ids = pa.array(predictor.item_ids, pa.string())
    for start in range(0, len(store), batch_users):
        block = store.slice(start, batch_users)
        encoded = predictor.encode_histories(histories_from_table(block))
        ranked = predictor.rank(encoded, k, predictor.encode_context([{}] * len(block)))
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

    def __init__(self, bundle_uri: str, out: str, k: int, batch_users: int, text_prefix: str | None) -> None:
        torch.set_num_threads(1)
        self.predictor, self.out, self.k, self.batch_users = bundle.load(bundle_uri, verify=False), out, k, batch_users
        if text_prefix is not None:
            self.predictor.event_texts.known = EventTexts.open(text_prefix)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        store = storage.read_table(row["part"])
        table, fallbacks = score_table(self.predictor, store, self.k, self.batch_users)
        storage.write_table(storage.join(self.out, row["part"].rsplit("/", 1)[1]), table)
        return {"users": len(store), "rows": len(table), "fallbacks": fallbacks}


def score(
    config: RunConfig, data: storage.Directory, bundle_root: str, root: str, text_prefix: str | None = None
) -> dict[str, Any]:
    """Write ROOT/part-*.parquet for every user of the store -> {"users", "rows", "fallbacks", "bundle"}.

    text_prefix: of the encode stage, so that the texts of histories are not encoded again.

    Shards are written below ROOT/_draft and moved when all are there; ROOT/_manifest.json comes last, and is
    taken away before the first old shard goes.
    """
    manifest_uri = storage.join(root, "_manifest.json")
    identity = {
        "bundle": storage.Directory(bundle_root).manifest["fingerprint"],
        "data": data.manifest["inputs"],
        "k": config.scoring.k,
    }
    if storage.exists(manifest_uri) and storage.read_json(manifest_uri).get("identity") == identity:
        log.info("score: reused %s", root)
        return dict(storage.read_json(manifest_uri)["counts"])
    draft = storage.join(root, "_draft")
    storage.delete(draft)
    parts = storage.list_files(data.path("store"), ".parquet")
    dataset = ray.data.from_items([{"part": p} for p in parts], override_num_blocks=len(parts)).map(
        _Actor,
        fn_constructor_args=(bundle_root, draft, config.scoring.k, config.scoring.batch_users, text_prefix),
        compute=ray.data.ActorPoolStrategy(size=config.scoring.workers),
    )
    done = runtime.collect(dataset, "score: parts", len(parts))
    counts = {key: sum(int(d[key]) for d in done) for key in ("users", "rows", "fallbacks")}
    storage.delete(manifest_uri)
    filesystem, path = storage.resolve(root)
    for old in storage.list_files(root, ".parquet"):
        if "/" not in old.removeprefix(path + "/"):
            filesystem.delete_file(old)
    for part in parts:
        name = part.rsplit("/", 1)[1]
        filesystem.move(storage.resolve(storage.join(draft, name))[1], f"{path}/{name}")
    storage.delete(draft)
    storage.write_json(manifest_uri, {"identity": identity, "counts": counts, "shards": len(parts)})
    log.info("score: %s", counts)
    return counts
