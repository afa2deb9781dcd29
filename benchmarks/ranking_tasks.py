"""Like and rating against gradient boosting on ML-100K, protocol `time`: `python -m benchmarks.ranking_tasks`.

Every test target is predicted from all events before it, by the model and by gradient boosting alike: the items' training
labels, the user's visible events and the actions of the last 99 of them. Boosting's number of leaves and the model's epoch
are chosen on valid (the epoch by the mean relative gain over boosting's valid values). Three seeds, two processes at a time;
differences are paired over users, a resample's being the mean over seeds. Seeds that are done are kept and reused.

Value: like AUC of the model minus that of gradient boosting. ok: the 95 % intervals of both differences (AUC up, RMSE down)
leave 0 out.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import RunConfig, load_config
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.evaluation.evaluate import MODEL, difference, evaluate_part
from mtrec_ray.evaluation.measure import Model, System
from mtrec_ray.evaluation.reduce import WHOLE, Summary, summarise
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.evaluation.task_baselines import fit_task_baselines
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.worker import build_model, load_schema, mapped_windows, run_identity, run_worker, tell_items

CONFIG, ROOT, SEEDS, BOOSTING = "jobs/configs/ml100k.yaml", Path("runs/bench/ranking-tasks"), (0, 1, 2), "gradient_boosting"
TARGET = "like AUC above and rating RMSE below gradient boosting, 95 % paired intervals without 0"
SETTINGS = [
    "data.protocol=time", "tasks.rating.weight=0.5", "tasks.like.weight=0.3", "train.epochs=30",
    "train.evaluate_every=3", "train.patience=9", "train.monitor=gain",
]  # fmt: skip
METRICS = {"like": "auc", "rating": "rmse"}


def judged(predictor: Predictor, systems: dict[str, System], split: str, data: storage.Directory) -> dict[str, Summary]:
    """Metrics of every system on a split, in every resample of users."""
    settings = predictor.config.evaluation
    resampler = Resampler(settings.bootstrap, settings.seed)
    cache = mapped_windows(data.prefix, split)
    found = evaluate_part(systems, predictor, cache, set(), resampler, settings.profile_folds_test)
    return {n: summarise(parts[WHOLE], dict(predictor.config.tasks), resampler) for n, parts in found.items()}


def boosting(config: RunConfig, data: storage.Directory, predictor: Predictor) -> System:
    fitted = fit_task_baselines(predictor, mapped_windows(data.prefix, "train"), mapped_windows(data.prefix, "valid"))
    return fitted[BOOSTING].system


def run_seed(seed: int) -> None:
    """Train and judge one seed -> ROOT/seed-N.npz: `SYSTEM|TASK`, the metric in every resample."""
    torch.set_num_threads(1)
    base = load_config(CONFIG, [*SETTINGS[:-1], f"seed={seed}"])
    data, text = storage.Directory(str(ROOT / "data")), storage.Directory(str(ROOT / "text"))
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    text_NE = load_text_vectors(text.prefix, catalogue)

    def predictor_of(config: RunConfig, state: dict[str, torch.Tensor] | None) -> Predictor:
        model = build_model(config, schema, text_NE)
        tell_items(model, catalogue)
        if state is not None:
            model.load_state_dict(state)
        with torch.no_grad():
            item_vec_ND = model.eval().item_vectors()
        return Predictor(config, schema, catalogue, model, item_vec_ND, "benchmark")

    untrained = predictor_of(base, None)
    rival = boosting(base, data, untrained)
    valid = judged(untrained, {BOOSTING: rival}, "valid", data)[BOOSTING]
    reference = {f"{task}/{metric}": float(valid[task][metric][0]) for task, metric in METRICS.items()}
    config = load_config(CONFIG, [*SETTINGS, f"train.reference={json.dumps(reference)}", f"seed={seed}"])
    checkpoints = Checkpoints(str(ROOT / f"seed-{seed}"), run_identity(config, data, text))
    fitted = run_worker(config, data.prefix, text.prefix, lambda *_: None, checkpoints)
    predictor = predictor_of(config, fitted.best_state)
    test = judged(predictor, {MODEL: Model(predictor), BOOSTING: rival}, "test", data)
    arrays = {f"{name}|{task}": test[name][task][metric] for name in test for task, metric in METRICS.items()}
    draft = ROOT / f"seed-{seed}.draft.npz"
    arrays |= {"epoch": np.array(fitted.best_epoch + 1), "seconds": np.array(fitted.seconds)}
    arrays["ndcg"] = test[MODEL]["retrieval"]["ndcg@10"][:1]
    np.savez(draft, **arrays)  # type: ignore[arg-type]
    draft.rename(ROOT / f"seed-{seed}.npz")


def main() -> int:
    if len(sys.argv) == 3 and sys.argv[1] == "--seed":
        run_seed(int(sys.argv[2]))
        return 0
    fetch_ml100k(Path(".data/ml-100k"))
    for stage in ("prepare", "encode"):
        command = [sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, "--out", str(ROOT), "data.protocol=time"]
        if subprocess.run(command, check=False).returncode:
            return 2
    missing = [s for s in SEEDS if not (ROOT / f"seed-{s}.npz").exists()]
    for start in range(0, len(missing), 2):
        both = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.ranking_tasks", "--seed", str(s)])
            for s in missing[start : start + 2]
        ]
        if any([process.wait() for process in both]):
            return 2
    runs: list[dict[str, Any]] = []
    for seed in SEEDS:
        with np.load(ROOT / f"seed-{seed}.npz") as arrays:
            runs.append({n: arrays[n] for n in arrays.files})
    found = {
        task: difference(*(np.mean([r[f"{name}|{task}"] for r in runs], axis=0) for name in (MODEL, BOOSTING))) for task in METRICS
    }
    points = {name: {task: [float(r[f"{name}|{task}"][0]) for r in runs] for task in METRICS} for name in (MODEL, BOOSTING)}
    low, high = found["like"]["low"], found["rating"]["high"]
    ok = low is not None and low > 0 and high is not None and high < 0
    detail = {"difference": found, "seeds": points, "means": {n: {t: mean(v) for t, v in ts.items()} for n, ts in points.items()},
              "metric": METRICS, "epochs": [int(r["epoch"]) for r in runs], "seconds": [float(r["seconds"]) for r in runs],
              "ndcg@10": [float(r["ndcg"][0]) for r in runs], "settings": SETTINGS}  # fmt: skip
    return finish("ranking_tasks", float(found["like"]["difference"] or 0), "AUC", TARGET, ok, detail)


if __name__ == "__main__":
    sys.exit(main())
