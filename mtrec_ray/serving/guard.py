"""Who may call, and how long a body may be: an ASGI layer in front of the endpoints. It knows no Ray.

The ingress says at its start what holds in its process (`set_guard`); before that nobody gets through.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from mtrec_ray.serving.settings import Role, Tokens, allows

NEEDED: dict[str, Role] = {"/events": "events"}
"""Path -> role, where reading does not suffice."""
FREE = ("/healthz",)
"""What load balancers ask without a token."""


@dataclass(frozen=True)
class Guard:
    tokens: Tokens
    max_body_bytes: int


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
        if scope["path"] not in FREE:
            needed = NEEDED.get(scope["path"], "read")
            role = guard.tokens.role_of(headers.get(b"authorization", b"").decode("latin-1"))
            if role is None:
                await _answer(send, 401, "a bearer token is needed", {"www-authenticate": "Bearer"})
                return
            if not allows(role, needed):
                await _answer(send, 403, f"this needs the role {needed}; the token has {role}", {})
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
