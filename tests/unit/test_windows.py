"""Splits, training windows, moments and the store: by hand, and against plain loops over each user's events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtrec_ray.data import fit, windows
from mtrec_ray.data.partition import user_partition
from mtrec_ray.data.validate import event_schema
from mtrec_ray.data.windows import TEST, TRAIN, VALID, Events, Layout
from tests import tiny

LENGTHS = (2, 3, 4, 7, 100)
VALID_FROM, TEST_FROM = 4, 6
"""Cuts of protocol time in the logs of this file, whose times are small integers."""


HASHED = ("user_holdout", "item_holdout", "random")


class Row(NamedTuple):
    """A row of a log; its place in the log is its row number."""

    user: str
    time: int
    history: bool = True
    positive: bool = True


def make_events(log: list[Row]) -> Events:
    """Sorted by (user, time, row), as prepare hands them over. The item of row 7 is "i7"."""
    order = sorted(range(len(log)), key=lambda i: (log[i].user, log[i].time, i))
    rows = [log[i] for i in order]
    users = sorted({r.user for r in log})
    return Events(
        user_ids=pa.array(users, pa.string()),
        user=np.array([users.index(r.user) for r in rows], dtype=np.int64),
        time=np.array([r.time for r in rows], dtype=np.int64),
        row=np.array(order, dtype=np.int64),
        item_ids=pa.array([f"i{i}" for i in order], pa.string()),
        is_history=np.array([r.history for r in rows], dtype=bool),
        is_positive=np.array([r.positive for r in rows], dtype=bool),
        labels={"click": np.array([np.nan if i % 3 == 2 else float(i % 3) for i in order], dtype=np.float32)},
        context={"device": pa.array([None if i % 4 == 3 else f"d{i % 4}" for i in order], pa.string())},
    )


def split_of(events: Events, protocol: str) -> np.ndarray:
    if protocol == "time":
        return windows.split_by_time(events, VALID_FROM, TEST_FROM)
    if protocol == "user_holdout":
        return windows.split_by_user(events, 0.3, 0.4)
    if protocol == "item_holdout":
        return windows.split_by_item(events, 0.2, 0.3)
    if protocol == "random":
        return windows.split_at_random(events, 4, 1)
    return windows.split_leave_one_out(events)


class Window(NamedTuple):
    """A window in row numbers of the log."""

    user: str
    number: int
    count: int
    history: list[int]
    targets: list[tuple[int, int]]
    """(row, target_pos)"""
    seen: list[int]


def unroll(layout: Layout, events: Events) -> list[Window]:
    """What each window means: `seen` holds what the user's window before did not, so it is added up."""
    (h, h_offsets), (s, s_offsets), t = layout.history(), layout.seen(), layout.target_offsets
    assert len(h_offsets) == len(t) == len(s_offsets) == len(layout.user) + 1
    assert (h_offsets[-1], t[-1], s_offsets[-1]) == (len(h), len(layout.target_event), len(s))
    out: list[Window] = []
    for w in range(len(layout.user)):
        again = w > 0 and layout.user[w] == layout.user[w - 1]
        out.append(
            Window(
                events.user_ids[int(layout.user[w])].as_py(),
                int(layout.number[w]),
                int(layout.count[w]),
                events.row[h[h_offsets[w] : h_offsets[w + 1]]].tolist(),
                list(
                    zip(
                        events.row[layout.target_event[t[w] : t[w + 1]]].tolist(),
                        layout.target_pos[t[w] : t[w + 1]].tolist(),
                        strict=True,
                    )
                ),
                (out[-1].seen if again else []) + events.row[s[s_offsets[w] : s_offsets[w + 1]]].tolist(),
            )
        )
    return out


# --------------------------------------------------------------------------- the reference: plain loops


