"""Hashes: drawing without a random state, the same on every rank and in every process."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

GOLDEN = 0x9E3779B97F4A7C15


def mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def place_of(name: str) -> float:
    """Of a name, always the same number in [0, 1), as if drawn evenly."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
