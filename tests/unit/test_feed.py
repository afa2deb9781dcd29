"""The cached feed: flat windows, global batches shared by ranks, similarity pairs, and the tensors of a batch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray import storage
from mtrec_ray.data import windows
from mtrec_ray.features import CategoricalSpec
from mtrec_ray.models.batch import GAP_BUCKETS, Batch, collate_history, gap_bucket
from mtrec_ray.schema import ActionSpec, AttributeSpec, LabelStats, LogSchema
from mtrec_ray.training.feed import CachedFeed, PairSampler, WindowCache, collate
from mtrec_ray.training.stream import StreamFeed

HOUR = 3_600_000
LENGTH = 6
SCHEMA = LogSchema(
    window=LENGTH,
    same_time="group",
    exclude_seen=False,
    protocol="time",
    actions=(ActionSpec(name="click", values=(0.0, 1.0)), ActionSpec(name="rating", mean=3.0, std=1.0)),
    labels={"click": LabelStats(count=1, mean=0.5, std=0.5), "rating": LabelStats(count=1, mean=3.0, std=1.0)},
    context=(CategoricalSpec(name="device", values=("web", "tv")),),
    attributes=(AttributeSpec(name="taste", classes=("even", "odd")),),
    n_items=9,
    n_train_items=9,
)


def events_of(users: list[str], seed: int) -> windows.Events:
    """Random events of some users: ties in time, impressions, missing labels."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 25, len(users))
    n = int(counts.sum())
    user = np.repeat(np.arange(len(users)), counts)
    time = np.concatenate([np.sort(rng.integers(0, 30, c)) for c in counts]).astype(np.int64) * HOUR
    click = np.where(rng.random(n) < 0.2, np.nan, (rng.random(n) < 0.7)).astype(np.float32)
    return windows.Events(
        user_ids=pa.array(users, pa.string()),
        user=user.astype(np.int64),
        time=time,
        row=seed * 1000 + np.arange(n, dtype=np.int64),
        item_ids=pa.array([str(i) for i in range(n)]),
        is_history=np.nan_to_num(click) > 0,
        is_positive=np.nan_to_num(click) > 0,
        labels={"click": click, "rating": np.where(rng.random(n) < 0.5, np.nan, rng.integers(1, 6, n)).astype(np.float32)},
        context={"device": pa.array(["web"] * n)},
    )


def table_of(users: list[str], seed: int, which: int = windows.TRAIN, split: int = windows.TRAIN) -> pa.Table:
    """Windows of the users' events, all of which belong to `split`."""
    events = events_of(users, seed)
    rng = np.random.default_rng(seed + 500)
    splits = np.full(len(events), split, np.int8)
    if which == windows.TRAIN:
        layout = windows.train_layout(events, splits, LENGTH, "group")
    else:
        layout = windows.moment_layout(events, splits, which, LENGTH, "group")
    item = rng.integers(0, SCHEMA.n_items, len(events)).astype(np.int32)
    device = rng.integers(0, 3, len(events)).astype(np.int32)
    taste = rng.integers(-1, 2, len(users)).astype(np.int32)
    fold = rng.integers(0, 10, len(users)).astype(np.int8)
    shown, asked = {"history_context_device": device}, {"target_context_device": device}
    return windows.windows_table(layout, events, item, splits, shown, asked, ["click", "rating"], {"taste": taste}, fold)


def parts() -> list[pa.Table]:
    """Four files of windows, one of them without any (its users have no training events)."""
    return [
        table_of(["a", "b", "c"], 1),
        table_of(["d", "e"], 2, split=windows.TEST),
        table_of([f"f{i}" for i in range(9)], 3),
        table_of(["g"], 4),
    ]


@pytest.fixture(scope="module")
def cache() -> WindowCache:
    return WindowCache.from_table(pa.concat_tables(parts()))


