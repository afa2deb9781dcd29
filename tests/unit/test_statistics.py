"""Merged statistics: the same numbers as independent implementations on all data at once, however they were cut."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from torchmetrics.functional.classification import binary_calibration_error

from mtrec_ray.config import BinaryTask, ProfileTask, RegressionTask, RetrievalTask, SimilarityTask
from mtrec_ray.evaluation import statistics as statistics_module
from mtrec_ray.evaluation.evaluate import compare_with_baselines, difference, intervals_of, unmeasured
from mtrec_ray.evaluation.measure import Answers, Facts
from mtrec_ray.evaluation.reduce import WHOLE, Reducer, Slice, Summary, points_of, slices_of, summarise, whole
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics, class_metrics, class_sums, interval, user_hash
from mtrec_ray.schema import AttributeSpec

N = 30
TASKS: dict[str, Any] = {
    "retrieval": RetrievalTask(kind="retrieval"),
    "like": BinaryTask(kind="binary", label="like"),
    "rating": RegressionTask(kind="regression", label="rating"),
    "similar": SimilarityTask(kind="similarity"),
    "taste": ProfileTask(kind="profile", attribute="taste"),
    "size": ProfileTask(kind="profile", attribute="size"),
}


def predictor_of(trained: int = N) -> Any:
    """As much of a predictor as reducing reads."""
    count = torch.arange(N, 0, -1, dtype=torch.float32)
    count[trained:] = 0
    vectors = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
    attributes = (AttributeSpec(name="taste", classes=("odd", "even")), AttributeSpec(name="size", classes=("s", "m", "l")))
    schema = SimpleNamespace(n_items=N, n_train_items=trained, attributes=attributes, sensitive=())
    return SimpleNamespace(
        config=SimpleNamespace(tasks=TASKS), schema=schema, retrieval_name="retrieval", popularity_N=count / count.sum(),
        trained_events=int(count.sum()), item_vec_ND=vectors,
    )  # fmt: skip


def random_case(seed: int, users: int, decimals: int = 2) -> tuple[Facts, Answers]:
    """Answers about moments of some users: 1 to 3 moments each, with 0 to 3 targets each; coarse predictions, so ties."""
    rng = np.random.default_rng(seed)
    user = np.repeat([f"u{i}" for i in range(users)], rng.integers(1, 4, users)).astype(object)
    B = len(user)
    moment = np.repeat(np.arange(B), rng.integers(0, 4, B))
    T = len(moment)
    item = rng.integers(0, N, T)
    positive = rng.random(T) < 0.6
    pairs = np.unique(np.stack([moment[positive], item[positive]]), axis=1)
    taste = np.array([hash_of % 3 - 1 for hash_of in (user_hash(user) % np.uint64(3)).astype(int)])
    facts = Facts(
        user=user, visible=rng.integers(0, 120, B), history_share=np.full(B, 0.05),
        fold=(user_hash(user) % np.uint64(4)).astype(np.int64),
        pair_moment=pairs[0], pair_item=pairs[1], point_moment=moment, point_item=item,
        labels={
            "like": np.where(rng.random(T) < 0.2, np.nan, rng.random(T) < 0.4),
            "rating": np.where(rng.random(T) < 0.2, np.nan, rng.integers(1, 6, T)).astype(float),
        },
        attributes={"taste": taste, "size": (user_hash(user) % np.uint64(5)).astype(np.int64) - 2},
    )  # fmt: skip
    size = rng.random((B, 3))
    answers = Answers(
        moments=np.ones(B, np.int64),
        rank=rng.integers(1, 31, len(pairs[0])),
        top=np.array([rng.permutation(N)[:10] for _ in range(B)]).reshape(B, 10),
        hit=np.where(rng.random(B) < 0.3, np.nan, rng.random(B) < 0.5),
        predictions={"like": np.round(rng.random(T), decimals), "rating": rng.normal(3, 1, T)},
        profiles={"taste": np.stack([size[:, 0], 1 - size[:, 0]], 1), "size": size / size.sum(1, keepdims=True)},
    )
    return facts, answers


def take(facts: Facts, answers: Answers, keep: np.ndarray) -> tuple[Facts, Answers]:
    """Some moments alone."""
    place = np.cumsum(keep) - 1
    pair, point = keep[facts.pair_moment], keep[facts.point_moment]
    f = Facts(
        facts.user[keep], facts.visible[keep], facts.history_share[keep], facts.fold[keep],
        place[facts.pair_moment[pair]], facts.pair_item[pair], place[facts.point_moment[point]], facts.point_item[point],
        {n: v[point] for n, v in facts.labels.items()}, {n: v[keep] for n, v in facts.attributes.items()},
    )  # fmt: skip
    assert answers.rank is not None and answers.top is not None and answers.hit is not None
    a = Answers(
        answers.moments[keep], answers.rank[pair], None, answers.top[keep], answers.hit[keep],
        {n: v[point] for n, v in answers.predictions.items()}, {n: v[keep] for n, v in answers.profiles.items()},
    )  # fmt: skip
    return f, a


def statistics_of(facts: Facts, answers: Answers, resampler: Resampler, part: Slice | None = None) -> Statistics:
    reducer = Reducer(predictor_of(), resampler, folds=(0, 1))
    return reducer(facts, answers, {WHOLE: part or whole(facts)}).get(WHOLE, Statistics())


def judge(facts: Facts, answers: Answers, resampler: Resampler | None = None, part: Slice | None = None) -> Summary:
    resampler = resampler or Resampler()
    return summarise(statistics_of(facts, answers, resampler, part), TASKS, resampler)


# --------------------------------------------------------------------------- against scikit-learn and torchmetrics


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 12), decimals=st.sampled_from([1, 8]))
def test_pointwise_metrics_are_those_of_scikit_learn(seed: int, users: int, decimals: int) -> None:
    facts, answers = random_case(seed, users, decimals)
    found = points_of(judge(facts, answers))
    y, p = facts.labels["rating"], answers.predictions["rating"]
    keep = ~np.isnan(y)
    if keep.any():
        assert found["rating"] == pytest.approx({
            "rmse": sk.root_mean_squared_error(y[keep], p[keep]), "mae": sk.mean_absolute_error(y[keep], p[keep]), "n": keep.sum()
        })  # fmt: skip
    y, p = facts.labels["like"], answers.predictions["like"]
    keep = ~np.isnan(y)
    y, p = y[keep].astype(int), np.clip(p[keep], 1e-7, 1 - 1e-7)
    if not len(y):
        assert found["like"] == {}
        return
    expected = {"logloss": sk.log_loss(y, p, labels=[0, 1]), "n": len(y)}
    rate = y.mean()
    if 0 < rate < 1:
        expected["auc"] = sk.roc_auc_score(y, p)
        expected["normalised_entropy"] = expected["logloss"] / sk.log_loss(y, np.full(len(y), rate))
    clear = np.abs(p * 15 - np.round(p * 15)) > 1e-6  # at a bin's very edge rounding decides
    if clear.all():
        expected["ece"] = float(binary_calibration_error(torch.tensor(p), torch.tensor(y), n_bins=15))
    within = {n: v for n, v in found["like"].items() if n != "user_auc" and (n != "ece" or clear.all())}
    assert within == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 25))
def test_profile_metrics_are_those_of_scikit_learn_on_each_judged_users_last_moment(seed: int, users: int) -> None:
    facts, answers = random_case(seed, users)
    found = points_of(judge(facts, answers))
    for name in ("taste", "size"):
        last: dict[str, int] = {}
        for b, user in enumerate(facts.user):
            if facts.fold[b] in (0, 1) and facts.attributes[name][b] >= 0:
                last[user] = b
        rows = list(last.values())
        if not rows:
            assert found[name] == {}
            continue
        y, probability = facts.attributes[name][rows], answers.profiles[name][rows]
        expected = {
            "accuracy": sk.accuracy_score(y, probability.argmax(1)),
            "macro_f1": sk.f1_score(y, probability.argmax(1), average="macro", zero_division=0),
            "n": len(rows),
        }
        if name == "taste" and len(set(y)) == 2:
            expected["auc"] = sk.roc_auc_score(y, probability[:, 1])
        assert found[name] == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(2, 12))
def test_ranking_averages_per_user_first(seed: int, users: int) -> None:
    facts, answers = random_case(seed, users)
    assert answers.rank is not None
    per_user: dict[str, list[float]] = {}
    for b, user in enumerate(facts.user):
        ranks = answers.rank[facts.pair_moment == b]
        if len(ranks):
            per_user.setdefault(user, []).append(1 / ranks.min())
    found = judge(facts, answers)["retrieval"]
    if per_user:
        assert found["mrr"][0] == pytest.approx(np.mean([np.mean(v) for v in per_user.values()]))
        assert found["n"][0] == len(per_user) and found["moments"][0] == sum(map(len, per_user.values()))
        assert found["final_mrr"][0] == found["mrr"][0]  # no other final order
    shown = np.bincount(answers.top.ravel(), minlength=N)  # type: ignore[union-attr]
    assert not per_user or found["coverage@10"][0] == (shown > 0).mean()


# --------------------------------------------------------------------------- merging


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), users=st.integers(3, 15), parts=st.integers(2, 5))
def test_a_split_cut_by_users_gives_the_numbers_of_the_whole(seed: int, users: int, parts: int) -> None:
    facts, answers = random_case(seed, users)
    resampler = Resampler(25, 3)
    part_of = (user_hash(facts.user) >> np.uint64(20)) % np.uint64(parts)
    cut = [statistics_of(*take(facts, answers, part_of == i), resampler) for i in range(parts) if (part_of == i).any()]
    merged = summarise(Statistics.merge(cut), TASKS, resampler)
    at_once = judge(facts, answers, resampler)
    for task, found in at_once.items():
        assert set(found) == set(merged[task])
        for name, values in found.items():
            np.testing.assert_allclose(merged[task][name], values, rtol=1e-9, atol=1e-12, err_msg=f"{task}/{name}")


def test_merging_the_same_parts_in_the_same_order_is_equal_to_the_last_bit() -> None:
    facts, answers = random_case(1, 20)
    resampler = Resampler(50)
    part_of = user_hash(facts.user) % np.uint64(4)

    def run() -> Summary:
        parts = [statistics_of(*take(facts, answers, part_of == i), resampler) for i in range(4)]
        return summarise(Statistics.merge(parts), TASKS, resampler)

    first, second = run(), run()
    assert all(np.array_equal(first[t][n], second[t][n], equal_nan=True) for t in first for n in first[t])


# --------------------------------------------------------------------------- bootstrap


def test_resampled_rows_are_the_metric_of_users_counted_that_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row b of every metric is what a log would give in which user u stands w(u, b) times."""
    monkeypatch.setattr(statistics_module, "MIN_USERS", 1)
    facts, answers = random_case(5, 10)
    resampler = Resampler(6, seed=2)
    found = judge(facts, answers, resampler)
    weights = dict(zip(facts.user, resampler.weights(user_hash(facts.user)), strict=True))
    for b in range(1, 7):
        again, replies = [], []
        for user, weight in weights.items():
            for copy in range(int(weight[b])):
                f, a = take(facts, answers, facts.user == user)
                f.user = np.array([f"{user} {copy}"] * len(f), dtype=object)
                again.append(f)
                replies.append(a)
        expected = judge(Facts.join(again), Answers.join(replies))
        for task, name in (("retrieval", "ndcg@10"), ("rating", "rmse"), ("like", "auc"), ("like", "ece"), ("like", "logloss"),
                           ("like", "user_auc"), ("similar", "hit@10"), ("taste", "accuracy"), ("size", "macro_f1")):  # fmt: skip
            if name in expected[task]:
                assert found[task][name][b] == pytest.approx(expected[task][name][0]), (task, name, b)


