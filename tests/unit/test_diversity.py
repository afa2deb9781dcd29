"""Maximal marginal relevance and caps, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mtrec_ray.diversity import choose
from mtrec_ray.histories import History
from mtrec_ray.predictor import FilterError
from tests.conftest import TinyRun

SCORE = np.array([1.0, 0.9, 0.5, 0.0], np.float32)
# the second is the first once more, the third stands across, the fourth is the opposite
UNIT = np.array([[1, 0], [1, 0], [0, 1], [-1, 0]], np.float32)


@pytest.mark.parametrize(
    ("diversity", "order"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.2, [0, 1, 2, 3]),  # second: 0.8 * 0.9 - 0.2 = 0.52, third: 0.4
        (0.5, [0, 3, 2, 1]),  # second -0.05, third 0.25, fourth 0.5; then third 0.25 (0 like the fourth)
        (1.0, [0, 3, 2, 1]),
    ],
)
def test_what_is_like_one_before_it_comes_later(diversity: float, order: list[int]) -> None:
    assert choose(SCORE, UNIT, 4, diversity).tolist() == order
    assert choose(SCORE, UNIT, 2, diversity).tolist() == order[:2]


def test_a_cap_counts_every_value_that_an_item_has() -> None:
    codes = {"genre": np.array([[2, 3], [2, 0], [3, 0], [0, 0]])}
    assert choose(SCORE, UNIT, 4, 0.0, codes, {"genre": 1}).tolist() == [0, 3]  # what has no value is never capped
    assert choose(SCORE, UNIT, 4, 0.0, codes, {"genre": 2}).tolist() == [0, 1, 2, 3]
    assert choose(SCORE, UNIT, 1, 0.0, codes, {"genre": 1}).tolist() == [0]


def test_equal_scores_and_nothing_at_all() -> None:
    assert choose(np.ones(3, np.float32), UNIT[:3], 2).tolist() == [0, 1]
    assert choose(SCORE[:0], UNIT[:0], 3, 0.5).tolist() == []


def test_the_predictor_diversifies_its_candidates_and_leaves_numbers_as_they_are(tiny_run: TinyRun) -> None:
    predictor = tiny_run.predictor
    encoded = predictor.encode_histories([History(["i1", "i2"], [0, 1000], {"click": [1, 1]}), History()])
    ranked = predictor.rank(encoded, 21, predictor.encode_context([{}, {}]))
    plain = predictor.diversify(ranked, 5, 0.0, {})
    assert plain.item_BK.tolist() == ranked.item_BK[:, :5].tolist() and plain.score_BK.tolist() == ranked.score_BK[:, :5].tolist()
    spread = predictor.diversify(ranked, 5, 0.7, {})
    assert spread.item_BK[0, 0] == ranked.item_BK[0, 0] and spread.item_BK.tolist() != plain.item_BK.tolist()
    before = dict(zip(ranked.item_BK[0].tolist(), ranked.score_BK[0].tolist(), strict=True))
    assert all(before[i] == s for i, s in zip(spread.item_BK[0].tolist(), spread.score_BK[0].tolist(), strict=True))
    with pytest.raises(FilterError, match="caps: 'genre' is no attribute of items"):
        predictor.diversify(ranked, 5, 0.0, {"genre": 1})


def test_an_explanation_is_leaving_each_event_out_by_hand(tiny_run: TinyRun) -> None:
    predictor = tiny_run.predictor
    history = History(
        ["i1", "unknown", "i2", "i1", "i5"], [0, 500, 1000, 2000, 3000],
        {"click": [1, 1, 1, 1, 1], "rating": [5, 1, float("nan"), 4, 3]}, {"device": ["web", "web", None, "tv", "web"]},
        ["i9"], [0],
    )  # fmt: skip
    items = ["i3", "i7", "new"]
    found = predictor.explain(history, items, {"device": "web"}, {"rating": 0.5})
    assert [len(f) for f in found] == [4, 4, 4]

    def final(history: History) -> list[float]:
        encoded = predictor.encode_histories([history])
        state, item = predictor.encode_state(encoded.batch), predictor.items(items)
        import torch

        logit, _ = predictor.logits_of(state, encoded.batch.length_B, torch.from_numpy(item)[None])
        numbers = predictor.score(state, torch.from_numpy(item)[None], predictor.encode_context([{"device": "web"}]))
        return predictor.final_scores(logit, numbers, {"rating": 0.5})[0].tolist()

    whole = final(history.only([0, 2, 3, 4]))
    for left_out in (0, 2, 3, 4):
        without = final(history.only([n for n in (0, 2, 3, 4) if n != left_out]))
        for k in range(3):
            [reason] = [r for r in found[k] if r["time"] == history.times[left_out]]
            assert reason["item_id"] == history.item_ids[left_out]
            assert reason["gain"] == pytest.approx(whole[k] - without[k], abs=1e-5)
    for reasons in found:
        assert [r["gain"] for r in reasons] == sorted((r["gain"] for r in reasons), reverse=True)
    assert predictor.explain(History(["unknown"], [0]), items) == [[], [], []]
    assert len(predictor.explain(History(["i1"], [0]), items)[0]) == 1  # without it nothing is left: the start token
