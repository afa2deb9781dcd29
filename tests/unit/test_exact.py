"""Exact top-k against a sort by (score, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mtrec_ray.retrieval.exact import FEW, NONE, ExactIndex, mask_items, top_k

INF = float("inf")


def reference(score: np.ndarray, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Best k by descending score, ties by position; excluded items are none."""
    items, scores = [], []
    for row in score:
        order = np.lexsort((np.arange(len(row)), -row))[:k]
        items.append([int(i) if row[i] > -INF else NONE for i in order])
        scores.append([float(row[i]) for i in order])
    return items, scores


crowded = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 5), st.integers(1, 30)), elements=st.sampled_from([-INF, -1.0, 0.0, 1.0, 2.0])
)


@settings(max_examples=200, deadline=None)
@given(score=crowded, k=st.integers(1, 40))
def test_ties_go_by_position_as_in_a_full_sort(score: np.ndarray, k: int) -> None:
    item, found = top_k(torch.from_numpy(score.copy()), k)
    assert (item.tolist(), found.tolist()) == reference(score, k)
    assert item.dtype == torch.int64


@pytest.mark.parametrize("k", [1, 10, 999, 1000])
def test_a_large_catalogue_of_few_distinct_scores_is_sorted_like_a_small_one(k: int) -> None:
    score = np.random.default_rng(k).integers(0, 5, (8, 1000)).astype(np.float32)
    item, found = top_k(torch.from_numpy(score), k)
    assert (item.tolist(), found.tolist()) == reference(score, k)


def test_distinct_scores_by_hand() -> None:
    item, score = top_k(torch.tensor([[0.1, 0.9, 0.5], [3.0, -2.0, -1.0]]), 2)
    assert item.tolist() == [[1, 2], [0, 2]]
    assert score.tolist() == torch.tensor([[0.9, 0.5], [3.0, -1.0]]).tolist()


def test_a_k_beyond_the_catalogue_is_the_whole_catalogue() -> None:
    item, score = top_k(torch.tensor([[1.0, 3.0, 2.0]]), 10)
    assert item.tolist() == [[1, 2, 0]] and score.tolist() == [[3.0, 2.0, 1.0]]


def test_where_fewer_items_are_left_than_asked_for_stands_none() -> None:
    item, score = top_k(torch.tensor([[1.0, -INF, 2.0, -INF]]), 3)
    assert item.tolist() == [[2, 0, NONE]] and score.tolist() == [[2.0, 1.0, -INF]]


def test_with_all_items_excluded_there_is_none() -> None:
    item, score = top_k(torch.full((2, 4), -INF), 3)
    assert item.tolist() == [[NONE] * 3] * 2 and score.tolist() == [[-INF] * 3] * 2


def test_no_query_has_no_answer() -> None:
    item, score = top_k(torch.zeros(0, 4), 3)
    assert item.shape == score.shape == (0, 3)


def test_the_scores_are_left_as_they_were() -> None:
    score = torch.tensor([[1.0, 1.0, 1.0, 2.0]])
    before = score.clone()
    top_k(score, 2)
    assert torch.equal(score, before)


def test_excluded_items_are_masked_in_their_own_row() -> None:
    score = mask_items(torch.zeros(3, 4), [np.array([0, 3, 3]), np.array([], dtype=np.int64), np.array([1], dtype=np.int32)])
    assert torch.isneginf(score).tolist() == [[True, False, False, True], [False] * 4, [False, True, False, False]]


@pytest.mark.parametrize("exclude", [[], [np.array([])], [np.array([], dtype=np.int64)] * 2])
def test_nothing_to_exclude_changes_nothing(exclude: list[np.ndarray]) -> None:
    assert torch.equal(mask_items(torch.ones(2, 3), exclude), torch.ones(2, 3))


def test_the_index_searches_by_inner_product() -> None:
    index = ExactIndex(torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]]))
    assert len(index) == 3
    query = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    assert index.scores(query).tolist() == [[1.0, 0.0, 1.0], [1.0, 6.0, 4.0]]
    item, score = index.search(query, 2, [np.array([0]), np.array([], dtype=np.int64)])
    assert item.tolist() == [[2, 1], [1, 2]] and score.tolist() == [[1.0, 0.0], [6.0, 4.0]]


