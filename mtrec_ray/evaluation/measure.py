"""What a system answers at the moments of a split: ranks, lists, predictions, probabilities.

A system is the model or a baseline. All of them meet the same moments with the same history, and their scores go
through the same seen filter and the same ranking. Shapes: B moments, P relevant (moment, item) pairs, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.system import System
from mtrec_ray.histories import EncodedHistories
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.exact import NONE, mask_items, top_k
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import judges_of
from mtrec_ray.training.feed import WindowCache, collate

__all__ = ["Answers", "Facts", "Model", "Moments", "System", "ask", "facts_of", "item_shares", "measure"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Some windows of a split, as every system sees them."""

    cache: WindowCache
    index: IntArray
    schema: LogSchema
    encoded: EncodedHistories
    context: dict[str, Tensor]
    """Encoded features of each target."""
    target: IntArray
    """Flat position of each target in the cache."""
    row: IntArray
    """Moment of each target, ascending."""
    last: IntArray
    """Last history item of each moment, -1 without one."""
    events: IntArray
    """Events visible at each moment."""

    @classmethod
    def of(cls, schema: LogSchema, cache: WindowCache, index: IntArray) -> Moments:
        batch = collate(cache, index, schema)
        h, h_length = cache.gather("history", index)
        s, s_length = cache.gather("seen", index)
        items, older = cache.columns["history_item"][h].astype(np.int64), cache.columns["seen_item"][s].astype(np.int64)
        h_end, s_end = np.cumsum(h_length), np.cumsum(s_length)
        ranges = zip(h_end - h_length, h_end, s_end - s_length, s_end, strict=True)
        visible = [np.unique(np.concatenate([items[a:b], older[c:d]])) for a, b, c, d in ranges]
        last = np.full(len(index), -1)
        last[h_length > 0] = items[h_end[h_length > 0] - 1]
        t, t_length = cache.gather("target", index)
        encoded = EncodedHistories.of(batch.history, visible, [[]] * len(index), schema.exclude_seen)
        row = np.repeat(np.arange(len(index)), t_length)
        return cls(cache, index, schema, encoded, batch.targets.context_M, t, row, last, h_length + s_length)

    def __len__(self) -> int:
        return len(self.index)

    def column(self, name: str) -> NDArray[Any]:
        """A column of the targets."""
        return self.cache.columns[name][self.target]

    @property
    def item_T(self) -> IntArray:
        return self.column("target_item").astype(np.int64)

    @property
    def user_ids(self) -> NDArray[np.object_]:
        return np.array(self.cache.user_ids.take(pa.array(self.index)).to_pylist(), dtype=object)

    def visible(self) -> sp.csr_matrix:
        """All events visible at each moment (the window's history and what came before it) -> B × N, ones."""
        parts = [self.cache.gather(group, self.index) for group in ("history", "seen")]
        row = np.concatenate([np.repeat(np.arange(len(self)), length) for _, length in parts])
        names = ("history_item", "seen_item")
        item = np.concatenate([self.cache.columns[n][flat] for n, (flat, _) in zip(names, parts, strict=True)])
        matrix = sp.csr_matrix((np.ones(len(row), np.float32), (row, item)), shape=(len(self), self.schema.n_items))
        matrix.data[:] = 1
        return matrix


