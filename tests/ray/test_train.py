"""The Ray Train adapter: the same result as the plain loop, and a worker's death survived."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtrec_ray import storage
from mtrec_ray.training.trainer import train
from mtrec_ray.training.worker import run_worker
from tests import tiny
from tests.conftest import TinyRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def weights(directory: storage.Directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory.path("weights.safetensors")))


def test_two_ddp_workers_reach_the_weights_of_the_plain_loop(ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path) -> None:
    # few steps and a small rate: Adam divides by tiny gradients, so rounding grows with every step
    # (test_world_size.py holds the update itself to 1e-5)
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(epochs=1, learning_rate=1e-4))
    alone = run_worker(config, tiny_run.data.prefix, None, lambda *_: None)
    trained = train(config, tiny_run.data, None, str(tmp_path / "train"))
    facts = trained.manifest["training"]
    assert facts["workers"] == 2 and facts["rows_dropped"] == 0
    assert facts["rows_trained"] == alone.rows_trained and facts["best_epoch"] == alone.best_epoch
    found = weights(trained)
    for name, value in alone.best_state.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_worker_killed_in_mid_training_goes_on_from_its_checkpoint(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL at the end of the second epoch, once; the weights are those of the uninterrupted run."""
    from mtrec_ray.training import trainer

    flag = tmp_path / "killed"
    original = trainer._worker

    def dies_once(settings: dict[str, Any]) -> None:
        from mtrec_ray.training import feed

        run_epoch = feed.CachedFeed.epoch

        def epoch(self: Any, number: int, first_step: int = 0) -> Any:
            if number == 2 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), 9)
            return run_epoch(self, number, first_step)

        feed.CachedFeed.epoch = epoch  # type: ignore[method-assign]
        try:
            original(settings)
        finally:
            feed.CachedFeed.epoch = run_epoch  # type: ignore[method-assign]

    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(workers=1, epochs=4))
    expected = run_worker(config, tiny_run.data.prefix, None, lambda *_: None)
    monkeypatch.setattr(trainer, "_worker", dies_once)
    trained = train(config, tiny_run.data, None, str(tmp_path / "train"))
    assert flag.exists()
    facts = trained.manifest["training"]
    assert facts["best_epoch"] == expected.best_epoch
    for name, value in weights(trained).items():
        assert torch.equal(value, expected.best_state[name]), name
