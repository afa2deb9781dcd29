"""Days appended one by one equal preparing everything at once; training items keep their numbers."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest

from mtrec_ray import runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data import lineage
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.prepare import prepare
from tests import tiny
from tests.unit import test_long


def config_of(folder: Path, **data: Any) -> RunConfig:
    def change(raw: dict[str, Any]) -> None:
        raw["data"] |= {"partitions": 4, "max_bad_share": 0.5, **data}

    return tiny.make_config(folder, change)


def append(config: RunConfig, root: Path) -> storage.Directory:
    with mock.patch.object(runtime, "for_each", tiny.in_this_process):
        return prepare(config, str(root), append=True)


def write_days(folder: Path, days: int) -> list[Path]:
    """The tiny log, a file a day, with bad rows, duplicates across days and late events -> the files."""
    tiny.write_log(folder, files=days)
    files = sorted((folder / "log").glob("*.csv"))
    rows = [list(csv.reader(open(f, encoding="utf-8"))) for f in files]
    for day in range(1, days):
        late = [*rows[day - 1][5][:2], str(int(rows[day - 1][5][2]) - 1), *rows[day - 1][5][3:]]
        extra = [rows[day - 1][3], ["u1", "i1", "soon", "1", "", "web"], ["u1", "nowhere", rows[day][1][2], "1", "", "web"], late]
        with open(files[day], "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(extra)
    return files


def decoded(data: storage.Directory, kind: str) -> pa.Table:
    """A table of prepared data with item ids for numbers, users in order."""
    table = storage.read_table(data.path(kind))
    items = storage.read_table(data.path("catalogue.parquet"))["item_id"].combine_chunks()
    for name in ("history_item", "target_item", "seen_item"):
        if name in table.column_names:
            column = table[name].combine_chunks()
            ids = pa.ListArray.from_arrays(column.offsets, items.take(column.flatten()))
            table = table.set_column(table.column_names.index(name), name, ids)
    # stable: a user's windows keep their order
    return table.take(pa.array(np.argsort(table["user_id"].cast(pa.string()).to_numpy(zero_copy_only=False), kind="stable")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"protocol": "leave_one_out"},
        {"protocol": "user_holdout", "holdout": [0.2, 0.2]},
        {"same_time": "order", "protocol": "random"},
    ],
)
def test_appending_day_by_day_equals_preparing_everything_at_once(tmp_path: Path, change: dict[str, Any]) -> None:
    files = write_days(tmp_path, 4)
    config = config_of(tmp_path, **change)
    at_once = tiny.prepare_locally(config, tmp_path / "once")
    away = tmp_path / "away"
    away.mkdir()
    for file in files[2:]:
        shutil.move(file, away / file.name)
    grown = tiny.prepare_locally(config, tmp_path / "grown")
    for file in files[2:]:
        shutil.move(away / file.name, file)
        grown = append(config, tmp_path / "grown")
    assert grown.manifest["generation"] == 2
    for key in ("rows", "cuts", "test_sha256", "covers"):
        assert grown.manifest[key] == at_once.manifest[key], key
    for kind in ("windows/train", "windows/valid", "windows/test", "store", "events"):
        assert repr(decoded(grown, kind).to_pylist()) == repr(decoded(at_once, kind).to_pylist()), kind  # NaN is NaN
    order = [("__row__", "ascending"), ("reason", "ascending")]
    bad, expected = (storage.read_table(d.path("quarantine")).sort_by(order) for d in (grown, at_once))
    assert bad.equals(expected) and len(bad) > 6
    grown.verify()
    # what was published at once is what a plain preparation would make: it is not made anew
    stamp = (tmp_path / "grown" / "manifest.json").stat().st_mtime_ns
    tiny.prepare_locally(config, tmp_path / "grown")
    assert (tmp_path / "grown" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_training_items_keep_their_numbers_and_new_ones_come_after_them(tmp_path: Path) -> None:
    files = write_days(tmp_path, 3)
    config = config_of(tmp_path)
    text = files[2].read_text()
    files[2].unlink()
    before = tiny.prepare_locally(config, tmp_path / "data")
    old = storage.read_table(before.path("catalogue.parquet")).to_pylist()
    time = int(text.splitlines()[-1].split(",")[2]) + 10**9
    # the new item sorts first of all, and enough later events follow to make it a training item
    later = [f"u{u % 20},i{u % 7},{time + u * 10**6},1,3,web" for u in range(150)]
    (tmp_path / "items.csv").open("a").write("aa,First of all,even\n")
    files[2].write_text(text + "".join(f"u{u},aa,{time - 10**9 + u},1,3,web\n" for u in range(5)) + "\n".join(later) + "\n")
    after = append(config, tmp_path / "data")
    new = storage.read_table(after.path("catalogue.parquet")).to_pylist()
    trained = [r["item_id"] for r in old if r["trained"]]
    assert [r["item_id"] for r in new][: len(trained)] == trained
    place = [r["item_id"] for r in new].index("aa")
    assert new[place]["trained"] and place >= len(trained)
    assert [r["trained"] for r in new] == sorted((r["trained"] for r in new), reverse=True)


@pytest.mark.slow
def test_a_partition_without_new_rows_is_taken_as_it_is(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path, protocol="user_holdout", partitions=8)
    before = tiny.prepare_locally(config, tmp_path / "data")
    there = {Path(p).stat().st_ino for p in storage.list_files(before.path("windows/train"))}
    last = max(int(r["timestamp"]) for r in storage.read_table(before.path("events")).to_pylist())
    known = storage.read_table(before.path("events"))
    item = known["item_id"][0].as_py()
    (tmp_path / "log" / "part9.csv").write_text(f"user,item,ts,click,rating,device\nu3,{item},{last + 5},1,4,web\n")
    after = append(config, tmp_path / "data")
    assert after.manifest["windows_made"] == 1
    remade = {Path(p).stat().st_ino for p in storage.list_files(after.path("windows/train"))} - there
    assert len(remade) == 1


def test_nothing_new_is_nothing_to_do(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path)
    tiny.prepare_locally(config, tmp_path / "data")
    stamp = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    assert append(config, tmp_path / "data").manifest["generation"] == 0
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == stamp


def test_appending_to_nothing_prepares_everything(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    assert append(config_of(tmp_path), tmp_path / "data").manifest["generation"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [({"window": 9}, r"the configuration differs .*\(window\)"), ({}, r"part0\.csv has changed since it was prepared")],
)
def test_appending_to_other_data_is_refused_and_leaves_them_alone(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    files = write_days(tmp_path, 3)
    text = files[2].read_text()
    files[2].unlink()
    published = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data").manifest
    files[2].write_text(text)
    if not change:
        files[0].write_text(files[0].read_text() + "u1,i1,1700000000000,1,4,web\n")
    with pytest.raises(DataError, match=message):
        append(config_of(tmp_path, **change), tmp_path / "data")
    directory = storage.Directory(tmp_path / "data")
    assert directory.manifest == published
    directory.verify()


def test_a_file_that_was_only_touched_is_no_other_file(tmp_path: Path) -> None:
    files = write_days(tmp_path, 2)
    config = config_of(tmp_path)
    published = tiny.prepare_locally(config, tmp_path / "data").manifest
    files[0].touch()
    assert tiny.prepare_locally(config, tmp_path / "data").manifest == published


def test_the_same_log_is_covered_wherever_its_files_lie_in_time(tmp_path: Path) -> None:
    parts = {"files": {"interactions": {"a": {"size": 1, "modified": 2, "sha256": "x"}}}, "data": {}}
    later = {"files": {"interactions": {"a": {"size": 1, "modified": 9, "sha256": "x"}}}, "data": {}}
    other = {"files": {"interactions": {"a": {"size": 1, "modified": 2, "sha256": "y"}}}, "data": {}}
    assert lineage.covers(parts) == lineage.covers(later) != lineage.covers(other)


@pytest.mark.slow
def test_an_action_of_today_belongs_to_an_impression_of_yesterday(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    test_long.write_long_log(tmp_path)
    today = tmp_path / "long" / "part1.csv"
    interactions = tiny.raw_config(tmp_path)["data"]["interactions"] | {"path": str(tmp_path / "long")}
    config = config_of(tmp_path, interactions=interactions, long=test_long.long_section(request="request"))
    at_once = tiny.prepare_locally(config, tmp_path / "once")
    text = today.read_text()
    rows = text.splitlines()
    # the first rows of today are actions on what was shown yesterday
    head, early = rows[0], [r for r in (tmp_path / "long" / "part0.csv").read_text().splitlines() if ",click," in r][:5]
    yesterday = (tmp_path / "long" / "part0.csv").read_text()
    (tmp_path / "long" / "part0.csv").write_text("\n".join(r for r in yesterday.splitlines() if r not in early) + "\n")
    today.unlink()
    tiny.prepare_locally(config, tmp_path / "grown")
    today.write_text("\n".join([head, *early, *rows[1:]]) + "\n")
    grown = append(config, tmp_path / "grown")
    for key in ("events", "matched", "unmatched", "train_windows", "test_targets"):
        assert grown.manifest["rows"][key] == at_once.manifest["rows"][key], key
    windows = [w for data in (grown, at_once) for w in decoded(data, "windows/train").to_pylist()]
    clicks = [sorted(zip(w["target_item"], w["label_click"], strict=True)) for w in windows]
    assert clicks[: len(clicks) // 2] == clicks[len(clicks) // 2 :]
