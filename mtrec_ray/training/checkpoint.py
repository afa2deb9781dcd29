"""A checkpoint: everything a run needs to go on, in one file, written whole or not at all.

Random states are no part of it: every draw comes from a seed made of (seed, step, rank), so the cursor is enough.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

NAME = "state.pt"


def save(folder: str | Path, state: dict[str, Any]) -> Path:
    """Write tensors, numbers, strings and containers of them into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{NAME}.{os.getpid()}"
    torch.save(state, draft)
    draft.replace(folder / NAME)
    return folder / NAME


def load(folder: str | Path) -> dict[str, Any] | None:
    """The state in a folder; None when there is none. Raises ValueError when it is damaged.

    Only tensors and plain values are unpickled.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return None
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{path}: damaged checkpoint ({type(error).__name__}: {error}); delete it to start anew") from None