def numbered(cache: WindowCache) -> WindowCache:
    """The same windows, whose attribute `taste` is the window's number: so a batch tells which windows it holds."""
    return WindowCache({**cache.columns, "profile_taste": np.arange(len(cache))}, cache.offsets, cache.user_ids)


def feed_of(cache: WindowCache, **changes: Any) -> CachedFeed:
    settings: dict[str, Any] = {
        "batch_windows": 8,
        "accumulate": 1,
        "seed": 3,
        "rank": 0,
        "world": 1,
        "masked_folds": (),
        "pairs": None,
    }
    return CachedFeed(cache, SCHEMA, **(settings | changes))


def windows_in(step: list[Batch]) -> list[int]:
    return [int(w) for batch in step for w in batch.profile_B["taste"]]


def equal(a: Batch, b: Batch) -> bool:
    def leaves(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for k in sorted(value):
                yield from leaves(value[k])
        elif hasattr(value, "__dataclass_fields__"):
            yield from leaves(vars(value))
        else:
            yield value

    pairs = zip(leaves(a), leaves(b), strict=True)
    return all(torch.equal(x.nan_to_num(-7), y.nan_to_num(-7)) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


# --------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("which", [windows.TRAIN, windows.TEST])
def test_windows_mapped_from_several_files_equal_those_of_one_table(tmp_path: Path, which: int) -> None:
    tables = parts() if which == windows.TRAIN else [table_of(["a", "b"], 1, which, which), table_of(["c"], 2, which, which)]
    for number, table in enumerate(tables):
        storage.write_table(tmp_path / "windows" / f"part-{number:05d}.parquet", table)
    mapped = WindowCache.open(WindowCache.build(str(tmp_path / "windows"), tmp_path / "flat"))
    memory = WindowCache.from_table(pa.concat_tables(tables))
    assert len(mapped) == len(memory) == sum(len(t) for t in tables)
    assert mapped.user_ids.to_pylist() == memory.user_ids.to_pylist()
    assert set(mapped.columns) == set(memory.columns) and set(mapped.offsets) == {"history", "target", "seen"}
    for name, values in memory.columns.items():
        assert mapped.columns[name].dtype == values.dtype, name
        np.testing.assert_array_equal(mapped.columns[name], values, name)
    for name, values in memory.offsets.items():
        np.testing.assert_array_equal(mapped.offsets[name], values, name)
    assert isinstance(mapped.columns["target_item"], np.memmap)
    if which == windows.TEST:
        assert len(memory.columns["seen_item"]) > 0


def test_flat_columns_and_offsets_are_the_lists_of_the_table(cache: WindowCache) -> None:
    table = pa.concat_tables(parts())
    for name, group in (("history_time", "history"), ("target_pos", "target"), ("label_rating", "target"), ("seen_item", "seen")):
        for window, expected in enumerate(table[name].to_pylist()):
            flat, length = cache.gather(group, np.array([window]))
            np.testing.assert_array_equal(cache.columns[name][flat], np.array(expected, dtype=cache.columns[name].dtype))
            assert length.tolist() == [len(expected)]


def test_a_slice_of_a_table_is_read_as_that_slice() -> None:
    whole = parts()[0]
    assert len(whole) > 3
    sliced = WindowCache.from_table(whole.slice(2, len(whole) - 3))
    rebuilt = WindowCache.from_table(pa.Table.from_pylist(whole.slice(2, len(whole) - 3).to_pylist(), schema=whole.schema))
    for name, values in rebuilt.columns.items():
        np.testing.assert_array_equal(sliced.columns[name], values, name)
    for name, values in rebuilt.offsets.items():
        np.testing.assert_array_equal(sliced.offsets[name], values, name)


def test_a_folder_that_is_there_is_reused(tmp_path: Path) -> None:
    storage.write_table(tmp_path / "windows" / "part-00000.parquet", parts()[0])
    folder = WindowCache.build(str(tmp_path / "windows"), tmp_path / "flat")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert WindowCache.build(str(tmp_path / "windows"), tmp_path / "flat") == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "flat.lock", "windows"]


def build_in_a_process(folder: Path, killed: bool = False) -> Any:
    """A process that builds `flat` from `windows`; or that kills itself when it has written about half of it."""

    def build() -> None:
        if killed:
            original = np.ascontiguousarray
            written: list[int] = []

            def dies(values: Any) -> Any:
                written.append(1)
                if len(written) == 20:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(values)

            np.ascontiguousarray = dies
        WindowCache.build(str(folder / "windows"), folder / "flat")

    process = multiprocessing.get_context("fork").Process(target=build)
    process.start()
    return process


def test_processes_that_build_at_once_find_one_whole_folder(tmp_path: Path) -> None:
    for number, table in enumerate(parts()):
        storage.write_table(tmp_path / "windows" / f"part-{number:05d}.parquet", table)
    processes = [build_in_a_process(tmp_path) for _ in range(4)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(WindowCache.open(tmp_path / "flat")) == sum(map(len, parts()))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["flat", "flat.lock", "windows"]


def test_what_a_killed_process_left_is_built_anew(tmp_path: Path) -> None:
    table = parts()[0]
    storage.write_table(tmp_path / "windows" / "part-00000.parquet", table)
    process = build_in_a_process(tmp_path, killed=True)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "flat.draft").exists() and not (tmp_path / "flat").exists()
    again = WindowCache.open(WindowCache.build(str(tmp_path / "windows"), tmp_path / "flat"))
    assert len(again) == len(table) and not (tmp_path / "flat.draft").exists()


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=12), data=st.data())
def test_gather_finds_the_ranges_of_any_windows_in_any_order(lengths: list[int], data: st.DataObject) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    index = np.array(data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8)), dtype=np.int64)
    flat, length = WindowCache({}, {"target": offsets}, pa.array([])).gather("target", index)
    assert flat.tolist() == [p for w in index for p in range(offsets[w], offsets[w + 1])]
    assert length.tolist() == [lengths[w] for w in index]


