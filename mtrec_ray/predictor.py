"""The predictor: a bundle -> recommend, score, similar, profile. It knows no Ray.

`recommend` composes four public stages, and every caller (evaluation, batch scoring, the Serve deployments)
calls these same stages:

    encode_state   histories -> user states          (one trunk pass)
    retrieve       states -> candidates              (index, seen filter; popularity without a history)
    score          states, candidates -> tasks       (sharing layers and heads)
    finalise       candidates, tasks -> the answer   (final order, titles)
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray import item_features
from mtrec_ray.config import RunConfig
from mtrec_ray.diversity import choose
from mtrec_ray.encoders.event_texts import TextMemory
from mtrec_ray.features import FIRST, dense
from mtrec_ray.histories import EncodedHistories, History, IntArray, encode_histories
from mtrec_ray.models.batch import HistoryBatch, feature_tensor
from mtrec_ray.models.int8 import to_int8
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.retrieval.exact import NONE, ExactIndex, Index
from mtrec_ray.retrieval.live import GrownVectors, LiveIndex
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.wide import Bags

if TYPE_CHECKING:
    from mtrec_ray.encoders.text import TextEncoder


class UnknownItemError(KeyError):
    """An item id that the catalogue lacks."""

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.item_id = item_id

    def __str__(self) -> str:
        return f"item {self.item_id!r} is not in the catalogue"


class FilterError(ValueError):
    """A filter that names an attribute or a value that the catalogue does not have."""


@dataclass(frozen=True)
class Candidates:
    """Retrieved items of each row. `item_BK` is NONE where there are fewer."""

    item_BK: Tensor
    logit_BK: Tensor
    """Retrieval logit; for rows without a history the share of all training events."""
    popular_B: Tensor
    """bool: the row is the popularity list."""


@dataclass(frozen=True)
class Ranked:
    """Final lists as integers and numbers."""

    item_BK: Tensor
    score_BK: Tensor
    tasks_BK: dict[str, Tensor]


@dataclass(frozen=True)
class Changes:
    """What became of a bundle's catalogue."""

    added_AD: Tensor
    gone: IntArray
    """Positions that are in no list, ascending."""
    text_AE: Tensor
    """Their text vectors."""
    before_A: IntArray
    """Where an added item stood in the bundle's catalogue; NONE for one that is new."""


