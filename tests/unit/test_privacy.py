"""Pseudonyms, sensitive columns, and forgetting a user."""

from __future__ import annotations

import hashlib
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import forget as forget_job
from mtrec_ray import storage
from mtrec_ray.config import ConfigError, PseudonymConfig, RunConfig
from mtrec_ray.data.forget import forget
from mtrec_ray.privacy import PseudonymKeyError, Pseudonyms
from mtrec_ray.scoring.shards import Output, verify
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.training.worker import mapped_windows, window_cache
from tests import tiny
from tests.unit.test_append import append

KEY = "a key of 24 bytes, or so"
ENV = PseudonymConfig(key_env="MTREC_TEST_KEY")


def config_of(folder: Path, **data: Any) -> RunConfig:
    return tiny.make_config(folder, lambda raw: raw["data"].update(data))


def every_byte(root: Path) -> bytes:
    """All that a directory's files say, Parquet decoded."""
    found = b""
    for path in root.rglob("*"):
        if path.is_file():
            found += repr(pq.read_table(path).to_pylist()).encode() if path.suffix == ".parquet" else path.read_bytes()
    return found


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MTREC_TEST_KEY", KEY)
    return KEY


# --------------------------------------------------------------------------- pseudonyms


def test_a_pseudonym_depends_on_the_id_and_on_the_key() -> None:
    one, other = Pseudonyms(b"x" * 16), Pseudonyms(b"y" * 16)
    assert one.one("u1") == Pseudonyms(b"x" * 16).one("u1") != one.one("u2")
    assert one.one("u1") != other.one("u1") and one.fingerprint != other.fingerprint
    assert one.one("u1") == hashlib.blake2b(b"u1", key=b"x" * 16, digest_size=16).hexdigest()


def test_a_column_becomes_what_its_ids_become_and_missing_stays_missing() -> None:
    p = Pseudonyms(b"x" * 16)
    found = p.column(pa.chunked_array([["a", None, "é\0☃"], ["a"]], pa.string())).to_pylist()
    assert found == [p.one("a"), None, p.one("é\0☃"), p.one("a")]


def test_a_key_survives_the_way_to_a_worker_and_shows_itself_to_nobody() -> None:
    p = Pseudonyms(b"secret secret 16")
    assert pickle.loads(pickle.dumps(p)).one("a") == p.one("a") and "secret" not in repr(p)


@pytest.mark.parametrize(
    ("config", "value", "message"),
    [
        (ENV, None, "environment variable MTREC_TEST_KEY is not set"),
        (ENV, "short", "has 5 bytes; it needs 16 to 64"),
        (PseudonymConfig(key_file="/nowhere/key"), None, "/nowhere/key cannot be read"),
    ],
)
def test_a_missing_or_weak_key_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: PseudonymConfig, value: str | None, message: str
) -> None:
    monkeypatch.delenv("MTREC_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MTREC_TEST_KEY", value)
    with pytest.raises(PseudonymKeyError, match=message):
        Pseudonyms.load(config)


def test_another_key_than_the_datas_is_refused(key: str) -> None:
    with pytest.raises(PseudonymKeyError, match="every user would be unknown"):
        Pseudonyms.load(ENV, Pseudonyms(b"z" * 16).fingerprint)


def test_the_key_of_a_file_is_the_same_as_that_of_the_environment(key: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(key + "\n")
    assert Pseudonyms.load(PseudonymConfig(key_file=str(tmp_path / "key"))).fingerprint == Pseudonyms.load(ENV).fingerprint


@pytest.mark.slow
def test_prepared_data_hold_pseudonyms_and_neither_ids_nor_the_key(key: str, tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    with open(tmp_path / "log" / "part0.csv", "a") as file:
        file.write("u7,i1,soon,1,,web\nu7,i1\n")
    plain = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5), tmp_path / "plain")
    data = tiny.prepare_locally(config_of(tmp_path, max_bad_share=0.5, pseudonyms={"key_env": "MTREC_TEST_KEY"}), tmp_path / "data")
    p = Pseudonyms.load(ENV)
    store = PreparedHistories(str(tmp_path / "data"))
    original = PreparedHistories(str(tmp_path / "plain"))
    assert len(store.user_ids()) == 24 and set(store.user_ids()) == {p.one(u) for u in original.user_ids()}
    assert repr(store.get(p.one("u7"))) == repr(original.get("u7"))
    said = every_byte(tmp_path / "data")
    assert key.encode() not in said
    assert not [u for u in original.user_ids() if f"'{u}'".encode() in said]
    assert b"u7,i1" in every_byte(tmp_path / "plain") and b"u7,i1" not in said
    assert data.manifest["pseudonym_key"] == p.fingerprint and plain.manifest["pseudonym_key"] is None
    # profiles still meet their users: the users table is hashed the same way
    assert data.manifest["rows"]["users_without_attributes"] == 0


