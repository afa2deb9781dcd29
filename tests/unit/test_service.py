"""The service in one process, without Serve between its stages: versions, changed items, the ladder, shown lists."""

from __future__ import annotations

import asyncio
import inspect
import json
import pickle
import re
import shutil
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import bundle, golden, storage
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.histories import History
from mtrec_ray.predictor import Predictor, UnknownItemError
from mtrec_ray.serving import api, guard
from mtrec_ray.serving.deployments import STAGES, Here
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.ingress import Ingress
from mtrec_ray.serving.items import ItemError
from mtrec_ray.serving.ladder import StageDownError
from mtrec_ray.serving.settings import ServingSettings
from mtrec_ray.serving.stages import MixedBundlesError, Stamp
from mtrec_ray.serving.store import StoreError
from tests import tiny
from tests.conftest import TinyRun

K = 6
COLUMNS = {"name": "Thing 29", "genre": "even"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Items with texts and a category."""
    folder = tmp_path_factory.mktemp("service")
    config, data, text, predictor = tiny.write_shop(folder)
    other = tiny.make_config(folder, lambda raw: (tiny.with_item_texts(folder)(raw), raw.update(seed=5))[0])
    tiny.write_bundle(other, data, tiny.train_locally(other, data, text), folder / "other", text)
    return TinyRun(folder, config, data, predictor)


Make = Callable[..., Any]


def sent(message: Any) -> Any:
    """As it arrives from another process: its arrays are read-only."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(pickled, buffers=[bytes(b) for b in buffers])


class There(Here):
    """A handle of a stage in this process, whose questions and answers are sent."""

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.stage, name)

        async def remote(*args: Any) -> Any:
            answer = method(*sent(args))
            return sent(await answer if inspect.isawaitable(answer) else answer)

        return SimpleNamespace(remote=remote)


@pytest.fixture
def make(run: TinyRun, tmp_path: Path) -> Make:
    """A service: its stages in this process, each with bundles of its own, as in replicas of their own."""

    def build(fused: bool = False, **settings: Any) -> Any:
        chosen = ServingSettings.model_validate(
            {"store": {"kind": "sqlite", "path": str(tmp_path / "live.sqlite")}, "deadline_ms": 60_000} | settings
        )
        root, data = run.bundle_root, str(run.folder / "data")
        stages = [] if fused else [There(d.func_or_class(root, data, chosen)) for d in STAGES]
        return Ingress.func_or_class.__mro__[1](root, data, *stages, settings=chosen)

    return build


def ask(service: Any, **body: Any) -> Coroutine[Any, Any, dict[str, Any]]:
    return service.recommend(api.RecommendRequest(**{"user_id": "u1", "k": K, **body}))  # type: ignore[no-any-return]


def ids(answer: dict[str, Any]) -> list[str]:
    return [i["item_id"] for i in answer["items"]]


def now(service: Any) -> Any:
    """What a poll does."""
    return service._newest(service.versions.current)


# ------------------------------------------------------------------ fused


