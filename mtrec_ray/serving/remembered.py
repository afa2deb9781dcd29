"""What an ingress has worked out for a user and may use again while nothing has changed that it follows from. It knows no Ray."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from mtrec_ray.serving.stages import EncodedState, Retrieved, Stamp


@dataclass
class Remembered:
    """Of one user and bundle."""

    state: EncodedState
    k: int = 0
    """Items of the last list that asked for nothing but its length; 0: there was none."""
    retrieved: Retrieved | None = None
    predictions: dict[str, Tensor] | None = None

    def follows(self, stamp: Stamp) -> bool:
        """Whether bundle, history and catalogue are those of the stamp."""
        return self.state.stamp == stamp and self.state.stamp.items == stamp.items

    def list_of(self, state: EncodedState, k: int) -> tuple[Retrieved, dict[str, Tensor]] | None:
        """Candidates and their predictions for this very state."""
        if state is not self.state or k != self.k or self.retrieved is None or self.predictions is None:
            return None
        return self.retrieved, self.predictions

    def keep(self, k: int, retrieved: Retrieved, predictions: dict[str, Tensor]) -> None:
        """Only what the stages answered whole, and for the catalogue that the state was made for."""
        if not retrieved.degraded and retrieved.items == self.state.stamp.items:
            self.k, self.retrieved, self.predictions = k, retrieved, predictions


class Users:
    """The users asked for last, at most `most`."""

    def __init__(self, most: int) -> None:
        self.most, self._kept = most, OrderedDict[tuple[str, str], Remembered]()

    def get(self, bundle: str, user_id: str | None) -> Remembered | None:
        """Of a user, whatever it follows from. None also for nobody."""
        if user_id is None or (found := self._kept.get((bundle, user_id))) is None:
            return None
        self._kept.move_to_end((bundle, user_id))
        return found

    def put(self, user_id: str | None, state: EncodedState) -> None:
        """A newer state of a user."""
        if user_id is None or not self.most:
            return
        self._kept[state.stamp.bundle, user_id] = Remembered(state)
        self._kept.move_to_end((state.stamp.bundle, user_id))
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