# --------------------------------------------------------------------------- batches and ranks


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_window_comes_exactly_once_per_epoch(cache: WindowCache, world: int) -> None:
    marked = numbered(cache)
    batch_windows = next(b for b in range(7, 12) if len(cache) % b == 2)  # a last batch smaller than three or five ranks
    feeds = [feed_of(marked, rank=r, world=world, batch_windows=batch_windows) for r in range(world)]
    assert feeds[0].steps_per_epoch == -(-len(cache) // batch_windows)
    steps = [list(f.epoch(0)) for f in feeds]
    assert {len(s) for s in steps} == {feeds[0].steps_per_epoch}
    assert sorted(w for s in steps for step in s for w in windows_in(step)) == list(range(len(cache)))
    assert sum(len(windows_in(s[-1])) for s in steps) == 2


@settings(max_examples=25, deadline=None)
@given(world=st.integers(2, 6), batch_windows=st.integers(1, 60), accumulate=st.integers(1, 3))
def test_the_ranks_of_any_world_share_the_same_global_batches(world: int, batch_windows: int, accumulate: int) -> None:
    marked = numbered(WindowCache.from_table(parts()[0]))
    alone = [sorted(windows_in(s)) for s in feed_of(marked, batch_windows=batch_windows).epoch(2)]
    ranks = [
        list(feed_of(marked, batch_windows=batch_windows, accumulate=accumulate, rank=r, world=world).epoch(2))
        for r in range(world)
    ]
    assert [sorted(w for rank in ranks for w in windows_in(rank[s])) for s in range(len(alone))] == alone


def test_windows_are_named_by_user_number_and_row_and_a_sensitive_user_is_not(cache: WindowCache) -> None:
    index = np.array([0, len(cache) - 1])
    plain = cache.describe(index, SCHEMA)
    assert [w.split(" window ")[0] for w in plain] == ["user 'a'", "user 'g'"]
    secret = cache.describe(index, SCHEMA.model_copy(update={"sensitive": ("rating", "user_id")}))
    assert secret == [w.replace("'a'", "(withheld)").replace("'g'", "(withheld)") for w in plain]


def test_a_rank_without_windows_still_takes_part_with_an_empty_batch(cache: WindowCache) -> None:
    few = WindowCache.from_table(pa.concat_tables(parts()).slice(0, 2))
    pairs = PairSampler(2, 100, 1.0, 0)
    ((batch,),) = list(feed_of(few, rank=4, world=5, pairs=pairs, masked_folds=(1,)).epoch(0))
    assert len(batch.history) == len(batch.targets) == len(batch.pair_anchor_P) == len(batch.profile_weight_B) == 0


def test_accumulation_splits_a_ranks_share_into_micro_batches(cache: WindowCache) -> None:
    marked = numbered(cache)
    for one, three in zip(feed_of(marked).epoch(0), feed_of(marked, accumulate=3).epoch(0), strict=True):
        assert len(one) == 1 and len(three) == 3
        assert sorted(windows_in(one)) == sorted(windows_in(three))
        assert len({b.step for b in three}) == 1


def test_the_order_depends_on_seed_and_epoch(cache: WindowCache) -> None:
    marked = numbered(cache)

    def order(seed: int, epoch: int) -> list[list[int]]:
        return [windows_in(s) for s in feed_of(marked, seed=seed).epoch(epoch)]

    assert order(3, 0) == order(3, 0)
    assert order(3, 0) != order(3, 1)
    assert order(3, 0) != order(4, 0)
    assert order(3, 1) != order(4, 0)


def test_an_epoch_continued_at_a_step_goes_on_with_the_same_batches(cache: WindowCache) -> None:
    feed = feed_of(cache, rank=1, world=2, accumulate=2, pairs=PairSampler(3, 20, 0.8, 7))
    whole = list(feed.epoch(1))
    rest = list(feed.epoch(1, first_step=2))
    assert len(rest) == len(whole) - 2 > 0
    for expected, found in zip(whole[2:], rest, strict=True):
        assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not equal(whole[1][0], rest[0][0])


def test_the_step_counts_on_from_epoch_to_epoch(cache: WindowCache) -> None:
    feed = feed_of(cache)
    steps = [batch.step for epoch in (0, 1) for (batch,) in feed.epoch(epoch)]
    assert steps == list(range(2 * feed.steps_per_epoch))


# --------------------------------------------------------------------------- pairs


Pairs = Counter[tuple[int, int]]


def allowed_pairs(window: int, within_positions: int, within_hours: float) -> Pairs:
    """The pairs that may be drawn from a window, by plain loops."""
    out: Pairs = Counter()
    row = pa.concat_tables(parts()).slice(window, 1).to_pylist()[0]
    for item, time, pos, positive in zip(
        row["target_item"], row["target_time"], row["target_pos"], row["target_positive"], strict=True
    ):
        for place in range(max(0, pos - within_positions), pos):
            anchor = row["history_item"][place]
            near = time - row["history_time"][place] <= within_hours * HOUR
            if positive and row["history_positive"][place] and anchor != item and near:
                out[anchor, item] += 1
    return out


def drawn(cache: WindowCache, window: int, pairs: PairSampler, epoch: int = 0) -> list[tuple[int, int]]:
    batch = collate(cache, np.array([window]), SCHEMA, pairs=pairs, epoch=epoch)
    return list(zip(batch.pair_anchor_P.tolist(), batch.pair_positive_P.tolist(), strict=True))


def test_with_one_position_every_allowed_pair_is_drawn(cache: WindowCache) -> None:
    total = 0
    for window in range(len(cache)):
        expected = allowed_pairs(window, 1, 4)
        assert Counter(drawn(cache, window, PairSampler(1, 4, 1.0, 0))) == expected
        total += expected.total()
    assert total > 10


def test_pairs_stay_within_positions_and_hours_and_use_positives_alone(cache: WindowCache) -> None:
    reached: set[tuple[int, int, int]] = set()
    possible: set[tuple[int, int, int]] = set()
    for window in range(len(cache)):
        allowed = allowed_pairs(window, 3, 6)
        for epoch in range(25):
            found = Counter(drawn(cache, window, PairSampler(3, 6, 1.0, 1), epoch))
            assert not found - allowed
            reached |= {(window, *p) for p in found}
        possible |= {(window, *p) for p in allowed}
    assert reached == possible and len(possible) > 10  # over many epochs every pair that is allowed comes


def test_no_item_is_paired_with_itself(cache: WindowCache) -> None:
    same_items = {n: np.zeros_like(v) if n in ("history_item", "target_item") else v for n, v in cache.columns.items()}
    ones = WindowCache(same_items, cache.offsets, cache.user_ids)
    for window in range(len(ones)):
        assert drawn(ones, window, PairSampler(1, 1e6, 1.0, 0)) == []


def test_a_target_that_is_history_but_no_positive_is_in_no_pair() -> None:
    table = hand_table(target_positive=[[1, 0, 0], [1]])
    batch = collate(WindowCache.from_table(table), np.array([0, 1]), SCHEMA, pairs=PairSampler(1, 1e6, 1.0, 0))
    assert len(batch.pair_anchor_P) == 0


def test_a_history_event_that_is_no_positive_anchors_no_pair() -> None:
    everything = {"target_positive": [[1, 1, 1], [1]], "target_pos": [[0, 1, 2], [0]]}
    pairs = PairSampler(1, 1e6, 1.0, 0)

    def found(history_positive: list[list[int]]) -> list[tuple[int, int]]:
        table = hand_table(history_positive=history_positive, **everything)
        return drawn(WindowCache.from_table(table), 0, pairs)

    assert found([[1, 1], []]) == [(3, 5), (5, 6)]
    assert found([[0, 1], []]) == [(5, 6)]
    assert found([[0, 0], []]) == []


def test_a_share_draws_about_that_share_of_the_targets(cache: WindowCache) -> None:
    everything = np.arange(len(cache))

    def count(share: float) -> int:
        return sum(
            len(collate(cache, everything, SCHEMA, pairs=PairSampler(1, 1e6, share, 0), epoch=e).pair_anchor_P) for e in range(40)
        )

    assert count(0.0) == 0
    assert count(0.25) / count(1.0) == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("world", [2, 3, 5])
def test_pairs_do_not_depend_on_the_number_of_ranks(cache: WindowCache, world: int) -> None:
    pairs = PairSampler(3, 24, 0.7, 5)

    def of(step: list[Batch]) -> Pairs:
        return Counter(p for b in step for p in zip(b.pair_anchor_P.tolist(), b.pair_positive_P.tolist(), strict=True))

    alone = [of(s) for s in feed_of(cache, pairs=pairs).epoch(1)]
    ranks = [[of(s) for s in feed_of(cache, pairs=pairs, rank=r, world=world, accumulate=2).epoch(1)] for r in range(world)]
    assert [sum((rank[s] for rank in ranks), Counter()) for s in range(len(alone))] == alone
    assert sum(alone, Counter()).total() > 10


def test_pairs_change_with_the_epoch_and_the_seed(cache: WindowCache) -> None:
    def all_pairs(seed: int, epoch: int) -> list[list[tuple[int, int]]]:
        return [drawn(cache, w, PairSampler(3, 24, 0.5, seed), epoch) for w in range(len(cache))]

    assert all_pairs(0, 0) == all_pairs(0, 0)
    assert all_pairs(0, 0) != all_pairs(0, 1) and all_pairs(0, 0) != all_pairs(1, 0)


# --------------------------------------------------------------------------- the stream


def stream_of(tables: list[pa.Table], **changes: Any) -> StreamFeed:
    settings: dict[str, Any] = {
        "batch_windows": 8, "accumulate": 1, "seed": 3, "rank": 0, "world": 1, "masked_folds": (), "pairs": None, "buffer": 16,
    }  # fmt: skip
    windows = sum(map(len, tables))
    return StreamFeed(lambda _: iter(tables), windows, tables[0].schema.empty_table(), SCHEMA, **(settings | changes))


def marked_tables(rows: list[int]) -> list[pa.Table]:
    """Tables of so many windows, whose attribute `taste` is the window's number over all of them."""
    whole = pa.concat_tables([parts()[2]] * 20).slice(0, sum(rows))
    place = whole.column_names.index("profile_taste")
    whole = whole.set_column(place, "profile_taste", pa.array(np.arange(len(whole)), pa.int32()))
    return [whole.slice(start, n) for start, n in zip(np.cumsum([0, *rows[:-1]]).tolist(), rows, strict=True)]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, 30), min_size=1, max_size=6), buffer=st.integers(1, 60), batch=st.integers(1, 20))
