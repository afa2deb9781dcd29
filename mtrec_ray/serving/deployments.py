"""The inference graph: ingress → StateEncoder → Retrieval → Heads, and TextEncoder for new items and search by text.

Every deployment hosts one stage (serving/stages.py) and holds one bundle or, during a rollout, more (serving/versions.py). Torch
runs in a thread of its own, and what came while it was busy is done together (serving/work.py). Every message carries a stamp;
a stage that lacks the bundle, or is handed a state of another stamp, refuses.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from ray import serve

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.golden import histories
from mtrec_ray.histories import History, IntArray
from mtrec_ray.predictor import Predictor
from mtrec_ray.serving import stages
from mtrec_ray.serving.items import LiveItems
from mtrec_ray.serving.meters import StageMeters
from mtrec_ray.serving.settings import ServingSettings, open_store, store_path
from mtrec_ray.serving.sharded import ShardedIndex
from mtrec_ray.serving.stages import EncodedState, FloatArray, MixedBundlesError, Retrieved, Stamp
from mtrec_ray.serving.store import HistoryStore
from mtrec_ray.serving.versions import Rollout, Version, Versions
from mtrec_ray.serving.work import Worker

log = logging.getLogger("ray.serve")


class Stage:
    """Bundles, a thread for torch, and what changed in the catalogue."""

    def __init__(
        self,
        bundle_uri: str,
        data_uri: str | None = None,
        settings: ServingSettings | None = None,
        versions: Versions | None = None,
    ) -> None:
        """data_uri, settings: where changes of items are read; None: nowhere. versions: of a process that hosts several stages."""
        self.settings, self.data_uri = settings or ServingSettings(), data_uri
        torch.set_num_threads(self.settings.threads)
        self.versions = versions or Versions(bundle_uri, self.prepare)
        self.meters = StageMeters(type(self).__name__)
        self.worker = Worker("torch", self.settings.max_batch, self.meters.batch)
        self.items = LiveItems(lambda number: [] if self.store is None else self.store.items_since(number))
        self._store: HistoryStore | None = None
        self._store_pool = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._rolling: asyncio.Task[None] | None = None
        self._begun = False

    def prepare(self, predictor: Predictor, uri: str) -> None:
        """Of every bundle that is loaded."""

    @property
    def store(self) -> HistoryStore | None:
        """Opened when it is first asked for. Raises StoreError."""
        if self._store is None and self.data_uri is not None:
            self._store = open_store(self.settings.store, self.data_uri, self.versions.current.base)
        return self._store

    async def in_store(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._store_pool, function, *args)

    # ------------------------------------------------------------------ versions

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve calls this at the start, and then whenever `user_config` is another. A rollout that is wrong is refused and told
        (GET /versions); what is served goes on."""
        if not self._begun:
            self._begun = True
            await self._roll(config, first=True)
            # where the rollout is wrong, what args.run names; a replica that has nothing to serve does not start
            _ = await asyncio.get_running_loop().run_in_executor(self._loader, lambda: self.versions.current)
            return
        if self._rolling is not None:
            self._rolling.cancel()
        self._rolling = asyncio.get_running_loop().create_task(self._roll(config))  # requests go on meanwhile

    async def _roll(self, config: Mapping[str, Any], first: bool = False) -> None:
        try:
            rollout = Rollout.model_validate(config)
            found = await asyncio.get_running_loop().run_in_executor(self._loader, self.versions.load, rollout)
            if not first:
                await self._agreed(found)
        except asyncio.CancelledError:  # another one came
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if reason not in self.versions.refused.values():  # loading has told which of them it was
                self.versions.refused[str(dict(config).get("bundle"))] = reason
            log.error("rollout refused", extra={"reason": reason})
            return
        self.versions.switch(rollout, found)
        log.info("rollout", extra={"bundle": found[0].fingerprint[:12]})
        await self.settled(found)

    async def _agreed(self, found: list[Version]) -> None:
        """The ingress asks the other stages here."""

    async def settled(self, found: list[Version]) -> None:
        """After a switch."""

    async def has(self, fingerprint: str) -> bool:
        """Whether this replica holds a bundle."""
        _ = await asyncio.get_running_loop().run_in_executor(self._loader, lambda: self.versions.current)
        return self.versions.has(fingerprint)

    async def at(self, stamp: Stamp, state: EncodedState | None = None) -> tuple[int, Predictor]:
        """The predictor for a stamp, and the number of the last change of an item that it knows. Raises MixedBundlesError."""
        version = self.versions.get(stamp.bundle)
        if state is not None and state.stamp != stamp:
            raise MixedBundlesError(f"{type(self).__name__} was handed a state of {state.stamp} for an answer from {stamp}")
        if stamp.items > self.items.number:
            await self.in_store(self.items.refresh)
        known = version.known()
        if known[0] == self.items.number:
            return known
        return await asyncio.get_running_loop().run_in_executor(self._loader, version.live, self.items)

    async def check_health(self) -> None:
        """Serve calls this; a replica that does not give a real answer in time is replaced."""
        self.versions.drain()
        await self.worker.run(self._healthy, self.versions.current.base)

    def _healthy(self, predictor: Predictor) -> None:
        """Raises RuntimeError."""
        state_BD = predictor.encode_state(predictor.encode_histories(histories(predictor)[1:2]).batch)
        found = predictor.retrieve(state_BD, torch.ones(1, dtype=torch.int64), [np.zeros(0, np.int64)], 1)
        if not torch.isfinite(found.logit_BK[:, 0]).all():
            raise RuntimeError("scores are not finite")


