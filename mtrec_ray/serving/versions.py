"""Bundles side by side in one replica: what is served, what is tried on a share of the users, what was refused. No Ray here.

A rollout is Serve's `user_config` (docs/serving.md): every replica loads the bundle beside the one that it serves, proves on the
golden requests that it answers as it should, and only then has it. Which one an answer is made from is decided once, by the
ingress; a replica that lacks it says so.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from mtrec_ray import bundle, golden, storage
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.hashing import place_of
from mtrec_ray.predictor import Predictor
from mtrec_ray.serving.items import LiveItems
from mtrec_ray.serving.stages import MixedBundlesError


class Rollout(BaseModel):
    """What is to be served (`user_config` of every deployment)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    bundle: str | None = None
    """Bundle or run directory (or URI); None: the one of `args.run`."""
    canary: str | None = None
    """Another one, for a share of the users."""
    share: float = Field(default=0.0, ge=0, le=1)
    """Of the users, by the hash of their id, whom the canary answers."""
    drain_seconds: float = Field(default=120.0, ge=0)
    """For which a bundle that is not wanted any more still answers what began with it."""


class Version:
    """One bundle in memory, and the catalogue as it is now."""

    def __init__(self, uri: str, prepare: Callable[[Predictor, str], None] | None = None) -> None:
        """prepare: is told of the predictor before anybody else. Raises BundleError, StorageError, GoldenError."""
        started = time.perf_counter()
        root = bundle.find(uri)
        # another bundle may be published at the same place while this one serves: nothing is read from there again
        prefix = bundle.prefix_of(root)
        self.asked, self.uri, self.base = uri, root, bundle.load(prefix)
        self.fingerprint = self.base.fingerprint
        self._prefix, self._golden = prefix, bundle.find_golden(prefix)
        self._texts = bundle.text_vectors(prefix) if storage.is_local(prefix) else None  # a memory map
        self.seconds = {"load": time.perf_counter() - started}
        if prepare is not None:
            prepare(self.base, root)
        self._live, self._lock = (0, self.base), threading.Lock()
        self._encoder: TextEncoder | None = None

    def verify(self) -> None:
        """Ask the golden requests, which warms up too. Raises GoldenError, BundleError for a bundle without them."""
        started = time.perf_counter()
        golden.check(self.base, self.golden)
        self.seconds["golden"] = time.perf_counter() - started

    def live(self, items: LiveItems) -> tuple[int, Predictor]:
        """For the catalogue as it is known now."""
        with self._lock:
            if self._live[0] != items.number:
                self._live = items.predictor(self.base, self.encoder_key, self.encode)
            return self._live

    def known(self) -> tuple[int, Predictor]:
        """For the catalogue as it was when somebody last asked for it; no work."""
        return self._live

    @property
    def encoder_key(self) -> str:
        """Which TextEncoder makes the vectors, wherever it lies."""
        facts = {k: v for k, v in (self.base.text_encoder or {}).items() if k != "model"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, texts: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Texts -> unit vectors. The TextEncoder is loaded when this is first asked for. Raises EncoderError."""
        if self._encoder is None:
            self._encoder = self.base.open_text_encoder()
        return self._encoder.encode(texts)

    @property
    def golden(self) -> dict[str, Any]:
        """Requests with their answers. Raises BundleError for a bundle without them."""
        if self._golden is None:
            raise bundle.BundleError(f"{self.uri}: no golden requests; an older version wrote it: run jobs.index again")
        return self._golden

    def text_vectors(self) -> Tensor | None:
        return self._texts if storage.is_local(self._prefix) else bundle.text_vectors(self._prefix)


class Versions:
    """The bundles of a replica. Loads in the caller's thread."""

    def __init__(self, default_uri: str, prepare: Callable[[Predictor, str], None] | None = None) -> None:
        self.default_uri, self._prepare = default_uri, prepare
        self.rollout = Rollout()
        self.refused: dict[str, str] = {}
        """URI -> why it is not served."""
        self._held: dict[str, Version] = {}
        self._leaving: dict[str, float] = {}
        self._current, self._canary = "", ""
        self._lock = threading.RLock()

    @property
    def current(self) -> Version:
        """What most users are answered from; the default bundle where nobody asked for another."""
        with self._lock:
            if not self._current:
                self._current = self._add(Version(self.default_uri, self._prepare)).fingerprint
            return self._held[self._current]

    def _add(self, version: Version) -> Version:
        with self._lock:
            known = self._held.setdefault(version.fingerprint, version)
            self._leaving.pop(version.fingerprint, None)
            return known

    def get(self, fingerprint: str) -> Version:
        """Raises MixedBundlesError."""
        found = self._held.get(fingerprint)
        if found is None and self.current.fingerprint != fingerprint:
            raise MixedBundlesError(f"bundle {fingerprint} is asked for, and here is {sorted(self._held)}")
        return found or self.current

    def has(self, fingerprint: str) -> bool:
        return fingerprint in self._held

    def load(self, rollout: Rollout) -> list[Version]:
        """Load and prove what a rollout names, beside what is served -> the bundle and the canary (if any) of it.

        Raises BundleError, StorageError, GoldenError; then everything is as it was, and `refused` says why.
        """
        out = []
        for uri in [rollout.bundle or self.default_uri, *([rollout.canary] if rollout.canary else [])]:
            self.refused.pop(uri, None)
            try:
                known = [v for v in list(self._held.values()) if v.asked == uri]
                if known and bundle.fingerprint_of(known[0].uri) == known[0].fingerprint:
                    out.append(self._add(known[0]))
                    continue
                version = Version(uri, self._prepare)
                if uri != self.default_uri or self._held:  # what the service starts with may be of an older version
                    version.verify()
                out.append(self._add(version))
            except Exception as error:
                self.refused[uri] = f"{type(error).__name__}: {error}"
                raise
        return out

    def switch(self, rollout: Rollout, found: list[Version]) -> None:
        """From now on new answers are made from these; others leave when they have drained."""
        with self._lock:
            self.rollout, self._current = rollout, found[0].fingerprint
            self._canary = found[1].fingerprint if len(found) > 1 else ""
            now = time.monotonic()
            for fingerprint in self._held:
                if fingerprint not in (self._current, self._canary):
                    self._leaving.setdefault(fingerprint, now + rollout.drain_seconds)
        self.drain()

    def drain(self) -> None:
        """Unload what has drained."""
        with self._lock:
            now = time.monotonic()
            for fingerprint in [f for f, moment in self._leaving.items() if moment <= now]:
                del self._leaving[fingerprint]
                closing = self._held.pop(fingerprint, None)
                close = getattr(getattr(closing and closing.base, "index", None), "close", None)
                if close is not None:
                    close()

    def choose(self, user_id: str | None) -> Version:
        """Whom the canary answers follows from the id alone."""
        if self._canary and user_id is not None and place_of(user_id) < self.rollout.share:
            return self._held[self._canary]
        return self.current

    def others(self, version: Version) -> list[Version]:
        """What else could answer, the current one first."""
        return sorted((v for v in list(self._held.values()) if v is not version), key=lambda v: v.fingerprint != self._current)

    def told(self) -> Mapping[str, Any]:
        """For people."""
        return {
            "current": self._current, "canary": self._canary or None, "share": self.rollout.share if self._canary else 0.0,
            "held": {f: {"uri": v.uri, "seconds": v.seconds} for f, v in self._held.items()},
            "refused": dict(self.refused),
        }  # fmt: skip
