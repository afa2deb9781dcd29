"""Tokens, long bodies, and what an event must be: before anything reaches a stage."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request

from mtrec_ray.serving import guard
from mtrec_ray.serving.guard import Guard, Guarded, endpoint_of, needed, request_id, set_guard, until
from mtrec_ray.serving.settings import ServingSettings, StoreSettings, Tokens, open_store, store_path
from mtrec_ray.serving.store import EventError, EventRules, StoredEvent
from tests.conftest import TinyRun

app = FastAPI()
READ, EVENTS, ADMIN = "r" * 16, "e" * 16, "a" * 16


@app.post("/recommend")
@app.post("/events")
async def echo(request: Request) -> dict[str, int]:
    return {"bytes": len(await request.body())}


@app.get("/healthz")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


def call(path: str, content: Any = b"{}", token: str | None = None, method: str = "POST") -> httpx.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(Guarded(app)), base_url="http://here") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(ask())


@pytest.fixture
def tokens(monkeypatch: pytest.MonkeyPatch) -> Tokens:
    monkeypatch.setenv("MTREC_TOKENS", f"read:{READ}, events:{EVENTS},admin:{ADMIN}")
    found = Tokens(ServingSettings(tokens_env="MTREC_TOKENS"))
    set_guard(Guard(found, 2048))
    return found


def test_a_role_reaches_what_it_may(tokens: Tokens) -> None:
    status = {
        (path, token): call(path, token=token).status_code
        for path in ("/recommend", "/events") for token in (None, "wrong", READ, EVENTS, ADMIN)
    }  # fmt: skip
    assert [status["/recommend", t] for t in (None, "wrong", READ, EVENTS, ADMIN)] == [401, 401, 200, 200, 200]
    assert [status["/events", t] for t in (None, "wrong", READ, EVENTS, ADMIN)] == [401, 401, 403, 200, 200]
    assert call("/healthz", method="GET").status_code == 200
    answer = call("/recommend")
    assert answer.headers["www-authenticate"] == "Bearer" and "bearer token" in answer.json()["detail"]
    assert READ not in call("/events", token=READ).text


@pytest.mark.parametrize("header", ["", "Bearer", f"Basic {READ}", READ, f"Bearer {READ} x", f"Bearer {READ[:-1]}"])
def test_a_header_that_is_no_bearer_token_is_nobody(tokens: Tokens, header: str) -> None:
    assert tokens.role_of(header) is None
    assert tokens.role_of(f"bearer {READ}") == "read"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "empty or not set"), (" , ", "empty or not set"), ("read:short", "16 characters"), ("king:" + READ, "role of"),
        (READ, "role of"),
    ],
)  # fmt: skip
def test_tokens_that_are_none_are_said_at_the_start(monkeypatch: pytest.MonkeyPatch, value: str | None, message: str) -> None:
    monkeypatch.delenv("MTREC_TOKENS", raising=False)
    if value is not None:
        monkeypatch.setenv("MTREC_TOKENS", value)
    with pytest.raises(ValueError, match=message) as error:
        Tokens(ServingSettings(tokens_env="MTREC_TOKENS"))
    assert READ not in str(error.value)


def test_a_long_body_is_413_with_and_without_its_length(tokens: Tokens) -> None:
    async def pieces() -> Any:
        for _ in range(4):
            yield b"x" * 1000

    assert call("/recommend", b"x" * 2048, READ).json() == {"bytes": 2048}
    assert call("/recommend", b"x" * 2049, READ).status_code == 413
    assert call("/recommend", pieces(), READ).status_code == 413


def test_nobody_gets_through_before_the_ingress_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_current", None)
    assert call("/recommend").status_code == 503
    set_guard(Guard(Tokens(ServingSettings()), 2048))
    assert call("/events").status_code == 200  # without tokens everybody may: the service is on loopback


def test_a_store_that_cannot_be_here_is_said_with_the_cure(tiny_run: TinyRun) -> None:
    with pytest.raises(ValueError, match=r"store.path: the run \(s3://bucket/run/data.*\) is not on a local disk"):
        store_path(StoreSettings(), "s3://bucket/run/data?region=us-east-1")
    assert store_path(StoreSettings(), "/runs/x/data") == "/runs/x/live/histories.sqlite"
    assert open_store(StoreSettings(kind="none"), tiny_run.data.root, tiny_run.predictor) is None
    for wrong in ({"kind": "redis"}, {"url": "redis://x"}, {"kind": "none", "path": "x"}):
        with pytest.raises(ValueError, match=r"store\.(url|path)"):
            StoreSettings(**wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------ events


@pytest.fixture
def rules(tiny_run: TinyRun) -> EventRules:
    return EventRules(tiny_run.config, tiny_run.predictor.schema)


def check(
    rules: EventRules, actions: dict[str, Any] | None = None, context: dict[str, Any] | None = None, time: int = 1000
) -> StoredEvent:
    return rules.check("events[3]: ", "u1", "i1", time, "e1", actions or {}, context or {}, 5000)


def test_an_event_is_what_preparation_would_make_of_its_row(rules: EventRules) -> None:
    found = check(
        rules,
        {
            "click": 1,
            "rating": 5,
        },
        {"device": "web"},
    )
    assert found.actions == {"click": 1.0, "rating": 5.0, "like": 1.0} and found.context == {"device": "web"} and found.shown
    assert not check(rules, {"click": 0}).shown and not check(rules).shown  # data.history is click > 0
    assert check(rules, {"click": 1, "rating": None}, {"device": None}) == StoredEvent(
        "u1", "i1", 1000, "e1", {"click": 1.0}, {}, True
    )
    assert check(rules, time=5000 + 60_000).timestamp == 65_000  # clocks differ


@pytest.mark.parametrize(
    ("actions", "context", "time", "message"),
    [
        ({"stars": 1}, {}, 1, r"actions: unknown 'stars'; known are \['click', 'rating'\]"),
        ({"like": 1}, {}, 1, r"actions.like: it is derived \(rating >= 4\)"),
        ({"click": 2}, {}, 1, "actions.click: 2; expected 0 or 1"),
        ({"click": 0.5}, {}, 1, "actions.click: 0.5; expected 0 or 1"),
        ({"rating": 6}, {}, 1, "actions.rating: 6 is not between 1.0 and 5.0"),
        ({"rating": math.nan}, {}, 1, "actions.rating: nan; expected a finite number"),
        ({"rating": math.inf}, {}, 1, "actions.rating: inf; expected a finite number"),
        ({}, {"moon": "full"}, 1, r"context: unknown column 'moon'; known are \['device'\]"),
        ({}, {"device": {"a": 1}}, 1, "context.device"),
        ({}, {}, 5000 + 61_000, "timestamp: 66000 is 61 s ahead of this clock"),
    ],
)
def test_an_event_that_the_log_could_not_hold_is_named(
    rules: EventRules, actions: dict[str, Any], context: dict[str, Any], time: int, message: str
) -> None:
    with pytest.raises(EventError, match=r"^events\[3\]: " + message):
        check(rules, actions, context, time)


def test_histories_of_the_store_are_those_of_the_prepared_data(tiny_run: TinyRun, tmp_path: Any) -> None:
    from mtrec_ray.serving.history import PreparedHistories

    store = open_store(StoreSettings(path=str(tmp_path / "x")), tiny_run.data.root, tiny_run.predictor)
    prepared, predictor = PreparedHistories(tiny_run.data.root), tiny_run.predictor
    assert store is not None
    for user in prepared.user_ids():
        expected, found = prepared.get(user), store.get(user)
        assert expected is not None and found is not None
        a, b = (predictor.encode_histories([h]) for h in (expected, found.history))
        assert np.array_equal(a.visible[0], b.visible[0])
        assert np.array_equal(predictor.encode_state(a.batch).numpy(), predictor.encode_state(b.batch).numpy())


@pytest.mark.parametrize(
    ("method", "path", "role", "name"),
    [
        ("POST", "/recommend", "read", "/recommend"), ("GET", "/items/50", "read", "/items/{id}"),
        ("PUT", "/items/50", "admin", "/items/{id}"), ("PATCH", "/items/a/b", "admin", "/items/{id}"),
        ("DELETE", "/items/", "admin", "/items/{id}"), ("POST", "/events", "events", "/events"),
        ("GET", "/versions", "read", "/versions"), ("GET", "/somebody's name", "read", "other"),
    ],
)  # fmt: skip
def test_what_a_call_takes_and_what_metrics_call_it(method: str, path: str, role: str, name: str) -> None:
    assert needed(method, path) == role and endpoint_of(path) == name


def test_a_request_is_told_with_its_status_and_keeps_its_id(tokens: Tokens) -> None:
    told: list[tuple[str, int, float]] = []
    seen: list[tuple[str, float | None]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((request_id.get(), until.get()))
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    set_guard(Guard(Tokens(ServingSettings()), 10_000, lambda *said: told.append(said)))
    for headers in ([(b"x-request-id", b"mine"), (b"x-deadline-ms", b"1000")], [(b"x-request-id", b"a\nb" * 100)]):
        asyncio.run(Guarded(app)({"type": "http", "method": "GET", "path": "/stats", "headers": headers}, gone, nothing))
    assert [(e, s) for e, s, _ in told] == [("/stats", 204)] * 2
    (mine, moment), (made, none) = seen
    assert mine == "mine" and moment is not None and 0 < moment - time.time() < 1.1
    assert len(made) == 32 and made.isalnum() and none is None


async def gone() -> dict[str, Any]:
    return {"type": "http.disconnect"}


async def nothing(message: Any) -> None: ...
