"""What batch scoring writes, as tables: lists, states and profiles of users, given pairs, similar items. It knows no Ray.

A shard is made as a stream: so many users are read, scored and written before the next ones are read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.histories import EncodedHistories, History
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.exact import NONE
from mtrec_ray.serving.history import histories_from_table

FOLDERS = {"lists": "scores", "states": "states", "profiles": "profiles", "pairs": "pairs", "similar": "similar"}
"""Output -> its folder in a run."""
OF_USERS = ("lists", "states", "profiles", "pairs")
PAIRS_AT_ONCE = 1024
"""Items of a user that the heads score together."""


@dataclass
class Tally:
    """What a shard's users and items were, and what its stages took."""

    users: int = 0
    unknown: int = 0
    """Users that the store lacks."""
    fallbacks: int = 0
    """Users without a history: popularity, or the start token's state."""
    empty: int = 0
    """Users for whom filter and seen items leave nothing; they have no row."""
    doubled: int = 0
    """Rows of a file that ask for what another row asked for."""
    unknown_items: int = 0
    """Pairs of items that the catalogue lacks; their numbers are null."""
    asked: int = 0
    """Rows of a file that ask for something."""
    items: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add what a stage takes."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Ask:
    """What is wanted of users."""

    what: str = "lists"
    k: int = 100
    batch_users: int = 256
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Filter by attributes of items (Predictor.allowed)."""
    users: pa.Array | None = None
    """These alone, distinct; None: all that the store has."""
    skip_unknown: bool = False
    """Leave out users that the store lacks, instead of answering them without a history."""
    pairs: pa.Table | None = None
    """(user_id, item_id) of `pairs`, in any order; doubled ones count once."""


Tell = Callable[[pa.Array, EncodedHistories, Tensor, Tally], pa.Table]
"""(user ids, their histories, their states, what is counted) -> rows."""


def user_tables(predictor: Predictor, store: Iterable[pa.Table], ask: Ask, tally: Tally) -> Iterator[pa.Table]:
    """Rows of the history store, piece by piece -> what is asked of their users, at least one table. Users stand in the store's
    order, those that it lacks behind them.

    lists: user_id, item_id, rank from 1, score, a column per task. states: user_id, state (D numbers: what every head reads).
    profiles: user_id, attribute, value, probability, a row for every value of every attribute or column of interest.
    pairs: user_id, item_id, score, a column per task, null where the catalogue lacks the item.
    Raises NoRetrievalError, FilterError.
    """
    tell = _TELLERS[ask.what](predictor, ask)
    told = 0
    for user_ids, histories in _blocks(store, ask, tally):
        with tally.timed("histories"):
            encoded = predictor.encode_histories(histories())
        with tally.timed("states"):
            state_BD = predictor.encode_state(encoded.batch)
        tally.users += len(user_ids)
        tally.fallbacks += int((encoded.batch.length_B == 0).sum())
        told += 1
        yield _marked(tell(user_ids, encoded, state_BD, tally), predictor)
    if not told:  # a shard of nobody has the columns all the same
        encoded = predictor.encode_histories([History()])
        one = tell(pa.array([""], pa.string()), encoded, predictor.encode_state(encoded.batch), Tally())
        yield _marked(one.slice(0, 0), predictor)


def _marked(table: pa.Table, predictor: Predictor) -> pa.Table:
    return table.replace_schema_metadata({"bundle": predictor.fingerprint})


def _blocks(store: Iterable[pa.Table], ask: Ask, tally: Tally) -> Iterator[tuple[pa.Array, Callable[[], list[History]]]]:
    """(user ids, what gives their histories), so many users at a time."""
    found = []
    reading = iter(store)
    while True:
        with tally.timed("read"):
            piece = next(reading, None)
            if piece is not None and ask.users is not None:
                piece = piece.filter(pc.is_in(piece["user_id"], value_set=ask.users))
                found.append(piece["user_id"].combine_chunks())
        if piece is None:
            break
        for start in range(0, len(piece), ask.batch_users):
            block = piece.slice(start, ask.batch_users)
            yield _plain(block["user_id"]), partial(histories_from_table, block)
    if ask.users is None:
        return
    known = pa.concat_arrays(found) if found else pa.array([], pa.string())
    strangers = ask.users.filter(pc.invert(pc.is_in(ask.users, value_set=known)))
    tally.unknown += len(strangers)
    for start in range(0, 0 if ask.skip_unknown else len(strangers), ask.batch_users):
        some = strangers.slice(start, ask.batch_users)
        yield some, partial(list, [History()] * len(some))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks()


def _lists(predictor: Predictor, ask: Ask) -> Tell:
    predictor.config.require_retrieval("batch scoring")
    allowed_N = predictor.allowed(ask.where) if ask.where else None
    names = [str(predictor.retrieval_name), *predictor.model.pointwise]
    ids = pa.array(predictor.item_ids, pa.string())

    def lists(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, tally: Tally) -> pa.Table:
        with tally.timed("retrieve"):
            candidates = predictor.retrieve(state_BD, encoded.batch.length_B, encoded.seen, ask.k, allowed_N)
        with tally.timed("heads"):
            predictions = predictor.score(state_BD, candidates.item_BK, predictor.encode_context([{}] * len(user_ids)))
            ranked = predictor.finalise(candidates, predictions, ask.k)
        with tally.timed("rows"):
            item_BK = ranked.item_BK.numpy()
            tally.empty += int((item_BK[:, :1] == NONE).sum()) if item_BK.shape[1] else len(item_BK)
            keep = (item_BK != NONE).ravel()
            B, K = item_BK.shape
            columns: dict[str, Any] = {
                "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), K)[keep])),
                "item_id": ids.take(pa.array(item_BK.ravel()[keep])),
                "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
                "score": pa.array(ranked.score_BK.numpy().ravel()[keep]),
            }
            return pa.table(columns | {n: pa.array(ranked.tasks_BK[n].numpy().ravel()[keep]) for n in names})

    return lists


def _states(predictor: Predictor, ask: Ask) -> Tell:
    def states(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, tally: Tally) -> pa.Table:
        flat = pa.array(state_BD.float().numpy().ravel())
        return pa.table({"user_id": user_ids, "state": pa.FixedSizeListArray.from_arrays(flat, state_BD.shape[1])})

    return states


def _profiles(predictor: Predictor, ask: Ask) -> Tell:
    names = [(task.key, str(value)) for task in predictor.model.profiles.values() for value in task.classes]

    def profiles(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, tally: Tally) -> pa.Table:
        with tally.timed("heads"):
            found = predictor.profile_probabilities(state_BD, encoded.visible)
            probability_BC = torch.cat([found[name] for name in predictor.model.profiles], dim=1).numpy()
        B = len(user_ids)
        return pa.table({
            "user_id": user_ids.take(pa.array(np.repeat(np.arange(B), len(names)))),
            "attribute": pa.array([a for a, _ in names] * B, pa.string()),
            "value": pa.array([v for _, v in names] * B, pa.string()),
            "probability": pa.array(probability_BC.astype(np.float32).ravel()),
        })  # fmt: skip

    return profiles


def _pairs(predictor: Predictor, ask: Ask) -> Tell:
    predictor.config.require_retrieval("scoring pairs")
    pairs = ask.pairs if ask.pairs is not None else pa.table({"user_id": pa.array([""]), "item_id": pa.array([""])})
    order = np.argsort(_plain(pairs["user_id"]).to_numpy(zero_copy_only=False), kind="stable")
    user, item = (_plain(pairs[n].take(pa.array(order))) for n in ("user_id", "item_id"))
    position = np.array([predictor.position.get(i, NONE) for i in item.to_pylist()], dtype=np.int64)
    begins = np.flatnonzero(np.append(True, pc.not_equal(user[1:], user[:-1]).to_numpy(zero_copy_only=False)))
    own = {
        u: slice(b, e) for u, b, e in zip(user.take(pa.array(begins)).to_pylist(), begins, [*begins[1:], len(user)], strict=True)
    }

    def scored(user_ids: pa.Array, encoded: EncodedHistories, state_BD: Tensor, tally: Tally) -> pa.Table:
        some = [own[u] for u in user_ids.to_pylist()]
        sizes = np.array([s.stop - s.start for s in some])
        item_BK = np.full((len(some), sizes.max(initial=1)), NONE, dtype=np.int64)
        for row, of in enumerate(some):
            item_BK[row, : sizes[row]] = position[of]
        there = np.arange(item_BK.shape[1]) < sizes[:, None]
        known = (item_BK != NONE)[there]
        tally.unknown_items += int((~known).sum())
        with tally.timed("heads"):
            numbers = {n: v.numpy()[there] for n, v in _numbers_of(predictor, encoded, state_BD, torch.from_numpy(item_BK)).items()}
        return pa.table(
            {
                "user_id": user_ids.take(pa.array(np.repeat(np.arange(len(some)), sizes))),
                "item_id": pa.concat_arrays([item[of] for of in some]) if some else item[:0],
            }
            | {n: pa.array(v, pa.float32(), mask=~known) for n, v in numbers.items()}
        )

    return scored


def _numbers_of(predictor: Predictor, encoded: EncodedHistories, state_BD: Tensor, item_BK: Tensor) -> dict[str, Tensor]:
    """The final score and every task's number of given items -> name: (B, K)."""
    parts = []
    context_B = predictor.encode_context([{}] * len(item_BK))
    for item_BP in torch.split(item_BK.clamp(min=0), PAIRS_AT_ONCE, dim=1):
        logit_BP, popular_B = predictor.logits_of(state_BD, encoded.batch.length_B, item_BP)
        predictions = predictor.score(state_BD, item_BP, context_B)
        final_BP = torch.where(popular_B[:, None], logit_BP, predictor.final_scores(logit_BP, predictions))
        parts.append({"score": final_BP, str(predictor.retrieval_name): logit_BP, **predictions})
    return {name: torch.cat([p[name] for p in parts], 1) for name in parts[0]}


