"""Ports and answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import httpx


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(answer: Callable[[], httpx.Response], seconds: float = 120) -> httpx.Response:
    """The first 200, tried for some time."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            response = answer()
            if response.status_code == 200 or time.monotonic() > deadline:
                return response
        except httpx.TransportError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)
