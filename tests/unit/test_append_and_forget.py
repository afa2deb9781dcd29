"""Days appended after a user was forgotten, other keys, other tables, and writers that meet: nothing goes wrong in silence."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_ray import lock, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data import lineage
from mtrec_ray.data.forget import forget
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.partition import user_partition
from mtrec_ray.data.sources import SourceError
from mtrec_ray.privacy import PseudonymKeyError, Pseudonyms
from mtrec_ray.storage import StorageError
from tests import tiny
from tests.unit import test_long
from tests.unit.test_append import append, config_of, decoded, write_days

KINDS = ("windows/train", "windows/valid", "windows/test", "store", "events")


def long_config(folder: Path, unmatched: str = "keep", **data: Any) -> RunConfig:
    interactions = tiny.raw_config(folder)["data"]["interactions"] | {"path": str(folder / "long")}
    return config_of(folder, interactions=interactions, long=test_long.long_section(request="request", unmatched=unmatched), **data)


def without_last_file(folder: Path) -> tuple[Path, str]:
    """Take the last day's file away -> it and its text."""
    file = sorted(folder.glob("*.csv"))[-1]
    text = file.read_text()
    file.unlink()
    return file, text


# --------------------------------------------------------------------------- forgetting, then a day


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["time", "user_holdout"])
@pytest.mark.parametrize("kind", ["wide", "long"])
def test_a_day_joins_data_without_a_forgotten_user_as_if_the_user_had_never_been(tmp_path: Path, kind: str, protocol: str) -> None:
    if kind == "long":
        tiny.write_log(tmp_path)
        test_long.write_long_log(tmp_path)
    else:
        write_days(tmp_path, 3)
    config = (config_of if kind == "wide" else long_config)(tmp_path, protocol=protocol, partitions=8)
    folder = tmp_path / ("log" if kind == "wide" else "long")
    file, text = without_last_file(folder)
    tiny.prepare_locally(config, tmp_path / "run" / "data")
    forget(str(tmp_path / "run"), ["u7"])
    kept = storage.Directory(tmp_path / "run" / "data").manifest["rows"]
    # u7's partition has no new row
    lines = text.splitlines()
    other = next(u for u in ("u1", "u2", "u3", "u4") if _partition(u) != _partition("u7"))
    file.write_text("\n".join([lines[0], *(line for line in lines if line.startswith(f"{other},"))]) + "\n")
    grown = append(config, tmp_path / "run" / "data")
    (tmp_path / "anew").mkdir()
    shutil.copy(tmp_path / "run" / "data" / "forgotten.json", tmp_path / "anew" / "forgotten.json")
    anew = tiny.prepare_locally(config, tmp_path / "anew")
    rows, expected = grown.manifest["rows"], anew.manifest["rows"]
    for key in (
        "events",
        "users",
        "train_windows",
        "train_targets",
        "valid_targets",
        "test_targets",
        "read",
        *(() if kind == "wide" else ("matched",)),
    ):
        assert rows[key] == expected[key], key
    assert kept["train_targets"] + kept["valid_targets"] + kept["test_targets"] == kept["events"]
    for name in KINDS:
        assert repr(decoded(grown, name).to_pylist()) == repr(decoded(anew, name).to_pylist()), name


def _partition(user: str, partitions: int = 8) -> int:
    return int(user_partition([user], partitions)[0])


def test_a_forgotten_id_is_not_even_in_the_dictionaries_of_the_files(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    tiny.prepare_locally(config_of(tmp_path), tmp_path / "run" / "data")
    forget(str(tmp_path / "run"), ["u7"])
    data = storage.Directory(tmp_path / "run" / "data")
    for path in storage.list_files(data.path("events")):
        for chunk in pq.read_table(path)["user_id"].chunks:
            assert "u7" not in chunk.dictionary.to_pylist()


def test_a_forgetting_that_was_cut_short_is_finished_before_a_day_is_appended(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path)
    file, text = without_last_file(tmp_path / "log")
    published = tiny.prepare_locally(config, tmp_path / "run" / "data").manifest
    storage.write_json(tmp_path / "run" / "data" / "forgotten.json", {"users": [lineage.forgotten_hash("u7")]})
    file.write_text(text)
    with pytest.raises(DataError, match=r"jobs\.forget"):
        append(config, tmp_path / "run" / "data")
    assert storage.Directory(tmp_path / "run" / "data").manifest == published


@pytest.mark.slow
def test_bundles_of_data_that_were_prepared_anew_since_are_listed(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    old = tiny.prepare_locally(config_of(tmp_path), tmp_path / "run" / "data").manifest
    bundle = storage.Directory(tmp_path / "run" / "bundle")
    storage.write_json(storage.join(bundle.begin("b" * 64), "x.json"), {})
    bundle.publish("b" * 64, kind="bundle", fingerprint="f" * 64, data=old["inputs"])
    tiny.prepare_locally(config_of(tmp_path, window=9), tmp_path / "run" / "data")
    assert forget(str(tmp_path / "run"), ["u7"]).bundles == [f"{tmp_path}/run/bundle (ffffffffffff)"]


# --------------------------------------------------------------------------- pseudonyms


def test_a_day_is_not_appended_with_another_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path, pseudonyms={"key_env": "MTREC_TEST_KEY"})
    file, text = without_last_file(tmp_path / "log")
    monkeypatch.setenv("MTREC_TEST_KEY", "x" * 16)
    published = tiny.prepare_locally(config, tmp_path / "data").manifest
    file.write_text(text)
    monkeypatch.setenv("MTREC_TEST_KEY", "y" * 16)
    with pytest.raises(PseudonymKeyError, match="every user would be unknown"):
        append(config, tmp_path / "data")
    assert storage.Directory(tmp_path / "data").manifest == published


@pytest.mark.slow
@pytest.mark.parametrize("pseudonyms", [None, {"key_env": "MTREC_OTHER_KEY"}])
def test_a_forgotten_user_does_not_come_back_under_another_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pseudonyms: dict[str, str] | None
) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path, pseudonyms={"key_env": "MTREC_TEST_KEY"})
    monkeypatch.setenv("MTREC_TEST_KEY", "x" * 16)
    monkeypatch.setenv("MTREC_OTHER_KEY", "y" * 16)
    tiny.prepare_locally(config, tmp_path / "run" / "data")
    forget(str(tmp_path / "run"), [Pseudonyms(b"x" * 16).one("u7")])
    with pytest.raises(PseudonymKeyError, match=r"forgotten\.json"):
        tiny.prepare_locally(config_of(tmp_path, pseudonyms=pseudonyms), tmp_path / "run" / "data")


