"""Weights from the Gramian of the tasks' gradients at the state: mgda, pcgrad, cagrad, aligned_mtl, imtl_g, upgrad, nash_mtl.

Each rank back-propagates every task from its loss to `state_BLD` alone and forms G = g gᵀ (T × T); the sum over ranks is the
Gramian of the global batch (DESIGN §1.5). The weights are solved by TorchJD (Quinton & Rey 2024, arXiv 2406.16232), with the
Gramian divided by its mean diagonal, since the solvers have absolute tolerances and gradients of mean losses are small.

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
    gradient_TF = torch.stack(rows)
    return (gradient_TF @ gradient_TF.T).double()


class GramianBalancer(Balancer):
    """λ = weights of a TorchJD weighting over the tasks with a gradient at the state and a static λ; the others keep theirs.

    What cannot be solved leaves λ as it was; `unsolved` counts such steps.
    """

    needs_gramian = True
    unsolved: Tensor
    alpha_T: Tensor

    def __init__(self, kind: str, static_T: Tensor, seed: int, update_every: int = 1, cagrad_c: float = 0.5) -> None:
        super().__init__(static_T)
        self.kind, self.seed, self.update_every, self.cagrad_c = kind, seed, update_every, cagrad_c
        self.register_buffer("unsolved", torch.zeros((), dtype=torch.int64))
        self.register_buffer("alpha_T", torch.ones(len(static_T), dtype=torch.float64))  # nash_mtl starts from its last answer
        self._solvers: dict[int, Any] = {}
        self._solver(2)  # a missing solver is said before anything trains

    def see_gramian(self, gramian_TT: Tensor, step: int) -> None:
        gramian_TT = gramian_TT.detach().double().cpu()
        active_T = (gramian_TT.diagonal() > 0) & (self.static_T.cpu() > 0)
        if int(active_T.sum()) < 2 or not bool(torch.isfinite(gramian_TT).all()):
            return
        weight_T = torch.zeros(len(active_T), dtype=torch.float64)
        weight_T[active_T] = self.solve(gramian_TT[active_T][:, active_T], active_T, step)
        found_T = rescaled(weight_T, self.static_T.double().cpu(), active_T)
        if found_T is None:
            self.unsolved += 1
            return
        self.lambda_T.copy_(found_T)

    def solve(self, gramian_AA: Tensor, active_T: Tensor, step: int) -> Tensor:
        """Weights of the active tasks before rescaling; NaN where the solver gives up."""
        gramian_AA = gramian_AA / gramian_AA.diagonal().mean()
        solver = self._solver(len(gramian_AA))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # solvers speak of inaccuracy where tasks are parallel
            torch.manual_seed((self.seed * 1_000_003 + step) % 2**63)  # pcgrad's random orders
            try:
                if self.kind != "nash_mtl":
                    return solver(gramian_AA)  # type: ignore[no-any-return]
                solver.prvs_alpha = self.alpha_T[active_T].numpy()
                weight_A = solver(_factor(gramian_AA))
                if bool(torch.isfinite(weight_A).all()):
                    self.alpha_T[active_T] = weight_A
                return weight_A  # type: ignore[no-any-return]
            except Exception as error:  # of any solver: no weights are better than no training
                log.warning("balancing.kind %s, step %d: no weights (%s); the last ones stay", self.kind, step, error)
                return torch.full((len(gramian_AA),), float("nan"), dtype=torch.float64)

    def _solver(self, tasks: int) -> Any:
        """gramian_AA -> weights; for nash_mtl a factor of the Gramian -> weights."""
        key = tasks if self.kind == "nash_mtl" else 0
        if key not in self._solvers:
            try:
                self._solvers[key] = _SOLVERS[self.kind](self, tasks)
            except ImportError as error:
                raise MissingSolver(
                    f"balancing.kind: {self.kind} needs {error.name or 'TorchJD'}: pip install 'mtrec_ray[balancing]'"
                ) from error
        return self._solvers[key]


def _factor(gramian_AA: Tensor) -> Tensor:
    """J with J Jᵀ = G: an aggregator that wants a Jacobian is given any of them."""
    value_A, vector_AA = torch.linalg.eigh(gramian_AA)
    return vector_AA * value_A.clamp(min=0).sqrt()


def _torchjd(name: str) -> Callable[[GramianBalancer, int], Any]:
    def build(balancer: GramianBalancer, tasks: int) -> Any:
        import torchjd.aggregation as aggregation

        if name == "CAGradWeighting":
            return aggregation.CAGradWeighting(c=balancer.cagrad_c)
        if name == "NashMTL":
            return aggregation.NashMTL(n_tasks=tasks, max_norm=0.0).weighting
        return getattr(aggregation, name)()

    return build


_SOLVERS = {
    "mgda": _torchjd("MGDAWeighting"),
    "pcgrad": _torchjd("PCGradWeighting"),
    "cagrad": _torchjd("CAGradWeighting"),
    "aligned_mtl": _torchjd("AlignedMTLWeighting"),
    "imtl_g": _torchjd("IMTLGWeighting"),
    "upgrad": _torchjd("UPGradWeighting"),
    "nash_mtl": _torchjd("NashMTL"),
}
