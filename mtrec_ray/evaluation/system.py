"""The contract of what is judged: the model, or a baseline. Shapes: B moments, N items, P pairs, T targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from mtrec_ray.evaluation.measure import Moments

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class System:
    """The contract of what is judged; what a system does not answer it is not judged on."""

    def scores(self, moments: Moments) -> Tensor | None:
        """Score of every item before the seen filter -> score_BN."""
        return None

    def final_rank(self, moments: Moments, row_P: Tensor, item_P: Tensor, rank_P: IntArray) -> IntArray | None:
        """Ranks in the final order, where that is another than the scores'."""
        return None

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        """Task -> prediction at each target, (T,) or (T, C)."""
        return {}

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        """Task -> probability per class at each moment, (B, C)."""
        return {}

    def items(self) -> dict[str, FloatArray]:
        """Task -> probability per class of every item, (N, C)."""
        return {}

    def similar(self, item_B: IntArray) -> Tensor | None:
        """Similarity of some items with all -> (B, N); a fresh tensor."""
        return None


class Together(System):
    """Several systems of one name that answer different tasks."""

    def __init__(self, systems: Sequence[System]) -> None:
        self.systems = systems

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        return {n: v for system in self.systems for n, v in system.predictions(moments).items()}

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        return {n: v for system in self.systems for n, v in system.profiles(moments).items()}

    def items(self) -> dict[str, FloatArray]:
        return {n: v for system in self.systems for n, v in system.items().items()}


@dataclass(frozen=True)
class Fitted:
    """A baseline, what was chosen on valid, and out of how many tries."""

    system: System
    chosen: dict[str, float]
    tries: int = 1
