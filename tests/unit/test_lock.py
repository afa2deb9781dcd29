"""One writer for one output, on a disk and on an object store."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtrec_ray import lock, storage
from mtrec_ray.lock import HeldError, only_writer
from tests.s3 import Bucket


def test_the_second_writer_is_told_who_holds_it_and_since_when(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_SUBMISSION_ID", "raysubmit_7")
    with only_writer(tmp_path / "run"):
        says = r"run: another job is writing here \(process \d+ on .*, Ray job raysubmit_7, for \d s\)"
        with pytest.raises(HeldError, match=says), only_writer(tmp_path / "run"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    with only_writer(tmp_path / "run"):
        pass


def test_a_holder_that_is_killed_holds_nothing(tmp_path: Path) -> None:
    program = "import sys, time; from mtrec_ray.lock import only_writer\n"
    program += "with only_writer(sys.argv[1]):\n    print(1, flush=True)\n    time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    with pytest.raises(HeldError, match=f"process {holder.pid} on"), only_writer(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with only_writer(tmp_path):
        pass


def test_a_lock_of_an_older_version_or_a_damaged_one_is_said_too(tmp_path: Path) -> None:
    with only_writer(tmp_path):
        (tmp_path / ".lock").write_text("{")
        with pytest.raises(HeldError, match="nobody knows who"), only_writer(tmp_path):
            pass


def test_an_object_store_has_one_writer_too(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    root = bucket.uri("run")
    with only_writer(root):
        with (
            pytest.raises(HeldError, match=r"process \d+ on .* for \d s.*sign \d s ago.*2 min is taken over") as caught,
            only_writer(root),
        ):
            pass
        assert "secret" not in str(caught.value)
    assert not storage.exists(storage.join(root, "_lock.json"))
    with only_writer(root):
        pass


def test_a_lock_that_gives_no_sign_is_taken_over_and_a_living_one_renewed(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.1)
    root = bucket.uri("run")
    uri = storage.join(root, "_lock.json")
    storage.write_json(uri, {"who": "the dead", "since": 0, "seen": time.time() - 119, "token": "x"})
    with pytest.raises(HeldError, match="the dead, for"), only_writer(root):
        pass
    storage.write_json(uri, {"who": "the dead", "since": 0, "seen": time.time() - 121, "token": "x"})
    with only_writer(root):
        first, until = time.time(), time.monotonic() + 10
        while (latest := seen(uri)) <= first and time.monotonic() < until:
            time.sleep(0.02)
        assert latest > first


OTHER = {"who": "the other", "since": 0.0, "seen": 0.0, "token": "y"}


def test_who_slept_and_lost_the_lock_leaves_it_to_the_other_and_ends_with_an_error(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    root = bucket.uri("run")
    uri, worked = storage.join(root, "_lock.json"), 0
    with pytest.raises(HeldError, match=r"the other, for .*it took over, since this one"), only_writer(root):
        storage.write_json(uri, OTHER)  # no renewal has come by yet
        worked += 1
    assert storage.read_json(uri) == OTHER
    with pytest.raises(ZeroDivisionError), only_writer(bucket.uri("run2")):  # what went wrong in the work is said
        storage.write_json(storage.join(bucket.uri("run2"), "_lock.json"), OTHER)
        worked += 1 // 0
    with pytest.raises(HeldError, match="has ended; run again"), only_writer(root):
        storage.delete(uri)
        worked += 1
    assert worked == 2 and not storage.exists(uri)


def test_a_renewal_takes_nothing_from_the_other_not_even_where_the_store_fails(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.01)
    monkeypatch.setattr(lock, "RENEW_SECONDS", 0.02)
    root = bucket.uri("run")
    uri, asked, fails, read_json = storage.join(root, "_lock.json"), 0, False, storage.read_json

    def read(of: str) -> object:
        nonlocal asked
        asked += 1
        if fails:
            raise storage.StorageError("not now")
        return read_json(of)

    def renewals(n: int) -> None:
        until = asked + n
        wait_until(lambda: asked >= until)

    monkeypatch.setattr(storage, "read_json", read)
    with pytest.raises(HeldError, match="the other"), only_writer(root) as still:
        still()
        fails = True
        renewals(2)  # none is half-way now
        storage.write_json(uri, OTHER)
        renewals(2)
        assert read_json(uri) == OTHER
        fails = False
        wait_until(lambda: "another job has taken the output over" in caplog.text)
        with pytest.raises(HeldError, match="the other"):
            still()
    assert read_json(uri) == OTHER


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


def seen(uri: str) -> float:
    """When the holder last gave a sign; 0 where the server is read in the middle of a write (S3 itself is not)."""
    try:
        return float(storage.read_json(uri)["seen"])
    except storage.StorageError:
        return 0.0


def test_of_two_that_begin_together_the_last_to_write_has_it(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    root = bucket.uri("run")

    def another(_: float) -> None:  # writes while this one waits
        storage.write_json(
            storage.join(root, "_lock.json"), {"who": "the other", "since": time.time(), "seen": time.time(), "token": "y"}
        )

    monkeypatch.setattr(lock.time, "sleep", another)
    with pytest.raises(HeldError, match="the other"), only_writer(root):
        pass
    assert json.loads(storage.read_bytes(storage.join(root, "_lock.json")))["who"] == "the other"


def test_a_bucket_that_may_not_be_read_or_written_is_named(bucket: Bucket) -> None:
    works: list[Callable[[], object]] = [
        lambda: storage.exists(bucket.wrong), lambda: storage.read_bytes(bucket.wrong), lambda: storage.list_files(bucket.wrong),
        lambda: storage.Directory(bucket.wrong).manifest,
    ]  # fmt: skip
    for work in works:
        with pytest.raises(storage.StorageError, match=r"s3://denied/run.*: cannot be read: .*ACCESS_DENIED") as caught:
            work()
        assert "secret" not in str(caught.value)
    with (
        pytest.raises(storage.StorageError, match=r"s3://denied/run/_lock.json: cannot be .*ACCESS_DENIED") as caught,
        only_writer(bucket.wrong),
    ):
        pass
    assert "secret" not in str(caught.value)


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_is_asked_again(bucket: Bucket) -> None:
    directory = storage.Directory(bucket.flaky)
    inputs = storage.sha256("inputs")
    storage.write_bytes(storage.join(directory.begin(inputs), "a.bin"), b"x" * 1000)
    directory.publish(inputs, kind="test")
    directory.verify()
    assert sum(bucket.failed.values()) > 5
