"""Shards of a batch output: exactly once whatever is killed, published at once, proved afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import score
from mtrec_ray import runtime, storage
from mtrec_ray.scoring import shards
from mtrec_ray.scoring.shards import Output, VerifyError, replace_shard, verify

NAMES = ["part-00000", "part-00001", "part-00002"]


def lists(name: str, k: int = 2) -> pa.Table:
    """Two users of a shard with k items each."""
    users = [f"{name}-u{u}" for u in range(2) for _ in range(k)]
    return pa.table({"user_id": users, "item_id": ["i"] * len(users), "rank": list(range(1, k + 1)) * 2})


def write(output: Output, names: list[str], k: int = 2) -> None:
    for name in names:
        output.write(name, [lists(name, k)], lambda: {"users": 2, "fallbacks": 1, "seconds": {"read": 0.5}})


def published(root: Path, k: int = 2) -> Output:
    output = Output(str(root), {"bundle": "b", "k": k})
    write(output, NAMES, k)
    output.publish(NAMES)
    return output


def rows(root: Path) -> list[dict[str, Any]]:
    return [r for p in sorted(root.glob("part-*.parquet")) for r in storage.read_table(str(p)).to_pylist()]


def test_what_is_published_has_its_sums_and_is_proved(tmp_path: Path) -> None:
    output = published(tmp_path)
    manifest = output.published()
    assert manifest is not None and set(manifest["shards"]) == set(NAMES)
    counts = verify(str(tmp_path))
    assert (counts["users"], counts["rows"], counts["fallbacks"]) == (6, 12, 3) and counts["seconds"] == {"read": 1.5}
    assert counts["bytes"] == sum(p.stat().st_size for p in tmp_path.glob("*.parquet")) and not (tmp_path / "_draft").exists()
    assert Output(str(tmp_path), {"bundle": "b", "k": 3}).published() is None


def test_a_shard_counts_only_when_its_entry_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(str(tmp_path), {"k": 2})
    write(output, NAMES[:1])
    monkeypatch.setattr(shards, "contents", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed after the data, before the entry
        write(output, NAMES[1:2])
    monkeypatch.undo()
    assert set(output.begin()) == {"part-00000"}
    write(output, NAMES[1:])
    output.publish(NAMES)
    assert rows(tmp_path) == [r for n in NAMES for r in lists(n).to_pylist()]


def test_another_output_starts_anew_and_the_old_one_stays_until_it_is_whole(tmp_path: Path) -> None:
    published(tmp_path)
    before = rows(tmp_path)
    other, third = (Output(str(tmp_path), {"bundle": "b", "k": k}) for k in (3, 4))
    write(other, NAMES[:2], 3)
    assert rows(tmp_path) == before and verify(str(tmp_path))["rows"] == 12
    assert set(other.begin()) == set(NAMES[:2]) and third.begin() == {}
    assert other.begin() == {}  # its draft went when a third output began
    write(other, NAMES, 3)
    other.publish(NAMES)
    assert verify(str(tmp_path))["rows"] == 18


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_publishing_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    published(tmp_path)
    output = Output(str(tmp_path), {"bundle": "new", "k": 3})
    write(output, NAMES, 3)
    real, done = storage.resolve, []

    class Killed(BaseException):
        pass

    class Filesystem:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            if name == "move":
                if len(done) == moves:
                    raise Killed
                done.append(1)
            return getattr(self.inner, name)

    def resolve(uri: Any) -> Any:
        filesystem, path = real(uri)
        return (Filesystem(filesystem) if str(uri) == output.root else filesystem), path

    monkeypatch.setattr(storage, "resolve", resolve)
    if moves < 3:
        with pytest.raises(Killed):
            output.publish(NAMES)
        assert shards.read_manifest(str(tmp_path)) is None  # nothing half is published
        monkeypatch.undo()
        assert set(output.begin()) == set(NAMES)  # nothing is done again
    output.publish(NAMES)
    assert verify(str(tmp_path))["rows"] == 18 and rows(tmp_path) == [r for n in NAMES for r in lists(n, 3).to_pylist()]


def test_rows_that_go_leave_an_output_that_is_still_proved(tmp_path: Path) -> None:
    published(tmp_path)
    replace_shard(str(tmp_path), "part-00001", lists("part-00001").slice(2))
    assert verify(str(tmp_path))["rows"] == 10


def damage(root: Path) -> None:
    path = root / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def twice(root: Path) -> None:
    replace_shard(str(root), "part-00001", lists("part-00000"))


def gap(root: Path) -> None:
    replace_shard(str(root), "part-00001", pa.table({"user_id": ["a", "a"], "rank": [1, 3]}))


def sums(root: Path) -> None:
    manifest = storage.read_json(root / "_manifest.json")
    manifest["counts"]["users"] += 1
    storage.write_json(root / "_manifest.json", manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "part-00001.parquet: the checksum differs"),
        (lambda root: (root / "part-00002.parquet").unlink(), r"\['part-00002'\] .* not both in the manifest and here"),
        (lambda root: (root / "part-7.parquet").write_bytes(b""), "part-7"),
        (twice, "a user .* stands in two places"),
        (gap, "row 1: ranks do not count from 1"),
        (sums, r"\['users'\] are not the sums"),
        (lambda root: (root / "_manifest.json").unlink(), "nothing is published here"),
        (lambda root: storage.write_json(root / "_manifest.json", {"counts": {}}), "older version"),
    ],
)
def test_what_is_not_as_it_was_written_is_named(
    tmp_path: Path, change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    published(tmp_path / "scores")
    assert score.main(["--verify", str(tmp_path)]) == 0 and "verified: 6 users (3 without" in capsys.readouterr().out
    change(tmp_path / "scores")
    with pytest.raises(VerifyError, match=message):
        verify(str(tmp_path / "scores"))
    assert score.main(["--verify", str(tmp_path)]) == 2 and capsys.readouterr().err.startswith("error: ")


def test_progress_tells_a_rate_of_this_run_and_what_is_left() -> None:
    progress = runtime.Progress("users", 1000, 400)
    progress.add({"users": 200})
    assert progress.text(2.0) == ", 600 of 1000 users, 100 per second, 4 s left"
