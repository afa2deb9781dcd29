"""Bulk encoding on a real cluster: shards that survive a killed actor or job."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders import bulk
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.text import TextEncoder
from tests import tiny
from tests.conftest import TinyRun

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def with_encoder(run: TinyRun, folder: Path) -> RunConfig:
    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(tiny.write_encoder(folder / "encoder")), "batch_size": 8}

    return tiny.make_config(run.folder, change)


def counting(folder: Path, dies_at: int | None) -> type:
    """An actor that notes every shard it encodes in a file, and kills its process at one of them, once."""
    noted, killed = str(folder / "noted"), folder / "killed"

    class Actor(bulk._Actor):
        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            number = int(batch["shard"][0])
            if number == dies_at and not killed.exists():
                killed.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with open(noted, "a", encoding="utf-8") as file:
                file.write(f"{number}\n")
            return super().__call__(batch)

    return Actor


def test_a_killed_actor_costs_its_shard_and_vectors_are_those_of_the_encoder(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_encoder(tiny_run, tmp_path)
    assert config.encoder is not None
    monkeypatch.setattr(bulk, "SHARD", 5)
    monkeypatch.setattr(bulk, "_Actor", counting(tmp_path, dies_at=2))
    done = bulk.encode(config, tiny_run.data, str(tmp_path / "text"))
    assert done is not None and (tmp_path / "killed").exists()
    catalogue = storage.read_table(tiny_run.data.path("catalogue.parquet"))
    wanted = TextEncoder(config.encoder).encode([t or "" for t in catalogue["text"].to_pylist()])
    np.testing.assert_allclose(load_text_vectors(done.prefix, catalogue), wanted, atol=1e-5)
    assert done.manifest["texts"] == done.manifest["encoded"] == 21
    assert not (tmp_path / "text" / "_shards").exists()


def test_a_job_that_ended_half_way_goes_on_with_the_shards_that_are_missing(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_encoder(tiny_run, tmp_path)
    monkeypatch.setattr(bulk, "SHARD", 5)
    monkeypatch.setattr(bulk, "_Actor", counting(tmp_path, None))

    def ends(folder: str, number: int) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bulk, "_read", ends)
        with pytest.raises(KeyboardInterrupt):
            bulk.encode(config, tiny_run.data, str(tmp_path / "text"))
    shards = sorted((tmp_path / "text" / "_shards").rglob("*.npy"))
    assert len(shards) == 5 and not storage.exists(tmp_path / "text" / "manifest.json")
    shards[1].unlink()
    (tmp_path / "noted").unlink()
    assert bulk.encode(config, tiny_run.data, str(tmp_path / "text")) is not None
    assert (tmp_path / "noted").read_text() == "1\n"