@pytest.fixture
def every_warning() -> Iterator[None]:
    """PyTorch's own come once in a process otherwise."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_one_deployment_answers_as_five_do(make: Make, every_warning: None) -> None:
    async def answers(service: Any) -> list[Any]:
        many = [await ask(service, user_id=f"u{n}", explain=True, diversity=0.3 * (n % 2)) for n in range(6)]
        rest = [
            await service.score(api.ScoreRequest(user_id="u1", item_ids=["i3", "new"])),
            await service.similar(api.SimilarRequest(item_id="i3", k=4)),
            await service.profile(api.ProfileRequest(user_id="u1")),
            await service.search(api.SearchRequest(text="Thing 7, odd", k=4)),
        ]
        return many + rest

    assert asyncio.run(answers(make(fused=True))) == asyncio.run(answers(make()))


def test_many_users_in_one_call_get_what_each_gets_alone(make: Make) -> None:
    async def work(service: Any) -> None:
        requests = [api.RecommendRequest(user_id=f"u{n}", k=n + 1) for n in range(5)] + [api.RecommendRequest(history=[], k=2)]
        together = await service.recommend_many(api.ManyRequest(requests=requests))
        alone = [await service.recommend(r) for r in requests]
        for a, b in zip(together["answers"], alone, strict=True):
            assert ids(a) == ids(b)
            assert [i["score"] for i in a["items"]] == pytest.approx([i["score"] for i in b["items"]], abs=1e-5)
        with pytest.raises(api.BadRequestError, match="at most 2 in one call"):
            await make(max_together=2).recommend_many(api.ManyRequest(requests=requests))

    asyncio.run(work(make()))


def test_nobody_gets_more_than_max_k(make: Make) -> None:
    service = make(max_k=4)
    assert len(ids(asyncio.run(ask(service, k=10**9)))) == 4
    assert len(asyncio.run(service.similar(api.SimilarRequest(item_id="i3", k=10**9)))["items"]) == 4


# ------------------------------------------------------------------ versions


@pytest.mark.slow
def test_a_rollout_switches_whole_answers_and_rolls_back(make: Make, run: TinyRun) -> None:
    other = bundle.load(str(run.folder / "other"))

    async def work(service: Any) -> None:
        parts = [service, *(h.stage for h in (service.encoder, service.retrieval, service.heads, service.texts))]
        for part in parts:
            await part.reconfigure({})
        before = await ask(service)
        assert before["bundle"] == run.predictor.fingerprint

        async def roll(config: dict[str, Any], order: list[Any]) -> None:
            for part in order:
                await part.reconfigure(config)
            await asyncio.gather(*[p._rolling for p in order])

        await roll({"bundle": str(run.folder / "other"), "drain_seconds": 0.2}, parts)
        after = await ask(service)
        history = service.prepared.get("u1")
        assert after["bundle"] == other.fingerprint and ids(after) == ids(other.recommend([history], K)[0])
        time.sleep(0.3)
        for part in parts:
            part.versions.drain()
            assert list(part.versions._held) == [other.fingerprint]  # the old one is unloaded
        await roll({"bundle": None}, parts[::-1])
        assert (await ask(service))["items"] == before["items"]

    asyncio.run(work(make()))


def test_while_stages_differ_every_answer_is_from_one_bundle_and_none_fails(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        for part in (service, service.encoder.stage):
            part.versions.switch(*loaded(part, run.folder / "other"))
        found = await ask(service)  # retrieval and heads do not have it: answered from the one that all have
        assert found["bundle"] == run.predictor.fingerprint and found["degraded"] == []
        assert (await service.healthz_or_status())["detail"]

    def loaded(part: Any, uri: Path) -> tuple[Any, Any]:
        _ = part.versions.current
        rollout = type(part.versions.rollout)(bundle=str(uri))
        return rollout, part.versions.load(rollout)

    service = make()

    async def health() -> dict[str, Any]:
        with pytest.raises(Exception, match="503") as error:
            await service.healthz()
        return {"detail": error.value.detail}

    service.healthz_or_status = health
    asyncio.run(work(service))


def test_a_stage_that_has_none_of_them_is_a_503(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        stage = service.heads.stage
        stage.versions.default_uri = str(run.folder / "other")
        with pytest.raises(MixedBundlesError):
            await ask(service)

    asyncio.run(work(make()))


@pytest.mark.slow
def test_what_serves_goes_on_when_another_bundle_is_published_in_its_place_and_can_come_back(run: TinyRun, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "bundle", tmp_path / "bundle")
    shutil.copytree(run.folder / "bundle", tmp_path / "kept")
    chosen = ServingSettings.model_validate({"store": {"kind": "none"}, "deadline_ms": 60_000})
    root, data = str(tmp_path / "bundle"), str(run.folder / "data")
    stages = [There(d.func_or_class(root, data, chosen)) for d in STAGES]
    service = Ingress.func_or_class.__mro__[1](root, data, *stages, settings=chosen)
    parts = [service, *(s.stage for s in stages)]

    async def roll(uri: str | None) -> None:
        for part in parts:
            await part.reconfigure({"bundle": uri})
        await asyncio.gather(*[p._rolling for p in parts if p._rolling is not None])

    async def work() -> None:
        await roll(None)
        query = api.SearchRequest(text="Thing 7, odd", k=3)
        before, found = await ask(service), await service.search(query)
        shutil.rmtree(tmp_path / "bundle")
        shutil.copytree(run.folder / "other", tmp_path / "bundle")  # what a nightly loop does with the place of a run's bundle
        assert await ask(service) == before and await service.search(query) == found
        await roll(str(run.folder / "other"))
        assert (await ask(service))["bundle"] != before["bundle"]
        await roll(str(tmp_path / "kept"))  # the first one, from where it was kept
        assert (await ask(service))["items"] == before["items"] and service.versions.refused == {}

    asyncio.run(work())


def copied(run: TinyRun, to: Path, change: Callable[[Path], None]) -> Path:
    shutil.copytree(run.folder / "other", to)
    change(to / ("0" * 16))
    return to


def forged(folder: Path, wrong: Callable[[dict[str, Any]], None]) -> None:
    """Golden requests that the bundle does not answer so; the fingerprint is right."""
    kept = storage.read_json(str(folder / "golden.json"))
    wrong(kept)
    storage.write_json(str(folder / "golden.json"), kept)
    stated = storage.read_json(str(folder / "fingerprint.json"))
    storage.write_json(str(folder / "fingerprint.json"), stated | {"fingerprint": bundle.compute_fingerprint(str(folder))})


@pytest.mark.slow
@pytest.mark.parametrize("case", ["damaged", "golden", "no golden", "schema", "missing", "share"])
def test_a_wrong_bundle_is_refused_and_the_old_one_goes_on(make: Make, run: TinyRun, tmp_path: Path, case: str) -> None:
    def change(folder: Path) -> None:
        if case == "damaged":
            (folder / "schema.json").write_text((folder / "schema.json").read_text() + " ")
        if case == "golden":
            forged(folder, lambda kept: kept["requests"][3]["answer"][0].update(score=99.0))
        if case == "no golden":
            (folder / "golden.json").unlink()
            stated = storage.read_json(str(folder / "fingerprint.json"))
            storage.write_json(str(folder / "fingerprint.json"), stated | {"fingerprint": bundle.compute_fingerprint(str(folder))})
        if case == "schema":
            stated = storage.read_json(str(folder / "fingerprint.json"))
            storage.write_json(str(folder / "fingerprint.json"), stated | {"schema_version": 0})

    uri = str(tmp_path / "nothing" if case == "missing" else copied(run, tmp_path / "wrong", change))
    says = {"damaged": "do not match the fingerprint", "golden": "golden request 3, place 1", "no golden": "no golden requests",
            "schema": "schema_version 0", "missing": "nothing is published", "share": "share"}[case]  # fmt: skip

    async def work(service: Any) -> None:
        await service.reconfigure({})
        await service.reconfigure({"bundle": uri} | ({"share": 2} if case == "share" else {}))
        await service._rolling
        found = await ask(service)
        assert found["bundle"] == run.predictor.fingerprint and ids(found)
        told = await service.told_versions()
        assert says in told["refused"][uri] and told["current"] == run.predictor.fingerprint

    asyncio.run(work(make(fused=True)))


def test_the_canary_answers_its_share_of_the_users_always_the_same(make: Make, run: TinyRun) -> None:
    other = bundle.fingerprint_of(str(run.folder / "other"))

    async def work(service: Any) -> None:
        await service.reconfigure({})
        await service.reconfigure({"canary": str(run.folder / "other"), "share": 0.3})
        await service._rolling
        first = [service.versions.choose(f"user {n}").fingerprint for n in range(2000)]
        assert first == [service.versions.choose(f"user {n}").fingerprint for n in range(2000)]
        assert 0.26 < np.mean([f == other for f in first]) < 0.34
        user = f"user {first.index(other)}"
        assert (await ask(service, user_id=user))["bundle"] == other
        assert (await ask(service, history=[], user_id=None))["bundle"] == run.predictor.fingerprint
        await service.reconfigure({})
        await service._rolling
        assert (await ask(service, user_id=user))["bundle"] == run.predictor.fingerprint

    asyncio.run(work(make(fused=True)))


def test_a_wrong_canary_is_told_once_by_its_own_name(make: Make, run: TinyRun, tmp_path: Path) -> None:
    async def work(service: Any) -> None:
        await service.reconfigure({})
        await service.reconfigure({"canary": str(tmp_path / "nothing"), "share": 0.5})
        await service._rolling
        assert list((await service.told_versions())["refused"]) == [str(tmp_path / "nothing")]

    asyncio.run(work(make(fused=True)))


def test_a_refusal_is_told_no_more_once_the_bundle_serves(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        await service.reconfigure({})
        for uri in (str(run.folder / "other"), run.bundle_root):
            service.versions.refused[uri] = "StageDownError: the disk was slow"
            await service.reconfigure({"bundle": uri})
            await service._rolling
            assert uri not in service.versions.refused and service.versions.current.asked == uri

    asyncio.run(work(make(fused=True)))


def test_golden_requests_tell_another_model(run: TinyRun) -> None:
    kept = bundle.find_golden(run.bundle_root)
    assert len(kept["requests"]) == golden.REQUESTS and kept["requests"][0]["item_ids"] == []
    golden.check(run.predictor, kept)
    other = bundle.load(str(run.folder / "other"))
    with pytest.raises(golden.GoldenError):
        golden.check(other, kept)


def test_a_broken_model_has_no_golden_answers_and_cannot_be_rolled_out(run: TinyRun, tmp_path: Path) -> None:
    broken = bundle.load(run.bundle_root)
    broken.model.trunk.norm.weight.data.fill_(float("nan"))
    text = storage.Directory(str(run.folder / "text"))
    broken.model.text_NE = load_text_vectors(text.prefix, storage.read_table(run.data.path("catalogue.parquet")))
    found = tiny.write_bundle(run.config, run.data, broken.model, tmp_path / "bundle", text)
    with pytest.raises(golden.GoldenError, match="the model is broken"):
        golden.check(found, bundle.find_golden(str(tmp_path / "bundle")) or {})


# ------------------------------------------------------------------ items


def test_an_item_that_joins_is_recommended_searched_and_scored_everywhere(make: Make) -> None:
    async def work(service: Any) -> None:
        everything = ids(await ask(service, k=100, exclude_seen=False))
        told = await service.put_item("fresh", api.ItemRequest(columns=COLUMNS))
        assert told["columns"] == COLUMNS and told["number"] == 1
        await now(service)
        with_it = ids(await ask(service, k=100, exclude_seen=False))
        assert set(with_it) == {*everything, "fresh"}
        assert ids(await ask(service, k=100, exclude_seen=False, where={"genre": ["even"]})).count("fresh") == 1
        found = (await service.search(api.SearchRequest(text="Thing 29, even", k=1)))["items"][0]
        assert found["item_id"] == "fresh" and found["title"] == "Thing 29" and found["score"] == pytest.approx(1, abs=1e-4)
        assert (await service.score(api.ScoreRequest(user_id="u1", item_ids=["fresh"])))["items"][0]["item_id"] == "fresh"
        assert (await service.similar(api.SimilarRequest(item_id="fresh", k=3)))["items"]
        event = api.LiveEvent(user_id="u1", item_id="fresh", timestamp=api.now_ms(), actions={"click": 1})
        await service.events(api.EventsRequest(events=[event]))
        assert "fresh" not in ids(await ask(service, k=100))  # it is seen now
        assert (await ask(service))["degraded"] == []

    asyncio.run(work(make()))


def test_an_item_that_joins_has_the_vector_that_preparation_would_have_given(make: Make, run: TinyRun) -> None:
    """`new` has no training event: its vector is its text's alone."""

    async def work(service: Any) -> None:
        await service.put_item("twin", api.ItemRequest(columns={"name": "Thing new", "genre": "even"}))
        await now(service)
        a, b = (await service.score(api.ScoreRequest(user_id="u1", item_ids=["new", "twin"])))["items"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-4)

    asyncio.run(work(make()))


