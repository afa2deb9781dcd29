"""The contract of live histories: what a user did until a moment ago. It knows no Ray.

A store keeps each user's last events and, apart from them, the set of items seen before; what it has acknowledged is durable, and
changes the very next answer. Users that it does not know yet come from the prepared data when they are first met, or all at once by
`load`. Every accepted event also goes into a log that `jobs.export_events` reads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from mtrec_ray.config import RunConfig
from mtrec_ray.expressions import Expression
from mtrec_ray.features import FeatureError
from mtrec_ray.histories import History
from mtrec_ray.schema import LogSchema
from mtrec_ray.serving.impressions import ImpressionStore
from mtrec_ray.serving.items import ItemStore

SKEW_MS = 60_000
"""How far ahead of this machine's clock an event may be."""


class StoreError(RuntimeError):
    """A store that cannot be reached, or that does not keep what it acknowledges."""


class EventError(ValueError):
    """An event that the log's schema does not allow; the message names its place and field."""


@dataclass(frozen=True)
class StoredEvent:
    """An event as it is kept."""

    user_id: str
    item_id: str
    timestamp: int
    """Milliseconds UTC."""
    event_id: str | None = None
    """Two events of a user with one id are one."""
    actions: Mapping[str, float] = field(default_factory=dict)
    """Labels, derived ones too; those that are missing are left out."""
    context: Mapping[str, Any] = field(default_factory=dict)
    shown: bool = True
    """Whether it is history (data.history); an impression without a positive action is in the log alone."""

    def body(self) -> str:
        """What a store keeps beside the ids and the time."""
        return json.dumps({"actions": dict(self.actions), "context": dict(self.context)}, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Stored:
    """A user's history, and its version: another one whenever the history is another."""

    history: History
    version: str


class Joining:
    """What both stores do: a user that they meet first, or first with these prepared data, begins with the prepared history."""

    prepared: Callable[[str], History | None]
    base: str
    """Version of the prepared data."""

    def get(self, user_id: str) -> Stored | None:
        """As of HistoryStore."""
        found, base = self._read(user_id)
        if base == self.base:
            return found
        history = self.prepared(user_id)
        if history is None:
            return found
        self._join_one(user_id, history)
        return self._read(user_id)[0]

    def _read(self, user_id: str) -> tuple[Stored | None, str | None]:
        """-> (the history, the version of the prepared data in it)."""
        raise NotImplementedError

    def _join_one(self, user_id: str, history: History) -> None:
        """What preparation knows joins what is there."""
        raise NotImplementedError


class HistoryStore(ItemStore, ImpressionStore, Protocol):
    """Where live histories are, and beside them changed items and lists that were shown. Raises StoreError where it cannot be
    reached."""

    @property
    def identity(self) -> str:
        """Made with the store and kept in it: numbers of events and lists mean nothing in another."""

    def get(self, user_id: str) -> Stored | None:
        """None for a user that neither it nor the prepared data know."""

    def append(self, events: Sequence[StoredEvent]) -> list[bool]:
        """Keep events, those of one user all or none; durable when this returns. -> which are new (not seen by their id before)."""

    def load(self, rows: Iterable[pa.Table]) -> int:
        """Rows of the prepared store join what is there; events that are there already count once -> users."""

    def forget(self, user_ids: Sequence[str]) -> int:
        """Remove all that is known of users, in the log too -> events removed."""

    def log(self, after: int, limit: int) -> list[tuple[int, StoredEvent]]:
        """Accepted events in the order of acceptance, from a number on."""

    def close(self) -> None: ...


def history_of(
    events: Sequence[tuple[str, int, str]], seen: Sequence[tuple[str, int]], actions: Sequence[str], context: Sequence[str]
) -> History:
    """(item, time, body) in the order of time, and (item, first time) of items seen -> a history."""
    bodies = [json.loads(body) for _, _, body in events]
    shown = {item for item, _, _ in events}
    older = [(item, time) for item, time in seen if item not in shown]
    return History(
        item_ids=[item for item, _, _ in events],
        times=[time for _, time, _ in events],
        actions={a: [b["actions"].get(a, math.nan) for b in bodies] for a in actions},
        context={c: [b["context"].get(c) for b in bodies] for c in context},
        seen_item_ids=[item for item, _ in older],
        seen_times=[time for _, time in older],
    )


def events_of(user_id: str, history: History) -> list[StoredEvent]:
    """A history of the prepared data as events."""
    out = []
    for place, (item, time) in enumerate(zip(history.item_ids, history.times, strict=True)):
        actions = {a: float(v[place]) for a, v in history.actions.items() if v[place] is not None and not np.isnan(v[place])}
        context = {c: v[place] for c, v in history.context.items() if v[place] is not None}
        out.append(StoredEvent(user_id, item, int(time), None, actions, context))
    return out


def users_of(rows: Iterable[pa.Table]) -> Iterator[tuple[str, History]]:
    from mtrec_ray.serving.history import histories_from_table

    for table in rows:
        yield from zip(table["user_id"].to_pylist(), histories_from_table(table), strict=True)


class EventRules:
    """What preparation asks of a row of the log, asked of one event."""

    def __init__(self, config: RunConfig, schema: LogSchema) -> None:
        self.labels = {n: label for n, label in config.data.labels.items() if label.expression is None}
        self.derived = {n: Expression(label.expression) for n, label in config.data.labels.items() if label.expression is not None}
        self.history = Expression(config.data.history_expression)
        self.context = {c.name: c for c in schema.context}
        self.shown = [a.name for a in schema.actions]

    def check(
        self, where: str, user_id: str, item_id: str, timestamp: int, event_id: str | None, actions: Mapping[str, float | None],
        context: Mapping[str, Any], now_ms: int,
    ) -> StoredEvent:  # fmt: skip
        """Raises EventError. where: begins the message."""
        if timestamp > now_ms + SKEW_MS:
            raise EventError(
                f"{where}timestamp: {timestamp} is {(timestamp - now_ms) / 1000:.0f} s ahead of this clock; milliseconds UTC?"
            )
        values: dict[str, float] = {}
        for name, value in actions.items():
            if name in self.derived:
                raise EventError(f"{where}actions.{name}: it is derived ({self.derived[name].text}); send what it is derived from")
            if name not in self.labels:
                raise EventError(f"{where}actions: unknown {name!r}; known are {sorted(self.labels)}")
            if value is None:
                continue
            label = self.labels[name]
            low, high = (0.0, 1.0) if label.kind == "binary" else (label.min, label.max)
            if not math.isfinite(value) or (label.kind == "binary" and value not in (0.0, 1.0)):
                raise EventError(
                    f"{where}actions.{name}: {value!r}; expected {'0 or 1' if label.kind == 'binary' else 'a finite number'}"
                )
            if (low is not None and value < low) or (high is not None and value > high):
                raise EventError(f"{where}actions.{name}: {value!r} is not between {low} and {high}")
            values[name] = float(value)
        for name, value in context.items():
            if name not in self.context:
                raise EventError(f"{where}context: unknown column {name!r}; known are {sorted(self.context)}")
            try:
                self.context[name].column([value])
            except FeatureError as error:
                raise EventError(f"{where}context.{error}") from None
        columns = {n: np.array([values.get(n, math.nan)]) for n in self.labels}
        for name, expression in self.derived.items():
            columns[name] = np.asarray(expression(columns), dtype=np.float64)
        present = {n: float(v[0]) for n, v in columns.items() if not math.isnan(v[0])}
        is_history = bool(np.nan_to_num(np.asarray(self.history(columns), dtype=np.float64))[0])
        return StoredEvent(
            user_id, item_id, timestamp, event_id, present, {n: v for n, v in context.items() if v is not None}, is_history
        )
