"""The inference graph: ingress → StateEncoder → Retrieval → Heads, four deployments, one stage each.

The ingress reads the history, calls the stages with integers, and hosts `finalise`. Every message carries a stamp:
the bundle's fingerprint and the history's version. A stage that has another bundle, or is handed a state of another
stamp, refuses. Torch runs in an executor of one thread, never on a replica's event loop.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle

from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.predictor import Candidates, FilterError, History, IntArray, Ranked, UnknownItemError
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.serving import api
from mtrec_ray.serving.guard import Guard, Guarded, set_guard
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.settings import ServingSettings, Tokens, open_store, store_path
from mtrec_ray.serving.sharded import ShardedIndex
from mtrec_ray.serving.store import SKEW_MS, EventError, EventRules, StoreError

T = TypeVar("T")
STORE_DOWN = "history_store_down"
REASONS = 3
"""Events that explain an item, at most."""


class MixedBundlesError(RuntimeError):
    """Two stages of one answer have different bundles, or a state comes from another version of the history store."""


@dataclass(frozen=True)
class Stamp:
    """What an answer is made from; every message between stages carries it."""

    bundle: str
    """Fingerprint of the bundle."""
    history: str = ""
    """Version of the history; empty where an answer reads none."""


@dataclass(frozen=True)
class EncodedState:
    """One history as StateEncoder answers it, with what the later stages need of it."""

    stamp: Stamp
    state_BD: torch.Tensor
    length_B: torch.Tensor
    seen: list[IntArray]
    visible: list[IntArray]
    degraded: list[str]


@dataclass(frozen=True)
class Asked:
    """Whose answer it is, and from what."""

    stamp: Stamp
    history: History
    user_id: str | None
    """As the store knows the user, where the state may be remembered."""
    marks: list[str]
    """Degradations so far."""


class _Stage:
    """A predictor and a thread for its torch work."""

    def __init__(self, bundle_uri: str, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.predictor = bundle.load(bundle_uri)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="torch")

    async def _run(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _check(self, stamp: Stamp, state: EncodedState | None = None) -> None:
        """Raises MixedBundlesError."""
        if stamp.bundle != self.predictor.fingerprint:
            raise MixedBundlesError(f"{type(self).__name__} has bundle {self.predictor.fingerprint}, asked for {stamp.bundle}")
        if state is not None and state.stamp != stamp:
            raise MixedBundlesError(f"{type(self).__name__} was handed a state of {state.stamp} for an answer from {stamp}")

    async def fingerprint(self) -> str:
        return self.predictor.fingerprint

    def check_health(self) -> None:
        """Serve calls this; a stage without a usable model is replaced."""
        if not torch.isfinite(self.predictor.item_vec_ND[:1]).all():
            raise RuntimeError("item vectors are not finite")


@serve.deployment(name="StateEncoder")
class StateEncoder(_Stage):
    """histories → user states. Where events have texts it holds the TextEncoder."""

    def __init__(self, bundle_uri: str, threads: int = 1, cached: int = 4096) -> None:
        """cached: states that it remembers."""
        super().__init__(bundle_uri, threads)
        self.cached, self._states = cached, OrderedDict[tuple[str, str], EncodedState]()
        if self.predictor.schema.event_texts:
            _ = self.predictor.event_texts  # an encoder that is not here is said now, and not to the first caller

    async def encode(self, stamp: Stamp, history: History, user_id: str | None = None) -> EncodedState:
        """State, seen positions and degradations of one history. user_id: whose it is in this version, to remember the state."""
        self._check(stamp)
        key = (user_id or "", stamp.history)
        known = self._states.get(key) if user_id is not None else None
        if known is not None:
            self._states.move_to_end(key)
            return known
        state = await self._run(self._encode, stamp, history)
        if user_id is not None and self.cached:
            self._states[key] = state
            while len(self._states) > self.cached:
                self._states.popitem(last=False)
        return state

    def _encode(self, stamp: Stamp, history: History) -> EncodedState:
        encoded = self.predictor.encode_histories([history])
        state_BD = self.predictor.encode_state(encoded.batch)
        return EncodedState(stamp, state_BD, encoded.batch.length_B, encoded.seen, encoded.visible, encoded.degraded[0])


@serve.deployment(name="Retrieval")
class Retrieval(_Stage):
    """states → candidates. Of a catalogue in parts (`index.shards`) it starts the actors that search them."""

    def __init__(self, bundle_uri: str, threads: int = 1) -> None:
        super().__init__(bundle_uri, threads)
        shards = self.predictor.config.index.shards
        if shards > 1:
            self.predictor.index = ShardedIndex(bundle_uri, len(self.predictor.item_ids), shards)

    async def retrieve(
        self, stamp: Stamp, state: EncodedState, k: int, where: Mapping[str, list[str]] | None = None, only: list[str] | None = None
    ) -> Candidates:
        """where: filter by attributes; only: ids of items to choose from."""
        self._check(stamp, state)
        return await self._run(self._retrieve, state, k, where, only)

    def _retrieve(self, state: EncodedState, k: int, where: Mapping[str, list[str]] | None, only: list[str] | None) -> Candidates:
        predictor, allowed_N = self.predictor, None
        if where:
            allowed_N = predictor.allowed(where)
        if only is not None:
            given_N = np.zeros(len(predictor.item_ids), bool)
            given_N[predictor.known_items(only)] = True
            allowed_N = given_N if allowed_N is None else allowed_N & given_N
        return predictor.retrieve(state.state_BD, state.length_B, state.seen, k, allowed_N)

    async def logits(self, stamp: Stamp, state: EncodedState, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Retrieval scores of given items."""
        self._check(stamp, state)
        return await self._run(self.predictor.logits_of, state.state_BD, state.length_B, items)

    async def similar(self, stamp: Stamp, item_id: str, k: int) -> list[dict[str, Any]]:
        self._check(stamp)
        return await self._run(self.predictor.similar, item_id, k)


