"""Events of one partition -> splits, training windows, evaluation moments and the history store.

Everything is vectorised over the partition: events are sorted by (user, time, row) once, and every list is a
ragged range of them. See DESIGN §1.2.

    history   the events that count as history (an expression); a window shows at most C = L - 1 of them
    target    every event; its k is the number of history events of its user visible to it
    window w  (counted from the end) shows history [max(0, e - C), e) with e = n - w · (L // 2)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Column: TypeAlias = NDArray[np.generic] | pa.Array

TRAIN, VALID, TEST = 0, 1, 2


@dataclass(frozen=True)
class Events:
    """Events of whole users, sorted by (user, time, row); all arrays have one entry per event."""

    user_ids: pa.Array
    """Distinct ids, indexed by `user`."""
    user: IntArray
    time: IntArray
    row: IntArray
    item_ids: pa.Array
    is_history: BoolArray
    is_positive: BoolArray
    labels: dict[str, NDArray[np.float32]]
    """As targets learn them."""
    context: dict[str, pa.Array]
    """Features as in the clean log."""
    shown: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """As the history shows them, where it does not show `labels`."""
    shown_positive: BoolArray | None = None
    """The same of `is_positive`."""

    def __len__(self) -> int:
        return len(self.user)

    @property
    def user_start(self) -> IntArray:
        """First event of each user, and the number of events at the end."""
        return np.searchsorted(self.user, np.arange(len(self.user_ids) + 1)).astype(np.int64)


def split_by_time(events: Events, valid_from: int, test_from: int) -> NDArray[np.int8]:
    """Global cut: train before `valid_from` (ms), valid before `test_from`, test after."""
    return ((events.time >= valid_from).astype(np.int8) + (events.time >= test_from)).astype(np.int8)


def split_leave_one_out(events: Events) -> NDArray[np.int8]:
    """The user's last positive is test, the one before it valid; users with fewer than three are train.

    Events without a positive after one of the two go to its split.
    """
    positives_before_end = _suffix_count(events.is_positive, events.user, events.user_start)
    total = positives_before_end[events.user_start[:-1]]
    enough = total[events.user] >= 3
    # from the last positive on: at most one positive remains including this event, and this is at or after it
    split = np.zeros(len(events), np.int8)
    after_last = (positives_before_end == 0) | ((positives_before_end == 1) & events.is_positive)
    after_second = (positives_before_end <= 1) | ((positives_before_end == 2) & events.is_positive)
    split[enough & after_second] = VALID
    split[enough & after_last] = TEST
    return split


def share_of(ids: pa.Array, key: str) -> NDArray[np.float64]:
    """A number in [0, 1) per id: SipHash with a key of its own, so that it does not depend on other ids."""
    hashed = pd.util.hash_array(ids.to_pandas().to_numpy(dtype=object), hash_key=f"{key:!<16}", categorize=False)
    return np.asarray((hashed >> np.uint64(11)).astype(np.float64) / 2**53)


def _split_by_share(share: NDArray[np.float64], valid: float, test: float, turn: float) -> NDArray[np.int8]:
    """The circle of hashes, turned by a share of it: its beginning is test, then comes valid."""
    share = (share - turn) % 1.0
    return np.where(share < test, TEST, np.where(share < test + valid, VALID, TRAIN)).astype(np.int8)


def split_by_user(events: Events, valid: float, test: float, turn: float = 0.0) -> NDArray[np.int8]:
    """All events of a user belong to one split, by the hash of the user's id. `turn`: another fold, see _split_by_share."""
    return _split_by_share(share_of(events.user_ids, "user_holdout"), valid, test, turn)[events.user]


def split_by_item(events: Events, valid: float, test: float, turn: float = 0.0) -> NDArray[np.int8]:
    """All events of an item belong to one split, by the hash of the item's id. `turn`: another fold, see _split_by_share."""
    encoded = events.item_ids.dictionary_encode()
    return _split_by_share(share_of(encoded.dictionary, "item_holdout"), valid, test, turn)[encoded.indices.to_numpy()]


def split_at_random(events: Events, folds: int, fold: int) -> NDArray[np.int8]:
    """Events hashed into folds by their row of the log: one is test, the next one valid."""
    hashed = pd.util.hash_array(events.row, categorize=False) % np.uint64(folds)
    return np.where(hashed == fold, TEST, np.where(hashed == (fold + 1) % folds, VALID, TRAIN)).astype(np.int8)


