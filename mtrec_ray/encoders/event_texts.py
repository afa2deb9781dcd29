"""Vectors of the free texts that events carry (features of kind `text`).

Prepared windows hold a text's hash; the encode stage writes the vectors by hash beside those of the catalogue, and training
and evaluation look them up there (`EventTexts`). Histories that callers send hold the text itself: it is encoded when it is met
(`TextMemory`), so the bundle holds no text of a user and no vector of one.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.features import MISSING, hash_texts

HASHES, VECTORS = "event_hashes.npy", "event_vectors.npy"
REMEMBERED = 20_000
"""Texts whose vectors a process keeps: some 30 MB of 384 numbers each."""

Encode = Callable[[Sequence[str]], NDArray[np.float32]]


class EventTexts:
    """hash_K ascending, vec_KE: a unit vector for each."""

    def __init__(self, hash_K: NDArray[np.int64], vec_KE: NDArray[np.float32]) -> None:
        self.hash_K, self.vec_KE = hash_K, vec_KE

    @classmethod
    def open(cls, prefix: str) -> EventTexts | None:
        """What the encode stage wrote, memory-mapped where it is local; None where events have no texts."""
        if not storage.exists(storage.join(prefix, HASHES)):
            return None
        if storage.is_local(prefix):
            hash_K, vec_KE = (np.load(storage.resolve(storage.join(prefix, n))[1], mmap_mode="r") for n in (HASHES, VECTORS))
        else:
            hash_K, vec_KE = (np.load(io.BytesIO(storage.read_bytes(storage.join(prefix, n)))) for n in (HASHES, VECTORS))
        return cls(hash_K, vec_KE)

    def find(self, hashes: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of hashes, -1 where they are missing or unknown."""
        if not len(self.hash_K):
            return np.full(len(hashes), -1, np.int64)
        place = np.minimum(np.searchsorted(self.hash_K, hashes), len(self.hash_K) - 1)
        return np.where((self.hash_K[place] == hashes) & (hashes != MISSING), place, -1)

    def __call__(self, hashes: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n,) hashes as windows hold them -> (n, E); zeros where there is no text. Raises StorageError for one never encoded."""
        place = self.find(hashes)
        there = place >= 0
        if (~there & (hashes != MISSING)).any():
            raise storage.StorageError("a text of an event has no vector here: the data are newer; run jobs.encode again")
        out = np.zeros((len(hashes), self.vec_KE.shape[1]), np.float32)
        out[there] = self.vec_KE[place[there]]
        return out


def texts_of_events(data: storage.Directory, names: Sequence[str]) -> Iterator[pa.Array]:
    """Distinct texts of each file of prepared events and each feature."""
    for path in storage.list_files(data.path("events"), ".parquet"):
        table = storage.read_table(data.path("events", path.rsplit("/", 1)[1]), list(names))
        for name in names:
            yield table[name].combine_chunks().unique().drop_null()


def hashes_of_events(data: storage.Directory, names: Sequence[str]) -> NDArray[np.int64]:
    """Distinct hashes of all texts, ascending."""
    parts = [hash_texts(texts) for texts in texts_of_events(data, names)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *parts]))


def write_event_texts(prefix: str, hash_K: NDArray[np.int64], vec_KE: NDArray[np.float32]) -> None:
    """What `EventTexts.open` reads."""
    for name, values in ((HASHES, hash_K), (VECTORS, vec_KE)):
        buffer = io.BytesIO()
        np.save(buffer, values)
        storage.write_bytes(storage.join(prefix, name), buffer.getvalue())


class TextMemory:
    """Texts of histories -> vectors. A text is encoded once while it is remembered; any thread may ask."""

    def __init__(self, encode: Encode, width: int, known: EventTexts | None = None, keep: int = REMEMBERED) -> None:
        """known: vectors that need no encoding."""
        self.encode, self.width, self.known, self.keep = encode, width, known, keep
        self._vectors: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, texts: pa.Array) -> NDArray[np.float32]:
        """(n,) texts of a feature's column -> (n, E); zeros where there is none."""
        hashes = hash_texts(texts)
        out = np.zeros((len(hashes), self.width), np.float32)
        place = self.known.find(hashes) if self.known is not None else np.full(len(hashes), -1, np.int64)
        if self.known is not None and (place >= 0).any():
            out[place >= 0] = self.known.vec_KE[place[place >= 0]]
        rest = np.flatnonzero((place < 0) & (hashes != MISSING))
        with self._lock:
            new = {int(hashes[i]): i for i in rest if int(hashes[i]) not in self._vectors}
            if new:
                found = self.encode([texts[int(i)].as_py() for i in new.values()])
                self._vectors |= zip(new, found, strict=True)
            for i in rest:
                out[i] = self._vectors[int(hashes[i])]
                self._vectors.move_to_end(int(hashes[i]))
            while len(self._vectors) > self.keep:
                self._vectors.popitem(last=False)
        return out