class Reference:
    """What DESIGN §1.2 says, user by user and event by event."""

    def __init__(self, log: list[Row], protocol: str, length: int, same_time: str) -> None:
        self.log, self.protocol, self.length, self.same_time = log, protocol, length, same_time
        self.users: dict[str, list[int]] = {}
        for row, event in enumerate(log):
            self.users.setdefault(event.user, []).append(row)
        self.users = {u: sorted(rows, key=lambda r: (log[r].time, r)) for u, rows in sorted(self.users.items())}
        if protocol in HASHED:  # which events a hash chooses is tested apart
            events = make_events(log)
            self.split = dict(zip(events.row.tolist(), split_of(events, protocol).tolist(), strict=True))
        else:
            self.split = {row: s for rows in self.users.values() for row, s in self._splits(rows).items()}

    def _splits(self, rows: list[int]) -> dict[int, int]:
        if self.protocol == "time":
            return {r: TRAIN if self.log[r].time < VALID_FROM else VALID if self.log[r].time < TEST_FROM else TEST for r in rows}
        positives = [i for i, r in enumerate(rows) if self.log[r].positive]
        if len(positives) < 3:
            return dict.fromkeys(rows, TRAIN)
        return {r: TEST if i >= positives[-1] else VALID if i >= positives[-2] else TRAIN for i, r in enumerate(rows)}

    def visible(self, target: int, among: list[int]) -> list[int]:
        """The rows of `among` that a target sees."""
        time = self.log[target].time
        if self.same_time == "group":
            return [r for r in among if self.log[r].time < time]
        return [r for r in among if (self.log[r].time, r) < (time, target)]

    def train(self) -> list[Window]:
        out: list[Window] = []
        capacity, stride = self.length - 1, self.length // 2
        for user, rows in self.users.items():
            trained = [r for r in rows if self.split[r] == TRAIN]
            if not trained:
                continue
            history = [r for r in trained if self.log[r].history]
            spans = [(max(0, len(history) - capacity), len(history))]
            while spans[0][0] > 0:
                end = spans[0][1] - stride
                spans.insert(0, (max(0, end - capacity), end))
            targets: list[list[tuple[int, int]]] = [[] for _ in spans]
            for target in trained:
                k = len(self.visible(target, history))
                fitting = [w for w, (start, end) in enumerate(spans) if start <= k <= end and (k > start or k == 0)]
                best = max(fitting, key=lambda w: k - spans[w][0])
                targets[best].append((target, k - spans[best][0]))
            for w, (start, end) in enumerate(spans):
                out.append(Window(user, w, len(spans), history[start:end], targets[w], []))
        return out

    def moments(self, which: int) -> list[Window]:
        out: list[Window] = []
        capacity = self.length - 1
        for user, rows in self.users.items():
            hidden = self.protocol in ("item_holdout", "random")
            history = [r for r in rows if self.log[r].history and not (hidden and self.split[r] != TRAIN)]
            moments: list[list[int]] = []
            for target in (r for r in rows if self.split[r] == which):
                if self.protocol == "random" and moments:
                    moments[0].append(target)
                    continue
                together = moments and self.same_time == "group" and self.log[moments[-1][0]].time == self.log[target].time
                if together:
                    moments[-1].append(target)
                else:
                    moments.append([target])
            for moment in moments:
                visible = history if self.protocol == "random" else self.visible(moment[0], history)
                shown = visible[-capacity:]
                targets = [(t, len(shown)) for t in moment]
                out.append(Window(user, 0, 1, shown, targets, visible[: len(visible) - len(shown)]))
        return out

    def store(self) -> list[Window]:
        out: list[Window] = []
        for user, rows in self.users.items():
            history = [r for r in rows if self.log[r].history]
            tested = [r for r in rows if self.split[r] == TEST]
            if self.protocol == "leave_one_out" and tested:
                history = self.visible(tested[0], history)
            shown = history[-(self.length - 1) :]
            out.append(Window(user, 0, 1, shown, [], history[: len(history) - len(shown)]))
        return out


rows = st.builds(
    Row,
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 8),
    st.sampled_from([True, True, True, False]),
    st.sampled_from([True, True, False]),
)
logs = st.lists(rows, min_size=1, max_size=45)
lengths = st.sampled_from(LENGTHS)
ties = st.sampled_from(["group", "order"])
protocols = st.sampled_from(["time", "leave_one_out", *HASHED])


@pytest.mark.slow
@pytest.mark.parametrize("same_time", ["group", "order"])
@pytest.mark.parametrize("protocol", ["time", "leave_one_out", *HASHED])
@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths)
def test_windows_moments_and_store_are_those_of_plain_loops(protocol: str, same_time: str, log: list[Row], length: int) -> None:
    events, reference = make_events(log), Reference(log, protocol, length, same_time)
    split = split_of(events, protocol)
    assert dict(zip(events.row.tolist(), split.tolist(), strict=True)) == reference.split
    assert unroll(windows.train_layout(events, split, length, same_time), events) == reference.train()
    for which in (VALID, TEST):
        layout = windows.moment_layout(events, split, which, length, same_time, protocol)
        assert unroll(layout, events) == reference.moments(which)
    assert unroll(windows.store_layout(events, split, protocol, length, same_time), events) == reference.store()


