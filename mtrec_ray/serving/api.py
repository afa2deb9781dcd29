"""What HTTP requests and answers look like. Times are int64 milliseconds UTC."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from mtrec_ray.features import FeatureError, FeatureSpec
from mtrec_ray.histories import History
from mtrec_ray.schema import LogSchema

Id = Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
"""Without control characters: what lies in stores and logs is a line."""
PathId = Annotated[str, Path(min_length=1, max_length=512)]
"""An id in a path; `check_id` holds it to Id."""
Scalar = str | bool | int | float | None
Value = Scalar | list[Scalar]
"""A feature's value: text or a number, a list of them, or null."""
MAX_EVENTS = 5_000
MAX_ITEMS = 10_000
MAX_ACTION = float(np.finfo(np.float32).max)
"""The model reads float32."""


class BadRequestError(ValueError):
    """A body that is well formed but contradicts the log's schema; answered with 422."""


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Event(_Request):
    """One event of an inline history."""

    event_id: Id | None = None
    """Two events with one id count once."""
    item_id: Id
    timestamp: int = Field(ge=0, le=7_258_118_400_000, description="milliseconds UTC")
    actions: dict[str, float | None] = Field(default_factory=dict)
    context: dict[str, Value] = Field(default_factory=dict)
    """Features of the event, as its log has them."""


class _User(_Request):
    user_id: Id | None = None
    history: list[Event] | None = Field(default=None, max_length=MAX_EVENTS)
    at: int | None = Field(default=None, ge=0, description="milliseconds UTC; only earlier events count. Default: now")

    @model_validator(mode="after")
    def _one_of(self) -> _User:
        if (self.user_id is None) == (self.history is None):
            raise ValueError("give either user_id or an inline history")
        return self


class RecommendRequest(_User):
    k: int = Field(default=10, ge=1)
    context: dict[str, Value] = Field(default_factory=dict)
    """Features of the request: device, page, price now, ..."""
    exclude: list[Id] = Field(default_factory=list, max_length=MAX_ITEMS)
    """Items that are not wanted; ids that the catalogue lacks are nothing to leave out."""
    exclude_seen: bool | None = None
    """Leave out what the history holds. Default: as the model was trained (data.exclude_seen)."""
    where: dict[str, list[str]] = Field(default_factory=dict)
    """Only items with one of these values, for every attribute named."""
    candidates: list[Id] | None = Field(default=None, min_length=1, max_length=MAX_ITEMS)
    """Only these items."""
    weights: dict[str, float] = Field(default_factory=dict)
    """Task -> its weight in the final order, in the place of the configuration's."""
    diversity: float = Field(default=0.0, ge=0, le=1)
    """0: by score alone; above, items like those before them come later (maximal marginal relevance)."""
    caps: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Attribute -> most items of one of its values."""
    explain: bool = False
    """Say of every item which past events did most for its score (each left out, exactly)."""
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {"user_id": "196", "k": 10, "at": None, "context": {}, "exclude": ["50"]},
                {"history": [{"event_id": "e1", "item_id": "242", "timestamp": 881250949000, "actions": {"rating": 3}}], "k": 5},
            ]
        },
    )


class ManyRequest(_Request):
    """Many users in one call."""

    requests: list[RecommendRequest] = Field(min_length=1, max_length=1000)
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={"examples": [{"requests": [{"user_id": "196"}, {"user_id": "186", "k": 5}]}]},
    )


class ScoreRequest(_User):
    item_ids: list[Id] = Field(min_length=1, max_length=MAX_ITEMS)
    context: dict[str, Value] = Field(default_factory=dict)
    """Features of the request: device, page, price now, ..."""
    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"user_id": "196", "item_ids": ["50", "181"]}]}
    )


class LiveEvent(Event):
    """What a user did just now."""

    user_id: Id


class EventsRequest(_Request):
    events: list[LiveEvent] = Field(min_length=1, max_length=MAX_EVENTS)
    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {"user_id": "196", "event_id": "e7", "item_id": "50", "timestamp": 1700000000000, "actions": {"rating": 5}}
                    ]
                }
            ]
        },
    )


class SimilarRequest(_Request):
    item_id: Id
    k: int = Field(default=10, ge=1)
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"item_id": "50", "k": 5}]})


class SearchRequest(_Request):
    text: str = Field(min_length=1, max_length=2_000)
    k: int = Field(default=10, ge=1)
    where: dict[str, list[str]] = Field(default_factory=dict)
    """As of /recommend."""
    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"text": "a toy that comes to life", "k": 5}]}
    )


class HistoryRequest(_Request):
    user_id: Id
    limit: int = Field(default=20, ge=1, le=1000)
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"user_id": "196"}]})


class ItemRequest(_Request):
    """A row of the items table."""

    columns: dict[str, Scalar]
    """As the configuration reads them (data.text, data.item_features)."""
    model_config = ConfigDict(
        extra="forbid", strict=True,
        json_schema_extra={"examples": [{"columns": {"title": "A New Film", "year": "2026", "genres": "Comedy Drama"}}]},
    )  # fmt: skip


class ItemPatch(_Request):
    available: bool | None = None
    """False: out of stock."""
    blocked: bool | None = None
    """True: nobody gets it."""
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"available": False}]})

    @model_validator(mode="after")
    def _something(self) -> ItemPatch:
        if self.available is None and self.blocked is None:
            raise ValueError("give available, blocked, or both")
        return self


class ProfileRequest(_User):
    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [{"user_id": "196"}]})


class Reason(BaseModel):
    item_id: str
    title: str
    time: int
    gain: float
    """The final score less what it would be without this event."""


class Item(BaseModel):
    item_id: str
    title: str
    score: float
    tasks: dict[str, float]
    because: list[Reason] | None = None
    """With `explain`: the events that did most for the score, at most three; none without a history."""


class ScoredItem(BaseModel):
    item_id: str
    score: float
    tasks: dict[str, float]


class SimilarItem(BaseModel):
    item_id: str
    title: str
    score: float


class _Answer(BaseModel):
    bundle: str
    degraded: list[str]


class RecommendAnswer(_Answer):
    user_id: str | None
    items: list[Item]


class ManyAnswer(BaseModel):
    answers: list[RecommendAnswer]


class SearchAnswer(_Answer):
    items: list[SimilarItem]


class KnownEvent(BaseModel):
    item_id: str
    title: str
    timestamp: int
    actions: dict[str, float]


class HistoryAnswer(BaseModel):
    user_id: str
    events: list[KnownEvent]
    """The latest first."""
    seen_before: int
    """Items of events before those that are kept."""


class ItemAnswer(BaseModel):
    item_id: str
    number: int
    """Of this change."""
    columns: dict[str, str | None] | None
    """Null: the bundle's own."""
    available: bool
    blocked: bool
    deleted: bool


