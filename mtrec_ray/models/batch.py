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


SESSION_BUCKETS = 14
"""0 is padding; 1, 2, 3 are places in a session, 4 is 4 to 7, 5 is 8 to 15 and so on. Bucket 1 begins a session."""


@dataclass
class HistoryBatch:
    """Histories, padded at the end (a causal trunk never looks there)."""

    item_BS: Tensor
    """int64 catalogue positions; 0 where padded."""
    length_B: Tensor
    """int64, events shown."""
    gap_BS: Tensor
    """int64 bucket of the time since the event before."""
    time_BS: Tensor
    """int64 ms UTC; 0 where padded."""
    actions_BS: dict[str, Tensor] = field(default_factory=dict)
    """float32 per action; NaN is missing."""
    context_BS: dict[str, Tensor] = field(default_factory=dict)
    """A feature's encoded values (features.py): int64 or float32; int64 (B, S, longest) of a multi-hot one. 0 or NaN is
    missing."""
    session_BS: Tensor | None = None
    """int64 bucket of the event's place in its session; None where sessions are off."""

    def __len__(self) -> int:
        return len(self.length_B)

    def to(self, device: torch.device) -> HistoryBatch:
        return _to(self, device)  # type: ignore[no-any-return]


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
    """As context_BS: (M,), or (M, longest) of a multi-hot feature."""

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
        return _to(self, device)  # type: ignore[no-any-return]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.device == device:
            return value
        if device.type == "cuda":
            value = value.pin_memory()
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


def session_bucket(time_ms: NDArray[np.int64], first: NDArray[np.bool_], gap_ms: float) -> NDArray[np.int64]:
    """Bucket of each event's place in its session; a gap above `gap_ms`, and the first event shown, begin one."""
    begins = first.copy()
    begins[1:] |= np.diff(time_ms) > gap_ms
    index = np.arange(len(time_ms))
    place = index - np.maximum.accumulate(np.where(begins, index, 0)) + 1
    bucket = np.where(place <= 3, place, np.floor(np.log2(np.maximum(place, 1))).astype(np.int64) + 2)
    return np.minimum(bucket, SESSION_BUCKETS - 1)


def feature_tensor(values: NDArray[Any]) -> Tensor:
    """Encoded values -> int64 or float32."""
    return torch.from_numpy(values.astype(np.float32 if values.dtype.kind == "f" else np.int64))


def collate_history(
    item: NDArray[np.integer[Any]],
    time: NDArray[np.int64],
    length: NDArray[np.int64],
    actions: dict[str, NDArray[np.float32]],
    context: dict[str, NDArray[Any]],
    session_gap_ms: float | None = None,
) -> HistoryBatch:
    """Flat arrays (one window after the other, `length` events each) -> padded tensors.

    context: encoded features, with a row per event where they are multi-hot. session_gap_ms: None leaves sessions out.
    """
    rows, width = len(length), int(length.max(initial=0))
    offsets = np.concatenate([[0], np.cumsum(length)])
    row = np.repeat(np.arange(rows), length)
    place = row * width + np.arange(offsets[-1]) - offsets[row]
    first = np.zeros(len(item), dtype=bool)
    first[offsets[:-1][length > 0]] = True

    def pad(values: NDArray[Any], dtype: Any, fill: float = 0) -> Tensor:
        out = np.full((rows * width, *values.shape[1:]), fill, dtype)
        out[place] = values
        return torch.from_numpy(out.reshape(rows, width, *values.shape[1:]))

    def pad_feature(values: NDArray[Any]) -> Tensor:
        return pad(values, np.float32, np.nan) if values.dtype.kind == "f" else pad(values, np.int64)

    return HistoryBatch(
        item_BS=pad(item, np.int64),
        length_B=torch.from_numpy(length.astype(np.int64)),
        gap_BS=pad(gap_bucket(time, first), np.int64),
        time_BS=pad(time, np.int64),
        actions_BS={n: pad(v, np.float32, np.nan) for n, v in actions.items()},
        context_BS={n: pad_feature(v) for n, v in context.items()},
        session_BS=None if session_gap_ms is None else pad(session_bucket(time, first, session_gap_ms), np.int64),
    )
