"""The predictor: a bundle -> recommend, score, similar, profile. It knows no Ray.

`recommend` composes four public stages, and every caller (evaluation, batch scoring, the Serve deployments)
calls these same stages:

    encode_state   histories -> user states          (one trunk pass)
    retrieve       states -> candidates              (index, seen filter; popularity without a history)
    score          states, candidates -> tasks       (sharing layers and heads)
    finalise       candidates, tasks -> the answer   (final order, titles)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray import item_features
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.event_texts import TextMemory
from mtrec_ray.features import InputSpec, TextSpec, dense
from mtrec_ray.models.batch import HistoryBatch, collate_history, feature_tensor
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.retrieval.exact import NONE, ExactIndex, mask_items, top_k
from mtrec_ray.retrieval.ivf import IvfIndex
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.wide import Bags

IntArray = NDArray[np.int64]
NO_HISTORY = "no_history"
UNKNOWN_HISTORY_ITEMS = "unknown_history_items"


class UnknownItemError(KeyError):
    """An item id that the catalogue lacks."""

    def __init__(self, item_id: str) -> None:
        super().__init__(item_id)
        self.item_id = item_id

    def __str__(self) -> str:
        return f"item {self.item_id!r} is not in the catalogue"


@dataclass(frozen=True)
class History:
    """What is known of a user: events in time order (ties in log order), with the log's own ids."""

    item_ids: Sequence[str] = ()
    times: Sequence[int] = ()
    """Milliseconds UTC."""
    actions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """NaN is missing; an action that is absent is missing everywhere."""
    context: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Features as the log has them (text, number, list of texts; None is missing); absent ones are missing everywhere."""
    seen_item_ids: Sequence[str] = ()
    """Items of events before those listed."""
    seen_times: Sequence[int] = ()

    def before(self, at: int | None) -> History:
        """The part strictly before a moment (ms)."""
        if at is None:
            return self
        n = int(np.searchsorted(np.asarray(self.times, dtype=np.int64), at, side="left"))
        m = int(np.searchsorted(np.asarray(self.seen_times, dtype=np.int64), at, side="left"))
        return History(
            self.item_ids[:n],
            self.times[:n],
            {k: v[:n] for k, v in self.actions.items()},
            {k: v[:n] for k, v in self.context.items()},
            self.seen_item_ids[:m],
            self.seen_times[:m],
        )


@dataclass(frozen=True)
class EncodedHistories:
    """Histories as the model reads them, what they exclude, and which degradations apply."""

    batch: HistoryBatch
    seen: list[IntArray]
    """Catalogue positions that may not be recommended (empty unless exclude_seen)."""
    visible: list[IntArray]
    """Distinct catalogue positions of all events that the histories hold, those before the window too; what profiles read."""
    degraded: list[list[str]]

    @classmethod
    def of(cls, batch: HistoryBatch, visible: list[IntArray], degraded: list[list[str]], exclude_seen: bool) -> EncodedHistories:
        nothing = [np.zeros(0, np.int64)] * len(visible)
        return cls(batch, visible if exclude_seen else nothing, visible, degraded)


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
        index: IvfIndex | None = None,
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
        self.position = {item_id: i for i, item_id in enumerate(self.item_ids)}
        self.item_vec_ND = item_vec_ND.cpu()
        self._vec_ND = item_vec_ND.to(self.device)
        self.exact = ExactIndex(self._vec_ND)
        self.index: ExactIndex | IvfIndex = self.exact if index is None else index
        count_N = torch.from_numpy(catalogue["count"].to_numpy().astype(np.float32))
        self.trained_events = int(count_N.sum())  # training events that are history; what popularity counts
        self.popularity_N = count_N / count_N.sum().clamp(min=1)
        with torch.no_grad():
            similarity = model.similarity
            normalised = torch.nn.functional.normalize(self.item_vec_ND, dim=-1)
            self.similar_vec_ND = normalised if similarity is None else similarity.vectors(self._vec_ND).cpu()
        fixed = [spec for spec in schema.request_features if spec.at_inference is not None]
        self.fixed = {spec.name: feature_tensor(dense(spec.encode([spec.at_inference]))) for spec in fixed}
        self.final_weights = {
            name: task.final_weight if task.final_weight is not None else float(task.kind == "retrieval")
            for name, task in config.tasks.items()
        }
        self.retrieval_name = config.retrieval_task

    # ------------------------------------------------------------------ ids and integers

    def items(self, item_ids: Sequence[str]) -> IntArray:
        """Ids -> catalogue positions. Raises UnknownItemError."""
        try:
            return np.array([self.position[i] for i in item_ids], dtype=np.int64)
        except KeyError as error:
            raise UnknownItemError(error.args[0]) from None

    def encode_histories(self, histories: Sequence[History]) -> EncodedHistories:
        """The last L - 1 known events of each history, as integers. Items that the catalogue lacks are left
        out, and that is marked."""
        capacity = self.schema.window - 1
        items, times, lengths = [], [], []
        actions: dict[str, list[NDArray[np.float32]]] = {a.name: [] for a in self.schema.actions}
        features = self.schema.history_features
        context: dict[str, list[Any]] = {spec.name: [] for spec in features}
        visible, degraded = [], []
        for history in histories:
            position = np.array([self.position.get(i, NONE) for i in history.item_ids], dtype=np.int64)
            known = np.flatnonzero(position != NONE)
            marks = [] if len(known) == len(position) else [UNKNOWN_HISTORY_ITEMS]
            shown = known[-capacity:]
            items.append(position[shown])
            times.append(np.asarray(history.times, dtype=np.int64)[shown])
            lengths.append(len(shown))
            for name, parts in actions.items():
                values = history.actions.get(name)
                full = np.full(len(position), np.nan) if values is None else np.asarray(values, dtype=np.float64)
                parts.append(full[shown].astype(np.float32))
            for spec in features:
                raw = history.context.get(spec.name) or [None] * len(position)
                context[spec.name].extend(raw[i] for i in shown)
            older = np.array([self.position.get(i, NONE) for i in history.seen_item_ids], dtype=np.int64)
            visible.append(np.unique(np.concatenate([position[known], older[older != NONE]])))
            degraded.append(marks if len(shown) else [*marks, NO_HISTORY])
        batch = collate_history(
            np.concatenate(items) if items else np.zeros(0, np.int64),
            np.concatenate(times) if times else np.zeros(0, np.int64),
            np.array(lengths, dtype=np.int64),
            {n: np.concatenate(v) if v else np.zeros(0, np.float32) for n, v in actions.items()},
            {spec.name: self._encoded(spec, context[spec.name]) for spec in features},
            self.schema.session_gap_ms,
        )
        return EncodedHistories.of(batch, visible, degraded, self.schema.exclude_seen)

    def _encoded(self, spec: InputSpec, values: list[Any]) -> NDArray[Any]:
        """A feature of past events as the model reads it; texts are their vectors. Raises FeatureError."""
        if isinstance(spec, TextSpec):
            return self.event_texts(spec.column(values))
        return dense(spec.encode(values))

    @cached_property
    def event_texts(self) -> TextMemory:
        """Vectors of the texts in histories. The TextEncoder is loaded when this is first asked for. Raises EncoderError."""
        from mtrec_ray.encoders.loading import EncoderError, encoder_identity
        from mtrec_ray.encoders.text import TextEncoder

        assert self.config.encoder is not None  # a configuration with texts has one
        here, there = (
            {k: v for k, v in (e or {}).items() if k != "model"} for e in (encoder_identity(self.config.encoder), self.text_encoder)
        )
        if there and here != there:  # it may lie elsewhere
            raise EncoderError(
                f"encoder.model {self.config.encoder.model!r}: its files here are not those that the bundle was trained with, and "
                "texts of events would be misread; put the bundle's encoder in its place, or train again"
            )
        encoder = TextEncoder(self.config.encoder.model_copy(update={"compile": False, "use_gpu": False}))
        return TextMemory(encoder.encode, encoder.width)

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

    def retrieve(self, state_BD: Tensor, length_B: Tensor, seen: Sequence[IntArray], k: int) -> Candidates:
        """States -> the best max(k, K) items that are not excluded."""
        self.config.require_retrieval("ranking items")
        k = max(k, self.config.ranking.candidates)
        with torch.no_grad():
            item_BK, logit_BK = self.index.search(self.model.retrieval.query(state_BD.to(self.device)), k, seen)
        popular_B = length_B == 0
        if popular_B.any():
            rows = torch.nonzero(popular_B)[:, 0]
            popular = self.popularity_N.repeat(len(rows), 1)
            item_BK[rows], logit_BK[rows] = top_k(mask_items(popular, [seen[r] for r in rows.tolist()]), k)
        return Candidates(item_BK, logit_BK, popular_B)

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

    def finalise(self, candidates: Candidates, predictions: dict[str, Tensor], k: int) -> Ranked:
        """The final order: Σ w·g over the candidates, ties by catalogue position; cut to k.

        The popularity list keeps its order and its scores.
        """
        final = self.final_scores(candidates.logit_BK, predictions)
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

    def _with_logit(self, logit_BK: Tensor, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.retrieval_name is not None  # there is a logit
        return {self.retrieval_name: logit_BK, **predictions}

    def final_scores(self, logit_BK: Tensor, predictions: dict[str, Tensor]) -> Tensor:
        """Σ w·g (DESIGN §1.4)."""
        total = self.final_weights.get(self.retrieval_name or "", 0.0) * logit_BK
        for name, task in self.model.pointwise.items():
            if self.final_weights[name]:
                total = total + self.final_weights[name] * task.final(predictions[name])
        return total

    # ------------------------------------------------------------------ answers

    def recommend(
        self,
        histories: Sequence[History],
        k: int,
        contexts: Sequence[Mapping[str, object]] | None = None,
    ) -> list[dict[str, Any]]:
        """Top k for each history -> [{"items": [{"item_id", "title", "score", "tasks"}], "degraded"}]."""
        encoded = self.encode_histories(histories)
        ranked = self.rank(encoded, k, self.encode_context(contexts or [{}] * len(histories)))
        return self.answers(ranked, encoded.degraded)

    def rank(self, encoded: EncodedHistories, k: int, context_B: dict[str, Tensor]) -> Ranked:
        """The four stages on integers."""
        state_BD = self.encode_state(encoded.batch)
        candidates = self.retrieve(state_BD, encoded.batch.length_B, encoded.seen, k)
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
        """Retrieval scores of given items -> (logit_BK, popular_B)."""
        score_BN, popular_B = self.retrieval_scores(state_BD, length_B)
        return score_BN.gather(1, item_BK), popular_B

    def scored_answer(
        self, item_BK: Tensor, logit_BK: Tensor, popular_B: Tensor, predictions: dict[str, Tensor], degraded: list[str]
    ) -> dict[str, Any]:
        """One row of given items -> the answer, in the order given."""
        final = torch.where(popular_B[:, None], logit_BK, self.final_scores(logit_BK, predictions))
        ranked = Ranked(item_BK, final, self._with_logit(logit_BK, predictions))
        return self.answers(ranked, [degraded])[0]

    def similar(self, item_id: str, k: int, exclude: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Items most like one item -> [{"item_id", "title", "score"}], cosine. Raises UnknownItemError."""
        item = self.items([item_id])
        banned = np.unique(np.concatenate([item, self.items(exclude)]))
        item_K, score_K = (t[0].tolist() for t in top_k(mask_items(self.similar_scores(item), [banned]), k))
        return [
            {"item_id": self.item_ids[i], "title": self.titles[i], "score": s}
            for i, s in zip(item_K, score_K, strict=True)
            if i != NONE
        ]

    @torch.no_grad()
    def similar_scores(self, item_B: IntArray) -> Tensor:
        """Cosine of some items with all -> score_BN."""
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
        bags, state_BD = Bags.of_lists(visible).to(self.device), state_BD.to(self.device)
        return {name: torch.softmax(task.logits(state_BD, bags), dim=-1).cpu() for name, task in self.model.profiles.items()}

    @torch.no_grad()
    def item_probabilities(self) -> dict[str, Tensor]:
        """Task that tells something of items -> probability per class, (N, classes)."""
        return {name: task.item_probabilities(self._vec_ND).cpu() for name, task in self.model.item_tasks.items()}

    @torch.no_grad()
    def item_attributes(self, item_id: str) -> dict[str, dict[str, float]]:
        """{column: {value: probability}} of one item, from its vector. Raises UnknownItemError."""
        vec_1D = self._vec_ND[torch.from_numpy(self.items([item_id])).to(self.device)]
        found = {t.column: (t.classes, t.item_probabilities(vec_1D)[0].tolist()) for t in self.model.item_tasks.values()}
        return {column: dict(zip(classes, values, strict=True)) for column, (classes, values) in found.items()}
