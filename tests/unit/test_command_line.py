"""The training loop as people start it without Ray: `python -m` and `torchrun -m`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mtrec_ray.training.checkpoint import Checkpoints
from tests import tiny
from tests.conftest import TinyRun

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_python_and_torchrun_train_from_the_command_line_to_the_same_weights(tiny_run: TinyRun, tmp_path: Path) -> None:
    raw = tiny.raw_config(tiny_run.folder)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    states = {}
    for name, launcher in {"python": [sys.executable], "torchrun": torchrun}.items():
        command = [*launcher, "-m", "mtrec_ray.training.loop", "--config", str(tmp_path / "run.yaml"),
                   "--data", str(tiny_run.folder / "data"), "--out", str(tmp_path / name),
                   "train.epochs=1", "train.learning_rate=1e-4"]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "epoch 1/1" in done.stderr and "ray" not in done.stderr.replace("mtrec_ray", "")
        found = Checkpoints(tmp_path / name).load()
        assert found is not None and found["progress"]["epoch"] == 1
        states[name] = found["best_state"]
    for key, value in states["python"].items():
        torch.testing.assert_close(states["torchrun"][key], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=key: f"{n}: {m}")
