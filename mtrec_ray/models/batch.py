"""The tensors that the model reads. Shapes: B windows, S history events (S ≤ L - 1), M targets, P pairs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

GAP_BUCKETS = 34
"""0 is unknown (the first event shown); b ≥ 1 is a gap with floor(log2(1 + seconds)) = b - 1."""


@dataclass
class HistoryBatch:
    """Histories, padded at the end (a causal trunk never looks there)."""

    item_BS: Tensor
    """int64 catalogue positions; 0 where padded."""
    length_B: Tensor
    """int64, events shown."""
    gap_BS: Tensor
    """int64 bucket of the time since the event before."""
    actions_BS: dict[str, Tensor] = field(default_factory=dict)
    """float32 per action; NaN is missing."""
    context_BS: dict[str, Tensor] = field(default_factory=dict)
    """int64 per context column; 0 is unknown."""

    def __len__(self) -> int:
        return len(self.length_B)


@dataclass
class TargetBatch:
    """Targets of all windows, flattened (never padded to M)."""

    window_M: Tensor
    pos_M: Tensor
    """Last history position visible: 0 is the start token."""
    item_M: Tensor
    positive_M: Tensor
    """bool, retrieval positive."""
    labels_M: dict[str, Tensor]
    """float32; NaN is missing."""
    context_M: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.item_M)


@dataclass
class Batch:
    """A training batch: one rank's slice of a global batch."""

    history: HistoryBatch
    targets: TargetBatch
    profile_B: dict[str, Tensor]
    """int64 class per attribute; -1 is missing or masked."""
    profile_weight_B: Tensor
    pair_anchor_P: Tensor
    pair_positive_P: Tensor
    step: int = 0
    """Global optimiser step; seeds what must be the same on all ranks."""

    def to(self, device: torch.device) -> Batch:
        return _to(self, device)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return type(value)(**{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return value


def gap_bucket(time_ms: NDArray[np.int64], first: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Bucket of the time since the previous entry; `first` marks entries that have none."""
    gap = np.zeros(len(time_ms), np.float64)
    gap[1:] = np.maximum(np.diff(time_ms), 0) / 1000.0
    bucket = np.floor(np.log2(1.0 + gap)).astype(np.int64) + 1
    return np.where(first, 0, np.minimum(bucket, GAP_BUCKETS - 1))


def collate_history(
    item: NDArray[np.integer[Any]],
    time: NDArray[np.int64],
    length: NDArray[np.int64],
    actions: dict[str, NDArray[np.float32]],
    context: dict[str, NDArray[np.integer[Any]]],
) -> HistoryBatch:
    """Flat arrays (one window after the other, `length` events each) -> padded tensors."""
    rows, width = len(length), int(length.max(initial=0))
    offsets = np.concatenate([[0], np.cumsum(length)])
    row = np.repeat(np.arange(rows), length)
    place = row * width + np.arange(offsets[-1]) - offsets[row]
    first = np.zeros(len(item), dtype=bool)
    first[offsets[:-1][length > 0]] = True

    def pad(values: NDArray[Any], dtype: Any, fill: float = 0) -> Tensor:
        out = np.full(rows * width, fill, dtype)
        out[place] = values
        return torch.from_numpy(out.reshape(rows, width))

    return HistoryBatch(
        item_BS=pad(item, np.int64),
        length_B=torch.from_numpy(length.astype(np.int64)),
        gap_BS=pad(gap_bucket(time, first), np.int64),
        actions_BS={n: pad(v, np.float32, np.nan) for n, v in actions.items()},
        context_BS={n: pad(v, np.int64) for n, v in context.items()},
    )
