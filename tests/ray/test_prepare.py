"""prepare on a real Ray cluster: what is refused, what is quarantined, what order survives."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_ray import storage
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.data.prepare import DataError, prepare
from mtrec_ray.data.sources import SourceError
from tests import tiny

pytestmark = pytest.mark.ray


def ratings_config(folder: Path, **data: Any) -> RunConfig:
    """A plain ratings log: leave-one-out, ties by row."""
    return parse_config(
        {
            "name": "ratings",
            "data": {
                "interactions": {"format": "csv", "path": str(folder / "log")},
                "labels": {"rating": {"min": 1, "max": 5}},
                "same_time": "order",
                "protocol": "leave_one_out",
                "window": 10,
                "partitions": 2,
                **data,
            },
            "tasks": {"retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating"}},
        }
    )


def write_rows(folder: Path, *files: list[list[Any]]) -> None:
    (folder / "log").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(files):
        with open(folder / "log" / f"{number}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["user_id", "item_id", "timestamp", "rating"], *rows])


def good_rows(users: int = 6, events: int = 5) -> list[list[Any]]:
    return [[f"u{u}", f"i{(u + e) % 7}", 1000 * e, 1 + (u + e) % 5] for e in range(events) for u in range(users)]


def test_the_same_windows_with_and_without_a_cluster(ray_cluster: Any, tiny_folder: Path, tmp_path: Path) -> None:
    config = tiny.make_config(tiny_folder)
    local = tiny.prepare_locally(config, tmp_path / "local")
    distributed = prepare(config, str(tmp_path / "ray"))
    a, b = dict(local.manifest), dict(distributed.manifest)
    assert {k: v for k, v in a["files"].items() if "quarantine" not in k} == {
        k: v for k, v in b["files"].items() if "quarantine" not in k
    }
    assert a["rows"] == b["rows"] and a["cuts"] == b["cuts"]


def test_ties_in_time_keep_the_order_of_the_log_through_parallel_reading(ray_cluster: Any, tmp_path: Path) -> None:
    # one user, all events in one second, spread over five files; ids descend, so sorting by id would show
    order = [f"i{99 - n:02d}" for n in range(40)]
    parts = [[["u", i, 7000, 3] for i in chunk] for chunk in np.array_split(order, 5)]
    write_rows(tmp_path, *parts)
    data = prepare(ratings_config(tmp_path, window=100), str(tmp_path / "data"))
    store = storage.read_table(data.path("store"))
    assert store["history_item_id"][0].as_py() == order[:-1]  # the last one is the test event
    test = storage.read_table(data.path("windows", "test"))
    ids = storage.read_table(data.path("catalogue.parquet"))["item_id"].to_pylist()
    assert [ids[i] for i in test["target_item"][0].as_py()] == [order[-1]]


def test_bad_rows_are_quarantined_with_their_reason_and_counted(ray_cluster: Any, tmp_path: Path) -> None:
    rows = good_rows()
    bad = [
        ["", "i1", 5, 3],
        ["u1", "", 5, 3],
        ["u1", "i1", "", 3],
        ["u1", "i1", "soon", 3],
        ["u1", "i1", 5, 9],
        ["u1", "i1", 5, "great"],
        ["u1", "i1", 5],
        rows[0],
    ]
    write_rows(tmp_path, rows, bad)
    data = prepare(ratings_config(tmp_path, max_bad_share=0.5), str(tmp_path / "data"))
    counted = data.manifest["rows"]
    assert counted["read"] == len(rows) + len(bad)
    assert counted["events"] == len(rows) and counted["quarantined"] == len(bad)
    assert counted["reasons"] == {
        "duplicate event": 1,
        "item_id is missing": 1,
        "rating is above 5": 1,
        "rating is not a number": 1,
        "timestamp is missing": 1,
        "timestamp is not a number": 1,
        "user_id is missing": 1,
        "wrong number of columns": 1,
    }
    quarantine = storage.read_table(data.path("quarantine")).to_pylist()
    above = next(q for q in quarantine if q["reason"] == "rating is above 5")
    assert "9" in above["raw"] and above["file"].endswith("1.csv")
    assert counted["train_targets"] + counted["valid_targets"] + counted["test_targets"] == counted["events"]


def test_too_many_bad_rows_stop_the_job_before_anything_is_published(ray_cluster: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, good_rows(), [["u1", "i1", "soon", 3]] * 3)
    with pytest.raises(DataError, match=r"3 of 33 rows.*max_bad_share.*timestamp is not a number"):
        prepare(ratings_config(tmp_path), str(tmp_path / "data"))
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_a_failed_rerun_leaves_the_published_data_alone(ray_cluster: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, good_rows())
    before = prepare(ratings_config(tmp_path), str(tmp_path / "data")).manifest
    write_rows(tmp_path, good_rows(), [["u1", "i1", "soon", 3]] * 30)
    with pytest.raises(DataError):
        prepare(ratings_config(tmp_path), str(tmp_path / "data"))
    directory = storage.Directory(str(tmp_path / "data"))
    assert directory.manifest == before
    directory.verify()


def test_unchanged_inputs_are_reused_and_a_changed_file_is_not(ray_cluster: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, good_rows())
    config = ratings_config(tmp_path)
    first = prepare(config, str(tmp_path / "data")).manifest
    stamp = (tmp_path / "data" / "manifest.json").stat().st_mtime_ns
    prepare(config, str(tmp_path / "data"))
    assert (tmp_path / "data" / "manifest.json").stat().st_mtime_ns == stamp
    write_rows(tmp_path, good_rows(events=6))
    assert prepare(config, str(tmp_path / "data")).manifest["inputs"] != first["inputs"]


def test_dangling_items_are_quarantined_and_dangling_users_kept_but_counted(ray_cluster: Any, tmp_path: Path) -> None:
    write_rows(tmp_path, [*good_rows(), ["u1", "nowhere", 9000, 3], ["stranger", "i1", 9000, 3]])
    (tmp_path / "items.csv").write_text("item_id,name\n" + "".join(f"i{i},n{i}\n" for i in range(7)))
    (tmp_path / "users.csv").write_text("user_id,sex\n" + "".join(f"u{u},f\n" for u in range(6)))
    config = ratings_config(
        tmp_path,
        items={"format": "csv", "path": str(tmp_path / "items.csv")},
        users={"format": "csv", "path": str(tmp_path / "users.csv")},
    )
    rows = prepare(config, str(tmp_path / "data")).manifest["rows"]
    assert rows["reasons"] == {"item_id is not in the items table": 1}
    assert rows["users_without_attributes"] == 1


@pytest.mark.parametrize(
    ("rows", "change", "error", "message"),
    [
        ([], {}, DataError, "has no rows"),
        ([["u1", "i1", 5, 3]] * 1, {"protocol": "time"}, DataError, "cannot be cut"),
        (good_rows(), {"history": "rating > 9"}, DataError, "positive"),
        (good_rows(), {"interactions": {"format": "csv", "path": "/nowhere"}}, SourceError, "/nowhere does not exist"),
        (good_rows(), {"labels": {"stars": {}}, "actions": []}, SourceError, "stars"),
    ],
)
def test_a_log_that_cannot_be_used_is_refused(
    ray_cluster: Any, tmp_path: Path, rows: list[list[Any]], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_rows(tmp_path, rows)
    config = ratings_config(tmp_path)
    raw = config.model_dump(mode="json")
    raw["data"] |= change
    if "labels" in change:
        raw["tasks"]["rating"]["label"] = "stars"
    with pytest.raises(error, match=message):
        prepare(parse_config(raw), str(tmp_path / "data"))
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_parquet_and_csv_of_the_same_log_give_the_same_windows(ray_cluster: Any, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_rows(tmp_path, good_rows())
    from_csv = prepare(ratings_config(tmp_path), str(tmp_path / "a"))
    users, items, times, ratings = zip(*good_rows(), strict=True)
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times, "rating": ratings})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=7)
    config = ratings_config(tmp_path, interactions={"format": "parquet", "path": str(tmp_path / "log.parquet")})
    from_parquet = prepare(config, str(tmp_path / "b"))
    for split in ("train", "valid", "test"):
        assert storage.read_table(from_csv.path("windows", split)).equals(storage.read_table(from_parquet.path("windows", split)))