def test_a_stream_gives_every_window_of_any_tables_once_in_whole_batches(rows: list[int], buffer: int, batch: int) -> None:
    feed = stream_of(marked_tables(rows), buffer=buffer, batch_windows=batch, accumulate=2)
    sizes = [len(windows_in(step)) for step in feed.epoch(0)]
    found = [w for step in feed.epoch(0) for w in windows_in(step)]
    assert sorted(found) == list(range(sum(rows)))
    assert all(size == batch for size in sizes[:-1]) and all(0 < size <= batch for size in sizes[-1:])


def test_a_stream_is_shuffled_within_its_buffer_by_seed_and_epoch() -> None:
    tables = marked_tables([10, 10, 10, 10])

    def order(epoch: int, **changes: Any) -> list[list[int]]:
        return [windows_in(step) for step in stream_of(tables, **changes).epoch(epoch)]

    assert order(0) == order(0) and order(0) != order(1) and order(0) != order(0, seed=4)
    assert sorted(w for step in order(0, buffer=20, batch_windows=10)[:2] for w in step) == list(range(20))


def test_the_steps_of_a_stream_count_on_and_its_rows_can_be_named() -> None:
    feed = stream_of(marked_tables([20]))
    steps = [step[0].step for step in feed.epoch(2, 0, 100)]
    assert steps == [100, 101, 102] and feed.steps_per_epoch == 3
    assert [len(feed.rows(2, step, False)) for step in range(4)] == [8, 8, 4, 0]
    assert feed.rows(2, 2, True)[0].startswith("user 'f")