def test_blocked_unavailable_and_deleted_items_are_in_no_list_until_they_are_back(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        first, second, third, *_ = ids(await ask(service))
        await service.patch_item(first, api.ItemPatch(available=False))
        await service.patch_item(second, api.ItemPatch(blocked=True))
        await service.delete_item(third)
        await now(service)
        found = await ask(service)
        assert not {first, second, third} & set(ids(found)) and len(ids(found)) == K
        with pytest.raises(UnknownItemError):
            await service.score(api.ScoreRequest(user_id="u1", item_ids=[third]))
        await service.patch_item(first, api.ItemPatch(available=True))
        await now(service)
        assert ids(await ask(service))[0] == first
        assert (await service.get_item(second))["blocked"]
        with pytest.raises(UnknownItemError):
            await service.get_item("never heard of")
        with pytest.raises(UnknownItemError):
            await service.patch_item("never heard of", api.ItemPatch(blocked=True))
        await service.put_item(third, api.ItemRequest(columns=COLUMNS))
        await now(service)
        assert (await service.score(api.ScoreRequest(user_id="u1", item_ids=[third])))["items"]

    asyncio.run(work(make()))


def test_a_replica_that_starts_later_knows_what_changed_before(make: Make) -> None:
    async def work() -> None:
        await make().put_item("fresh", api.ItemRequest(columns=COLUMNS))
        assert "fresh" in ids(await ask(make(), k=100, exclude_seen=False))
        assert "fresh" in ids(await ask(make(fused=True), k=100, exclude_seen=False))

    asyncio.run(work())


def test_a_bundle_with_another_encoder_encodes_what_joined_anew(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        await service.put_item("fresh", api.ItemRequest(columns=COLUMNS))
        store = service.store
        store.change_item("fresh", {"vector": np.ones(16, np.float32).tobytes(), "encoder": "another"})
        await now(service)
        found = (await service.search(api.SearchRequest(text="Thing 29, even", k=1)))["items"][0]
        assert found["item_id"] == "fresh" and found["score"] == pytest.approx(1, abs=1e-4)

    asyncio.run(work(make()))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"name": "x", "colour": "red"}, "unknown 'colour'"),
        ({}, "none of"),
        ({"name": None, "genre": ""}, "none of"),
    ],
)
def test_a_wrong_item_is_refused_and_nothing_is_kept(make: Make, columns: dict[str, Any], says: str) -> None:
    async def work(service: Any) -> None:
        with pytest.raises(ItemError, match=says):
            await service.put_item("fresh", api.ItemRequest(columns=columns))
        assert service.store.items_since(0) == []

    asyncio.run(work(make()))