def test_weights_are_poisson_of_user_and_resample_alone() -> None:
    users = user_hash(np.array([f"u{i}" for i in range(3000)], dtype=object))
    weights = Resampler(200, 7).weights(users)
    assert weights[:, 0].tolist() == [1] * 3000
    drawn = weights[:, 1:]
    assert drawn.mean() == pytest.approx(1, abs=0.01) and drawn.var() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]) < 0.06 and abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.25
    np.testing.assert_array_equal(Resampler(200, 7).weights(users[5:9]), weights[5:9])
    np.testing.assert_array_equal(Resampler(50, 7).weights(users), weights[:, :51])
    assert not np.array_equal(Resampler(200, 8).weights(users), weights)


def test_the_interval_is_about_two_standard_errors_wide() -> None:
    value = np.random.default_rng(1).normal(0, 1, 500)
    weights = Resampler(2000).weights(user_hash(np.array([f"u{i}" for i in range(500)], dtype=object))).astype(float)
    statistics = Statistics()
    statistics.add_means(weights, {"x": (value, np.ones(500))})
    found = interval(statistics.mean("x"))
    assert found is not None
    assert found[1] - found[0] == pytest.approx(2 * 1.96 * value.std() / np.sqrt(500), rel=0.08)


def test_differences_are_paired_by_user() -> None:
    facts, answers = random_case(3, 40)
    assert answers.rank is not None
    better = Answers(answers.moments, np.maximum(answers.rank - 3, 1), None, answers.top, answers.hit)
    resampler = Resampler(300)
    a, b = judge(facts, better, resampler)["retrieval"]["mrr"], judge(facts, answers, resampler)["retrieval"]["mrr"]
    found = difference(a, b)
    own = interval(a)
    assert own is not None and found["low"] is not None and found["high"] is not None
    assert found["low"] > 0 and found["high"] - found["low"] < own[1] - own[0]
    nothing = difference(a, a)
    assert (nothing["difference"], nothing["low"], nothing["high"]) == (0, 0, 0)


