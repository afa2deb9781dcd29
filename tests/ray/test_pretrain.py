"""jobs.pretrain on a real cluster: two workers, a killed one, an encoder that the next job reads."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import pretrain
from jobs.command import main
from mtrec_ray.pretraining import trainer
from tests import tiny
from tests.unit.test_pretraining import write_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def dies_once(flag: Path) -> Any:
    """A worker function whose last rank kills itself in its tenth step, once."""
    original = trainer._worker

    def work(settings: dict[str, Any]) -> None:
        from mtrec_ray.pretraining import loop
        from mtrec_ray.training import distributed

        step, done = loop._step, []

        def counted(*args: Any) -> Any:
            done.append(1)
            if len(done) == 10 and distributed.rank() == 1 and not flag.exists():
                flag.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)

        loop._step = counted
        try:
            original(settings)
        finally:
            loop._step = step

    return work


def test_two_workers_survive_a_kill_and_write_an_encoder_that_is_used(
    ray_cluster: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "_worker", dies_once(tmp_path / "killed"))
    tiny.write_log(tmp_path)
    model = write_checkpoint(tmp_path / "bert")
    raw = tiny.raw_config(tmp_path)
    raw["pretrain"] = {"model": str(model), "block": 16, "epochs": 6, "batch_blocks": 4, "workers": 2, "checkpoint_every": 3,
                       "learning_rate": 0.01, "held_out": 0.2, "history_items": 4}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    assert pretrain.main(command) == 0
    assert (tmp_path / "killed").exists()
    out = capfd.readouterr().out
    said = next(line for line in out.splitlines() if line.startswith("encoder.model="))
    facts = json.loads((Path(said.partition("=")[2]).parent / "pretraining.json").read_text())
    assert facts["workers"] == 2 and len(facts["perplexity"]) == 7
    assert facts["perplexity"][-1]["histories"] < 0.7 * facts["perplexity"][0]["histories"]
    assert list((tmp_path / "run" / "pretrained" / "tensorboard").rglob("events.*"))
    assert not (tmp_path / "run" / "pretrained" / "_checkpoints").exists()
    assert pretrain.main(command) == 0  # reused: nothing is trained again
    assert said in capfd.readouterr().out
    (tmp_path / "encoded.yaml").write_text(yaml.safe_dump(raw | {"encoder": {"model": said.partition("=")[2]}}))
    assert main(("encode",), "", ["--config", str(tmp_path / "encoded.yaml"), "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "text" / "manifest.json").exists()


def test_what_is_wrong_is_said_before_any_worker_starts(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "TorchTrainer", lambda *_, **__: pytest.fail("a worker was started"))
    tiny.write_log(tmp_path)
    raw = tiny.raw_config(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    command = ["--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    assert pretrain.main(command) == 2
    assert "pretrain.model: no checkpoint is named" in capsys.readouterr().err
    assert pretrain.main([*command, f"pretrain.model={tmp_path}/nothing"]) == 2
    assert "pretrain.model" in capsys.readouterr().err
