"""One worker and N workers make the same update from the same global batch (DESIGN §1.5)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mtrec_ray import storage
from mtrec_ray.balancing.weights import build_balancer
from mtrec_ray.config import RunConfig
from mtrec_ray.training import distributed
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.loop import Training, _Losses, build_optimizer, distribute, train_step
from mtrec_ray.training.worker import build_feed, build_model, load_schema
from tests import tiny
from tests.conftest import TinyRun

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
    losses: Any = _Losses(model, build_balancer(config.balancing, [t.weight for t in config.tasks.values()]))
    optimizer = torch.optim.SGD(losses.parameters(), lr=0.1)
    wrapped = distribute(losses)
    missing = False
    for step, micro in enumerate(feed.epoch(0)):
        if step == STEPS:
            break
        labels = torch.cat([b.targets.labels_M["rating"] for b in micro])
        missing |= bool(torch.isnan(labels).all())
        train_step(wrapped, model, optimizer, micro)
    if only_last_rated and world > 1:
        some = distributed.gather_objects(missing)
        assert any(some), "the test wants a rank without labels"
    return {k: v.detach().clone() for k, v in losses.state_dict().items()}


def _rank(rank: int, world: int, port: int, config_json: str, prefix: str, only_last_rated: bool, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)
    state = updated(RunConfig.model_validate_json(config_json), prefix, rank, world, only_last_rated)
    torch.save(state, f"{out}/{world}-{rank}.pt")
    dist.destroy_process_group()


def run_ranks(world: int, config: RunConfig, prefix: str, only_last_rated: bool, out: Path) -> list[dict[str, torch.Tensor]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, (world, port, config.model_dump_json(), prefix, only_last_rated, str(out)), nprocs=world)
    return [torch.load(out / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(("balancer", "only_last_rated", "accumulate"), [("static", False, 1), ("uncertainty", True, 2)])
def test_one_two_and_three_workers_make_the_same_update(
    tiny_run: TinyRun, tmp_path: Path, balancer: str, only_last_rated: bool, accumulate: int
) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["balancing"] = {"kind": balancer}
        raw["train"] |= {"batch_windows": 10, "accumulate": accumulate}

    config = tiny.make_config(tiny_run.folder, change)
    alone = updated(config, tiny_run.data.prefix, 0, 1, only_last_rated)
    fresh = build_model(config, load_schema(tiny_run.data.prefix), torch.zeros(21, 6)).state_dict()
    assert any(not torch.equal(alone[f"model.{k}"], v) for k, v in fresh.items())
    for world in (2, 3):
        for state in run_ranks(world, config, tiny_run.data.prefix, only_last_rated, tmp_path):
            for name, value in alone.items():
                torch.testing.assert_close(
                    state[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, w=world: f"{w} ranks, {n}: {m}"
                )


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
    losses: Any = _Losses(with_text(config, tiny_run.data.prefix), build_balancer(config.balancing, [1.0] * len(config.tasks)))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped: Any = distribute(losses)
        assert wrapped.modules_buffers
        monkeypatch.setattr(type(wrapped), "_sync_buffers", lambda self: pytest.fail("buffers are sent around"))
        micro = next(iter(build_feed(config, schema, cache, 0, 1).epoch(0)))
        train_step(wrapped, losses.model, build_optimizer(losses, config.train), micro)
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