class Predictor:
    """Everything a request needs, in memory.

    model: a trained recommender, on any device; catalogue: the bundle's item table; fingerprint: the bundle's.
    What goes into the four stages and what comes out of them lies on the CPU; the model's work is done where the model is.
    """

    def __init__(
        self,
        config: RunConfig,
        schema: LogSchema,
        catalogue: pa.Table,
        model: Recommender,
        item_vec_ND: Tensor,
        fingerprint: str,
        text_encoder: Mapping[str, Any] | None = None,
        index: Index | None = None,
    ) -> None:
        """text_encoder: which TextEncoder made the text vectors, to be sure that texts of events are read by it too. index: where
        candidates are searched; None: exactly."""
        self.config, self.schema, self.fingerprint, self.text_encoder = config, schema, fingerprint, text_encoder
        self.model = model.eval()
        self.device = next(model.parameters()).device
        model.read_catalogue(catalogue)
        self.item_codes = {spec.name: item_features.codes(catalogue, spec.name) for spec in schema.item_features}
        """Item feature -> (N, longest) numbers of its vocabulary."""
        self.item_ids: list[str] = catalogue["item_id"].to_pylist()
        self.titles: list[str] = catalogue["title"].to_pylist()
        self.position: Mapping[str, int] = {item_id: i for i, item_id in enumerate(self.item_ids)}
        self.item_vec_ND = item_vec_ND.cpu()
        on_device = item_vec_ND.to(self.device)
        self._vec_ND: Tensor | GrownVectors = on_device
        self.exact: ExactIndex | LiveIndex = ExactIndex(on_device)
        self.index: Index = self.exact if index is None else index
        count_N = torch.from_numpy(catalogue["count"].to_numpy().astype(np.float32))
        self.trained_events = int(count_N.sum())  # training events that are history; what popularity counts
        self.popularity_N = count_N / count_N.sum().clamp(min=1)
        self._popular: IntArray | None = None
        self._base, self._changes = self, None  # type: tuple[Predictor, Changes | None]
        fixed = [spec for spec in schema.request_features if spec.at_inference is not None]
        self.fixed = {spec.name: feature_tensor(dense(spec.encode([spec.at_inference]))) for spec in fixed}
        self.final_weights = {
            name: task.final_weight if task.final_weight is not None else float(task.kind == "retrieval")
            for name, task in config.tasks.items()
        }
        self.retrieval_name = config.retrieval_task

    def to_int8(self) -> Predictor:
        """Weights of sharing layers and heads of pointwise tasks in eight bits, in place -> itself. For CPUs."""
        for part in (self.model.sharing, *self.model.pointwise.values()):
            to_int8(part)
        return self

    # ------------------------------------------------------------------ changes to the catalogue

    @torch.no_grad()
    def with_changes(
        self,
        joined: pa.Table | None = None,
        text_AE: Tensor | None = None,
        removed: Collection[str] = (),
        blocked: Collection[str] = (),
    ) -> Predictor:
        """A predictor for the bundle's catalogue with all of these changes; this one stays as it is. Weights, vectors and index
        are shared.

        joined: rows of a catalogue (item_id, title, feature_NAME as numbers); an id that is there already gets another text and
        keeps its learned residual. text_AE: their text vectors, of unit length. removed: ids that are known no more; blocked:
        ids that are in no list, but stay what they are in histories. Ids that are unknown change nothing.
        Raises ValueError for a model that reads no texts: it cannot tell what a new item is.
        """
        base = self._base
        new, N = copy.copy(base), len(base.item_ids)
        new.__dict__.pop("_similar_index", None)
        ids: list[str] = [] if joined is None else joined["item_id"].to_pylist()
        if len(set(ids)) < len(ids):
            raise ValueError("an item joins twice")
        before_A = np.array([base.position.get(i, NONE) for i in ids], dtype=np.int64)
        vec_AD = self.item_vec_ND.new_zeros(0, self.item_vec_ND.shape[1])
        if joined is not None and ids:
            if text_AE is None or self.model.item_tower.text is None:
                raise ValueError("items without training events are known by their texts, and this model reads none; train again")
            vec_AD = self.model.item_tower.with_texts(text_AE.to(self.device), torch.from_numpy(before_A).to(self.device))
            new.item_ids, new.titles = [*base.item_ids, *ids], [*base.titles, *joined["title"].to_pylist()]
            new.item_codes = {n: _below(c, item_features.codes(joined, n)) for n, c in base.item_codes.items()}
        place = {item_id: N + i for i, item_id in enumerate(ids)}
        new.position = ChainMap(dict.fromkeys(removed, NONE), place, base.position)  # type: ignore[arg-type]
        places = [p for i in {*removed, *blocked} for p in (place.get(i), base.position.get(i)) if p is not None]
        gone = np.unique(np.concatenate([before_A[before_A != NONE], np.array(places, dtype=np.int64)]))
        new._changes = Changes(vec_AD, gone, torch.zeros(0, 0) if text_AE is None else text_AE, before_A)
        vec_AD = vec_AD.to(self.device)
        new._vec_ND = GrownVectors(base._vec_ND, vec_AD)  # type: ignore[arg-type]
        new.exact, new.index = LiveIndex(base.exact, vec_AD, gone), LiveIndex(base.index, vec_AD, gone)  # type: ignore[arg-type]
        known = torch.from_numpy(before_A != NONE)
        popularity_A = torch.where(known, base.popularity_N[torch.from_numpy(before_A.clip(min=0))], torch.zeros(len(ids)))
        new.popularity_N, new._popular = torch.cat([base.popularity_N, popularity_A]), None
        return new

    @property
    def changes(self) -> Changes | None:
        """What became of the bundle's catalogue; None: nothing."""
        return self._changes

    @torch.no_grad()
    def _similar(self, vec_ND: Tensor) -> Tensor:
        """Item vectors -> unit vectors whose products are similarities, on the CPU."""
        similarity = self.model.similarity
        return (torch.nn.functional.normalize(vec_ND, dim=-1) if similarity is None else similarity.vectors(vec_ND)).cpu()

    @cached_property
    def similar_vec_ND(self) -> Tensor:
        """Of the bundle's catalogue; made when similar items are first asked for."""
        return self._similar(self.item_vec_ND.to(self.device))

    @cached_property
    def _similar_index(self) -> tuple[ExactIndex | LiveIndex, Tensor | GrownVectors]:
        base_ND = self._base.similar_vec_ND
        if self._changes is None:
            return ExactIndex(base_ND), base_ND
        added_AD = self._similar(self._changes.added_AD.to(self.device))
        index = LiveIndex(ExactIndex(base_ND), added_AD, self._changes.gone)
        return index, GrownVectors(base_ND, added_AD)

    # ------------------------------------------------------------------ ids and integers

    def items(self, item_ids: Sequence[str]) -> IntArray:
        """Ids -> catalogue positions. Raises UnknownItemError."""
        found = np.array([self.position.get(i, NONE) for i in item_ids], dtype=np.int64)
        if (found == NONE).any():
            raise UnknownItemError(item_ids[int(np.argmax(found == NONE))])
        return found

    def known_items(self, item_ids: Sequence[str]) -> IntArray:
        """Ids -> ascending catalogue positions; ids that the catalogue lacks are left out."""
        found = np.unique(np.array([self.position.get(i, NONE) for i in item_ids], dtype=np.int64))
        return found[found != NONE]

    def check_weights(self, weights: Mapping[str, float]) -> None:
        """Raises FilterError for a final weight of a task that ranks nothing, or that is no number."""
        known = [str(self.retrieval_name), *self.model.pointwise]
        for name, weight in weights.items():
            if name not in known:
                raise FilterError(f"weights: {name!r} is no task of the final order; known are {known}")
            if not np.isfinite(weight):
                raise FilterError(f"weights.{name}: expected a finite number, found {weight!r}")

    def allowed(self, where: Mapping[str, Sequence[str]]) -> NDArray[np.bool_]:
        """Items that have, for every attribute named, one of the values -> (N,). Attributes are `data.item_features`.

        Raises FilterError.
        """
        self.check_where(where)
        allowed_N = np.ones(len(self.item_ids), bool)
        specs = {spec.name: spec for spec in self.schema.item_features}
        for name, values in where.items():
            asked = [specs[name].values.index(v) + FIRST for v in values]
            allowed_N &= np.isin(self.item_codes[name], asked).any(1)
        return allowed_N

    def check_where(self, where: Mapping[str, Sequence[str]]) -> None:
        """Raises FilterError for an attribute or a value that no item has."""
        specs = {spec.name: spec for spec in self.schema.item_features}
        for name, values in where.items():
            if name not in specs:
                raise FilterError(f"{name!r} is no attribute of items; known are {sorted(specs)} (data.item_features)")
            known = specs[name].values
            strange = sorted(set(values) - set(known))
            if strange:
                raise FilterError(f"{name}: no item has {strange[0]!r}; some that items have: {list(known[:10])}")

    def check_caps(self, caps: Mapping[str, int]) -> None:
        """Raises FilterError for an attribute that items do not have."""
        for name in caps:
            if name not in self.item_codes:
                raise FilterError(
                    f"caps: {name!r} is no attribute of items; known are {sorted(self.item_codes)} (data.item_features)"
                )

    def encode_histories(self, histories: Sequence[History]) -> EncodedHistories:
        """As the model reads them. Raises FeatureError; EncoderError where their texts cannot be read."""
        return encode_histories(histories, self.position, self.schema, lambda texts: self.event_texts(texts))

    @cached_property
    def event_texts(self) -> TextMemory:
        """Vectors of the texts in histories. The TextEncoder is loaded when this is first asked for. Raises EncoderError."""
        encoder = self.open_text_encoder()
        return TextMemory(encoder.encode, encoder.width)

    def open_text_encoder(self) -> TextEncoder:
        """The TextEncoder that made the bundle's text vectors. Raises EncoderError where it is not here, or another one is."""
        from mtrec_ray.encoders.loading import EncoderError, encoder_identity
        from mtrec_ray.encoders.text import TextEncoder

        config = self.config.encoder
        if config is None:
            raise EncoderError("encoder: this bundle reads no texts")
        config, stated = config.model_copy(update={"compile": False, "use_gpu": False, "tuning": None}), self.text_encoder or {}
        if stated and stated.get("model") != config.model:  # it was trained with the recommender
            return TextEncoder(config.model_copy(update={"model": stated["model"]}))
        here, there = ({k: v for k, v in e.items() if k != "model"} for e in (encoder_identity(config), stated))
        if there and here != there:  # it may lie elsewhere
            raise EncoderError(
                f"encoder.model {config.model!r}: its files here are not those that the bundle was trained with, and texts would "
                "be misread; put the bundle's encoder in its place, or train again"
            )
        return TextEncoder(config)

    def encode_context(self, contexts: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Request contexts -> encoded features, one entry per request. Raises FeatureError."""
        return {
            spec.name: feature_tensor(dense(spec.encode([c.get(spec.name) for c in contexts])))
            for spec in self.schema.request_features
        }

    # ------------------------------------------------------------------ the four stages

    @torch.no_grad()
    def encode_state(self, histories: HistoryBatch) -> Tensor:
        """Histories -> state_BD; an empty history gives the start token's state."""
        return self.model.encode(self._vec_ND, histories.to(self.device)).cpu()

    @torch.no_grad()
    def retrieval_scores(self, state_BD: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Score of every item -> (score_BN, popular_B). Rows without a history score by popularity.

        Raises NoRetrievalError.
        """
        self.config.require_retrieval("ranking items")
        popular_B = length_B == 0
        score_BN = self.exact.scores(self.model.retrieval.query(state_BD.to(self.device))).cpu()
        return torch.where(popular_B[:, None], self.popularity_N, score_BN), popular_B

    def retrieve(
        self, state_BD: Tensor, length_B: Tensor, seen: Sequence[IntArray], k: int, allowed_N: NDArray[np.bool_] | None = None,
        index: Index | None = None,
    ) -> Candidates:  # fmt: skip
        """States -> the best max(k, K) items that are not excluded. allowed_N: no others (None: all are). index: in the place of
        the predictor's own."""
        self.config.require_retrieval("ranking items")
        k, chosen = max(k, self.config.ranking.candidates), self.index if index is None else index
        with torch.no_grad():
            item_BK, logit_BK = chosen.search(self.model.retrieval.query(state_BD.to(self.device)), k, seen, allowed_N)
        popular_B = length_B == 0
        if popular_B.any():
            rows = torch.nonzero(popular_B)[:, 0]
            item_BK[rows] = self._most_popular([seen[r] for r in rows.tolist()], item_BK.shape[1], allowed_N)
            share = self.popularity_N[item_BK[rows].clamp(min=0)]
            logit_BK[rows] = torch.where(item_BK[rows] == NONE, float("-inf"), share)
        return Candidates(item_BK, logit_BK, popular_B)

    def popular(self, seen: Sequence[IntArray], k: int, allowed_N: NDArray[np.bool_] | None = None) -> Candidates:
        """What everybody gets of whom nothing is known: candidates without a state."""
        item_BK = self._most_popular(seen, min(k, len(self.item_ids)), allowed_N)
        share_BK = torch.where(item_BK == NONE, float("-inf"), self.popularity_N[item_BK.clamp(min=0)])
        return Candidates(item_BK, share_BK, torch.ones(len(seen), dtype=torch.bool))

    def _most_popular(self, seen: Sequence[IntArray], k: int, allowed_N: NDArray[np.bool_] | None) -> Tensor:
        """The k most popular items that are left to each -> item_BK, ties by position."""
        if self._popular is None:
            self._popular = torch.argsort(self.popularity_N, descending=True, stable=True).numpy()
            if isinstance(self.index, LiveIndex):
                self._popular = self._popular[~np.isin(self._popular, self.index.gone)]
        order = self._popular if allowed_N is None else self._popular[allowed_N[self._popular]]
        item_BK = np.full((len(seen), k), NONE, dtype=np.int64)
        for row, items in enumerate(seen):
            some = order[: k + len(items)]
            left = some[~np.isin(some, items)][:k]
            item_BK[row, : len(left)] = left
        return torch.from_numpy(item_BK)

    @torch.no_grad()
    def score(self, state_BD: Tensor, item_BK: Tensor, context_B: dict[str, Tensor]) -> dict[str, Tensor]:
        """Predictions of every pointwise task in its label's units -> name: (B, K).

        Features that are fixed at inference have their fixed value here, whatever context_B says.
        """
        if not self.model.pointwise:
            return {}
        found = self.model.predict(self._shared(state_BD, item_BK, context_B))
        return {name: values.cpu() for name, values in found.items()}

    @torch.no_grad()
    def distributions(self, state_BD: Tensor, item_BK: Tensor, context_B: dict[str, Tensor]) -> dict[str, Tensor]:
        """What pointwise tasks of several numbers say in full, as their judges read it -> name: (B, K, C)."""
        tasks = {n: t for n, t in self.model.pointwise.items() if t.several_numbers}
        if not tasks:
            return {}
        shared = self._shared(state_BD, item_BK, context_B)
        return {name: task.distribution(shared[name]).cpu() for name, task in tasks.items()}

    def _shared(self, state_BD: Tensor, item_BK: Tensor, context_B: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the heads read, on the model's device."""
        context_B = context_B | {n: v.expand(len(item_BK), *v.shape[1:]) for n, v in self.fixed.items()}
        context_B = {n: v.to(self.device) for n, v in context_B.items()}
        item_vec = self._vec_ND[item_BK.clamp(min=0).to(self.device)]
        return self.model.share(state_BD[:, None, :].to(self.device), item_vec, context_B)

    def finalise(
        self, candidates: Candidates, predictions: dict[str, Tensor], k: int, weights: Mapping[str, float] | None = None
    ) -> Ranked:
        """The final order: Σ w·g over the candidates, ties by catalogue position; cut to k. weights: in the place of those of the
        configuration, for the tasks that it names.

        The popularity list keeps its order and its scores.
        """
        final = self.final_scores(candidates.logit_BK, predictions, weights)
        final = torch.where(candidates.popular_B[:, None], candidates.logit_BK, final)
        final = torch.where(candidates.item_BK == NONE, float("-inf"), final)
        # stable sorts: first by position, then by score
        by_item = torch.argsort(candidates.item_BK, dim=1, stable=True)
        order = by_item.gather(1, torch.argsort(final.gather(1, by_item), dim=1, descending=True, stable=True))[:, :k]
        tasks = self._with_logit(candidates.logit_BK, predictions)
        return Ranked(
            candidates.item_BK.gather(1, order),
            final.gather(1, order),
            {name: values.gather(1, order) for name, values in tasks.items()},
        )

    def diversify(self, ranked: Ranked, k: int, diversity: float, caps: Mapping[str, int]) -> Ranked:
        """Of ranked candidates k that are unlike each other, at most so many of one value of an attribute (diversity.py).

        Raises FilterError for an attribute that items do not have.
        """
        self.check_caps(caps)
        B, K = ranked.item_BK.shape
        place_BK = np.full((B, min(k, K)), -1, dtype=np.int64)
        for row, items in enumerate(ranked.item_BK):
            there = items[items != NONE]
            unit_KD = torch.nn.functional.normalize(self._vec_ND[there.to(self.device)].float(), dim=-1).cpu().numpy()
            codes = {name: self.item_codes[name][there.numpy()] for name in caps}
            places = choose(ranked.score_BK[row, : len(there)].numpy(), unit_KD, k, diversity, codes, caps)
            place_BK[row, : len(places)] = places
        place = torch.from_numpy(place_BK)
        none, order = place < 0, place.clamp(min=0)
        return Ranked(
            torch.where(none, NONE, ranked.item_BK.gather(1, order)),
            torch.where(none, float("-inf"), ranked.score_BK.gather(1, order)),
            {name: values.gather(1, order) for name, values in ranked.tasks_BK.items()},
        )

    def _with_logit(self, logit_BK: Tensor, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.retrieval_name is not None  # there is a logit
        return {self.retrieval_name: logit_BK, **predictions}

    def final_scores(self, logit_BK: Tensor, predictions: dict[str, Tensor], weights: Mapping[str, float] | None = None) -> Tensor:
        """Σ w·g (DESIGN §1.4)."""
        chosen = self.final_weights | dict(weights or {})
        total = chosen.get(self.retrieval_name or "", 0.0) * logit_BK
        for name, task in self.model.pointwise.items():
            if chosen[name]:
                total = total + chosen[name] * task.final(predictions[name])
        return total

    # ------------------------------------------------------------------ answers

    def recommend(
        self,
        histories: Sequence[History],
        k: int,
        contexts: Sequence[Mapping[str, object]] | None = None,
        where: Mapping[str, Sequence[str]] | None = None,
    ) -> list[dict[str, Any]]:
        """Top k for each history -> [{"items": [{"item_id", "title", "score", "tasks"}], "degraded"}]. where: as of `allowed`."""
        encoded = self.encode_histories(histories)
        allowed_N = self.allowed(where) if where else None
        ranked = self.rank(encoded, k, self.encode_context(contexts or [{}] * len(histories)), allowed_N)
        return self.answers(ranked, encoded.degraded)

    def rank(
        self, encoded: EncodedHistories, k: int, context_B: dict[str, Tensor], allowed_N: NDArray[np.bool_] | None = None
    ) -> Ranked:
        """The four stages on integers."""
        state_BD = self.encode_state(encoded.batch)
        candidates = self.retrieve(state_BD, encoded.batch.length_B, encoded.seen, k, allowed_N)
        return self.finalise(candidates, self.score(state_BD, candidates.item_BK, context_B), k)

    def answers(self, ranked: Ranked, degraded: list[list[str]]) -> list[dict[str, Any]]:
        """Integers -> ids, titles and plain numbers."""
        out = []
        items, scores = ranked.item_BK.tolist(), ranked.score_BK.tolist()
        tasks = {n: v.tolist() for n, v in ranked.tasks_BK.items()}
        for row, marks in enumerate(degraded):
            entries = [
                {
                    "item_id": self.item_ids[item],
                    "title": self.titles[item],
                    "score": scores[row][j],
                    "tasks": {n: v[row][j] for n, v in tasks.items()},
                }
                for j, item in enumerate(items[row])
                if item != NONE
            ]
            out.append({"items": entries, "degraded": list(marks)})
        return out

    def score_items(self, history: History, item_ids: Sequence[str], context: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Given items for one history, in the order given. Raises UnknownItemError."""
        encoded = self.encode_histories([history])
        item_BK = torch.from_numpy(self.items(item_ids))[None]
        state_BD = self.encode_state(encoded.batch)
        logit_BK, popular_B = self.logits_of(state_BD, encoded.batch.length_B, item_BK)
        predictions = self.score(state_BD, item_BK, self.encode_context([context or {}]))
        return self.scored_answer(item_BK, logit_BK, popular_B, predictions, encoded.degraded[0])

    def logits_of(self, state_BD: Tensor, length_B: Tensor, item_BK: Tensor) -> tuple[Tensor, Tensor]:
        """Retrieval scores of given items -> (logit_BK, popular_B). Raises NoRetrievalError."""
        self.config.require_retrieval("ranking items")
        popular_B = length_B == 0
        with torch.no_grad():
            query_BD1 = self.model.retrieval.query(state_BD.to(self.device))[:, :, None]
            logit_BK = torch.bmm(self._vec_ND[item_BK.to(self.device)], query_BD1)[:, :, 0].cpu()
        return torch.where(popular_B[:, None], self.popularity_N[item_BK], logit_BK), popular_B

    def scored_answer(
        self, item_BK: Tensor, logit_BK: Tensor, popular_B: Tensor, predictions: dict[str, Tensor], degraded: list[str]
    ) -> dict[str, Any]:
        """One row of given items -> the answer, in the order given."""
        final = torch.where(popular_B[:, None], logit_BK, self.final_scores(logit_BK, predictions))
        ranked = Ranked(item_BK, final, self._with_logit(logit_BK, predictions))
        return self.answers(ranked, [degraded])[0]

    def explain(
        self, history: History, item_ids: Sequence[str], context: Mapping[str, object] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> list[list[dict[str, Any]]]:  # fmt: skip
        """What past events did for the scores of some items: leave each event out, exactly, in one batch.

        -> for every item [{"item_id", "title", "time", "gain"}] of the events that the model reads, the largest gain first;
        gain: the final score less what it is without the event. Ties go to the later event. Raises UnknownItemError.
        """
        items = torch.from_numpy(self.items(item_ids))
        known = [n for n, i in enumerate(history.item_ids) if self.position.get(i, NONE) != NONE][-(self.schema.window - 1) :]
        if not known:
            return [[] for _ in item_ids]
        whole = history.only(known)
        without = [whole.only([m for m in range(len(known)) if m != n]) for n in range(len(known))]
        encoded = self.encode_histories([whole, *without])
        state_BD, item_BK = self.encode_state(encoded.batch), items.expand(len(known) + 1, -1)
        # a history that becomes empty is scored as the start token is, not by popularity: the same scale
        logit_BK, _ = self.logits_of(state_BD, torch.ones(len(state_BD), dtype=torch.int64), item_BK)
        predictions = self.score(state_BD, item_BK, self.encode_context([context or {}] * len(state_BD)))
        final_BK = self.final_scores(logit_BK, predictions, weights)
        gain_EK = (final_BK[:1] - final_BK[1:]).tolist()
        place = [self.position[i] for i in whole.item_ids]
        out = []
        for k in range(len(item_ids)):
            order = sorted(range(len(known)), key=lambda e: (-gain_EK[e][k], -e))
            out.append([
                {"item_id": whole.item_ids[e], "title": self.titles[place[e]], "time": int(whole.times[e]), "gain": gain_EK[e][k]}
                for e in order
            ])  # fmt: skip
        return out

    def similar(self, item_id: str, k: int, exclude: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Items most like one item -> [{"item_id", "title", "score"}], cosine. Raises UnknownItemError."""
        item = self.items([item_id])
        item_1K, score_1K = self.similar_to(item, k, [np.unique(np.concatenate([item, self.items(exclude)]))])
        return [
            {"item_id": self.item_ids[i], "title": self.titles[i], "score": s}
            for i, s in zip(item_1K[0].tolist(), score_1K[0].tolist(), strict=True)
            if i != NONE
        ]

    def similar_to(self, item_B: IntArray, k: int, exclude: Sequence[IntArray]) -> tuple[Tensor, Tensor]:
        """The items of the largest cosine with some items -> (item_BK, score_BK), NONE where there are fewer."""
        index, vectors = self._similar_index
        return index.search(vectors[torch.from_numpy(item_B)], k, exclude)

    @torch.no_grad()
    def similar_scores(self, item_B: IntArray) -> Tensor:
        """Cosine of some items with all of the bundle's catalogue -> score_BN."""
        return self.similar_vec_ND[torch.from_numpy(item_B)] @ self.similar_vec_ND.T

    def profile(self, history: History) -> dict[str, Any]:
        """{"profile": {attribute or column of interest: {value: probability}}, "degraded"}."""
        encoded = self.encode_histories([history])
        found = self.profile_of(self.encode_state(encoded.batch), encoded.visible)[0]
        return {"profile": found, "degraded": encoded.degraded[0]}

    def profile_of(self, state_BD: Tensor, visible: Sequence[IntArray]) -> list[dict[str, dict[str, float]]]:
        probability = self.profile_probabilities(state_BD, visible)
        return [
            {
                task.key: dict(zip(task.classes, probability[name][row].tolist(), strict=True))
                for name, task in self.model.profiles.items()
            }
            for row in range(len(state_BD))
        ]

    @torch.no_grad()
    def profile_probabilities(self, state_BD: Tensor, visible: Sequence[IntArray]) -> dict[str, Tensor]:
        """Task name -> probability per class, (B, classes). visible: of EncodedHistories."""
        if not self.model.profiles:
            return {}
        bags = Bags.of_lists([self._as_trained(items) for items in visible]).to(self.device)
        state_BD = state_BD.to(self.device)
        return {name: torch.softmax(task.logits(state_BD, bags), dim=-1).cpu() for name, task in self.model.profiles.items()}

    def _as_trained(self, items: IntArray) -> IntArray:
        """Positions in the bundle's catalogue; items that joined it are left out."""
        if self._changes is None:
            return items
        N = len(self._base.item_ids)
        before = self._changes.before_A[items[items >= N] - N]
        return np.union1d(items[items < N], before[before != NONE])

    @torch.no_grad()
    def item_probabilities(self) -> dict[str, Tensor]:
        """Task that tells something of items -> probability per class, (N, classes) of the bundle's catalogue."""
        vec_ND = self.item_vec_ND.to(self.device)
        return {name: task.item_probabilities(vec_ND).cpu() for name, task in self.model.item_tasks.items()}

    @torch.no_grad()
    def item_attributes(self, item_id: str) -> dict[str, dict[str, float]]:
        """{column: {value: probability}} of one item, from its vector. Raises UnknownItemError."""
        vec_1D = self._vec_ND[torch.from_numpy(self.items([item_id])).to(self.device)]
        found = {t.column: (t.classes, t.item_probabilities(vec_1D)[0].tolist()) for t in self.model.item_tasks.values()}
        return {column: dict(zip(classes, values, strict=True)) for column, (classes, values) in found.items()}


def _below(code_NL: IntArray, more_AM: IntArray) -> IntArray:
    """Rows of numbers below others, the shorter filled with 0."""
    width = max(code_NL.shape[1], more_AM.shape[1])
    return np.concatenate([np.pad(c, ((0, 0), (0, width - c.shape[1]))) for c in (code_NL, more_AM)])