# --------------------------------------------------------------------------- sensitive columns


def test_values_of_sensitive_columns_reach_neither_quarantine_nor_messages(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    with open(tmp_path / "log" / "part0.csv", "a") as file:
        file.write("u7,i1,soon,1,4.125,secretdevice\n" * 1000 + "u7,i1,5,secretdevice\n")
    with pytest.raises(ValueError, match="not a number") as refused:
        tiny.prepare_locally(config_of(tmp_path, sensitive=["rating", "device", "user_id"]), tmp_path / "data")
    assert "4.125" not in str(refused.value) and "secretdevice" not in str(refused.value) and "u7" not in str(refused.value)
    said = every_byte(tmp_path / "data")
    assert b"(withheld)" in said and b"4.125" not in said and b"secretdevice" not in said


def test_sensitive_covers_all_names_of_a_column_and_what_is_made_of_it(tmp_path: Path) -> None:
    data = config_of(tmp_path, sensitive=["rating", "age"]).data
    assert {"rating", "like", "age", "age_group"} <= data.sensitive_names and "click" not in data.sensitive_names


def test_a_sensitive_name_that_is_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.sensitive: \['agee'\]"):
        config_of(tmp_path, sensitive=["agee"])


@pytest.mark.slow
def test_slices_are_not_named_after_sensitive_values(tmp_path: Path) -> None:
    from mtrec_ray.evaluation.measure import Moments, facts_of
    from mtrec_ray.evaluation.reduce import slices_of
    from mtrec_ray.training.feed import WindowCache

    tiny.write_log(tmp_path)
    found = {}
    for sensitive in ([], ["taste"]):
        config = config_of(tmp_path, sensitive=sensitive)
        data = tiny.prepare_locally(config, tmp_path / f"data{len(sensitive)}")
        predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / f"bundle{len(sensitive)}")
        cache = WindowCache.from_table(storage.read_table(data.path("windows", "test")))
        moments = Moments.of(predictor.schema, cache, np.arange(len(cache)))
        found[len(sensitive)] = {n.partition("=")[0] for n in slices_of(predictor, facts_of(predictor, moments, False), set())}
    assert "taste" in found[0] and "taste" not in found[1] and "age_group" in found[1]


