"""Evaluation against a training epoch on MovieLens-100K: `python -m benchmarks.evaluate_small`.

Leave-one-out. One process, one thread for both: all metrics, slices and 1,000 bootstrap resamples of the test split
after the model is loaded, and one training epoch of jobs/configs/ml100k.yaml without its evaluation. Both take turns;
medians. Value: seconds of evaluation ÷ seconds of an epoch. ok needs <= 1 and at most 5 seconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import bundle, storage
from mtrec_ray.config import load_config
from mtrec_ray.evaluation.evaluate import MODEL, evaluate_part, intervals_of, merge_reduced
from mtrec_ray.evaluation.measure import Model
from mtrec_ray.evaluation.reduce import points_of, summarise
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.worker import run_worker

RUN = "runs/bench/evaluate-small"
CONFIG = "jobs/configs/ml100k.yaml"
ROUNDS, MAX_SECONDS = 3, 5.0


def evaluate_once(predictor: Any, data: storage.Directory) -> tuple[float, dict[str, Any]]:
    """Seconds from stored windows to metrics and intervals -> (seconds, what was found)."""
    begun = time.perf_counter()
    resampler, tasks = Resampler(1000, predictor.config.evaluation.seed), dict(predictor.config.tasks)
    parts = []
    for part in storage.list_files(data.path("windows", "test"), ".parquet"):
        known = set(storage.read_table(part.replace("/test/", "/train/"), ["user_id"])["user_id"].to_pylist())
        cache = WindowCache.from_table(storage.read_table(part))
        parts.append(evaluate_part({MODEL: Model(predictor)}, predictor, cache, known, resampler, (0, 1)))
    summaries = {name: summarise(s, tasks, resampler) for name, s in merge_reduced(parts)[MODEL].items()}
    found = {name: {"metrics": points_of(s), "intervals": intervals_of(s)} for name, s in summaries.items()}
    return time.perf_counter() - begun, found


def train_epoch(data: storage.Directory, text: str) -> float:
    """Seconds of one epoch, without evaluation."""
    seconds = []

    def report(epoch: int, scalars: dict[str, float]) -> None:
        seconds.append(scalars["train/seconds"])

    run_worker(load_config(CONFIG, ["train.epochs=1", "train.threads=1"]), data.prefix, text, report)
    return seconds[0]


def main() -> int:
    fetch_ml100k(Path(".data/ml-100k"))
    command = [sys.executable, "-m", "jobs.pipeline", "--config", CONFIG, "--out", RUN, "train.epochs=1", "evaluation.baselines=[]"]
    if subprocess.run(command, check=False).returncode:
        print("the pipeline failed", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    predictor, data = bundle.load(f"{RUN}/bundle"), storage.Directory(f"{RUN}/data")
    text = storage.Directory(f"{RUN}/text").prefix
    evaluations: list[float] = []
    epochs: list[float] = []
    found: dict[str, Any] = {}
    for _ in range(ROUNDS):
        seconds, found = evaluate_once(predictor, data)
        evaluations.append(seconds)
        epochs.append(train_epoch(data, text))
    ratio = median(evaluations) / median(epochs)
    counted = {name: sum(len(v) for v in f["metrics"].values()) for name, f in found.items()}
    detail = {"evaluation_seconds": evaluations, "epoch_seconds": epochs, "metrics_per_slice": counted, "resamples": 1000,
              "intervals": json.loads(json.dumps(found["all"]["intervals"]))}  # fmt: skip
    ok = ratio <= 1 and median(evaluations) <= MAX_SECONDS
    return finish("evaluate_small", ratio, "evaluation ÷ epoch", f"<= 1 and at most {MAX_SECONDS:g} s", ok, detail)


if __name__ == "__main__":
    sys.exit(main())
