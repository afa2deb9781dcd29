"""Long logs: rows of one partition -> events, each with the labels that later rows gave it.

An event is an impression, or an action that belongs to none (`organic`). It has every label twice:

    label           what the target learns: all rows that belong to the event, whenever they came
    shown label     what the history of later targets shows: only the rows that came before the user's next moment

So what a target sees never depends on rows from its own moment on, not even by what is missing there: an impression
whose click came too late looks like one that was never clicked. A moment is a time under `same_time: group`, and a
(time, row) under `order`, where ties see earlier rows. Rows belong to impressions of their moment or before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.config.long import shown_column
from mtrec_ray.data.sources import ROW
from mtrec_ray.data.validate import ITEM, REQUEST, TIME, TYPE, USER, VALUE, derive, event_schema

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Joined:
    """Events of a partition, and what became of its rows."""

    events: pa.Table
    """As `validate.event_schema`, with ids as they were; in the order of the rows."""
    unmatched: BoolArray
    """Of each row: an action that belongs to no impression."""
    matched: int
    """Rows that became labels of another row."""
    late: dict[str, int]
    """Label -> events whose history shows another value than the target learns."""

    def counts(self) -> dict[str, int]:
        """What the manifest says of it."""
        late = {f"late_{name}": n for name, n in self.late.items()}
        return {"matched": self.matched, "unmatched": int(self.unmatched.sum()), **late}


def join(rows: pa.Table, data: DataConfig) -> Joined:
    """Rows of whole users, sorted by (user, time, row), with ids as dictionaries -> events.

    Under `unmatched: quarantine`, unmatched rows are no events; the caller puts them away. Plain labels are joined,
    derived ones computed from them.
    """
    long = data.long
    assert long is not None
    n, row = len(rows), np.arange(len(rows))
    user, item = (rows[c].combine_chunks().indices.to_numpy() for c in (USER, ITEM))
    time = rows[TIME].to_numpy()
    kind = pc.index_in(rows[TYPE], value_set=pa.array(long.types, pa.string())).to_numpy()
    impression = kind == 0 if long.impression is not None else np.zeros(n, bool)
    moment = row
    if data.same_time == "group":
        moment = np.cumsum(np.diff(user, prepend=-1).astype(bool) | np.diff(time, prepend=-1).astype(bool))

    owner = row  # the event that a row belongs to: itself, if no other
    if long.impression is not None:
        found = _impression_before(impression, moment, user, item, _codes(rows[REQUEST]) if long.request is not None else None)
        if long.attribution_hours is not None:
            found[time - time[found] > long.attribution_hours * HOUR_MS] = -1
        owner = np.where(impression | (found < 0), row, found)
    unmatched = ~impression & (owner == row)
    event = np.flatnonzero(impression | unmatched if long.unmatched == "keep" else impression)

    # users' moments do not overlap, so the last event of a user is followed by a moment after all of the user's rows
    following = np.searchsorted(moment[event], moment[event], side="right")
    ends = np.full(n, np.iinfo(np.int64).max)
    ends[event] = np.append(moment[event], np.iinfo(np.int64).max)[following]
    early = moment < ends[owner]

    value = rows[VALUE].to_numpy()
    target, shown, late = {}, {}, {}
    for name, type_ in long.labels.items():
        binary = data.labels[name].kind == "binary"
        gives = kind == long.types.index(type_)
        if not binary:
            gives &= ~np.isnan(value)
        given = np.ones(n) if binary else value
        otherwise = np.where(impression, 0.0, np.nan) if binary else np.full(n, np.nan)
        target[name] = _latest(gives, owner, given, otherwise)[event]
        shown[name] = _latest(gives & early, owner, given, otherwise)[event]
        late[name] = int((~_same(target[name], shown[name])).sum())
    kept = {c: _ids_of(rows[c], event) for c in (USER, ITEM)}
    kept |= {c: rows[c].take(pa.array(event)) for c in (TIME, ROW, *data.context)}
    labels = {c: pa.array(v) for c, v in derive(target, data, len(event)).items()}
    labels |= {shown_column(c): pa.array(v) for c, v in derive(shown, data, len(event)).items()}
    events = pa.table({c: (kept | labels)[c] for c in event_schema(data).names})
    return Joined(events, unmatched, int((owner != row).sum()), late)


def _impression_before(
    impression: BoolArray, moment: IntArray, user: IntArray, item: IntArray, request: IntArray | None
) -> IntArray:
    """Of each row, the latest impression of the same user, item and request at its moment or before; -1 for none.

    request: a number per row, -1 where it is missing and matches nothing; None: it does not count.
    """
    keys = (item, user) if request is None else (request, item, user)
    order = np.lexsort((~impression, moment, *keys))
    place = np.arange(len(order))
    first = np.zeros(len(order), bool)
    for key in keys:
        first |= np.diff(key[order], prepend=-2).astype(bool)
    start = np.maximum.accumulate(np.where(first, place, 0))
    last = np.maximum.accumulate(np.where(impression[order], place, -1))
    found = np.full(len(order), -1)
    found[order] = np.where(last >= start, order[last], -1)
    if request is not None:
        found[request < 0] = -1
    return found


def _ids_of(column: pa.ChunkedArray, where: IntArray) -> pa.DictionaryArray:
    """Some entries of a column of ids; its dictionary keeps its order, and only what is used."""
    encoded = column.combine_chunks()
    codes = encoded.indices.to_numpy()[where]
    used = np.bincount(codes, minlength=len(encoded.dictionary)) > 0
    number = (np.cumsum(used) - 1).astype(np.int32)
    return pa.DictionaryArray.from_arrays(pa.array(number[codes]), encoded.dictionary.filter(pa.array(used)))


def _codes(column: pa.ChunkedArray) -> IntArray:
    """Equal texts -> equal numbers; -1 for none."""
    return np.asarray(column.combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy(), dtype=np.int64)


def _latest(gives: BoolArray, owner: IntArray, value: NDArray[np.float64], otherwise: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each row, the value of the last giving row that belongs to it, else the other value."""
    last = np.full(len(owner), -1)
    giving = np.flatnonzero(gives)
    np.maximum.at(last, owner[giving], giving)
    return np.where(last >= 0, value[last], otherwise)


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> BoolArray:
    return (a == b) | (np.isnan(a) & np.isnan(b))