# --------------------------------------------------------------------------- forgetting


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with prepared data, a published bundle and top lists."""
    tiny.write_log(tmp_path)
    with open(tmp_path / "log" / "part0.csv", "a") as file:
        file.write("u7,i1,soon,1,,web\nu7,i1\nu8,i1,soon,1,,web\n")
    data = tiny.prepare_locally(config_of(tmp_path), tmp_path / "run" / "data")
    bundle = storage.Directory(tmp_path / "run" / "bundle")
    storage.write_json(storage.join(bundle.begin("b" * 64), "x.json"), {})
    bundle.publish("b" * 64, kind="bundle", fingerprint="f" * 64, data=data.manifest["inputs"])
    users = storage.read_table(data.path("store"))["user_id"]
    scores = Output(str(tmp_path / "run" / "scores"), {"k": 1})
    table = pa.table({"user_id": users, "rank": [1] * len(users)})
    scores.write("part-00000", [table], lambda: {"users": len(users), "fallbacks": 0, "seconds": {}})
    scores.publish(["part-00000"])
    return tmp_path


def test_a_forgotten_user_is_in_no_file_of_the_run(run: Path) -> None:
    assert b"'u7'" in every_byte(run / "run") and b"u7,i1" in every_byte(run / "run")
    before = storage.Directory(run / "run" / "data").manifest
    found = forget(str(run / "run"), ["u7"])
    said = every_byte(run / "run")
    assert b"'u7'" not in said and b"u7,i1" not in said and b"'u8'" in said
    directory = storage.Directory(run / "run" / "data")
    directory.verify()
    assert found.rows["scores"] == 1 and found.rows["store"] == 1 and found.rows["quarantine"] == 2
    rows, old = directory.manifest["rows"], before["rows"]
    assert rows["users"] == old["users"] - 1 and rows["events"] + found.rows["events"] == old["events"]
    assert rows["events"] + rows["quarantined"] + rows["forgotten"] == rows["read"] == old["read"]
    assert PreparedHistories(str(run / "run" / "data")).get("u7") is None
    assert verify(str(run / "run" / "scores"))["rows"] == 23


def test_a_forgotten_user_leaves_the_lists_of_all_nights_and_their_bundles_are_told(run: Path) -> None:
    folder, nights = run / "run", [{"name": "2026-01-01-a"}, {"name": "2026-01-02-b"}]
    storage.write_json(str(folder / "nightly.json"), {"nights": nights, "serving": ""})
    places = [folder / "nights" / "2026-01-01-a", folder / "nights" / "2026-01-02-b" / "incumbent"]
    for place in places:
        shutil.copytree(folder / "scores", place / "scores")
        shutil.copytree(folder / "bundle", place / "bundle")
    found = forget(str(folder), ["u7"])
    assert b"'u7'" not in every_byte(folder) and found.rows["scores"] == 3
    assert [b.removeprefix(str(folder)).split("/bundle")[0] for b in found.bundles] == [
        "",
        *(str(p).removeprefix(str(folder)) for p in places),
    ]


def test_the_machines_copies_of_windows_go_too_also_those_of_data_before_an_append(run: Path) -> None:
    folders = []
    for again in (False, True):
        if again:
            (run / "log" / "part9.csv").write_text("user,item,ts,click,rating,device\nu3,i1,1800000000000,1,4,web\n")
            append(config_of(run), run / "run" / "data")
        prefix = storage.Directory(run / "run" / "data").prefix
        for split in ("train", "valid"):
            mapped_windows(prefix, split)
            folders.append(window_cache(prefix, split))
    assert len(set(folders)) == 4 and all(f.exists() for f in folders)
    forget(str(run / "run"), ["u7"])
    assert not any(f.exists() for f in folders)


def test_the_bundles_that_were_trained_with_the_user_are_listed(run: Path) -> None:
    assert forget(str(run / "run"), ["u7"]).bundles == [f"{run}/run/bundle (ffffffffffff)"]
    # another user's events were in the same data, by another name now
    assert forget(str(run / "run"), ["u8"]).bundles == [f"{run}/run/bundle (ffffffffffff)"]


def test_the_next_preparation_leaves_a_forgotten_user_out_and_training_begins_anew(run: Path) -> None:
    before = storage.Directory(run / "run" / "data").manifest
    forget(str(run / "run"), ["u7"])
    kept = storage.Directory(run / "run" / "data").manifest
    assert kept["inputs"] != before["inputs"]
    again = tiny.prepare_locally(config_of(run), run / "run" / "data").manifest
    assert again == kept  # the same log without the user is what is there
    changed = tiny.prepare_locally(config_of(run, window=9), run / "run" / "data")
    said, rows = every_byte(run / "run" / "data"), changed.manifest["rows"]
    assert b"'u7'" not in said and b"u7,i1" not in said and b"'u8'" in said
    assert rows["forgotten"] > 0 and rows["events"] + rows["quarantined"] + rows["forgotten"] == rows["read"]


def test_forgetting_a_stranger_changes_no_data_and_holds_for_later(run: Path) -> None:
    before = storage.Directory(run / "run" / "data").manifest
    assert forget(str(run / "run"), ["a stranger"]).bundles == []
    after = storage.Directory(run / "run" / "data").manifest
    assert (after["inputs"], after["files"]) == (before["inputs"], before["files"])  # nothing is trained again
    assert tiny.prepare_locally(config_of(run), run / "run" / "data").manifest == after
    with open(run / "log" / "part9.csv", "w") as file:
        file.write("user,item,ts,click,rating,device\na stranger,i1,1700000000000,1,4,web\n")
    again = tiny.prepare_locally(config_of(run), run / "run" / "data")
    assert again.manifest["rows"]["forgotten"] == 1 and PreparedHistories(str(run / "run" / "data")).get("a stranger") is None


def test_a_running_store_turns_to_the_data_that_are_published_anew(run: Path) -> None:
    """What it has in memory may be older until it meets a file that is gone; a known user never becomes unknown."""
    store, version = PreparedHistories(str(run / "run" / "data"), keep=1), ""
    assert store.get("u3") is not None
    forget(str(run / "run"), ["u7"])
    for user in [f"u{n}" for n in range(24) if n != 7]:
        assert store.get(user) is not None, user
    version = storage.Directory(run / "run" / "data").manifest["inputs"][:16]
    assert store.get("u7") is None and store.version == version


def test_the_job_says_what_it_did_and_refuses_a_run_without_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert forget_job.main(["--run", str(run / "run"), "--user", "u7"]) == 0
    out = capsys.readouterr().out
    assert "store: 1 row(s) removed" in out and "trained with these data" in out and "train it again" in out
    assert forget_job.main(["--run", str(run / "run"), "--user", "nobody"]) == 0
    assert "no row of these users was found" in capsys.readouterr().out
    assert forget_job.main(["--run", str(run / "nothing"), "--user", "u7"]) == 2
    assert "nothing is published here" in capsys.readouterr().err


def test_the_job_finds_users_behind_their_pseudonyms(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.write_log(tmp_path)
    tiny.prepare_locally(config_of(tmp_path, pseudonyms={"key_env": "MTREC_TEST_KEY"}), tmp_path / "run" / "data")
    assert forget_job.main(["--run", str(tmp_path / "run"), "--user", "u7"]) == 0
    assert "store: 1 row(s) removed" in capsys.readouterr().out
    assert PreparedHistories(str(tmp_path / "run" / "data")).get(Pseudonyms.load(ENV).one("u7")) is None