# --------------------------------------------------------------------------- what is appended to


def test_a_file_that_is_gone_since_is_refused(tmp_path: Path) -> None:
    files = write_days(tmp_path, 3)
    config = config_of(tmp_path)
    file, text = without_last_file(tmp_path / "log")
    tiny.prepare_locally(config, tmp_path / "data")
    file.write_text(text)
    files[0].unlink()
    with pytest.raises(DataError, match=r"part0\.csv is gone"):
        append(config, tmp_path / "data")


@pytest.mark.slow
def test_a_users_table_that_has_changed_reaches_all_windows(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path, protocol="user_holdout", partitions=8)
    data = tiny.prepare_locally(config, tmp_path / "data")
    last = max(storage.read_table(data.path("events"))["timestamp"].to_pylist())
    text = (tmp_path / "users.csv").read_text()
    swapped = text.replace(",even,", ",ODD,").replace(",odd,", ",even,").replace(",ODD,", ",odd,")
    (tmp_path / "users.csv").write_text(swapped)  # the classes stay
    (tmp_path / "log" / "part9.csv").write_text(f"user,item,ts,click,rating,device\nu3,i1,{last + 5},1,4,web\n")
    grown, anew = append(config, tmp_path / "data"), tiny.prepare_locally(config, tmp_path / "anew")
    assert repr(decoded(grown, "windows/train").to_pylist()) == repr(decoded(anew, "windows/train").to_pylist())


