"""Where a job runs. Ray itself is not started."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from mtrec_ray import runtime


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Ray is asked for."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: found.update(settings))
    return found


def test_without_an_address_ray_starts_here_even_beside_another_one(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    runtime.connect()
    assert asked["address"] == "local" and asked["num_cpus"] >= 4


def test_with_an_address_nothing_is_started(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    runtime.connect()
    assert asked["address"] == "auto" and "num_cpus" not in asked
