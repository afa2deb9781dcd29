"""Metrics by hand, and against scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
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
    assert all(per_moment[name][0] == 0 for name in m.RANKING_CUTS)


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
    for value in out.values():
        assert np.isnan(value).tolist() == [True, False, True] and value[1] == 1


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
    best = np.argsort(-score)
    assert out["recall@10"][0] == pytest.approx(truth[best[:10]].sum() / truth.sum())
    assert out["hr@10"][0] == truth[best[:10]].any()
    assert out["mrr"][0] == pytest.approx(1 / (1 + np.flatnonzero(truth[best])[0]))


def test_metrics_average_per_user_first() -> None:
    # user 7 has three moments of value 1, user 2 one of value 0: the mean over users is 1/2, over moments 3/4
    user, value = ints(7, 7, 2, 7), floats(1, 1, 0, 1)
    assert sorted(m.user_means(user, value).tolist()) == [0, 1]
    out = m.ranking_summary(user, {"ndcg@10": value, "mrr": value})
    assert out == {"ndcg@10": 0.5, "mrr": 0.5, "n": 2, "moments": 4}


def test_a_moment_without_a_number_leaves_its_users_mean_alone() -> None:
    user, value = ints(0, 0, 1, 2), floats(1, np.nan, 0.5, np.nan)
    assert m.user_means(user, value).tolist() == [1, 0.5]
    assert m.ranking_summary(user, {"mrr": value}) == {"mrr": 0.75, "n": 2, "moments": 2}


@pytest.mark.filterwarnings("error")
def test_nothing_to_measure_gives_no_number() -> None:
    nothing = m.ranking_metrics(ints(), ints(), 0)
    assert m.ranking_summary(ints(), nothing) == {}
    assert m.ranking_summary(ints(0, 1), m.ranking_metrics(ints(), ints(), 2)) == {}
    assert m.ranking_summary(ints(), {}) == {}
    empty = m.Points(floats(), floats())
    assert m.regression_summary(empty) == {} and m.binary_summary(empty) == {}
    assert m.class_summary(ints(), np.zeros((0, 3))) == {}


# --------------------------------------------------------------------------- pointwise tasks and profiles


def test_errors_of_a_regression_by_hand() -> None:
    out = m.regression_summary(m.Points(floats(1, 2, 5), floats(2, 2, 2)))
    assert out == pytest.approx({"rmse": math.sqrt(10 / 3), "mae": 4 / 3, "n": 3})


def test_logloss_and_auc_by_hand() -> None:
    out = m.binary_summary(m.Points(floats(1, 0, 1, 0), floats(0.8, 0.6, 0.4, 0.2)))
    # of four (positive, negative) pairs three are in order
    assert out["auc"] == 0.75 and out["n"] == 4
    assert out["logloss"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.4) + math.log(0.8)) / 4)


def test_equal_predictions_have_an_auc_of_one_half() -> None:
    assert m.binary_summary(m.Points(floats(1, 0, 0), floats(0.3, 0.3, 0.3)))["auc"] == 0.5


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_there_is_no_auc_with_a_single_class(label: float) -> None:
    out = m.binary_summary(m.Points(floats(label, label), floats(0.5, 0.25)))
    assert set(out) == {"logloss", "n"} and out["n"] == 2
    p = [0.5, 0.25] if label else [0.5, 0.75]
    assert out["logloss"] == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2)


def test_a_certain_and_wrong_prediction_costs_much_but_is_finite() -> None:
    assert m.binary_summary(m.Points(floats(1), floats(0)))["logloss"] == pytest.approx(-math.log(1e-7), rel=1e-3)


def test_accuracy_and_macro_f1_by_hand() -> None:
    probability = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]])  # guesses 0, 1, 0, 1
    out = m.class_summary(ints(0, 1, 1, 1), probability)
    # class 0: precision 1/2, recall 1, F1 2/3; class 1: precision 1, recall 2/3, F1 4/5; class 2 does not occur
    assert out == pytest.approx({"accuracy": 3 / 4, "macro_f1": (2 / 3 + 4 / 5) / 2, "n": 4})


def test_a_class_that_is_never_guessed_counts_as_zero() -> None:
    out = m.class_summary(ints(0, 0, 0, 1), np.tile([0.9, 0.1], (4, 1)))
    assert out["accuracy"] == 0.75
    assert out["macro_f1"] == pytest.approx((6 / 7 + 0) / 2)


def test_profiles_have_an_auc_with_two_classes_alone() -> None:
    two = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]])
    assert m.class_summary(ints(0, 1, 0), two)["auc"] == 1.0
    assert m.class_summary(ints(1, 0, 0), two)["auc"] == 0.0
    assert "auc" not in m.class_summary(ints(1, 1, 1), two)
    assert "auc" not in m.class_summary(ints(0, 1, 0), np.column_stack([two * 0.9, np.full(3, 0.1)]))


# --------------------------------------------------------------------------- bootstrap


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(5, 60))
def test_the_interval_contains_the_mean_difference(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(n), rng.random(n)
    assume(np.ptp(a - b) > 0)
    out = m.paired_bootstrap(a, b, 200, seed)
    assert out["low"] < out["difference"] < out["high"]
    assert out["difference"] == pytest.approx(a.mean() - b.mean())
    assert out["users"] == n


def test_no_difference_has_an_interval_of_zero() -> None:
    a = np.random.default_rng(0).random(20)
    assert m.paired_bootstrap(a, a, 50, 0) == {"difference": 0, "low": 0, "high": 0, "users": 20}


def test_users_are_compared_in_pairs() -> None:
    a = floats(0.1, 0.5, 0.9)
    out = m.paired_bootstrap(a + 0.1, a, 50, 0)  # each user gains the same, so there is nothing to doubt
    assert [out["low"], out["difference"], out["high"]] == pytest.approx([0.1, 0.1, 0.1])


def test_the_interval_is_about_two_standard_errors_wide() -> None:
    difference = np.random.default_rng(1).normal(0, 1, 400)
    out = m.paired_bootstrap(difference, np.zeros(400), 2000, 0)
    assert out["high"] - out["low"] == pytest.approx(2 * 1.96 * difference.std() / 20, rel=0.08)


def test_the_bootstrap_depends_on_its_seed_alone() -> None:
    a, b = np.random.default_rng(2).random((2, 30))
    np.random.seed(0)
    first = m.paired_bootstrap(a, b, 100, 1)
    np.random.seed(1)
    assert m.paired_bootstrap(a, b, 100, 1) == first
    assert m.paired_bootstrap(a, b, 100, 2)["low"] != first["low"]
