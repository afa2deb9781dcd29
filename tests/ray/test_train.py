"""The Ray Train adapter: the plain loop's weights bit for bit, a worker's and the driver's death survived, the stream."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mtrec_ray import runtime, storage
from mtrec_ray.training import feed, loop, trainer
from mtrec_ray.training.guard import TrainingStopped
from mtrec_ray.training.trainer import train
from mtrec_ray.training.worker import run_worker
from tests import tiny
from tests.conftest import TinyRun
from tests.unit import test_resume as plain

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parent.parent.parent


def weights(directory: storage.Directory) -> dict[str, torch.Tensor]:
    return load_file(Path(directory.path("weights.safetensors")))


def dies_once(flag: Path, after: int) -> Callable[[dict[str, Any]], None]:
    """A worker function whose last rank kills itself after so many steps, once."""
    original = trainer._worker

    def work(settings: dict[str, Any]) -> None:
        from mtrec_ray.training import distributed

        step, done = loop.train_step, []

        def train_step(*args: Any) -> Any:
            found = step(*args)
            done.append(1)
            if len(done) == after and distributed.rank() == distributed.world_size() - 1 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        loop.train_step = train_step
        try:
            original(settings)
        finally:
            loop.train_step = step

    return work


def test_a_worker_killed_in_mid_epoch_goes_on_to_the_weights_of_two_plain_processes(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With elastic workers: the cluster has room for both of them again."""

    def change(raw: dict[str, Any]) -> None:
        plain.everything(raw)
        raw["train"]["workers"] = [1, 2]

    config, prefix = tiny.make_config(tiny_run.folder, change), tiny_run.data.prefix
    assert plain.attempt(2, config, prefix, tmp_path / "plain")
    expected = plain.final(tmp_path / "plain")
    flag = tmp_path / "killed"
    monkeypatch.setattr(trainer, "_worker", dies_once(flag, plain.steps_of(config, prefix) + 4))
    trained = train(config, tiny_run.data, None, str(tmp_path / "train"))
    assert flag.exists()
    facts = trained.manifest["training"]
    assert facts["workers"] == 2 and facts["rows_dropped"] == 0
    for name in ("rows_read", "rows_trained", "events", "best_epoch", "best_value"):
        assert facts[name] == expected["progress"][name], name
    plain.same(weights(trained), expected["best_state"])
    assert sorted(p.name for p in (tmp_path / "train").iterdir() if p.name.startswith("_")) == []


def test_the_train_stage_started_again_after_its_driver_was_killed_goes_on(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path
) -> None:
    def change(raw: dict[str, Any]) -> None:
        plain.everything(raw)
        raw["train"] |= {"workers": 1, "epochs": 12, "patience": 12}

    raw = tiny.raw_config(tiny_run.folder)
    change(raw)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))  # the order of tasks is the order of draws
    shutil.copytree(tiny_run.folder / "data", tmp_path / "out" / "data")
    command = [sys.executable, "-m", "jobs.train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"], "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "first.log", "w", encoding="utf-8") as log:
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    kept = tmp_path / "out" / "train" / "_checkpoints"
    started = time.time()
    while not any(p.name > "00001-000000001" for p in kept.glob("*/*.pt")):
        assert driver.poll() is None and time.time() - started < 180, (tmp_path / "first.log").read_text()[-3000:]
        time.sleep(0.005)
    driver.kill()
    driver.wait()
    directory = storage.Directory(tmp_path / "out" / "train")
    assert not storage.exists(f"{directory.root}/manifest.json")
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "resumed at epoch" in again.stdout + again.stderr
    expected = run_worker(tiny.make_config(tiny_run.folder, change), tiny_run.data.prefix, None, lambda *_: None)
    plain.same(weights(directory), expected.best_state)
    assert directory.manifest["training"]["rows_trained"] == expected.rows_trained == expected.rows_read


def test_a_stream_of_ray_data_trains_every_window_once_also_after_a_workers_death(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, prefix = tiny.make_config(tiny_run.folder, plain.streaming), tiny_run.data.prefix
    runtime.preflight(config, str(tmp_path))  # two workers of four CPUs
    greedy = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(feed="stream", workers=[1, 4]))
    with pytest.raises(runtime.PreflightError, match=r"may take 4 of the cluster's 4 CPUs.*train\.workers to at most 3"):
        runtime.preflight(greedy, str(tmp_path))
    flag = tmp_path / "killed"
    monkeypatch.setattr(trainer, "_worker", dies_once(flag, plain.steps_of(config, prefix) + 4))
    facts = train(config, tiny_run.data, None, str(tmp_path / "train")).manifest["training"]
    assert flag.exists()
    assert facts["rows_read"] == facts["rows_trained"] == 3 * len(plain.windows_of(prefix)) and facts["rows_dropped"] == 0
    assert facts["workers"] == 2


def test_an_infinite_loss_reaches_the_driver_with_its_batch_and_is_not_tried_again(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, tries = trainer._worker, tmp_path / "tries"

    def poisoned(settings: dict[str, Any]) -> None:
        opened, step = feed.WindowCache.open, loop.train_step

        def infinite(folder: Any, *texts: Any) -> feed.WindowCache:
            cache = opened(folder, *texts)
            labels = np.full(len(cache.columns["label_rating"]), np.inf, np.float32)
            return feed.WindowCache({**cache.columns, "label_rating": labels}, cache.offsets, cache.user_ids)

        def train_step(*args: Any) -> Any:
            with open(tries, "a", encoding="utf-8") as file:
                file.write("x")
            return step(*args)

        feed.WindowCache.open, loop.train_step = infinite, train_step  # type: ignore[method-assign, assignment]
        try:
            original(settings)
        finally:
            feed.WindowCache.open, loop.train_step = opened, step  # type: ignore[method-assign]

    monkeypatch.setattr(trainer, "_worker", poisoned)
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(workers=1))
    with pytest.raises(TrainingStopped, match=r"^epoch 0, step 0: the loss of \['rating'\] is not finite.*user 'u\d+' window"):
        train(config, tiny_run.data, None, str(tmp_path / "train"))
    assert tries.read_text() == "x"
