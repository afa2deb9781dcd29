"""Fixtures shared by all tests: a tiny run made without Ray, and one Ray cluster for those that need it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no node is drained here: a process less per training

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.predictor import Predictor
from tests import s3, tiny
from tests.net import free_port
from tests.s3 import Bucket

torch.set_num_threads(1)

LONGEST = (
    "test_same_answers", "test_tutorial", "test_cluster", "test_train", "test_score", "test_baskets", "test_serving",
    "test_nightly", "test_pretrain", "test_submit", "test_finetuned", "test_tune", "test_readme", "test_s3", "test_jobs",
    "test_fuzz", "test_resume", "test_training_options", "test_world_size", "test_finetuning", "test_pretraining",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that of two processes none waits long for the other at the end."""
    place = {name: n for n, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@dataclass
class TinyRun:
    """A run directory with data and a bundle."""

    folder: Path
    config: RunConfig
    data: storage.Directory
    predictor: Predictor

    @property
    def bundle_root(self) -> str:
        return str(self.folder / "bundle")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.write_log(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_folder: Path) -> TinyRun:
    config = tiny.make_config(tiny_folder)
    data = tiny.prepare_locally(config, tiny_folder / "data")
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), tiny_folder / "bundle")
    return TinyRun(tiny_folder, config, data, predictor)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Bucket]:
    pytest.importorskip("moto.server")
    with s3.served() as bucket:
        yield bucket


@pytest.fixture
def bucket(s3_server: Bucket) -> Bucket:
    """A bucket of S3 for this test alone."""
    return Bucket(s3_server.query, s3_server.failed)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """The one cluster of this process's tests; another process of the suite has its own beside it."""
    import ray
    from ray.cluster_utils import Cluster

    from mtrec_ray import runtime  # sets what Serve needs on a busy machine

    assert runtime.connect
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    head = {"num_cpus": 4, "object_store_memory": 200 << 20, "include_dashboard": True, "dashboard_host": "127.0.0.1"}
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(initialize_head=True, head_node_args=head | ports | {"temp_dir": folder})
        Path(folder, "ray_current_cluster").write_text(cluster.address)  # a submitted job looks there for its cluster
        yield ray.init(address=cluster.address, log_to_driver=False)
        ray.shutdown()
        cluster.shutdown()
