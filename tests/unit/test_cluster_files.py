from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from jobs.submit import JOBS
from mtrec_ray.config import PlacementConfig, parse_config
from mtrec_ray.serving.settings import ServingSettings

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


# --------------------------------------------------------------------------- jobs' labels, local machines, containers

KUBERAY = ROOT / "deploy" / "kuberay"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((KUBERAY / name).read_text()))


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def launched(cluster: dict) -> dict:
    """A cluster's node types, after all that the launcher itself does before it starts one. Raises what it raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cluster)
    validate_config(prepared)
    return dict(prepared["available_node_types"])


def test_the_launcher_takes_cluster_yaml() -> None:
    types = launched(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    assert {n: t["labels"]["role"] for n, t in types.items()} == {
        "head": "head", "train_gpu": "train", "serve_cpu": "serve", "batch_spot": "batch"
    }  # fmt: skip


def test_local_machines_are_a_valid_cluster_too_and_say_their_labels() -> None:
    cluster = yaml.safe_load((ROOT / "cluster.local.yaml").read_text())
    jsonschema.validate(cluster, launcher_schema())
    types = launched(cluster)
    assert cluster["provider"]["type"] == "local" and types["local.cluster.node"]["max_workers"] == cluster["max_workers"]
    assert all("--labels=" in " ".join(cluster[f"{k}_start_ray_commands"]) for k in ("head", "worker"))


def test_the_roles_that_the_comment_of_cluster_yaml_names_are_there() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    cluster = yaml.safe_load(text)
    roles = {t["labels"]["role"] for t in cluster["available_node_types"].values()}
    assert roles == {"head", "train", "serve", "batch"}
    named = re.search(r"`(placement: .*)`", text)
    assert named is not None
    placement = PlacementConfig.model_validate(yaml.safe_load(named[1])["placement"])
    assert {placement.train["role"], placement.batch["role"]} <= roles


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_a_kuberay_cluster_is_whole(name: str) -> None:
    [found] = [d for d in documents(name) if d["apiVersion"] == "ray.io/v1"]
    spec = found["spec"].get("rayClusterSpec") or found["spec"]["rayClusterConfig"]
    assert found["kind"] == {"rayjob.yaml": "RayJob", "rayservice.yaml": "RayService"}[name]
    assert spec["rayVersion"] == pinned("ray")
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = set()
    for group in groups:
        labels = dict(x.split("=") for x in group["rayStartParams"]["labels"].split(","))
        assert labels["role"] in {"head", "train", "batch", "serve"}
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        images.add(container["image"])
        resources = container["resources"]
        assert resources["requests"] == resources["limits"]  # Ray counts on what it was promised
        volumes = {v["name"] for v in pod.get("volumes", [])}
        assert {m["name"] for m in container.get("volumeMounts", [])} <= volumes
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert len({g["groupName"] for g in spec["workerGroupSpecs"]}) == len(spec["workerGroupSpecs"])
    assert len(images) == 1 and next(iter(images)) in (ROOT / "deploy" / "Dockerfile").read_text()


def test_the_rayjob_runs_a_job_that_exists_with_a_configuration_that_loads() -> None:
    config_map, job = documents("rayjob.yaml")
    module, *arguments = job["spec"]["entrypoint"].removeprefix("python -m jobs.").split()
    assert module in JOBS and arguments[0] == "--config"
    folder, file = arguments[1].rsplit("/", 1)
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert head["containers"][0]["volumeMounts"][0]["mountPath"] == folder
    assert head["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]
    config = parse_config(yaml.safe_load(config_map["data"][file]))
    groups = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    labels = [dict(x.split("=") for x in g["rayStartParams"]["labels"].split(",")) for g in groups]
    assert config.placement.train in labels and config.placement.batch in labels
    [training] = [g for g, found in zip(groups, labels, strict=True) if found == config.placement.train]
    assert config.train.use_gpu and training["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert training["maxReplicas"] >= config.train.max_workers


def test_the_rayservice_deploys_what_recommend_yaml_does() -> None:
    from ray.serve.schema import ServeDeploySchema

    [service] = documents("rayservice.yaml")
    raw = yaml.safe_load(service["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(raw)
    [app], [local] = raw["applications"], yaml.safe_load((ROOT / "serve_apps" / "recommend.yaml").read_text())["applications"]
    assert [d["name"] for d in app["deployments"]] == [d["name"] for d in local["deployments"]]
    assert (app["import_path"], app["logging_config"]) == (local["import_path"], local["logging_config"])
    settings = ServingSettings.model_validate(app["args"]["serving"])
    assert settings.store.kind == "redis"  # several machines
    pods = service["spec"]["rayClusterConfig"]
    for group in (pods["headGroupSpec"], *pods["workerGroupSpecs"]):  # it leaves loopback: every replica sees the tokens
        assert settings.tokens_env in {e["name"] for e in group["template"]["spec"]["containers"][0]["env"]}


def test_what_the_image_copies_and_the_monitoring_mounts_is_there() -> None:
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / part).exists() for part in line.split()), line
    extras = re.search(r'"\.\[(.*?)\]"', dockerfile)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras is not None and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert f"mtrec-ray:{project['version']}" in dockerfile
    folder = ROOT / "deploy" / "monitoring"
    compose = yaml.safe_load((folder / "docker-compose.yml").read_text())
    mounts = [v.split(":")[0] for s in compose["services"].values() for v in s["volumes"]]
    assert all((folder / m).exists() for m in mounts if m.startswith("."))
    assert json.loads((folder / "../../serve_apps/grafana.json").read_text())["panels"]
    [monitor] = documents("podmonitor.yaml")
    port = monitor["spec"]["podMetricsEndpoints"][0]["port"]
    for name in ("rayjob.yaml", "rayservice.yaml"):
        assert f"name: {port}" in (KUBERAY / name).read_text()
