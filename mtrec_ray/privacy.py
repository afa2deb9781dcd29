"""Pseudonyms of user ids: a keyed hash, the same at prepare, in batch and at the ingress. No Ray here.

BLAKE2b with a key (RFC 7693): without the key nobody can try ids until one fits. The key comes from the environment or
a file and is never written; prepared data and bundles hold its fingerprint, so that another key is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection

import pyarrow as pa

from mtrec_ray import storage
from mtrec_ray.config import PseudonymConfig

_MIN_KEY, _MAX_KEY = 16, 64


class PseudonymKeyError(ValueError):
    """A pseudonym key that is missing, too short, or another than the data's."""


class Pseudonyms:
    """user id -> 32 hexadecimal digits."""

    def __init__(self, key: bytes) -> None:
        if not _MIN_KEY <= len(key) <= _MAX_KEY:
            raise PseudonymKeyError(f"the pseudonym key has {len(key)} bytes; it needs {_MIN_KEY} to {_MAX_KEY}")
        self._key = key

    @classmethod
    def load(cls, config: PseudonymConfig, fingerprint: str | None = None) -> Pseudonyms:
        """Read the key. fingerprint: what the data were prepared with. Raises PseudonymKeyError with the cure."""
        if config.key_env is not None:
            text = os.environ.get(config.key_env)
            where = f"the environment variable {config.key_env}"
            if text is None:
                raise PseudonymKeyError(f"data.pseudonyms: {where} is not set; the key of user ids belongs there")
            key = text.encode()
        else:
            assert config.key_file is not None
            where = f"the file {config.key_file}"
            try:
                key = storage.read_bytes(config.key_file)
            except (OSError, storage.StorageError):
                raise PseudonymKeyError(f"data.pseudonyms: {where} cannot be read; the key of user ids belongs there") from None
        found = cls(key.strip())
        if fingerprint is not None and found.fingerprint != fingerprint:
            raise PseudonymKeyError(
                f"data.pseudonyms: the key in {where} (fingerprint {found.fingerprint}) is not the one that the data were "
                f"prepared with ({fingerprint}); every user would be unknown"
            )
        return found

    @property
    def fingerprint(self) -> str:
        """What may be written about the key."""
        return hashlib.blake2b(b"mtrec_ray key", key=self._key, digest_size=8).hexdigest()

    def one(self, user_id: str) -> str:
        return hashlib.blake2b(user_id.encode(), key=self._key, digest_size=16).hexdigest()

    def column(self, user_ids: pa.Array | pa.ChunkedArray) -> pa.Array:
        """Strings -> pseudonyms, once per distinct id; null stays null."""
        whole = user_ids.combine_chunks() if isinstance(user_ids, pa.ChunkedArray) else user_ids
        encoded = whole.dictionary_encode()
        hashed = pa.array([self.one(u) for u in encoded.dictionary.to_pylist()], pa.string())
        return pa.DictionaryArray.from_arrays(encoded.indices, hashed).dictionary_decode()

    def __reduce__(self) -> tuple[type[Pseudonyms], tuple[bytes]]:
        return (Pseudonyms, (self._key,))

    def __repr__(self) -> str:
        return f"Pseudonyms({self.fingerprint})"


def withhold(row: dict[str, object], sensitive: Collection[str]) -> dict[str, object]:
    """A row as it may be shown to people: values of sensitive columns are left out."""
    return {name: "(withheld)" if name in sensitive and value is not None else value for name, value in row.items()}
