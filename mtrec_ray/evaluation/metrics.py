"""Metrics of single moments, users and lists. What is merged over a split is in `statistics.py`.

Ranking (per moment, R relevant items with ranks r): NDCG with binary gains (Järvelin & Kekäläinen 2002), average
precision over the whole list (Buckley & Voorhees 2000). Averages are taken per user first, then over users.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mtrec_ray.retrieval.exact import count_where

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LIST = 10
"""Length of the lists behind coverage, novelty, diversity, Gini and popularity lift."""
EXCLUDED_RANK = 2**40
"""Rank of a target that may not be recommended."""
RANKING_CUTS = {"hr@10": 10, "recall@10": 10, "recall@20": 20, "recall@100": 100, "precision@10": 10, "ndcg@10": 10}
RANKING = (*RANKING_CUTS, "ndcg", "mrr", "map")
LISTS = ("novelty@10", "diversity@10", "popularity_lift@10")
LOWER_IS_BETTER = frozenset({"rmse", "mae", "logloss", "normalised_entropy", "ece", "gini@10", "popularity_lift@10", "kl"})
"""Metrics whose smaller value is the better one."""
BINS = 15
"""Equal-width bins of the reliability curve."""


class BrokenScoresError(ValueError):
    """Scores that are not numbers: a broken model must not look valid."""


def check_finite(values: torch.Tensor | FloatArray, what: str) -> None:
    """Raises BrokenScoresError when a value is NaN or infinite."""
    total = values.sum()  # one pass without a mask as large as the values; exact sums do not matter here
    if not bool(np.isfinite(float(total))) and not bool(np.isfinite(np.asarray(values)).all()):
        raise BrokenScoresError(f"{what} contain NaN or infinity: the model is broken, no metric is computed")


def pessimistic_rank(score_BN: torch.Tensor, row: torch.Tensor, item: torch.Tensor, checked: bool = False) -> IntArray:
    """Rank (1 is best) of item[i] in row[i] of the scores; ties rank against the target.

    row ascends. A target that is itself excluded (-inf) ranks behind every cut: it can never be hit.
    Raises BrokenScoresError when a score is NaN; checked says that there is none.
    """
    own = score_BN[row, item]
    if not checked and torch.isnan(score_BN.sum()) and torch.isnan(score_BN).any():
        raise BrokenScoresError("scores contain NaN: the model is broken, no metric is computed")
    rank = torch.zeros(len(row), dtype=torch.int64)
    if len(row):
        place = torch.arange(len(row)) - torch.searchsorted(row, row)  # 0 for the first target of a moment, 1 for the next ...
        for turn in range(int(place.max()) + 1):
            mine = torch.nonzero(place == turn).squeeze(1)
            whole = len(mine) == len(score_BN)  # then the rows need no copy
            scores = score_BN if whole else score_BN[row[mine]]
            rank[mine] = count_where(scores, own[mine], np.greater_equal)
    return torch.where(torch.isneginf(own), EXCLUDED_RANK, rank).numpy()


def relevant_items(row: IntArray, item: IntArray, positive: NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """(moment, item) of the positive targets; an item that occurs twice in a moment is one relevant item."""
    pairs = np.unique(np.stack([row[positive], item[positive]]), axis=1)
    return np.ascontiguousarray(pairs[0]), np.ascontiguousarray(pairs[1])


def ranking_metrics(moment: IntArray, rank: IntArray, n_moments: int) -> dict[str, FloatArray]:
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
        elif name.startswith("precision"):
            value = hits / k
        else:
            gain = np.bincount(moment, weights=np.where(hit, 1 / np.log2(1.0 + rank), 0.0), minlength=n_moments)
            ideal = np.cumsum(1 / np.log2(np.arange(2, k + 2)))
            value = gain / ideal[np.clip(relevant.astype(int), 1, k) - 1]
        out[name] = np.where(none, np.nan, value)
    # the whole list: an excluded target is not far down, it is not there
    gain = np.bincount(moment, weights=np.where(rank < EXCLUDED_RANK, 1 / np.log2(1.0 + rank), 0.0), minlength=n_moments)
    ideal = np.cumsum(1 / np.log2(np.arange(2, 3 + int(relevant.max(initial=0)))))
    out["ndcg"] = np.where(none, np.nan, gain / ideal[np.maximum(relevant.astype(int), 1) - 1])
    best = np.full(n_moments, np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(best, moment, rank)
    out["mrr"] = np.where(none, np.nan, 1.0 / best)
    order = np.lexsort((rank, moment))
    first = np.searchsorted(moment[order], moment[order], side="left")
    nth = np.arange(1, len(order) + 1) - first  # the how-manieth hit of its moment
    precision = np.bincount(moment[order], weights=nth / rank[order], minlength=n_moments)
    out["map"] = np.where(none, np.nan, precision / np.maximum(relevant, 1))
    return out


def per_user(user: IntArray, value: FloatArray, n_users: int) -> FloatArray:
    """Mean of each user over what has a value; NaN for a user without any."""
    valid = ~np.isnan(value)
    total = np.bincount(user[valid], weights=value[valid], minlength=n_users)
    count = np.bincount(user[valid], minlength=n_users)
    return np.divide(total, count, out=np.full(n_users, np.nan), where=count > 0)


def user_auc(user: IntArray, label: NDArray[np.bool_], prediction: FloatArray, n_users: int) -> FloatArray:
    """AUC within each user by mean ranks, ties count one half; NaN for a user without both classes."""
    order = np.lexsort((prediction, user))
    u, y, p = user[order], label[order], prediction[order]
    place = np.arange(len(u), dtype=np.float64)
    new = np.ones(len(u), bool)
    new[1:] = (u[1:] != u[:-1]) | (p[1:] != p[:-1])
    tie = np.cumsum(new) - 1
    mean_place = (np.bincount(tie, weights=place) / np.maximum(np.bincount(tie), 1))[tie] if len(u) else place
    rank = mean_place - np.searchsorted(u, u, side="left") + 1
    positives = np.bincount(u[y], minlength=n_users).astype(np.float64)
    negatives = np.bincount(u[~y], minlength=n_users).astype(np.float64)
    won = np.bincount(u[y], weights=rank[y], minlength=n_users) - positives * (positives + 1) / 2
    return np.divide(won, positives * negatives, out=np.full(n_users, np.nan), where=(positives > 0) & (negatives > 0))


def list_metrics(
    list_BK: IntArray, item_vec_ND: torch.Tensor, share_N: FloatArray, history_share_B: FloatArray
) -> dict[str, FloatArray]:
    """Properties of the top lists -> metric per moment (NaN for an empty list).

    list_BK: catalogue positions, negative where a list is shorter; item_vec_ND: unit vectors; share_N: each item's
    share of the training events; history_share_B: its mean over the moment's history (NaN without one).

    novelty: mean self-information, -log2 of the share (Zhou et al. 2010), one event added to every item;
    diversity: mean of 1 - cosine over all pairs (Ziegler et al. 2005);
    popularity_lift: how much more popular the list is than the history (Abdollahpouri et al. 2019), 0 is equal.
    """
    there = list_BK >= 0
    size = there.sum(1)
    item = np.maximum(list_BK, 0)

    def mean(values_N: FloatArray) -> FloatArray:
        total = np.where(there, values_N[item], 0.0).sum(1)
        return np.divide(total, size, out=np.full(len(item), np.nan), where=size > 0)

    vectors = item_vec_ND[torch.from_numpy(item)] * torch.from_numpy(there)[..., None]
    same = vectors.sum(1).square().sum(-1).double().numpy() - vectors.square().sum((1, 2)).double().numpy()
    pairs = size * (size - 1)
    diversity = 1 - np.divide(same, pairs, out=np.full(len(item), np.nan), where=pairs > 0)
    return {
        "novelty@10": mean(-np.log2(share_N)),
        "diversity@10": diversity,
        "popularity_lift@10": mean(share_N) / history_share_B - 1,
    }


def gini(exposure_N: FloatArray) -> float:
    """Gini coefficient of how often each item of the catalogue is shown: 0 equal, towards 1 few get all."""
    total, n = exposure_N.sum(), len(exposure_N)
    if not total:
        return float("nan")
    ascending = np.sort(exposure_N)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ascending / (n * total))
