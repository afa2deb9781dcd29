"""Ranking baselines, fitted on the training part and given the same history at each moment as the model.

Each turns the visible items of a moment into a score for every item; the seen filter, ranks and metrics are those of
the model (`measure.py`). The tuning budget of each is its grid, tried on valid NDCG@10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.measure import Moments, measure
from mtrec_ray.evaluation.system import Fitted, System
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.feed import WindowCache

__all__ = ["RANKERS", "Fitted", "ItemVectors", "fit_rankers"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

MAX_DENSE_ITEMS = 10_000
"""ItemKNN and EASE work on dense matrices of items by items (0.8 GB each at this size); beyond it they are skipped."""
MAX_TUNING_MOMENTS = 20_000
"""Valid moments that a baseline is tuned on, spread evenly."""


@dataclass
class Popularity(System):
    """Items by their number of training events (all, or of the recent window)."""

    count: NDArray[np.float32]

    def scores(self, moments: Moments) -> Tensor:
        return torch.from_numpy(np.broadcast_to(self.count, (len(moments), len(self.count))).copy())


class _ItemWeights(System):
    """Scores are the sum of the visible items' rows of an N × N matrix."""

    weights: NDArray[np.float32]

    def scores(self, moments: Moments) -> Tensor:
        return torch.from_numpy(np.asarray(moments.visible() @ self.weights, dtype=np.float32))


class ItemKNN(_ItemWeights):
    """Cosine between items' user vectors, the `k` best neighbours of each (Deshpande & Karypis 2004)."""

    def __init__(self, interactions: sp.csr_matrix, k: int) -> None:
        norm = np.sqrt(np.asarray(interactions.multiply(interactions).sum(0)).ravel())
        scaled = interactions @ sp.diags(1 / np.maximum(norm, 1e-12))
        similarity = (scaled.T @ scaled).toarray()
        np.fill_diagonal(similarity, 0)
        self.similarity = similarity.astype(np.float32)
        cut = np.partition(similarity, -min(k, len(similarity)), axis=0)[-min(k, len(similarity))]
        self.weights = np.where(similarity >= cut, similarity, 0).astype(np.float32)

    def similar(self, item_B: IntArray) -> Tensor:
        return torch.from_numpy(self.similarity[item_B])


class EASE(_ItemWeights):
    """B = I - P / diag(P), P = (XᵀX + λI)⁻¹ (Steck 2019, arXiv 1905.03375, equation 8)."""

    def __init__(self, interactions: sp.csr_matrix, regularisation: float) -> None:
        gram = (interactions.T @ interactions).toarray().astype(np.float64)
        gram[np.diag_indices_from(gram)] += regularisation
        inverse = np.linalg.inv(gram)
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0)
        self.weights = weights.astype(np.float32)


class IALS(System):
    """Implicit matrix factorisation (Hu, Koren & Volinsky 2008) by `implicit`; a moment's user vector is solved from
    its visible items."""

    def __init__(self, interactions: sp.csr_matrix, factors: int, regularisation: float, alpha: float, seed: int) -> None:
        from implicit.cpu.als import AlternatingLeastSquares

        with threadpool_limits(1, "blas"):  # implicit's own threads and BLAS's would fight
            self.model = AlternatingLeastSquares(
                factors=factors, regularization=regularisation, alpha=alpha, iterations=15, random_state=seed, num_threads=1
            )
            self.model.fit(interactions.astype(np.float32), show_progress=False)

    def scores(self, moments: Moments) -> Tensor:
        if not self.model.item_factors.flags.writeable:  # shared by Ray; implicit insists on arrays of its own
            self.model.item_factors = self.model.item_factors.copy()
        user = self.model.recalculate_user(np.arange(len(moments)), moments.visible())
        return torch.from_numpy(np.asarray(user @ self.model.item_factors.T, dtype=np.float32))


class BPR(System):
    """Matrix factorisation by Bayesian personalised ranking (Rendle et al. 2009) by `implicit`.

    It has no way to fold a history in: known users keep the vector that training gave them, others get the mean.
    """

    def __init__(
        self, interactions: sp.csr_matrix, user_ids: Iterable[str], factors: int, learning_rate: float, epochs: int, seed: int
    ) -> None:
        from implicit.cpu.bpr import BayesianPersonalizedRanking

        self.row = {u: i for i, u in enumerate(user_ids)}
        model = BayesianPersonalizedRanking(
            factors=factors, learning_rate=learning_rate, iterations=epochs, random_state=seed, num_threads=1
        )
        model.fit(interactions.astype(np.float32), show_progress=False)
        self.user, self.item = model.user_factors, model.item_factors

    def scores(self, moments: Moments) -> Tensor:
        rows = np.array([self.row.get(u, -1) for u in moments.user_ids], dtype=np.int64)
        user = np.where((rows >= 0)[:, None], self.user[np.maximum(rows, 0)], self.user.mean(0))
        return torch.from_numpy(np.asarray(user @ self.item.T, dtype=np.float32))


