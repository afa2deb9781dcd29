"""One writer for one output: who holds it, since when, and whether they still live.

A local folder is held by the operating system (`flock` on ROOT/.lock), so that it is free the moment its holder dies. An object
store has no such lock: there ROOT/_lock.json is renewed every twenty seconds, and one that has not been renewed for two minutes is
taken over. Two jobs that begin there within a second of each other are told apart by who wrote last. A job that slept through its
own two minutes notices when it wakes, leaves the lock to its new holder and ends with an error.
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
from collections.abc import Iterator
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
def only_writer(root: str | Path) -> Iterator[None]:
    """Hold an output for one job, until it ends or dies.

    Raises HeldError, which names the holder and the age of its hold, while another job has it, and at the end when it was lost;
    StorageError where no folder can be made.
    """
    with _local(root) if storage.is_local(root) else _remote(root):
        yield


@contextmanager
def _local(root: str | Path) -> Iterator[None]:
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
        yield


def _parsed(text: str | bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _remote(root: str | Path) -> Iterator[None]:
    uri, mine = storage.join(storage.absolute(root), "_lock.json"), _owner()

    def read() -> dict[str, Any]:
        try:
            return _parsed(storage.read_bytes(uri))
        except StorageError:
            return {}

    def check(found: dict[str, Any]) -> None:
        if found and found.get("token") != mine["token"]:
            raise _held(
                storage.shown(root), found,
                f"run again when it has ended; it last gave a sign {_age(time.time() - found.get('seen', 0))} ago, and one that "
                f"gives none for {_age(STALE_SECONDS)} is taken over",
            )  # fmt: skip

    found = read()
    if time.time() - found.get("seen", 0) < STALE_SECONDS:
        check(found)
    storage.write_json(uri, mine)
    time.sleep(SETTLE_SECONDS)
    check(read())
    done, lost = threading.Event(), list[dict[str, Any]]()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with suppress(StorageError):  # the next time may be better; nobody takes over before STALE_SECONDS
                found = read()
                if found and found.get("token") != mine["token"]:
                    lost.append(found)
                    log.error(
                        "%s: %s has taken the output over, since this job gave no sign", storage.shown(root), found.get("who")
                    )
                    return
                storage.write_json(uri, mine | {"seen": time.time()})

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if not lost:
            storage.delete(uri)
    if lost:
        cure = f"it took over from this job, which gave no sign for {_age(STALE_SECONDS)}; run again when it has ended"
        raise _held(storage.shown(root), lost[0], cure)