class KnownLabel(BaseModel):
    kind: str
    min: float | None
    max: float | None


class About(BaseModel):
    name: str
    tasks: dict[str, str]
    """Task -> its kind."""
    labels: dict[str, KnownLabel]
    """What an event's actions may be."""
    filters: dict[str, list[str]]
    """Attribute of items -> its most frequent values."""
    fused: bool


class Latency(BaseModel):
    count: int
    p50: float
    p99: float


class Stats(BaseModel):
    latency_ms: dict[str, Latency]
    """Of endpoints and stages, the last requests."""
    degraded: dict[str, int]
    answers: dict[str, int]
    statuses: dict[str, int]
    versions: dict[str, Any]
    items: int
    """Number of the last change of an item that is known."""


class ScoreAnswer(_Answer):
    user_id: str | None
    items: list[ScoredItem]


class SimilarAnswer(_Answer):
    item_id: str
    items: list[SimilarItem]


class EventsAnswer(BaseModel):
    accepted: int
    """Events that are new, and durable now."""
    duplicates: int
    """Events whose id is known."""


class ProfileAnswer(_Answer):
    user_id: str | None
    profile: dict[str, dict[str, float]]


class Health(BaseModel):
    status: str
    bundle: str


def inline_history(events: list[Event], schema: LogSchema) -> History:
    """Events of a request -> a history in time order (ties as given), each event id once.

    Raises BadRequestError for an action or feature that the log does not have, and for a value that a feature cannot have.
    """
    actions, columns = [a.name for a in schema.actions], {c.name: c for c in schema.context}
    once: dict[str, Event] = {}
    for place, event in enumerate(events):
        for name, value in event.actions.items():
            if name not in actions:
                raise BadRequestError(f"history[{place}]: unknown action {name!r}; known are {actions}")
            if value is not None and not abs(value) <= MAX_ACTION:
                raise BadRequestError(f"history[{place}]: actions.{name}: expected a finite number, found {value!r}")
        check_context(event.context, columns, f"history[{place}]: ")
        once.setdefault(event.event_id if event.event_id is not None else f"\0{place}", event)
    ordered = sorted(once.values(), key=lambda e: e.timestamp)

    def number(value: Any) -> float:
        return float("nan") if value is None else float(value)

    return History(
        item_ids=[e.item_id for e in ordered],
        times=[e.timestamp for e in ordered],
        actions={a: [number(e.actions.get(a)) for e in ordered] for a in actions},
        context={c.name: [e.context.get(c.name) for e in ordered] for c in schema.history_features},
    )


def check_context(given: Mapping[str, Value], known: Mapping[str, FeatureSpec], where: str = "") -> None:
    """Raises BadRequestError, which names the feature. where: begins the message."""
    for name, value in given.items():
        if name not in known:
            raise BadRequestError(f"{where}context: unknown column {name!r}; known are {list(known)}")
        try:
            known[name].column([value])
        except FeatureError as error:
            raise BadRequestError(f"{where}context.{error}") from None


_ONE_ID: TypeAdapter[str] = TypeAdapter(Id)


def check_id(value: str) -> str:
    """An id from a path. Raises BadRequestError."""
    try:
        return _ONE_ID.validate_python(value)
    except ValidationError as error:
        raise BadRequestError(f"item_id: {error.errors()[0]['msg']}") from None


def now_ms() -> int:
    return time.time_ns() // 1_000_000
