"""jobs.tune on a real cluster: ASHA stops trials, a failing one is reported, a second call goes on, finalists decide."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.tune import main
from mtrec_ray.config import load_config
from mtrec_ray.training.worker import run_worker
from mtrec_ray.tuning import job, search
from tests import tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SPACE = {
    "search": {
        "train.learning_rate": {"log_uniform": [0.0003, 0.03]},
        "model.width": {"choice": [8, 12, 16]},
        "model.heads": {"choice": [2, 8]},  # 12 is not a multiple of 8: such points are refused
    },
    "fixed": {"train.epochs": 6, "train.patience": 6},
    "points": [{"train.learning_rate": 1.0e30}],  # finite, but the weights soon are not
    "asha": {"first_rung": 1, "reduction": 2},
}


def read(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "tune.json").read_text()))


def test_trials_are_stopped_reported_and_gone_on_with_and_the_best_is_a_configuration(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_log(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.raw_config(tmp_path), sort_keys=False))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE, sort_keys=False))
    out = tmp_path / "out"
    command = ["--config", str(tmp_path / "run.yaml"), "--space", str(tmp_path / "space.yaml"), "--out", str(out)]
    prepared = job.run_stages

    def without_test(*args: Any) -> Any:
        run = prepared(*args)
        shutil.rmtree(run.data.path("windows", "test"), ignore_errors=True)
        return run

    monkeypatch.setattr(job, "run_stages", without_test)  # whoever looks at the test split finds nothing
    assert main([*command, "--trials", "4", "--parallel", "2"]) == 0
    first = {t["number"]: t for t in read(out)["trials"]}
    assert first[0]["state"] == "done" and len(first[0]["history"]) == 6
    assert first[1]["state"] == "failed" and "not finite" in first[1]["message"]
    assert {t["state"] for t in first.values()} <= {"done", "stopped", "failed", "refused"}
    assert sum(t["state"] != "refused" for t in first.values()) == 4
    assert not any((out / "trials" / "_checkpoints").iterdir()) and not (out / "trials" / "_tune").exists()

    # a kill in the third epoch of trial 0, as its file shows it: gone on with, the others are not trained again
    kept = out / "trials" / "0000.json"
    killed = json.loads(kept.read_text())
    killed["history"], killed["state"] = killed["history"][:2], "unfinished"
    kept.write_text(json.dumps(killed))
    others = {p.name: p.stat().st_mtime_ns for p in (out / "trials").glob("0*.json") if p != kept}
    assert main([*command, "--trials", "6", "--parallel", "2", "--finalists", "1", "--seeds", "2"]) == 0
    second = read(out)
    found = {t["number"]: t for t in second["trials"]}
    assert [e["valid"] for e in found[0]["history"]] == [e["valid"] for e in first[0]["history"]]
    assert {name: (out / "trials" / name).stat().st_mtime_ns for name in others} == others
    assert sum(t["state"] != "refused" for t in found.values()) == 6
    assert any(t["state"] == "stopped" and len(t["history"]) < 6 for t in found.values())

    # ASHA and the adapter change nothing in a training: the start is what the plain loop gives
    start = load_config(tmp_path / "run.yaml", ["train.epochs=6", "train.patience=6", "train.workers=0"])
    data = json.loads((out / "data" / "manifest.json").read_text())["prefix"]
    assert run_worker(start, str(out / "data" / data), None, lambda *_: None).best_value == second["start"]

    finalists = second["finalists"]
    assert {f["trial"] for f in finalists} >= {0} and all(len(f["seeds"]) == 2 and f["complete"] for f in finalists)
    assert second["best"]["trial"] == max(finalists, key=lambda f: f["mean"])["trial"]
    best = load_config(out / "best.yaml")
    assert best.train.epochs == 6 and best.seed == 0 and best.train.workers == 2
    assert best.train.learning_rate == second["best"]["values"]["train.learning_rate"]
    shown = capsys.readouterr().out
    assert "start" in shown and "Finalists" in shown and "best.yaml" in shown
    assert (out / "trials.csv").read_text().count("\n") == 1 + len(found) + 2 * len(finalists)

    assert main([*command, "--trials", "6", "train.batch_windows=8"]) == 2
    assert "holds the trials of another space, configuration or data" in capsys.readouterr().err


def dies(flags: Path, always: str) -> Callable[[dict[str, Any]], None]:
    """The work of a trial whose process kills itself after an epoch: each trial once, one of them whenever it is tried."""
    original = search._train

    def work(settings: dict[str, Any]) -> None:
        from mtrec_ray.training.checkpoint import Checkpoints

        name, saved = Path(settings["checkpoints"]).name, Checkpoints.save

        def save(self: Checkpoints, state: dict[str, Any]) -> str:
            done = saved(self, state)
            if name == always or not (flags / name).exists():
                (flags / name).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        Checkpoints.save = save  # type: ignore[method-assign]
        original(settings)

    return work


def test_a_trial_whose_process_dies_goes_on_once_and_is_then_reported(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_log(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.raw_config(tmp_path)))  # three epochs
    (tmp_path / "space.yaml").write_text("search: {train.learning_rate: {uniform: [0.001, 0.002]}}\nasha: {first_rung: 3}")
    monkeypatch.setattr(search, "_train", dies(tmp_path, always="0001"))
    out = tmp_path / "out"
    command = ["--config", str(tmp_path / "run.yaml"), "--space", str(tmp_path / "space.yaml"), "--out", str(out), "--trials", "2"]
    assert main([*command, "--parallel", "1"]) == 0
    found = read(out)["trials"]
    assert found[0]["state"] == "done" and [e["epoch"] for e in found[0]["history"]] == [1, 2, 3]
    assert found[1]["state"] == "failed" and "died 2 times, the last time: The actor died" in found[1]["message"]
    assert [e["epoch"] for e in found[1]["history"]] == [1, 2]  # tried twice, the second time from its checkpoint
    config = load_config(tmp_path / "run.yaml", ["train.workers=0"])
    data = json.loads((out / "data" / "manifest.json").read_text())["prefix"]
    assert run_worker(config, str(out / "data" / data), None, lambda *_: None).best_value == found[0]["value"]


def test_a_search_in_which_every_trial_fails_ends_with_code_2_and_says_why(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_log(tmp_path)
    raw = tiny.raw_config(tmp_path)
    raw["train"]["monitor"] = "rating/ndcg@10"  # a task, but none of its metrics
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "space.yaml").write_text("search: {model.width: {choice: [8, 16]}}")
    out = tmp_path / "out"
    command = ["--config", str(tmp_path / "run.yaml"), "--space", str(tmp_path / "space.yaml"), "--out", str(out), "--trials", "1"]
    assert main(command) == 2
    assert "no trial has a value: 1 failed. ValueError: train.monitor: 'rating/ndcg@10' was not measured" in capsys.readouterr().err
    assert "was not measured" in (out / "trials.csv").read_text() and not (out / "best.yaml").exists()


def test_a_missing_solver_of_one_trial_is_said_before_any_trial(
    ray_cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    tiny.write_log(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny.raw_config(tmp_path)))
    (tmp_path / "space.yaml").write_text("search: {balancing.kind: {choice: [static, upgrad]}}")
    out = tmp_path / "out"
    command = ["--config", str(tmp_path / "run.yaml"), "--space", str(tmp_path / "space.yaml"), "--out", str(out), "--trials", "2"]
    assert main(command) == 2
    assert "balancing.kind: upgrad needs" in capsys.readouterr().err
    assert [p.name for p in (out / "trials").glob("0*.json")] == []