@pytest.mark.parametrize("same_time", ["group", "order"])
@pytest.mark.parametrize("length", LENGTHS)
def test_a_long_history_is_cut_like_plain_loops_cut_it(length: int, same_time: str) -> None:
    rng = np.random.default_rng(length)
    log = [Row(rng.choice(["a", "b"]), int(t), rng.random() < 0.8, rng.random() < 0.6) for t in rng.integers(0, 150, 600)]
    events, reference = make_events(log), Reference(log, "leave_one_out", length, same_time)
    layout = windows.train_layout(events, split_of(events, "leave_one_out"), length, same_time)
    assert (layout.count > 1).any()
    assert unroll(layout, events) == reference.train()


# --------------------------------------------------------------------------- properties that must hold


@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths, same_time=ties, protocol=protocols)
def test_every_training_target_stands_in_exactly_one_window(log: list[Row], length: int, same_time: str, protocol: str) -> None:
    events = make_events(log)
    split = split_of(events, protocol)
    found = unroll(windows.train_layout(events, split, length, same_time), events)
    assert sorted(t for w in found for t, _ in w.targets) == sorted(events.row[split == TRAIN].tolist())


@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths, same_time=ties)
def test_a_target_stands_in_the_window_that_shows_it_most_history(log: list[Row], length: int, same_time: str) -> None:
    log = [row._replace(time=row.time % VALID_FROM) for row in log]
    events = make_events(log)
    found = unroll(windows.train_layout(events, split_of(events, "time"), length, same_time), events)
    reference = Reference(log, "time", length, same_time)
    for own in found:
        for target, pos in own.targets:
            history = [r for r in reference.users[own.user] if log[r].history]
            visible = reference.visible(target, history)
            up_to_date = [w for w in found if w.user == own.user and visible and visible[-1] in w.history]
            assert pos == max((sum(r in visible for r in w.history) for w in up_to_date), default=0)
            assert own.history[:pos] == visible[len(visible) - pos :]


@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths, same_time=ties, protocol=protocols)
def test_no_target_sees_itself_or_anything_later_or_of_its_own_group(
    log: list[Row], length: int, same_time: str, protocol: str
) -> None:
    events = make_events(log)
    split = split_of(events, protocol)
    layouts = [windows.train_layout(events, split, length, same_time)]
    layouts += [windows.moment_layout(events, split, which, length, same_time) for which in (VALID, TEST)]
    for window in (w for layout in layouts for w in unroll(layout, events)):
        for target, pos in window.targets:
            for seen in [*window.seen, *window.history[:pos]]:
                assert log[seen].user == window.user
                if same_time == "group":
                    assert log[seen].time < log[target].time
                else:
                    assert (log[seen].time, seen) < (log[target].time, target)


@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths, same_time=ties, protocol=protocols)
def test_training_windows_hold_training_events_alone(log: list[Row], length: int, same_time: str, protocol: str) -> None:
    events = make_events(log)
    split = split_of(events, protocol)
    layout = windows.train_layout(events, split, length, same_time)
    assert (split[layout.history()[0]] == TRAIN).all()
    assert (split[layout.target_event] == TRAIN).all()
    assert len(layout.seen()[0]) == 0


@settings(max_examples=60, deadline=None)
@given(log=logs, length=lengths, same_time=ties)
def test_a_moment_shows_the_latest_events_and_counts_all_others_as_seen(log: list[Row], length: int, same_time: str) -> None:
    events = make_events(log)
    found = unroll(windows.moment_layout(events, split_of(events, "time"), TEST, length, same_time), events)
    reference = Reference(log, "time", length, same_time)
    assert sorted(t for w in found for t, _ in w.targets) == [r for r, row in enumerate(log) if row.time >= TEST_FROM]
    for window in found:
        history = [r for r in reference.users[window.user] if log[r].history]
        for target, pos in window.targets:
            assert window.seen + window.history == reference.visible(target, history)
            assert pos == len(window.history) == min(length - 1, len(window.seen) + len(window.history))


# --------------------------------------------------------------------------- by hand


