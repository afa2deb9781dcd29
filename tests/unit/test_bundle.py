from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mtrec_ray import bundle, storage
from mtrec_ray.histories import History
from tests.conftest import TinyRun


@pytest.fixture
def copy(tiny_run: TinyRun, tmp_path: Path) -> Path:
    shutil.copytree(tiny_run.bundle_root, tmp_path / "bundle")
    return tmp_path / "bundle"


def inside(root: Path) -> Path:
    return Path(storage.Directory(str(root)).prefix)


def test_a_loaded_bundle_answers_like_the_trained_model(tiny_run: TinyRun, copy: Path) -> None:
    history = History(["i1", "i2"], [0, 1000], {"click": [1, 1]})
    assert bundle.load(str(copy)).recommend([history], 5) == tiny_run.predictor.recommend([history], 5)


def test_an_unpublished_prefix_can_be_loaded_but_its_root_cannot(copy: Path) -> None:
    prefix = inside(copy)
    (copy / "manifest.json").unlink()
    assert bundle.load(str(prefix)).item_ids
    with pytest.raises(bundle.BundleError, match="manifest"):
        bundle.load(str(copy))


def test_the_fingerprint_covers_everything_but_the_metrics(copy: Path) -> None:
    prefix = inside(copy)
    before = bundle.compute_fingerprint(str(prefix))
    (prefix / "metrics.json").write_text('{"changed": 1}')
    assert bundle.compute_fingerprint(str(prefix)) == before
    for name in (
        "config.json",
        "schema.json",
        "catalogue.parquet",
        "weights.safetensors",
        "items.safetensors",
        "index.json",
        "text_encoder.json",
    ):
        content = (prefix / name).read_bytes()
        (prefix / name).write_bytes(content + b" ")
        assert bundle.compute_fingerprint(str(prefix)) != before, name
        (prefix / name).write_bytes(content)
    assert bundle.compute_fingerprint(str(prefix)) == before


def test_a_damaged_bundle_is_refused(copy: Path) -> None:
    weights = inside(copy) / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(bundle.BundleError, match="damaged"):
        bundle.load(str(copy))


def test_a_bundle_of_another_schema_version_is_refused(copy: Path) -> None:
    path = inside(copy) / "fingerprint.json"
    stated = json.loads(path.read_text()) | {"schema_version": 999}
    path.write_text(json.dumps(stated))
    with pytest.raises(bundle.BundleError, match="999"):
        bundle.load(str(copy))


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(bundle.BundleError, match=r"jobs\.pipeline"):
        bundle.load(str(tmp_path / "nothing"))


def test_nothing_in_a_bundle_is_a_pickle(copy: Path) -> None:
    assert {p.suffix for p in inside(copy).iterdir()} == {".json", ".parquet", ".safetensors"}
