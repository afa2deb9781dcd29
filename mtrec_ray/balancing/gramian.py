"""Weights from the Gramian of the tasks' gradients at the state: mgda, pcgrad, cagrad, aligned_mtl, imtl_g, upgrad, nash_mtl.

Each rank back-propagates every task from its loss to `state_BLD` alone and forms G = g gᵀ (T × T); the sum over ranks is the
Gramian of the global batch (DESIGN §1.5). The weights are solved by TorchJD (Quinton & Rey 2024, arXiv 2406.16232), those of
nash_mtl here, with the Gramian divided by its mean diagonal, since solvers have absolute tolerances and gradients of mean
losses are small.

    mgda         Désidéri 2012; Sener & Koltun 2018, arXiv 1810.04650
    pcgrad       Yu et al. 2020, arXiv 2001.06782
    cagrad       Liu et al. 2021, arXiv 2110.14048
    aligned_mtl  Senushkin et al. 2023, arXiv 2305.19000
    imtl_g       Liu et al. 2021, Towards Impartial Multi-task Learning (ICLR)
    upgrad       Quinton & Rey 2024, arXiv 2406.16232
    nash_mtl     Navon et al. 2022, arXiv 2202.01017
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtrec_ray.balancing.base import Balancer, rescaled

log = logging.getLogger(__name__)

GRAMIAN_KINDS = ("mgda", "pcgrad", "cagrad", "aligned_mtl", "imtl_g", "upgrad", "nash_mtl")


class MissingSolver(RuntimeError):
    """A balancer whose solver is not installed."""


def gramian(losses: Sequence[Tensor], state_BLD: Tensor) -> Tensor:
    """Inner products of ∂L/∂state over the tasks -> float64 gramian_TT of this rank.

    losses: a scalar per task, each with a graph of its own above the state. A task that does not read the state has a row
    of zeros. The graph is kept for the backward pass.
    """
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, state_BLD, retain_graph=True, allow_unused=True)[0] if loss.requires_grad else None
        rows.append(torch.zeros_like(state_BLD).flatten() if found is None else found.flatten())
    gradient_TF = torch.stack(rows).float()
    with torch.autocast(state_BLD.device.type, enabled=False):  # solvers and cosines need more than bfloat16's 8 bits
        return (gradient_TF @ gradient_TF.T).double()


class GramianBalancer(Balancer):
    """λ = weights of a TorchJD weighting over the tasks with a gradient at the state and a static λ; the others keep theirs.

    What cannot be solved leaves λ as it was; `unsolved` counts such steps.
    """

    needs_gramian = True
    unsolved: Tensor

    def __init__(self, kind: str, static_T: Tensor, seed: int, update_every: int = 1, cagrad_c: float = 0.5) -> None:
        super().__init__(static_T)
        self.kind, self.seed, self.update_every = kind, seed, update_every
        self.weighting = _weighting(kind, cagrad_c)
        self.register_buffer("unsolved", torch.zeros((), dtype=torch.int64))

    def see_gramian(self, gramian_TT: Tensor, step: int) -> None:
        gramian_TT = gramian_TT.detach().double().cpu()
        active_T = (gramian_TT.diagonal() > 0) & (self.static_T.cpu() > 0)
        if int(active_T.sum()) < 2 or not bool(torch.isfinite(gramian_TT).all()):
            return
        weight_T = torch.zeros(len(active_T), dtype=torch.float64)
        weight_T[active_T] = self.solve(gramian_TT[active_T][:, active_T], step)
        found_T = rescaled(weight_T, self.static_T.double().cpu(), active_T)
        if found_T is None:
            self.unsolved += 1
            return
        self.lambda_T.copy_(found_T)

    def solve(self, gramian_AA: Tensor, step: int) -> Tensor:
        """Weights of the active tasks before rescaling; NaN where the solver gives up."""
        gramian_AA = gramian_AA / gramian_AA.diagonal().mean()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # solvers speak of inaccuracy where tasks are parallel
            torch.manual_seed((self.seed * 1_000_003 + step) % 2**63)  # pcgrad's random orders
            try:
                return self.weighting(gramian_AA)  # type: ignore[no-any-return]
            except Exception as error:  # of any solver: no weights are better than no training
                log.warning("balancing.kind %s, step %d: no weights (%s); the last ones stay", self.kind, step, error)
                return torch.full((len(gramian_AA),), float("nan"), dtype=torch.float64)


def bargain(gramian_AA: Tensor) -> Tensor:
    """Nash-MTL's bargaining solution: the α > 0 with G α = 1 / α, by damped Newton steps on ½ αᵀGα - Σ log α.

    That function is self-concordant, so the steps 1 / (1 + decrement) end at its only minimum (Boyd & Vandenberghe 2004,
    §9.6). TorchJD's NashMTL looks for the same point by a sequence of programs that stops at 1e-3 of the condition; its
    answers then depend on rounding, and ranks would not agree to 1e-5. NaN where there is no such point: gradients that
    cancel out.
    """
    alpha_A = gramian_AA.diagonal().rsqrt()
    far = 1e6 * alpha_A.max()
    for _ in range(100):
        if alpha_A.max() > far:
            break
        gradient_A = gramian_AA @ alpha_A - 1 / alpha_A
        step_A = torch.linalg.solve(gramian_AA + torch.diag(alpha_A**-2), -gradient_A)
        decrement = float((-gradient_A @ step_A).clamp(min=0).sqrt())
        alpha_A = alpha_A + step_A / (1 if decrement < 0.25 else 1 + decrement)
        if decrement < 1e-10:
            return alpha_A
    return torch.full_like(alpha_A, float("nan"))


def _weighting(kind: str, cagrad_c: float) -> Callable[[Tensor], Any]:
    """gramian_AA -> weights. Raises MissingSolver."""
    if kind == "nash_mtl":
        return bargain
    try:
        import torchjd.aggregation as torchjd

        return {
            "mgda": torchjd.MGDAWeighting, "pcgrad": torchjd.PCGradWeighting, "aligned_mtl": torchjd.AlignedMTLWeighting,
            "cagrad": lambda: torchjd.CAGradWeighting(c=cagrad_c), "imtl_g": torchjd.IMTLGWeighting,
            "upgrad": torchjd.UPGradWeighting,
        }[kind]()  # fmt: skip
    except ImportError as error:
        raise MissingSolver(
            f"balancing.kind: {kind} needs {error.name or 'TorchJD'}: pip install 'mtrec_ray[balancing]'"
        ) from error
