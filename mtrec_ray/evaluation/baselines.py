"""Baselines, fitted on the training part and given the same history at each moment as the model.

A ranking baseline turns the items of a history into a score for every item; masking, ranks and metrics are the
model's own code (`evaluate.py`, `metrics.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from mtrec_ray.config import BinaryTask, ProfileTask, RegressionTask
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.evaluate import moments_of
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.exact import mask_items, top_k
from mtrec_ray.training.feed import WindowCache

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class Ranker(Protocol):
    """What the evaluation needs of a ranking baseline."""

    def scores(self, history: sp.csr_matrix) -> NDArray[np.float32]:
        """Histories (moments × items, ones where visible) -> score of every item."""
        ...


@dataclass
class Popularity:
    """Items by their number of training events (all, or of the recent window)."""

    count: NDArray[np.float32]

    def scores(self, history: sp.csr_matrix) -> NDArray[np.float32]:
        return np.broadcast_to(self.count, (history.shape[0], len(self.count))).copy()


class ItemKNN:
    """Cosine between items' user vectors, the `k` best neighbours of each (Deshpande & Karypis 2004)."""

    def __init__(self, interactions: sp.csr_matrix, k: int) -> None:
        norm = np.sqrt(np.asarray(interactions.multiply(interactions).sum(0)).ravel())
        scaled = interactions @ sp.diags(1 / np.maximum(norm, 1e-12))
        similarity = (scaled.T @ scaled).toarray()
        np.fill_diagonal(similarity, 0)
        self.similarity = similarity.astype(np.float32)
        cut = np.partition(similarity, -min(k, len(similarity)), axis=0)[-min(k, len(similarity))]
        self.weights = np.where(similarity >= cut, similarity, 0).astype(np.float32)

    def scores(self, history: sp.csr_matrix) -> NDArray[np.float32]:
        return np.asarray(history @ self.weights, dtype=np.float32)


class EASE:
    """B = I - P / diag(P), P = (XᵀX + λI)⁻¹ (Steck 2019, arXiv 1905.03375, equation 8)."""

    def __init__(self, interactions: sp.csr_matrix, regularisation: float) -> None:
        gram = (interactions.T @ interactions).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += regularisation
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        self.weights = weights.astype(np.float32)

    def scores(self, history: sp.csr_matrix) -> NDArray[np.float32]:
        return np.asarray(history @ self.weights, dtype=np.float32)


GRIDS: dict[str, tuple[float, ...]] = {"itemknn": (20, 50, 100, 200, 500), "ease": (50, 100, 200, 500, 1000, 2000)}
"""Values tried on valid: the whole tuning budget of a baseline."""


def interactions_of(cache: WindowCache, n_items: int) -> sp.csr_matrix:
    """Training positives -> users × items, ones."""
    target, length = cache.gather("target", np.arange(len(cache)))
    positive = cache.columns["target_positive"][target].astype(bool)
    codes = cache.user_ids.dictionary_encode().indices.to_numpy()
    user = np.repeat(codes, length)[positive]
    item = cache.columns["target_item"][target][positive]
    matrix = sp.csr_matrix((np.ones(len(user), np.float32), (user, item)), shape=(int(codes.max(initial=-1)) + 1, n_items))
    matrix.data[:] = 1
    return matrix


def history_matrix(cache: WindowCache, index: IntArray, n_items: int) -> sp.csr_matrix:
    """All events visible at each moment (the window's history and what came before it) -> moments × items, ones."""
    parts = [cache.gather(group, index) for group in ("history", "seen")]
    row = np.concatenate([np.repeat(np.arange(len(index)), length) for _, length in parts])
    item = np.concatenate([cache.columns[f"{g}_item"][flat] for g, (flat, _) in zip(("history", "seen"), parts, strict=True)])
    matrix = sp.csr_matrix((np.ones(len(row), np.float32), (row, item)), shape=(len(index), n_items))
    matrix.data[:] = 1
    return matrix


