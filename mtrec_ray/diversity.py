"""The last choice among ranked candidates: unlike each other, and not too many of a kind. It knows no Ray.

Maximal marginal relevance (Carbonell & Goldstein 1998): the next item is the one with the largest
(1 - d) · relevance - d · largest cosine with an item chosen before; relevance is the score, scaled to 0 to 1 over the candidates.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def choose(
    score_K: NDArray[np.float32],
    unit_KD: NDArray[np.float32],
    k: int,
    diversity: float = 0.0,
    codes: Mapping[str, IntArray] | None = None,
    caps: Mapping[str, int] | None = None,
) -> IntArray:
    """Places of at most k candidates in the order in which they are chosen; ties go to the one that stands first.

    score_K: descending; unit_KD: vectors of unit length; diversity: d, 0 for relevance alone. codes: attribute -> (K, longest)
    numbers of its values, 0 for none; caps: attribute -> most items of one value (of every value that an item has).
    """
    K = len(score_K)
    low, high = (float(score_K.min()), float(score_K.max())) if K else (0.0, 0.0)
    relevance_K = (score_K - low) / (high - low) if high > low else np.ones(K, np.float32)
    alike_K, left_K = np.zeros(K, np.float32), np.ones(K, bool)
    counts: dict[str, dict[int, int]] = {name: {} for name in caps or {}}
    chosen: list[int] = []
    while len(chosen) < min(k, K) and left_K.any():
        worth_K = np.where(left_K, (1 - diversity) * relevance_K - diversity * alike_K, -np.inf)
        best = int(np.argmax(worth_K))
        left_K[best] = False
        kinds = {name: [int(c) for c in np.unique((codes or {})[name][best]) if c] for name in counts}
        if any(counts[name].get(c, 0) >= (caps or {})[name] for name, values in kinds.items() for c in values):
            continue
        for name, values in kinds.items():
            for c in values:
                counts[name][c] = counts[name].get(c, 0) + 1
        chosen.append(best)
        if diversity:
            similar_K = unit_KD @ unit_KD[best]
            alike_K = similar_K if len(chosen) == 1 else np.maximum(alike_K, similar_K)
    return np.array(chosen, dtype=np.int64)