class Model(System):
    """The predictor, through its own stages."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._known: tuple[Moments, Tensor] | None = None

    def states(self, moments: Moments) -> Tensor:
        """state_BD: one trunk pass for all that is asked about the same moments."""
        if self._known is None or self._known[0] is not moments:
            self._known = (moments, self.predictor.encode_state(moments.encoded.batch))
        return self._known[1]

    def scores(self, moments: Moments) -> Tensor | None:
        if self.predictor.retrieval_name is None:
            return None
        return self.predictor.retrieval_scores(self.states(moments), moments.encoded.batch.length_B)[0]

    def final_rank(self, moments: Moments, row_P: Tensor, item_P: Tensor, rank_P: IntArray) -> IntArray | None:
        """A retrieved target ranks among the K candidates, all others keep their place."""
        p = self.predictor
        if not any(w for n, w in p.final_weights.items() if n != p.retrieval_name):
            return None
        state_BD = self.states(moments)
        first = torch.from_numpy(np.searchsorted(moments.row, np.arange(len(moments))))
        context = {n: v[first] for n, v in moments.context.items()}
        candidates = p.retrieve(state_BD, moments.encoded.batch.length_B, moments.encoded.seen, p.config.ranking.candidates)
        ranked = p.finalise(candidates, p.score(state_BD, candidates.item_BK, context), candidates.item_BK.shape[1])
        place = ranked.item_BK[row_P] == item_P[:, None]
        own = torch.where(place, ranked.score_BK[row_P], float("-inf")).amax(1)
        among = (ranked.score_BK[row_P] >= own[:, None]).sum(1).numpy()
        return np.where(place.any(1).numpy(), among, rank_P)

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        if not self.predictor.model.pointwise:
            return {}
        state_TD = self.states(moments)[torch.from_numpy(moments.row)]
        item_TK = torch.from_numpy(moments.item_T)[:, None]
        found = self.predictor.score(state_TD, item_TK, moments.context)
        found |= self.predictor.distributions(state_TD, item_TK, moments.context)
        return {n: v[:, 0].numpy().astype(np.float64) for n, v in found.items()}

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        found = self.predictor.profile_probabilities(self.states(moments), moments.encoded.visible)
        return {n: v.numpy().astype(np.float64) for n, v in found.items()}

    def items(self) -> dict[str, FloatArray]:
        return {n: v.numpy().astype(np.float64) for n, v in self.predictor.item_probabilities().items()}

    def similar(self, item_B: IntArray) -> Tensor | None:
        return None if self.predictor.model.similarity is None else self.predictor.similar_scores(item_B)


class _Joined:
    """Arrays of moments that can be joined: plain arrays and dicts of them, None left as it is."""

    @classmethod
    def join(cls, parts: list[Any]) -> Any:
        starts = np.cumsum([0, *[len(p) for p in parts]])[:-1]

        def together(name: str, values: list[Any]) -> Any:
            if values[0] is None:
                return None
            if isinstance(values[0], dict):
                return {k: together(k, [v[k] for v in values]) for k in values[0]}
            if name.endswith("_moment"):  # counts moments from the first one of its part
                values = [v + start for v, start in zip(values, starts, strict=True)]
            return np.concatenate(values)

        return cls(**{f.name: together(f.name, [getattr(p, f.name) for p in parts]) for f in fields(cls)})  # type: ignore[arg-type]


@dataclass
class Facts(_Joined):
    """What is true of the moments, whoever answers."""

    user: NDArray[np.object_]
    """(B,) user ids."""
    visible: IntArray
    """(B,) events visible."""
    history_share: FloatArray
    """(B,) mean of `item_shares` over the visible items; NaN without any."""
    fold: IntArray
    pair_moment: IntArray
    pair_item: IntArray
    point_moment: IntArray
    point_item: IntArray
    labels: dict[str, FloatArray] = field(default_factory=dict)
    """Pointwise task -> (T,) label, or (T, C); NaN is missing."""
    attributes: dict[str, IntArray] = field(default_factory=dict)
    """Attribute -> (B,) class, -1 is missing."""
    truths: dict[str, FloatArray] = field(default_factory=dict)
    """Task that is judged by moments -> (B, C); a row of NaN is missing."""

    def __len__(self) -> int:
        return len(self.user)


@dataclass
class Answers(_Joined):
    """What one system answers; None where it does not."""

    moments: IntArray
    """(B,) ones: their number."""
    rank: IntArray | None = None
    final_rank: IntArray | None = None
    """(P,)"""
    top: IntArray | None = None
    """(B, 10) catalogue positions, NONE where a list is shorter."""
    hit: FloatArray | None = None
    """(B,) similarity hit@10; NaN where there is no query."""
    predictions: dict[str, FloatArray] = field(default_factory=dict)
    profiles: dict[str, FloatArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.moments)


def item_shares(predictor: Predictor) -> FloatArray:
    """Each item's share of the training events, one event added to every item, so that none is 0."""
    count_N = predictor.popularity_N.double().numpy() * predictor.trained_events + 1
    return np.asarray(count_N / count_N.sum())