def test_a_short_history_is_one_window_and_its_first_event_sees_nothing() -> None:
    events = make_events([Row("a", 0), Row("a", 1), Row("a", 2)])
    found = unroll(windows.train_layout(events, np.zeros(3, np.int8), 100, "group"), events)
    assert found == [Window("a", 0, 1, [0, 1, 2], [(0, 0), (1, 1), (2, 2)], [])]


def test_a_long_history_is_cut_from_its_end_at_half_the_window() -> None:
    events = make_events([Row("a", t) for t in range(7)])
    # L = 4: three events a window, ends at 7, 5 and 3; a target goes where most of its history is shown
    found = unroll(windows.train_layout(events, np.zeros(7, np.int8), 4, "group"), events)
    assert found == [
        Window("a", 0, 3, [0, 1, 2], [(0, 0), (1, 1), (2, 2), (3, 3)], []),
        Window("a", 1, 3, [2, 3, 4], [(4, 2), (5, 3)], []),
        Window("a", 2, 3, [4, 5, 6], [(6, 2)], []),
    ]


def test_a_user_without_history_is_still_a_window_of_targets() -> None:
    events = make_events([Row("a", 0, history=False), Row("a", 1, history=False)])
    found = unroll(windows.train_layout(events, np.zeros(2, np.int8), 4, "order"), events)
    assert found == [Window("a", 0, 1, [], [(0, 0), (1, 0)], [])]


def test_an_impression_is_a_target_but_never_history() -> None:
    events = make_events([Row("a", 0), Row("a", 1, history=False), Row("a", 2)])
    found = unroll(windows.train_layout(events, np.zeros(3, np.int8), 4, "group"), events)
    assert found == [Window("a", 0, 1, [0, 2], [(0, 0), (1, 1), (2, 1)], [])]


def test_a_tie_hides_its_events_from_each_other_in_group_mode_alone() -> None:
    events = make_events([Row("a", 0), Row("a", 1), Row("a", 1), Row("a", 2)])
    for same_time, positions in (("group", [0, 1, 1, 3]), ("order", [0, 1, 2, 3])):
        (window,) = unroll(windows.train_layout(events, np.zeros(4, np.int8), 10, same_time), events)
        assert [pos for _, pos in window.targets] == positions


def test_a_tie_across_users_hides_nothing() -> None:
    events = make_events([Row("a", 0), Row("a", 5), Row("b", 5), Row("b", 6)])
    found = unroll(windows.train_layout(events, np.zeros(4, np.int8), 10, "group"), events)
    assert [w.targets for w in found] == [[(0, 0), (1, 1)], [(2, 0), (3, 1)]]


def test_ties_in_time_keep_the_order_of_rows() -> None:
    log = [Row("b", 1), Row("a", 5), Row("b", 1), Row("a", 5), Row("a", 2), Row("a", 5)]
    events = make_events(log)
    found = unroll(windows.train_layout(events, np.zeros(6, np.int8), 10, "order"), events)
    assert [w.history for w in found] == [[4, 1, 3, 5], [0, 2]]


def test_targets_of_one_time_are_one_moment_in_group_mode_and_one_each_in_order_mode() -> None:
    log = [Row("a", 0), Row("a", 6), Row("a", 6), Row("a", 7), Row("b", 7)]
    events = make_events(log)
    split = split_of(events, "time")
    group = unroll(windows.moment_layout(events, split, TEST, 10, "group"), events)
    assert group == [
        Window("a", 0, 1, [0], [(1, 1), (2, 1)], []),
        Window("a", 0, 1, [0, 1, 2], [(3, 3)], []),
        Window("b", 0, 1, [], [(4, 0)], []),
    ]
    order = unroll(windows.moment_layout(events, split, TEST, 10, "order"), events)
    assert [w.history for w in order] == [[0], [0, 1], [0, 1, 2], []]


def test_valid_events_are_history_at_test_time() -> None:
    events = make_events([Row("a", 0), Row("a", 4), Row("a", 5), Row("a", 6), Row("a", 7)])
    split = split_of(events, "time")
    assert split.tolist() == [TRAIN, VALID, VALID, TEST, TEST]
    found = unroll(windows.moment_layout(events, split, TEST, 3, "group"), events)
    # L = 3 shows two events; what came before them is seen; the earlier test event is history of the later one
    assert found == [Window("a", 0, 1, [1, 2], [(3, 2)], [0]), Window("a", 0, 1, [2, 3], [(4, 2)], [0, 1])]


