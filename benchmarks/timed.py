"""Training for a number of seconds of one thread, with the valid metric along the way."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mtrec_ray import storage
from mtrec_ray.config import RunConfig, load_config
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.training.loop import fit
from mtrec_ray.training.worker import build_feed, build_model, load_schema, mapped_windows, tell_items, valid_evaluator

CONFIG = "jobs/configs/ml100k.yaml"


def prepared(run: Path, stages: tuple[str, ...]) -> Path:
    """A run directory with finished stages of ML-100K; they are made where they are missing."""
    for stage, made in (("prepare", "data"), ("encode", "text")):
        if stage in stages and not (run / made / "manifest.json").exists():
            subprocess.run([sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, "--out", str(run)], check=True)
    return run


def retrieval_alone(overrides: dict[str, Any]) -> RunConfig:
    """The ML-100K configuration with its retrieval task only."""
    config = load_config(CONFIG, [f"{k}={v}" for k, v in overrides.items()])
    return config.model_copy(update={"tasks": {"retrieval": config.tasks["retrieval"]}})


class _Enough(Exception):
    pass


def train_for(config: RunConfig, run: Path, text: bool, seconds: float, every: float) -> tuple[list[dict[str, float]], Recommender]:
    """The loop for about so many seconds of processor time, which are those of a clock on an idle machine. Evaluation is not
    counted -> the points measured after about `every` seconds each, and the model."""
    torch.set_num_threads(1)
    data = storage.Directory(run / "data")
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    text_NE = load_text_vectors(storage.Directory(run / "text").prefix, catalogue) if text else None
    model = build_model(config, schema, text_NE)
    tell_items(model, catalogue, config)
    feed = build_feed(config, schema, mapped_windows(data.prefix, "train"), 0, 1)
    measure = valid_evaluator(config, schema, catalogue, mapped_windows(data.prefix, "valid"))
    points: list[dict[str, float]] = []
    spent, due, epochs, begun, last = 0.0, every, 0, time.process_time(), {"retrieval": {"ndcg@10": 0.0}}

    def evaluate(kept: Recommender) -> Any:
        nonlocal spent, due, epochs, begun, last
        spent += time.process_time() - begun
        epochs += 1
        if spent >= due or spent >= seconds:
            due += every * (1 + (spent - due) // every)
            last = measure(kept)
            points.append({"seconds": spent, "epochs": epochs, "ndcg@10": last["retrieval"]["ndcg@10"]})
        if spent >= seconds:
            raise _Enough
        begun = time.process_time()
        return last

    with contextlib.suppress(_Enough):
        fit(config, model, feed, evaluate, lambda *_: None)
    return points, model