# ------------------------------------------------------------------ the ladder


class Broken:
    """A handle whose calls fail, or never come back."""

    def __init__(self, stage: Any, method: str, error: Exception | None = None) -> None:
        self.stage, self.method, self.error = stage, method, error

    def __getattr__(self, name: str) -> Any:
        if name != self.method:
            return getattr(self.stage, name)

        async def fails(*_: Any, **__: Any) -> Any:
            if self.error is not None:
                raise self.error
            await asyncio.sleep(60)

        return type("Call", (), {"remote": staticmethod(fails)})


def popular(predictor: Predictor, user: str, prepared: PreparedHistories) -> list[str]:
    history = prepared.get(user)
    assert history is not None
    seen = predictor.encode_histories([history]).seen
    return [predictor.item_ids[i] for i in predictor.popular(seen, K).item_BK[0].tolist() if i >= 0]


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), None])
def test_heads_that_fail_leave_the_order_of_retrieval(make: Make, error: Exception | None) -> None:
    async def work(service: Any) -> None:
        whole = await ask(service)
        service.heads = Broken(service.heads, "score", error)
        found = await ask(service, explain=True)
        assert found["degraded"] == ["heads_down"] and ids(found) == ids(whole)  # the tiny run ranks by retrieval alone
        assert all(set(i["tasks"]) == {"retrieval"} for i in found["items"])
        assert service.measured.rungs["heads_down"] == 1
        with pytest.raises(StageDownError):  # nothing stands in for a score
            await service.score(api.ScoreRequest(user_id="u1", item_ids=["i3"]))

    asyncio.run(work(make(deadline_ms=400, cached_states=0)))


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError("boom"), None])
def test_a_state_encoder_that_fails_leaves_the_last_state_or_popularity(make: Make, run: TinyRun, error: Exception | None) -> None:
    async def work(service: Any) -> None:
        before = await ask(service, user_id="u1")
        service.encoder = Broken(service.encoder, "encode", error)
        event = api.LiveEvent(user_id="u1", item_id="i1", timestamp=api.now_ms(), actions={"click": 1})
        await service.events(api.EventsRequest(events=[event]))  # another version of the history: the state is not its
        cached = await ask(service, user_id="u1")
        assert cached["degraded"] == ["state_cached"] and ids(cached) == ids(before)
        strange = await ask(service, user_id="u2")
        assert strange["degraded"] == ["state_encoder_down"]
        assert ids(strange) == popular(run.predictor, "u2", service.prepared)
        only = ids(await ask(service, user_id="u2", candidates=["i1", "i2", "new"]))
        assert set(only) <= {"i1", "i2", "new"}

    asyncio.run(work(make(deadline_ms=400)))


