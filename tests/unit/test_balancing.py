"""Weights of tasks against closed forms, TorchJD on the full Jacobian, and the rules of DESIGN §1.5."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torchjd.aggregation as tj
from torch import Tensor

from mtrec_ray.balancing import GradientRecord, build_balancer, gramian
from mtrec_ray.balancing.gramian import GRAMIAN_KINDS, bargain
from mtrec_ray.config import BalancingConfig

KINDS = BalancingConfig.model_fields["kind"].annotation.__args__  # type: ignore[union-attr]


def build(kind: str, weights: list[float], **settings: Any) -> Any:
    return build_balancer(BalancingConfig(kind=kind, **settings), weights, seed=3)  # type: ignore[arg-type]


def jacobian(seed: int, tasks: int = 4, features: int = 50) -> Tensor:
    return torch.randn(tasks, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(kind: str, jacobian_TF: Tensor) -> Tensor:
    """TorchJD's own aggregation of the whole Jacobian."""
    T = len(jacobian_TF)
    aggregators: dict[str, Any] = {
        "mgda": tj.MGDA, "cagrad": lambda: tj.CAGrad(c=0.5), "aligned_mtl": tj.AlignedMTL, "imtl_g": tj.IMTLG,
        "upgrad": tj.UPGrad, "nash_mtl": lambda: tj.NashMTL(T, max_norm=0.0), "pcgrad": tj.PCGrad,
    }  # fmt: skip
    return aggregators[kind]()(jacobian_TF)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GRAMIAN_KINDS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_weighted_sum_points_where_torchjd_points_on_the_full_jacobian(kind: str, scale: float) -> None:
    for seed in range(4):
        J = jacobian(seed)
        balancer = build(kind, [1.0, 0.5, 0.3, 0.2])
        balancer.see_gramian(scale**2 * J @ J.T, step=7)
        torch.manual_seed(3 * 1_000_003 + 7)  # the orders that pcgrad draws
        wanted = reference(kind, J)
        found = balancer.current().double() @ J
        loose = kind == "nash_mtl"  # TorchJD's stops within 1e-3 of the condition
        torch.testing.assert_close(found / found.norm(), wanted / wanted.norm(), rtol=0, atol=5e-3 if loose else 3e-5)
        assert float(balancer.current().sum()) == pytest.approx(2.0)
        assert not balancer.unsolved


def test_mgda_of_two_tasks_is_the_shortest_vector_between_them() -> None:
    a, b = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
    J = torch.stack([a, b])
    balancer = build("mgda", [1.0, 1.0])
    balancer.see_gramian(J @ J.T, 0)
    w = float(((b - a) @ b) / ((a - b) @ (a - b)))  # of a: Sener & Koltun, equation 4
    torch.testing.assert_close(balancer.current(), torch.tensor([2 * w, 2 * (1 - w)]))


