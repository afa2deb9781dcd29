from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parent.parent.parent


def launcher_schema() -> dict:
    import importlib.util

    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    return dict(json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text()))


def test_cluster_yaml_is_valid_for_rays_launcher() -> None:
    jsonschema.validate(yaml.safe_load((ROOT / "cluster.yaml").read_text()), launcher_schema())


def test_the_schema_does_refuse_a_wrong_cluster() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    cluster["max_workerz"] = 3
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, launcher_schema())


def test_the_head_type_exists_and_gpu_workers_train() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    assert cluster["head_node_type"] in cluster["available_node_types"]
    assert sum(t.get("max_workers", 0) for t in cluster["available_node_types"].values()) <= cluster["max_workers"]


def test_serve_yaml_configures_five_autoscaling_deployments_on_loopback() -> None:
    app = yaml.safe_load((ROOT / "serve_apps" / "recommend.yaml").read_text())
    assert app["http_options"]["host"] == "127.0.0.1"
    deployments = app["applications"][0]["deployments"]
    assert {d["name"] for d in deployments} == {"Ingress", "StateEncoder", "Retrieval", "Heads", "TextEncoder"}
    assert len({str(d["user_config"]) for d in deployments}) == 1  # a rollout is one anchor
    assert all(d["autoscaling_config"]["max_replicas"] > d["autoscaling_config"]["min_replicas"] for d in deployments)


def test_serve_yaml_is_valid_for_ray_serve() -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve_apps" / "recommend.yaml").read_text()))