@serve.deployment(name="StateEncoder")
class StateEncoder(Stage):
    """histories → user states. Where events have texts it holds their TextEncoder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._states = OrderedDict[tuple[str, str, str, int], EncodedState]()

    def prepare(self, predictor: Predictor, uri: str) -> None:
        if predictor.schema.event_texts:
            _ = predictor.event_texts  # an encoder that is not here is said now, and not to the first caller

    async def encode(self, stamp: Stamp, history: History, user_id: str | None = None, until: float | None = None) -> EncodedState:
        """State, seen positions and degradations of one history. user_id: whose it is in this version, to remember the state."""
        number, predictor = await self.at(stamp)
        key = (stamp.bundle, user_id or "", stamp.history, number)
        if user_id is not None:
            known = self._states.get(key)
            self.meters.cache(known is not None)
            if known is not None:
                self._states.move_to_end(key)
                return known
        work = partial(stages.encode, predictor)
        state: EncodedState = await self.worker.batched((stamp.bundle, number), work, (stamp, history), until)
        if user_id is not None and self.settings.cached_states:
            self._states[key] = state
            while len(self._states) > self.settings.cached_states:
                self._states.popitem(last=False)
        return state


@serve.deployment(name="Retrieval")
class Retrieval(Stage):
    """states → candidates. Of a catalogue in parts (`index.shards`) it starts the actors that search them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._texts: dict[str, torch.Tensor | None] = {}

    def prepare(self, predictor: Predictor, uri: str) -> None:
        if predictor.config.index.shards > 1:
            predictor.index = ShardedIndex(uri, len(predictor.item_ids), predictor.config.index.shards)

    async def retrieve(
        self, stamp: Stamp, state: EncodedState, k: int, where: Mapping[str, list[str]] | None = None,
        only: list[str] | None = None, until: float | None = None,
    ) -> Retrieved:  # fmt: skip
        """where: filter by attributes; only: ids of items to choose from."""
        number, predictor = await self.at(stamp, state)
        if where or only is not None:
            return await self.worker.run(stages.retrieve_some, predictor, number, k, state, where, only, until=until)
        found: Retrieved = await self.worker.batched(
            (stamp.bundle, number, k), partial(stages.retrieve, predictor, number, k), state, until
        )
        return found

    async def logits(
        self, stamp: Stamp, state: EncodedState, item_K: IntArray, until: float | None = None
    ) -> tuple[FloatArray, bool]:
        """stages.logits."""
        _, predictor = await self.at(stamp, state)
        return await self.worker.run(stages.logits, predictor, state, item_K, until=until)

    async def similar(self, stamp: Stamp, item_id: str, k: int, until: float | None = None) -> list[dict[str, Any]]:
        _, predictor = await self.at(stamp)
        return await self.worker.run(predictor.similar, item_id, k, until=until)

    async def search(
        self, stamp: Stamp, query: bytes, k: int, where: Mapping[str, list[str]] | None = None, until: float | None = None
    ) -> list[dict[str, Any]]:
        """Items by the vector of a text (float32)."""
        _, predictor = await self.at(stamp)
        if stamp.bundle not in self._texts:
            self._texts = {stamp.bundle: self.versions.get(stamp.bundle).text_vectors()}
        text_NE, query_E = self._texts[stamp.bundle], torch.from_numpy(np.frombuffer(query, np.float32).copy())
        if text_NE is None:
            raise EncoderError("the bundle holds no text vectors: an older version wrote it; run the pipeline into a new directory")
        return await self.worker.run(stages.search, predictor, text_NE, query_E, k, where, until=until)


