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
from torch import Tensor

from mtrec_ray.predictor import EncodedHistories, History, Predictor
from mtrec_ray.retrieval.exact import NONE
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
    predictor.config.require_retrieval("batch scoring")
    names = [str(predictor.retrieval_name), *predictor.model.pointwise]
    ids = pa.array(predictor.item_ids, pa.string())

    def lists(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, seconds: dict[str, float]) -> pa.Table:
        with timed(seconds, "retrieve"):
            candidates = predictor.retrieve(state_BD, encoded.batch.length_B, encoded.seen, k)
        with timed(seconds, "heads"):
            predictions = predictor.score(state_BD, candidates.item_BK, predictor.encode_context([{}] * len(user_ids)))
            ranked = predictor.finalise(candidates, predictions, k)
        item_BK = ranked.item_BK.numpy()
        keep = (item_BK != NONE).ravel()
        B, K = item_BK.shape
        columns: dict[str, Any] = {
            "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), K)[keep])),
            "item_id": ids.take(pa.array(item_BK.ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(ranked.score_BK.numpy().ravel()[keep]),
        }
        return pa.table(columns | {n: pa.array(ranked.tasks_BK[n].numpy().ravel()[keep]) for n in names})

    return _per_user(predictor, store, batch_users, {} if seconds is None else seconds, strangers, lists)


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

    def states(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, seconds: dict[str, float]) -> pa.Table:
        flat = pa.array(state_BD.float().numpy().ravel())
        return pa.table({"user_id": user_ids, "state": pa.FixedSizeListArray.from_arrays(flat, state_BD.shape[1])})

    return _per_user(predictor, store, batch_users, seconds, strangers, states)


def profile_table(
    predictor: Predictor, store: pa.Table, batch_users: int, seconds: dict[str, float], strangers: Sequence[str] = ()
) -> tuple[pa.Table, int]:
    """-> (user_id, attribute, value, probability, a row for every value of every attribute or column of interest; users
    without a history)."""
    names = [(task.key, str(value)) for task in predictor.model.profiles.values() for value in task.classes]

    def profiles(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, seconds: dict[str, float]) -> pa.Table:
        with timed(seconds, "heads"):
            found = predictor.profile_probabilities(state_BD, encoded.visible)
            probability_BC = torch.cat([found[name] for name in predictor.model.profiles], dim=1).numpy()
        B = len(user_ids)
        return pa.table({
            "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), len(names)))),
            "attribute": pa.array([a for a, _ in names] * B, pa.string()),
            "value": pa.array([v for _, v in names] * B, pa.string()),
            "probability": pa.array(probability_BC.astype(np.float32).ravel()),
        })  # fmt: skip

    return _per_user(predictor, store, batch_users, seconds, strangers, profiles)


Tell = Callable[[pa.Array, EncodedHistories, Tensor, dict[str, float]], pa.Table]
"""(user ids, their histories, their states, what stages took) -> rows."""


def _per_user(
    predictor: Predictor, store: pa.Table, batch_users: int, seconds: dict[str, float], strangers: Sequence[str], tell: Tell
) -> tuple[pa.Table, int]:
    """One pass over users, so many at a time -> (what is told of them, users without a history)."""
    pieces, fallbacks = [], 0
    for user_ids, histories in _blocks(store, strangers, batch_users):
        with timed(seconds, "histories"):
            encoded = predictor.encode_histories(histories())
        with timed(seconds, "states"):
            state_BD = predictor.encode_state(encoded.batch)
        pieces.append(tell(user_ids, encoded, state_BD, seconds))
        fallbacks += int((encoded.batch.length_B == 0).sum())
    if not pieces:  # a shard of nobody has the columns all the same
        encoded = predictor.encode_histories([History()])
        one = tell(pa.array([""], pa.string()), encoded, predictor.encode_state(encoded.batch), seconds)
        pieces.append(one.slice(0, 0))
    return pa.concat_tables(pieces).replace_schema_metadata({"bundle": predictor.fingerprint}), fallbacks


def similar_table(predictor: Predictor, begin: int, end: int, k: int, batch_items: int, seconds: dict[str, float]) -> pa.Table:
    """Items from one catalogue position to another -> (item_id, similar_item_id, rank, score: cosine), itself left out."""
    ids, pieces = pa.array(predictor.item_ids, pa.string()), []
    for start in range(begin, max(end, begin + 1), batch_items):
        items = np.arange(start, min(start + batch_items, end))
        with timed(seconds, "retrieve"):
            item_BK, score_BK = predictor.similar_to(items, k, [np.array([i]) for i in items])
        B, K = item_BK.shape
        keep = (item_BK.numpy() != NONE).ravel()
        pieces.append(pa.table({
            "item_id": ids.take(pa.array(np.repeat(items, K)[keep])),
            "similar_item_id": ids.take(pa.array(item_BK.numpy().ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(score_BK.numpy().ravel()[keep]),
        }))  # fmt: skip
    return pa.concat_tables(pieces).replace_schema_metadata({"bundle": predictor.fingerprint})
