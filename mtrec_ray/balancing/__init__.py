"""Balancers. A new one is one file and one case in `build_balancer`."""

from __future__ import annotations

import torch

from mtrec_ray.balancing.base import Balancer, Static
from mtrec_ray.balancing.dwa import DynamicWeightAverage
from mtrec_ray.balancing.famo import Famo
from mtrec_ray.balancing.gramian import GramianBalancer, MissingSolver, gramian
from mtrec_ray.balancing.record import GradientRecord
from mtrec_ray.balancing.uncertainty import Uncertainty
from mtrec_ray.config import BalancingConfig

__all__ = ["Balancer", "GradientRecord", "MissingSolver", "build_balancer", "gramian"]


def build_balancer(config: BalancingConfig, weights: list[float], seed: int = 0) -> Balancer:
    """weights: static λ per task. Raises MissingSolver."""
    static_T = torch.tensor(weights)
    match config.kind:
        case "static":
            return Static(static_T)
        case "uncertainty":
            return Uncertainty(static_T)
        case "dwa":
            return DynamicWeightAverage(static_T, config.dwa_temperature)
        case "famo":
            return Famo(static_T, config.famo_learning_rate, config.famo_decay)
        case kind:
            return GramianBalancer(kind, static_T, seed, config.update_every, config.cagrad_c)