def _suffix_count(flags: BoolArray, user: IntArray, user_start: IntArray) -> IntArray:
    """For each event, how many flags are set from it to its user's end."""
    cumulative = np.concatenate([[0], np.cumsum(flags)]).astype(np.int64)
    return cumulative[user_start[user + 1]] - cumulative[np.arange(len(user))]


def visible_history(events: Events, is_history: BoolArray, same_time: str) -> IntArray:
    """k: history events of the same user that a target at each event may see."""
    before = np.concatenate([[0], np.cumsum(is_history)]).astype(np.int64)
    index = np.arange(len(events), dtype=np.int64)
    if same_time == "group":
        new = np.ones(len(events), dtype=bool)
        new[1:] = (events.user[1:] != events.user[:-1]) | (events.time[1:] != events.time[:-1])
        index = np.maximum.accumulate(np.where(new, index, 0))
    return before[index] - before[events.user_start[events.user]]


def ranges(start: IntArray, stop: IntArray) -> tuple[IntArray, IntArray]:
    """Ragged ranges -> (all indices one after the other, offsets of length n + 1)."""
    length = stop - start
    offsets = np.concatenate([[0], np.cumsum(length)]).astype(np.int64)
    flat = np.arange(offsets[-1], dtype=np.int64) + np.repeat(start - offsets[:-1], length)
    return flat, offsets


@dataclass(frozen=True)
class Layout:
    """Windows as ranges: history and seen are ranges of `shown`, which indexes the events; nothing is copied."""

    user: IntArray
    number: IntArray
    """Window's number within its user, in time order."""
    count: IntArray
    """Windows of that user."""
    shown: IntArray
    """The events that are history, user by user."""
    history_start: IntArray
    history_stop: IntArray
    target_event: IntArray
    target_offsets: IntArray
    target_pos: IntArray
    seen_start: IntArray
    seen_stop: IntArray
    """Events before the window's history that were not yet `seen` at the user's moment before."""

    def __len__(self) -> int:
        return len(self.user)

    def slice(self, start: int, stop: int) -> Layout:
        """Some consecutive windows."""
        first, last = int(self.target_offsets[start]), int(self.target_offsets[stop])
        w, t = slice(start, stop), slice(first, last)
        return Layout(
            self.user[w], self.number[w], self.count[w], self.shown, self.history_start[w], self.history_stop[w],
            self.target_event[t], self.target_offsets[start : stop + 1] - first, self.target_pos[t],
            self.seen_start[w], self.seen_stop[w],
        )  # fmt: skip

    def pieces(self, entries: int) -> Iterator[Layout]:
        """The layout cut where about so many list entries are full, so that tables of it fit in memory."""
        sizes = self.history_stop - self.history_start + np.diff(self.target_offsets) + self.seen_stop - self.seen_start
        number = np.cumsum(sizes) // entries
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(number)) + 1, [len(self)]])
        for start, stop in itertools.pairwise(bounds):
            yield self.slice(int(start), int(stop))

    def history(self) -> tuple[IntArray, IntArray]:
        """-> (events of all histories one after the other, offsets)."""
        flat, offsets = ranges(self.history_start, self.history_stop)
        return self.shown[flat], offsets

    def seen(self) -> tuple[IntArray, IntArray]:
        flat, offsets = ranges(self.seen_start, self.seen_stop)
        return self.shown[flat], offsets


