"""Sharing layers. A new one is one file and one entry of `SHARING`."""

from __future__ import annotations

from collections.abc import Sequence

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Sharing
from mtrec_ray.models.sharing.shared_bottom import SharedBottom

__all__ = ["SHARING", "Sharing", "build_sharing"]

SHARING = {"shared_bottom": SharedBottom}


def build_sharing(config: ModelConfig, tasks: Sequence[str], context_width: int) -> Sharing:
    """tasks: names of the pointwise tasks; context_width: C."""
    return SHARING[config.sharing](config, tasks, context_width)
