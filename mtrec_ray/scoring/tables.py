"""What batch scoring writes of a shard, as tables: lists, states and profiles of users, similar items. It knows no Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from mtrec_ray.predictor import History, Predictor
from mtrec_ray.retrieval.exact import NONE, ExactIndex
from mtrec_ray.serving.history import histories_from_table

FOLDERS = {"lists": "scores", "states": "states", "profiles": "profiles", "similar": "similar"}
"""Output -> its folder in a run."""
OF_USERS = ("lists", "states", "profiles")


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


def state_table(
    predictor: Predictor, store: pa.Table, batch_users: int, seconds: dict[str, float], strangers: Sequence[str] = ()
) -> tuple[pa.Table, int]:
    """-> (user_id, state: what every head reads, D numbers; users without a history)."""
    return _per_user(predictor, store, batch_users, seconds, strangers, _states)


def profile_table(
    predictor: Predictor, store: pa.Table, batch_users: int, seconds: dict[str, float], strangers: Sequence[str] = ()
) -> tuple[pa.Table, int]:
    """-> (user_id, attribute, value, probability, a row for every value of every attribute or column of interest; users
    without a history)."""
    return _per_user(predictor, store, batch_users, seconds, strangers, _profiles)


def _per_user(
    predictor: Predictor, store: pa.Table, batch_users: int, seconds: dict[str, float], strangers: Sequence[str], tell: Any
) -> tuple[pa.Table, int]:
    pieces, fallbacks = [tell(predictor, pa.array([], pa.string()), None, None)], 0
    for user_ids, histories in _blocks(store, strangers, batch_users):
        with timed(seconds, "histories"):
            encoded = predictor.encode_histories(histories())
        with timed(seconds, "states"):
            state_BD = predictor.encode_state(encoded.batch)
        with timed(seconds, "heads"):
            pieces.append(tell(predictor, user_ids, state_BD, encoded.visible))
        fallbacks += int((encoded.batch.length_B == 0).sum())
    return pa.concat_tables(pieces).replace_schema_metadata({"bundle": predictor.fingerprint}), fallbacks


def _states(predictor: Predictor, user_ids: pa.Array, state_BD: Any, visible: Any) -> pa.Table:
    D = predictor.config.model.width
    flat = pa.array([], pa.float32()) if state_BD is None else pa.array(state_BD.float().numpy().ravel())
    return pa.table({"user_id": user_ids, "state": pa.FixedSizeListArray.from_arrays(flat, D)})


def _profiles(predictor: Predictor, user_ids: pa.Array, state_BD: Any, visible: Any) -> pa.Table:
    tasks = predictor.model.profiles.values()
    names = [(task.key, value) for task in tasks for value in task.classes]
    B = len(user_ids)
    if state_BD is None:
        probability = np.zeros(0, np.float32)
    else:
        found = predictor.profile_probabilities(state_BD, visible)
        probability = torch.cat([found[name] for name in predictor.model.profiles], dim=1).numpy().ravel()
    return pa.table({
        "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), len(names)))),
        "attribute": pa.array([a for a, _ in names] * B, pa.string()),
        "value": pa.array([str(v) for _, v in names] * B, pa.string()),
        "probability": pa.array(probability.astype(np.float32)),
    })  # fmt: skip


def similar_table(predictor: Predictor, begin: int, end: int, k: int, batch_items: int, seconds: dict[str, float]) -> pa.Table:
    """Items from one catalogue position to another -> (item_id, similar_item_id, rank, score: cosine), itself left out."""
    ids, index, pieces = pa.array(predictor.item_ids, pa.string()), ExactIndex(predictor.similar_vec_ND), []
    for start in range(begin, max(end, begin + 1), batch_items):
        items = np.arange(start, min(start + batch_items, end))
        with timed(seconds, "retrieve"):
            item_BK, score_BK = index.search(predictor.similar_vec_ND[torch.from_numpy(items)], k, [np.array([i]) for i in items])
        B, K = item_BK.shape
        keep = (item_BK.numpy() != NONE).ravel()
        pieces.append(pa.table({
            "item_id": ids.take(pa.array(np.repeat(items, K)[keep])),
            "similar_item_id": ids.take(pa.array(item_BK.numpy().ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(score_BK.numpy().ravel()[keep]),
        }))  # fmt: skip
    return pa.concat_tables(pieces).replace_schema_metadata({"bundle": predictor.fingerprint})
