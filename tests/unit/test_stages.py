"""What a stage asks of the ones before it. No Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mtrec_ray import storage
from mtrec_ray.pipeline import Run, StageError
from tests import tiny
from tests.conftest import TinyRun


def published(root: str, inputs: str, **meta: Any) -> storage.Directory:
    directory = storage.Directory(root)
    storage.write_bytes(storage.join(directory.begin(inputs * 64), "file"), b"x")
    directory.publish(inputs * 64, **meta)
    return directory


def run_with(tiny_run: TinyRun, out: Path, **read: str) -> Run:
    """Published data a, text b and a training that read what is given."""

    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": "any"}

    run = Run(tiny.make_config(tiny_run.folder, change), str(out))
    published(run.data.root, "a")
    published(run.text.root, "b")
    published(run.trained.root, "c", read={name: inputs * 64 for name, inputs in read.items()})
    return run


def test_a_training_on_other_vectors_or_data_is_not_bundled(tiny_run: TinyRun, tmp_path: Path) -> None:
    run_with(tiny_run, tmp_path / "same", data="a", text="b")._check_training()
    other = run_with(tiny_run, tmp_path / "text", data="a", text="d")
    with pytest.raises(
        StageError, match=r"other text vectors: encoder or texts are not those of the training; run jobs\.train again"
    ):
        other._index()
    assert not Path(other.bundle.root).exists()
    with pytest.raises(StageError, match=r"other prepared data; run jobs\.train again"):
        run_with(tiny_run, tmp_path / "data", data="d", text="b")._check_training()


def test_text_vectors_that_are_gone_are_other_ones(tiny_run: TinyRun, tmp_path: Path) -> None:
    run = run_with(tiny_run, tmp_path, data="a", text="b")
    run.config = run.config.model_copy(update={"encoder": None})
    with pytest.raises(StageError, match="other text vectors"):
        run._check_training()
