"""Trunks. A new one is one file and one entry of `TRUNKS`."""

from __future__ import annotations

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.trunks.base import Cache, Trunk, WindowFullError
from mtrec_ray.models.trunks.hstu import Hstu
from mtrec_ray.models.trunks.ligr import Ligr
from mtrec_ray.models.trunks.sasrec import SasRec

__all__ = ["TRUNKS", "Cache", "Trunk", "WindowFullError", "build_trunk"]

TRUNKS = {"sasrec": SasRec, "ligr": Ligr, "hstu": Hstu}


def build_trunk(config: ModelConfig, length: int) -> Trunk:
    """length: L."""
    return TRUNKS[config.trunk](config, length)
