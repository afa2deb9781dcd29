"""Chains of binary tasks along a funnel (impression → click → cart → purchase), built by `depends_on`.

A task's logit is that of the whole event: every step up to this one happens.

esmm (Ma et al. 2018, Entire Space Multi-Task Model, arXiv 1804.07931): the head of a dependent task says how likely its step
is once the one before has happened, and the probability of the whole event is the product,

    p_t = p_{t-1} · sigmoid(a_t),    a_t = head_t(h_t)

trained by its own label over all impressions; the loss reaches the heads of all steps before it. There is no loss on the
conditional probability itself, which would see clicked impressions only.

aitm (Xi et al. 2021, Adaptive Information Transfer Multi-task, arXiv 2105.08489): the head says p_t itself, and its input takes
over what the step before knows, with z of a chain's first task being its h:

    u ∈ {q, p}:  q = h_t,  p = g(z_{t-1})
    z_t = Σ_u w_u · V u,   w = softmax_u(<Q u, K u> / √H)
    p_t = sigmoid(head_t(z_t))

with g one layer. The calibrator adds `calibration` · max(0, p_t − p_{t-1}) to the loss (tasks/binary.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import BinaryTask, TaskConfig


def logit_of_both(a: Tensor, b: Tensor) -> Tensor:
    """Logit of sigmoid(a) · sigmoid(b).

    1 / (σ(a) σ(b)) − 1 = e^−a + e^−b + e^−(a+b), so it is −log of that sum: no difference of near numbers anywhere, and
    BCE on it gives log p = logσ(a) + logσ(b) and log(1 − p) without loss of digits.
    """
    return -torch.logsumexp(torch.stack([-a, -b, -a - b]), dim=0)


class Head(Protocol):
    """A binary task, as a chain sees it."""

    def logit(self, shared: Tensor) -> Tensor: ...


class Transfer(nn.Module):
    """AITM's adaptive information transfer: (h_t, z_{t-1}) -> z_t, all (..., H)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.carry = nn.Linear(width, width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, own: Tensor, before: Tensor) -> Tensor:
        u = torch.stack([own, F.gelu(self.carry(before))], dim=-2)
        agreement = (self.query(u) * self.key(u)).sum(-1, keepdim=True) / u.shape[-1] ** 0.5
        return (torch.softmax(agreement, dim=-2) * self.value(u)).sum(-2)


class Chains(nn.Module):
    """What the heads of dependent tasks read: H numbers and, after them, the logit of the event that comes before."""

    def __init__(self, tasks: Mapping[str, TaskConfig], width: int) -> None:
        super().__init__()
        steps = {n: t for n, t in tasks.items() if isinstance(t, BinaryTask)}
        self.parents = parents_first({n: t.depends_on for n, t in steps.items() if t.depends_on})
        self.transfers = nn.ModuleDict({n: Transfer(width) for n in self.parents if steps[n].chain == "aitm"})

    def forward(self, shared: dict[str, Tensor], heads: Mapping[str, Head]) -> dict[str, Tensor]:
        """Output of the sharing layers, task: (..., H) -> what each head reads, (..., H), of dependent tasks (..., H + 1)."""
        out = dict(shared)
        for name, parent in self.parents.items():
            own = shared[name]
            if name in self.transfers:
                own = self.transfers[name](own, out[parent][..., : own.shape[-1]])
            out[name] = torch.cat([own, heads[parent].logit(out[parent])[..., None]], dim=-1)
        return out


def parents_first(depends_on: dict[str, str]) -> dict[str, str]:
    """Dependent task -> parent, in an order in which a parent's own link comes before its children's."""
    order: dict[str, str] = {}
    rest = dict(depends_on)
    while rest:
        ready = [n for n, parent in rest.items() if parent not in rest]
        assert ready, "the configuration refuses cycles"
        order |= {n: rest.pop(n) for n in ready}
    return order