# --------------------------------------------------------------------------- the tensors of a batch


def hand_table(**columns: Any) -> pa.Table:
    """Two windows: u has two events and three targets, w has no history and one target."""
    base: dict[str, Any] = {
        "user_id": ["u", "w"],
        "window": [0, 0],
        "profile_weight": pa.array([0.5, 1.0], pa.float32()),
        "fold": pa.array([4, 7], pa.int8()),
        "history_item": [[3, 5], []],
        "history_time": [[1000, 4000], []],
        "history_row": [[0, 1], []],
        "history_positive": [[1, 1], []],
        "target_item": [[3, 5, 6], [2]],
        "target_time": [[1000, 4000, 9000], [5]],
        "target_row": [[0, 1, 2], [3]],
        "target_pos": [[0, 1, 2], [0]],
        "target_split": [[0, 0, 0], [0]],
        "target_positive": [[1, 1, 0], [1]],
        "seen_item": [[], []],
        "history_action_click": [[1.0, 1.0], []],
        "history_action_rating": [[float("nan"), 4.0], []],
        "label_click": [[1.0, 1.0, 0.0], [1.0]],
        "label_rating": [[float("nan"), 4.0, float("nan")], [2.0]],
        "history_context_device": [[1, 2], []],
        "target_context_device": [[1, 2, 0], [2]],
        "profile_taste": pa.array([1, 0], pa.int32()),
    }
    return pa.table({n: pa.array(v) for n, v in (base | columns).items()})


