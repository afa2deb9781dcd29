"""Evaluation, batch scoring and HTTP give the same answers on the same requests (DESIGN §1.6).

Scores agree within 1e-5 × max(1, |score|); ids are equal except among scores closer than that.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.serve import YAML
from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.evaluation.measure import Model, measure
from mtrec_ray.histories import History
from mtrec_ray.scoring.batch import score
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.settings import ServingSettings
from mtrec_ray.training.feed import WindowCache
from tests import tiny
from tests.net import free_port

pytestmark = pytest.mark.ray
K = 8


def change(raw: dict[str, Any]) -> None:
    """leave_one_out, so that the store's lists are the evaluated ones; seen items are excluded; the final order
    uses two tasks; events have features of every kind, and sessions."""
    raw["data"] |= {"protocol": "leave_one_out", "exclude_seen": True}
    raw["tasks"]["rating"]["final_weight"] = 0.3
    raw["scoring"]["k"] = K


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    folder = tmp_path_factory.mktemp("contract")
    tiny.write_log(folder, users=30, seed=3)
    # users that are in the store without a history: they never clicked
    with open(folder / "log" / "part0.csv", "a", encoding="utf-8") as file:
        file.write("idle,i1,1700000000000,0,,web\n")
    tiny.write_features(folder)

    def change_all(raw: dict[str, Any]) -> None:
        change(raw)
        tiny.with_features(folder)(raw)

    config = tiny.make_config(folder, change_all)
    data = tiny.prepare_locally(config, folder / "data")
    tiny.write_bundle(config, data, tiny.train_locally(config, data), folder / "bundle")
    return folder, config


@pytest.fixture(scope="module")
def client(ray_cluster: Any, run: tuple[Path, RunConfig]) -> Iterator[httpx.Client]:
    """The real graph over HTTP, four deployments."""
    from ray import serve

    from serve_apps.recommend import Args, build

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    options = {n: {"ray_actor_options": {"num_cpus": 0.1}} for n in ("Ingress", "StateEncoder", "Retrieval", "Heads")}
    patient = ServingSettings(deadline_ms=60_000)  # a busy machine degrades nothing
    serve.run(build(Args(run=str(run[0]), options=options, serving=patient)), name="contract", route_prefix="/")
    assert YAML.exists()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as c:
        yield c
    serve.shutdown()


@pytest.fixture(scope="module")
def batch(ray_cluster: Any, run: tuple[Path, RunConfig]) -> dict[str, list[dict[str, Any]]]:
    folder, config = run
    score(config, storage.Directory(str(folder / "data")), str(folder / "bundle"), str(folder / "scores"))
    rows = pq.read_table(folder / "scores").to_pylist()
    out: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: (r["user_id"], r["rank"])):
        out.setdefault(row["user_id"], []).append(row)
    return out


def close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * max(1.0, abs(a), abs(b))


def assert_same(online: list[dict[str, Any]], offline: list[dict[str, Any]]) -> None:
    assert len(online) == len(offline)
    for a, b in zip(online, offline, strict=True):
        assert close(a["score"], b["score"])
        if a["item_id"] != b["item_id"]:  # only among scores too close to tell
            twin = next(o for o in offline if o["item_id"] == a["item_id"])
            assert close(twin["score"], a["score"])
            continue
        for task, value in a["tasks"].items():
            assert close(value, b[task]), task


def test_http_batch_and_predictor_agree_for_every_user(
    client: httpx.Client, batch: dict[str, list[dict[str, Any]]], run: tuple[Path, RunConfig]
) -> None:
    predictor, store = bundle.load(str(run[0] / "bundle")), PreparedHistories(str(run[0] / "data"))
    assert "idle" in store.user_ids()
    for user in store.user_ids():
        answer = client.post("/recommend", json={"user_id": user, "k": K}).json()
        assert answer["bundle"] == predictor.fingerprint
        assert_same(answer["items"], batch[user])
        history = store.get(user)
        assert history is not None
        here = predictor.recommend([history], K)[0]
        assert here["degraded"] == answer["degraded"]
        flat = [{"item_id": i["item_id"], "score": i["score"], **i["tasks"]} for i in here["items"]]
        assert_same(answer["items"], flat)


def test_evaluation_ranks_are_the_places_in_the_batch_lists(
    batch: dict[str, list[dict[str, Any]]], run: tuple[Path, RunConfig]
) -> None:
    folder, _ = run
    predictor, data = bundle.load(str(folder / "bundle")), storage.Directory(str(folder / "data"))
    test = WindowCache.from_table(storage.read_table(data.path("windows", "test")))
    facts, answers = measure({"model": Model(predictor)}, predictor, test, np.arange(len(test)), 7)
    final_rank = answers["model"].final_rank
    assert final_rank is not None
    checked = 0
    for place, user in enumerate(facts.user):
        target = [
            predictor.item_ids[i]
            for i, p in zip(
                test.columns["target_item"][slice(*test.offsets["target"][place : place + 2])],
                test.columns["target_positive"][slice(*test.offsets["target"][place : place + 2])],
                strict=True,
            )
            if p
        ]
        if not target:
            continue
        listed = [r["item_id"] for r in batch[user]]
        best = min([listed.index(t) + 1 for t in target if t in listed], default=None)
        found = final_rank[facts.pair_moment == place].min()
        scores = [r["score"] for r in batch[user]]
        if best is None:
            assert found > K or scores[-1] == pytest.approx(scores[K - 1])
        else:
            assert found == pytest.approx(best) or close(scores[best - 1], scores[min(best, K - 1)])
        checked += 1
    assert checked > 20


def test_inline_history_equals_the_stored_one(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    store = PreparedHistories(str(run[0] / "data"))
    user = next(u for u in store.user_ids() if (h := store.get(u)) and h.item_ids and not h.seen_item_ids)
    history = store.get(user)
    assert history is not None
    events = [
        {
            "event_id": str(n),
            "item_id": item,
            "timestamp": history.times[n],
            "actions": {a: None if np.isnan(v[n]) else v[n] for a, v in history.actions.items()},
            "context": {c: v[n] for c, v in history.context.items()},
        }
        for n, item in enumerate(history.item_ids)
    ]
    inline = client.post("/recommend", json={"history": events, "k": K}).json()
    stored = client.post("/recommend", json={"user_id": user, "k": K}).json()
    assert inline["items"] == stored["items"] and inline["user_id"] is None


def test_unknown_users_and_empty_histories_get_popularity_everywhere(
    client: httpx.Client, batch: dict[str, list[dict[str, Any]]], run: tuple[Path, RunConfig]
) -> None:
    unknown = client.post("/recommend", json={"user_id": "nobody", "k": K}).json()
    empty = client.post("/recommend", json={"history": [], "k": K}).json()
    early = client.post("/recommend", json={"user_id": "u1", "k": K, "at": 1}).json()
    assert unknown["degraded"] == empty["degraded"] == early["degraded"] == ["no_history"]
    assert unknown["items"] == empty["items"] == early["items"]
    assert_same(unknown["items"], batch["idle"])
    profile = client.post("/profile", json={"user_id": "nobody"}).json()
    assert profile["degraded"] == ["no_history"] and sum(profile["profile"]["taste"].values()) == pytest.approx(1, abs=1e-5)


def test_score_similar_and_profile_agree_with_the_predictor(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    predictor, store = bundle.load(str(run[0] / "bundle")), PreparedHistories(str(run[0] / "data"))
    history = store.get("u1")
    assert history is not None
    online = client.post("/score", json={"user_id": "u1", "item_ids": ["i3", "new", "i4"]}).json()
    here = predictor.score_items(history, ["i3", "new", "i4"])
    assert [i["item_id"] for i in online["items"]] == ["i3", "new", "i4"]
    for a, b in zip(online["items"], here["items"], strict=True):
        assert close(a["score"], b["score"]) and all(close(v, b["tasks"][t]) for t, v in a["tasks"].items())
    similar = client.post("/similar", json={"item_id": "i3", "k": 5}).json()
    assert [i["item_id"] for i in similar["items"]] == [i["item_id"] for i in predictor.similar("i3", 5)]
    profile = client.post("/profile", json={"user_id": "u1"}).json()["profile"]
    for attribute, values in predictor.profile(history)["profile"].items():
        assert profile[attribute] == pytest.approx(values, abs=1e-5)


def test_features_of_a_request_mean_the_same_online_and_its_position_nothing(
    client: httpx.Client, run: tuple[Path, RunConfig]
) -> None:
    predictor, store = bundle.load(str(run[0] / "bundle")), PreparedHistories(str(run[0] / "data"))
    history = store.get("u1")
    assert history is not None

    def online(context: dict[str, Any]) -> list[dict[str, float]]:
        body = {"user_id": "u1", "item_ids": ["i3", "i4"], "context": context}
        answer = client.post("/score", json=body).json()
        here = predictor.score_items(history, ["i3", "i4"], context)
        for a, b in zip(answer["items"], here["items"], strict=True):
            assert all(close(v, b["tasks"][t]) for t, v in a["tasks"].items())
        return [i["tasks"] for i in answer["items"]]

    context = {"device": "web", "price": 4.5, "price_band": 4.5, "tags": ["even", "t1", "never seen"]}
    base = online(context)
    assert online(context | {"position": 4}) == base == online(context | {"position": "far down"})
    assert online(context | {"price": None}) != base and online(context | {"tags": []}) != base


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/similar", {"item_id": "nope"}, 404, "nope"),
        ("/score", {"user_id": "u1", "item_ids": ["i1", "nope"]}, 404, "nope"),
        ("/recommend", {"user_id": "u1", "k": 0}, 422, "k"),
        ("/recommend", {"k": 3}, 422, "user_id"),
        ("/recommend", {"user_id": "u1", "wrong": 1}, 422, "wrong"),
        ("/recommend", {"user_id": "u1", "context": {"moon": "full"}}, 422, "moon"),
        ("/recommend", {"user_id": "u1", "context": {"price": "cheap"}}, 422, "context.price: expected a finite number"),
        ("/recommend", {"user_id": "u1", "context": {"tags": {"a": 1}}}, 422, "tags"),
        ("/recommend", {"history": [{"item_id": "i1", "timestamp": 1, "context": {"price": []}}]}, 422, "context.price"),
        ("/recommend", {"history": [{"item_id": "i1", "timestamp": 1, "actions": {"stars": 3}}]}, 422, "stars"),
    ],
)
def test_bad_requests_get_a_clear_answer(client: httpx.Client, path: str, body: dict[str, Any], status: int, says: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == status and says in response.text


def test_broken_json_is_422_and_k_beyond_the_catalogue_gives_what_there_is(client: httpx.Client) -> None:
    assert client.post("/recommend", content=b"{").status_code == 422
    everything = client.post("/recommend", json={"history": [], "k": 10**9}).json()["items"]
    assert len(everything) == 21


def test_health_names_the_bundle_and_openapi_has_examples(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    assert client.get("/healthz").json() == {"status": "ok", "bundle": bundle.load(str(run[0] / "bundle")).fingerprint}
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert all(schemas[n]["examples"] for n in ("RecommendRequest", "ScoreRequest", "SimilarRequest", "ProfileRequest"))


def test_a_rerun_of_scoring_neither_doubles_nor_loses_rows(
    ray_cluster: Any, batch: dict[str, Any], run: tuple[Path, RunConfig]
) -> None:
    folder, config = run
    before = pq.read_table(folder / "scores")
    data = storage.Directory(str(folder / "data"))
    score(config, data, str(folder / "bundle"), str(folder / "scores"))
    assert pq.read_table(folder / "scores").equals(before)
    raw = config.model_dump(mode="json")
    raw["scoring"]["k"] = 3
    counts = score(parse_config(raw), data, str(folder / "bundle"), str(folder / "scores"))
    again = pq.read_table(folder / "scores")
    assert len(again) == counts["rows"] == 3 * counts["users"]
    shutil.rmtree(folder / "scores")
    score(config, data, str(folder / "bundle"), str(folder / "scores"))
    assert pq.read_table(folder / "scores").equals(before)


# ------------------------------------------------------------------ what changes while it is served


def now() -> int:
    return time.time_ns() // 1_000_000


def listed(client: httpx.Client, **body: Any) -> list[str]:
    answer = client.post("/recommend", json={"k": K, **body})
    assert answer.status_code == 200, answer.text
    return [i["item_id"] for i in answer.json()["items"]]


def test_an_event_is_in_the_very_next_recommendation_and_counts_once(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    predictor, prepared = bundle.load(str(run[0] / "bundle")), PreparedHistories(str(run[0] / "data"))
    before = client.post("/recommend", json={"user_id": "u5", "k": K}).json()
    assert client.post("/recommend", json={"user_id": "u5", "k": K}).json() == before  # remembered, and the same
    item, moment = before["items"][0]["item_id"], now()
    event = {"user_id": "u5", "event_id": "e1", "item_id": item, "timestamp": moment, "actions": {"click": 1, "rating": 5}}
    assert client.post("/events", json={"events": [event]}).json() == {"accepted": 1, "duplicates": 0}
    after = client.post("/recommend", json={"user_id": "u5", "k": K}).json()
    assert item not in [i["item_id"] for i in after["items"]]  # it is seen now
    history = prepared.get("u5")
    assert history is not None
    more = History(
        [*history.item_ids, item], [*history.times, moment],
        {a: [*v, {"click": 1.0, "rating": 5.0}.get(a, float("nan"))] for a, v in history.actions.items()},
        {c: [*v, None] for c, v in history.context.items()}, history.seen_item_ids, history.seen_times,
    )  # fmt: skip
    expected = predictor.recommend([more], K)[0]
    flat = [{"item_id": i["item_id"], "score": i["score"], **i["tasks"]} for i in expected["items"]]
    assert_same(after["items"], flat)
    assert client.post("/events", json={"events": [event]}).json() == {"accepted": 0, "duplicates": 1}
    assert client.post("/recommend", json={"user_id": "u5", "k": K}).json() == after
    past = client.post("/recommend", json={"user_id": "u5", "k": K, "at": moment}).json()
    assert past["items"] == before["items"]  # only what was before that moment
    shown = {"user_id": "u5", "item_id": after["items"][0]["item_id"], "timestamp": now(), "actions": {"click": 0}}
    assert client.post("/events", json={"events": [shown]}).json()["accepted"] == 1
    assert client.post("/recommend", json={"user_id": "u5", "k": K}).json() == after  # an impression is no history


def test_somebody_new_is_known_from_the_first_event(client: httpx.Client) -> None:
    assert client.post("/recommend", json={"user_id": "fresh"}).json()["degraded"] == ["no_history"]
    events = [{"user_id": "fresh", "item_id": i, "timestamp": now(), "actions": {"click": 1}} for i in ("i1", "i3")]
    assert client.post("/events", json={"events": events}).json() == {"accepted": 2, "duplicates": 0}
    answer = client.post("/recommend", json={"user_id": "fresh", "k": 30}).json()
    assert answer["degraded"] == [] and not {"i1", "i3"} & {i["item_id"] for i in answer["items"]}


@pytest.mark.parametrize(
    ("event", "says"),
    [
        ({"actions": {"like": 1}}, "events[1]: actions.like: it is derived"),
        ({"actions": {"click": 7}}, "events[1]: actions.click: 7.0; expected 0 or 1"),
        ({"timestamp": 7_000_000_000_000}, "ahead of this clock"),
        ({"timestamp": -1}, "timestamp"),
        ({"item_id": ""}, "item_id"),
        ({"wrong": 1}, "wrong"),
    ],
)
def test_one_bad_event_keeps_all_of_them_out(client: httpx.Client, event: dict[str, Any], says: str) -> None:
    good = {"user_id": "u7", "item_id": "i1", "timestamp": now(), "actions": {"click": 1}}
    before = client.post("/recommend", json={"user_id": "u7", "k": K}).json()
    answer = client.post("/events", json={"events": [good, good | event]})
    assert answer.status_code == 422 and says in answer.text
    assert client.post("/recommend", json={"user_id": "u7", "k": K}).json() == before


def test_what_a_request_may_ask_for(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    predictor = bundle.load(str(run[0] / "bundle"))
    plain = listed(client, user_id="u1")
    assert listed(client, user_id="u1", exclude=[plain[0], plain[2], "nobody"])[:2] == [plain[1], plain[3]]
    everything = listed(client, user_id="u1", exclude_seen=False, k=30)
    assert len(everything) == 21 and len(listed(client, user_id="u1", k=30)) < 21
    some = listed(client, user_id="u1", candidates=[plain[3], plain[1], "nobody"])
    assert some == [plain[1], plain[3]]
    assert listed(client, user_id="nobody", candidates=["i1", "i2"]) in (["i1", "i2"], ["i2", "i1"])
    by_rating = client.post(
        "/recommend", json={"user_id": "u1", "k": K, "weights": {"retrieval": 0, "rating": 1, "click": 0}}
    ).json()
    ratings = [i["tasks"]["rating"] for i in by_rating["items"]]
    assert ratings == sorted(ratings, reverse=True) and {i["item_id"] for i in by_rating["items"]} != set()
    assert client.post("/recommend", json={"user_id": "u1", "weights": {"taste": 1}}).status_code == 422
    wrong = client.post("/recommend", json={"user_id": "u1", "where": {"moon": ["full"]}})
    assert wrong.status_code == 422 and "'moon' is no attribute of items" in wrong.text
    assert predictor.fingerprint == by_rating["bundle"]
    spread = listed(client, user_id="u1", diversity=0.9)
    assert spread[0] == plain[0] and spread != plain and len(spread) == K
    assert client.post("/recommend", json={"user_id": "u1", "caps": {"moon": 1}}).status_code == 422
    assert client.post("/recommend", json={"user_id": "u1", "diversity": 2}).status_code == 422


def test_an_explanation_is_the_predictors(client: httpx.Client, run: tuple[Path, RunConfig]) -> None:
    predictor, history = bundle.load(str(run[0] / "bundle")), PreparedHistories(str(run[0] / "data")).get("u1")
    assert history is not None
    answer = client.post("/recommend", json={"user_id": "u1", "k": 3, "explain": True}).json()
    expected = predictor.explain(history, [i["item_id"] for i in answer["items"]])
    for item, reasons in zip(answer["items"], expected, strict=True):
        best = [r for r in reasons if r["gain"] > 0][:3]
        assert [r["time"] for r in item["because"]] == [r["time"] for r in best]
        assert [r["gain"] for r in item["because"]] == pytest.approx([r["gain"] for r in best], abs=1e-5)
    assert any(i["because"] for i in answer["items"])
    assert [
        i["because"] for i in client.post("/recommend", json={"user_id": "nobody", "k": 2, "explain": True}).json()["items"]
    ] == [[], []]
    assert client.post("/recommend", json={"user_id": "u1", "k": 1}).json()["items"][0]["because"] is None
