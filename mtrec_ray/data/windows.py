"""Events of one partition -> splits, training windows, evaluation moments and the history store.

Everything is vectorised over the partition: events are sorted by (user, time, row) once, and every list is a
ragged range of them. See DESIGN §1.2.

    history   the events that count as history (an expression); a window shows at most C = L - 1 of them
    target    every event; its k is the number of history events of its user visible to it
    window w  (counted from the end) shows history [max(0, e - C), e) with e = n - w · (L // 2)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

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
    context: dict[str, pa.Array]

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


def _split_by_share(share: NDArray[np.float64], valid: float, test: float) -> NDArray[np.int8]:
    return np.where(share < test, TEST, np.where(share < test + valid, VALID, TRAIN)).astype(np.int8)


def split_by_user(events: Events, valid: float, test: float) -> NDArray[np.int8]:
    """All events of a user belong to one split, by the hash of the user's id."""
    return _split_by_share(share_of(events.user_ids, "user_holdout"), valid, test)[events.user]


def split_by_item(events: Events, valid: float, test: float) -> NDArray[np.int8]:
    """All events of an item belong to one split, by the hash of the item's id."""
    encoded = events.item_ids.dictionary_encode()
    return _split_by_share(share_of(encoded.dictionary, "item_holdout"), valid, test)[encoded.indices.to_numpy()]


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
    """Windows as ragged ranges: history indexes `history_index`, targets index the events."""

    user: IntArray
    number: IntArray
    """Window's number within its user, in time order."""
    count: IntArray
    """Windows of that user."""
    history_event: IntArray
    history_offsets: IntArray
    target_event: IntArray
    target_offsets: IntArray
    target_pos: IntArray
    seen_event: IntArray
    seen_offsets: IntArray


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
    flat, offsets = ranges(base[which] + start, base[which] + end)

    target = np.flatnonzero(is_train)
    k = visible_history(events, history, same_time)[target]
    u = np.searchsorted(users, events.user[target])
    from_end = np.minimum(count[u] - 1, (n[u] - k) // stride)
    window = window_of_user[u] + count[u] - 1 - from_end
    order = np.argsort(window, kind="stable")
    target, k, window = target[order], k[order], window[order]
    target_offsets = np.searchsorted(window, np.arange(len(which) + 1)).astype(np.int64)
    nothing = np.zeros(len(which) + 1, np.int64)
    return Layout(
        users[which], number, count[which], history_event[flat], offsets, target, target_offsets, k - start[window],
        np.zeros(0, np.int64), nothing,
    )  # fmt: skip


def moment_layout(
    events: Events, split: NDArray[np.int8], which: int, length: int, same_time: str, protocol: str = "time"
) -> Layout:
    """One window per (user, moment) of a split: the last L - 1 visible events, and the moment's targets.

    `seen` are the visible events before the window's history, so that history and seen together are all.
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
    flat, offsets = ranges(base + start, base + k)
    older, older_offsets = ranges(base, base + start)
    target_pos = np.repeat(k - start, np.diff(target_offsets))
    ones = np.ones(len(user), np.int64)
    return Layout(
        user, ones - 1, ones, history_event[flat], offsets, target, target_offsets, target_pos,
        history_event[older], older_offsets,
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
    context: dict[str, NDArray[np.int32]],
    actions: list[str],
    profile: dict[str, NDArray[np.int32]],
    fold: NDArray[np.int8],
) -> pa.Table:
    """The Parquet form of windows. List columns; a missing label is NaN; -1 is a missing attribute.

    item and context: integers per event; profile and fold: per user of the partition.
    """

    def ragged(offsets: IntArray, values: NDArray[np.generic]) -> pa.Array:
        return list_array(offsets, pa.array(values))

    h, t = layout.history_event, layout.target_event
    columns: dict[str, pa.Array] = {
        "user_id": events.user_ids.take(pa.array(layout.user)),
        "window": pa.array(layout.number.astype(np.int32)),
        "profile_weight": pa.array((1.0 / layout.count).astype(np.float32)),
        "fold": pa.array(fold[layout.user]),
        "history_item": ragged(layout.history_offsets, item[h]),
        "history_time": ragged(layout.history_offsets, events.time[h]),
        "history_row": ragged(layout.history_offsets, events.row[h]),
        "history_positive": ragged(layout.history_offsets, events.is_positive[h].astype(np.int8)),
        "target_item": ragged(layout.target_offsets, item[t]),
        "target_time": ragged(layout.target_offsets, events.time[t]),
        "target_row": ragged(layout.target_offsets, events.row[t]),
        "target_pos": ragged(layout.target_offsets, layout.target_pos.astype(np.int32)),
        "target_split": ragged(layout.target_offsets, split[t]),
        "target_positive": ragged(layout.target_offsets, events.is_positive[t].astype(np.int8)),
        "seen_item": ragged(layout.seen_offsets, item[layout.seen_event]),
    }
    columns |= {f"history_action_{n}": ragged(layout.history_offsets, events.labels[n][h]) for n in actions}
    columns |= {f"label_{n}": ragged(layout.target_offsets, v[t]) for n, v in events.labels.items()}
    columns |= {f"history_context_{n}": ragged(layout.history_offsets, v[h]) for n, v in context.items()}
    columns |= {f"target_context_{n}": ragged(layout.target_offsets, v[t]) for n, v in context.items()}
    columns |= {f"profile_{n}": pa.array(v[layout.user]) for n, v in profile.items()}
    return pa.table(columns)


def store_table(layout: Layout, events: Events, actions: list[str]) -> pa.Table:
    """The Parquet form of the history store: the log's own ids; `seen_*` are the events before the history."""

    ragged = list_array
    h, s = pa.array(layout.history_event), pa.array(layout.seen_event)
    columns: dict[str, pa.Array] = {
        "user_id": events.user_ids.take(pa.array(layout.user)),
        "history_item_id": ragged(layout.history_offsets, events.item_ids.take(h)),
        "history_time": ragged(layout.history_offsets, pa.array(events.time[layout.history_event])),
        "seen_item_id": ragged(layout.seen_offsets, events.item_ids.take(s)),
        "seen_time": ragged(layout.seen_offsets, pa.array(events.time[layout.seen_event])),
    }
    for name in actions:
        columns[f"history_action_{name}"] = ragged(layout.history_offsets, pa.array(events.labels[name][layout.history_event]))
    for name, values in events.context.items():
        columns[f"history_context_{name}"] = ragged(layout.history_offsets, values.take(h))
    return pa.table(columns)
