"""One worker and N workers make the same update from the same global batch (DESIGN §1.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtrec_ray import storage
from mtrec_ray.balancing import build_balancer
from mtrec_ray.config import RunConfig
from mtrec_ray.training import distributed
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.loop import Training
from mtrec_ray.training.step import build_losses, build_optimizer, distribute, train_step
from mtrec_ray.training.worker import build_feed, build_model, load_schema
from tests import tiny
from tests.conftest import TinyRun
from tests.ranks import run_ranks

STEPS = 3


def updated(config: RunConfig, prefix: str, rank: int, world: int, only_last_rated: bool) -> dict[str, torch.Tensor]:
    """Weights after a few steps on the same global batches. SGD keeps tiny differences visible as they are."""
    torch.set_num_threads(1)
    schema = load_schema(prefix)
    cache = WindowCache.from_table(storage.read_table(storage.join(prefix, "windows", "train")))
    if only_last_rated:  # the first windows of every batch have no rating: with 2 or 3 ranks some rank has none
        kept = np.flatnonzero(cache.columns["window"] >= cache.columns["window"].max() - 1)
        rated = np.isin(np.repeat(np.arange(len(cache)), np.diff(cache.offsets["target"])), kept[-3:])
        cache.columns["label_rating"] = np.where(rated, cache.columns["label_rating"], np.nan).astype(np.float32)
    model = build_model(
        config, schema, torch.nn.functional.normalize(torch.sin(torch.arange(schema.n_items * 6.0).view(-1, 6)), dim=-1)
    )
    model.train()
    feed = build_feed(config, schema, cache, rank, world)
    losses: Any = build_losses(config, model)
    optimizer = torch.optim.SGD(losses.parameters(), lr=0.1)
    wrapped = distribute(losses)
    missing, reported = False, torch.zeros(len(config.tasks))
    for step, micro in enumerate(feed.epoch(0)):
        if step == STEPS:
            break
        labels = torch.cat([b.targets.labels_M["rating"] for b in micro])
        missing |= bool(torch.isnan(labels).all())
        done = train_step(wrapped, optimizer, micro)
        losses.balancer.end_epoch(done.loss_sum_T / done.count_T.clamp(min=1))  # an epoch a step, for DWA's sake
        reported += done.loss_sum_T
    if only_last_rated and world > 1:
        some = distributed.gather_objects(missing)
        assert any(some), "the test wants a rank without labels"
    return {"reported": reported} | {k: v.detach().clone() for k, v in losses.state_dict().items()}


def _rank(rank: int, world: int, configs: list[str], prefix: str, only_last_rated: list[bool], out: str) -> None:
    pairs = zip(configs, only_last_rated, strict=True)
    states = [updated(RunConfig.model_validate_json(c), prefix, rank, world, m) for c, m in pairs]
    torch.save(states, f"{out}/{world}-{rank}.pt")


def states_of(
    world: int, configs: list[RunConfig], prefix: str, only_last_rated: list[bool], out: Path
) -> list[list[dict[str, torch.Tensor]]]:
    """Weights of every rank, of every configuration."""
    run_ranks(world, _rank, [c.model_dump_json() for c in configs], prefix, only_last_rated, str(out))
    return [torch.load(out / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


GRAMIAN = ("mgda", "pcgrad", "cagrad", "aligned_mtl", "imtl_g", "upgrad", "nash_mtl")


def changed(balancer: str, accumulate: int = 1, **model: Any) -> Any:
    def change(raw: dict[str, Any]) -> None:
        raw["balancing"] = {"kind": balancer}
        raw["train"] |= {"batch_windows": 10, "accumulate": accumulate}
        raw["model"] |= model

    return change


CASES = [
    ("static", False, 1, {}),
    ("uncertainty", True, 2, {}),
    ("famo", True, 1, {}),
    ("dwa", True, 1, {}),
    *((kind, True, 1, {}) for kind in GRAMIAN),
    ("upgrad", True, 2, {}),
    ("upgrad", True, 1, {"sharing": "mmoe"}),
    ("nash_mtl", True, 1, {"sharing": "ple"}),
    ("pcgrad", True, 2, {"sharing": "ple"}),
    ("static", True, 1, {"sharing": "pepnet", "trunk": "hstu"}),
    ("mgda", True, 1, {"sharing": "cgc", "trunk": "ligr"}),
]


@pytest.mark.slow
def test_one_two_and_three_workers_make_the_same_update(tiny_run: TinyRun, tmp_path: Path) -> None:
    """For every balancer, with a rank that has no label of a task; λ is among what is compared."""
    configs = [tiny.make_config(tiny_run.folder, changed(b, a, **m)) for b, _, a, m in CASES]
    prefix, missing = tiny_run.data.prefix, [m for _, m, _, _ in CASES]
    alone = [updated(c, prefix, 0, 1, m) for c, m in zip(configs, missing, strict=True)]
    fresh = build_model(configs[0], load_schema(prefix), torch.zeros(21, 6)).state_dict()
    for state in alone:
        assert any(not torch.equal(state[f"model.{k}"], v) for k, v in fresh.items())
    for world in (2, 3):
        for states in states_of(world, configs, prefix, missing, tmp_path):
            for case, wanted, state in zip(CASES, alone, states, strict=True):
                for name, value in wanted.items():
                    torch.testing.assert_close(
                        state[name], value, rtol=1e-5, atol=1e-5 if "balancer" in name else 1e-6,
                        msg=lambda m, n=name, w=world, c=case: f"{c}, {w} ranks, {n}: {m}",
                    )  # fmt: skip


def test_accumulation_makes_the_same_update_as_one_batch(tiny_run: TinyRun) -> None:
    def with_accumulation(n: int) -> dict[str, torch.Tensor]:
        config = tiny.make_config(
            tiny_run.folder, lambda raw: raw.update(balancing={"kind": "uncertainty"}, train=raw["train"] | {"accumulate": n})
        )
        return updated(config, tiny_run.data.prefix, 0, 1, False)

    one, four = with_accumulation(1), with_accumulation(4)
    for name, value in one.items():
        torch.testing.assert_close(four[name], value, rtol=1e-5, atol=1e-6)


def with_text(config: RunConfig, prefix: str) -> Any:
    schema = load_schema(prefix)
    return build_model(config, schema, torch.nn.functional.normalize(torch.ones(schema.n_items, 6), dim=-1)).train()


def test_no_buffer_is_sent_around_in_a_step(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text vectors of the whole catalogue are one."""
    config, schema = tiny_run.config, load_schema(tiny_run.data.prefix)
    cache = WindowCache.from_table(storage.read_table(storage.join(tiny_run.data.prefix, "windows", "train")))
    losses: Any = build_losses(config, with_text(config, tiny_run.data.prefix))

    def step() -> None:  # DDP goes before its group does: the other way round gloo's threads wait for Python, and Python for them
        wrapped: Any = distribute(losses)
        assert wrapped.modules_buffers
        monkeypatch.setattr(type(wrapped), "_sync_buffers", lambda self: pytest.fail("buffers are sent around"))
        micro = next(iter(build_feed(config, schema, cache, 0, 1).epoch(0)))
        train_step(wrapped, build_optimizer(losses, config.train), micro)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        step()
    finally:
        dist.destroy_process_group()


def test_the_moving_average_has_no_text_vectors_of_its_own(tiny_run: TinyRun) -> None:
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(ema=0.5))
    model = with_text(config, tiny_run.data.prefix)
    text_NE = model.text_NE
    run = Training(config, model, 1, torch.device("cpu"))
    assert run.average is not None
    run.average.update_parameters(model)
    assert model.text_NE is text_NE and run.kept.text_NE is text_NE and run.kept is not model


def test_an_uncertainty_weight_rests_while_its_task_has_no_labels() -> None:
    config = RunConfig.model_fields["balancing"].annotation(kind="uncertainty")  # type: ignore[misc, operator]
    balancer = build_balancer(config, [1.0, 1.0])
    optimizer = build_optimizer(balancer, RunConfig.model_fields["train"].annotation(weight_decay=0.5))  # type: ignore[misc, operator]
    loss = balancer(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    loss.backward()
    grad = balancer.log_variance_T.grad
    assert grad is not None and grad[0] == pytest.approx(-2.0 + 0.5) and grad[1] == 0
    assert [g["weight_decay"] for g in optimizer.param_groups if g["params"]] == [0.0]
