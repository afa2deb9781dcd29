"""Sharing layers. A new one is one file and one entry of `SHARING`."""

from __future__ import annotations

from collections.abc import Sequence

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Inputs, Sharing
from mtrec_ray.models.sharing.cgc import CGC
from mtrec_ray.models.sharing.mmoe import MMoE
from mtrec_ray.models.sharing.pepnet import PEPNet
from mtrec_ray.models.sharing.ple import PLE
from mtrec_ray.models.sharing.shared_bottom import SharedBottom

__all__ = ["CGC", "PLE", "SHARING", "Inputs", "MMoE", "PEPNet", "SharedBottom", "Sharing", "build_sharing"]

SHARING: dict[str, type[Sharing]] = {"shared_bottom": SharedBottom, "mmoe": MMoE, "cgc": CGC, "ple": PLE, "pepnet": PEPNet}


def build_sharing(config: ModelConfig, tasks: Sequence[str], context_width: int) -> Sharing:
    """tasks: names of the pointwise tasks, none for no layer; context_width: C."""
    kind = SHARING[config.sharing] if tasks else Sharing
    return kind(config, tasks, context_width)