def test_retrieval_that_fails_leaves_popularity(make: Make, run: TinyRun) -> None:
    async def work(service: Any) -> None:
        service.retrieval = Broken(service.retrieval, "retrieve", RuntimeError("boom"))
        found = await ask(service, user_id="u2")
        assert found["degraded"] == ["retrieval_down"] and ids(found) == popular(run.predictor, "u2", service.prepared)

    asyncio.run(work(make()))


def test_an_approximate_index_that_fails_leaves_the_exact_one(make: Make, run: TinyRun) -> None:
    class Wrong:
        kind = "ivf"

        def search(self, *_: Any) -> Any:
            raise RuntimeError("lists are damaged")

    async def work(service: Any) -> None:
        whole = await ask(service)
        service.retrieval.stage.versions.current.base.index = Wrong()
        found = await ask(service)
        assert found["degraded"] == ["index_exact"] and found["items"] == whole["items"]

    asyncio.run(work(make(cached_states=0)))


def test_a_store_that_is_down_leaves_popularity_and_keeps_nothing(make: Make) -> None:
    async def work(service: Any) -> None:
        await ask(service)

        def down(*_: Any) -> Any:
            raise StoreError("gone")

        service._store.get = service._store.append = service._store.change_item = down
        assert (await ask(service, user_id="u1"))["degraded"] == ["history_store_down", "no_history"]
        history = [api.Event(item_id="i1", timestamp=1, actions={"click": 1.0})]
        assert (await ask(service, user_id=None, history=history))["degraded"] == []
        event = api.LiveEvent(user_id="u1", item_id="i1", timestamp=api.now_ms(), actions={"click": 1})
        with pytest.raises(StoreError):
            await service.events(api.EventsRequest(events=[event]))
        with pytest.raises(StoreError):
            await service.put_item("fresh", api.ItemRequest(columns=COLUMNS))

    asyncio.run(work(make()))


