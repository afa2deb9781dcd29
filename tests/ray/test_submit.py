"""Jobs sent to a cluster: their log, their exit code, and Ctrl-C."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny

ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def command(cluster: Any, job: str, *arguments: str) -> list[str]:
    address = f"http://{cluster.dashboard_url}"
    return [sys.executable, "-m", "jobs.submit", job, "--address", address, "--python", sys.executable, *arguments]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    tiny.write_log(tmp_path)
    raw = tiny.raw_config(tmp_path)
    raw["train"] |= {"epochs": 100_000, "patience": 100_000, "workers": 0}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "run.yaml"


def test_a_job_shows_its_log_and_gives_its_exit_code(ray_cluster: Any, config: Path, tmp_path: Path) -> None:
    whole = command(ray_cluster, "prepare", "--config", str(config), "--out", str(tmp_path / "run"))
    done = subprocess.run(whole, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "prepare: done" in done.stdout and "succeeded" in done.stderr
    assert (tmp_path / "run" / "data" / "manifest.json").exists()
    wrong = command(ray_cluster, "compare", str(tmp_path / "run"), str(tmp_path / "run"))
    done = subprocess.run(wrong, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert done.returncode == 2  # of the job itself
    assert "no evaluation" in done.stdout and "failed with exit code 2" in done.stderr


def test_ctrl_c_stops_the_job(ray_cluster: Any, config: Path, tmp_path: Path) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    endless = command(ray_cluster, "pipeline", "--config", str(config), "--out", str(tmp_path / "run"))
    with subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path) as running:
        assert running.stdout is not None
        began, seen = time.monotonic(), ""
        while "train: start" not in seen and time.monotonic() - began < 120:
            seen += running.stdout.readline()
        job = re.findall(r"raysubmit_\w+", seen)[0]
        running.send_signal(signal.SIGINT)
        rest = running.communicate(timeout=120)[0]
    assert running.returncode == 130, seen + rest
    client = JobSubmissionClient(f"http://{ray_cluster.dashboard_url}")
    assert client.get_job_status(job) == JobStatus.STOPPED
    assert "stopped" in rest
