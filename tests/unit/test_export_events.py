"""Kept events as files of the log, and what a forgotten user leaves in the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs import export_events as job
from jobs import forget as forget_job
from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data.prepare import prepare
from mtrec_ray.serving import export
from mtrec_ray.serving.export import ExportError, check_log
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.settings import StoreSettings, open_store
from mtrec_ray.serving.store import EventRules
from tests import tiny

Made = tuple[Path, RunConfig]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A run of a Parquet log with features of every kind."""
    tiny.write_log(tmp_path)
    tiny.write_features(tmp_path)

    def change(raw: dict[str, Any]) -> None:
        tiny.with_features(tmp_path)(raw)
        del raw["data"]["context"]["price_band"], raw["data"]["interactions"]["columns"]["price_band"]

    config = tiny.make_config(tmp_path, change)
    data = tiny.prepare_locally(config, tmp_path / "run" / "data")
    tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / "run" / "bundle")
    return tmp_path, config


def keep(made: Made, *events: dict[str, Any]) -> None:
    from mtrec_ray import bundle

    predictor = bundle.load(str(made[0] / "run" / "bundle"))
    store = open_store(StoreSettings(), str(made[0] / "run" / "data"), predictor)
    rules = EventRules(predictor.config, predictor.schema)
    assert store is not None
    store.append(
        [rules.check("", e["user"], e["item"], e["time"], e.get("id"), e["actions"], e.get("context", {}), 2**41) for e in events]
    )
    store.close()


LATER = 1_710_000_000_000