def test_a_store_that_went_down_after_items_changed_keeps_them_changed(make: Make) -> None:
    async def work(service: Any) -> None:
        await service.put_item("fresh", api.ItemRequest(columns=COLUMNS))
        first = ids(await ask(service))[0]
        await service.patch_item(first, api.ItemPatch(blocked=True))
        await service.in_store(service.items.refresh)  # but no bundle has been made to follow yet

        def down(*_: Any) -> Any:
            raise StoreError("gone")

        service._store.get = service.items._since = down
        history = [api.Event(item_id="i1", timestamp=1, actions={"click": 1.0})]
        found = await ask(service, user_id=None, history=history, candidates=["fresh", first, "i5"])
        assert found["degraded"] == [] and first not in ids(found) and "fresh" in ids(found)

    asyncio.run(work(make(fused=True)))


def test_a_deadline_that_has_passed_is_answered_from_what_is_at_hand(make: Make) -> None:
    async def work(service: Any) -> None:
        guard.until.set(time.time() - 1)
        found = await ask(service)
        assert found["degraded"][-1] in ("state_encoder_down", "history_store_down") and len(ids(found)) == K
        with pytest.raises(StageDownError):
            await service.similar(api.SimilarRequest(item_id="i3"))

    asyncio.run(work(make()))