_TELLERS: dict[str, Callable[[Predictor, Ask], Tell]] = {
    "lists": _lists, "states": _states, "profiles": _profiles, "pairs": _pairs,
}  # fmt: skip


def similar_tables(predictor: Predictor, begin: int, end: int, k: int, batch_items: int, tally: Tally) -> Iterator[pa.Table]:
    """Items from one catalogue position to another -> (item_id, similar_item_id, rank, score: cosine), itself left out."""
    ids = pa.array(predictor.item_ids, pa.string())
    for start in range(begin, max(end, begin + 1), batch_items):
        items = np.arange(start, min(start + batch_items, end))
        with tally.timed("retrieve"):
            item_BK, score_BK = predictor.similar_to(items, k, [np.array([i]) for i in items])
        B, K = item_BK.shape
        keep: NDArray[np.bool_] = (item_BK.numpy() != NONE).ravel()
        tally.items += B
        table = pa.table({
            "item_id": ids.take(pa.array(np.repeat(items, K)[keep])),
            "similar_item_id": ids.take(pa.array(item_BK.numpy().ravel()[keep])),
            "rank": pa.array(np.tile(np.arange(1, K + 1, dtype=np.int32), B)[keep]),
            "score": pa.array(score_BK.numpy().ravel()[keep]),
        })  # fmt: skip
        yield _marked(table, predictor)
