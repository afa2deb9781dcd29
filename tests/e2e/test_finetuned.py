"""The main job with the text encoder trained by the recommender itself: what is bundled is what was learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import EncoderConfig
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.pipeline import run_stages
from tests import tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.mark.parametrize(("kind", "workers"), [("full", 2), ("lora", 0)])
def test_the_bundle_holds_the_vectors_of_the_encoder_that_was_trained(
    ray_cluster: Any, tmp_path: Path, kind: str, workers: int
) -> None:
    tiny.write_log(tmp_path)
    tuning = {"kind": kind, "learning_rate": 0.01, "items_per_step": 8}

    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(tiny.write_encoder(tmp_path / "encoder")), "tuning": tuning}
        raw["train"] |= {"epochs": 2, "workers": workers}
        raw["evaluation"]["baselines"] = ["popularity"]

    config = tiny.make_config(tmp_path, change)
    run = run_stages(config, str(tmp_path / "run"), ("prepare", "encode", "train", "index", "evaluate"))
    catalogue = storage.read_table(run.data.path("catalogue.parquet"))
    texts = catalogue["text"].to_pylist()
    learnt = TextEncoder(EncoderConfig(model=run.trained.path("encoder"))).encode([t or "" for t in texts])
    assert (
        np.abs(learnt - TextEncoder(EncoderConfig(model=str(tmp_path / "encoder"))).encode([t or "" for t in texts])).max() > 1e-3
    )
    predictor = bundle.load(run.bundle.root)
    new = catalogue["item_id"].to_pylist().index("new")  # without a training event: its text is all there is
    with torch.no_grad():
        expected = predictor.model.item_tower.text(torch.from_numpy(learnt[new]) * 16**0.5)  # type: ignore[misc]
    torch.testing.assert_close(predictor.item_vec_ND[new], expected, atol=1e-4, rtol=1e-4)
    assert json.loads(storage.read_bytes(run.bundle.path("text_encoder.json")))["encoder"]["model"] == run.trained.path("encoder")
    training = json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"]["training"]
    assert training["workers"] == max(1, workers) and 0 < training["parameters"]["trained"] < training["parameters"]["all"]
    assert "encoder_state" not in training and "text_NE" not in training
    before = run.trained.manifest["inputs"]
    again = run_stages(config, str(tmp_path / "run"), ("train", "index", "evaluate"))  # all of it is reused
    assert again.trained.manifest["inputs"] == before
