"""Prometheus metrics of the service, through Ray's own endpoint; and what the page shows of this replica."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ray.util.metrics import Counter, Gauge, Histogram

_MS = [1.0, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
_SIZES = [1.0, 2, 4, 8, 16, 32]
_SCORES = [0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2, 3, 4, 5, 10, 20]
"""Ray takes positive bounds alone; what is below falls into the first."""
KEPT, HOUR = 512, 3600.0


class StageMeters:
    """What every stage tells of its work."""

    def __init__(self, stage: str) -> None:
        self._tags = {"stage": stage}
        self._ms = Histogram("mtrec_batch_ms", "Milliseconds of work of a batch", boundaries=_MS, tag_keys=("stage",))
        self._size = Histogram("mtrec_batch_size", "Requests done together", boundaries=_SIZES, tag_keys=("stage",))
        self._cache = Counter("mtrec_state_cache_total", "User states looked up", tag_keys=("hit",))

    def batch(self, size: int, seconds: float) -> None:
        self._size.observe(float(size), self._tags)
        self._ms.observe(1e3 * seconds, self._tags)

    def cache(self, hit: bool) -> None:
        self._cache.inc(1.0, {"hit": "yes" if hit else "no"})


class Meters:
    """What the ingress tells: to Prometheus, and to the page."""

    def __init__(self) -> None:
        self._requests = Counter("mtrec_requests_total", "Answers", tag_keys=("endpoint", "status"))
        self._latency = Histogram("mtrec_request_ms", "Milliseconds of a request", boundaries=_MS, tag_keys=("endpoint",))
        self._stage = Histogram("mtrec_stage_ms", "Milliseconds until a stage answered", boundaries=_MS, tag_keys=("stage",))
        self._rungs = Counter("mtrec_degraded_total", "Answers that were degraded, by how", tag_keys=("rung",))
        self._bundles = Counter("mtrec_answers_total", "Answers by bundle", tag_keys=("bundle",))
        self._scores = Histogram("mtrec_first_item", "Predictions of the first item", boundaries=_SCORES, tag_keys=("task",))
        self._coverage = Gauge("mtrec_coverage", "Share of the catalogue recommended within an hour, by this replica")
        self._dropped = Gauge("mtrec_impressions_dropped", "Shown lists that were not kept, by this replica")
        self.rungs, self.bundles, self.statuses = Counts[str](), Counts[str](), Counts[str]()
        self._kept: dict[str, deque[float]] = {}
        self._shown, self._before, self._since = set[str](), set[str](), time.monotonic()

    def request(self, endpoint: str, status: int, ms: float) -> None:
        self._requests.inc(1.0, {"endpoint": endpoint, "status": str(status)})
        self._latency.observe(ms, {"endpoint": endpoint})
        self.statuses[f"{endpoint} {status}"] += 1
        self._keep(endpoint, ms)

    def stage(self, stage: str, ms: float) -> None:
        self._stage.observe(ms, {"stage": stage})
        self._keep(stage, ms)

    def answer(self, bundle: str, marks: Iterable[str], items: list[dict[str, Any]], catalogue: int, dropped: int) -> None:
        self._bundles.inc(1.0, {"bundle": bundle[:12]})
        self.bundles[bundle] += 1
        for mark in marks:
            self._rungs.inc(1.0, {"rung": mark})
            self.rungs[mark] += 1
        for task, value in items[0]["tasks"].items() if items else ():
            self._scores.observe(value, {"task": task})
        self._shown.update(i["item_id"] for i in items)
        if time.monotonic() - self._since > HOUR:
            self._shown, self._before, self._since = set(), self._shown, time.monotonic()
        self._coverage.set(len(self._shown | self._before) / max(catalogue, 1))
        if dropped:
            self._dropped.set(dropped)

    def _keep(self, name: str, ms: float) -> None:
        self._kept.setdefault(name, deque(maxlen=KEPT)).append(ms)

    def told(self) -> Mapping[str, Any]:
        """For people: of this replica, the last requests."""
        return {
            "latency_ms": {
                n: {"count": len(v), "p50": round(float(np.median(v)), 2), "p99": round(float(np.quantile(v, 0.99)), 2)}
                for n, v in sorted(self._kept.items())
            },
            "degraded": dict(self.rungs),
            "answers": dict(self.bundles),
            "statuses": dict(self.statuses),
        }
