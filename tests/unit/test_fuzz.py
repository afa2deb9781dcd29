"""Whatever is sent: no answer is a failure of the service, and what it answers is what its OpenAPI document says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mtrec_ray.serving.app import http
from mtrec_ray.serving.ingress import Ingress
from mtrec_ray.serving.settings import ServingSettings
from tests import tiny

CASES = 2_000
MORE = 1.15
"""Some operations have fewer different cases than are asked for."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("fuzz")
    tiny.write_shop(folder)
    store = {"kind": "sqlite", "path": str(folder / "live.sqlite")}
    kept = ServingSettings.model_validate(
        {"store": store, "deadline_ms": 60_000}
    )  # the first text loads an encoder: a busy machine
    found = Ingress.func_or_class.__mro__[1](str(folder / "bundle"), str(folder / "data"), settings=kept)
    asyncio.run(found.reconfigure({}))
    with mock.patch("ray.serve.get_replica_context", lambda: SimpleNamespace(servable_object=found)):
        yield found


def send(method: str, path: str, **given: Any) -> httpx.Response:
    """To the application itself, without a server; an exception that escapes it is raised here."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=http)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **given)

    return asyncio.run(ask())


@pytest.mark.slow
def test_thousands_of_generated_requests_and_not_one_failure(service: Any) -> None:
    schemathesis = pytest.importorskip("schemathesis")
    schema = schemathesis.openapi.from_dict(send("GET", "/openapi.json").json())
    operations = [o.ok() for o in schema.get_all_operations()]
    seen: Counter[int] = Counter()
    told = [o for o in operations if o.method.lower() != "get"]  # the others take nothing: one case each
    each = int(MORE * CASES / (2 * len(told)))
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
    for operation in operations:
        modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
        for cases in [operation.as_strategy(generation_mode=m) for m in modes]:

            @settings(
                max_examples=each,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=quiet,
            )
            @given(case=cases)
            def one(case: Any) -> None:
                asked = case.as_transport_kwargs(base_url="http://service")
                asked = {k: v for k, v in asked.items() if k in ("method", "url", "headers", "json", "content", "data", "params")}
                if isinstance(asked.get("data"), bytes | str):
                    asked["content"] = asked.pop("data")
                try:
                    answer = send(asked.pop("method"), asked.pop("url"), **asked)
                except (httpx.InvalidURL, UnicodeEncodeError):  # httpx itself cannot send it
                    return
                seen[answer.status_code] += 1
                assert answer.status_code < 500, (answer.status_code, answer.text)
                if answer.headers.get("content-type") == "application/json":
                    answer.json()

            try:
                one()
            except Exception as error:
                if "Unsatisfiable" not in type(error).__name__:  # nothing wrong can be made of an operation without parameters
                    raise
    assert sum(seen.values()) >= CASES and seen[200] > 200 and seen[422] > 200, seen


GOOD = {"user_id": "u1", "k": 3}


@pytest.mark.parametrize(
    ("body", "statuses"),
    [
        (b"", {422}),
        (b"[" * 5_000 + b"]" * 5_000, {400, 422}),
        (b'{"user_id": "u1", "k": NaN}', {422}),
        (b'{"user_id": "u1", "diversity": Infinity}', {422}),
        (b'{"user_id": "u1", "weights": {"rating": 1e999}}', {422}),
        (b'{"user_id": "u1", "k": 0}', {422}),
        (b'{"user_id": "u1", "k": 1000000000}', {200}),
        (b'{"user_id": "u1", "k": 1' + b"0" * 5_000 + b"}", {400, 422}),
        (b'{"user_id": "\\ud800"}', {422}),
        (b'{"user_id": "\\u0000"}', {422}),
        (json.dumps({"user_id": "‮\u200b𝕌ser😀"}).encode(), {200}),
        (b'{"user_id": "u1", "where": {"genre": []}}', {200}),
        (b'{"user_id": "u1", "where": {"genre": ["blue"]}}', {422}),
        (b'{"user_id": "u1", "candidates": ["nobody"]}', {200}),
        (b'\xff\xfe{"user_id": "u1"}', {400, 422}),
        (b"\xff" * 100, {400, 422}),
        (b'{"user_id": "u1", "history": []}', {422}),
    ],
)
def test_odd_bodies_have_a_defined_answer(service: Any, body: bytes, statuses: set[int]) -> None:
    answer = send("POST", "/recommend", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in statuses, answer.text
    assert answer.json() is not None


def test_a_body_that_is_too_long_and_a_deadline_that_is_no_number(service: Any) -> None:
    assert send("POST", "/recommend", content=b"x" * (2 << 20)).status_code == 413
    assert send("POST", "/recommend", json=GOOD, headers={"x-deadline-ms": "soon"}).status_code == 422
    assert send("POST", "/recommend", json=GOOD, headers={"x-deadline-ms": "9" * 40}).status_code == 422
    assert send("POST", "/recommend", json=GOOD, headers={"x-deadline-ms": "2000"}).json()["degraded"] == []


def test_other_origins_get_no_leave_and_the_page_holds_no_scripts_of_others(service: Any) -> None:
    answer = send("POST", "/recommend", json=GOOD, headers={"origin": "https://elsewhere.example"})
    assert not any(h.startswith("access-control") for h in answer.headers)
    page = send("GET", "/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and "http" not in page.text.split("<body>")[1]


def test_a_client_that_hangs_up_half_way_costs_nothing(service: Any) -> None:
    async def gone() -> list[Any]:
        sent: list[Any] = []
        messages = iter([{"type": "http.request", "body": b'{"user_id": "u', "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages, {"type": "http.disconnect"})

        async def send_(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/recommend", "raw_path": b"/recommend",
                 "query_string": b"", "root_path": "", "headers": [(b"content-type", b"application/json")], "scheme": "http",
                 "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2)}  # fmt: skip
        await http(scope, receive, send_)
        return sent

    assert all(m.get("status", 422) < 500 for m in asyncio.run(gone()))
    assert send("POST", "/recommend", json=GOOD).status_code == 200


@pytest.mark.slow
@given(text=st.text(min_size=1, max_size=50))
@settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_can_be_an_item_or_is_refused(service: Any, text: str) -> None:
    try:
        path = httpx.URL("http://service/items/x").copy_with(path="/items/" + text)
    except (httpx.InvalidURL, UnicodeEncodeError):
        return
    answer = send("PUT", str(path), json={"columns": {"name": text, "genre": "even"}})
    assert answer.status_code in (200, 307, 404, 405, 422), answer.text  # 307: a slash at the end is not of the id
