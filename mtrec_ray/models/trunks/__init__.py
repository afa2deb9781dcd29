"""Trunks. A new one is one file and one entry of `TRUNKS`."""

from __future__ import annotations

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.trunks.base import Trunk
from mtrec_ray.models.trunks.sasrec import SasRec

__all__ = ["TRUNKS", "Trunk", "build_trunk"]

TRUNKS = {"sasrec": SasRec}


def build_trunk(config: ModelConfig, length: int) -> Trunk:
    """length: L."""
    return TRUNKS[config.trunk](config, length)