@serve.deployment(name="Heads")
class Heads(_Stage):
    """states and candidates → one number per task; states → profiles."""

    async def score(
        self, stamp: Stamp, state: EncodedState, items: torch.Tensor, context: Mapping[str, api.Value]
    ) -> dict[str, torch.Tensor]:
        self._check(stamp, state)
        return await self._run(self._score, state.state_BD, items, context)

    def _score(self, state_BD: torch.Tensor, items: torch.Tensor, context: Mapping[str, api.Value]) -> dict[str, torch.Tensor]:
        return self.predictor.score(state_BD, items, self.predictor.encode_context([context]))

    async def explain(
        self, stamp: Stamp, history: History, item_ids: list[str], context: Mapping[str, api.Value], weights: Mapping[str, float]
    ) -> list[list[dict[str, Any]]]:
        """Predictor.explain."""
        self._check(stamp)
        return await self._run(self.predictor.explain, history, item_ids, context, weights)

    async def profile(self, stamp: Stamp, state: EncodedState) -> dict[str, dict[str, float]]:
        self._check(stamp, state)
        return (await self._run(self.predictor.profile_of, state.state_BD, state.visible))[0]


http = FastAPI(
    title="mtrec_ray",
    description="Recommendations, scores, similar items and profiles from one multi-task model. Times are milliseconds UTC.",
    version="1",
)
http.add_middleware(Guarded)


@http.exception_handler(UnknownItemError)
async def _unknown_item(request: Request, error: UnknownItemError) -> JSONResponse:
    return JSONResponse({"detail": str(error), "item_id": error.item_id}, status_code=404)


@http.exception_handler(api.BadRequestError)
@http.exception_handler(EventError)
@http.exception_handler(FilterError)
async def _bad_request(request: Request, error: ValueError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=422)


@http.exception_handler(StoreError)
async def _store_down(request: Request, error: StoreError) -> JSONResponse:
    """An event that cannot be kept is not acknowledged."""
    detail = "the history store cannot be reached; send the events again (an event_id counts once)"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


@http.exception_handler(MixedBundlesError)
async def _mixed_bundles(request: Request, error: MixedBundlesError) -> JSONResponse:
    detail = "a rollout is under way: stages have different bundles; try again"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


_NO_STORE: dict[int | str, dict[str, Any]] = {
    501: {"description": "The service keeps no events"},
    503: {"description": "The store cannot be reached; send the events again"},
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"description": "An item id that the catalogue lacks"}}