class ItemVectors(System):
    """The model's own item vectors without its trunk and heads: items are similar by cosine, and the score of an item is
    its cosine with the mean of the visible ones. With text it is a content baseline, the only one that knows new items."""

    def __init__(self, item_vec_ND: Tensor) -> None:
        self.unit_ND = torch.nn.functional.normalize(item_vec_ND, dim=-1)

    def scores(self, moments: Moments) -> Tensor:
        mean_BD = torch.from_numpy(np.asarray(moments.visible() @ self.unit_ND.numpy(), dtype=np.float32))
        return torch.nn.functional.normalize(mean_BD, dim=-1) @ self.unit_ND.T

    def similar(self, item_B: IntArray) -> Tensor:
        return self.unit_ND[torch.from_numpy(item_B)] @ self.unit_ND.T


def interactions_of(cache: WindowCache, n_items: int) -> tuple[sp.csr_matrix, list[str]]:
    """Training positives -> (users × items, ones; the users' ids)."""
    target, length = cache.gather("target", np.arange(len(cache)))
    positive = cache.columns["target_positive"][target].astype(bool)
    encoded = cache.user_ids.dictionary_encode()
    user = np.repeat(encoded.indices.to_numpy(), length)[positive]
    item = cache.columns["target_item"][target][positive]
    matrix = sp.csr_matrix((np.ones(len(user), np.float32), (user, item)), shape=(len(encoded.dictionary), n_items))
    matrix.data[:] = 1
    return matrix, encoded.dictionary.to_pylist()


GRIDS: dict[str, list[dict[str, Any]]] = {
    "itemknn": [{"k": k} for k in (20, 50, 100, 200, 500)],
    "ease": [{"regularisation": r} for r in (50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0)],
    "ials": [
        {"factors": f, "regularisation": r, "alpha": a} for f in (32, 64, 128) for r in (0.1, 10.0) for a in (1.0, 5.0)
    ],
    "bpr": [{"factors": f, "learning_rate": r, "epochs": e} for f in (32, 64) for r in (0.01, 0.05) for e in (100, 300)],
}  # fmt: skip
"""Values tried on valid: the whole tuning budget of a baseline."""

RANKERS = ("popularity", "popularity_recent", *GRIDS)


def valid_ndcg(system: System, predictor: Predictor, valid: WindowCache, batch: int) -> float:
    """NDCG@10 on valid, per user first."""
    index = np.unique(np.linspace(0, len(valid) - 1, min(len(valid), MAX_TUNING_MOMENTS)).astype(np.int64))
    facts, answers = measure({"it": system}, predictor, valid, index, batch, lists=False)
    rank = answers["it"].rank
    assert rank is not None
    found = m.ranking_metrics(facts.pair_moment, rank, len(facts))["ndcg@10"]
    ids, user = np.unique(facts.user, return_inverse=True)
    means = m.per_user(user, found, len(ids))
    return float(np.nanmean(means)) if (~np.isnan(means)).any() else float("nan")


def fit_rankers(
    names: tuple[str, ...],
    predictor: Predictor,
    catalogue: dict[str, FloatArray],
    train: WindowCache,
    valid: WindowCache,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[dict[str, Fitted], dict[str, str]]:
    """Fit the named ranking baselines -> (what was fitted, name -> why it was skipped).

    catalogue: `count` and `recent_count` of every item.
    """
    n, batch, seed = predictor.schema.n_items, predictor.config.evaluation.batch_windows, predictor.config.seed
    matrix, users = interactions_of(train, n)
    out: dict[str, Fitted] = {}
    skipped: dict[str, str] = {}
    make: dict[str, Callable[..., System]] = {
        "itemknn": lambda k: ItemKNN(matrix, k),
        "ease": lambda regularisation: EASE(matrix, regularisation),
        "ials": lambda **chosen: IALS(matrix, seed=seed, **chosen),
        "bpr": lambda **chosen: BPR(matrix, users, seed=seed, **chosen),
    }
    for name in names:
        count, recent = catalogue["count"], catalogue["recent_count"]
        if name == "popularity":
            out[name] = Fitted(Popularity(count.astype(np.float32)), {})
        elif name == "popularity_recent":
            out[name] = Fitted(Popularity((recent + count * 1e-6).astype(np.float32)), {})
        elif name in ("itemknn", "ease") and n > MAX_DENSE_ITEMS:
            skipped[name] = f"{n} items by {n} items do not fit memory; it is fitted up to {MAX_DENSE_ITEMS}"
        elif name in make:
            progress(f"tuning {name}: {len(GRIDS[name])} tries on valid")
            best: tuple[float, dict[str, Any], System] | None = None
            for chosen in GRIDS[name]:
                system = make[name](**chosen)
                value = valid_ndcg(system, predictor, valid, batch)
                if best is None or value > best[0]:  # only the best so far is kept
                    best = (value, chosen, system)
            assert best is not None
            if np.isnan(best[0]):
                skipped[name] = "valid has no positive target to tune it on"
            else:
                out[name] = Fitted(best[2], best[1], len(GRIDS[name]))
    return out, skipped