def test_protocol_time_cuts_at_the_given_times() -> None:
    events = make_events([Row("a", t) for t in (3, 4, 5, 6, 9)])
    assert split_of(events, "time").tolist() == [TRAIN, VALID, VALID, TEST, TEST]


def test_leave_one_out_takes_the_last_two_positives_with_what_follows_them() -> None:
    positive = [True, False, True, False, True, False, True, False]
    events = make_events([Row("a", t, positive=p) for t, p in enumerate(positive)])
    assert split_of(events, "leave_one_out").tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(("positives", "expected"), [(0, {TRAIN}), (2, {TRAIN}), (3, {TRAIN, VALID, TEST})])
def test_leave_one_out_leaves_users_with_fewer_than_three_positives_in_training(positives: int, expected: set[int]) -> None:
    events = make_events([Row("a", t, positive=t < positives) for t in range(5)])
    assert set(split_of(events, "leave_one_out").tolist()) == expected


def test_leave_one_out_counts_positives_of_each_user_alone() -> None:
    events = make_events([Row("a", 0), Row("a", 1), Row("b", 0), Row("b", 1), Row("b", 2)])
    assert split_of(events, "leave_one_out").tolist() == [TRAIN, TRAIN, TRAIN, VALID, TEST]


def big_log() -> list[Row]:
    rng = np.random.default_rng(0)
    return [Row(f"u{u}", int(t)) for u, t in zip(rng.integers(0, 400, 4000), rng.integers(0, 99, 4000), strict=True)]


def test_user_holdout_takes_whole_users_in_the_given_shares() -> None:
    events = make_events(big_log())
    split = windows.split_by_user(events, 0.1, 0.2)
    of_user = [set(split[events.user == u]) for u in range(len(events.user_ids))]
    assert all(len(s) == 1 for s in of_user)
    share = np.bincount([s.pop() for s in of_user], minlength=3) / len(of_user)
    assert share == pytest.approx([0.7, 0.1, 0.2], abs=0.06)
    found = unroll(windows.moment_layout(events, split, TEST, 5, "order", "user_holdout"), events)
    assert {w.user for w in found}.isdisjoint({w.user for w in unroll(windows.train_layout(events, split, 5, "order"), events)})
    assert len(found[0].history) == 0 and found[0].targets[0][1] == 0  # a new user's first event is a target too


def test_item_holdout_hides_whole_items_from_training_and_from_every_history() -> None:
    log = big_log()
    events = make_events(log)
    events = dataclasses.replace(events, item_ids=pa.array([f"i{r % 300}" for r in events.row]))
    split = windows.split_by_item(events, 0.1, 0.1)
    items = np.array(events.item_ids.to_pylist())
    held = set(items[split != TRAIN])
    assert held.isdisjoint(items[split == TRAIN]) and len(held) / 300 == pytest.approx(0.2, abs=0.08)
    for which in (VALID, TEST):
        layout = windows.moment_layout(events, split, which, 50, "order", "item_holdout")
        assert sorted(layout.target_event) == np.flatnonzero(split == which).tolist()  # every event on them is a target
        assert held.isdisjoint(items[layout.history()[0]]) and held.isdisjoint(items[layout.seen()[0]])


@pytest.mark.parametrize("take", [windows.split_by_user, windows.split_by_item])
def test_folds_hold_out_each_user_or_item_once(take: Callable[..., NDArray[np.int8]]) -> None:
    log = big_log()
    events = make_events(log)
    events = dataclasses.replace(events, item_ids=pa.array([f"i{r % 300}" for r in events.row]))
    splits = [take(events, 0.1, 0.1, fold / 10) for fold in range(10)]
    assert (np.array([s == TEST for s in splits]).sum(0) == 1).all() and (np.array([s == VALID for s in splits]).sum(0) == 1).all()
    assert (splits[0] == take(events, 0.1, 0.1)).all()
    assert ((splits[9] == VALID) == (splits[0] == TEST)).all()  # what a fold stops at is the next one's test


@pytest.mark.slow
def test_random_folds_part_the_log_and_show_the_whole_training_part() -> None:
    events = make_events(big_log())
    splits = [windows.split_at_random(events, 5, fold) for fold in range(5)]
    tested = np.array([s == TEST for s in splits])
    assert (tested.sum(0) == 1).all()  # every event is tested in exactly one fold
    assert tested.mean(1) == pytest.approx([0.2] * 5, abs=0.03)
    found = unroll(windows.moment_layout(events, splits[0], TEST, 100, "group", "random"), events)
    assert len(found) == len({w.user for w in found})
    of_user = {w.user: w for w in found}
    train = {events.row[i] for i in np.flatnonzero(splits[0] == TRAIN)}
    for user, window in of_user.items():
        mine = {r for r, row in enumerate(big_log()) if row.user == user}
        assert set(window.history) == mine & train