@pytest.mark.slow
def test_files_without_a_row_group_take_no_number_from_those_that_follow(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    tiny.write_features(tmp_path, files=3)
    first = tmp_path / "features" / "part0.parquet"
    with pq.ParquetWriter(tmp_path / "features" / "a.parquet", pq.read_schema(first)):
        pass
    assert pq.ParquetFile(tmp_path / "features" / "a.parquet").metadata.num_row_groups == 0
    interactions = tiny.raw_config(tmp_path)["data"]["interactions"] | {"format": "parquet", "path": str(tmp_path / "features")}
    config = config_of(tmp_path, interactions=interactions)
    at_once = tiny.prepare_locally(config, tmp_path / "once")
    last = tmp_path / "features" / "part2.parquet"
    content = last.read_bytes()
    last.unlink()
    tiny.prepare_locally(config, tmp_path / "data")
    last.write_bytes(content)
    grown = append(config, tmp_path / "data")
    assert repr(decoded(grown, "events").to_pylist()) == repr(decoded(at_once, "events").to_pylist())


@pytest.mark.slow
def test_unmatched_actions_of_before_stay_counted_and_a_partition_of_nothing_else_stays_one(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    test_long.write_long_log(tmp_path)
    config = long_config(tmp_path, "quarantine", partitions=64)
    head = (tmp_path / "long" / "part0.csv").read_text()
    columns, sample = head.splitlines()[0].split(","), next(line for line in head.splitlines() if ",click," in line)
    places = {_partition(f"u{u}", 64) for u in range(24)}
    alone = next(name for name in map(str, range(99)) if _partition(name, 64) not in places)
    for user in (alone, "u3"):
        lone = [{"user": user, "request": "none"}.get(c, v) for c, v in zip(columns, sample.split(","), strict=True)]
        head += ",".join(lone) + "\n"
    (tmp_path / "long" / "part0.csv").write_text(head)
    at_once = tiny.prepare_locally(config, tmp_path / "once")
    file, text = without_last_file(tmp_path / "long")
    tiny.prepare_locally(config, tmp_path / "data")
    file.write_text(text)
    rows, expected = append(config, tmp_path / "data").manifest["rows"], at_once.manifest["rows"]
    assert rows["unmatched"] == expected["unmatched"] == 2 and rows["events"] == expected["events"]


@pytest.mark.slow
def test_a_file_that_arrives_while_the_log_is_listed_is_not_taken_for_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_days(tmp_path, 3)
    config = config_of(tmp_path)
    file, text = without_last_file(tmp_path / "log")
    covered = lineage.covered

    def late(*arguments: Any, **named: Any) -> Any:
        file.write_text(text)
        return covered(*arguments, **named)

    monkeypatch.setattr(lineage, "covered", late)
    before = tiny.prepare_locally(config, tmp_path / "data").manifest["rows"]["read"]
    monkeypatch.setattr(lineage, "covered", covered)
    assert tiny.prepare_locally(config, tmp_path / "data").manifest["rows"]["read"] > before


# --------------------------------------------------------------------------- writers


def test_two_writers_of_one_root_do_not_meet(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    with lock.only_writer(tmp_path / "run" / "data"), pytest.raises(StorageError, match="another job is writing"):
        tiny.prepare_locally(config_of(tmp_path), tmp_path / "run" / "data")
    tiny.prepare_locally(config_of(tmp_path), tmp_path / "run" / "data")
    with lock.only_writer(tmp_path / "run" / "data"), pytest.raises(StorageError, match="another job is writing"):
        forget(str(tmp_path / "run"), ["u7"])


@pytest.mark.slow
def test_a_manifest_of_another_version_is_made_anew_and_not_appended_to(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    config = config_of(tmp_path)
    data = tiny.prepare_locally(config, tmp_path / "data")
    storage.write_json(tmp_path / "data" / "manifest.json", data.manifest | {"schema_version": 0})
    with pytest.raises(StorageError, match="schema_version 0"):
        append(config, tmp_path / "data")
    assert tiny.prepare_locally(config, tmp_path / "data").manifest["schema_version"] == storage.SCHEMA_VERSION
    (tmp_path / "data" / "manifest.json").write_text("{")
    tiny.prepare_locally(config, tmp_path / "data").verify()


@pytest.mark.slow
def test_a_root_that_looks_like_a_partition_adds_no_column_to_the_catalogue(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    plain = tiny.prepare_locally(config_of(tmp_path), tmp_path / "plain")
    odd = tiny.prepare_locally(config_of(tmp_path), tmp_path / "a run, é" / "rate=0.1" / "data")
    assert pq.read_schema(odd.path("catalogue.parquet")).names == pq.read_schema(plain.path("catalogue.parquet")).names


def test_a_doubled_user_is_named_unless_ids_are_sensitive(tmp_path: Path) -> None:
    write_days(tmp_path, 2)
    with open(tmp_path / "users.csv", "a") as file:
        file.write("u7,even,30\n")
    with pytest.raises(SourceError, match="'u7' occurs more than once"):
        tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    with pytest.raises(SourceError, match="occurs more than once") as refused:
        tiny.prepare_locally(config_of(tmp_path, sensitive=["user_id"]), tmp_path / "data")
    assert "u7" not in str(refused.value)


@pytest.mark.parametrize("secret", [{"sensitive": ["age"]}, {"pseudonyms": {"key_env": "MTREC_TEST_KEY"}}])
def test_a_broken_row_of_the_users_table_is_not_quoted_where_it_may_hold_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: dict[str, Any]
) -> None:
    monkeypatch.setenv("MTREC_TEST_KEY", "x" * 16)
    write_days(tmp_path, 2)
    with open(tmp_path / "users.csv", "a") as file:
        file.write("u777,even,4711,more\n")
    with pytest.raises(SourceError, match="4711"):
        tiny.prepare_locally(config_of(tmp_path), tmp_path / "data")
    with pytest.raises(SourceError, match="another number of columns") as refused:
        tiny.prepare_locally(config_of(tmp_path, **secret), tmp_path / "data")
    assert "u777" not in str(refused.value) and "4711" not in str(refused.value)


def test_a_manifest_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_json(tmp_path / "manifest.json", {"old": 1})
    linked = tmp_path / "linked"
    os.link(tmp_path / "manifest.json", linked)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.write_json(tmp_path / "manifest.json", {"new": 2})
    monkeypatch.undo()
    assert storage.read_json(tmp_path / "manifest.json") == {"old": 1} and len(list(tmp_path.iterdir())) == 2
    storage.write_json(tmp_path / "manifest.json", {"new": 2})
    assert storage.read_json(linked) == {"old": 1}


def test_a_copy_that_meets_another_attempts_link_leaves_the_source_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source.parquet", tmp_path / "target.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), source)
    os.link(source, target)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)  # the other attempt links it between the two steps
    storage.copy(str(source), str(target))
    assert pq.read_table(source).num_rows == 2 == pq.read_table(target).num_rows