@serve.deployment(name="Heads")
class Heads(Stage):
    """states and candidates → one number per task; states → profiles."""

    async def score(
        self, stamp: Stamp, state: EncodedState, item_K: IntArray, context: Mapping[str, Any], until: float | None = None
    ) -> dict[str, FloatArray]:
        number, predictor = await self.at(stamp, state)
        key, one = (stamp.bundle, number, len(item_K)), (state, item_K, context)
        found: dict[str, FloatArray] = await self.worker.batched(key, partial(stages.score, predictor), one, until)
        return found

    async def explain(
        self, stamp: Stamp, history: History, item_ids: list[str], context: Mapping[str, Any], weights: Mapping[str, float],
        until: float | None = None,
    ) -> list[list[dict[str, Any]]]:  # fmt: skip
        """Predictor.explain."""
        _, predictor = await self.at(stamp)
        return await self.worker.run(predictor.explain, history, item_ids, context, weights, until=until)

    async def profile(self, stamp: Stamp, state: EncodedState, until: float | None = None) -> dict[str, dict[str, float]]:
        number, predictor = await self.at(stamp, state)
        work = partial(stages.profiles, predictor)
        found: dict[str, dict[str, float]] = await self.worker.batched((stamp.bundle, number, "profile"), work, state, until)
        return found


@serve.deployment(name="TextEncoder")
class TextEncoder(Stage):
    """Texts → vectors, of items that join and of searches."""

    async def settled(self, found: list[Version]) -> None:
        """The language model is loaded before somebody waits for it: a replica that starts is not there before."""
        if found[0].base.text_encoder is None:
            return
        try:
            await self.worker.run(found[0].encode, ["a text"])
        except EncoderError as error:  # callers are told; everything else goes on
            log.error("no TextEncoder", extra={"reason": str(error)})

    async def encode(self, bundle: str, texts: list[str], until: float | None = None) -> tuple[list[bytes], str]:
        """-> (float32 vectors, which TextEncoder made them). Raises EncoderError for a bundle that reads no texts."""
        version = self.versions.get(bundle)

        def work(asked: list[list[str]]) -> list[list[bytes]]:
            vectors = iter(version.encode([t for texts in asked for t in texts]))
            return [[next(vectors).tobytes() for _ in texts] for texts in asked]

        return await self.worker.batched(bundle, work, texts, until), version.encoder_key


STAGES: tuple[Any, ...] = (StateEncoder, Retrieval, Heads, TextEncoder)


class _Call:
    """A stage of this process, asked as a handle is."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


class Here:
    """A handle of a stage in this process."""

    def __init__(self, stage: Any) -> None:
        self.stage = stage

    def __getattr__(self, name: str) -> _Call:
        return _Call(getattr(self.stage, name))


def here(bundle_uri: str, data_uri: str | None, settings: ServingSettings, versions: Versions) -> list[Here]:
    """All stages in this process, with the same bundles: the fused variant."""
    return [Here(d.func_or_class(bundle_uri, data_uri, settings, versions)) for d in STAGES]


def build_graph(
    bundle_uri: str,
    data_uri: str,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    settings: ServingSettings | None = None,
    fused: bool = False,
) -> serve.Application:
    """The deployments, bound to one bundle and one store; fused: the ingress alone, with all stages in it.

    options: deployment name -> Serve options (`autoscaling_config`, `ray_actor_options`, ...).
    Raises NoRetrievalError, StorageError, ValueError for a store that cannot be here.
    """
    from mtrec_ray.serving.ingress import Ingress

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
        mine: dict[str, Any] = {"user_config": {}, **chosen.get(deployment.name, {})}
        return deployment.options(**mine).bind(root, data, *args)

    stages_ = [None] * len(STAGES) if fused else [bind(stage, settings) for stage in STAGES]
    return bind(Ingress, *stages_, settings)  # type: ignore[no-any-return]
