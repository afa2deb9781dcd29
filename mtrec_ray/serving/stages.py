"""The work of the stages on a predictor, many requests at once, and the messages between them: numpy, which is cheap to send. It
knows no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.histories import History, IntArray
from mtrec_ray.predictor import Candidates, Predictor
from mtrec_ray.retrieval.exact import top_k

FloatArray = NDArray[np.float32]
INDEX_EXACT = "index_exact"
SEARCHED_AT_ONCE = 65_536
"""Texts of the catalogue that are compared with a query at once."""


class MixedBundlesError(RuntimeError):
    """A stage does not have the bundle of an answer, or was handed a state of another bundle or history."""


@dataclass(frozen=True)
class Stamp:
    """What an answer is made from; every message between stages carries it."""

    bundle: str
    """Fingerprint of the bundle."""
    history: str = ""
    """Version of the history; empty where an answer reads none."""
    items: int = field(default=0, compare=False)
    """Number of the last change of an item that the sender knows; who is asked knows at least as much (serving/items.py)."""


@dataclass(frozen=True)
class EncodedState:
    """One history as StateEncoder answers it, with what the later stages need of it."""

    stamp: Stamp
    state_D: FloatArray
    length: int
    seen: IntArray
    """Catalogue positions that may not be recommended."""
    visible: IntArray
    """Catalogue positions of all events."""
    degraded: list[str]


@dataclass(frozen=True)
class Retrieved:
    """Candidates of one request."""

    item_K: IntArray
    logit_K: FloatArray
    popular: bool
    items: int
    """Number of the last change that retrieval knew; the ingress needs to know it too."""
    degraded: list[str]

    @property
    def candidates(self) -> Candidates:
        """As the predictor has them, one row. Copied: what comes from another process is read-only."""
        items, logits = torch.tensor(self.item_K)[None], torch.tensor(self.logit_K)[None]
        return Candidates(items, logits, torch.tensor([self.popular]))


def encode(predictor: Predictor, asked: Sequence[tuple[Stamp, History]]) -> list[EncodedState]:
    """Histories → user states."""
    encoded = predictor.encode_histories([h for _, h in asked])
    state_BD, length_B = predictor.encode_state(encoded.batch).numpy(), encoded.batch.length_B.tolist()
    return [
        EncodedState(stamp, state_BD[n].copy(), length_B[n], encoded.seen[n], encoded.visible[n], encoded.degraded[n])
        for n, (stamp, _) in enumerate(asked)
    ]


def rows_of(states: Sequence[EncodedState]) -> Tensor:
    """state_BD of some states."""
    return torch.from_numpy(np.stack([s.state_D for s in states]))


def retrieve(predictor: Predictor, number: int, k: int, states: Sequence[EncodedState]) -> list[Retrieved]:
    """Candidates of states that ask for as many, without filters."""
    return _searched(predictor, number, k, states, None)


def retrieve_some(
    predictor: Predictor, number: int, k: int, state: EncodedState, where: Mapping[str, list[str]] | None, only: list[str] | None
) -> Retrieved:
    """where: filter by attributes; only: ids of items to choose from."""
    return _searched(predictor, number, k, [state], allowed(predictor, where, only))[0]


def allowed(predictor: Predictor, where: Mapping[str, list[str]] | None, only: list[str] | None) -> np.ndarray[Any, Any] | None:
    """Items that a request leaves -> (N,), None for all. Raises FilterError."""
    allowed_N = predictor.allowed(where) if where else None
    if only is not None:
        given_N = np.zeros(len(predictor.item_ids), bool)
        given_N[predictor.known_items(only)] = True
        allowed_N = given_N if allowed_N is None else allowed_N & given_N
    return allowed_N


def _searched(
    predictor: Predictor, number: int, k: int, states: Sequence[EncodedState], allowed_N: np.ndarray[Any, Any] | None
) -> list[Retrieved]:
    state_BD, length_B = rows_of(states), torch.tensor([s.length for s in states])
    seen, marks = [s.seen for s in states], []
    try:
        found = predictor.retrieve(state_BD, length_B, seen, k, allowed_N)
    except Exception:
        if predictor.index is predictor.exact:
            raise
        found, marks = predictor.retrieve(state_BD, length_B, seen, k, allowed_N, predictor.exact), [INDEX_EXACT]
    item_BK, logit_BK, popular = found.item_BK.numpy(), found.logit_BK.numpy(), found.popular_B.tolist()
    return [Retrieved(item_BK[n], logit_BK[n], popular[n], number, marks) for n in range(len(states))]


def logits(predictor: Predictor, state: EncodedState, item_K: IntArray) -> tuple[FloatArray, bool]:
    """Retrieval scores of given items, and whether they are shares of the popularity."""
    logit_BK, popular_B = predictor.logits_of(rows_of([state]), torch.tensor([state.length]), torch.tensor(item_K)[None])
    return logit_BK[0].numpy(), bool(popular_B[0])


Scored = tuple[EncodedState, IntArray, Mapping[str, Any]]
"""State, items (K), context of a request."""


def score(predictor: Predictor, asked: Sequence[Scored]) -> list[dict[str, FloatArray]]:
    """States and as many items of each → one number per task and item."""
    context_B = predictor.encode_context([context for _, _, context in asked])
    item_BK = torch.from_numpy(np.stack([items for _, items, _ in asked]))
    found = {n: v.numpy() for n, v in predictor.score(rows_of([s for s, _, _ in asked]), item_BK, context_B).items()}
    return [{name: values[n] for name, values in found.items()} for n in range(len(asked))]


def profiles(predictor: Predictor, states: Sequence[EncodedState]) -> list[dict[str, dict[str, float]]]:
    return predictor.profile_of(rows_of(states), [s.visible for s in states])


def search_texts(
    text_NE: Tensor, query_E: Tensor, k: int, allowed_N: np.ndarray[Any, Any]
) -> tuple[IntArray, np.ndarray[Any, Any]]:
    """The texts of the largest cosine with a query -> (positions, cosines), the best first, ties by position.

    text_NE: unit vectors, of half precision maybe.
    """
    items, scores = [], []
    for begin in range(0, len(text_NE), SEARCHED_AT_ONCE):
        score_BN = (text_NE[begin : begin + SEARCHED_AT_ONCE].float() @ query_E)[None]
        score_BN[:, torch.from_numpy(~allowed_N[begin : begin + SEARCHED_AT_ONCE])] = float("-inf")
        item_BK, score_BK = top_k(score_BN, min(k, score_BN.shape[1]))
        items.append(torch.where(item_BK < 0, item_BK, item_BK + begin))
        scores.append(score_BK)
    item, score = torch.cat(items, 1)[0], torch.cat(scores, 1)[0]
    order = torch.argsort(score, descending=True, stable=True)[:k]
    order = order[item[order] >= 0]
    return item[order].numpy(), score[order].numpy()


def search(
    predictor: Predictor, text_NE: Tensor, query_E: Tensor, k: int, where: Mapping[str, list[str]] | None
) -> list[dict[str, Any]]:
    """Items whose texts are most like a text, those that joined too -> [{"item_id", "title", "score"}]. text_NE: the bundle's."""
    N, changes = len(text_NE), predictor.changes
    allowed_N = allowed(predictor, where, None)
    allowed_N = np.ones(len(predictor.item_ids), bool) if allowed_N is None else allowed_N
    found = []
    if changes is not None:
        allowed_N[changes.gone] = False
        if len(changes.text_AE):
            found = [(i + N, s) for i, s in zip(*search_texts(changes.text_AE, query_E, k, allowed_N[N:]), strict=True)]
    found += zip(*search_texts(text_NE, query_E, k, allowed_N[:N]), strict=True)
    best = sorted(found, key=lambda pair: (-pair[1], pair[0]))[:k]
    return [{"item_id": predictor.item_ids[i], "title": predictor.titles[i], "score": float(s)} for i, s in best]