def test_the_index_fills_up_with_none_when_a_user_has_seen_almost_everything() -> None:
    index = ExactIndex(torch.eye(3))
    item, score = index.search(torch.tensor([[3.0, 2.0, 1.0]]), 3, [np.array([0, 2])])
    assert item.tolist() == [[1, NONE, NONE]] and score.tolist() == [[2.0, -INF, -INF]]


def test_a_search_leaves_nothing_excluded_for_the_next_one() -> None:
    index = ExactIndex(torch.eye(3))
    query = torch.tensor([[3.0, 2.0, 1.0]])
    index.search(query, 3, [np.array([0, 1, 2])])
    assert index.search(query, 3, [np.array([], dtype=np.int64)])[0].tolist() == [[0, 1, 2]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(4096, 9000),
    k=st.sampled_from([1, 10, 100, 300]),
    values=st.sampled_from([3, 60, 10**6]),
)
def test_wide_rows_give_what_a_stable_sort_gives(seed: int, n: int, k: int, values: int) -> None:
    """The way through blocks, with few and with many ties, and with excluded items."""
    rng = np.random.default_rng(seed)
    score = torch.from_numpy(rng.integers(0, values, (3, n)).astype(np.float32))
    score[:, rng.random(n) < 0.1] = float("-inf")
    score[2, 5:] = float("-inf")  # fewer candidates than asked for
    item_BK, score_BK = top_k(score, k)
    expected_score, expected_item = torch.sort(score, dim=1, descending=True, stable=True)
    assert torch.equal(score_BK, expected_score[:, :k])
    assert torch.equal(item_BK, torch.where(torch.isneginf(expected_score), NONE, expected_item)[:, :k])


def test_a_nan_leads_every_list_wide_or_narrow() -> None:
    for n in (50, 50_000):
        score = torch.randn(2, n)
        score[1, n // 2] = float("nan")
        assert torch.isnan(top_k(score, 10)[1]).any(1).tolist() == [False, True]


# ------------------------------------------------------------------ a large catalogue, searched by faiss


def spread(items: int, users: int, distinct: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers, so that scores are exact and, with few distinct vectors, often equal."""
    rng = np.random.default_rng(items)
    vectors = rng.integers(-4, 5, (distinct or items, 8)).astype(np.float32)
    if distinct:
        vectors = vectors[rng.integers(0, distinct, items)]
    return torch.from_numpy(vectors), torch.from_numpy(rng.integers(-4, 5, (users, 8)).astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [None, 2000, 3])
@pytest.mark.parametrize("excluded", [0, 5, 300, 1500, 8999])
def test_a_large_catalogue_is_searched_to_the_same_list(distinct: int | None, excluded: int) -> None:
    items, queries = spread(9000, 9, distinct)
    rng = np.random.default_rng(excluded)
    scores = queries @ items.T
    best = scores.argsort(1, descending=True).numpy()
    exclude = [np.sort(rng.permutation(best[b][: max(excluded, 1) * 2])[: excluded if b % 3 else 0]) for b in range(9)]
    index = ExactIndex(items)
    assert index.selects and len(queries) >= FEW
    for k in (1, 20, 200):
        expected = top_k(mask_items(scores.clone(), exclude), k)
        for rows in (slice(0, 9), slice(0, 2)):  # by faiss, and by a sort
            found = index.search(queries[rows], k, exclude[rows])
            assert torch.equal(found[0], expected[0][rows]) and torch.equal(found[1], expected[1][rows])


@pytest.mark.slow
def test_many_queries_are_searched_in_blocks_and_none_gives_none() -> None:
    items, queries = spread(8192, 1100)
    found = ExactIndex(items).search(queries, 7, [np.zeros(0, np.int64)] * 1100)
    assert torch.equal(found[0], top_k(queries @ items.T, 7)[0])
    assert ExactIndex(items).search(queries[:0], 7, [])[0].shape == (0, 7)
    assert ExactIndex(items).search(queries[:2], 0, [np.zeros(0, np.int64)] * 2)[0].shape == (2, 0)


def test_numbers_that_are_none_do_not_hide_in_a_large_catalogue() -> None:
    items, queries = spread(9000, 9)
    nothing = [np.zeros(0, np.int64)] * 9
    queries[1, 0] = float("nan")
    _, score = ExactIndex(items).search(queries, 3, nothing)
    assert score[0].isfinite().all() and score[1].isnan().all()
    items[17] = float("nan")
    index = ExactIndex(items)
    assert not index.selects and index.search(queries[:1], 3, nothing[:1])[0][0, 0] == 17