def test_a_stage_does_not_begin_what_is_too_late(make: Make) -> None:
    async def work(service: Any) -> None:
        stage = service.encoder.stage
        with pytest.raises(TimeoutError, match="before the work began"):
            await stage.encode(Stamp(service.versions.current.fingerprint, "h"), History(), None, time.time() - 1)

    asyncio.run(work(make()))


def test_a_health_check_is_a_real_answer(make: Make) -> None:
    async def work(service: Any) -> None:
        stage = service.heads.stage
        await stage.check_health()
        with torch.no_grad():
            stage.versions.current.base.item_vec_ND.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="not finite"):
            await stage.check_health()

    asyncio.run(work(make()))


# ------------------------------------------------------------------ states, lists that were shown, what is told


def test_a_repeated_request_makes_no_pass_of_the_trunk(make: Make) -> None:
    async def work(service: Any, passes: int) -> None:
        first = await ask(service)
        predictor = service.versions.current.base if service.fused else service.encoder.stage.versions.current.base
        whole, count = predictor.encode_state, 0

        def counted(batch: Any) -> Any:
            nonlocal count
            count += 1
            return whole(batch)

        predictor.encode_state = counted
        assert [await ask(service) for _ in range(3)] == [first] * 3
        assert count == passes

    asyncio.run(work(make(), 0))
    asyncio.run(work(make(fused=True), 0))
    asyncio.run(work(make(cached_states=0), 3))


class Counted(Broken):
    """A handle that counts what it is asked."""

    def __init__(self, stage: Any) -> None:
        self.stage, self.asked = stage, 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.stage, name)


def test_a_repeated_request_asks_no_stage_until_something_has_changed(make: Make) -> None:
    async def work(service: Any, remembers: bool) -> None:
        stages = [Counted(s) for s in (service.encoder, service.retrieval, service.heads)]
        service.encoder, service.retrieval, service.heads = stages

        async def asked(**body: Any) -> list[int]:
            before = [s.asked for s in stages]
            await ask(service, **body)
            return [s.asked - b for s, b in zip(stages, before, strict=True)]

        assert await asked() == [1, 1, 1]
        first = await ask(service)
        assert await asked() == ([0, 0, 0] if remembers else [1, 1, 1])
        if not remembers:
            return
        one = ids(first)[0]
        others = [{"exclude": [one]}, {"exclude_seen": False}, {"where": {"genre": ["odd"]}}, {"candidates": [one]}, {"k": K - 1}]
        for other in others:
            assert await asked(**other) == [0, 1, 1], other  # the state is the same, the list is not
        assert await asked(k=K - 1, weights={"retrieval": 0.5}) == [0, 0, 0]  # ordered anew of the same predictions
        assert await asked(user_id=None, history=[]) == [1, 1, 1]
        assert await asked(at=api.now_ms()) == [1, 1, 1]
        event = api.LiveEvent(user_id="u1", item_id=one, timestamp=api.now_ms(), actions={"click": 1})
        await service.events(api.EventsRequest(events=[event]))
        assert one not in ids(await ask(service)) and await asked() == [0, 0, 0]
        second = ids(await ask(service))[0]
        await service.patch_item(second, api.ItemPatch(available=False))
        await now(service)
        assert second not in ids(await ask(service)) and await asked() == [0, 0, 0]

    asyncio.run(work(make(), True))
    asyncio.run(work(make(cached_states=0), False))