def facts_of(predictor: Predictor, moments: Moments, lists: bool) -> Facts:
    """lists: whether the popularity of histories is wanted, which only lists are compared with."""
    tasks, columns = predictor.config.tasks, moments.cache.columns
    pair_moment, pair_item = m.relevant_items(moments.row, moments.item_T, moments.column("target_positive").astype(bool))
    history_share = np.full(len(moments), np.nan)
    if lists:
        visible = moments.visible()
        count = np.diff(visible.indptr)
        np.divide(np.asarray(visible @ item_shares(predictor)), count, out=history_share, where=count > 0)
    judges = judges_of(tasks)
    labels = {n: judge.label(moments.column) for n, judge in judges.items()}
    truths = {n: judge.truth(predictor, moments) for n, judge in judges.items()}
    return Facts(
        user=moments.user_ids,
        visible=moments.events.astype(np.int64),
        history_share=history_share,
        fold=columns["fold"][moments.index].astype(np.int64),
        pair_moment=pair_moment,
        pair_item=pair_item,
        point_moment=moments.row,
        point_item=moments.item_T,
        labels={n: label for n, label in labels.items() if label is not None},
        attributes={a.name: columns[f"profile_{a.name}"][moments.index].astype(np.int64) for a in moments.schema.attributes},
        truths={n: truth for n, truth in truths.items() if truth is not None},
    )


def ask(system: System, moments: Moments, facts: Facts, lists: bool) -> Answers:
    """One system's answers. lists: whether top lists are wanted. Raises BrokenScoresError when a score is no number."""
    out = Answers(np.ones(len(moments), np.int64))
    score_BN = system.scores(moments)
    if score_BN is not None:
        if not lists:
            m.check_finite(score_BN, "retrieval scores")
        mask_items(score_BN, moments.encoded.seen)
        if lists:
            found, best_BK = top_k(score_BN, m.LIST)
            m.check_finite(torch.nan_to_num(best_BK, nan=float("nan"), posinf=float("inf"), neginf=0.0), "retrieval scores")
            out.top = np.full((len(moments), m.LIST), NONE)
            out.top[:, : found.shape[1]] = found.numpy()
        row_P, item_P = torch.from_numpy(facts.pair_moment), torch.from_numpy(facts.pair_item)
        out.rank = m.pessimistic_rank(score_BN, row_P, item_P, checked=True)  # a NaN would have led the list
        out.final_rank = system.final_rank(moments, row_P, item_P, out.rank)
    out.predictions, out.profiles = system.predictions(moments), system.profiles(moments)
    for name, values in (out.predictions | out.profiles).items():
        m.check_finite(values, f"predictions of {name}")
    out.hit = _similarity_hit(system, moments, facts)
    return out


def _similarity_hit(system: System, moments: Moments, facts: Facts) -> FloatArray | None:
    """hit@10 of a relevant item among the items most like the last history item; seen items and the query removed."""
    usable = np.flatnonzero(moments.last >= 0)
    hit = np.full(len(moments), np.nan)
    similarity = system.similar(moments.last[usable])
    if similarity is None:
        return None
    m.check_finite(similarity, "similarities")
    banned = [np.union1d(moments.encoded.seen[i], moments.last[i]) for i in usable]
    found = np.full((len(moments), 10), NONE)
    if len(usable):
        items = top_k(mask_items(similarity, banned), 10)[0].numpy()
        found[usable, : items.shape[1]] = items
    row, item = facts.pair_moment, facts.pair_item
    among = (found[row] == item[:, None]).any(1)
    best = np.full(len(moments), -1.0)
    np.maximum.at(best, row, among.astype(np.float64))
    judged = (best >= 0) & (moments.last >= 0)
    hit[judged] = best[judged]
    return hit


def measure(
    systems: dict[str, System], predictor: Predictor, cache: WindowCache, index: IntArray, batch_windows: int, lists: bool = True
) -> tuple[Facts, dict[str, Answers]]:
    """Ask every system about some windows, some at a time -> (facts, answers of each)."""
    facts, answers = [], []
    for piece in np.array_split(index, max(1, -(-len(index) // batch_windows))):
        moments = Moments.of(predictor.schema, cache, piece)
        facts.append(facts_of(predictor, moments, lists))
        answers.append({name: ask(system, moments, facts[-1], lists) for name, system in systems.items()})
    return Facts.join(facts), {name: Answers.join([a[name] for a in answers]) for name in systems}
