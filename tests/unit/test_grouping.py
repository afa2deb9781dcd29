"""Which tasks to train together, from hand-made gains."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray.multitask.grouping import MAX_TASKS, Partition, affinities, best_partitions, recommend

ABCD = ("a", "b", "c", "d")


def additive(affinity_TT: np.ndarray, groups: list[str]) -> dict[frozenset[str], dict[str, float]]:
    """Gains of groups such as "abc" that are exactly the sums of affinities."""
    out = {}
    for group in groups:
        inside = [ABCD.index(t) for t in group]
        out[frozenset(group)] = {ABCD[t]: float(sum(affinity_TT[s, t] for s in inside if s != t)) for t in inside}
    return out


def two_camps() -> np.ndarray:
    """a and b help each other, c and d too; across they harm."""
    camp = np.array([0, 0, 1, 1])
    affinity_TT = np.where(camp[:, None] == camp[None, :], 0.04, -0.03)
    np.fill_diagonal(affinity_TT, 0)
    return affinity_TT


def all_partitions(items: tuple[str, ...]) -> Iterator[list[list[str]]]:
    if not items:
        yield []
        return
    for rest in all_partitions(items[1:]):
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]
        yield [[items[0]], *rest]


def test_affinities_are_recovered_from_all_together_and_all_but_one() -> None:
    truth_TT = np.random.default_rng(0).normal(0, 0.05, (4, 4))
    np.fill_diagonal(truth_TT, 0)
    measured = additive(truth_TT, ["abcd", "bcd", "acd", "abd", "abc"])
    np.testing.assert_allclose(affinities(ABCD, measured), truth_TT, atol=1e-12)


def test_an_affinity_has_a_direction() -> None:
    measured = {frozenset("ab"): {"a": 0.1, "b": -0.2}}
    assert affinities(("a", "b"), measured).tolist() == [[0, pytest.approx(-0.2)], [pytest.approx(0.1), 0]]


def test_a_task_without_any_gain_has_no_affinity() -> None:
    assert affinities(("a", "b"), {frozenset("ab"): {"a": 0.1}}).tolist() == [[0, 0], [pytest.approx(0.1), 0]]


def test_two_camps_become_two_models() -> None:
    measured = additive(two_camps(), ["abcd", "bcd", "acd", "abd", "abc"])
    partitions = best_partitions(ABCD, affinities(ABCD, measured), measured)
    assert [len(p.groups) for p in partitions] == [1, 2, 3, 4]
    assert partitions[1].groups == (("a", "b"), ("c", "d")) and partitions[1].mean_gain == pytest.approx(0.04)
    assert partitions[0].mean_gain == pytest.approx(0.04 - 2 * 0.03) and partitions[0].measured and not partitions[1].measured
    assert partitions[3].mean_gain == 0 and partitions[3].measured
    assert recommend(partitions) == partitions[1]


def test_tasks_that_all_help_each_other_stay_together() -> None:
    affinity_TT = np.full((4, 4), 0.01) - 0.01 * np.eye(4)
    measured = additive(affinity_TT, ["abcd", "abc"])
    assert recommend(best_partitions(ABCD, affinity_TT, measured)).groups == (ABCD,)


def test_tasks_that_all_harm_each_other_get_a_model_each() -> None:
    affinity_TT = 0.02 * np.eye(4) - 0.02
    assert len(recommend(best_partitions(ABCD, affinity_TT, {})).groups) == 4


def test_what_was_trained_counts_more_than_what_is_predicted() -> None:
    measured = additive(two_camps(), ["abcd"]) | {frozenset("ac"): {"a": 0.3, "c": 0.3}}
    found = best_partitions(ABCD, two_camps(), measured)[1]
    assert ("a", "c") in found.groups and found.mean_gain == pytest.approx((0.6 - 2 * 0.03) / 4)


def test_a_further_model_must_be_worth_its_trunk_pass() -> None:
    one, two, four = (Partition((ABCD,) * n, gain, True) for n, gain in ((1, 0.020), (2, 0.0249), (4, 0.01)))
    assert recommend([one, two, four], 0.005) is one and recommend([one, two, four], 0.004) is two


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), tasks=st.integers(2, 6))
def test_the_search_finds_what_trying_every_partition_finds(seed: int, tasks: int) -> None:
    names = tuple("abcdef"[:tasks])
    affinity_TT = np.random.default_rng(seed).normal(0, 1, (tasks, tasks))

    def value(groups: list[list[str]]) -> float:
        inside = [[names.index(t) for t in g] for g in groups]
        return float(sum(affinity_TT[s, t] for g in inside for t in g for s in g if s != t)) / tasks

    np.fill_diagonal(affinity_TT, 0)
    expected: dict[int, float] = {}
    for groups in all_partitions(names):
        expected[len(groups)] = max(expected.get(len(groups), -np.inf), value(groups))
    found = best_partitions(names, affinity_TT, {})
    assert {len(p.groups): p.mean_gain for p in found} == pytest.approx(expected)
    for p in found:
        assert sorted(t for g in p.groups for t in g) == list(names)


def test_more_tasks_than_the_search_can_take_are_refused() -> None:
    with pytest.raises(ValueError, match="13 tasks"):
        best_partitions([str(i) for i in range(MAX_TASKS + 1)], np.zeros((13, 13)), {})