def test_one_user_alone_has_numbers_and_no_interval() -> None:
    facts, answers = random_case(11, 1)
    found = judge(facts, answers, Resampler(100))
    assert all(not ranges for ranges in intervals_of(found).values())
    assert any(found.values()) and all(len(v) == 1 for task in found.values() for v in task.values())
    assert difference(np.zeros(1), np.zeros(1))["low"] is None


def test_a_metric_of_few_users_has_no_interval_however_many_others_there_are() -> None:
    facts, answers = random_case(12, 40)
    few = np.isin(facts.user[facts.point_moment], ["u0", "u1", "u2"])
    facts.labels["like"] = np.where(few, 1.0 * (np.arange(len(few)) % 2), np.nan)
    found = judge(facts, answers, Resampler(100))
    assert 0 < len(set(facts.user[facts.point_moment][few])) < statistics_module.MIN_USERS
    assert all(len(v) == 1 for v in found["like"].values()) and {"auc", "logloss", "ece"} <= set(found["like"])
    assert intervals_of(found)["like"] == {} and "rmse" in intervals_of(found)["rating"]
    assert len(found["rating"]["rmse"]) == 101


def test_without_resamples_there_is_no_interval_and_no_comparison() -> None:
    found = judge(*random_case(2, 9))
    assert all(not ranges for ranges in intervals_of(found).values())
    assert compare_with_baselines({"model": found, "other": found}, "retrieval", 0) == {}