@serve.deployment(name="Ingress")
@serve.ingress(http)
class Ingress(_Stage):
    """HTTP: reads the history, calls the stages, hosts `finalise`; keeps events."""

    def __init__(
        self, bundle_uri: str, data_uri: str, encoder: DeploymentHandle, retrieval: DeploymentHandle, heads: DeploymentHandle,
        settings: ServingSettings | None = None,
    ) -> None:  # fmt: skip
        super().__init__(bundle_uri)
        self.settings = settings or ServingSettings()
        set_guard(Guard(Tokens(self.settings), self.settings.max_body_bytes))
        self.prepared = PreparedHistories(data_uri)
        self.store = open_store(self.settings.store, data_uri, self.predictor)
        self.rules = EventRules(self.predictor.config, self.predictor.schema)
        self._store_pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        names, key = self.predictor.config.data.pseudonyms, self.predictor.schema.pseudonym_key
        self.pseudonyms = None if names is None else Pseudonyms.load(names, key)
        self.encoder, self.retrieval, self.heads = encoder, retrieval, heads

    @http.post("/recommend", response_model=api.RecommendAnswer)
    async def recommend(self, request: api.RecommendRequest) -> dict[str, Any]:
        """The best k items for a stored user or an inline history."""
        predictor = self.predictor
        self._check_context(request.context)
        predictor.check_weights(request.weights)
        predictor.check_where(request.where)
        k = min(request.k, len(predictor.item_ids))
        asked = await self._history(request)
        state = self._excluding(await self._encoded(asked), request)
        filters = (request.where or None, request.candidates)
        candidates = await self.retrieval.retrieve.remote(state.stamp, state, k, *filters)
        predictions = await self.heads.score.remote(state.stamp, state, candidates.item_BK, request.context)
        ranked = await self._run(self._final, candidates, predictions, k, request)
        answer = predictor.answers(ranked, [state.degraded])[0]
        if request.explain:
            ids, popular = [i["item_id"] for i in answer["items"]], bool(candidates.popular_B[0])
            more = (asked.history, ids, request.context, request.weights)
            found = [[]] * len(ids) if popular or not ids else await self.heads.explain.remote(state.stamp, *more)
            for item, reasons in zip(answer["items"], found, strict=True):
                item["because"] = [r for r in reasons if r["gain"] > 0][:REASONS]
        return {"user_id": request.user_id, "bundle": state.stamp.bundle, **answer}

    def _final(self, candidates: Candidates, predictions: dict[str, torch.Tensor], k: int, request: api.RecommendRequest) -> Ranked:
        chosen = bool(request.diversity or request.caps)
        width = candidates.item_BK.shape[1] if chosen else k
        ranked = self.predictor.finalise(candidates, predictions, width, request.weights)
        return self.predictor.diversify(ranked, k, request.diversity, request.caps) if chosen else ranked

    def _excluding(self, state: EncodedState, request: api.RecommendRequest) -> EncodedState:
        """The same state, and what this request leaves out."""
        seen = state.seen
        if request.exclude_seen is not None:
            seen = state.visible if request.exclude_seen else [items[:0] for items in seen]
        if request.exclude:
            seen = [np.union1d(items, self.predictor.known_items(request.exclude)) for items in seen]
        return state if seen is state.seen else replace(state, seen=seen)

    @http.post("/events", response_model=api.EventsAnswer, responses=_NO_STORE)
    async def events(self, request: api.EventsRequest) -> dict[str, int]:
        """Keep what users did: durable before this answers, and in the very next recommendation. One bad event keeps all out."""
        if self.store is None:
            raise HTTPException(501, "this service keeps no events (store.kind: none)")
        now, kept = api.now_ms(), []
        for place, event in enumerate(request.events):
            user_id = event.user_id if self.pseudonyms is None else self.pseudonyms.one(event.user_id)
            where = f"events[{place}]: "
            kept.append(
                self.rules.check(where, user_id, event.item_id, event.timestamp, event.event_id, event.actions, event.context, now)
            )
        new = await asyncio.get_running_loop().run_in_executor(self._store_pool, self.store.append, kept)
        return {"accepted": sum(new), "duplicates": len(new) - sum(new)}

    @http.post("/score", response_model=api.ScoreAnswer, responses=_NOT_FOUND)
    async def score(self, request: api.ScoreRequest) -> dict[str, Any]:
        """Given items for a user, in the order given."""
        self._check_context(request.context)
        items = torch.from_numpy(self.predictor.items(request.item_ids))[None]
        state = await self._state(request)
        (logits, popular), predictions = await asyncio.gather(
            self.retrieval.logits.remote(state.stamp, state, items),
            self.heads.score.remote(state.stamp, state, items, request.context),
        )
        answer = await self._run(self.predictor.scored_answer, items, logits, popular, predictions, state.degraded)
        return {"user_id": request.user_id, "bundle": state.stamp.bundle, **answer}

    @http.post("/similar", response_model=api.SimilarAnswer, responses=_NOT_FOUND)
    async def similar(self, request: api.SimilarRequest) -> dict[str, Any]:
        """Items most like an item."""
        self.predictor.items([request.item_id])
        me, k = self.predictor.fingerprint, min(request.k, len(self.predictor.item_ids))
        items = await self.retrieval.similar.remote(Stamp(me), request.item_id, k)
        return {"item_id": request.item_id, "bundle": me, "items": items, "degraded": []}

    @http.post("/profile", response_model=api.ProfileAnswer)
    async def profile(self, request: api.ProfileRequest) -> dict[str, Any]:
        """What the history says about a user: a probability per value of every attribute."""
        state = await self._state(request)
        profile = await self.heads.profile.remote(state.stamp, state)
        return {"user_id": request.user_id, "bundle": state.stamp.bundle, "profile": profile, "degraded": state.degraded}

    @http.get("/healthz", response_model=api.Health)
    async def healthz(self) -> dict[str, str]:
        """200 when every stage answers with the same bundle, else 503."""
        me = self.predictor.fingerprint
        stages = (self.encoder, self.retrieval, self.heads)
        found = await asyncio.gather(*[s.fingerprint.remote() for s in stages])
        if any(f != me for f in found):
            raise HTTPException(503, f"stages have different bundles: {sorted({me, *found})}")
        return {"status": "ok", "bundle": me}

    async def _state(self, request: Any) -> EncodedState:
        return await self._encoded(await self._history(request))

    async def _history(self, request: Any) -> Asked:
        """What is known of who asks, at the moment that is asked for."""
        marks: list[str] = []
        known_as: str | None = None
        if request.history is not None:
            history, version = api.inline_history(request.history, self.predictor.schema), "inline"
        else:
            known_as = request.user_id if self.pseudonyms is None else self.pseudonyms.one(request.user_id)
            try:
                history, version = await asyncio.get_running_loop().run_in_executor(self._store_pool, self._stored, known_as)
            except StoreError:  # rung 1: the answer of somebody whom nobody knows
                history, version, known_as, marks = History(), "none", None, [STORE_DOWN]
        at = request.at if request.at is not None else api.now_ms() + SKEW_MS
        # what a moment of its own cuts is not remembered
        return Asked(
            Stamp(self.predictor.fingerprint, version), history.before(at), known_as if request.at is None else None, marks
        )

    async def _encoded(self, asked: Asked) -> EncodedState:
        state = await self.encoder.encode.remote(asked.stamp, asked.history, asked.user_id)
        return replace(state, degraded=[*asked.marks, *state.degraded]) if asked.marks else state  # type: ignore[no-any-return]

    def _stored(self, known_as: str) -> tuple[History, str]:
        """What is known of a user, and its version."""
        if self.store is None:
            return self.prepared.get(known_as) or History(), self.prepared.version
        found = self.store.get(known_as)
        return (
            (History(), f"{self.prepared.version}:0")
            if found is None
            else (found.history, f"{self.prepared.version}:{found.version}")
        )

    def _check_context(self, context: Mapping[str, api.Value]) -> None:
        api.check_context(context, {c.name: c for c in self.predictor.schema.request_features})


