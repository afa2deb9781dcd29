"""Serving as people start it: `make serve`'s command, `serve deploy` with the YAML; and stages of different bundles."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from jobs.serve import YAML
from tests import tiny
from tests.conftest import TinyRun
from tests.net import free_port, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parent.parent.parent
BODY = {"user_id": "u1", "k": 3}


@pytest.fixture
def no_serve() -> Iterator[None]:
    """Whatever a test leaves running is stopped."""
    from ray import serve

    yield
    serve.shutdown()


def test_make_serve_answers_until_it_is_told_to_stop(ray_cluster: Any, no_serve: None, tiny_run: TinyRun) -> None:
    port = free_port()
    makefile = (ROOT / "Makefile").read_text()
    assert "python -m jobs.serve $(RUN) --port $(PORT)" in makefile
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    command = [sys.executable, "-m", "jobs.serve", str(tiny_run.folder), "--port", str(port)]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            url = f"http://127.0.0.1:{port}"
            health = wait_for(lambda: httpx.get(f"{url}/healthz", timeout=30))
            assert health.json() == {"status": "ok", "bundle": tiny_run.predictor.fingerprint}
            assert len(httpx.post(f"{url}/recommend", json=BODY, timeout=30).json()["items"]) == 3
            taken = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
            assert taken.returncode == 2 and f"port {port} is taken" in taken.stderr and "Traceback" not in taken.stderr
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=90) == 0
            assert "Ctrl-C stops it" in process.stdout.read()
            with pytest.raises(httpx.TransportError):
                httpx.get(f"{url}/healthz", timeout=5)
        finally:
            process.kill()


def test_serving_a_run_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jobs.serve", str(tmp_path / "nothing"), "--port", str(free_port())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and "nothing" in done.stderr and "Traceback" not in done.stderr


def test_serve_deploy_with_the_yaml_gives_five_autoscaling_deployments(
    ray_cluster: Any, no_serve: None, tiny_run: TinyRun, tmp_path: Path
) -> None:
    settings = yaml.safe_load(YAML.read_text())
    application = settings["applications"][0]
    wanted = {"autoscaling_config", "max_queued_requests", "user_config"}
    assert all(wanted <= set(d) for d in application["deployments"])
    application["args"]["run"] = str(tiny_run.folder)
    application["args"]["serving"]["deadline_ms"] = 60_000  # a busy machine degrades nothing
    for deployment in application["deployments"]:
        deployment["ray_actor_options"]["num_cpus"] = 0.1  # the suite's cluster is small
    port = settings["http_options"]["port"] = free_port()
    (tmp_path / "recommend.yaml").write_text(yaml.safe_dump(settings))
    serve_command = str(Path(sys.executable).parent / "serve")
    address = ["--address", f"http://{ray_cluster.dashboard_url}"]
    done = subprocess.run(
        [serve_command, "deploy", str(tmp_path / "recommend.yaml"), *address],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    answer = wait_for(lambda: httpx.post(f"http://127.0.0.1:{port}/recommend", json=BODY, timeout=30))
    assert answer.status_code == 200 and answer.json()["bundle"] == tiny_run.predictor.fingerprint
    status = subprocess.run([serve_command, "status", *address], capture_output=True, text=True, check=False, timeout=60)
    found = yaml.safe_load(status.stdout)["applications"][application["name"]]
    assert found["status"] == "RUNNING"
    assert set(found["deployments"]) == {"Ingress", "StateEncoder", "Retrieval", "Heads", "TextEncoder"}
    assert all(d["status"] == "HEALTHY" for d in found["deployments"].values())

    # a rollout is another user_config: nothing restarts, and no answer fails on the way
    other = tiny.make_config(tiny_run.folder, lambda raw: raw.update(seed=1))
    model = tiny.train_locally(other, tiny_run.data)
    wanted = tiny.write_bundle(other, tiny_run.data, model, tmp_path / "other").fingerprint
    url = f"http://127.0.0.1:{port}"

    def served() -> int:
        return int(sum(httpx.get(f"{url}/stats", timeout=30).json()["answers"].values()))

    def roll(bundle: str | None, until: Callable[[], bool]) -> set[str]:
        """Deploy again and ask until it holds -> fingerprints of the answers on the way."""
        for deployment in application["deployments"]:
            deployment["user_config"] = {"bundle": bundle}
        (tmp_path / "recommend.yaml").write_text(yaml.safe_dump(settings))
        command = [serve_command, "deploy", str(tmp_path / "recommend.yaml"), *address]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
        seen, deadline = set(), time.monotonic() + 120
        while time.monotonic() < deadline and not until():
            answer = httpx.post(f"{url}/recommend", json=BODY, timeout=30)
            assert answer.status_code == 200 and answer.json()["degraded"] == [], answer.text
            seen.add(answer.json()["bundle"])
        assert until()
        return seen

    def now() -> str:
        return str(httpx.post(f"{url}/recommend", json=BODY, timeout=30).json()["bundle"])

    before = served()
    assert roll(str(tmp_path / "other"), lambda: now() == wanted) <= {wanted, tiny_run.predictor.fingerprint}
    assert served() > before  # the same process: it still knows what it answered
    refused = httpx.get(f"{url}/versions", timeout=30).json()
    assert refused["current"] == wanted and refused["refused"] == {}
    roll(str(tmp_path / "nothing"), lambda: httpx.get(f"{url}/versions", timeout=30).json()["refused"] != {})
    assert now() == wanted  # what is wrong is refused, and what was served goes on
    roll(None, lambda: now() == tiny_run.predictor.fingerprint)
    metrics = f"http://127.0.0.1:{ray_cluster.address_info['metrics_export_port']}/metrics"
    wait_for(lambda: httpx.Response(200 if "ray_mtrec_requests_total{" in httpx.get(metrics, timeout=30).text else 503), 60)
    text = httpx.get(metrics, timeout=30).text
    for name in ("requests_total", "request_ms_bucket", "stage_ms_bucket", "batch_size_bucket", "answers_total", "coverage"):
        assert f"ray_mtrec_{name}{{" in text, name


def test_stages_of_different_bundles_refuse_and_are_not_healthy(ray_cluster: Any, no_serve: None, tiny_run: TinyRun) -> None:
    from ray import serve

    from mtrec_ray.serving.deployments import Heads, Retrieval, StateEncoder
    from mtrec_ray.serving.ingress import Ingress

    other = tiny.make_config(tiny_run.folder, lambda raw: raw.update(seed=1))
    model = tiny.train_locally(other, tiny_run.data)
    tiny.write_bundle(other, tiny_run.data, model, tiny_run.folder / "other")
    root = tiny_run.bundle_root
    small = {"ray_actor_options": {"num_cpus": 0.1}}
    stages = [d.options(**small).bind(root) for d in (StateEncoder, Retrieval)]
    stages.append(Heads.options(**small).bind(str(tiny_run.folder / "other")))
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(Ingress.options(**small).bind(root, str(tiny_run.folder / "data"), *stages), name="mixed", route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    health = httpx.get(f"{url}/healthz", timeout=30)
    assert health.status_code == 503 and f"['Heads'] lack {tiny_run.predictor.fingerprint}" in health.text
    refused = httpx.post(f"{url}/recommend", json=BODY, timeout=30)
    assert refused.status_code == 503 and "different bundles" in refused.text and refused.headers["retry-after"] == "1"
    # what the other stages alone can answer is answered
    assert httpx.post(f"{url}/similar", json={"item_id": "i3", "k": 2}, timeout=30).status_code == 200


def test_the_ingress_hashes_ids_as_preparation_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers keep sending the log's ids. Without Serve: after its local testing mode a process cannot deploy the Ingress."""
    from mtrec_ray.serving.api import RecommendRequest
    from mtrec_ray.serving.deployments import Heads, Here, Retrieval, StateEncoder
    from mtrec_ray.serving.ingress import Ingress
    from mtrec_ray.serving.settings import ServingSettings

    monkeypatch.setenv("MTREC_TEST_KEY", "a key of 24 bytes, or so")
    tiny.write_log(tmp_path)
    config = tiny.make_config(tmp_path, lambda raw: raw["data"].update(pseudonyms={"key_env": "MTREC_TEST_KEY"}))
    data = tiny.prepare_locally(config, tmp_path / "data")
    tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / "bundle")

    root, data_root = str(tmp_path / "bundle"), str(tmp_path / "data")
    stages = [Here(d.func_or_class(root)) for d in (StateEncoder, Retrieval, Heads)]
    ingress = Ingress.func_or_class.__mro__[1](root, data_root, *stages, settings=ServingSettings(deadline_ms=60_000))

    async def ask() -> list[dict[str, Any]]:
        return [await ingress.recommend(RecommendRequest(user_id=user, k=3)) for user in ("u3", "a stranger")]

    found, stranger = asyncio.run(ask())
    assert found["degraded"] == [] and found["user_id"] == "u3" and len(found["items"]) == 3
    assert stranger["degraded"] == ["no_history"]
