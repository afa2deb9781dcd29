"""What a log can do to preparation: it is refused with file, row and column, and nothing is half-published.

Single files are tested in test_sources_bad_input.py, single rows in test_validate.py; here whole preparations are.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_ray import storage
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.data import events as stage
from mtrec_ray.data import partition
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.sources import SourceError, Unit
from tests import tiny

START = 1_700_000_000_000
Columns = dict[str, Any]


def columns_of(users: int = 6, events: int = 8, start: int = START, step: int = 60_000) -> Columns:
    """A ratings log in the order of time."""
    n = users * events
    return {
        "user_id": [f"u{i % users}" for i in range(n)],
        "item_id": [f"i{(i * 5) % 7}" for i in range(n)],
        "timestamp": [start + i * step for i in range(n)],
        "rating": [1.0 + i % 5 for i in range(n)],
    }


def write(folder: Path, *files: Columns) -> list[Path]:
    (folder / "log").mkdir(parents=True, exist_ok=True)
    paths = [folder / "log" / f"part-{n}.parquet" for n in range(len(files))]
    for path, columns in zip(paths, files, strict=True):
        pq.write_table(pa.table(columns), path)
    return paths


def config_of(folder: Path, **data: Any) -> RunConfig:
    return parse_config(
        {
            "name": "ratings",
            "data": {
                "interactions": {"path": str(folder / "log")},
                "labels": {"rating": {"min": 1, "max": 5}},
                "protocol": "leave_one_out",
                "window": 8,
                "partitions": 3,
                **data,
            },
            "tasks": {"retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating"}},
        }
    )


def refused(folder: Path, error: type[Exception], message: str, **data: Any) -> None:
    """Preparation stops with a message; what was published before is still there, and nothing else."""
    root = folder / "data"
    published = storage.Directory(root)
    before = published.manifest if (root / "manifest.json").exists() else None
    with pytest.raises(error, match=message):
        tiny.prepare_locally(config_of(folder, **data), root)
    if before is None:
        assert not (root / "manifest.json").exists()
    else:
        assert published.manifest == before
        published.verify()
    left = {p.relative_to(root).parts[1] for p in root.rglob("*.parquet")} if root.exists() else set()
    kept = set() if before is None else {"events", "windows", "store", "catalogue.parquet"}
    assert left <= kept | {"quarantine"}


# --------------------------------------------------------------------------- files


def corrupt(paths: list[Path]) -> None:
    content = bytearray(paths[1].read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\0" * (len(content) // 2 - len(content) // 4)
    paths[1].write_bytes(content)


def cut_short(paths: list[Path]) -> None:
    paths[1].write_bytes(paths[1].read_bytes()[:-20])


def empty(paths: list[Path]) -> None:
    paths[1].write_bytes(b"")


def without_a_column(paths: list[Path]) -> None:
    pq.write_table(pq.read_table(paths[1]).drop_columns(["rating"]), paths[1])


def lists_for_ids(paths: list[Path]) -> None:
    table = pq.read_table(paths[1])
    pq.write_table(table.set_column(0, "user_id", pa.array([["a"]] * len(table))), paths[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (corrupt, r"part-1\.parquet cannot be read as parquet"),
        (cut_short, r"part-1\.parquet cannot be read as parquet"),
        (empty, r"part-1\.parquet"),
        (without_a_column, r"part-1\.parquet has no column 'rating'"),
        (lists_for_ids, r"part-1\.parquet.*user_id"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_one_bad_file_among_many_is_named(
    tmp_path: Path, harm: Callable[[list[Path]], None], message: str, published: bool
) -> None:
    paths = write(tmp_path, columns_of(), columns_of(start=START + 10**8), columns_of(start=START + 2 * 10**8))
    if published:
        tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    harm(paths)
    refused(tmp_path, SourceError, message)


def test_a_file_that_vanishes_while_the_log_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write(tmp_path, columns_of(), columns_of(start=START + 10**8))
    read = stage.read_events_units

    def vanishing(job: stage.Job, places: tuple[int, int]) -> dict[str, Any]:
        paths[0].unlink(missing_ok=True)
        return read(job, places)

    monkeypatch.setattr(stage, "read_events_units", vanishing)
    refused(tmp_path, SourceError, r"part-0\.parquet")


def test_small_pieces_are_read_together_and_large_ones_alone() -> None:
    def unit(rows: int | None, size: int | None = None) -> Unit:
        return Unit(0, "f", 0, None, 0, rows, size)

    million = stage.PIECE_ROWS
    assert stage.groups_of_units([unit(million), unit(10), unit(10), unit(million - 5), unit(3)]) == [(0, 1), (1, 3), (3, 5)]
    assert stage.groups_of_units([unit(None, 10 << 30), unit(None, 100), unit(None, None), unit(0)]) == [(0, 1), (1, 4)]
    assert stage.groups_of_units([]) == []


def test_many_small_files_give_what_one_file_gives(tmp_path: Path) -> None:
    whole = columns_of(users=8, events=12)
    whole["rating"][5] = 9.0
    write(tmp_path / "a", whole)
    n = len(whole["user_id"])
    write(tmp_path / "b", *[{k: v[i : i + 4] for k, v in whole.items()} for i in range(0, n, 4)])
    one, many = (tiny.prepare_locally(config_of(tmp_path / f), tmp_path / f / "data") for f in ("a", "b"))
    assert one.manifest["rows"] == many.manifest["rows"] and one.manifest["test_sha256"] == many.manifest["test_sha256"]
    assert storage.read_table(one.path("store")).equals(storage.read_table(many.path("store")))
    [bad] = storage.read_table(many.path("quarantine")).to_pylist()
    assert bad["file"].endswith("part-1.parquet") and bad["__row__"] == (1 << 40) + 1


def test_bad_rows_are_set_aside_a_few_at_a_time_and_all_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = columns_of(users=8, events=30)
    log["rating"] = [9.0 if i % 3 == 0 else r for i, r in enumerate(log["rating"])]
    write(tmp_path, *[{k: v[i : i + 40] for k, v in log.items()} for i in range(0, 240, 40)])
    at_once = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5), tmp_path / "a")
    monkeypatch.setattr(stage, "BAD_ROWS", 20)
    bit_by_bit = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5), tmp_path / "b")
    assert len(storage.list_files(bit_by_bit.path("quarantine"))) > len(storage.list_files(at_once.path("quarantine"))) == 1
    assert bit_by_bit.manifest["rows"] == at_once.manifest["rows"] and at_once.manifest["rows"]["quarantined"] == 80
    a, b = (storage.read_table(d.path("quarantine")).sort_by([("__row__", "ascending")]) for d in (at_once, bit_by_bit))
    assert a.equals(b)


def test_ids_of_another_type_in_another_file_are_the_same_ids(tmp_path: Path) -> None:
    first, second = columns_of(), columns_of(start=START + 10**8)
    for columns in (first, second):
        columns["user_id"] = [u[1:] for u in columns["user_id"]]
    whole = tiny.prepare_locally(config_of(tmp_path), tmp_path / "a") if write(tmp_path, first, second) else None
    second["user_id"] = [int(u) for u in second["user_id"]]
    write(tmp_path, first, second)
    mixed = tiny.prepare_locally(config_of(tmp_path), tmp_path / "b")
    assert whole is not None and whole.manifest["rows"] == mixed.manifest["rows"]
    assert storage.read_table(mixed.path("store")).equals(storage.read_table(whole.path("store")))


def test_a_column_of_the_wrong_type_is_quarantined_row_by_row(tmp_path: Path) -> None:
    columns = columns_of()
    columns["rating"] = ["great" if i % 4 == 0 else str(r) for i, r in enumerate(columns["rating"])]
    write(tmp_path, columns)
    refused(tmp_path, DataError, r"12 of 48 rows .*rating is not a number.*part-0\.parquet")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_disk_that_is_full_is_named_and_leaves_what_was_published(tmp_path: Path) -> None:
    """The largest file that may be written is far smaller than what is written: as if the disk were full."""
    rng = np.random.default_rng(0)
    n = 200_000
    columns = {
        "user_id": [f"u{u}" for u in rng.integers(0, 500, n)],
        "item_id": [f"i{i}" for i in rng.integers(0, 5000, n)],
        "timestamp": START + np.arange(n) * 1000,
        "rating": rng.integers(1, 6, n).astype(float),
    }
    write(tmp_path, columns_of())
    published = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data").manifest
    write(tmp_path, columns)
    code = (
        "import resource, sys; from pathlib import Path; from tests.unit import test_bad_input as t; from tests import tiny\n"
        f"config = t.config_of(Path({str(tmp_path)!r}))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({200 << 10}, {200 << 10}))\n"
        f"tiny.prepare_locally(config, {str(tmp_path / 'data')!r})\n"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode != 0 and "StorageError" in done.stderr and "cannot be written" in done.stderr, done.stderr[-2000:]
    directory = storage.Directory(tmp_path / "data")
    assert directory.manifest == published
    directory.verify()
    assert not list((tmp_path / "data").rglob("_work"))  # a full disk is not left full


# --------------------------------------------------------------------------- times


def test_seconds_that_are_read_as_milliseconds_are_noticed(tmp_path: Path) -> None:
    write(tmp_path, columns_of(start=1_700_000_000, step=60))
    refused(tmp_path, DataError, r"look like seconds: set data\.time_unit: s")


def test_milliseconds_that_are_read_as_seconds_are_noticed(tmp_path: Path) -> None:
    write(tmp_path, columns_of())
    refused(tmp_path, DataError, r"outside 1970 to 2200 \(time_unit s\)", time_unit="s")


def test_times_as_text_are_refused_unless_they_are_said_to_be_iso_8601(tmp_path: Path) -> None:
    columns = columns_of()
    columns["timestamp"] = [str(np.datetime64(t, "ms")) + ("Z" if t % 7 else "+00:00") for t in columns["timestamp"]]
    write(tmp_path, columns)
    refused(tmp_path, DataError, "timestamp is not a number")
    data = tiny.prepare_locally(config_of(tmp_path, time_unit="iso"), tmp_path / "data")
    assert sorted(storage.read_table(data.path("events"))["timestamp"].to_pylist()) == columns_of()["timestamp"]


def test_events_of_the_future_are_quarantined_and_those_of_today_are_not(tmp_path: Path) -> None:
    now = time.time_ns() // 1_000_000
    columns = columns_of()
    columns["timestamp"][-2:] = [now - 1000, now + 3 * 86_400_000]
    write(tmp_path, columns)
    data = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    assert data.manifest["rows"]["reasons"] == {"timestamp is in the future": 1}


# --------------------------------------------------------------------------- sizes


@pytest.mark.slow
def test_one_user_with_a_million_events(tmp_path: Path) -> None:
    n = 1_000_000
    rng = np.random.default_rng(0)
    log = columns_of()
    giant = {
        "user_id": ["giant"] * n,
        "item_id": pa.array([f"i{i}" for i in range(7)]).take(pa.array(rng.integers(0, 7, n))),
        "timestamp": START + np.sort(rng.integers(0, 48 * 60_000, n)),
        "rating": rng.integers(1, 6, n).astype(float),
    }
    write(tmp_path, log, giant)
    data = tiny.prepare_locally(config_of(tmp_path, protocol="time", same_time="order", max_bad_share=0.2), tmp_path / "data")
    rows = data.manifest["rows"]
    assert rows["users"] == 7 and rows["read"] == n + 48 == rows["events"] + rows["quarantined"]
    assert rows["train_targets"] + rows["valid_targets"] + rows["test_targets"] == rows["events"]
    test = storage.read_table(data.path("windows", "test"), ["user_id", "seen_item"])
    seen = [len(s) for u, s in zip(test["user_id"].to_pylist(), test["seen_item"].to_pylist(), strict=True) if u == "giant"]
    assert len(seen) > 50_000 and sum(seen) < n  # what came before is listed once, not at every moment


def test_one_item_with_half_of_all_events(tmp_path: Path) -> None:
    columns = columns_of(users=20, events=20)
    columns["item_id"] = ["i0" if n % 2 else i for n, i in enumerate(columns["item_id"])]
    write(tmp_path, columns)
    data = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    catalogue = storage.read_table(data.path("catalogue.parquet")).to_pylist()
    count = {r["item_id"]: r["count"] for r in catalogue}
    assert count["i0"] > 0.5 * sum(count.values()) and sum(count.values()) == data.manifest["rows"]["train_targets"]


def test_an_empty_split_is_an_empty_split(tmp_path: Path) -> None:
    """Users of two events have nothing to leave out."""
    write(tmp_path, columns_of(users=5, events=2))
    data = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    rows = data.manifest["rows"]
    assert (rows["valid_windows"], rows["test_windows"], rows["train_targets"]) == (0, 0, 10)
    assert len(storage.read_table(data.path("windows", "test"))) == 0


# --------------------------------------------------------------------------- ids


ODD = [
    "",
    " ",
    "\0",
    "a\0b",
    "é",
    "e\u0301",
    "\u202eabc",
    "🙂👩‍👩‍👧",
    "a,b\n\"c'",
    "NaN",
    "null",
    "0",
    "00",
    "1e3",
    "ñ" * 300,
    "\U0010ffff",
]


def test_ids_of_any_unicode_stay_themselves(tmp_path: Path) -> None:
    columns = columns_of(users=16, events=6)
    odd = [o or "(not empty)" for o in ODD]
    columns["user_id"] = [odd[int(u[1:])] for u in columns["user_id"]]
    columns["item_id"] = [odd[(n * 7) % 16] for n in range(len(columns["item_id"]))]
    write(tmp_path, columns)
    data = tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    assert data.manifest["rows"]["quarantined"] == 0
    store = storage.read_table(data.path("store"))
    assert sorted(store["user_id"].to_pylist()) == sorted(odd)
    known = set(storage.read_table(data.path("catalogue.parquet"))["item_id"].to_pylist())
    assert known == set(columns["item_id"])


def test_users_whose_hashes_collide_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, columns_of())
    plain = tiny.prepare_locally(config_of(tmp_path), tmp_path / "a")
    monkeypatch.setattr(partition, "hash_ids", lambda ids: np.zeros(len(ids), np.uint64))
    collided = tiny.prepare_locally(config_of(tmp_path), tmp_path / "b")
    assert len(storage.list_files(collided.path("store"))) == 1
    for kind in ("store", "windows/train", "windows/test"):
        a, b = (storage.read_table(d.path(kind)).sort_by([("user_id", "ascending")]) for d in (plain, collided))
        assert repr(a.to_pylist()) == repr(b.to_pylist())


def test_an_unknown_item_whose_hash_is_that_of_a_known_one_is_an_item_without_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, columns_of())
    (tmp_path / "items.csv").write_text("item_id,name\n" + "".join(f"i{i},Thing {i}\n" for i in range(6)))
    items = {"items": {"format": "csv", "path": str(tmp_path / "items.csv")}, "text": {"template": "{name}", "title": "name"}}
    plain = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5, **items), tmp_path / "a")
    assert set(plain.manifest["rows"]["reasons"]) == {"item_id is not in the items table"}
    from mtrec_ray.data import validate

    for module in (stage, validate):
        monkeypatch.setattr(module, "hash_ids", lambda ids: np.ones(len(ids), np.uint64))
    collided = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5, **items), tmp_path / "b")
    assert collided.manifest["rows"]["quarantined"] == 0
    stranger = next(r for r in storage.read_table(collided.path("catalogue.parquet")).to_pylist() if r["item_id"] == "i6")
    assert stranger["text"] is None and stranger["title"] == "i6"