def evaluate_ranker(ranker: Ranker, predictor: Predictor, cache: WindowCache, batch: int = 512) -> dict[str, FloatArray]:
    """Metrics per moment; the same masking and ranks as the model's."""
    pieces: list[dict[str, FloatArray]] = []
    for index in np.array_split(np.arange(len(cache)), max(1, -(-len(cache) // batch))):
        encoded, target, row, _ = moments_of(predictor, cache, index)
        score_BN = torch.from_numpy(ranker.scores(history_matrix(cache, index, predictor.schema.n_items)))
        score_BN = mask_items(score_BN, encoded.seen)
        positive = cache.columns["target_positive"][target].astype(bool)
        item = cache.columns["target_item"][target].astype(np.int64)
        relevant_row, relevant_item = m.relevant_items(row, item, positive)
        rank = m.pessimistic_rank(score_BN, torch.from_numpy(relevant_row), torch.from_numpy(relevant_item))
        pieces.append(m.ranking_metrics(relevant_row, rank, len(index)))
    return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}


def fit_rankers(
    names: tuple[str, ...], predictor: Predictor, count: FloatArray, recent: FloatArray, train: WindowCache, valid: WindowCache
) -> dict[str, tuple[Ranker, dict[str, float]]]:
    """Fit the named baselines, each tuned on valid NDCG@10 over its grid -> name: (ranker, what was chosen)."""
    matrix = interactions_of(train, predictor.schema.n_items)
    out: dict[str, tuple[Ranker, dict[str, float]]] = {}
    for name in names:
        if name == "popularity":
            out[name] = (Popularity(count.astype(np.float32)), {})
        elif name == "popularity_recent":
            out[name] = (Popularity((recent + count * 1e-6).astype(np.float32)), {})
        else:
            make = ItemKNN if name == "itemknn" else EASE
            tried: list[tuple[float, float, Ranker]] = []
            for value in GRIDS[name]:
                ranker = make(matrix, value)  # type: ignore[arg-type]
                tried.append((float(np.nanmean(evaluate_ranker(ranker, predictor, valid)["ndcg@10"])), value, ranker))
            best = max(tried, key=lambda t: t[0])
            out[name] = (best[2], {"k" if name == "itemknn" else "regularisation": best[1]})
    return out


def similar_items_hit(similarity: NDArray[np.float32], predictor: Predictor, cache: WindowCache) -> dict[str, float]:
    """hit@10 of co-occurrence neighbours of the last history item, seen items removed: ItemKNN on the similarity task."""
    encoded, target, row, last = moments_of(predictor, cache, np.arange(len(cache)))
    positive = cache.columns["target_positive"][target].astype(bool)
    usable = np.flatnonzero(last >= 0)
    if not len(usable):
        return {}
    banned = [np.union1d(encoded.seen[i], last[i]) for i in usable]
    found, _ = top_k(mask_items(torch.from_numpy(similarity[last[usable]].copy()), banned), 10)
    place = {int(u): i for i, u in enumerate(usable)}
    hits: dict[int, float] = {}
    items = found.numpy()
    for r, i in zip(row[positive], cache.columns["target_item"][target][positive], strict=True):
        if int(r) in place:
            hits[int(r)] = max(hits.get(int(r), 0.0), float(i in items[place[int(r)]]))
    return {"hit@10": float(np.mean(list(hits.values()))), "n": float(len(hits))}


def mean_baselines(predictor: Predictor, train: WindowCache, test: WindowCache) -> dict[str, dict[str, dict[str, float]]]:
    """item_mean and user_mean for pointwise tasks, majority for profiles."""
    out: dict[str, dict[str, dict[str, float]]] = {"item_mean": {}, "user_mean": {}, "majority": {}}
    t, t_length = train.gather("target", np.arange(len(train)))
    e, e_length = test.gather("target", np.arange(len(test)))
    codes = {u: i for i, u in enumerate(dict.fromkeys(train.user_ids.to_pylist()))}
    train_user = np.repeat([codes[u] for u in train.user_ids.to_pylist()], t_length)
    test_user = np.repeat([codes.get(u, -1) for u in test.user_ids.to_pylist()], e_length)
    train_item, test_item = train.columns["target_item"][t], test.columns["target_item"][e]
    for name, task in predictor.config.tasks.items():
        if isinstance(task, RegressionTask | BinaryTask):
            y = train.columns[f"label_{task.label}"][t].astype(np.float64)
            label = test.columns[f"label_{task.label}"][e].astype(np.float64)
            keep = ~np.isnan(label)
            for kind, known, wanted, size in (
                ("item_mean", train_item, test_item, predictor.schema.n_items),
                ("user_mean", train_user, test_user, len(codes)),
            ):
                points = m.Points(label[keep], _means(known, y, wanted, size)[keep])
                out[kind][name] = m.regression_summary(points) if task.kind == "regression" else m.binary_summary(points)
        elif isinstance(task, ProfileTask):
            out["majority"][name] = _majority(predictor, task, train, test)
    return out


def _means(known: IntArray, y: FloatArray, wanted: IntArray, size: int) -> FloatArray:
    valid = ~np.isnan(y)
    total = np.bincount(known[valid], weights=y[valid], minlength=size)
    count = np.bincount(known[valid], minlength=size)
    overall = float(y[valid].mean())
    mean = np.where(count > 0, total / np.maximum(count, 1), overall)
    return np.where(wanted >= 0, mean[np.maximum(wanted, 0)], overall)


def _majority(predictor: Predictor, task: ProfileTask, train: WindowCache, test: WindowCache) -> dict[str, float]:
    evaluation = predictor.config.evaluation
    masked = (*evaluation.profile_folds_test, evaluation.profile_fold_valid)
    column = f"profile_{task.attribute}"
    seen = train.columns[column][(~np.isin(train.columns["fold"], masked)) & (train.columns["window"] == 0)]
    classes = next(a.classes for a in predictor.schema.attributes if a.name == task.attribute)
    share = np.bincount(seen[seen >= 0], minlength=len(classes)).astype(np.float64)
    judged = np.isin(test.columns["fold"], evaluation.profile_folds_test) & (test.columns[column] >= 0)
    _, first = np.unique(np.array(test.user_ids.to_pylist(), dtype=object)[judged], return_index=True)
    label = test.columns[column][judged][first].astype(np.int64)
    return m.class_summary(label, np.tile(share / max(share.sum(), 1), (len(label), 1)))