def test_the_comparison_is_with_the_best_ranking_baseline() -> None:
    facts, answers = random_case(4, 30)
    assert answers.rank is not None
    resampler = Resampler(100)
    systems = {"model": 1, "good": 4, "bad": 20}
    summaries = {n: judge(facts, Answers(answers.moments, answers.rank + worse), resampler) for n, worse in systems.items()}
    found = compare_with_baselines(summaries | {"mute": judge(facts, Answers(answers.moments), resampler)}, "retrieval", 100)
    assert found["baseline"] == "good" and found["low"] < found["difference"] < found["high"]


# --------------------------------------------------------------------------- nothing to measure


@pytest.mark.filterwarnings("error")
def test_a_task_without_labels_gets_no_number_and_a_reason() -> None:
    facts, answers = random_case(6, 8)
    facts.labels = {n: np.full_like(v, np.nan) for n, v in facts.labels.items()}
    facts.attributes = {n: np.full_like(v, -1) for n, v in facts.attributes.items()}
    facts.pair_moment = facts.pair_item = answers.rank = np.zeros(0, np.int64)
    answers.hit = np.full(len(facts), np.nan)
    found = judge(facts, answers, Resampler(20))
    assert points_of(found) == {n: {} for n in TASKS}
    said = unmeasured(found, TASKS)
    assert set(said) == set(TASKS) and "no positive target" in said["retrieval"] and "label" in said["rating"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_single_class_has_a_logloss_but_no_auc_and_no_normalised_entropy(label: float) -> None:
    facts, answers = random_case(8, 6)
    facts.labels["like"] = np.full_like(facts.labels["like"], label)
    found = points_of(judge(facts, answers))["like"]
    assert set(found) == {"logloss", "ece", "n"}
    assert np.isnan(Scores(np.array([True]), np.array([0.3]), np.zeros(1, np.uint64)).auc(Resampler(3))).all()


def test_a_certain_and_wrong_prediction_costs_much_but_is_finite() -> None:
    facts, answers = random_case(8, 6)
    facts.labels["like"] = np.ones_like(facts.labels["like"])
    answers.predictions["like"] = np.zeros_like(answers.predictions["like"])
    assert points_of(judge(facts, answers))["like"]["logloss"] == pytest.approx(-np.log(1e-7), rel=1e-3)


# --------------------------------------------------------------------------- slices


def test_slices_part_the_moments_and_targets() -> None:
    facts, _ = random_case(9, 30)
    found = slices_of(predictor_of(trained=25), facts, {f"u{i}" for i in range(0, 30, 2)})
    history = [s for n, s in found.items() if n.startswith("history=")]
    assert len(history) == 5 and (sum(s.moment.astype(int) for s in history) == 1).all()
    by_item = [s for n, s in found.items() if n.startswith("popularity_decile=") or n == "cold_item"]
    assert len(by_item) == 11
    assert (sum(s.pair.astype(int) for s in by_item) == 1).all() and (sum(s.point.astype(int) for s in by_item) == 1).all()
    assert (found["cold_user"].moment ^ found["warm_user"].moment).all()
    assert facts.pair_item[found["cold_item"].pair].min(initial=99) >= 25
    assert facts.pair_item[found["popularity_decile=1"].pair].max(initial=0) <= 2  # item 0 is the most popular
    assert (found["taste=even"].moment == (facts.attributes["taste"] == 1)).all()


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_slice_is_judged_as_if_the_rest_were_not_there(seed: int) -> None:
    facts, answers = random_case(seed, 12)
    for name, part in slices_of(predictor_of(), facts, set()).items():
        if name == WHOLE or part.by_item or not part.moment.any():
            continue
        inside, alone = (
            {t: {n: v[0] for n, v in found.items() if n not in ("coverage@10", "gini@10")} for t, found in summary.items()}
            for summary in (judge(facts, answers, part=part), judge(*take(facts, answers, part.moment)))
        )
        for task, expected in alone.items():
            assert inside[task] == pytest.approx(expected), (name, task)


def test_a_slice_by_item_judges_its_own_targets_alone() -> None:
    facts, answers = random_case(10, 15)
    assert answers.rank is not None
    part = slices_of(predictor_of(), facts, set())["popularity_decile=3"]
    found = judge(facts, answers, part=part)["retrieval"]
    best: dict[tuple[str, int], int] = {}
    for moment, item, rank in zip(facts.pair_moment, facts.pair_item, answers.rank, strict=True):
        if 6 <= item < 9:
            key = (facts.user[moment], int(moment))
            best[key] = min(best.get(key, 99), int(rank))
    users: dict[str, list[float]] = {}
    for (user, _), rank in best.items():
        users.setdefault(user, []).append(1 / rank)
    assert found["mrr"][0] == pytest.approx(np.mean([np.mean(v) for v in users.values()]))
    assert "novelty@10" not in found


@pytest.mark.parametrize(("users", "resampled"), [(3, False), (10, True)])
def test_classes_told_of_few_users_have_no_interval_however_many_events_they_have(users: int, resampled: bool) -> None:
    user = np.repeat(np.arange(users), 40)
    label, guess = user % 2, np.arange(len(user)) % 2
    weight_UR = Resampler(50).weights(user_hash(np.array([f"u{i}" for i in range(users)], dtype=object))).astype(np.float64)
    halves = [Statistics(class_sums("t", label[k], guess[k], 2, user[k], weight_UR)) for k in (user < 2, user >= 2)]
    found = class_metrics(Statistics.merge(halves), "t")
    assert (len(found["accuracy"]) == 51) == resampled and found["accuracy"][0] == 0.5 and found["n"] == [len(user)]
    assert (interval(found["accuracy"]) is not None) == (len(found["macro_f1"]) == 51) == resampled
