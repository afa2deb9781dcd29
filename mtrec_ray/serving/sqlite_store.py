"""Live histories in SQLite: the embedded default, for the replicas of one machine. It knows no Ray.

WAL with `synchronous=FULL`: what a commit acknowledged survives a loss of power. Readers never wait; writers wait for each other.
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from mtrec_ray.histories import History
from mtrec_ray.serving.impressions import ShownList
from mtrec_ray.serving.items import StoredItem
from mtrec_ray.serving.store import Joining, Stored, StoredEvent, StoreError, events_of, history_of, users_of

WAIT_SECONDS = 5.0
"""For another writer, before StoreError."""

_TABLES = """
CREATE TABLE IF NOT EXISTS users (user_id TEXT PRIMARY KEY, version INTEGER NOT NULL, base TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    user_id TEXT NOT NULL, timestamp INTEGER NOT NULL, place INTEGER NOT NULL, item_id TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (user_id, timestamp, place)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (
    user_id TEXT NOT NULL, item_id TEXT NOT NULL, timestamp INTEGER NOT NULL, PRIMARY KEY (user_id, item_id)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS log (
    number INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, event_id TEXT, item_id TEXT NOT NULL,
    timestamp INTEGER NOT NULL, shown INTEGER NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS shown (number INTEGER PRIMARY KEY AUTOINCREMENT, user_id TEXT NOT NULL, body TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    item_id TEXT PRIMARY KEY, number INTEGER NOT NULL, place INTEGER, columns TEXT, vector BLOB NOT NULL, encoder TEXT NOT NULL,
    available INTEGER NOT NULL, blocked INTEGER NOT NULL, deleted INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS item_numbers ON items (number);
CREATE TABLE IF NOT EXISTS store (identity TEXT NOT NULL);
INSERT INTO store SELECT lower(hex(randomblob(16))) WHERE NOT EXISTS (SELECT 1 FROM store);
CREATE UNIQUE INDEX IF NOT EXISTS log_ids ON log (user_id, event_id) WHERE event_id IS NOT NULL;
"""


class SqliteStore(Joining):
    """A HistoryStore in one file."""

    def __init__(
        self,
        path: str | Path,
        actions: Sequence[str],
        context: Sequence[str],
        keep: int,
        prepared: Callable[[str], History | None] = lambda user_id: None,
        base: str = "",
    ) -> None:
        """actions, context: names that histories have. keep: events of a user's history; older ones are seen alone. prepared: what
        is known of a user that is met for the first time with these prepared data, of version `base`."""
        self.path, self.actions, self.context, self.keep, self.prepared = str(path), actions, context, keep, prepared
        self.base = base
        self._own = threading.local()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{path}: {error}; name a file that can be written (store.path), or take store.kind: none") from None
        with self._errors():
            self._db.executescript(_TABLES)
            mode, full = (self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous"))
        if mode != "wal" or full != 2:
            raise StoreError(f"{path}: SQLite gives journal_mode {mode}, synchronous {full}; wal and 2 (FULL) are needed")

    @property
    def _db(self) -> sqlite3.Connection:
        """A connection for every thread."""
        if not hasattr(self._own, "db"):
            self._own.db = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
            self._own.db.execute("PRAGMA journal_mode=WAL")
            self._own.db.execute("PRAGMA synchronous=FULL")
        return self._own.db  # type: ignore[no-any-return]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.path}: {error}") from error

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """All that is done in it, or nothing."""
        with self._errors():
            db = self._db
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _join_one(self, user_id: str, history: History) -> None:
        with self._writing() as db:
            self._join(db, user_id, history)

    def _read(self, user_id: str) -> tuple[Stored | None, str | None]:
        with self._errors():
            return self._read_at_once(user_id)

    def _read_at_once(self, user_id: str) -> tuple[Stored | None, str | None]:
        db = self._db
        db.execute("BEGIN")  # version, events and seen items of one moment
        try:
            known = db.execute("SELECT version, base FROM users WHERE user_id = ?", (user_id,)).fetchone()
            if known is None:
                return None, None
            wanted = "SELECT item_id, timestamp, body FROM events WHERE user_id = ? ORDER BY timestamp, place"
            events = db.execute(wanted, (user_id,)).fetchall()
            seen = db.execute("SELECT item_id, timestamp FROM seen WHERE user_id = ?", (user_id,)).fetchall()
        finally:
            db.execute("COMMIT")
        return Stored(history_of(events, seen, self.actions, self.context), str(known[0])), str(known[1])

    def append(self, events: Sequence[StoredEvent]) -> list[bool]:
        stale = {u: self.prepared(u) for u in {e.user_id for e in events} if self._base_of(u) != self.base}
        with self._writing() as db:
            for user_id, history in stale.items():
                self._join(db, user_id, history or History())
            new = [self._keep(db, event) for event in events]
            for user_id in {e.user_id for e, is_new in zip(events, new, strict=True) if is_new and e.shown}:
                self._cut(db, user_id)
                db.execute("UPDATE users SET version = version + 1 WHERE user_id = ?", (user_id,))
        return new

    def _base_of(self, user_id: str) -> str | None:
        with self._errors():
            found = self._db.execute("SELECT base FROM users WHERE user_id = ?", (user_id,)).fetchone()
        return None if found is None else str(found[0])

    def _keep(self, db: sqlite3.Connection, event: StoredEvent) -> bool:
        row = (event.user_id, event.event_id, event.item_id, event.timestamp, int(event.shown), event.body())
        columns = "INSERT OR IGNORE INTO log (user_id, event_id, item_id, timestamp, shown, body) VALUES (?, ?, ?, ?, ?, ?)"
        cursor = db.execute(columns, row)
        if cursor.rowcount and event.shown:
            # ties in time keep the order of acceptance, behind what preparation brought
            self._insert(db, event, int(cursor.lastrowid or 0))
        return bool(cursor.rowcount)

    def _insert(self, db: sqlite3.Connection, event: StoredEvent, place: int) -> None:
        db.execute(
            "INSERT OR IGNORE INTO events VALUES (?, ?, ?, ?, ?)",
            (event.user_id, event.timestamp, place, event.item_id, event.body()),
        )
        self._see(db, event.user_id, [(event.item_id, event.timestamp)])

    def _see(self, db: sqlite3.Connection, user_id: str, items: Iterable[tuple[str, int]]) -> None:
        """An item is seen from its first event on."""
        db.executemany(
            "INSERT INTO seen VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET timestamp = min(timestamp, excluded.timestamp)",
            [(user_id, item, moment) for item, moment in items],
        )

    def _join(self, db: sqlite3.Connection, user_id: str, history: History) -> None:
        """What preparation knows joins what is there."""
        before = db.execute("SELECT timestamp, item_id FROM events WHERE user_id = ?", (user_id,)).fetchall()
        there = {(int(t), str(i)) for t, i in before}
        events = events_of(user_id, history)
        for place, event in enumerate(events):
            if (event.timestamp, event.item_id) not in there:
                self._insert(db, event, place - len(events))
        self._see(db, user_id, zip(history.seen_item_ids, history.seen_times, strict=True))
        # versions begin at the time: one that comes back after being forgotten never has a version that it had before
        joined = "INSERT INTO users VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET version = version + 1, base = excluded.base"
        db.execute(joined, (user_id, time.time_ns() // 1000, self.base))
        self._cut(db, user_id)

    def _cut(self, db: sqlite3.Connection, user_id: str) -> None:
        """Only the last events stay; their items are in `seen` anyway."""
        db.execute(
            "DELETE FROM events WHERE user_id = ?1 AND (timestamp, place) IN (SELECT timestamp, place FROM events "
            "WHERE user_id = ?1 ORDER BY timestamp DESC, place DESC LIMIT -1 OFFSET ?2)",
            (user_id, self.keep),
        )

    def load(self, rows: Iterable[pa.Table]) -> int:
        users = 0
        for table in rows:  # a transaction for every piece
            with self._writing() as db:
                for user_id, history in users_of([table]):
                    self._join(db, user_id, history)
                    users += 1
        return users

    def forget(self, user_ids: Sequence[str]) -> int:
        removed = 0
        with self._writing() as db:
            for user_id in user_ids:
                removed += db.execute("DELETE FROM events WHERE user_id = ?", (user_id,)).rowcount
                removed += db.execute("DELETE FROM shown WHERE user_id = ?", (user_id,)).rowcount
                removed += db.execute("DELETE FROM log WHERE user_id = ?", (user_id,)).rowcount
                removed += db.execute("DELETE FROM seen WHERE user_id = ?", (user_id,)).rowcount
                removed += db.execute("DELETE FROM users WHERE user_id = ?", (user_id,)).rowcount
        with self._errors():  # deleted rows stay in free pages and in the journal until these are written anew
            self._db.execute("VACUUM")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    @property
    def identity(self) -> str:
        with self._errors():
            return str(self._db.execute("SELECT identity FROM store").fetchone()[0])

    def log(self, after: int, limit: int) -> list[tuple[int, StoredEvent]]:
        wanted = (
            "SELECT number, user_id, item_id, timestamp, event_id, body, shown FROM log WHERE number > ? ORDER BY number LIMIT ?"
        )
        with self._errors():
            found = self._db.execute(wanted, (after, limit)).fetchall()
        return [(int(row[0]), logged(*row[1:])) for row in found]

    def keep_impressions(self, lists: Sequence[ShownList]) -> None:
        with self._writing() as db:
            db.executemany("INSERT INTO shown (user_id, body) VALUES (?, ?)", [(s.user_id, s.body()) for s in lists])

    def impressions(self, after: int, limit: int) -> list[tuple[int, ShownList]]:
        with self._errors():
            found = self._db.execute(
                "SELECT number, user_id, body FROM shown WHERE number > ? ORDER BY number LIMIT ?", (after, limit)
            ).fetchall()
        return [(int(number), ShownList.of(user_id, body)) for number, user_id, body in found]

    def change_item(self, item_id: str, fields: Mapping[str, Any]) -> StoredItem:
        with self._writing() as db:
            row = db.execute("SELECT * FROM items WHERE item_id = ?", (item_id,)).fetchone()
            number, place = db.execute("SELECT coalesce(max(number), 0) + 1, coalesce(max(place), -1) + 1 FROM items").fetchone()
            item = (StoredItem(item_id) if row is None else _item(row)).changed(number, place, fields)
            columns = None if item.columns is None else json.dumps(dict(item.columns))
            flags = (int(item.available), int(item.blocked), int(item.deleted))
            values = (item_id, item.number, item.place, columns, item.vector, item.encoder, *flags)
            db.execute("INSERT OR REPLACE INTO items VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
        return item

    def items_since(self, number: int) -> list[StoredItem]:
        with self._errors():
            found = self._db.execute("SELECT * FROM items WHERE number > ? ORDER BY number", (number,)).fetchall()
        return [_item(row) for row in found]

    def close(self) -> None:
        if hasattr(self._own, "db"):
            self._own.db.close()
            del self._own.db


def _item(row: Sequence[Any]) -> StoredItem:
    item_id, number, place, columns, vector, encoder, *flags = row
    known = None if columns is None else json.loads(columns)
    return StoredItem(item_id, number, place, known, vector, encoder, *(bool(f) for f in flags))


def logged(user_id: str, item_id: str, timestamp: int, event_id: str | None, body: str, shown: Any) -> StoredEvent:
    """A row of a log."""
    content = json.loads(body)
    return StoredEvent(user_id, item_id, int(timestamp), event_id, content["actions"], content["context"], bool(int(shown)))
