"""Ranking baselines on examples small enough to work out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.baselines import EASE, ItemKNN, Popularity, interactions_of
from mtrec_ray.evaluation.measure import Moments, System, measure
from mtrec_ray.schema import LogSchema
from mtrec_ray.training.feed import WindowCache


def matrix(*rows: list[float]) -> sp.csr_matrix:
    return sp.csr_matrix(np.array(rows, dtype=np.float32))


FOUR = matrix([1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 1])
"""Five users, four items."""


def cache_of(users: list[str], **lists: list[list[int]]) -> WindowCache:
    """Windows with the columns named; of the others, those that a test reads are zeros or empty."""
    n = len(users)
    columns: dict[str, Any] = {"user_id": users, "window": [0] * n, "profile_weight": [1.0] * n, "fold": [0] * n}
    for group in ("history_item", "target_item", "seen_item"):
        lists.setdefault(group, [[] for _ in users])
    lists.setdefault("target_positive", [[1] * len(t) for t in lists["target_item"]])
    lists["history_time"] = [[0] * len(h) for h in lists["history_item"]]
    lists["target_pos"] = [[len(h)] * len(t) for h, t in zip(lists["history_item"], lists["target_item"], strict=True)]
    return WindowCache.from_table(pa.table(columns | {n: pa.array(v, pa.list_(pa.int64())) for n, v in lists.items()}))


class Seeing:
    """Moments whose visible items are the rows of a matrix."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = matrix(*rows)

    def visible(self) -> sp.csr_matrix:
        return self.rows

    def __len__(self) -> int:
        return int(self.rows.shape[0])


# --------------------------------------------------------------------------- popularity


def test_popularity_orders_items_by_their_count_for_everyone() -> None:
    scores = Popularity(np.array([3, 7, 0, 5], dtype=np.float32)).scores(Seeing([0, 0, 0, 0], [0, 1, 0, 0]))
    assert np.argsort(-scores.numpy(), axis=1).tolist() == [[1, 3, 0, 2]] * 2
    assert scores.tolist() == [[3, 7, 0, 5]] * 2


def test_popularity_scores_can_be_masked_without_changing_the_counts() -> None:
    ranker = Popularity(np.array([3, 7], dtype=np.float32))
    ranker.scores(Seeing([0, 0], [0, 0]))[0, 1] = -np.inf
    assert ranker.scores(Seeing([0, 0])).tolist() == [[3, 7]]


# --------------------------------------------------------------------------- ItemKNN


def test_similarities_are_cosines_of_user_vectors() -> None:
    # item 0 has users 0 1 3 4, item 1 users 0 1 2, item 2 users 1 2 4, item 3 users 3 4
    expected = np.array(
        [
            [0, 2 / np.sqrt(12), 2 / np.sqrt(12), 2 / np.sqrt(8)],
            [2 / np.sqrt(12), 0, 2 / 3, 0],
            [2 / np.sqrt(12), 2 / 3, 0, 1 / np.sqrt(6)],
            [2 / np.sqrt(8), 0, 1 / np.sqrt(6), 0],
        ]
    )
    knn = ItemKNN(FOUR, 100)
    np.testing.assert_allclose(knn.similarity, expected, rtol=1e-6)
    np.testing.assert_allclose(knn.weights, expected, rtol=1e-6)


def test_an_item_keeps_its_best_neighbours_alone() -> None:
    # the nearest of item 0 is 3 (0.707), of 1 is 2 (0.667), of 2 is 1, of 3 is 0
    weights = ItemKNN(FOUR, 1).weights
    assert {(int(i), int(j)) for i, j in zip(*np.nonzero(weights), strict=True)} == {(3, 0), (2, 1), (1, 2), (0, 3)}
    # a second neighbour of 3 is 2 (0.408), though 3 is not among the two nearest of 2: 1 (0.667), 0 (0.577)
    weights = ItemKNN(FOUR, 2).weights
    assert weights[2, 3] == pytest.approx(1 / np.sqrt(6)) and weights[3, 2] == 0


def test_a_score_is_the_sum_of_similarities_to_the_history() -> None:
    scores = ItemKNN(FOUR, 100).scores(Seeing([0, 1, 0, 1], [0, 0, 0, 0]))
    expected = [2 / np.sqrt(12) + 2 / np.sqrt(8), 0, 2 / 3 + 1 / np.sqrt(6), 0]
    np.testing.assert_allclose(scores, [expected, [0] * 4], rtol=1e-6)


def test_an_item_that_nobody_had_is_like_no_other() -> None:
    knn = ItemKNN(matrix([1, 1, 0], [1, 0, 0]), 2)
    assert np.isfinite(knn.weights).all() and knn.weights[2].tolist() == [0, 0, 0] and knn.weights[:, 2].tolist() == [0, 0, 0]


# --------------------------------------------------------------------------- EASE


def by_optimisation(interactions: np.ndarray, regularisation: float) -> np.ndarray:
    """argmin ‖X - XB‖² + λ‖B‖² with a zero diagonal: each column is a ridge regression on the other items."""
    n = interactions.shape[1]
    out = np.zeros((n, n))
    for j in range(n):
        others = [i for i in range(n) if i != j]
        X = interactions[:, others].astype(np.float64)
        stacked = np.vstack([X, np.sqrt(regularisation) * np.eye(n - 1)])
        target = np.concatenate([interactions[:, j], np.zeros(n - 1)])
        out[others, j] = np.linalg.lstsq(stacked, target, rcond=None)[0]
    return out