def test_a_batch_by_hand() -> None:
    batch = collate(WindowCache.from_table(hand_table()), np.array([1, 0]), SCHEMA, step=9)
    history, targets = batch.history, batch.targets
    assert history.length_B.tolist() == [0, 2] and history.item_BS.tolist() == [[0, 0], [3, 5]]
    assert history.gap_BS.tolist() == [[0, 0], [0, 3]]  # 3 seconds: floor(log2(4)) + 1
    assert history.context_BS["device"].tolist() == [[0, 0], [1, 2]]
    assert history.actions_BS["click"][1].tolist() == [1.0, 1.0] and history.actions_BS["click"][0].isnan().all()
    assert targets.window_M.tolist() == [0, 1, 1, 1] and targets.item_M.tolist() == [2, 3, 5, 6]
    assert targets.pos_M.tolist() == [0, 0, 1, 2] and targets.positive_M.tolist() == [True, True, True, False]
    assert targets.context_M["device"].tolist() == [2, 1, 2, 0]
    assert batch.profile_B["taste"].tolist() == [0, 1] and batch.profile_weight_B.tolist() == [1.0, 0.5]
    assert batch.step == 9 and len(batch.pair_anchor_P) == 0


def test_a_missing_label_or_action_stays_missing() -> None:
    batch = collate(WindowCache.from_table(hand_table()), np.array([0, 1]), SCHEMA)
    assert batch.targets.labels_M["rating"].isnan().tolist() == [True, False, True, False]
    assert batch.targets.labels_M["click"].tolist() == [1.0, 1.0, 0.0, 1.0]
    assert batch.history.actions_BS["rating"][0].isnan().tolist() == [True, False]


