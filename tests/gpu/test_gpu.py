"""The training step on a GPU against the CPU. Needs no Ray: `pytest tests/gpu --noconftest` where Ray is not installed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_step import Size, batch_of, config_of, schema_of
from mtrec_ray.config import RunConfig
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.tasks.softmax import Hidden, softmax_loss
from mtrec_ray.training.loop import Training
from mtrec_ray.training.step import distribute, train_step, working_precision
from mtrec_ray.training.worker import build_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SIZE = Size(width=32, layers=2, heads=2, feed_forward=64, window=20, windows=8, items=300, negatives=None)
SAMPLED = Size(**(vars(SIZE) | {"negatives": 50}))
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def exact() -> None:
    torch.set_float32_matmul_precision("highest")


def with_settings(config: RunConfig, dropout: float = 0.0, **train: Any) -> RunConfig:
    model = config.model.model_copy(update={"dropout": dropout})
    return config.model_copy(update={"model": model, "train": config.train.model_copy(update=train)})


def training(config: RunConfig, size: Size, device: torch.device) -> Training:
    model = build_model(config, schema_of(size), None)
    model.fit_items(torch.arange(size.items).numpy().astype("uint64"), torch.ones(size.items))
    return Training(config, model.train(), 10, device)


def losses_of(run: Training, size: Size, device: torch.device, steps: int = 3) -> Tensor:
    """Loss sums of some steps."""
    found = []
    for i in range(steps):
        torch.manual_seed(i)
        found.append(train_step(run.losses, run.optimizer, [batch_of(size, i).to(device)], None, run.precision).loss_sum_T)
    return torch.stack(found).cpu()


@pytest.mark.parametrize("balancing", ["static", "upgrad", "famo"])
@pytest.mark.parametrize(("trunk", "size"), itertools.product(["sasrec", "ligr", "hstu"], [SIZE, SAMPLED]))
def test_float32_steps_are_those_of_the_cpu(trunk: str, size: Size, balancing: str) -> None:
    if balancing == "upgrad":
        pytest.importorskip("torchjd")
    config = with_settings(config_of(size, trunk, "float32", balancing=balancing))
    runs = {device: training(config, size, device) for device in (CPU, GPU)}
    found = {device: losses_of(run, size, device) for device, run in runs.items()}
    torch.testing.assert_close(found[GPU], found[CPU], rtol=1e-3, atol=1e-3)
    for (name, one), other in zip(runs[CPU].losses.named_parameters(), runs[GPU].losses.parameters(), strict=True):
        # AdamW's first steps have the gradient's sign times the rate, so a gradient of rounding errors alone may differ
        close = torch.isclose(other.cpu(), one, rtol=1e-3, atol=2e-4).float().mean()
        assert close > 0.98, f"{name}: {1 - close:.1%} of the weights differ"


@pytest.mark.parametrize("trunk", ["sasrec", "ligr", "hstu"])
def test_bf16_follows_float32_and_keeps_float32_weights(trunk: str) -> None:
    runs = {p: training(with_settings(config_of(SIZE, trunk, p)), SIZE, GPU) for p in ("float32", "bf16")}
    wide = config_of(Size(**(vars(SIZE) | {"width": 256})), trunk, "auto")
    assert working_precision(wide, GPU) == torch.bfloat16
    found = {p: losses_of(run, SIZE, GPU) for p, run in runs.items()}
    assert not torch.equal(found["bf16"], found["float32"])
    torch.testing.assert_close(found["bf16"], found["float32"], rtol=0.02, atol=0.5)
    assert all(p.dtype == torch.float32 for p in runs["bf16"].losses.parameters())


OLD = pytest.mark.xfail(torch.__version__ < "2.13", reason="torch 2.11 fails in inductor's analysis of its reductions")


@pytest.mark.parametrize("trunk", [pytest.param("sasrec", marks=OLD), "hstu"])
def test_a_compiled_trunk_makes_the_same_steps(trunk: str) -> None:
    plain, compiled = (training(with_settings(config_of(SIZE, trunk, "float32", c)), SIZE, GPU) for c in (False, True))
    torch.testing.assert_close(losses_of(compiled, SIZE, GPU, 2), losses_of(plain, SIZE, GPU, 2), rtol=1e-3, atol=1e-3)


def test_famo_sees_the_same_dropout_twice_on_a_gpu() -> None:
    """With a learning rate of zero the loss after the step is the loss before it, dropout included."""
    config = with_settings(config_of(SIZE, "hstu", "float32", balancing="famo"), dropout=0.5, learning_rate=1e-30)
    run = training(config, SIZE, GPU)
    seen: list[Tensor] = []
    balancer: Any = run.losses.balancer
    before, after = balancer.see_losses, balancer.see_losses_after
    balancer.see_losses = lambda loss_T, present_T: (seen.append(loss_T.clone()), before(loss_T, present_T))
    balancer.see_losses_after = lambda loss_T, present_T: (seen.append(loss_T.clone()), after(loss_T, present_T))
    losses_of(run, SIZE, GPU, 1)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("low", "tolerance"), [(False, 1e-4), (True, 0.02)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_softmax_and_its_gradient_against_float64(low: bool, tolerance: float, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    R, C, U, P, D = 70, 500, 400, 100, 32
    query, vec = (torch.randn(n, D, generator=generator) for n in (R, C))
    row = torch.sort(torch.cat([torch.arange(R), torch.randint(R, (P - R,), generator=generator)]))[0]
    target = torch.randint(C, (P,), generator=generator)
    hidden = torch.unique(torch.cat([(row * U + target)[target < U], torch.randint(R * U, (60,), generator=generator)]))
    bias_U = torch.randn(U, generator=generator) if bias else None

    def dense() -> list[Tensor]:
        q, v = query.double().requires_grad_(), vec.double().requires_grad_()
        logit = q @ v[:U].T + (0 if bias_U is None else bias_U.double())
        logit = logit.flatten().index_fill(0, hidden, float("-inf")).view(R, U)
        total = q.new_zeros(())
        for r in range(R):
            own = target[row == r]
            z = torch.logsumexp(torch.cat([logit[r], (q[r] @ v[torch.unique(own)].T)]), 0)
            total = total + (z - q[r] @ v[own].T).sum()
        return [total, *torch.autograd.grad(total, [q, v])]

    q, v = query.cuda().requires_grad_(), vec.cuda().requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=low):
        loss = softmax_loss(q, v, row.cuda(), target.cuda(), U, [Hidden(hidden.cuda())], None if bias_U is None else bias_U.cuda())
    for found, wanted in zip([loss.detach(), *torch.autograd.grad(loss, [q, v])], dense(), strict=True):
        error = (found.cpu().double() - wanted.detach()).norm() / wanted.detach().norm()
        assert error < tolerance, float(error)


def test_one_rank_under_nccl_makes_the_update_that_no_group_makes(tmp_path: Path) -> None:
    config = with_settings(config_of(SIZE, "hstu", "float32", balancing="uncertainty"))
    alone = training(config, SIZE, GPU)
    losses_of(alone, SIZE, GPU)
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        run = training(config, SIZE, GPU)
        wrapped = distribute(run.losses)
        for i in range(3):
            torch.manual_seed(i)
            train_step(wrapped, run.optimizer, [batch_of(SIZE, i).to(GPU)])
    finally:
        dist.destroy_process_group()
    for one, other in zip(alone.losses.parameters(), run.losses.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_what_the_model_says_on_a_gpu_is_what_it_says_on_the_cpu() -> None:
    """Encoding and heads, as the predictor calls them."""
    model: Recommender = training(config_of(SIZE, "hstu", "float32"), SIZE, CPU).model.eval()
    on_gpu = copy.deepcopy(model).to(GPU)
    history = batch_of(SIZE, 5).history
    with torch.no_grad():
        items, items_gpu = model.item_vectors(), on_gpu.item_vectors()
        torch.testing.assert_close(items_gpu.cpu(), items)
        state = model.encode(items, history)
        torch.testing.assert_close(on_gpu.encode(items_gpu, history.to(GPU)).cpu(), state, rtol=1e-3, atol=1e-4)
