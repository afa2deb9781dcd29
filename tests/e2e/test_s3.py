"""A whole run on an object store: log, data, training, bundle, lists, and the service's bundle, with nothing on a disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import compare
from mtrec_ray import bundle, storage
from mtrec_ray.config import parse_config
from mtrec_ray.histories import History
from mtrec_ray.pipeline import STAGES, run_stages
from mtrec_ray.scoring.shards import verify
from mtrec_ray.serving.history import PreparedHistories
from tests import tiny
from tests.s3 import Bucket

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_run_lives_on_s3_alone(ray_cluster: Any, bucket: Bucket, tmp_path: Path) -> None:
    tiny.write_log(tmp_path, users=40)
    tiny.write_encoder(tmp_path / "encoder")
    for file in (*(tmp_path / "log").iterdir(), tmp_path / "items.csv", tmp_path / "users.csv"):
        storage.write_bytes(bucket.uri(str(file.relative_to(tmp_path))), file.read_bytes())
    raw = tiny.raw_config(tmp_path)
    for table, path in (("interactions", "log"), ("items", "items.csv"), ("users", "users.csv")):
        raw["data"][table]["path"] = bucket.uri(path)
    raw["encoder"] = {"model": str(tmp_path / "encoder"), "batch_size": 8}
    raw["train"] |= {"epochs": 1, "workers": 1}
    raw["evaluation"] |= {"baselines": ["popularity"]}
    out, config = bucket.uri("run"), parse_config(raw)

    run = run_stages(config, out, STAGES)
    for name in ("data", "text", "train", "bundle", "evaluation"):
        storage.Directory(storage.join(out, name)).verify()
    assert storage.exists(storage.join(out, "metrics.json")) and storage.exists(storage.join(out, "report.html"))
    assert verify(storage.join(out, "scores"))["users"] == 40
    predictor, histories = bundle.load(storage.join(out, "bundle")), PreparedHistories(storage.join(out, "data"))
    answer = predictor.recommend([histories.get("u1") or History()], 3)[0]
    assert len(answer["items"]) == 3 and answer["degraded"] == []
    assert compare.main([out, out]) == 0
    assert not storage.exists(storage.join(out, "_lock.json"))

    stages = run.notes()
    assert run_stages(config, out, STAGES).notes() == stages  # nothing was done again
    leftovers = [p for p in tmp_path.rglob("*") if p.is_file() and p.parts[len(tmp_path.parts)] not in ("log", "encoder")]
    assert {p.name for p in leftovers} == {"items.csv", "users.csv"}


def test_a_manifest_without_its_data_is_named_with_the_file(ray_cluster: Any, bucket: Bucket, tiny_run: Any) -> None:
    source, root = storage.Directory(tiny_run.bundle_root), bucket.uri("broken/bundle")
    for file in source.manifest["files"]:
        if file != "weights.safetensors":
            storage.write_bytes(storage.join(root, source.manifest["prefix"], file), storage.read_bytes(source.path(file)))
    storage.write_json(storage.join(root, "manifest.json"), source.manifest)
    with pytest.raises(storage.StorageError, match=r"weights\.safetensors: missing, though the manifest names it"):
        storage.Directory(root).verify()
    says = r"^s3://b\w+/broken/bundle/\w+.*: the files do not match the fingerprint"
    with pytest.raises(storage.StorageError, match=says) as caught:
        bundle.load(root)
    assert "secret" not in str(caught.value)