def test_kept_events_become_rows_that_append_reads(
    made: Made, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = made
    keep(
        made,
        {
            "user": "u1",
            "item": "i3",
            "time": LATER,
            "actions": {"click": 1, "rating": 4},
            "context": {"price": 2.5, "tags": ["even", "t1"]},
        },
        {"user": "u1", "item": "i4", "time": LATER + 1, "actions": {"click": 0}},
        {"user": "fresh", "item": "i5", "time": LATER, "actions": {"click": 1}, "context": {"device": "web"}},
    )
    arguments = ["--run", str(folder / "run"), "--to", str(folder / "features")]
    assert job.main(arguments) == 0 and "exported: 3 events" in capsys.readouterr().out
    [file] = sorted((folder / "features").glob("live-*.parquet"))
    rows = pq.read_table(file).to_pylist()
    assert rows[0] | {"device": None} == {
        "user": "u1", "item": "i3", "ts": LATER, "click": 1.0, "rating": 4.0, "device": None, "price": 2.5, "tags": ["even", "t1"],
        "position": None, "propensity": None,
    }  # fmt: skip
    assert job.main(arguments) == 0 and "exported: 0 events" in capsys.readouterr().out
    monkeypatch.setattr("mtrec_ray.runtime.for_each", tiny.in_this_process)
    before = storage.Directory(str(folder / "run" / "data")).manifest["rows"]
    prepare(config, str(folder / "run" / "data"), True)
    after = storage.Directory(str(folder / "run" / "data")).manifest["rows"]
    assert after["events"] == before["events"] + 3
    assert after["users"] == before["users"] + 1
    history = PreparedHistories(str(folder / "run" / "data")).get("u1")
    assert history is not None and history.item_ids[-1] == "i3" and history.times[-1] == LATER
    # the service that starts with the new data has each of them once
    from mtrec_ray import bundle

    store = open_store(StoreSettings(), str(folder / "run" / "data"), bundle.load(str(folder / "run" / "bundle")))
    assert store is not None
    found = store.get("u1")
    assert found is not None and list(found.history.times).count(LATER) == 1


def test_an_export_that_was_killed_writes_the_same_file_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = made
    keep(made, *[{"user": "u1", "item": "i3", "time": LATER + n, "actions": {"click": 1}} for n in range(5)])
    arguments = ["--run", str(folder / "run"), "--to", str(folder / "out")]
    monkeypatch.setattr(export, "AT_ONCE", 2)
    real, calls = storage.write_json, []

    def killed(uri: Any, value: Any) -> None:
        calls.append(value)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(uri, value)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            job.main(arguments)
    assert job.main(arguments) == 0
    times = [t for p in sorted((folder / "out").glob("live-*.parquet")) for t in pq.read_table(p)["ts"].to_pylist()]
    assert times == [LATER + n for n in range(5)]


def test_another_store_is_refused_and_loses_nothing(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    keep(made, *[{"user": "u1", "item": "i3", "time": LATER + n, "actions": {"click": 1}} for n in range(5)])
    arguments = ["--run", str(folder / "run"), "--to", str(folder / "out"), "--lists", str(folder / "lists")]
    assert job.main(arguments) == 0
    for file in (folder / "run" / "live").iterdir():  # it was lost, and the service began another
        file.unlink()
    keep(made, *[{"user": "u2", "item": "i3", "time": LATER + n, "actions": {"click": 1}} for n in range(7)])
    capsys.readouterr()
    assert job.main(arguments) == 2 and "came from another store" in capsys.readouterr().err
    (folder / "out" / "_live.json").unlink()
    assert job.main(arguments) == 0 and "exported: 7 events" in capsys.readouterr().out
    rows = [r for p in (folder / "out").glob("live-*.parquet") for r in pq.read_table(p)["user"].to_pylist()]
    assert sorted(rows) == ["u1"] * 5 + ["u2"] * 7
    assert job.main([*arguments, "--store", str(folder / "nowhere.sqlite")]) == 2
    assert "there is no such file" in capsys.readouterr().err and not (folder / "nowhere.sqlite").exists()


def test_a_log_that_live_events_are_no_rows_of_is_refused(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    with pytest.raises(ExportError, match=r"data\.interactions\.format is csv"):
        check_log(tiny.make_config(tmp_path))


def test_a_forgotten_user_leaves_the_live_histories_too(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    keep(made, {"user": "u1", "item": "i3", "time": LATER, "actions": {"click": 1}})
    keep(made, {"user": "u2", "item": "i3", "time": LATER, "actions": {"click": 1}})
    assert forget_job.main(["--run", str(folder / "run"), "--user", "u1"]) == 0
    assert "live histories: " in capsys.readouterr().out
    for file in (folder / "run" / "live").iterdir():
        assert b"u1\x00" not in file.read_bytes()
    from mtrec_ray import bundle

    store = open_store(StoreSettings(), str(folder / "run" / "data"), bundle.load(str(folder / "run" / "bundle")))
    assert store is not None and store.get("u1") is None and store.get("u2") is not None
    assert {e.user_id for _, e in store.log(0, 10)} == {"u2"}


def show(made: Made, *lists: ShownList) -> None:
    from mtrec_ray import bundle

    store = open_store(StoreSettings(), str(made[0] / "run" / "data"), bundle.load(str(made[0] / "run" / "bundle")))
    assert store is not None
    store.keep_impressions(lists)
    store.close()


@pytest.mark.slow
def test_shown_lists_become_rows_and_what_nobody_clicked_becomes_zeros(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, config = made
    tasks = [{"click": 0.5}, {"click": 0.25}]
    show(
        made,
        ShownList("u1", "r1", LATER, "b1", ["i3", "i4"], [2.0, 1.0], [0.75, 1.0], tasks),
        ShownList("u2", "r2", LATER, "b1", ["i3", "i5"], [2.0, 1.0], [1.0, 1.0], tasks),
    )
    keep(made, {"user": "u1", "item": "i3", "time": LATER + 60_000, "actions": {"click": 1}},
         {"user": "u2", "item": "i3", "time": LATER + 7_200_000, "actions": {"click": 1}})  # fmt: skip
    run = ["--run", str(folder / "run")]
    assert job.main([*run, "--lists", str(folder / "shown")]) == 0 and "2 lists" in capsys.readouterr().out
    [file] = sorted((folder / "shown").glob("shown-*.parquet"))
    rows = pq.read_table(file).to_pylist()
    assert [(r["request_id"], r["item_id"], r["position"], r["propensity"]) for r in rows] == [
        ("r1", "i3", 1, 0.75), ("r1", "i4", 2, 1.0), ("r2", "i3", 1, 1.0), ("r2", "i5", 2, 1.0),
    ]  # fmt: skip
    assert rows[1]["tasks"] == [("click", 0.25)] and rows[0]["bundle"] == "b1"
    arguments = [*run, "--to", str(folder / "features"), "--unanswered", "click"]
    assert job.main(arguments) == 0 and "3 shown items without click" in capsys.readouterr().out
    [file] = sorted((folder / "features").glob("unanswered-*.parquet"))
    rows = pq.read_table(file).to_pylist()
    assert [(r["user"], r["item"], r["click"], r["position"], r["propensity"]) for r in rows] == [
        ("u1", "i4", 0.0, "2", 1.0), ("u2", "i3", 0.0, "1", 1.0), ("u2", "i5", 0.0, "2", 1.0),
    ]  # fmt: skip
    data = tiny.prepare_locally(config, folder / "again")  # the log with these files is one that preparation reads
    history = PreparedHistories(data.root).get("u1")
    assert history is not None and "i4" not in history.item_ids[-1:]  # nobody clicked it: it is no history
    assert job.main(arguments) == 0 and "0 shown items" in capsys.readouterr().out  # each list once
    assert job.main([*run, "--to", str(folder / "features"), "--unanswered", "rating"]) == 2
    assert "no binary label" in capsys.readouterr().err
    assert job.main(run) == 2 and "nothing is asked for" in capsys.readouterr().err


def test_a_list_is_not_judged_before_its_time_has_passed(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = made
    now = time.time_ns() // 1_000_000
    show(made, ShownList("u1", "r1", now, "b1", ["i3"], [2.0], [1.0], [{}]))
    arguments = ["--run", str(folder / "run"), "--to", str(folder / "features"), "--unanswered", "click"]
    assert job.main(arguments) == 0 and "0 shown items" in capsys.readouterr().out
    assert job.main([*arguments, "--within-minutes", "0"]) == 0 and "1 shown items" in capsys.readouterr().out


def test_all_prepared_histories_are_in_the_store_at_once_and_once(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs import load_histories
    from mtrec_ray.serving.sqlite_store import SqliteStore

    folder, _ = made
    keep(made, {"user": "u1", "item": "i3", "time": LATER, "actions": {"click": 1}})
    for _ in range(2):
        assert load_histories.main(["--run", str(folder / "run")]) == 0 and "loaded: 24 users" in capsys.readouterr().out
    prepared = PreparedHistories(str(folder / "run" / "data"))
    store = SqliteStore(folder / "run" / "live" / "histories.sqlite", ["click", "rating"], [], 14)  # it knows no prepared data
    for user in prepared.user_ids():
        found, expected = store._read(user)[0], prepared.get(user)
        assert found is not None and expected is not None
        assert list(found.history.item_ids) == [*expected.item_ids, *(["i3"] if user == "u1" else [])][-14:]
    assert load_histories.main(["--run", str(folder / "nothing")]) == 2 and "nothing" in capsys.readouterr().err
