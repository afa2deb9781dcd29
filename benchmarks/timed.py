"""Training for a number of seconds of one thread, with the valid metric or the model along the way."""

from __future__ import annotations

import contextlib
import copy
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
    """A run directory with finished stages of ML-100K; they are reused where nothing has changed."""
    for stage in stages:
        subprocess.run([sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, "--out", str(run)], check=True)
    return run


def retrieval_alone(overrides: dict[str, Any]) -> RunConfig:
    """The ML-100K configuration with its retrieval task only."""
    config = load_config(CONFIG, [f"{k}={v}" for k, v in overrides.items()])
    return config.model_copy(update={"tasks": {"retrieval": config.tasks["retrieval"]}})


class _Enough(Exception):
    pass


def train_for(
    config: RunConfig, run: Path, text: bool, seconds: float, every: float, models: bool = False, warm_up: bool = False
) -> list[dict[str, Any]]:
    """The loop for about so many seconds of processor time, which are those of the wall on an idle machine; evaluation and a
    warm-up epoch are not counted. -> points after about `every` seconds each, with `ndcg@10` of valid, or `model`."""
    torch.set_num_threads(1)
    data = storage.Directory(run / "data")
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    text_NE = load_text_vectors(storage.Directory(run / "text").prefix, catalogue) if text else None
    model = build_model(config, schema, text_NE)
    tell_items(model, catalogue)
    cache = mapped_windows(data.prefix, "train")
    feed, per_epoch = build_feed(config, schema, cache, 0, 1), int(cache.columns["target_positive"].sum())
    measure = valid_evaluator(config, schema, catalogue, mapped_windows(data.prefix, "valid"))
    points: list[dict[str, Any]] = []
    last: Any = {"retrieval": {"ndcg@10": 0.0}}
    spent, wall, due, epochs, skip = 0.0, 0.0, every, 0, warm_up
    begun = time.process_time(), time.perf_counter()

    def evaluate(kept: Recommender) -> Any:
        nonlocal spent, wall, due, epochs, skip, begun, last
        if skip:
            skip = False
        else:
            spent, wall, epochs = spent + time.process_time() - begun[0], wall + time.perf_counter() - begun[1], epochs + 1
        if epochs and (spent >= due or spent >= seconds):
            due += every * (1 + (spent - due) // every)
            point: dict[str, Any] = {"seconds": spent, "wall": wall, "epochs": epochs, "targets": epochs * per_epoch}
            if models:
                point["model"] = copy.deepcopy(kept)
            elif not warm_up:
                last = measure(kept)
                point["ndcg@10"] = last["retrieval"]["ndcg@10"]
            points.append(point)
        if spent >= seconds:
            raise _Enough
        begun = time.process_time(), time.perf_counter()
        return last

    with contextlib.suppress(_Enough):
        fit(config, model, feed, evaluate, lambda *_: None)
    return points
