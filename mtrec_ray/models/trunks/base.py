"""The contract of a trunk: event tokens -> a state at every position."""

from __future__ import annotations

from torch import Tensor, nn


class Trunk(nn.Module):
    """A causal reader of events. Position 0 is a learned start token, counted in L."""

    length: int
    """L, the most positions that it reads."""

    def forward(self, token_BSD: Tensor, time_BS: Tensor) -> Tensor:
        """token_BSD: S ≤ L - 1 events; time_BS: their times, int64 ms (anything where padded).

        -> state_BLD with L = S + 1; state p has seen events 1..p.
        """
        raise NotImplementedError
