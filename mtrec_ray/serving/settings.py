"""Settings of the service (`args` in serve_apps/recommend.yaml), and the store that they name. It knows no Ray."""

from __future__ import annotations

import hmac
import os
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mtrec_ray import storage
from mtrec_ray.predictor import Predictor
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.redis_store import RedisStore
from mtrec_ray.serving.sqlite_store import SqliteStore
from mtrec_ray.serving.store import HistoryStore

Role = Literal["read", "events", "admin"]
ROLES: tuple[Role, ...] = ("read", "events", "admin")


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class StoreSettings(_Settings):
    """Where live histories are."""

    kind: Literal["sqlite", "redis", "none"] = "sqlite"
    """`sqlite`: a file, for the replicas of one machine. `redis`: a server (Redis or Valkey), for a cluster. `none`: only what was
    prepared; `POST /events` is refused."""
    path: str | None = None
    """`sqlite`: default RUN/live/histories.sqlite."""
    url: str | None = None
    """`redis`: such as redis://HOST:6379/0."""
    trust_durability: bool = False
    """`redis`: a managed server that does not tell its settings is taken to keep what it acknowledges."""

    @model_validator(mode="after")
    def _check(self) -> StoreSettings:
        if (self.kind == "redis") != (self.url is not None):
            raise ValueError("store.url: kind redis needs one, and no other kind has one")
        if self.path is not None and self.kind != "sqlite":
            raise ValueError(f"store.path: it is of kind sqlite, not of {self.kind}")
        return self


class Exploration(_Settings):
    """Lists in a drawn order, so that a log can be learnt from without bias (serving/impressions.py)."""

    temperature: float = Field(default=0.0, ge=0, le=1e6)
    """In units of the final score: 0 never changes an order; the larger, the nearer to any order."""
    seed: int = 0


class ServingSettings(_Settings):
    """What every replica is told."""

    store: StoreSettings = StoreSettings()
    tokens_env: str | None = None
    """Environment variable with bearer tokens, `ROLE:TOKEN` separated by commas; roles are read, events (which may read too) and
    admin (everything). None: no tokens, for a service on loopback."""
    max_body_bytes: int = Field(default=1 << 20, ge=1024)
    """A longer body is answered with 413."""
    threads: int = Field(default=1, ge=1)
    """Of torch in every replica."""
    max_batch: int = Field(default=32, ge=1, le=1024)
    """Requests that a replica's torch thread does together, at most; it never waits for more to come."""
    max_together: int = Field(default=100, ge=1, le=1000)
    """Requests in one call of `/recommend/many`."""
    max_k: int = Field(default=10_000, ge=1)
    """Items of one answer; whoever asks for more gets so many."""
    deadline_ms: int = Field(default=5_000, ge=1)
    """For an answer whose caller names no other (X-Deadline-Ms)."""
    impressions: float = Field(default=0.0, ge=0, le=1)
    """Share of the users, by the hash of their id, whose lists are kept as they were shown."""
    exploration: Exploration = Exploration()
    cached_states: int = Field(default=4096, ge=0)
    """User states that a replica of StateEncoder remembers, by (user, version of the history)."""


class Tokens:
    """Who may do what."""

    def __init__(self, settings: ServingSettings) -> None:
        """Raises ValueError where the variable is missing or names no token."""
        self._tokens: list[tuple[Role, bytes]] = []
        name = settings.tokens_env
        self.open = name is None
        if name is None:
            return
        for entry in filter(None, (e.strip() for e in os.environ.get(name, "").split(","))):
            role, _, token = entry.partition(":")
            if role not in ROLES or len(token) < 16:
                raise ValueError(
                    f"tokens_env: {name} holds ROLE:TOKEN with a role of {list(ROLES)} and a token of 16 characters at least"
                )
            self._tokens.append((role, token.encode()))  # type: ignore[arg-type]
        if not self._tokens:
            raise ValueError(f"tokens_env: the environment variable {name} is empty or not set; nobody could call the service")

    def role_of(self, header: str | None) -> Role | None:
        """The largest role of `Authorization: Bearer TOKEN`; None for none. Every token is compared in constant time."""
        if self.open:
            return "admin"
        scheme, _, token = (header or "").partition(" ")
        given = token.strip().encode() if scheme.lower() == "bearer" else b""
        found = [ROLES.index(role) for role, known in self._tokens if hmac.compare_digest(known, given)]
        return ROLES[max(found)] if found else None


def allows(role: Role, needed: Role) -> bool:
    return ROLES.index(role) >= ROLES.index(needed)


def store_path(settings: StoreSettings, data_uri: str) -> str:
    """File of the SQLite store. Raises ValueError where there is no local place for it."""
    if settings.path is not None:
        return settings.path
    if not storage.is_local(data_uri):
        raise ValueError(f"store.path: the run ({data_uri}) is not on a local disk; name a local file, or take kind: redis")
    return storage.join(storage.absolute(data_uri).rsplit("/", 1)[0], "live", "histories.sqlite")


def open_store(settings: StoreSettings, data_uri: str, predictor: Predictor) -> HistoryStore | None:
    """None for kind none. Raises StoreError, StorageError."""
    if settings.kind == "none":
        return None
    prepared = PreparedHistories(data_uri)
    schema = predictor.schema
    actions, context = [a.name for a in schema.actions], [c.name for c in schema.history_features]
    keep = 2 * (schema.window - 1)  # a moment in the near past is served with the window that it had
    if settings.kind == "redis":
        assert settings.url is not None
        trust = settings.trust_durability
        return RedisStore(settings.url, actions, context, keep, prepared.get, prepared.version, trust_durability=trust)
    return SqliteStore(store_path(settings, data_uri), actions, context, keep, prepared.get, prepared.version)