def test_a_hash_split_of_an_event_does_not_depend_on_the_others() -> None:
    whole, part = make_events(big_log()), make_events(big_log()[:1000])
    for split in (lambda e: windows.split_by_user(e, 0.2, 0.2), lambda e: windows.split_by_item(e, 0.2, 0.2),
                  lambda e: windows.split_at_random(e, 4, 0)):  # fmt: skip
        big = dict(zip(whole.row.tolist(), split(whole).tolist(), strict=True))
        assert all(big[r] == s for r, s in zip(part.row.tolist(), split(part).tolist(), strict=True))


def test_the_store_ends_before_the_test_moment_under_leave_one_out_alone() -> None:
    log = [Row("a", 0), Row("a", 1), Row("a", 2), Row("a", 3), Row("b", 0), Row("b", 1)]
    events = make_events(log)
    for protocol, expected in (("leave_one_out", [[1, 2], [4, 5]]), ("time", [[2, 3], [4, 5]])):
        found = unroll(windows.store_layout(events, split_of(events, protocol), protocol, 3, "group"), events)
        assert [w.history for w in found] == expected
        assert found[0].seen == ([0] if protocol == "leave_one_out" else [0, 1])


def test_the_store_knows_a_user_whose_events_are_all_impressions() -> None:
    events = make_events([Row("a", 0, history=False), Row("b", 0)])
    found = unroll(windows.store_layout(events, split_of(events, "time"), "time", 3, "group"), events)
    assert [(w.user, w.history, w.seen) for w in found] == [("a", [], []), ("b", [1], [])]


# --------------------------------------------------------------------------- tables


def table_of(events: Events, layout: Layout, split: np.ndarray, profile: dict[str, np.ndarray] | None = None) -> pa.Table:
    """Windows in their Parquet form; an item's number is its row."""
    fold = np.arange(len(events.user_ids), dtype=np.int8)
    devices = [0 if v is None else 1 + int(v[1]) for v in events.context["device"].to_pylist()]
    device = np.array(devices, dtype=np.int32)
    shown, asked = {"history_context_device": device}, {"target_context_device": device}
    return windows.windows_table(layout, events, events.row.astype(np.int32), split, shown, asked, ["click"], profile or {}, fold)


def same(left: list[float], right: list[float]) -> bool:
    return bool(np.array_equal(np.array(left), np.array(right), equal_nan=True))


def test_the_table_holds_what_the_layout_says_column_by_column() -> None:
    log = [Row("a", 0), Row("a", 1, positive=False), Row("b", 0, history=False), Row("a", 2)]
    events = make_events(log)
    split = np.zeros(4, np.int8)
    profile = {"taste": np.array([1, -1], dtype=np.int32)}
    table = table_of(events, windows.train_layout(events, split, 10, "group"), split, profile)
    a, b = table.to_pylist()
    assert (a["user_id"], a["window"], a["profile_weight"], a["fold"], a["profile_taste"]) == ("a", 0, 1.0, 0, 1)
    assert (b["user_id"], b["history_item"], b["target_item"], b["target_pos"], b["profile_taste"]) == ("b", [], [2], [0], -1)
    assert a["history_item"] == a["history_row"] == [0, 1, 3] and a["history_time"] == [0, 1, 2]
    assert a["target_row"] == [0, 1, 3] and a["target_time"] == [0, 1, 2] and a["target_pos"] == [0, 1, 2]
    assert a["target_positive"] == [1, 0, 1] and a["target_split"] == [TRAIN] * 3 and a["seen_item"] == []
    assert same(a["label_click"], [0.0, 1.0, 0.0]) and same(b["label_click"], [np.nan])
    assert same(a["history_action_click"], [0.0, 1.0, 0.0])
    assert a["history_positive"] == [1, 0, 1]
    assert a["history_context_device"] == a["target_context_device"] == [1, 2, 0] and b["target_context_device"] == [3]


