"""One writer for one output: who holds it, since when, and whether they still live.

A local folder is held by the operating system (`flock` on ROOT/.lock), so that it is free the moment its holder dies. An object
store has no such lock: there ROOT/_lock.json is renewed every twenty seconds, and one that has not been renewed for two minutes is
taken over. Two jobs that begin there within a second of each other are told apart by who wrote last. A job that slept through its
own two minutes notices when it wakes: it rolls out nothing more, leaves the lock to its new holder, and ends with an error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtrec_ray import storage
from mtrec_ray.storage import StorageError

log = logging.getLogger(__name__)

RENEW_SECONDS = 20.0
STALE_SECONDS = 120.0
SETTLE_SECONDS = 1.0
"""After which whoever wrote last holds the lock of an object store."""


class HeldError(StorageError):
    """Somebody else writes here."""


def _owner() -> dict[str, Any]:
    job = os.environ.get("RAY_JOB_SUBMISSION_ID")
    who = f"process {os.getpid()} on {socket.gethostname()}" + (f", Ray job {job}" if job else "")
    return {"who": who, "since": time.time(), "seen": time.time(), "token": uuid.uuid4().hex}


def _age(seconds: float) -> str:
    seconds = max(0, int(seconds))
    return f"{seconds} s" if seconds < 120 else f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def _held(root: str | Path, found: dict[str, Any], cure: str) -> HeldError:
    who = found.get("who", "nobody knows who")
    since = f", for {_age(time.time() - found['since'])}" if "since" in found else ""
    return HeldError(f"{root}: another job is writing here ({who}{since}); {cure}")


@contextmanager
def only_writer(root: str | Path) -> Iterator[Callable[[], None]]:
    """Hold an output for one job, until it ends or dies -> a question whether it still does, before what cannot be taken back.

    Raises HeldError, which names the holder and the age of its hold, while another job has it, and when it was lost (by the
    question, and at the end); StorageError where no folder can be made.
    """
    with _local(root) if storage.is_local(root) else _remote(root) as still:
        yield still


@contextmanager
def _local(root: str | Path) -> Iterator[Callable[[], None]]:
    folder = Path(storage.resolve(root)[1])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+", encoding="utf-8")
    except OSError as error:  # a file stands there, or the disk refuses
        raise StorageError(f"{root}: cannot be written to ({error.strerror or error}); name another folder") from None
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _held(root, _parsed(file.read()), "run again when it has ended") from None
        except OSError:  # a filesystem without locks
            pass
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_owner()))
        file.flush()
        yield lambda: None


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _remote(root: str | Path) -> Iterator[Callable[[], None]]:
    uri, mine = storage.join(storage.absolute(root), "_lock.json"), _owner()

    def other() -> dict[str, Any] | None:
        """Whose it is, if not this job's; {} when it is nobody's. Raises StorageError where that cannot be told."""
        if not storage.exists(uri):
            return {}
        found = storage.read_json(uri)
        return None if found.get("token") == mine["token"] else found

    def refuse(found: dict[str, Any]) -> HeldError:
        sign = _age(time.time() - found.get("seen", 0))
        cure = f"it last gave a sign {sign} ago, and one that gives none for {_age(STALE_SECONDS)} is taken over"
        return _held(storage.shown(root), found, f"run again when it has ended; {cure}")

    found = _told(other)
    if found and abs(time.time() - found.get("seen", 0)) < STALE_SECONDS:  # a clock that went back is no sign of life
        raise refuse(found)
    storage.write_json(uri, mine)
    time.sleep(SETTLE_SECONDS)
    if found := _told(other):
        raise refuse(found)
    done, lost = threading.Event(), list[dict[str, Any]]()

    def look() -> None:
        """Raises HeldError once the lock is lost; StorageError where that cannot be told."""
        if not lost and (found := other()) is not None:
            lost.append(found)
            log.error("%s: another job has taken the output over, since this one gave no sign", storage.shown(root))
        if lost:
            slept = f"this one gave no sign for {_age(STALE_SECONDS)}"
            if not lost[0]:
                raise HeldError(f"{storage.shown(root)}: another job took it over, since {slept}, and has ended; run again")
            raise _held(storage.shown(root), lost[0], f"it took over, since {slept}; run again when it has ended")

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            try:
                look()
                storage.write_json(uri, mine | {"seen": time.time()})
            except HeldError:
                return
            except StorageError:  # the next time may be better; nobody takes over before STALE_SECONDS
                pass

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield look
    finally:
        done.set()
        thread.join()
        with suppress(StorageError):  # what goes wrong in the work is said, not this
            look()
            storage.delete(uri)
    if lost:
        look()


def _told(other: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
    """At the start, where a lock that is damaged is nobody's."""
    try:
        return other()
    except StorageError:
        return None
