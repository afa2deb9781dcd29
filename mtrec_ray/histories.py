"""What is known of a user, with the log's own ids, and how it becomes what the model reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec_ray.features import InputSpec, TextSpec, dense
from mtrec_ray.models.batch import HistoryBatch, collate_history
from mtrec_ray.retrieval.exact import NONE
from mtrec_ray.schema import LogSchema

IntArray = NDArray[np.int64]
NO_HISTORY = "no_history"
UNKNOWN_HISTORY_ITEMS = "unknown_history_items"


@dataclass(frozen=True)
class History:
    """What is known of a user: events in time order (ties in log order), with the log's own ids."""

    item_ids: Sequence[str] = ()
    times: Sequence[int] = ()
    """Milliseconds UTC."""
    actions: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """NaN is missing; an action that is absent is missing everywhere."""
    context: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Features as the log has them (text, number, list of texts; None is missing); absent ones are missing everywhere."""
    seen_item_ids: Sequence[str] = ()
    """Items of events before those listed."""
    seen_times: Sequence[int] = ()

    def before(self, at: int | None) -> History:
        """The part strictly before a moment (ms)."""
        if at is None or (not self.seen_times and (not self.times or self.times[-1] < at)):
            return self
        n = int(np.searchsorted(np.asarray(self.times, dtype=np.int64), at, side="left"))
        m = int(np.searchsorted(np.asarray(self.seen_times, dtype=np.int64), at, side="left"))
        return History(
            self.item_ids[:n],
            self.times[:n],
            {k: v[:n] for k, v in self.actions.items()},
            {k: v[:n] for k, v in self.context.items()},
            self.seen_item_ids[:m],
            self.seen_times[:m],
        )

    def only(self, events: Sequence[int]) -> History:
        """Some of the events, by their places; what was seen before stays."""
        return History(
            [self.item_ids[n] for n in events],
            [self.times[n] for n in events],
            {k: [v[n] for n in events] for k, v in self.actions.items()},
            {k: [v[n] for n in events] for k, v in self.context.items()},
            self.seen_item_ids,
            self.seen_times,
        )


@dataclass(frozen=True)
class EncodedHistories:
    """Histories as the model reads them, what they exclude, and which degradations apply."""

    batch: HistoryBatch
    seen: list[IntArray]
    """Catalogue positions that may not be recommended (empty unless exclude_seen)."""
    visible: list[IntArray]
    """Distinct catalogue positions of all events that the histories hold, those before the window too; what profiles read."""
    degraded: list[list[str]]

    @classmethod
    def of(cls, batch: HistoryBatch, visible: list[IntArray], degraded: list[list[str]], exclude_seen: bool) -> EncodedHistories:
        nothing = [np.zeros(0, np.int64)] * len(visible)
        return cls(batch, visible if exclude_seen else nothing, visible, degraded)


TextReader = Callable[[pa.Array], NDArray[np.float32]]
"""(n,) texts of a feature's column -> (n, E) vectors."""


def encode_histories(
    histories: Sequence[History], position: Mapping[str, int], schema: LogSchema, read_texts: TextReader
) -> EncodedHistories:
    """The last L - 1 known events of each history, as integers. Items that the catalogue lacks are left out, and that is marked.

    position: item id -> catalogue position. Raises FeatureError.
    """
    items, times, lengths = [], [], []
    actions: dict[str, list[NDArray[np.float32]]] = {a.name: [] for a in schema.actions}
    features = schema.history_features
    context: dict[str, list[Any]] = {spec.name: [] for spec in features}
    visible, degraded = [], []
    for history in histories:
        place = _positions(position, history.item_ids)
        known = np.flatnonzero(place != NONE)
        marks = [] if len(known) == len(place) else [UNKNOWN_HISTORY_ITEMS]
        shown = known[1 - schema.window :]
        items.append(place[shown])
        times.append(np.asarray(history.times, dtype=np.int64)[shown])
        lengths.append(len(shown))
        for name, parts in actions.items():
            values = history.actions.get(name)
            full = np.full(len(place), np.nan) if values is None else np.asarray(values, dtype=np.float64)
            parts.append(full[shown].astype(np.float32))
        for spec in features:
            raw = history.context.get(spec.name) or [None] * len(place)
            context[spec.name].extend(raw[i] for i in shown)
        older = _positions(position, history.seen_item_ids)
        visible.append(np.unique(np.concatenate([place[known], older[older != NONE]])))
        degraded.append(marks if len(shown) else [*marks, NO_HISTORY])
    batch = collate_history(
        np.concatenate(items) if items else np.zeros(0, np.int64),
        np.concatenate(times) if times else np.zeros(0, np.int64),
        np.array(lengths, dtype=np.int64),
        {n: np.concatenate(v) if v else np.zeros(0, np.float32) for n, v in actions.items()},
        {spec.name: _encoded(spec, context[spec.name], read_texts) for spec in features},
        schema.session_gap_ms,
    )
    return EncodedHistories.of(batch, visible, degraded, schema.exclude_seen)


def _positions(position: Mapping[str, int], item_ids: Sequence[str]) -> IntArray:
    return np.array([position.get(i, NONE) for i in item_ids], dtype=np.int64)


def _encoded(spec: InputSpec, values: list[Any], read_texts: TextReader) -> NDArray[Any]:
    """A feature of past events as the model reads it; texts are their vectors. Raises FeatureError."""
    if isinstance(spec, TextSpec):
        return read_texts(spec.column(values))
    return dense(spec.encode(values))
