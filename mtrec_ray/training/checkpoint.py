"""Checkpoints: everything a run needs to go on, each in one file that is written whole or not at all.

A file is named EPOCH-STEP-DIGEST.pt after its cursor (the next step) and the SHA-256 of its content: torch's own format
does not notice a changed byte. The last two are kept, so that a damaged one costs some steps and not the run.

Random states are no part of it: every draw comes from a seed made of (seed, step, rank), so the cursor is enough.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mtrec_ray import storage
from mtrec_ray.training import distributed

log = logging.getLogger(__name__)

KEPT = 2
_NAME = re.compile(r"(\d{5}-\d{9})-([0-9a-f]{16})\.pt")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or none that can be read; the message names files and the cure."""


class Checkpoints:
    """The checkpoints of one run in a folder of their own, local or on an object store.

    identity: fingerprint of what the run is made from; a checkpoint of another run is refused.
    """

    def __init__(self, folder: str | Path, identity: str = "") -> None:
        self.folder, self.identity = storage.absolute(folder), identity
        self._files, self._path = storage.resolve(self.folder)
        self._local = storage.is_local(self.folder)

    def names(self) -> list[str]:
        """Names of the checkpoints, the furthest one first."""
        paths = [Path(p).name for p in storage.list_files(self.folder, ".pt")]
        return sorted((p for p in paths if _NAME.fullmatch(p)), reverse=True)

    @property
    def last(self) -> str | None:
        """Where the furthest checkpoint lies, for messages."""
        names = self.names()
        return storage.join(self.folder, names[0]) if names else None

    # -- writing

    def save(self, state: dict[str, Any]) -> str:
        """Write tensors, numbers, strings and containers of them; `state["progress"]` holds epoch and step.

        A kill at any moment leaves the earlier checkpoints and at most a draft. Raises CheckpointError when the disk is
        full or cannot be written.
        """
        cursor = f"{state['progress']['epoch']:05d}-{state['progress']['step']:09d}"
        if self._local:
            Path(self._path).mkdir(parents=True, exist_ok=True)
        draft = Path(self._path if self._local else tempfile.gettempdir()) / f".checkpoint-{os.getpid()}"
        try:
            with open(draft, "wb") as file:
                torch.save(state | {"identity": self.identity}, file)
                file.flush()
                os.fsync(file.fileno())
            name = f"{cursor}-{_digest(draft)}.pt"
            self._publish(draft, name)
        except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
            raise CheckpointError(
                f"{storage.join(self.folder, cursor)}: the checkpoint cannot be written ({error}). Make room or check the "
                f"permissions, then start again: it goes on from {self.last or 'the beginning'}"
            ) from error
        finally:
            draft.unlink(missing_ok=True)
        self._forget(name)
        return name

    def _publish(self, draft: Path, name: str) -> None:
        if self._local:
            os.replace(draft, Path(self._path) / name)
            folder = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        else:  # an object appears when its upload is complete
            self._files.create_dir(self._path, recursive=True)
            with open(draft, "rb") as source, self._files.open_output_stream(f"{self._path}/{name}") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)

    def _forget(self, saved: str) -> None:
        """Keep the last ones; drop the rest, another one of the same cursor, and what killed writers left."""
        others = [n for n in self.names() if n != saved]
        twins = [n for n in others if n[:15] == saved[:15]]
        for name in twins + [n for n in others if n not in twins][KEPT - 1 :]:
            storage.delete(storage.join(self.folder, name))
        if self._local:
            for draft in Path(self._path).glob(".checkpoint-*"):
                draft.unlink(missing_ok=True)

    # -- reading

    def load(self) -> dict[str, Any] | None:
        """The furthest checkpoint that is whole; None when there is none yet.

        A damaged one is set aside (`.damaged`) with a warning. Raises CheckpointError when all are damaged, or when they
        belong to another run.
        """
        names = self.names()
        for name in names:
            try:
                return self._read(name)
            except _Damaged as error:
                log.warning("%s: damaged checkpoint (%s); going back to the one before", storage.join(self.folder, name), error)
                self._files.move(f"{self._path}/{name}", f"{self._path}/{name}.damaged")
        if names:
            raise CheckpointError(f"{self.folder}: every checkpoint is damaged {names}; delete the folder to start anew")
        return None

    def resume(self) -> dict[str, Any] | None:
        """`load` for all ranks together: rank 0 chooses, everyone reads the same one."""
        found, error = None, None
        if distributed.rank() == 0:
            try:
                found = self.load()
            except CheckpointError as caught:
                error = str(caught)
        name, error = distributed.broadcast((None if found is None else self.names()[0], error))
        if error is not None:
            raise CheckpointError(error)
        if name is None:
            return None
        return self._read(name) if found is None else found

    def _read(self, name: str) -> dict[str, Any]:
        """Only tensors and plain values are unpickled."""
        match = _NAME.fullmatch(name)
        assert match is not None
        with self._local_copy(name) as path:
            if _digest(path) != match[2]:
                raise _Damaged("its content is not what was written")
            try:
                state = dict(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:
                raise _Damaged(f"{type(error).__name__}: {error}") from error
        if self.identity and state["identity"] != self.identity:
            raise CheckpointError(
                f"{storage.join(self.folder, name)}: belongs to another configuration or other data. Use another folder, or "
                "delete this one to start anew"
            )
        return state

    @contextlib.contextmanager
    def _local_copy(self, name: str) -> Iterator[Path]:
        if self._local:
            yield Path(self._path) / name
            return
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / name
            with self._files.open_input_stream(f"{self._path}/{name}") as source, open(copy, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 22)
            yield copy


class _Damaged(ValueError):
    pass


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
