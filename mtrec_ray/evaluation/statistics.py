"""Mergeable statistics: everything that an evaluation keeps is a sum or a list of scored labels.

Parts of a split (whole users each) are measured anywhere and merged in the order of the parts, so a metric does not
depend on how many blocks or ranks were at work. The bootstrap over users is a mergeable statistic too: resample b
counts user u w(u, b) ~ Poisson(1) times, drawn from a hash of (user, b, seed) (the Poisson bootstrap of Chamandy et
al. 2012, "Estimating uncertainty for massive data streams"). Two runs with the same seed draw the same weights, so
the difference of their resamples is the paired bootstrap.

R stands for 1 + resamples; row 0 is the data as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mtrec_ray.hashing import GOLDEN, mix

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
HashArray = NDArray[np.uint64]

MIN_USERS = 10
"""A metric of fewer users has no resamples: their spread would say too little, and with one user nothing at all."""
_POISSON = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])


def user_hash(user_ids: NDArray[np.object_]) -> HashArray:
    """SipHash of each id: names a user in the bootstrap."""
    return pd.util.hash_array(np.asarray(user_ids, dtype=object), hash_key="mtrec_bootstrap!", categorize=False)


@dataclass(frozen=True)
class Resampler:
    """Bootstrap weights of users."""

    resamples: int = 0
    seed: int = 0

    def weights(self, users: HashArray) -> NDArray[np.float32]:
        """Hashes of U users -> weight_UR; column 0 is 1."""
        out = np.ones((len(users), 1 + self.resamples), np.float32)
        with np.errstate(over="ignore"):
            stream = mix(np.arange(1, 1 + self.resamples, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(self.seed))
        for start in range(0, len(users), 1024):
            block = users[start : start + 1024]
            uniform = (mix(block[:, None] ^ stream[None, :]) >> np.uint64(11)).astype(np.float64) / 2**53
            out[start : start + 1024, 1:] = np.searchsorted(_POISSON, uniform, side="right")
        return out


@dataclass
class Scores:
    """Labels of a pointwise task with their predictions, kept for what needs the order of all (AUC)."""

    label: NDArray[np.bool_]
    prediction: FloatArray
    user: HashArray

    @staticmethod
    def join(parts: list[Scores]) -> Scores:
        return Scores(
            np.concatenate([s.label for s in parts]),
            np.concatenate([s.prediction for s in parts]),
            np.concatenate([s.user for s in parts]),
        )

    def auc(self, resampler: Resampler) -> FloatArray:
        """Area under the ROC curve per resample, ties count one half (Hanley & McNeil 1982) -> (R,).

        NaN where a class is missing.
        """
        if len(np.unique(self.user)) < MIN_USERS:
            resampler = Resampler()
        R = 1 + resampler.resamples
        if not len(self.label) or self.label.all() or not self.label.any():
            return np.full(R, np.nan)
        order = np.argsort(self.prediction, kind="stable")
        label, prediction = self.label[order], self.prediction[order]
        starts = np.flatnonzero(np.concatenate([[True], prediction[1:] != prediction[:-1]]))
        names, place = np.unique(self.user[order], return_inverse=True)
        positive, negative = label.astype(np.float64)[:, None], (~label).astype(np.float64)[:, None]
        out = np.full(R, np.nan)
        weights = resampler.weights(names)
        columns = max(1, 4_000_000 // len(label))
        for begin in range(0, R, columns):
            w = weights[place, begin : begin + columns].astype(np.float64)
            up = np.add.reduceat(w * positive, starts)
            down = np.add.reduceat(w * negative, starts)
            below = np.cumsum(down, axis=0) - down
            pairs = up.sum(0) * down.sum(0)
            won = (up * (below + 0.5 * down)).sum(0)
            out[begin : begin + columns] = np.divide(won, pairs, out=np.full_like(won, np.nan), where=pairs > 0)
        return out


@dataclass
class Statistics:
    """Sums by name (first axis R where they are resampled) and scored labels by name."""

    sums: dict[str, FloatArray] = field(default_factory=dict)
    scores: dict[str, Scores] = field(default_factory=dict)

    @staticmethod
    def merge(parts: list[Statistics]) -> Statistics:
        """Add the sums, join the scores, in the order given."""
        out = Statistics()
        for part in parts:
            for name, value in part.sums.items():
                out.sums[name] = out.sums[name] + value if name in out.sums else value
        for name in dict.fromkeys(n for p in parts for n in p.scores):
            out.scores[name] = Scores.join([p.scores[name] for p in parts if name in p.scores])
        return out

    def add_means(self, weight_UR: FloatArray, table: dict[str, tuple[FloatArray, FloatArray]]) -> None:
        """Means as (Σ w·total, Σ w·count, Σ w over users counted) per resample, merged by addition, never a mean of means.

        table: name -> (total_U, count_U) per user.
        """
        if not table:
            return
        columns_UF = np.concatenate([np.stack((*pair, pair[1] > 0), axis=1) for pair in table.values()], axis=1)
        live = columns_UF.any(1)
        sums_RF = weight_UR[live].T @ columns_UF[live]
        for i, name in enumerate(table):
            self.sums[name] = sums_RF[:, 3 * i : 3 * i + 3]

    def counted(self, name: str) -> bool:
        """Whether a mean is over anything."""
        return name in self.sums and bool(self.sums[name][0, 1] > 0)

    def mean(self, name: str) -> FloatArray:
        """(R,); NaN where nothing was counted, (1,) where fewer than MIN_USERS users were."""
        total, count, users = self.sums[name].T
        if users[0] < MIN_USERS:
            total, count = total[:1], count[:1]
        return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def class_sums(
    name: str, label: IntArray, guess: IntArray, n_classes: int, unit: IntArray, weight_UR: FloatArray
) -> dict[str, FloatArray]:
    """One class guessed of each judged thing -> `NAME/confusion` (label × guess), `NAME/classes` and `NAME/units`, for
    `class_metrics`.

    unit: what the bootstrap draws that each thing belongs to, among U.
    """
    confusion = np.zeros((n_classes, n_classes))
    np.add.at(confusion, (label, guess), 1)
    margins_3UC = np.zeros((3, len(weight_UR), n_classes))  # right, labelled, guessed per class: all that F1 needs
    right = label == guess
    np.add.at(margins_3UC[0], (unit[right], guess[right]), 1)
    np.add.at(margins_3UC[1], (unit, label), 1)
    np.add.at(margins_3UC[2], (unit, guess), 1)
    classes = np.tensordot(weight_UR, margins_3UC, (0, 1))
    return {f"{name}/confusion": confusion, f"{name}/classes": classes, f"{name}/units": np.array([float(len(np.unique(unit)))])}


def class_metrics(statistics: Statistics, name: str) -> dict[str, FloatArray]:
    """What `class_sums` counted, merged -> accuracy, and F1 averaged over the classes that occur as label or guess; of fewer
    than MIN_USERS units, without resamples, however many things they are."""
    margins_R3C = statistics.sums[f"{name}/classes"]
    if statistics.sums[f"{name}/units"][0] < MIN_USERS:
        margins_R3C = margins_R3C[:1]
    right, both, total = margins_R3C[:, 0], margins_R3C[:, 1:].sum(1), margins_R3C[:, 1].sum(1)
    f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
    occurring = (both > 0).sum(1)
    nan = np.full(len(total), np.nan)
    return {
        "accuracy": np.divide(right.sum(1), total, out=nan.copy(), where=total > 0),
        "macro_f1": np.divide(f1.sum(1), occurring, out=nan.copy(), where=occurring > 0),
        "n": total[:1],
    }


def interval(values_R: FloatArray, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of the resamples (Efron & Tibshirani 1993); None where there are too few to say."""
    resampled = values_R[1:]
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) < 20:
        return None
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
