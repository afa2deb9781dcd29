"""Item ids become numbers range by range: the numbers do not depend on the ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray import storage
from mtrec_ray.data import ids, prepare
from tests import tiny

words = st.text(alphabet="abé☃\U0001f600\U0000ffff", min_size=1, max_size=3)
lists = st.lists(st.dictionaries(words, st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8), min_size=1, max_size=4)


def table_of(counts: dict[str, tuple[int, int]]) -> pa.Table:
    names = sorted(counts)
    return pa.table([names, [counts[n][0] for n in names], [counts[n][1] for n in names]], schema=ids.ITEMS)


def numbered(parts: list[dict[str, tuple[int, int]]], others: list[str], bounds: list[str], before: list[str]) -> dict[str, int]:
    """Every item's number, from the ranges; checked from each partition's side too."""
    tables = [table_of(p) for p in parts]
    rest = pa.table({"item_id": pa.array(sorted(others), pa.string())})
    old = pa.table({"item_id": pa.array(before, pa.string()), "position": pa.array(range(len(before)), pa.int64())})
    ranges = [
        ids.number_range(
            [ids.share(t, bounds, w) for t in tables],
            [ids.share(rest, bounds, w)["item_id"].combine_chunks()],
            ids.share(old, bounds, w) if before else None,
        )
        for w in range(len(bounds) + 1)
    ]
    new, left = (np.array([int((r.kind == k).sum()) for r in ranges]) for k in (ids.NEW, ids.REST))
    numbers = ids.Numbers.of(len(before), new, left)
    out: dict[str, int] = {}
    for w, r in enumerate(ranges):
        out |= dict(zip(r.item_ids.to_pylist(), numbers.positions(r.kind, r.rank, w).tolist(), strict=True))
    for place, table in enumerate(tables):
        mine = np.concatenate([numbers.positions(r.kind[r.codes[place]], r.rank[r.codes[place]], w) for w, r in enumerate(ranges)])
        assert mine.tolist() == [out[i] for i in table["item_id"].to_pylist()]
    assert sorted(out.values()) == list(range(numbers.items))
    return out


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(parts=lists, others=st.lists(words, max_size=5, unique=True), bounds=st.lists(words, max_size=4, unique=True))
def test_training_items_come_first_by_id_then_all_others_whatever_the_ranges(
    parts: list[dict[str, tuple[int, int]]], others: list[str], bounds: list[str]
) -> None:
    trained = {i for p in parts for i, (t, _) in p.items() if t}
    every = {i for p in parts for i in p} | set(others)
    order = [*sorted(trained), *sorted(every - trained)]
    assert numbered(parts, others, sorted(bounds), []) == {i: n for n, i in enumerate(order)}


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(parts=lists, bounds=st.lists(words, max_size=3, unique=True), before=st.lists(words, min_size=1, max_size=5, unique=True))
def test_training_items_of_before_keep_their_numbers(
    parts: list[dict[str, tuple[int, int]]], bounds: list[str], before: list[str]
) -> None:
    trained = {i for p in parts for i, (t, _) in p.items() if t} - set(before)
    rest = {i for p in parts for i in p} - trained - set(before)
    order = [*before, *sorted(trained), *sorted(rest)]
    assert numbered(parts, [], sorted(bounds), before) == {i: n for n, i in enumerate(order)}


def test_splitters_cut_samples_into_even_ranges() -> None:
    samples = [[f"{i:03d}" for i in range(start, 900, 3)] for start in range(3)]
    assert ids.splitters(samples, 3) == ["300", "600"]
    assert ids.splitters(samples, 1) == ids.splitters([], 4) == ids.splitters([["a"] * 9], 4) == []


def test_a_sample_is_spread_over_a_list_and_is_all_of_a_short_one() -> None:
    assert ids.sample(pa.array(["a", "b", "c"])) == ["a", "b", "c"]
    many = ids.sample(pa.array([f"{i:05d}" for i in range(10_000)]))
    assert len(many) == 256 and many[0] == "00000" and many[-1] == "09999"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["time", "leave_one_out"])
def test_prepared_data_do_not_depend_on_the_number_of_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    tiny.write_log(tmp_path)
    config = tiny.make_config(tmp_path, lambda raw: raw["data"].update(protocol=protocol))
    one = tiny.prepare_locally(config, tmp_path / "one")
    monkeypatch.setattr(prepare, "_ITEMS_PER_RANGE", 9)
    many = tiny.prepare_locally(config, tmp_path / "many")
    kinds = ("catalogue.parquet", "windows/train", "windows/test", "store")
    for kind in kinds:
        a, b = (repr(storage.read_table(d.path(kind)).to_pylist()) for d in (one, many))
        assert a == b, kind
    assert storage.read_bytes(one.path("schema.json")) == storage.read_bytes(many.path("schema.json"))