@settings(max_examples=40, deadline=None)
@given(log=logs, length=lengths)
def test_profile_weights_sum_to_one_per_user(log: list[Row], length: int) -> None:
    events = make_events([r._replace(time=r.time % VALID_FROM) for r in log])
    split = split_of(events, "time")
    table = table_of(events, windows.train_layout(events, split, length, "group"), split)
    sums = table.select(["user_id", "profile_weight"]).to_pandas().groupby("user_id")["profile_weight"].sum()
    assert sums.to_numpy() == pytest.approx(1.0, rel=1e-5) and len(sums) == len({r.user for r in log})


def test_windows_of_a_user_are_numbered_in_the_order_of_time() -> None:
    events = make_events([Row("a", t) for t in range(9)])
    split = np.zeros(9, np.int8)
    table = table_of(events, windows.train_layout(events, split, 4, "group"), split)
    assert table["window"].to_pylist() == [0, 1, 2, 3]
    assert [h[-1] for h in table["history_time"].to_pylist()] == [2, 4, 6, 8]


def test_the_store_table_keeps_the_logs_own_ids_and_the_events_before_the_history() -> None:
    events = make_events([Row("a", 10), Row("a", 20), Row("a", 30), Row("b", 10, history=False)])
    layout = windows.store_layout(events, split_of(events, "time"), "time", 3, "group")
    a, b = windows.store_table(layout, events, ["click"], ["device"]).to_pylist()
    assert (a["user_id"], a["history_item_id"], a["history_time"]) == ("a", ["i1", "i2"], [20, 30])
    assert (a["seen_item_id"], a["seen_time"]) == (["i0"], [10])
    assert same(a["history_action_click"], [1.0, np.nan]) and a["history_context_device"] == ["d1", "d2"]
    assert b == {k: [] for k in b} | {"user_id": "b"}


def test_a_partition_without_events_of_a_split_is_an_empty_table_with_all_columns() -> None:
    events = make_events([Row("a", 0)])
    split = split_of(events, "time")
    table = table_of(events, windows.moment_layout(events, split, TEST, 4, "group"), split)
    whole = table_of(events, windows.train_layout(events, split, 4, "group"), split)
    assert len(table) == 0 and table.schema == whole.schema


# --------------------------------------------------------------------------- how prepare calls it


def test_an_event_without_its_label_is_neither_history_nor_positive(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path, lambda raw: raw["tasks"].update(retrieval={"kind": "retrieval", "positive": "rating >= 4"}))
    nan = float("nan")
    table = pa.table(
        {
            "user_id": ["u", "u", "u", "w"],
            "item_id": ["x", "y", "x", "z"],
            "timestamp": [1, 1, 2, 0],
            "__row__": [5, 9, 7, 6],
            "click": [1.0, 0.0, nan, 1.0],
            "rating": [5.0, nan, 2.0, 4.0],
            "like": [1.0, nan, 0.0, 1.0],
            "device": ["web", None, "web", "tv"],
        },
        schema=event_schema(config.data),
    )
    events = fit.to_events(config, table)
    assert events.user_ids.to_pylist() == ["u", "w"] and events.user.tolist() == [0, 0, 0, 1]
    assert events.user_start.tolist() == [0, 3, 4] and events.row.tolist() == [5, 9, 7, 6]
    assert events.is_history.tolist() == [True, False, False, True]
    assert events.is_positive.tolist() == [True, False, False, True]
    assert np.isnan(events.labels["rating"][1]) and events.labels["rating"].dtype == np.float32


# --------------------------------------------------------------------------- partitions


@settings(max_examples=50, deadline=None)
@given(ids=st.lists(st.text(max_size=12), min_size=1, max_size=30), partitions=st.integers(1, 9))
def test_a_users_partition_depends_on_the_id_alone(ids: list[str], partitions: int) -> None:
    together = user_partition(ids, partitions)
    assert ((together >= 0) & (together < partitions)).all()
    assert together.tolist() == [int(user_partition(np.array([i], dtype=object), partitions)[0]) for i in ids]


def test_users_spread_over_all_partitions() -> None:
    counts = np.bincount(user_partition([str(i) for i in range(4000)], 8), minlength=8)
    assert counts.min() > 400 and counts.max() < 600


def test_partitions_are_the_same_in_every_process_and_version() -> None:
    ids = ["1", "196", "user-é", ""]
    assert user_partition(ids, 7).tolist() == user_partition(np.array(ids, dtype=object), 7).tolist() == [3, 6, 0, 6]