def train_layout(events: Events, split: NDArray[np.int8], length: int, same_time: str) -> Layout:
    """Overlapping windows over each user's training events; every training target stands in exactly one,
    the one that shows it most history."""
    capacity, stride = length - 1, max(length // 2, 1)
    is_train = split == TRAIN
    history = events.is_history & is_train
    history_event = np.flatnonzero(history)
    users = np.unique(events.user[is_train])
    starts = events.user_start
    before = np.concatenate([[0], np.cumsum(history)]).astype(np.int64)
    base, n = before[starts[users]], before[starts[users + 1]] - before[starts[users]]
    count = 1 + np.maximum(0, -(-(n - capacity) // stride))
    window_of_user = np.concatenate([[0], np.cumsum(count)]).astype(np.int64)
    which = np.repeat(np.arange(len(users)), count)
    number = np.arange(window_of_user[-1]) - window_of_user[which]
    end = n[which] - (count[which] - 1 - number) * stride
    start = np.maximum(0, end - capacity)

    target = np.flatnonzero(is_train)
    k = visible_history(events, history, same_time)[target]
    u = np.searchsorted(users, events.user[target])
    from_end = np.minimum(count[u] - 1, (n[u] - k) // stride)
    window = window_of_user[u] + count[u] - 1 - from_end
    order = np.argsort(window, kind="stable")
    target, k, window = target[order], k[order], window[order]
    target_offsets = np.searchsorted(window, np.arange(len(which) + 1)).astype(np.int64)
    nothing = np.zeros(len(which), np.int64)
    return Layout(
        users[which], number, count[which], history_event, base[which] + start, base[which] + end,
        target, target_offsets, k - start[window], nothing, nothing,
    )  # fmt: skip


def moment_layout(
    events: Events, split: NDArray[np.int8], which: int, length: int, same_time: str, protocol: str = "time"
) -> Layout:
    """One window per (user, moment) of a split: the last L - 1 visible events, and the moment's targets.

    `seen` of a user's moments up to this one are the visible events before the window's history: a moment holds
    those that the moment before did not, so that a user of a million events costs a million entries, not their square.
    Visible are earlier events of any split. Under `item_holdout` only those of the training part are (on other
    items, that is); under `random` all events of the user's training part are, earlier or later: one moment.
    """
    capacity = length - 1
    is_history = events.is_history & (split == TRAIN) if protocol in ("item_holdout", "random") else events.is_history
    history_event = np.flatnonzero(is_history)
    before = np.concatenate([[0], np.cumsum(is_history)]).astype(np.int64)
    target = np.flatnonzero(split == which)
    new = np.ones(len(target), dtype=bool)
    if protocol == "random":
        k = (before[events.user_start[1:]] - before[events.user_start[:-1]])[events.user[target]]
        new[1:] = events.user[target][1:] != events.user[target][:-1]
    else:
        k = visible_history(events, is_history, same_time)[target]
    if same_time == "group" and protocol != "random":
        new[1:] = (events.user[target][1:] != events.user[target][:-1]) | (events.time[target][1:] != events.time[target][:-1])
    first = np.flatnonzero(new)
    target_offsets = np.concatenate([first, [len(target)]]).astype(np.int64)
    user, k_moment = events.user[target[first]], k[first]
    return _moments(events, history_event, before, user, k_moment, capacity, target, target_offsets)


def store_layout(events: Events, split: NDArray[np.int8], protocol: str, length: int, same_time: str) -> Layout:
    """One row per user: what is known when the user is served. Under `leave_one_out` it ends before the test
    moment (so that batch and online answers are those that were evaluated), else at the log's end."""
    before = np.concatenate([[0], np.cumsum(events.is_history)]).astype(np.int64)
    starts = events.user_start
    users = np.arange(len(events.user_ids), dtype=np.int64)
    k = before[starts[1:]] - before[starts[:-1]]
    if protocol == "leave_one_out":
        visible = visible_history(events, events.is_history, same_time)
        test = np.flatnonzero(split == TEST)
        owner, first = np.unique(events.user[test], return_index=True)
        k[owner] = visible[test[first]]
    nothing = np.zeros(0, np.int64)
    return _moments(
        events, np.flatnonzero(events.is_history), before, users, k, length - 1, nothing, np.zeros(len(users) + 1, np.int64)
    )


def _moments(
    events: Events,
    history_event: IntArray,
    before: IntArray,
    user: IntArray,
    k: IntArray,
    capacity: int,
    target: IntArray,
    target_offsets: IntArray,
) -> Layout:
    base = before[events.user_start[user]]
    start = np.maximum(0, k - capacity)
    seen_start = base.copy()
    again = np.flatnonzero(user[1:] == user[:-1]) + 1
    seen_start[again] = (base + start)[again - 1]
    target_pos = np.repeat(k - start, np.diff(target_offsets))
    ones = np.ones(len(user), np.int64)
    return Layout(
        user, ones - 1, ones, history_event, base + start, base + k, target, target_offsets, target_pos,
        seen_start, base + start,
    )  # fmt: skip


def list_array(offsets: IntArray, values: pa.Array) -> pa.Array:
    """Ragged values -> an Arrow list column. Raises ValueError beyond the 2^31 entries that its offsets can count."""
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"a partition has {offsets[-1]} entries in one list column, more than 2^31 - 1; raise data.partitions")
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)


def windows_table(
    layout: Layout,
    events: Events,
    item: NDArray[np.int32],
    split: NDArray[np.int8],
    history: Mapping[str, Column],
    targets: Mapping[str, Column],
    actions: list[str],
    profile: dict[str, NDArray[np.int32]],
    fold: NDArray[np.int8],
) -> pa.Table:
    """The Parquet form of windows. List columns; a missing label is NaN; -1 is a missing attribute.

    item: integers per event; history and targets: further columns, one entry per event; profile and fold: per user of the
    partition.
    """

    def ragged(offsets: IntArray, values: NDArray[np.generic]) -> pa.Array:
        return list_array(offsets, pa.array(values))

    def taken(offsets: IntArray, column: Column, index: IntArray) -> pa.Array:
        return list_array(offsets, column.take(pa.array(index)) if isinstance(column, pa.Array) else pa.array(column[index]))

    (h, h_offsets), (seen, s_offsets) = layout.history(), layout.seen()
    shown = events.labels | events.shown
    shown_positive = events.is_positive if events.shown_positive is None else events.shown_positive
    t, t_offsets = layout.target_event, layout.target_offsets
    columns: dict[str, pa.Array] = {
        "user_id": strings(events.user_ids.take(pa.array(layout.user))),
        "window": pa.array(layout.number.astype(np.int32)),
        "profile_weight": pa.array((1.0 / layout.count).astype(np.float32)),
        "fold": pa.array(fold[layout.user]),
        "history_item": ragged(h_offsets, item[h]),
        "history_time": ragged(h_offsets, events.time[h]),
        "history_row": ragged(h_offsets, events.row[h]),
        "history_positive": ragged(h_offsets, shown_positive[h].astype(np.int8)),
        "target_item": ragged(t_offsets, item[t]),
        "target_time": ragged(t_offsets, events.time[t]),
        "target_row": ragged(t_offsets, events.row[t]),
        "target_pos": ragged(t_offsets, layout.target_pos.astype(np.int32)),
        "target_split": ragged(t_offsets, split[t]),
        "target_positive": ragged(t_offsets, events.is_positive[t].astype(np.int8)),
        "seen_item": ragged(s_offsets, item[seen]),
    }
    columns |= {f"history_action_{n}": ragged(h_offsets, shown[n][h]) for n in actions}
    columns |= {f"label_{n}": ragged(t_offsets, v[t]) for n, v in events.labels.items()}
    columns |= {n: taken(h_offsets, v, h) for n, v in history.items()}
    columns |= {n: taken(t_offsets, v, t) for n, v in targets.items()}
    columns |= {f"profile_{n}": pa.array(v[layout.user]) for n, v in profile.items()}
    return pa.table(columns)


def store_table(layout: Layout, events: Events, actions: list[str], features: list[str]) -> pa.Table:
    """The Parquet form of the history store: the log's own ids and features; `seen_*` are the events before the history."""

    (h, h_offsets), (s, s_offsets) = layout.history(), layout.seen()
    shown = events.labels | events.shown
    columns: dict[str, pa.Array] = {
        "user_id": strings(events.user_ids.take(pa.array(layout.user))),
        "history_item_id": list_array(h_offsets, strings(events.item_ids.take(pa.array(h)))),
        "history_time": list_array(h_offsets, pa.array(events.time[h])),
        "seen_item_id": list_array(s_offsets, strings(events.item_ids.take(pa.array(s)))),
        "seen_time": list_array(s_offsets, pa.array(events.time[s])),
    }
    for name in actions:
        columns[f"history_action_{name}"] = list_array(h_offsets, pa.array(shown[name][h]))
    for name in features:
        columns[f"history_context_{name}"] = list_array(h_offsets, strings(events.context[name].take(pa.array(h))))
    return pa.table(columns)


def strings(values: pa.Array) -> pa.Array:
    """A dictionary's values as plain strings."""
    return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