@pytest.mark.parametrize("kind", ["pcgrad", "upgrad"])
def test_two_conflicting_tasks_are_projected_by_hand(kind: str) -> None:
    """g₁ = (1, 0), g₂ = (-1, 1): each loses its part along the other, so w = (2, 1.5) before rescaling."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]]).double()
    balancer = build(kind, [1.0, 1.0])
    balancer.see_gramian(J @ J.T, 0)
    torch.testing.assert_close(balancer.current(), 2 * torch.tensor([2.0, 1.5]) / 3.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["imtl_g", "nash_mtl", "aligned_mtl", "mgda"])
def test_orthogonal_tasks_of_unequal_length_are_weighted_against_it(kind: str) -> None:
    """g₁ ⟂ g₂ with lengths 1 and 4: equal projections (IMTL-G) and bargaining (α Gα = 1) want w ∝ 1 / length,
    Aligned-MTL equal singular values, the shortest vector w ∝ 1 / length²."""
    J = torch.tensor([[1.0, 0.0], [0.0, 4.0]]).double()
    balancer = build(kind, [0.5, 0.5])
    balancer.see_gramian(J @ J.T, 0)
    ratio = 16.0 if kind == "mgda" else 4.0
    torch.testing.assert_close(balancer.current(), torch.tensor([ratio, 1.0]) / (ratio + 1), rtol=2e-3, atol=2e-3)


def test_cagrad_with_a_radius_of_zero_is_the_mean_gradient() -> None:
    J = jacobian(0)
    balancer = build("cagrad", [1.0] * 4, cagrad_c=0.0)
    balancer.see_gramian(J @ J.T, 0)
    torch.testing.assert_close(balancer.current(), torch.ones(4))


@pytest.mark.parametrize("kind", GRAMIAN_KINDS)
def test_tasks_without_a_gradient_keep_their_static_weight(kind: str) -> None:
    J = jacobian(1)
    J[2] = 0
    balancer = build(kind, [1.0, 0.5, 0.3, 0.2])
    balancer.see_gramian(J @ J.T, 0)
    assert float(balancer.current()[2]) == pytest.approx(0.3)
    assert float(balancer.current()[[0, 1, 3]].sum()) == pytest.approx(1.7)
    alone = build(kind, [1.0, 0.5, 0.2])
    alone.see_gramian((J @ J.T)[[0, 1, 3]][:, [0, 1, 3]], 0)
    torch.testing.assert_close(balancer.current()[[0, 1, 3]], alone.current(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_of_weight_zero_stays_off(kind: str) -> None:
    balancer = build(kind, [1.0, 0.0, 0.5])
    J = jacobian(2, tasks=3)
    for step in range(3):
        balancer.see_losses(torch.tensor([2.0, 1.0, 0.5]), torch.ones(3))
        balancer.see_gramian(J @ J.T, step)
        balancer.see_losses_after(torch.tensor([1.9, 0.9, 0.5]), torch.ones(3))
        balancer.end_epoch(torch.tensor([2.0, 1.0, 0.5]) / (step + 1))
    assert float(balancer.current()[1]) == 0
    assert bool(torch.isfinite(balancer.current()).all())


@pytest.mark.parametrize("kind", GRAMIAN_KINDS)
@pytest.mark.parametrize("case", ["one task", "opposite", "parallel", "nan", "huge"])
def test_odd_gramians_leave_finite_weights(kind: str, case: str) -> None:
    J = {
        "one task": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "opposite": torch.tensor([[1.0, 0.0], [-1.0, 0.0]]),
        "parallel": torch.tensor([[1.0, 1.0], [2.0, 2.0]]), "nan": torch.tensor([[math.nan, 0.0], [1.0, 0.0]]),
        "huge": torch.tensor([[1e12, 0.0], [1.0, 1e-6]]),
    }[case].double()  # fmt: skip
    balancer = build(kind, [1.0, 0.5])
    balancer.see_gramian(J @ J.T, 0)
    assert bool(torch.isfinite(balancer.current()).all())
    if case in ("one task", "nan"):
        torch.testing.assert_close(balancer.current(), torch.tensor([1.0, 0.5]))


def test_pcgrad_draws_by_seed_and_step_and_leaves_the_generator_alone() -> None:
    J = torch.tensor([[1.0, 0.2], [-1.0, 0.4], [0.3, -1.0]]).double()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    found = []
    for step in (5, 5, *range(6, 30)):
        balancer = build("pcgrad", [1.0, 1.0, 1.0])
        balancer.see_gramian(J @ J.T, step)
        found.append(balancer.current())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert any(not torch.allclose(found[0], f) for f in found[2:])


def test_the_bargaining_solution_meets_its_condition() -> None:
    """Navon et al. 2022, claim 3.1: G α = 1 / α."""
    for seed in range(5):
        J = jacobian(seed, tasks=6, features=8)
        J[3] *= 100.0
        alpha = bargain(J @ J.T)
        assert bool((alpha > 0).all())
        torch.testing.assert_close((J @ J.T) @ alpha * alpha, torch.ones(6, dtype=torch.float64))
    assert bool(torch.isnan(bargain(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).double())).all())


def test_dwa_gives_more_to_the_task_that_falls_slowly() -> None:
    balancer = build("dwa", [1.0, 0.5], dwa_temperature=2.0)
    balancer.end_epoch(torch.tensor([4.0, 1.0]))
    torch.testing.assert_close(balancer.current(), torch.tensor([1.0, 0.5]))  # no ratio yet
    balancer.end_epoch(torch.tensor([2.0, 0.9]))
    a, b = math.exp(0.5 / 2), math.exp(0.9 / 2)  # Liu et al. 2019, equation 7
    torch.testing.assert_close(balancer.current(), torch.tensor([1.0 * 2 * a / (a + b), 0.5 * 2 * b / (a + b)]))
    assert balancer.current()[1] > 0.5


def test_famo_weighs_by_the_inverse_loss_and_then_favours_who_falls_slowly() -> None:
    balancer = build("famo", [1.0, 1.0], famo_learning_rate=0.1, famo_decay=0.0)
    present = torch.ones(2)
    balancer.see_losses(torch.tensor([4.0, 1.0]), present)
    torch.testing.assert_close(balancer.current(), torch.tensor([0.4, 1.6]))  # z equal: ∝ 1 / L, with sum 2
    balancer.see_losses_after(torch.tensor([2.0, 0.99]), present)  # the first task fell by half, the second by 1 %
    torch.testing.assert_close(balancer.logit_T, torch.tensor([-0.1, 0.1]), rtol=1e-4, atol=1e-5)  # Adam's first step
    balancer.see_losses(torch.tensor([1.0, 1.0]), present)
    z = torch.softmax(torch.tensor([-0.1, 0.1]), 0)
    torch.testing.assert_close(balancer.current(), 2 * z, rtol=1e-4, atol=1e-5)


def test_the_famo_logit_of_a_task_without_labels_stays() -> None:
    balancer = build("famo", [1.0, 1.0, 1.0])
    balancer.see_losses(torch.tensor([2.0, 1.0, 1.0]), torch.ones(3))
    balancer.see_losses_after(torch.tensor([1.0, 0.9, 0.5]), torch.ones(3))
    before = balancer.logit_T.clone()
    balancer.see_losses(torch.tensor([1.0, 0.9, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    balancer.see_losses_after(torch.tensor([0.7, 0.8, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert balancer.logit_T[2] == before[2] and bool((balancer.logit_T[:2] != before[:2]).all())


def test_famo_is_adam_on_the_logits() -> None:
    balancer = build("famo", [1.0, 2.0, 0.5])
    logit = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([logit], lr=0.025, weight_decay=0.001)  # the authors' own
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        before, after = torch.rand(2, 3, generator=generator) + 0.5
        balancer.see_losses(before, torch.ones(3))
        balancer.see_losses_after(after, torch.ones(3))
        delta = (before + 1e-8).log() - (after + 1e-8).log()
        adam.zero_grad()
        (gradient,) = torch.autograd.grad(torch.softmax(logit, -1), logit, grad_outputs=delta)
        logit.grad = gradient
        adam.step()
    torch.testing.assert_close(balancer.logit_T, logit.detach(), rtol=1e-4, atol=1e-6)


def test_the_gramian_is_of_the_gradients_at_the_state_and_keeps_the_graph() -> None:
    weight = torch.randn(3, requires_grad=True)
    state = torch.randn(2, 2, 3) * weight
    private = torch.randn(3, requires_grad=True)
    losses = [state.sum(), (state * private).sum(), private.square().sum(), torch.zeros(())]
    found = gramian(losses, state)
    g = torch.stack([torch.ones(12), private.detach().expand(2, 2, 3).flatten(), torch.zeros(12), torch.zeros(12)])
    torch.testing.assert_close(found, (g @ g.T).double())
    assert weight.grad is None and private.grad is None
    torch.stack(losses).sum().backward()
    assert weight.grad is not None and private.grad is not None


def test_the_record_is_the_mean_of_norms_and_cosines_of_tasks_that_had_a_gradient() -> None:
    record = GradientRecord(3)
    record.add(torch.tensor([[4.0, 2.0, 0.0], [2.0, 4.0, 0.0], [0.0, 0.0, 0.0]]).double())
    record.add(torch.tensor([[16.0, -4.0, 2.0], [-4.0, 4.0, 0.0], [2.0, 0.0, 1.0]]).double())
    found = record.scalars(["a", "b", "c"])
    assert found == pytest.approx({
        "gradient/a/norm": 3.0, "gradient/b/norm": 2.0, "gradient/c/norm": 1.0,
        "gradient/a|b/cosine": 0.0, "gradient/a|c/cosine": 0.5, "gradient/b|c/cosine": 0.0,
    })  # fmt: skip
    assert record.scalars(["a", "b", "c"]) == {}


def test_a_missing_solver_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(RuntimeError, match=r"balancing\.kind: upgrad needs .*pip install 'mtrec_ray\[balancing\]'"):
        build("upgrad", [1.0, 1.0])


def test_the_gramian_is_in_float32_under_bf16_autocast() -> None:
    state = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = gramian([state.square().sum(), state.sin().sum()], state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gramian([state.square().sum(), state.sin().sum()], state)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
