"""The jobs as people run them: `ray job submit`, and mistakes on the command line."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).parent.parent.parent


def write_config(folder: Path, **train: Any) -> Path:
    tiny.write_log(folder)
    raw = tiny.raw_config(folder)
    raw["train"] |= {"epochs": 1, **train}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


@pytest.mark.ray
@pytest.mark.slow
def test_a_pipeline_submitted_with_ray_job_submit_succeeds(ray_cluster: Any, tmp_path: Path) -> None:
    config = write_config(tmp_path, workers=0)
    ray = Path(sys.executable).parent / "ray"
    command = [str(ray), "job", "submit", "--address", f"http://{ray_cluster.dashboard_url}", "--",
               sys.executable, "-m", "jobs.pipeline", "--config", str(config), "--out", str(tmp_path / "run")]  # fmt: skip
    deadline = time.monotonic() + 120
    while True:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            break
        time.sleep(3)  # the dashboard's agent of a fresh cluster takes a while on a busy machine
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout
    assert (tmp_path / "run" / "metrics.json").exists() and list((tmp_path / "run" / "scores").glob("*.parquet"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--config", "{config}", "tasks.rating.wieght=1"], "tasks.rating.wieght: unknown key"),
        (["--config", "{config}", "train.epochs=none"], "train.epochs"),
        (["--config", "{config}", "train.epochs"], "expected key.path=value"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_two(tmp_path: Path, arguments: list[str], says: str) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "jobs.pipeline", *[a.format(config=config) for a in arguments]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.ray
def test_training_that_would_wait_for_ever_is_refused(ray_cluster: Any, tmp_path: Path) -> None:
    from mtrec_ray import runtime
    from mtrec_ray.config import EncoderConfig, load_config

    config = load_config(write_config(tmp_path, workers=64))
    with pytest.raises(runtime.PreflightError, match=r"train\.workers is 64.*4 CPUs"):
        runtime.preflight(config, str(tmp_path))
    encoding = {"encoder": EncoderConfig(model="any", use_gpu=True)}
    with pytest.raises(runtime.PreflightError, match=r"encoder\.use_gpu with 1 workers.*0 GPUs"):
        runtime.preflight(load_config(write_config(tmp_path)).model_copy(update=encoding), str(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_cells_of_the_conflict_report_run_as_ray_tasks_and_are_not_run_again(ray_cluster: Any, tmp_path: Path) -> None:
    from jobs import tasks

    config = write_config(tmp_path, workers=1)
    raw = yaml.safe_load(config.read_text())
    raw["tasks"] = {n: raw["tasks"][n] for n in ("retrieval", "rating")}
    config.write_text(yaml.safe_dump(raw, sort_keys=False))
    arguments = ["--config", str(config), "--run", str(tmp_path / "run"), "--epochs", "1", "--seeds", "1", "--parallel", "2"]
    assert tasks.main(arguments) == 0
    cells = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "tasks" / "cells").glob("*.json")}
    assert len(cells) == 3 and (tmp_path / "run" / "tasks" / "tasks.html").exists()
    assert tasks.main(arguments) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run" / "tasks" / "cells").glob("*.json")} == cells


@pytest.mark.ray
def test_labels_that_no_node_has_are_refused_and_an_autoscaler_is_counted(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    from mtrec_ray import runtime
    from mtrec_ray.config import load_config

    path = write_config(tmp_path)
    with pytest.raises(
        runtime.PreflightError, match=r"placement\.batch asks for nodes labelled role=batch, and the cluster has none"
    ):
        runtime.preflight(load_config(path, ["placement.batch.role=batch"]), str(tmp_path))
    large = load_config(path, ["train.workers=6", "placement.train.role=train"])
    with pytest.raises(runtime.PreflightError, match=r"placement\.train"):
        runtime.preflight(large, str(tmp_path))
    grown = {"CPU": 16, "GPU": 2}
    monkeypatch.setattr("ray._private.state.state.get_max_resources_from_cluster_config", lambda: grown)
    assert runtime.capacity()["CPU"] == 16 and runtime.capacity()["GPU"] == 2
    runtime.preflight(large, str(tmp_path))  # it may add nodes, whatever their labels are
    with pytest.raises(runtime.PreflightError, match=r"train\.workers is 64.*16 CPUs"):
        runtime.preflight(load_config(path, ["train.workers=64"]), str(tmp_path))
    runtime.preflight(load_config(path, ["placement.batch.role=batch"]), str(tmp_path))
    options = ray.data.DataContext.get_current().execution_options
    assert options.label_selector == {"role": "batch"}
    monkeypatch.undo()
    runtime.preflight(load_config(path), str(tmp_path))
    assert ray.data.DataContext.get_current().execution_options.label_selector is None


@pytest.mark.slow
def test_an_address_without_a_cluster_is_one_message(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    command = [sys.executable, "-m", "jobs.prepare", "--config", str(config), "--out", str(tmp_path / "run")]
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=120)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: RAY_ADDRESS is 127.0.0.1:9, and no Ray cluster answers there")