@pytest.mark.parametrize("regularisation", [0.5, 3.0, 200.0])
def test_ease_is_the_minimum_of_its_problem(regularisation: float) -> None:
    expected = by_optimisation(FOUR.toarray(), regularisation)
    ease = EASE(FOUR, regularisation)
    np.testing.assert_allclose(ease.weights, expected, atol=1e-6)
    assert np.diag(ease.weights).tolist() == [0] * 4
    assert not np.allclose(expected, expected.T)  # so that rows and columns cannot be confused


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), regularisation=st.floats(0.1, 50))
def test_ease_is_the_minimum_for_any_log(seed: int, regularisation: float) -> None:
    rng = np.random.default_rng(seed)
    X = (rng.random((rng.integers(1, 12), rng.integers(2, 7))) < 0.5).astype(np.float32)
    np.testing.assert_allclose(EASE(sp.csr_matrix(X), regularisation).weights, by_optimisation(X, regularisation), atol=1e-5)


def test_ease_scores_a_history_by_the_weights_from_its_items() -> None:
    ease = EASE(FOUR, 1.0)
    scores = ease.scores(Seeing([1, 0, 1, 0]))
    np.testing.assert_allclose(scores, [ease.weights[0] + ease.weights[2]], rtol=1e-6)


# --------------------------------------------------------------------------- matrices


def test_interactions_are_the_training_positives_of_each_user_once() -> None:
    cache = cache_of(
        ["u", "w", "u"],
        target_item=[[0, 1, 1], [2], [3, 0]],
        target_positive=[[1, 0, 1], [0], [1, 1]],
    )
    found, users = interactions_of(cache, 5)
    assert users == ["u", "w"]
    assert found.toarray().tolist() == [[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]


def schema_of(n: int, exclude_seen: bool = False) -> LogSchema:
    facts: dict[str, Any] = {"window": 4, "same_time": "group", "protocol": "time", "actions": (), "labels": {}}
    return LogSchema(exclude_seen=exclude_seen, n_items=n, n_train_items=n, **facts)


def test_a_history_is_everything_visible_once() -> None:
    cache = cache_of(["u", "w", "x"], history_item=[[1, 1], [], [0]], seen_item=[[3, 1], [], [2, 2]])
    rows = [[0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 0]]
    assert Moments.of(schema_of(4), cache, np.arange(3)).visible().toarray().tolist() == rows
    assert Moments.of(schema_of(4), cache, np.array([2, 0])).visible().toarray().tolist() == [rows[2], rows[0]]


def test_the_last_item_of_each_history_is_known() -> None:
    cache = cache_of(["u", "w", "x"], history_item=[[1, 3], [], [0]])
    assert Moments.of(schema_of(4), cache, np.arange(3)).last.tolist() == [3, -1, 0]


# --------------------------------------------------------------------------- evaluation


def stub_predictor(n: int, exclude_seen: bool) -> Any:
    """As much of a predictor as the measuring of a baseline reads."""
    config = SimpleNamespace(tasks={})
    return SimpleNamespace(schema=schema_of(n, exclude_seen), config=config, popularity_N=torch.full((n,), 1 / n), trained_events=n)


def ranked(system: System, n: int, exclude_seen: bool, cache: WindowCache, batch: int = 512) -> dict[str, Any]:
    facts, answers = measure({"it": system}, stub_predictor(n, exclude_seen), cache, np.arange(len(cache)), batch)
    rank = answers["it"].rank
    assert rank is not None
    return m.ranking_metrics(facts.pair_moment, rank, len(facts))


def counts(*values: int) -> Popularity:
    return Popularity(np.array([*values, *[0] * 20], dtype=np.float32))


def test_a_baseline_ranks_with_the_seen_filter_of_the_data_set() -> None:
    cache = cache_of(["u"], history_item=[[0]], seen_item=[[1]], target_item=[[2]], target_positive=[[1]])
    assert ranked(counts(9, 8, 7), 23, True, cache)["mrr"].tolist() == [1]
    assert ranked(counts(9, 8, 7), 23, False, cache)["mrr"].tolist() == [1 / 3]


def test_a_baseline_is_judged_on_positives_alone() -> None:
    cache = cache_of(["u", "w"], target_item=[[0, 1], [0]], target_positive=[[0, 1], [0]])
    out = ranked(counts(9, 8), 22, False, cache)
    assert out["mrr"][0] == 1 / 2 and np.isnan(out["mrr"][1])


def test_measuring_in_small_pieces_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    users = [f"u{i}" for i in range(7)]
    items = [rng.integers(0, 30, rng.integers(1, 4)).tolist() for _ in users]
    cache = cache_of(users, history_item=[[i] for i in range(7)], target_item=items, target_positive=[[1] * len(t) for t in items])
    knn = ItemKNN(sp.csr_matrix((rng.random((20, 30)) < 0.4).astype(np.float32)), 5)
    whole, pieces = (ranked(knn, 30, True, cache, batch) for batch in (512, 2))
    for name, value in whole.items():
        np.testing.assert_array_equal(pieces[name], value)


def test_an_item_twice_in_one_moment_is_one_relevant_item() -> None:
    cache = cache_of(["u"], target_item=[[2, 2, 5]], target_positive=[[1, 1, 1]])
    out = ranked(counts(0, 0, 9), 23, False, cache)
    assert out["recall@10"].tolist() == [1 / 2]
    assert out["ndcg@10"] == pytest.approx([1 / (1 + 1 / np.log2(3))])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_baseline_gets_no_number(value: float) -> None:
    cache = cache_of(["u"], target_item=[[2]], target_positive=[[1]])
    with pytest.raises(m.BrokenScoresError, match="broken"):
        ranked(Popularity(np.array([1, value, 3], dtype=np.float32)), 3, False, cache)