def build_graph(
    bundle_uri: str,
    data_uri: str,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    settings: ServingSettings | None = None,
) -> serve.Application:
    """The four deployments, bound to one bundle and one store.

    options: deployment name -> Serve options (`autoscaling_config`, `ray_actor_options`, ...).
    Raises NoRetrievalError, StorageError, ValueError for a store that cannot be here.
    """
    settings = settings or ServingSettings()
    if settings.store.kind == "sqlite":
        store_path(settings.store, data_uri)
        nodes = sum(1 for n in ray.nodes() if n["Alive"]) if ray.is_initialized() else 1
        if nodes > 1:
            raise ValueError(f"store.kind: sqlite is for one machine, and the cluster has {nodes} nodes; take redis")
    config = storage.join(storage.Directory(bundle_uri).prefix, "config.json")
    RunConfig.model_validate_json(storage.read_bytes(config)).require_retrieval("serving")
    root, data, chosen = storage.absolute(bundle_uri), storage.absolute(data_uri), options or {}

    def bind(deployment: Any, *args: Any) -> Any:
        return deployment.options(**chosen.get(deployment.name, {})).bind(*args)

    stages = [bind(StateEncoder, root, 1, settings.cached_states), bind(Retrieval, root), bind(Heads, root)]
    return bind(Ingress, root, data, *stages, settings)  # type: ignore[no-any-return]
