"""A service of its own for benchmarks: started in processes that end with it, loaded from outside."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil

THROUGHPUT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
SERVE = """
import json, sys, time
import ray
from ray import serve
from serve_apps.recommend import Args, build
asked = json.loads(sys.argv[1])
ray.init(num_cpus=16, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False, **asked["ray"])
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": asked["port"]})
serve.run(build(Args(**asked["args"])), name="bench", route_prefix="/", logging_config={"enable_access_log": False})
print(ray.get_runtime_context().gcs_address, flush=True)
time.sleep(1_000_000)
"""
DEPLOYMENTS = ("Ingress", "StateEncoder", "Retrieval", "Heads", "TextEncoder")


def serve_command(
    run: str, port: int, serving: dict[str, Any], fused: bool = False, options: dict[str, Any] | None = None, **ray: Any
) -> list[str]:
    """Of a service with one replica of everything, unless options (of every deployment) say otherwise."""
    mine = {"num_replicas": 1, "max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}} if options is None else options
    args = {"run": run, "options": {n: mine for n in DEPLOYMENTS}, "serving": serving, "fused": fused}
    return [sys.executable, "-c", SERVE, json.dumps({"port": port, "args": args, "ray": ray})]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], port: int, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """A service of its own, until it answers; all that it started ends with it."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"} | environment
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(command, env=settings, stdout=noise, stderr=noise)
        try:
            deadline = time.monotonic() + 240
            while True:
                try:
                    if httpx.post(f"http://127.0.0.1:{port}/recommend", json={"user_id": "1"}, timeout=10).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                if process.poll() is not None or time.monotonic() > deadline:
                    noise.seek(0)
                    raise RuntimeError(f"the service did not start:\n{noise.read().decode()[-3000:]}")
                time.sleep(0.3)
            yield psutil.Process(process.pid)
        finally:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in tree:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(tree, timeout=20)


def cpu_seconds(service: psutil.Process) -> float:
    total = 0.0
    for process in [service, *service.children(recursive=True)]:
        try:
            spent = process.cpu_times()
            total += spent.user + spent.system
        except psutil.NoSuchProcess:
            pass
    return total


class Callers:
    """Threads that call a service until told to stop."""

    def __init__(self, threads: int) -> None:
        self.stop, self.lock = threading.Event(), threading.Lock()
        self._threads = [threading.Thread(target=self.run, args=(n,), daemon=True) for n in range(threads)]

    def run(self, number: int) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self._threads:
            thread.join(timeout=90)


def pss_bytes(service: psutil.Process) -> int:
    """Proportional set sizes of all processes of a service."""
    total = 0
    for process in [service, *service.children(recursive=True)]:
        with suppress(OSError, psutil.Error):
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
    return total


DEPLOY = """
import json, os, sys, time
import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
path = sys.argv[1]
asked = json.load(open(path))
ray.init(num_cpus=24, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False, **asked["ray"])
serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": asked["port"]})
before = None
while True:
    time.sleep(0.25)
    try:
        text = open(path).read()
        if text != before:
            _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [json.loads(text)["application"]]}))
            before = text
        status = serve.status().applications.get("bench")
    except ray.exceptions.RayError:  # Serve's controller was killed, and comes back
        continue
    found = status.deployments if status else {}
    told = {n: {"status": str(d.status), "replicas": dict(d.replica_states)} for n, d in found.items()}
    draft = path + ".draft"
    open(draft, "w").write(json.dumps({"time": time.time(), "deployments": told}))
    os.replace(draft, path + ".status")
"""


class Deployed:
    """A service that is deployed by configuration, as `serve deploy` does; a change of it is deployed to what runs."""

    def __init__(self, folder: Path, run: str, port: int, serving: dict[str, Any], options: dict[str, Any], **ray: Any) -> None:
        """options: of every deployment."""
        self.file, self.port, self.ray = folder / "deploy.json", port, ray
        self.application: dict[str, Any] = {
            "name": "bench",
            "route_prefix": "/",
            "import_path": "serve_apps.recommend:build",
            "logging_config": {"enable_access_log": False}, "args": {"run": run, "serving": serving},
            "deployments": [{"name": n, "user_config": {}, **options} for n in DEPLOYMENTS],
        }  # fmt: skip
        self.deploy()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", DEPLOY, str(self.file)]

    def deploy(self, **user_config: Any) -> None:
        """With another rollout."""
        for deployment in self.application["deployments"]:
            deployment["user_config"] = user_config
        draft = self.file.with_suffix(".draft")
        draft.write_text(json.dumps({"port": self.port, "ray": self.ray, "application": self.application}), encoding="utf-8")
        draft.replace(self.file)

    def status(self) -> dict[str, Any]:
        """Deployment -> its status and how many replicas are in which state."""
        file = Path(f"{self.file}.status")
        return dict(json.loads(file.read_text(encoding="utf-8"))["deployments"]) if file.exists() else {}

    def running(self) -> dict[str, int]:
        """Replicas that run."""
        return {n: sum(c for state, c in d["replicas"].items() if "RUNNING" in state) for n, d in self.status().items()}