def test_users_of_masked_folds_come_without_profile_labels() -> None:
    cache = WindowCache.from_table(hand_table())
    assert collate(cache, np.array([0, 1]), SCHEMA, masked_folds=(0, 7)).profile_B["taste"].tolist() == [1, -1]
    assert collate(cache, np.array([0, 1]), SCHEMA, masked_folds=(4, 7)).profile_B["taste"].tolist() == [-1, -1]
    assert cache.columns["profile_taste"].tolist() == [1, 0]
    ((batch,),) = list(feed_of(cache, masked_folds=(7,)).epoch(0))
    assert batch.profile_B["taste"].tolist() == [1, -1]


def test_the_first_event_shown_has_no_gap_whatever_came_before_it() -> None:
    time = np.array([0, 1000, 90_000_000, 90_000_000, 5], dtype=np.int64)
    history = collate_history(np.arange(1, 6), time, np.array([2, 0, 2, 1]), {}, {})
    assert history.gap_BS.tolist() == [[0, 2], [0, 0], [0, 1], [0, 0]]


def test_gap_buckets_are_powers_of_two_of_seconds() -> None:
    gaps_s = [0, 0.999, 1, 2.999, 3, 6.999, 7, 86_400, 31_536_000, 10**12]
    expected = [1, 1, 2, 2, 3, 3, 4, 17, 25, GAP_BUCKETS - 1]
    for gap, bucket in zip(gaps_s, expected, strict=True):
        found = gap_bucket(np.array([500, 500 + int(gap * 1000)], dtype=np.int64), np.array([True, False]))
        assert found.tolist() == [0, bucket], gap


def test_a_batch_moves_with_everything_in_it() -> None:
    batch = collate(WindowCache.from_table(hand_table()), np.array([0, 1]), SCHEMA, step=4)
    moved = batch.to(torch.device("meta"))
    assert moved.step == 4 and moved.history.item_BS.is_meta and moved.targets.labels_M["click"].is_meta
    assert moved.profile_B["taste"].is_meta and not batch.history.item_BS.is_meta
