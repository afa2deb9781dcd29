"""Lists that were shown, with the chance that each item had of its place: what a log needs to be learnt from without bias.

Exploration draws the order from a Plackett-Luce distribution over the candidates' final scores s: the item of a place is drawn
with probability exp(s/T) ÷ Σ exp(s'/T) over those that are left, by adding Gumbel noise to s/T and sorting (Yellott, 1977; Kool et
al., arXiv 1903.06059). The propensity of a place is that probability; without exploration (T = 0) it is 1. No Ray here.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mtrec_ray.predictor import Ranked

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
AT_ONCE, WAITING = 500, 10_000
"""Lists written in one transaction, and lists that may wait for it; more are dropped, and counted."""


@dataclass(frozen=True)
class ShownList:
    """One answer as it was given."""

    user_id: str
    """As the store knows the user."""
    request_id: str
    timestamp: int
    """Milliseconds UTC."""
    bundle: str
    item_ids: Sequence[str]
    scores: Sequence[float]
    propensities: Sequence[float]
    tasks: Sequence[dict[str, float]]

    def body(self) -> str:
        """All but the user, as JSON."""
        return json.dumps({k: v for k, v in self.__dict__.items() if k != "user_id"}, separators=(",", ":"))

    @classmethod
    def of(cls, user_id: str, body: str) -> ShownList:
        return cls(user_id, **json.loads(body))


class ImpressionStore(Protocol):
    """Where shown lists are kept. Raises StoreError where it cannot be reached."""

    def keep_impressions(self, lists: Sequence[ShownList]) -> None: ...

    def impressions(self, after: int, limit: int) -> list[tuple[int, ShownList]]:
        """Lists in the order in which they were kept, from a number on."""


def explore(ranked: Ranked, temperature: float, seed: int, request_id: str) -> tuple[Ranked, FloatArray]:
    """One row of ranked candidates in a drawn order -> (itself in that order, propensity of each place).

    The draw follows from the seed and the request's id alone. Candidates without a score (-inf) stay at the end.
    """
    score = ranked.score_BK[0].double().numpy()
    if not temperature:
        return ranked, np.ones(len(score))
    there = np.isfinite(score)
    mixed = hashlib.sha256(f"{seed}:{request_id}".encode()).digest()
    noise = np.random.default_rng(int.from_bytes(mixed[:8], "little")).gumbel(size=len(score))
    scaled = np.where(there, score / temperature, -np.inf)
    order = np.argsort(-(scaled + noise), kind="stable")
    placed = scaled[order]
    # log Σ exp over those that are left, from the end
    left = np.logaddexp.accumulate(placed[::-1])[::-1]
    with np.errstate(invalid="ignore"):
        propensity = np.where(there[order], np.exp(placed - left), 0.0)
    index = torch.from_numpy(order)[None]
    moved = {name: values.gather(1, index) for name, values in ranked.tasks_BK.items()}
    return Ranked(ranked.item_BK.gather(1, index), ranked.score_BK.gather(1, index), moved), propensity


class ImpressionLog:
    """Keeps lists in the background, so that no answer waits for it."""

    def __init__(self, keep: Callable[[Sequence[ShownList]], None]) -> None:
        """keep: ImpressionStore.keep_impressions."""
        self._keep, self.dropped = keep, 0
        self._waiting: list[ShownList] = []
        self._there = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._write, daemon=True, name="impressions")
        self._thread.start()

    def add(self, shown: ShownList) -> None:
        with self._there:
            if len(self._waiting) >= WAITING:
                self.dropped += 1
                return
            self._waiting.append(shown)
            self._there.notify()

    def close(self) -> None:
        """Write what waits, then end."""
        with self._there:
            self._closed = True
            self._there.notify()
        self._thread.join(timeout=10)

    def _write(self) -> None:
        while True:
            with self._there:
                while not self._waiting and not self._closed:
                    self._there.wait()
                if not self._waiting:
                    return
                part, self._waiting = self._waiting[:AT_ONCE], self._waiting[AT_ONCE:]
            try:
                self._keep(part)
            except Exception:  # a store that is down: the answers were given all the same
                with self._there:
                    self.dropped += len(part)
                    if self._closed:
                        return
                threading.Event().wait(1.0)
            else:
                threading.Event().wait(0.05)  # so that a burst is a few transactions