def test_what_a_stage_could_not_answer_whole_is_not_remembered(make: Make) -> None:
    async def work(service: Any) -> None:
        heads = service.heads
        service.heads = Broken(heads, "score", RuntimeError("out of memory"))
        assert (await ask(service))["degraded"] == ["heads_down"]
        service.heads = heads
        whole = await ask(service)
        assert whole["degraded"] == []
        service.heads = Broken(heads, "score", RuntimeError("out of memory"))
        assert await ask(service) == whole

    asyncio.run(work(make()))


def test_shown_lists_are_kept_with_what_they_were_made_from(make: Make) -> None:
    async def work(service: Any) -> None:
        guard.request_id.set("r1")
        answer = await ask(service)
        await ask(service, user_id=None, history=[])  # nobody
        service.impressions.close()
        ((_, shown),) = service.store.impressions(0, 10)
        assert shown == ShownList("u1", "r1", shown.timestamp, answer["bundle"], ids(answer), [i["score"] for i in answer["items"]],
                                  [1.0] * K, [i["tasks"] for i in answer["items"]])  # fmt: skip
        assert service.store.forget(["u1"]) > 0 and service.store.impressions(0, 10) == []

    asyncio.run(work(make(impressions=1.0)))


def test_explored_lists_follow_from_seed_and_request_alone(make: Make) -> None:
    async def work() -> None:
        service = make(impressions=1.0, exploration={"temperature": 2.0, "seed": 3})
        lists = []
        for name in ("a", "b", "a"):
            guard.request_id.set(name)
            lists.append(ids(await ask(service)))
        assert lists[0] == lists[2] != lists[1] and len(set(lists[0])) == K
        service.impressions.close()
        chances = [s.propensities for _, s in service.store.impressions(0, 10)]
        assert all(0 < p < 1 for p in chances[0]) and chances[0] == chances[2]

    asyncio.run(work())


def test_what_is_told_of_a_user_and_of_the_service(make: Make) -> None:
    async def work(service: Any) -> None:
        known = await service.history(api.HistoryRequest(user_id="u1", limit=3))
        times = [e["timestamp"] for e in known["events"]]
        assert len(times) == 3 and times == sorted(times, reverse=True) and known["events"][0]["title"].startswith("Thing")
        await ask(service)
        told = api.Stats.model_validate(await service.stats())
        assert told.latency_ms["Heads"].count >= 1 and told.versions["current"] == service.versions.current.fingerprint
        assert "recommend" in (await service.page()).body.decode()

    asyncio.run(work(make()))


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    root = Path(__file__).parent.parent.parent
    panels = json.loads((root / "serve_apps" / "grafana.json").read_text())["panels"]
    asked = {m for p in panels for t in p["targets"] for m in re.findall(r"ray_(mtrec_\w+)", t["expr"])}
    told = re.findall(r'(Counter|Gauge|Histogram)\(\s*"(mtrec_\w+)"', (root / "mtrec_ray" / "serving" / "meters.py").read_text())
    exported = {name + end for kind, name in told for end in (("_bucket", "_sum", "_count") if kind == "Histogram" else ("",))}
    assert asked <= exported
    assert {name for _, name in told} == {re.sub("_(bucket|sum|count)$", "", m) for m in asked}  # and each is shown
