"""The HTTP side: reads the history, calls the stages, hosts `finalise`; keeps events, changed items and shown lists.

One answer is made from one bundle, chosen at its beginning; where a stage does not have it, the whole answer is made again from
another that is held. What a stage that fails leaves is the ladder of docs/serving.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from fastapi import HTTPException
from fastapi.responses import HTMLResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from mtrec_ray import golden
from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.hashing import place_of
from mtrec_ray.histories import History
from mtrec_ray.predictor import Predictor, Ranked, UnknownItemError
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.serving import api, guard
from mtrec_ray.serving.app import http
from mtrec_ray.serving.deployments import Stage, here
from mtrec_ray.serving.guard import Guard, set_guard
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.impressions import ImpressionLog, ShownList, explore
from mtrec_ray.serving.items import ItemRules, StoredItem
from mtrec_ray.serving.ladder import HEADS_DOWN, RETRIEVAL_DOWN, STATE_CACHED, STATE_DOWN, STORE_DOWN, StageDownError, call
from mtrec_ray.serving.meters import Meters
from mtrec_ray.serving.remembered import Users
from mtrec_ray.serving.settings import ServingSettings, Tokens
from mtrec_ray.serving.stages import EncodedState, FloatArray, MixedBundlesError, Retrieved, Stamp, allowed
from mtrec_ray.serving.store import SKEW_MS, EventRules, HistoryStore, StoreError
from mtrec_ray.serving.versions import Version

T = TypeVar("T")
REASONS = 3
"""Events that explain an item, at most."""
POLL_SECONDS = 1.0
"""After which a change of an item is known to every ingress, and through it to every stage."""
STAGES_READY_SECONDS = 120.0
"""For the other stages to load a bundle; then a rollout is refused."""
AGREED_IN_A_ROW = 5
"""Golden requests are answered so often through the whole graph before a rollout counts."""
SHARE = {"StateEncoder": 0.4, "Retrieval": 0.5, "Heads": 0.7}
"""Of the time that is left, for a stage that something can stand in for."""
PAGE = Path(__file__).parent / "page.html"

log = logging.getLogger("ray.serve")

_NO_STORE: dict[int | str, dict[str, Any]] = {
    501: {"description": "The service keeps nothing (store.kind: none), or cannot read texts"},
    503: {"description": "The store cannot be reached; send this again"},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "An item id that the catalogue lacks"}}
_BUSY: dict[int | str, dict[str, Any]] = {
    429: {"description": "Too much to do"},
    503: {"description": "A stage does not answer, or a rollout is under way"},
    504: {"description": "Not before the deadline"},
}


@dataclass(frozen=True)
class Asked:
    """Whose answer it is, and from what."""

    version: Version
    stamp: Stamp
    predictor: Predictor
    """Of the version, for the catalogue as this replica knows it."""
    until: float
    history: History = field(default_factory=History)
    user_id: str | None = None
    """As the store knows the user, where the state may be remembered."""
    marks: tuple[str, ...] = ()
    """Degradations so far."""


# serve.ingress pickles the endpoints with what they name at that moment: it stands above them


class _NoTexts:
    """In the place of a TextEncoder that was not deployed."""

    def __getattr__(self, name: str) -> Any:
        raise EncoderError("this service has no TextEncoder")


def _rows(predictions: Mapping[str, FloatArray]) -> dict[str, torch.Tensor]:
    """Of one request, as the predictor has them. Copied: what comes from another process is read-only."""
    return {name: torch.tensor(values)[None] for name, values in predictions.items()}


def _last(values: list[T]) -> list[tuple[bool, T]]:
    return [(n == len(values) - 1, value) for n, value in enumerate(values)]


def _told(item: StoredItem) -> dict[str, Any]:
    flags = {"available": item.available, "blocked": item.blocked, "deleted": item.deleted}
    return {"item_id": item.item_id, "number": item.number, "columns": item.columns, **flags}


@serve.deployment(name="Ingress")
@serve.ingress(http)
class Ingress(Stage):
    """The service's HTTP."""

    def __init__(
        self, bundle_uri: str, data_uri: str, encoder: DeploymentHandle | None = None, retrieval: DeploymentHandle | None = None,
        heads: DeploymentHandle | None = None, texts: DeploymentHandle | None = None, settings: ServingSettings | None = None,
    ) -> None:  # fmt: skip
        """Without handles all stages are in this process (fused)."""
        super().__init__(bundle_uri, data_uri, settings)
        self.measured, self.prepared = Meters(), PreparedHistories(data_uri)
        set_guard(Guard(Tokens(self.settings), self.settings.max_body_bytes, self._told))
        predictor = self.versions.current.base
        _ = self.store  # one that cannot be here is said now
        self.rules = EventRules(predictor.config, predictor.schema)
        names, key = predictor.config.data.pseudonyms, predictor.schema.pseudonym_key
        self.pseudonyms = None if names is None else Pseudonyms.load(names, key)
        local: list[Any] = here(bundle_uri, data_uri, self.settings, self.versions) if encoder is None else []
        stages: tuple[Any, ...] = tuple(local) or (encoder, retrieval, heads, texts or _NoTexts())
        self.encoder, self.retrieval, self.heads, self.texts = stages
        self.fused = bool(local)
        self.remembered = Users(self.settings.cached_states)
        self.impressions = None
        if self.settings.impressions and self.store is not None:
            self.impressions = ImpressionLog(self.store.keep_impressions)
        self._polling: asyncio.Task[None] | None = None

    def _told(self, endpoint: str, status: int, ms: float) -> None:
        self.measured.request(endpoint, status, ms)
        if status >= 500 or ms > self.settings.deadline_ms:
            log.warning("request", extra={"endpoint": endpoint, "status": status, "ms": round(ms, 1)})
        else:
            log.debug("request", extra={"endpoint": endpoint, "status": status, "ms": round(ms, 1)})

    # ------------------------------------------------------------------ recommend

    @http.post("/recommend", response_model=api.RecommendAnswer, responses=_BUSY)
    async def recommend(self, request: api.RecommendRequest) -> dict[str, Any]:
        """The best k items for a stored user or an inline history."""
        return await self._wholly(request.user_id, lambda asked: self._recommend(asked, request, guard.request_id.get()))

    @http.post("/recommend/many", response_model=api.ManyAnswer, responses=_BUSY)
    async def recommend_many(self, request: api.ManyRequest) -> dict[str, Any]:
        """Many users in one call, answered in the order given. One that is wrong keeps all out."""
        if len(request.requests) > self.settings.max_together:
            raise api.BadRequestError(f"requests: at most {self.settings.max_together} in one call (max_together)")
        me = guard.request_id.get()

        def work(one: api.RecommendRequest, name: str) -> Callable[[Asked], Awaitable[dict[str, Any]]]:
            return lambda asked: self._recommend(asked, one, name)

        named = [self._wholly(r.user_id, work(r, f"{me}:{n}")) for n, r in enumerate(request.requests)]
        return {"answers": await asyncio.gather(*named)}

    async def _recommend(self, asked: Asked, request: api.RecommendRequest, name: str) -> dict[str, Any]:
        predictor = asked.predictor
        self._check_context(predictor, request.context)
        predictor.check_weights(request.weights)
        predictor.check_where(request.where)
        predictor.check_caps(request.caps)
        k = self._at_most(request.k, predictor)
        asked = await self._with_history(asked, request)
        weights = request.weights
        try:
            state, marks = await self._encoded(asked)
            state = self._excluding(predictor, state, request)
            retrieved, predictions, down = await self._ranked(asked, state, k, request)
            marks = [*marks, *state.degraded, *retrieved.degraded]
            candidates, stamp = retrieved.candidates, state.stamp
            if retrieved.items > stamp.items:  # it knows items that this replica does not
                predictor = await self._newest(asked.version)
            if down:
                weights = {n: float(n == predictor.retrieval_name) for n in predictor.final_weights}
                marks.append(HEADS_DOWN)
        except StageDownError as error:
            marks = [*asked.marks, STATE_DOWN if error.stage == "StateEncoder" else RETRIEVAL_DOWN]
            candidates = await self.worker.run(self._popular, predictor, asked.history, k, request)
            predictions, stamp = {}, asked.stamp
            weights = {n: 0.0 for n in predictor.final_weights}
        popular = bool(candidates.popular_B[0])
        chosen = bool(request.diversity or request.caps)
        explored = self.settings.exploration.temperature if not (chosen or popular) else 0.0
        width = candidates.item_BK.shape[1] if chosen or explored else k
        ranked = predictor.finalise(candidates, predictions, width, weights)
        propensity = np.ones(k)
        if chosen:
            ranked = await self.worker.run(predictor.diversify, ranked, k, request.diversity, request.caps)
        elif explored:
            ranked, propensity = explore(ranked, explored, self.settings.exploration.seed, name)
            ranked = Ranked(ranked.item_BK[:, :k], ranked.score_BK[:, :k], {n: v[:, :k] for n, v in ranked.tasks_BK.items()})
        answer = predictor.answers(ranked, [marks])[0]
        if request.explain:
            await self._explain(asked, stamp, answer, request, popular or HEADS_DOWN in marks)
        self._shown(asked, stamp, answer, propensity, name)
        return {"user_id": request.user_id, "bundle": stamp.bundle, **answer}

    async def _encoded(self, asked: Asked) -> tuple[EncodedState, list[str]]:
        """The user's state; where StateEncoder fails, the last one that is known. Raises StageDownError where there is none.

        One that this replica remembers, of this version of the history, costs no call."""
        known = self.remembered.get(asked.stamp.bundle, asked.user_id)
        if known is not None and known.follows(asked.stamp):
            self.meters.cache(True)
            return known.state, list(asked.marks)
        try:
            until = asked.until
            ask = lambda: self.encoder.encode.remote(asked.stamp, asked.history, asked.user_id, until)  # noqa: E731
            state: EncodedState = await self._timed("StateEncoder", ask, until)
        except StageDownError:
            if known is None:
                raise
            return known.state, [*asked.marks, STATE_CACHED]
        self.remembered.put(asked.user_id, state)
        return state, list(asked.marks)

    async def _ranked(
        self, asked: Asked, state: EncodedState, k: int, request: api.RecommendRequest
    ) -> tuple[Retrieved, dict[str, torch.Tensor], bool]:
        """Candidates, their predictions, and whether the heads failed. Raises StageDownError where Retrieval did.

        The same list again, of the same state and without anything else that the request asks for, costs no call."""
        plain = not (request.where or request.context) and request.candidates is None
        known = self.remembered.get(asked.stamp.bundle, asked.user_id) if plain else None
        if known is not None and (found := known.list_of(state, k)) is not None:
            return *found, False
        retrieved = await self._retrieved(asked, state, k, request)
        predictions, down = await self._scored(asked, state, retrieved, request)
        if known is not None and known.state is state and not down:
            known.keep(k, retrieved, predictions)
        return retrieved, predictions, down

    async def _retrieved(self, asked: Asked, state: EncodedState, k: int, request: api.RecommendRequest) -> Retrieved:
        filters = (request.where or None, request.candidates)
        found: Retrieved = await self._timed(
            "Retrieval", lambda: self.retrieval.retrieve.remote(state.stamp, state, k, *filters, asked.until), asked.until
        )
        return found

    async def _scored(
        self, asked: Asked, state: EncodedState, retrieved: Retrieved, request: api.RecommendRequest
    ) -> tuple[dict[str, torch.Tensor], bool]:
        """Predictions of the candidates, and whether the heads failed."""
        stamp = replace(state.stamp, items=max(state.stamp.items, retrieved.items))
        try:
            ask = lambda: self.heads.score.remote(stamp, state, retrieved.item_K, request.context, asked.until)  # noqa: E731
            return _rows(await self._timed("Heads", ask, asked.until)), False
        except StageDownError:
            return {}, True

    async def _timed(self, stage: str, ask: Callable[[], Any], until: float, share: float | None = None) -> Any:
        started = time.perf_counter()
        try:
            return await call(stage, ask, until, SHARE.get(stage, 1.0) if share is None else share)
        finally:
            self.measured.stage(stage, 1e3 * (time.perf_counter() - started))

    def _popular(self, predictor: Predictor, history: History, k: int, request: api.RecommendRequest) -> Any:
        """What is most popular of what the request leaves."""
        encoded = predictor.encode_histories(
            [History(history.item_ids, history.times, {}, {}, history.seen_item_ids, history.seen_times)]
        )
        stand_in = EncodedState(Stamp(""), np.zeros(0, np.float32), 0, encoded.seen[0], encoded.visible[0], [])
        seen = [self._excluding(predictor, stand_in, request).seen]
        return predictor.popular(seen, k, allowed(predictor, request.where, request.candidates))

    def _excluding(self, predictor: Predictor, state: EncodedState, request: api.RecommendRequest) -> EncodedState:
        """The same state, and what this request leaves out."""
        seen = state.seen
        if request.exclude_seen is not None:
            seen = state.visible if request.exclude_seen else seen[:0]
        if request.exclude:
            seen = np.union1d(seen, predictor.known_items(request.exclude))
        return state if seen is state.seen else replace(state, seen=seen)

    async def _explain(
        self, asked: Asked, stamp: Stamp, answer: dict[str, Any], request: api.RecommendRequest, without: bool
    ) -> None:
        """`because` of every item. Where the heads fail, nothing is said."""
        ids = [i["item_id"] for i in answer["items"]]
        found: list[list[dict[str, Any]]] = [[] for _ in ids]
        if ids and not without:
            ask = lambda: self.heads.explain.remote(stamp, asked.history, ids, request.context, request.weights, asked.until)  # noqa: E731
            try:
                found = await self._timed("Heads", ask, asked.until)
            except StageDownError:
                answer["degraded"].append(HEADS_DOWN)
        for item, reasons in zip(answer["items"], found, strict=True):
            item["because"] = [r for r in reasons if r["gain"] > 0][:REASONS]

    def _shown(self, asked: Asked, stamp: Stamp, answer: dict[str, Any], propensity: Any, name: str) -> None:
        """Metrics, and the list as it was shown."""
        items, log_ = answer["items"], self.impressions
        dropped = 0 if log_ is None else log_.dropped
        self.measured.answer(stamp.bundle, answer["degraded"], items, len(asked.predictor.item_ids), dropped)
        if log_ is None or asked.user_id is None or place_of("shown:" + asked.user_id) >= self.settings.impressions:
            return
        ids, scores = [i["item_id"] for i in items], [i["score"] for i in items]
        chances, tasks = propensity[: len(items)].tolist(), [i["tasks"] for i in items]
        log_.add(ShownList(asked.user_id, name, api.now_ms(), stamp.bundle, ids, scores, chances, tasks))

    # ------------------------------------------------------------------ other questions

    @http.post("/score", response_model=api.ScoreAnswer, responses=_NOT_FOUND | _BUSY)
    async def score(self, request: api.ScoreRequest) -> dict[str, Any]:
        """Given items for a user, in the order given."""

        async def work(asked: Asked) -> dict[str, Any]:
            predictor = asked.predictor
            self._check_context(predictor, request.context)
            items = predictor.items(request.item_ids)
            asked = await self._with_history(asked, request)
            state, marks = await self._encoded(asked)
            stamp, until = state.stamp, asked.until
            (logits, popular), predictions = await asyncio.gather(
                self._timed("Retrieval", lambda: self.retrieval.logits.remote(stamp, state, items, until), until, 1.0),
                self._timed("Heads", lambda: self.heads.score.remote(stamp, state, items, request.context, until), until, 1.0),
            )
            row = (torch.from_numpy(items)[None], torch.tensor(logits)[None], torch.tensor([popular]), _rows(predictions))
            answer = predictor.scored_answer(*row, [*marks, *state.degraded])
            return {"user_id": request.user_id, "bundle": stamp.bundle, **answer}

        return await self._wholly(request.user_id, work)

    @http.post("/similar", response_model=api.SimilarAnswer, responses=_NOT_FOUND | _BUSY)
    async def similar(self, request: api.SimilarRequest) -> dict[str, Any]:
        """Items most like an item."""

        async def work(asked: Asked) -> dict[str, Any]:
            asked.predictor.items([request.item_id])
            k = self._at_most(request.k, asked.predictor)
            ask = lambda: self.retrieval.similar.remote(asked.stamp, request.item_id, k, asked.until)  # noqa: E731
            items = await self._timed("Retrieval", ask, asked.until, 1.0)
            return {"item_id": request.item_id, "bundle": asked.stamp.bundle, "items": items, "degraded": []}

        return await self._wholly(None, work)

    @http.post("/search", response_model=api.SearchAnswer, responses=_BUSY)
    async def search(self, request: api.SearchRequest) -> dict[str, Any]:
        """Items whose texts are most like a text."""

        async def work(asked: Asked) -> dict[str, Any]:
            asked.predictor.check_where(request.where)
            k, name = self._at_most(request.k, asked.predictor), asked.stamp.bundle
            ask = lambda: self.texts.encode.remote(name, [request.text], asked.until)  # noqa: E731
            (vector,), _ = await self._timed("TextEncoder", ask, asked.until)
            find = lambda: self.retrieval.search.remote(asked.stamp, vector, k, request.where, asked.until)  # noqa: E731
            return {"bundle": name, "items": await self._timed("Retrieval", find, asked.until, 1.0), "degraded": []}

        return await self._wholly(None, work)

    @http.post("/profile", response_model=api.ProfileAnswer, responses=_BUSY)
    async def profile(self, request: api.ProfileRequest) -> dict[str, Any]:
        """What the history says about a user: a probability per value of every attribute."""

        async def work(asked: Asked) -> dict[str, Any]:
            asked = await self._with_history(asked, request)
            state, marks = await self._encoded(asked)
            ask = lambda: self.heads.profile.remote(state.stamp, state, asked.until)  # noqa: E731
            profile = await self._timed("Heads", ask, asked.until, 1.0)
            marks = [*marks, *state.degraded]
            return {"user_id": request.user_id, "bundle": state.stamp.bundle, "profile": profile, "degraded": marks}

        return await self._wholly(request.user_id, work)

    @http.post("/history", response_model=api.HistoryAnswer, responses=_NO_STORE)
    async def history(self, request: api.HistoryRequest) -> dict[str, Any]:
        """What is known of a user, the latest event first."""
        found, _ = await self.in_store(self._stored, self._known_as(request.user_id))
        titles = self.versions.current.known()[1]
        events = []
        for n in range(len(found.item_ids) - 1, max(len(found.item_ids) - 1 - request.limit, -1), -1):
            item = found.item_ids[n]
            place = titles.position.get(item, -1)
            values = {a: float(v[n]) for a, v in found.actions.items() if v[n] is not None and not np.isnan(v[n])}
            title = titles.titles[place] if place >= 0 else item
            events.append({"item_id": item, "title": title, "timestamp": int(found.times[n]), "actions": values})
        return {"user_id": request.user_id, "events": events, "seen_before": len(found.seen_item_ids)}

    # ------------------------------------------------------------------ what is kept

    @http.post("/events", response_model=api.EventsAnswer, responses=_NO_STORE)
    async def events(self, request: api.EventsRequest) -> dict[str, int]:
        """Keep what users did: durable before this answers, and in the very next recommendation. One bad event keeps all out."""
        store, now, kept = self._writable(), api.now_ms(), []
        for place, event in enumerate(request.events):
            user_id, where = self._known_as(event.user_id), f"events[{place}]: "
            kept.append(
                self.rules.check(where, user_id, event.item_id, event.timestamp, event.event_id, event.actions, event.context, now)
            )
        new = await self.in_store(store.append, kept)
        return {"accepted": sum(new), "duplicates": len(new) - sum(new)}

    @http.put("/items/{item_id}", response_model=api.ItemAnswer, responses=_NO_STORE | _BUSY)
    async def put_item(self, item_id: api.PathId, request: api.ItemRequest) -> dict[str, Any]:
        """An item joins, or gets another text: its row of the items table. Durable before this answers; recommendable a second or
        two later, everywhere. No training: the model knows it by its text."""
        store = self._writable()
        item_id = api.check_id(item_id)

        async def work(asked: Asked) -> dict[str, Any]:
            rules = ItemRules(asked.version.base.config, asked.version.base.schema)
            columns = rules.check(request.columns)
            text = rules.rows([(item_id, columns)])["text"][0].as_py() or ""
            ask = lambda: self.texts.encode.remote(asked.stamp.bundle, [text], asked.until)  # noqa: E731
            (vector,), key = await self._timed("TextEncoder", ask, asked.until)
            fields = {"columns": columns, "vector": vector, "encoder": key, "deleted": False}
            return _told(await self.in_store(store.change_item, item_id, fields))

        return await self._wholly(None, work)

    @http.get("/items/{item_id}", response_model=api.ItemAnswer, responses=_NOT_FOUND)
    async def get_item(self, item_id: api.PathId) -> dict[str, Any]:
        """What became of an item; number 0: nothing, it is as the bundle has it."""
        item_id = api.check_id(item_id)
        if self.store is not None:
            await self.in_store(self.items.refresh)
        found = self.items.get(item_id)
        if found is None and item_id not in self.versions.current.base.position:
            raise UnknownItemError(item_id)
        return _told(found or StoredItem(item_id))

    @http.patch("/items/{item_id}", response_model=api.ItemAnswer, responses=_NO_STORE | _NOT_FOUND)
    async def patch_item(self, item_id: api.PathId, request: api.ItemPatch) -> dict[str, Any]:
        """An item is out of stock, or blocked: it is in no list, but stays what it is in histories."""
        item_id, fields = api.check_id(item_id), request.model_dump(exclude_none=True)
        return await self._change(item_id, fields)

    @http.delete("/items/{item_id}", response_model=api.ItemAnswer, responses=_NO_STORE | _NOT_FOUND)
    async def delete_item(self, item_id: api.PathId) -> dict[str, Any]:
        """An item is known no more. PUT brings it back."""
        return await self._change(api.check_id(item_id), {"deleted": True})

    async def _change(self, item_id: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        store = self._writable()
        await self.in_store(self.items.refresh)
        if item_id not in self.versions.current.base.position and self.items.get(item_id) is None:
            raise UnknownItemError(item_id)
        return _told(await self.in_store(store.change_item, item_id, fields))

    def _writable(self) -> HistoryStore:
        if self.store is None:
            raise HTTPException(501, "this service keeps nothing (store.kind: none)")
        return self.store

    # ------------------------------------------------------------------ for people

    @http.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """A page to look at."""
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    @http.get("/about", response_model=api.About)
    async def about(self) -> dict[str, Any]:
        """What this service knows: its tasks, the labels that events may have, and what items can be filtered by."""
        predictor = self.versions.current.base
        labels = {n: {"kind": v.kind, "min": v.min, "max": v.max} for n, v in self.rules.labels.items()}
        filters = {spec.name: list(spec.values[:50]) for spec in predictor.schema.item_features}
        tasks = {n: t.kind for n, t in predictor.config.tasks.items()}
        return {"name": predictor.config.name, "tasks": tasks, "labels": labels, "filters": filters, "fused": self.fused}

    @http.get("/stats", response_model=api.Stats)
    async def stats(self) -> dict[str, Any]:
        """Latencies, degradations and answers of the replica that answers this, of the last requests."""
        return {**self.measured.told(), "versions": self.versions.told(), "items": self.items.number}

    @http.get("/versions", response_model=dict[str, Any])
    async def told_versions(self) -> dict[str, Any]:
        """What is served, what is tried, what was refused and why, by the replica that answers this."""
        return dict(self.versions.told())

    @http.get("/healthz", response_model=api.Health, responses={503: {"description": "Stages have different bundles"}})
    async def healthz(self) -> dict[str, str]:
        """200 when every stage has the bundle that is served, else 503."""
        me, until = self.versions.current.fingerprint, time.time() + 10
        stages = {"StateEncoder": self.encoder, "Retrieval": self.retrieval, "Heads": self.heads}
        found = await asyncio.gather(*[call(n, lambda s=s: s.has.remote(me), until) for n, s in stages.items()])  # type: ignore[misc]
        if not all(found):
            without = [n for n, there in zip(stages, found, strict=True) if not there]
            raise HTTPException(503, f"stages have different bundles: {without} lack {me}", {"Retry-After": "1"})
        return {"status": "ok", "bundle": me}

    # ------------------------------------------------------------------ versions and histories

    async def _wholly(self, user_id: str | None, work: Callable[[Asked], Awaitable[T]]) -> T:
        """An answer from one bundle; where a stage lacks it, the whole answer again."""
        if self._polling is None or self._polling.done():
            await self._begin()
        until = guard.until.get() or time.time() + self.settings.deadline_ms / 1e3
        version = self.versions.choose(user_id)
        for last, choice in _last([version, version, *self.versions.others(version)]):
            number, predictor = choice.known()
            if number != self.items.number:
                predictor = await self._live(choice)
            try:
                return await work(Asked(choice, Stamp(choice.fingerprint, items=choice.known()[0]), predictor, until))
            except MixedBundlesError:
                if last:
                    raise
        raise AssertionError("unreachable")

    async def _newest(self, version: Version) -> Predictor:
        await self.in_store(self.items.refresh)
        return await self._live(version)

    async def _live(self, version: Version) -> Predictor:
        """For the catalogue as this replica knows it; it does not ask the store, which may be down."""
        _, predictor = await asyncio.get_running_loop().run_in_executor(self._loader, version.live, self.items)
        return predictor

    async def _begin(self) -> None:
        """What changed before this replica was there is known to its first answer."""
        self._polling = asyncio.get_running_loop().create_task(self._poll())
        try:
            if self.store is not None and await self.in_store(self.items.refresh):
                await self._newest(self.versions.current)
        except StoreError:
            pass  # requests say so

    async def _poll(self) -> None:
        """Changed items, and bundles that have drained."""
        while True:
            try:
                if self.store is not None:
                    before = self.items.number
                    if await self.in_store(self.items.refresh) != before:
                        await self._live(self.versions.current)
                self.versions.drain()
            except StoreError:
                pass  # requests say so
            except Exception:
                log.exception("changed items could not be read")
            await asyncio.sleep(POLL_SECONDS)

    async def _agreed(self, found: list[Version]) -> None:
        """All stages have the bundles, and answer the golden requests through the graph. Raises StageDownError, GoldenError."""
        if self.fused:
            return
        deadline = time.time() + STAGES_READY_SECONDS
        for version in found:
            kept, right = version.golden, 0
            while right < AGREED_IN_A_ROW:
                try:
                    answers = [await self._golden(version, h) for h in golden.asked(kept)]
                    golden.compare(kept, answers)
                    right += 1
                except (MixedBundlesError, StageDownError):
                    right = 0
                    if time.time() > deadline:
                        raise
                    await asyncio.sleep(0.5)

    async def settled(self, found: list[Version]) -> None:
        if self.fused:
            await self.texts.stage.settled(found)

    async def _golden(self, version: Version, history: History) -> list[dict[str, Any]]:
        """One golden request through the graph."""
        until = time.time() + 30
        asked = Asked(version, Stamp(version.fingerprint, "golden"), version.base, until, history)
        request = api.RecommendRequest(user_id="golden", k=golden.K)
        state: EncodedState = await call("StateEncoder", lambda: self.encoder.encode.remote(asked.stamp, history), until)
        k = min(golden.K, len(version.base.item_ids))
        retrieved = await call("Retrieval", lambda: self.retrieval.retrieve.remote(state.stamp, state, k), until)
        predictions, down = await self._scored(asked, state, retrieved, request)
        if down:
            raise StageDownError("Heads", TimeoutError())
        return golden.plain(version.base.answers(version.base.finalise(retrieved.candidates, predictions, k), [[]])[0])

    def _known_as(self, user_id: str) -> str:
        return user_id if self.pseudonyms is None else self.pseudonyms.one(user_id)

    async def _with_history(self, asked: Asked, request: Any) -> Asked:
        """What is known of who asks, at the moment that is asked for."""
        marks: tuple[str, ...] = ()
        known_as: str | None = None
        if request.history is not None:
            history, version = api.inline_history(request.history, asked.predictor.schema), "inline"
        else:
            known_as = self._known_as(request.user_id)
            try:
                history, version = await asyncio.wait_for(
                    self.in_store(self._stored, known_as), max(0.5 * (asked.until - time.time()), 1e-3)
                )
            except (StoreError, TimeoutError):  # the answer of somebody whom nobody knows
                history, version, known_as, marks = History(), "none", None, (STORE_DOWN,)
        at = request.at if request.at is not None else api.now_ms() + SKEW_MS
        # what a moment of its own cuts is not remembered
        remembered = known_as if request.at is None else None
        return replace(
            asked, stamp=replace(asked.stamp, history=version), history=history.before(at), user_id=remembered, marks=marks
        )

    def _stored(self, known_as: str) -> tuple[History, str]:
        """What is known of a user, and its version."""
        if self.store is None:
            return self.prepared.get(known_as) or History(), self.prepared.version
        found = self.store.get(known_as)
        if found is None:
            return History(), f"{self.prepared.version}:0"
        return found.history, f"{self.prepared.version}:{found.version}"

    def _at_most(self, k: int, predictor: Predictor) -> int:
        return min(k, len(predictor.item_ids), self.settings.max_k)

    def _check_context(self, predictor: Predictor, context: Mapping[str, api.Value]) -> None:
        api.check_context(context, {c.name: c for c in predictor.schema.request_features})
