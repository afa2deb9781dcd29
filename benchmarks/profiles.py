"""Profiles of held-out users on ML-100K against tf-idf logistic regression: `python -m benchmarks.profiles`.

Users hash into ten folds; five runs hold out two folds each (and one for early stopping and tuning), so that every user is
told once by a model that never saw their attributes. Predictions of the five are pooled. The model is that of
jobs/configs/ml100k.yaml with EPOCHS epochs, chosen by valid NDCG@10 alone. The other side is scikit-learn's
LogisticRegression on TfidfTransformer of the bag of visible items, fitted on the same users, C chosen by log loss on the
valid fold.

Value: the worse of two differences, model minus logistic regression: gender AUC and age macro-F1. A killed run goes on
where it was: hashings that are done are kept, and the one under way has its checkpoints.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score, log_loss, roc_auc_score

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import RunConfig, load_config
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.evaluation.measure import Model, Moments
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.worker import build_model, load_schema, mapped_windows, run_identity, run_worker

CONFIG, ROOT, EPOCHS = "jobs/configs/ml100k.yaml", Path("runs/bench/profiles"), 12
TASKS = ("gender", "age_group", "occupation")
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
TARGET = "gender AUC and age macro-F1 not below tf-idf logistic regression by more than 0.01"

Told = dict[str, np.ndarray]
"""`label|TASK`, `model|TASK`, `tfidf|TASK`: of the users of two folds."""


def folds_of(hashing: int) -> tuple[tuple[int, int], int]:
    """-> (test folds, valid fold)."""
    return (2 * hashing, 2 * hashing + 1), (2 * hashing + 2) % 10


def config_of(hashing: int) -> RunConfig:
    test_folds, valid_fold = folds_of(hashing)
    settings = [f"evaluation.profile_folds_test={list(test_folds)}", f"evaluation.profile_fold_valid={valid_fold}"]
    return load_config(CONFIG, [*settings, f"train.epochs={EPOCHS}"])


def told_in(hashing: int, config: RunConfig, data: storage.Directory, text: storage.Directory) -> Path:
    """The file of a hashing that is done; what another configuration or other data have told stands in another one."""
    return ROOT / f"told-{hashing}-{run_identity(config, data, text)[:16]}.npz"


def tell(hashing: int, config: RunConfig, data: storage.Directory, text: storage.Directory) -> Told:
    """Train one hashing's model and logistic regression -> what both say of its test users."""
    test_folds, valid_fold = folds_of(hashing)
    checkpoints = Checkpoints(str(ROOT / f"hashing-{hashing}"), run_identity(config, data, text))
    fitted = run_worker(config, data.prefix, text.prefix, lambda *_: None, checkpoints)
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    model = build_model(config, schema, load_text_vectors(text.prefix, catalogue))
    model.load_state_dict(fitted.best_state)
    with torch.no_grad():
        item_vec_ND = model.eval().item_vectors()
    predictor = Predictor(config, schema, catalogue, model, item_vec_ND, "benchmark")
    splits = {s: mapped_windows(data.prefix, s) for s in ("train", "valid", "test")}

    def moments(split: str, folds: tuple[int, ...]) -> Moments:
        cache = splits[split]
        return Moments.of(schema, cache, np.flatnonzero(np.isin(cache.columns["fold"], folds)))

    valid, test = moments("valid", (valid_fold,)), moments("test", test_folds)
    told = Model(predictor).profiles(test)
    bag, labels = training_bags(splits["train"], schema.n_items, (*test_folds, valid_fold))
    tfidf = TfidfTransformer().fit(bag)
    out: Told = {}
    for task in TASKS:
        classes, column = told[task].shape[1], f"profile_{task}"
        guess = regression(tfidf, bag, labels[task], valid, valid.cache.columns[column][valid.index], test, classes)
        out |= {f"label|{task}": test.cache.columns[column][test.index], f"model|{task}": told[task], f"tfidf|{task}": guess}
    return out


def training_bags(train: WindowCache, n_items: int, held: tuple[int, ...]) -> tuple[sp.csr_matrix, dict[str, np.ndarray]]:
    """Items of the training events of every user outside the held-out folds, and their attributes."""
    names, user = np.unique(np.array(train.user_ids.to_pylist()), return_inverse=True)
    history, length = train.gather("history", np.arange(len(train)))
    rows, items = np.repeat(user, length), train.columns["history_item"][history]
    bag = sp.csr_matrix((np.ones(len(rows)), (rows, items)), shape=(len(names), n_items))
    bag.data[:] = 1
    _, first = np.unique(user, return_index=True)
    kept = np.flatnonzero(~np.isin(train.columns["fold"][first], held))
    return bag[kept], {t: train.columns[f"profile_{t}"][first[kept]] for t in TASKS}


def regression(
    tfidf: Any, bag: sp.csr_matrix, label: np.ndarray, valid: Moments, valid_label: np.ndarray, test: Moments, classes: int
) -> np.ndarray:
    """Logistic regression, C by log loss on valid -> probability per class of the test moments."""

    def probability(model: Any, moments: Moments) -> np.ndarray:
        out = np.full((len(moments), classes), 1e-12)
        out[:, model.classes_] = model.predict_proba(tfidf.transform(moments.visible()))
        return out

    known = label >= 0
    models = [LogisticRegression(C=c, max_iter=1000).fit(tfidf.transform(bag[known]), label[known]) for c in STRENGTHS]
    losses = [log_loss(valid_label, probability(m, valid), labels=range(classes)) for m in models]
    return probability(models[int(np.argmin(losses))], test)


def judged(label: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    guess = probability.argmax(1)
    found = {"accuracy": accuracy_score(label, guess), "macro_f1": f1_score(label, guess, average="macro"), "users": len(label)}
    if probability.shape[1] == 2:
        found["auc"] = roc_auc_score(label, probability[:, 1])
    return {n: float(v) for n, v in found.items()}


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    fetch_ml100k(Path(".data/ml-100k"))
    for stage in ("prepare", "encode"):  # reused where nothing has changed
        if subprocess.run([sys.executable, "-m", f"jobs.{stage}", "--config", CONFIG, "--out", str(ROOT)], check=False).returncode:
            return 2
    data, text = (storage.Directory(str(ROOT / n)) for n in ("data", "text"))
    parts: list[Told] = []
    for hashing in range(5):
        config = config_of(hashing)
        kept = told_in(hashing, config, data, text)
        if not kept.exists():
            told: dict[str, Any] = tell(hashing, config, data, text)
            np.savez_compressed(kept.with_suffix(".draft.npz"), **told)
            kept.with_suffix(".draft.npz").rename(kept)
        with np.load(kept) as found:
            parts.append({n: found[n] for n in found.files})
    pooled = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    table = {s: {t: judged(pooled[f"label|{t}"], pooled[f"{s}|{t}"]) for t in TASKS} for s in ("model", "tfidf")}
    differences = {
        "gender/auc": table["model"]["gender"]["auc"] - table["tfidf"]["gender"]["auc"],
        "age_group/macro_f1": table["model"]["age_group"]["macro_f1"] - table["tfidf"]["age_group"]["macro_f1"],
    }
    worst = min(differences.values())
    each = [{f"{s}|{t}": judged(p[f"label|{t}"], p[f"{s}|{t}"]) for s in table for t in TASKS} for p in parts]
    detail = {"pooled": table, "differences": differences, "each_hashing": each, "epochs": EPOCHS}
    return finish("profiles", worst, "difference", TARGET, worst >= -0.01, detail)


if __name__ == "__main__":
    sys.exit(main())
