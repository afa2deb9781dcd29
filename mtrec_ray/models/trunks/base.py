"""The contract of a trunk: event tokens -> a state at every position; one more event costs one position."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.dropout import Dropout


class WindowFullError(ValueError):
    """A history that fills the window has no place for another event."""


@dataclass
class Cache:
    """Keys and values of what was read (a key-value cache); L positions are reserved. `append` changes it in place."""

    key: list[Tensor]
    """Per layer, (B, H, L, E)."""
    value: list[Tensor]
    time_BL: Tensor
    """int64 ms; position 0, the start token, has none."""
    length_B: Tensor
    """Positions filled, the start token included."""

    @property
    def full_B(self) -> Tensor:
        """bool: the window has no place left. Every event would move down by one position, which changes all its keys: encode
        the last L - 1 events afresh, by `prefill`."""
        return self.length_B >= self.time_BL.shape[1]


@dataclass
class Scope:
    """What the queries of one pass may read: a whole window (Q = K = its positions), or one new event each (Q = 1, K = L)."""

    position_BQ: Tensor
    """(B, Q), or (1, Q) where it is the same for all."""
    time_BQ: Tensor
    time_BK: Tensor
    """int64 ms; anything at position 0."""
    cache: Cache | None
    """Filled by a whole pass, read and filled by an appended event."""
    append: bool
    relative: Any = None
    """What `Trunk.relate` says about all pairs, for all layers."""

    def known(self, layer: int, key_BHQE: Tensor, value_BHQE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the queries' own positions -> of all K positions."""
        if self.cache is None:
            return key_BHQE, value_BHQE
        key, value = self.cache.key[layer], self.cache.value[layer]
        if not self.append:
            key[:, :, : key_BHQE.shape[2]], value[:, :, : key_BHQE.shape[2]] = key_BHQE, value_BHQE
            return key_BHQE, value_BHQE
        row = torch.arange(len(key), device=key.device)
        key[row, :, self.position_BQ[:, 0]], value[row, :, self.position_BQ[:, 0]] = key_BHQE[:, :, 0], value_BHQE[:, :, 0]
        return key, value

    @property
    def visible_BQK(self) -> Tensor:
        """bool: key positions up to the query's own."""
        return torch.arange(self.time_BK.shape[1], device=self.time_BK.device) <= self.position_BQ[:, :, None]


class Layer(nn.Module):
    """One layer of a trunk."""

    heads: int

    def forward(self, x_BQD: Tensor, scope: Scope, index: int) -> Tensor:
        """index: which layer it is, for `scope.known`."""
        raise NotImplementedError


class Trunk(nn.Module):
    """A causal reader of events. Position 0 is a learned start token, counted in L. Padding is at the end, where no earlier
    position looks, so it needs no mask.

    position: whether a learned vector per position, counted from the start token, is added.
    """

    length: int
    """L, the most positions that it reads."""

    def __init__(self, config: ModelConfig, length: int, layer: Callable[[], Layer], position: bool) -> None:
        super().__init__()
        self.length, self.width, self.heads = length, config.width, config.heads
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.position = nn.Embedding(length, config.width) if position else None
        if self.position is not None:
            nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.ModuleList(layer() for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, token_BSD: Tensor, time_BS: Tensor, cache: Cache | None = None) -> Tensor:
        """token_BSD: S ≤ L - 1 events; time_BS: their times, int64 ms (anything where padded).

        -> state_BLD with L = S + 1; state p has seen events 1..p. A cache is filled on the way.
        """
        B, S, D = token_BSD.shape
        assert self.length > S, f"{S} events do not fit a window of {self.length}"
        x_BLD = torch.cat([self.start.expand(B, 1, D), token_BSD], dim=1)
        position_1L = torch.arange(S + 1, device=x_BLD.device)[None]
        time_BL = torch.cat([time_BS.new_zeros(B, 1), time_BS], dim=1)
        return self._read(x_BLD, Scope(position_1L, time_BL, time_BL, cache, append=False))

    def prefill(self, token_BSD: Tensor, time_BS: Tensor, length_B: Tensor) -> tuple[Tensor, Cache]:
        """Histories, S may be 0, of length_B ≤ S events each -> the state after each one's last event (B, D), and a cache
        that `append` goes on from. For inference (eval mode, no gradients)."""
        B, S, D = token_BSD.shape
        H, L = self.heads, self.length
        key, value = ([token_BSD.new_zeros(B, H, L, D // H) for _ in self.layers] for _ in range(2))
        cache = Cache(key, value, time_BS.new_zeros(B, L), length_B + 1)
        cache.time_BL[:, 1 : S + 1] = time_BS
        state_BLD = self(token_BSD, time_BS, cache)
        return state_BLD[torch.arange(B, device=state_BLD.device), length_B], cache

    def append(self, token_BD: Tensor, time_B: Tensor, cache: Cache) -> Tensor:
        """One more event of each history -> the state after it (B, D), as a pass over the whole history gives it.

        Raises WindowFullError, and leaves the cache as it was, when a history already fills its window.
        """
        if bool(cache.full_B.any()):
            rows = cache.full_B.nonzero().flatten().tolist()
            raise WindowFullError(f"rows {rows} hold {self.length - 1} events, all the window has; prefill with their last events")
        row, position_B = torch.arange(len(token_BD), device=token_BD.device), cache.length_B
        cache.time_BL[row, position_B] = time_B
        scope = Scope(position_B[:, None], time_B[:, None], cache.time_BL, cache, append=True)
        state_BD = self._read(token_BD[:, None], scope)[:, 0]
        cache.length_B = position_B + 1
        return state_BD

    def relate(self, scope: Scope) -> Any:
        """What the layers share about pairs of positions."""

    def _read(self, x_BQD: Tensor, scope: Scope) -> Tensor:
        if self.position is not None:
            x_BQD = x_BQD + self.position(scope.position_BQ)
        x_BQD = self.dropout(x_BQD)
        scope.relative = self.relate(scope)
        for index, layer in enumerate(self.layers):
            x_BQD = layer(x_BQD, scope, index)
        return self.norm(x_BQD)  # type: ignore[no-any-return]
