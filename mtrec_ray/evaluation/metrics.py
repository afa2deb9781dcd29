"""Metrics from per-moment and per-target records, so that everything is exact however it was computed.

Ranking (per moment, R relevant items with ranks r): Järvelin & Kekäläinen 2002 for NDCG with binary gains.
Averages are taken per user first, then over users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import metrics as sk

FloatArray = NDArray[np.float64]


def pessimistic_rank(score_BN: torch.Tensor, row: torch.Tensor, item: torch.Tensor) -> NDArray[np.int64]:
    """Rank (1 is best) of item[i] in row[i] of the scores; ties rank against the target.

    A target that is itself excluded (-inf) ranks behind every cut: it can never be hit.
    Raises ValueError when a score is NaN: a broken model must not look valid.
    """
    own = score_BN[row, item]
    if torch.isnan(score_BN).any():
        raise ValueError("scores contain NaN: the model is broken, no metric is computed")
    rank = (score_BN[row] >= own[:, None]).sum(1)
    return torch.where(torch.isneginf(own), EXCLUDED_RANK, rank).numpy()


EXCLUDED_RANK = 2**40
"""Rank of a target that may not be recommended."""

RANKING_CUTS = {"hr@10": 10, "recall@10": 10, "recall@20": 20, "ndcg@10": 10}


def relevant_items(
    row: NDArray[np.int64], item: NDArray[np.int64], positive: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(moment, item) of the positive targets; an item that occurs twice in a moment is one relevant item."""
    pairs = np.unique(np.stack([row[positive], item[positive]]), axis=1)
    return pairs[0], pairs[1]


def ranking_metrics(moment: NDArray[np.int64], rank: NDArray[np.int64], n_moments: int) -> dict[str, FloatArray]:
    """Ranks of the relevant items of each moment -> metric per moment (NaN for a moment without any).

    moment: which moment each rank belongs to.
    """
    relevant = np.bincount(moment, minlength=n_moments).astype(np.float64)
    none = relevant == 0
    out: dict[str, FloatArray] = {}
    for name, k in RANKING_CUTS.items():
        hit = rank <= k
        hits = np.bincount(moment, weights=hit, minlength=n_moments)
        if name.startswith("hr"):
            value = (hits > 0).astype(np.float64)
        elif name.startswith("recall"):
            value = hits / np.maximum(relevant, 1)
        else:
            gain = np.bincount(moment, weights=np.where(hit, 1 / np.log2(1.0 + rank), 0.0), minlength=n_moments)
            ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
            value = gain / ideal[np.clip(relevant.astype(int), 1, k) - 1]
        out[name] = np.where(none, np.nan, value)
    best = np.full(n_moments, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(best, moment, rank)
    out["mrr"] = np.where(none, np.nan, 1.0 / best)
    return out


def user_means(user: NDArray[np.int64], value: FloatArray) -> FloatArray:
    """Mean per user over the moments that have a value -> one number per user that has any."""
    valid = ~np.isnan(value)
    total = np.bincount(user[valid], weights=value[valid])
    count = np.bincount(user[valid])
    return total[count > 0] / count[count > 0]


def ranking_summary(user: NDArray[np.int64], per_moment: dict[str, FloatArray]) -> dict[str, float]:
    """Per user first, then over users; `n` is the number of users, `moments` of moments."""
    if not per_moment or np.isnan(per_moment["mrr"]).all():
        return {}
    out = {name: float(user_means(user, value).mean()) for name, value in per_moment.items()}
    valid = ~np.isnan(per_moment["mrr"])
    return out | {"n": float(len(np.unique(user[valid]))), "moments": float(valid.sum())}


@dataclass(frozen=True)
class Points:
    """Predictions of a pointwise task at targets that have the label."""

    label: FloatArray
    prediction: FloatArray


def regression_summary(p: Points) -> dict[str, float]:
    if not len(p.label):
        return {}
    error = p.prediction - p.label
    return {"rmse": float(np.sqrt(np.mean(error**2))), "mae": float(np.mean(np.abs(error))), "n": float(len(error))}


def binary_summary(p: Points) -> dict[str, float]:
    """AUC only where both classes occur."""
    if not len(p.label):
        return {}
    y = p.label.astype(int)
    out = {"logloss": float(sk.log_loss(y, np.clip(p.prediction, 1e-7, 1 - 1e-7), labels=[0, 1])), "n": float(len(y))}
    if 0 < y.sum() < len(y):
        out["auc"] = float(sk.roc_auc_score(y, p.prediction))
    return out


def class_summary(label: NDArray[np.int64], probability: FloatArray) -> dict[str, float]:
    """Accuracy, macro-F1 over all classes that occur; AUC for two classes."""
    if not len(label):
        return {}
    guess = probability.argmax(1)
    out = {
        "accuracy": float(sk.accuracy_score(label, guess)),
        "macro_f1": float(sk.f1_score(label, guess, average="macro", zero_division=0)),
        "n": float(len(label)),
    }
    if probability.shape[1] == 2 and len(np.unique(label)) == 2:
        out["auc"] = float(sk.roc_auc_score(label, probability[:, 1]))
    return out


def paired_bootstrap(a: FloatArray, b: FloatArray, resamples: int, seed: int) -> dict[str, float]:
    """Mean of a - b over users with a 95 % interval by resampling users (percentile; Efron & Tibshirani 1993)."""
    difference = a - b
    rng = np.random.default_rng(seed)
    means = np.array([difference[rng.integers(0, len(difference), len(difference))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [0.025, 0.975])
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high), "users": float(len(difference))}
