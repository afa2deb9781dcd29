from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.command import show_log
from mtrec_ray import lock, storage
from mtrec_ray.storage import Directory, StorageError

FIRST, SECOND = storage.sha256("first inputs"), storage.sha256("second inputs")


def write(directory: Directory, inputs: str, **files: str) -> str:
    """begin() and write files, without publishing -> the prefix."""
    prefix = directory.begin(inputs)
    for name, content in files.items():
        storage.write_bytes(storage.join(prefix, *name.split("__")), content.encode())
    return prefix


def below(root: Path) -> set[str]:
    return {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}


# --------------------------------------------------------------------------- published directories


def test_nothing_is_seen_before_publish(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    assert not directory.is_published(FIRST)
    for read in (lambda: directory.manifest, lambda: directory.prefix, lambda: directory.path("data"), directory.verify):
        with pytest.raises(StorageError, match="nothing is published here"):
            read()


def test_a_folder_that_does_not_exist_is_not_published(tmp_path: Path) -> None:
    directory = Directory(tmp_path / "nowhere")
    assert not directory.is_published(FIRST)
    with pytest.raises(StorageError, match="nowhere: nothing is published here"):
        _ = directory.manifest


def test_publish_shows_the_files_with_their_checksums(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    prefix = write(directory, FIRST, data="1", inner__more="22")
    returned = directory.publish(FIRST, kind="test", rows={"read": 3})
    assert directory.is_published(FIRST) and not directory.is_published(SECOND)
    assert directory.manifest == returned
    assert directory.prefix == prefix == storage.join(str(tmp_path), FIRST[:16])
    assert storage.read_bytes(directory.path("inner", "more")) == b"22"
    assert returned["kind"] == "test" and returned["rows"] == {"read": 3}
    assert returned["files"] == {
        "data": hashlib.sha256(b"1").hexdigest(),
        "inner/more": hashlib.sha256(b"22").hexdigest(),
    }
    directory.verify()


def test_another_reader_of_the_same_root_sees_what_was_published(tmp_path: Path) -> None:
    write(Directory(tmp_path), FIRST, data="1")
    reader = Directory(str(tmp_path) + "/")
    assert not reader.is_published(FIRST)
    Directory(tmp_path).publish(FIRST)
    assert storage.read_bytes(reader.path("data")) == b"1"


def test_begin_on_the_same_inputs_unpublishes_first(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, old="1")
    directory.publish(FIRST)
    prefix = directory.begin(FIRST)
    assert not directory.is_published(FIRST)
    assert below(tmp_path) == set()  # neither the manifest nor a file of the earlier run
    storage.write_bytes(storage.join(prefix, "new"), b"2")
    directory.publish(FIRST)
    assert below(Path(directory.prefix)) == {"new"}
    directory.verify()


def test_begin_removes_what_a_run_that_failed_left_behind(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, half="1")
    write(directory, FIRST, whole="2")
    assert list(directory.publish(FIRST)["files"]) == ["whole"]


def test_begin_on_other_inputs_leaves_readers_what_they_have(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    directory.publish(FIRST)
    write(directory, SECOND, data="2")
    assert directory.is_published(FIRST)
    assert storage.read_bytes(directory.path("data")) == b"1"
    directory.verify()


def test_older_prefixes_are_deleted_after_publish_but_unrelated_folders_stay(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    directory.publish(FIRST)
    others = ["tensorboard/events", "checkpoints/0", "notes.txt", "deadbeef/data", "ABCDEF0123456789/data", f"{FIRST[:17]}/data"]
    for name in others:  # folders whose names are not sixteen small hexadecimal digits
        storage.write_bytes(tmp_path / name, b"mine")
    write(directory, SECOND, data="2")
    assert (tmp_path / FIRST[:16]).exists()  # only publish removes it
    directory.publish(SECOND)
    assert not (tmp_path / FIRST[:16]).exists()
    assert below(tmp_path) == {"manifest.json", f"{SECOND[:16]}/data", *others}


def test_verify_finds_a_missing_file(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1", inner__more="22")
    directory.publish(FIRST)
    os.remove(Path(directory.prefix) / "inner" / "more")
    with pytest.raises(StorageError, match=r"inner/more: missing, though the manifest names it"):
        directory.verify()


def test_verify_finds_a_changed_file(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1", more="22")
    directory.publish(FIRST)
    (Path(directory.prefix) / "more").write_bytes(b"23")  # the same length
    with pytest.raises(StorageError, match=r"more: checksum differs from the manifest"):
        directory.verify()


def test_another_schema_version_is_refused_with_both_versions_and_the_cure(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    manifest = directory.publish(FIRST)
    storage.write_json(tmp_path / "manifest.json", manifest | {"schema_version": 999})
    assert not directory.is_published(FIRST)
    for read in (lambda: directory.manifest, lambda: directory.prefix, directory.verify):
        with pytest.raises(StorageError, match=f"schema_version 999, this version reads {storage.SCHEMA_VERSION}; make it anew"):
            read()


def test_the_manifest_can_be_read_by_people(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    directory.publish(FIRST)
    text = (tmp_path / "manifest.json").read_text()
    assert text.count("\n") > 3 and json.loads(text)["prefix"] == FIRST[:16]


def test_a_manifest_is_not_written_when_its_values_are_not_json(tmp_path: Path) -> None:
    directory = Directory(tmp_path)
    write(directory, FIRST, data="1")
    with pytest.raises(ValueError, match="JSON"):
        directory.publish(FIRST, loss=float("nan"))
    assert not directory.is_published(FIRST)


def test_a_damaged_manifest_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "inp')
    with pytest.raises(StorageError, match=r"manifest\.json: damaged JSON"):
        _ = Directory(tmp_path).manifest


def test_a_damaged_manifest_does_not_keep_a_new_run_from_publishing(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"schema_version": 1, "inp')
    directory = Directory(tmp_path)
    assert not directory.is_published(FIRST)
    write(directory, FIRST, data="1")
    directory.publish(FIRST)
    directory.verify()


def test_json_that_is_not_text_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\x80\x81\x82")
    with pytest.raises(StorageError, match="damaged"):
        storage.read_json(tmp_path / "manifest.json")


def test_a_directory_works_behind_a_file_uri_too(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    directory = Directory((tmp_path / "with space").as_uri())
    write(directory, FIRST, data="1")
    directory.publish(FIRST)
    directory.verify()
    assert storage.read_bytes(tmp_path / "with space" / FIRST[:16] / "data") == b"1"


def test_a_relative_root_means_the_same_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    directory = Directory("run")
    write(directory, FIRST, data="1")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    directory.publish(FIRST)
    assert (tmp_path / "run" / "manifest.json").exists()
    assert directory.root == str(tmp_path / "run")


# --------------------------------------------------------------------------- fingerprints

_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)


def _reversed(value: object) -> object:
    if isinstance(value, dict):
        return {k: _reversed(v) for k, v in reversed(value.items())}
    return [_reversed(v) for v in value] if isinstance(value, list) else value


@settings(max_examples=50, deadline=None)
@given(_json)
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(value: object) -> None:
    assert storage.fingerprint(value) == storage.fingerprint(_reversed(value))


def test_a_fingerprint_depends_on_every_value_and_on_the_order_of_lists() -> None:
    values: list[object] = [{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, {"a": "1", "b": 2}, [1, 2], [2, 1], [[1], 2], None, 0, ""]
    assert len({storage.fingerprint(v) for v in values}) == len(values)


def test_a_fingerprint_is_the_sha256_of_the_shortest_json() -> None:
    assert storage.fingerprint({"b": [1, None], "a": "x"}) == hashlib.sha256(b'{"a":"x","b":[1,null]}').hexdigest()
    with pytest.raises(ValueError, match="JSON"):
        storage.fingerprint(float("inf"))


def test_a_file_has_the_fingerprint_of_its_content_wherever_it_lies(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "a" / "one", b"hello")
    storage.write_bytes(tmp_path / "b" / "other", b"hello")
    expected = hashlib.sha256(b"hello").hexdigest()
    assert storage.file_fingerprint(tmp_path / "a" / "one") == storage.file_fingerprint(tmp_path / "b" / "other") == expected


def test_a_folder_has_a_fingerprint_of_names_and_contents(tmp_path: Path) -> None:
    def made(name: str, files: dict[str, bytes]) -> str:
        for file, content in files.items():
            storage.write_bytes(tmp_path / name / file, content)
        return storage.file_fingerprint(tmp_path / name)

    base = made("base", {"x": b"1", "y": b"2"})
    assert made("copy", {"y": b"2", "x": b"1"}) == base
    assert made("hidden", {"y": b"2", "x": b"1", ".DS_Store": b"?", "_SUCCESS": b""}) == base
    assert made("swapped", {"x": b"2", "y": b"1"}) != base
    assert made("renamed", {"x": b"1", "z": b"2"}) != base
    assert made("fewer", {"x": b"1"}) != base


def test_the_fingerprint_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing: not found"):
        storage.file_fingerprint(tmp_path / "nothing")


def test_folders_whose_names_and_contents_only_join_alike_differ(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "one" / "part-1", b"0,u,i")
    storage.write_bytes(tmp_path / "two" / "part-10", b",u,i")
    assert storage.file_fingerprint(tmp_path / "one") != storage.file_fingerprint(tmp_path / "two")


# --------------------------------------------------------------------------- files


def test_bytes_json_and_tables_come_back_as_written(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "new" / "deep" / "x", b"\x00\xff")
    assert storage.read_bytes(tmp_path / "new" / "deep" / "x") == b"\x00\xff"
    storage.write_json(tmp_path / "x.json", {"é": [1, None]})
    assert storage.read_json(tmp_path / "x.json") == {"é": [1, None]}
    table = pa.table({"id": ["a", None], "n": pa.array([1, 2], pa.int32())})
    storage.write_table(tmp_path / "new" / "t.parquet", table)
    assert storage.read_table(tmp_path / "new" / "t.parquet").equals(table)


def test_writing_replaces_what_was_there(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "x", b"a longer text")
    storage.write_bytes(tmp_path / "x", b"short")
    assert storage.read_bytes(tmp_path / "x") == b"short"


def test_a_folder_of_parts_is_read_in_name_order_with_the_columns_asked_for(tmp_path: Path) -> None:
    for number in (2, 0, 1):
        storage.write_table(tmp_path / f"part-{number:05d}.parquet", pa.table({"n": [number], "other": ["x"]}))
    table = storage.read_table(tmp_path, ["n"])
    assert table.column_names == ["n"] and table["n"].to_pylist() == [0, 1, 2]


def test_partition_folders_add_no_columns(tmp_path: Path) -> None:
    storage.write_table(tmp_path / "day=1" / "part-0.parquet", pa.table({"n": [1]}))
    assert storage.read_table(tmp_path).column_names == ["n"]


def test_reading_what_is_not_there_is_a_storage_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing: not found"):
        storage.read_bytes(tmp_path / "nothing")
    with pytest.raises(StorageError, match="nothing: not found"):
        storage.read_table(tmp_path / "nothing")
    with pytest.raises(StorageError, match="no Parquet files"):
        storage.read_table(tmp_path)


def test_files_are_listed_sorted_with_their_suffix_and_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "a.txt", ".b.csv", "_c.csv", "inner/d.csv"):
        storage.write_bytes(tmp_path / name, b"")
    assert storage.list_files(tmp_path, ".csv") == [f"{tmp_path}/{n}" for n in ("a.csv", "b.csv", "inner/d.csv")]
    assert storage.list_files(tmp_path / "nowhere") == []


@pytest.mark.parametrize("folder", [".ipynb_checkpoints", "_temporary", "inner/.git"])
def test_files_in_hidden_folders_are_left_out(tmp_path: Path, folder: str) -> None:
    storage.write_bytes(tmp_path / "a.csv", b"")
    storage.write_bytes(tmp_path / folder / "a-checkpoint.csv", b"")
    assert storage.list_files(tmp_path, ".csv") == [f"{tmp_path}/a.csv"]


def test_a_hidden_folder_above_the_one_asked_for_hides_nothing(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / ".data" / "a.csv", b"")
    assert storage.list_files(tmp_path / ".data") == [f"{tmp_path}/.data/a.csv"]


def test_delete_takes_files_and_folders_and_minds_nothing_missing(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "folder" / "x", b"1")
    storage.write_bytes(tmp_path / "file", b"1")
    for name in ("folder", "file", "nothing"):
        storage.delete(tmp_path / name)
        assert not storage.exists(tmp_path / name)


def test_local_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("x/y") == f"{tmp_path}/x/y"
    assert storage.absolute("s3://bucket/x") == "s3://bucket/x"
    assert storage.absolute("~/x") == str(Path.home() / "x")
    assert storage.is_local("x") and storage.is_local(tmp_path.as_uri())


def test_join_puts_one_slash_between_parts() -> None:
    assert storage.join("a/", "b", "c") == "a/b/c"
    assert storage.join("s3://bucket/a", "b") == "s3://bucket/a/b"


def test_join_keeps_the_query_of_a_uri_at_its_end() -> None:
    assert storage.join("s3://bucket/a?region=eu-west-1", "b") == "s3://bucket/a/b?region=eu-west-1"


@pytest.mark.parametrize("below", ["", "tasks", "a/b"])
def test_a_folder_that_is_a_file_is_named_with_the_cure(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(StorageError, match=r"file.*cannot be written to.*another folder"),
        lock.only_writer(tmp_path / "file" / below),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_messages_hold_no_keys_of_a_uri(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "s3://KEY:SE%2FCRET@bucket/a?region=x and redis://me:secret@host:1/0, but me@example.org"
    assert storage.without_keys(text) == "s3://bucket/a?region=x and redis://host:1/0, but me@example.org"
    assert str(StorageError("s3://k:s@b/c: gone")) == "s3://b/c: gone"
    assert storage.shown("s3://k:s@b/c?x=1") == "s3://b/c" and storage.shown(tmp_path) == str(tmp_path)
    show_log()
    logging.getLogger("mtrec_ray").warning("reused %s", "s3://k:s@b/c")
    assert capsys.readouterr().err.endswith(" reused s3://b/c\n")


def test_files_are_listed_as_their_directory_is_named(tmp_path: Path) -> None:
    storage.write_bytes(tmp_path / "a" / "b" / "x.parquet", b"")
    storage.write_bytes(tmp_path / "a" / "_hidden" / "y.parquet", b"")
    assert storage.list_uris(tmp_path / "a", ".parquet") == [str(tmp_path / "a" / "b" / "x.parquet")]
