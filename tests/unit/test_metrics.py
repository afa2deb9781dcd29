"""Metrics by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from mtrec_ray.evaluation import metrics as m

INF = float("inf")


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


# --------------------------------------------------------------------------- ranks


def test_the_best_score_has_rank_one() -> None:
    score = torch.tensor([[0.1, 0.9, 0.5], [3.0, 2.0, 1.0]])
    rank = m.pessimistic_rank(score, torch.tensor([0, 0, 0, 1]), torch.tensor([1, 2, 0, 2]))
    assert rank.tolist() == [1, 2, 3, 3]


def test_a_tie_counts_against_the_target() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 0.0, 2.0]])
    rows = torch.zeros(3, dtype=torch.int64)
    assert m.pessimistic_rank(score, rows, torch.tensor([0, 2, 3])).tolist() == [4, 4, 5]


def test_a_model_that_scores_all_items_alike_ranks_every_target_last() -> None:
    assert m.pessimistic_rank(torch.zeros(1, 50), torch.tensor([0]), torch.tensor([0])).tolist() == [50]


def test_excluded_items_do_not_stand_before_a_target() -> None:
    score = torch.tensor([[-INF, -3.0, -INF, -2.0]])
    assert m.pessimistic_rank(score, torch.tensor([0, 0]), torch.tensor([3, 1])).tolist() == [1, 2]


def test_an_excluded_target_ranks_behind_the_whole_catalogue() -> None:
    score = torch.full((1, 30), -INF)
    score[0, 0] = 1.0
    rank = m.pessimistic_rank(score, torch.tensor([0]), torch.tensor([7]))
    assert rank.tolist() == [m.EXCLUDED_RANK]
    per_moment = m.ranking_metrics(ints(0), rank, 1)
    assert all(per_moment[name][0] == 0 for name in (*m.RANKING_CUTS, "ndcg"))


@pytest.mark.parametrize("name", list(m.RANKING_CUTS))
def test_an_excluded_target_is_never_a_hit_in_a_small_catalogue_either(name: str) -> None:
    score = torch.tensor([[-INF, 1.0, 2.0]])
    rank = m.pessimistic_rank(score, torch.tensor([0]), torch.tensor([0]))
    assert m.ranking_metrics(ints(0), rank, 1)[name].tolist() == [0.0]


@pytest.mark.parametrize("place", [0, 1])
def test_a_score_that_is_not_a_number_raises(place: int) -> None:
    score = torch.tensor([[0.5, 0.4, 0.3]])
    score[0, place] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        m.pessimistic_rank(score, torch.tensor([0]), torch.tensor([0]))


@settings(max_examples=100, deadline=None)
@given(score=st.lists(st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0]), min_size=1, max_size=12), data=st.data())
def test_ranks_are_those_of_counting(score: list[float], data: st.DataObject) -> None:
    item = data.draw(st.integers(0, len(score) - 1))
    rank = m.pessimistic_rank(torch.tensor([score]), torch.tensor([0]), torch.tensor([item]))
    expected = m.EXCLUDED_RANK if score[item] == -INF else 1 + sum(s >= score[item] for i, s in enumerate(score) if i != item)
    assert rank.tolist() == [expected]


# --------------------------------------------------------------------------- ranking metrics


def test_one_relevant_item_by_hand() -> None:
    out = m.ranking_metrics(ints(0, 1, 2, 3), ints(1, 3, 11, 21), 4)
    assert out["hr@10"].tolist() == [1, 1, 0, 0]
    assert out["recall@10"].tolist() == [1, 1, 0, 0]
    assert out["recall@20"].tolist() == [1, 1, 1, 0]
    assert out["ndcg@10"].tolist() == [1, 0.5, 0, 0]
    assert out["mrr"] == pytest.approx([1, 1 / 3, 1 / 11, 1 / 21])


def test_several_relevant_items_by_hand() -> None:
    out = m.ranking_metrics(ints(0, 0, 0), ints(12, 2, 30), 1)
    assert out["hr@10"].tolist() == [1]
    assert out["recall@10"] == pytest.approx([1 / 3])
    assert out["recall@20"] == pytest.approx([2 / 3])
    assert out["ndcg@10"] == pytest.approx([(1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / 2)])
    assert out["mrr"] == pytest.approx([1 / 2])


def test_the_rank_at_the_cut_is_still_a_hit() -> None:
    out = m.ranking_metrics(ints(0, 1), ints(10, 11), 2)
    assert out["hr@10"].tolist() == [1, 0]
    assert out["ndcg@10"] == pytest.approx([1 / math.log2(11), 0])


def test_more_relevant_items_than_the_cut_can_still_be_perfect() -> None:
    out = m.ranking_metrics(np.zeros(15, np.int64), np.arange(1, 16), 1)
    assert out["ndcg@10"] == pytest.approx([1.0])
    assert out["recall@10"] == pytest.approx([10 / 15])


def test_moments_may_come_in_any_order() -> None:
    straight = m.ranking_metrics(ints(0, 0, 1), ints(4, 1, 9), 2)
    mixed = m.ranking_metrics(ints(1, 0, 0), ints(9, 1, 4), 2)
    for name, value in straight.items():
        np.testing.assert_allclose(mixed[name], value)


def test_a_moment_without_a_relevant_item_has_no_number() -> None:
    out = m.ranking_metrics(ints(1), ints(1), 3)
    for name, value in out.items():
        assert np.isnan(value).tolist() == [True, False, True] and value[1] == (0.1 if name == "precision@10" else 1)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 40), data=st.data())
def test_ndcg_is_that_of_scikit_learn(n: int, data: st.DataObject) -> None:
    relevant = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    score = np.array(data.draw(st.permutations(range(n))), dtype=np.float64)
    truth = np.isin(np.arange(n), list(relevant)).astype(float)
    items = torch.tensor(sorted(relevant))
    rank = m.pessimistic_rank(torch.from_numpy(score[None]), torch.zeros_like(items), items)
    out = m.ranking_metrics(np.zeros(len(rank), np.int64), rank, 1)
    assert out["ndcg@10"][0] == pytest.approx(ndcg_score(truth[None], score[None], k=10), abs=1e-12)
    assert out["ndcg"][0] == pytest.approx(ndcg_score(truth[None], score[None]), abs=1e-12)
    best = np.argsort(-score)
    assert out["recall@10"][0] == pytest.approx(truth[best[:10]].sum() / truth.sum())
    assert out["hr@10"][0] == truth[best[:10]].any()
    assert out["mrr"][0] == pytest.approx(1 / (1 + np.flatnonzero(truth[best])[0]))


def test_means_of_users_leave_out_moments_without_a_number() -> None:
    user, value = ints(0, 0, 2, 0, 3), floats(1, 0.5, 0.25, np.nan, np.nan)
    np.testing.assert_array_equal(m.per_user(user, value, 4), [0.75, np.nan, 0.25, np.nan])


moments = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(ranks=moments)
def test_ranking_metrics_are_those_of_torchmetrics(ranks: list[list[int]]) -> None:
    from torchmetrics.functional import retrieval as tm

    moment = np.repeat(np.arange(len(ranks)), [len(r) for r in ranks])
    out = m.ranking_metrics(moment, np.concatenate([np.array(r) for r in ranks]), len(ranks))
    for i, mine in enumerate(ranks):
        target = torch.zeros(50, dtype=torch.bool)
        target[[r - 1 for r in mine]] = True
        score = torch.arange(50, 0, -1, dtype=torch.float32)
        expected = {
            "hr@10": tm.retrieval_hit_rate(score, target, top_k=10),
            "recall@10": tm.retrieval_recall(score, target, top_k=10),
            "recall@20": tm.retrieval_recall(score, target, top_k=20),
            "recall@100": tm.retrieval_recall(score, target, top_k=50),  # the list has 50 items
            "precision@10": tm.retrieval_precision(score, target, top_k=10),
            "ndcg@10": tm.retrieval_normalized_dcg(score, target, top_k=10),
            "ndcg": tm.retrieval_normalized_dcg(score, target),
            "mrr": tm.retrieval_reciprocal_rank(score, target),
            "map": tm.retrieval_average_precision(score, target),
        }
        assert {n: out[n][i] for n in m.RANKING} == pytest.approx({n: float(v) for n, v in expected.items()}, abs=1e-6)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), values=st.integers(2, 6))
def test_auc_within_users_is_that_of_scikit_learn(seed: int, values: int) -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    user, label = rng.integers(0, 5, 40), rng.random(40) < 0.4
    prediction = rng.integers(0, values, 40) / values  # many ties
    out = m.user_auc(user, label, prediction, 6)
    for u in range(6):
        mine = user == u
        if 0 < label[mine].sum() < mine.sum():
            assert out[u] == pytest.approx(roc_auc_score(label[mine], prediction[mine]))
        else:
            assert np.isnan(out[u])


def test_lists_by_hand() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    share = np.array([0.5, 0.25, 0.125, 0.125])
    top = np.array([[0, 1, -1], [0, 2, 3], [3, -1, -1], [-1, -1, -1]])
    out = m.list_metrics(top, vectors, share, floats(0.25, np.nan, 0.5, 0.5))
    # self-information: 1, 2, 3, 3 bits; cosines of the second list: 1, -1, -1
    np.testing.assert_allclose(out["novelty@10"], [1.5, 7 / 3, 3, np.nan])
    np.testing.assert_allclose(out["diversity@10"], [1, 1 + 1 / 3, np.nan, np.nan])
    np.testing.assert_allclose(out["popularity_lift@10"], [0.375 / 0.25 - 1, np.nan, 0.125 / 0.5 - 1, np.nan])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_list_metrics_are_those_of_plain_loops(seed: int) -> None:
    from itertools import combinations

    from scipy.spatial.distance import cosine

    rng = np.random.default_rng(seed)
    n, rows = 12, 4
    vectors = torch.nn.functional.normalize(torch.from_numpy(rng.normal(size=(n, 3))), dim=-1)
    share = rng.dirichlet(np.ones(n))
    top = np.array([[*rng.permutation(n)[:k], *[-1] * (6 - k)] for k in rng.integers(0, 7, rows)])
    history = rng.random(rows)
    out = m.list_metrics(top, vectors, share, history)
    exposure = np.zeros(n)
    for b in range(rows):
        items = [int(i) for i in top[b] if i >= 0]
        exposure[items] += 1
        assert np.isnan(out["novelty@10"][b]) == (not items) and np.isnan(out["diversity@10"][b]) == (len(items) < 2)
        if items:
            assert out["novelty@10"][b] == pytest.approx(np.mean([-math.log2(share[i]) for i in items]))
            assert out["popularity_lift@10"][b] == pytest.approx(np.mean([share[i] for i in items]) / history[b] - 1)
        if len(items) > 1:
            pairs = [cosine(vectors[i].numpy(), vectors[j].numpy()) for i, j in combinations(items, 2)]
            assert out["diversity@10"][b] == pytest.approx(np.mean(pairs), abs=1e-6)
    if exposure.any():  # half the relative mean absolute difference
        differences = np.abs(exposure[:, None] - exposure[None, :]).mean()
        assert m.gini(exposure) == pytest.approx(differences / (2 * exposure.mean()))


def test_gini_is_zero_for_equal_exposure_and_large_for_one_item() -> None:
    assert m.gini(floats(3, 3, 3, 3)) == pytest.approx(0)
    assert m.gini(floats(0, 0, 0, 8)) == pytest.approx(3 / 4)
    assert m.gini(floats(1, 3)) == pytest.approx(1 / 4)
    assert np.isnan(m.gini(floats(0, 0)))


def test_numbers_that_are_none_are_refused() -> None:
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(m.BrokenScoresError, match="scores contain NaN or infinity"):
            m.check_finite(torch.tensor([1.0, value]), "scores")
    m.check_finite(torch.full((3,), 3e38), "scores")  # the sum overflows, the numbers are numbers
