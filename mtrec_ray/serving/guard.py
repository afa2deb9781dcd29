"""Who may call, how long a body may be, and until when an answer is wanted: an ASGI layer in front of the endpoints. No Ray.

The ingress says at its start what holds in its process (`set_guard`); before that nobody gets through.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from mtrec_ray.serving.settings import Role, Tokens, allows

FREE = ("/healthz", "/")
"""What load balancers and browsers ask without a token; the page itself holds nothing."""
_ITEMS = "/items/"
MAX_DEADLINE_MS = 600_000

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""Of the request that is being answered; as the caller sent it (X-Request-ID), or made here."""
until: ContextVar[float | None] = ContextVar("until", default=None)
"""When its answer is wanted at the latest (seconds of time.time()); from X-Deadline-Ms."""


def needed(method: str, path: str) -> Role:
    """The role that a call takes."""
    if path == "/events":
        return "events"
    return "admin" if path.startswith(_ITEMS) and method not in ("GET", "HEAD") else "read"


def endpoint_of(path: str) -> str:
    """What metrics call a path: one of the service's own, without ids."""
    if path.startswith(_ITEMS):
        return _ITEMS + "{id}"
    return path if path in ENDPOINTS else "other"


ENDPOINTS = frozenset(
    ["/", "/recommend", "/recommend/many", "/score", "/similar", "/profile", "/history", "/search", "/events", "/healthz",
     "/versions", "/stats", "/about"]
)  # fmt: skip


@dataclass(frozen=True)
class Guard:
    tokens: Tokens
    max_body_bytes: int
    told: Callable[[str, int, float], None] | None = None
    """Is told of every request: endpoint, status, milliseconds."""


_current: Guard | None = None


def set_guard(guard: Guard) -> None:
    global _current
    _current = guard


class Guarded:
    """401 without a known token, 403 without the role, 413 for a body that is too long, before anything is parsed."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        guard, headers = _current, {k.lower(): v for k, v in scope["headers"]}
        if guard is None:
            await _answer(send, 503, "starting", {"retry-after": "1"})
            return
        started, status = time.perf_counter(), 0

        async def sent(message: dict[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._guarded(guard, headers, scope, receive, sent)
        finally:
            if guard.told is not None:  # 0: the caller went away before there was an answer
                guard.told(endpoint_of(scope["path"]), status, 1e3 * (time.perf_counter() - started))

    async def _guarded(self, guard: Guard, headers: dict[bytes, bytes], scope: dict[str, Any], receive: Any, send: Any) -> None:
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id.set(given if 0 < len(given) <= 128 and given.isprintable() else uuid.uuid4().hex)
        wanted = headers.get(b"x-deadline-ms", b"").decode("latin-1")
        if wanted and not (wanted.isascii() and wanted.isdigit() and 0 < int(wanted[:9]) <= MAX_DEADLINE_MS):
            await _answer(send, 422, f"x-deadline-ms: expected milliseconds from 1 to {MAX_DEADLINE_MS}", {})
            return
        until.set(time.time() + int(wanted) / 1e3 if wanted else None)
        if scope["path"] not in FREE:
            asks = needed(scope["method"], scope["path"])
            role = guard.tokens.role_of(headers.get(b"authorization", b"").decode("latin-1"))
            if role is None:
                await _answer(send, 401, "a bearer token is needed", {"www-authenticate": "Bearer"})
                return
            if not allows(role, asks):
                await _answer(send, 403, f"this needs the role {asks}; the token has {role}", {})
                return
        body = await _body(receive, headers.get(b"content-length", b""), guard.max_body_bytes)
        if body is None:
            await _answer(send, 413, f"the body is longer than {guard.max_body_bytes} bytes", {})
            return
        told = False

        async def again() -> dict[str, Any]:
            nonlocal told
            if told:
                return dict(await receive())  # that the client has gone
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


async def _body(receive: Any, length: bytes, most: int) -> bytes | None:
    """The whole body; None for one that is too long."""
    if length.isdigit() and int(length) > most:
        return None
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":  # the client has gone
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            return None
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Any, status: int, detail: str, headers: dict[str, str]) -> None:
    content = json.dumps({"detail": detail}).encode()
    named = {"content-type": "application/json", "content-length": str(len(content)), **headers}
    pairs = [(k.encode(), v.encode()) for k, v in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
