from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray.histories import NO_HISTORY, UNKNOWN_HISTORY_ITEMS, History
from mtrec_ray.predictor import Candidates, Predictor, UnknownItemError
from mtrec_ray.retrieval.exact import NONE
from mtrec_ray.serving.history import PreparedHistories
from tests import tiny
from tests.conftest import TinyRun


@pytest.fixture(scope="module")
def predictor(tiny_run: TinyRun) -> Predictor:
    return tiny_run.predictor


@pytest.fixture(scope="module")
def store(tiny_run: TinyRun) -> PreparedHistories:
    return PreparedHistories(str(tiny_run.folder / "data"))


def stored(store: PreparedHistories, user_id: str) -> History:
    history = store.get(user_id)
    assert history is not None
    return history


def with_exclude_seen(tiny_run: TinyRun) -> Predictor:
    p = tiny_run.predictor
    schema = p.schema.model_copy(update={"exclude_seen": True})
    return Predictor(p.config, schema, _catalogue(p), p.model, p.item_vec_ND, p.fingerprint)


def _catalogue(p: Predictor) -> Any:
    import pyarrow as pa

    counts = (p.popularity_N * 10_000).round().long().tolist()
    return pa.table({"item_id": p.item_ids, "title": p.titles, "count": counts})


def test_a_batch_gives_what_single_requests_give(predictor: Predictor, store: PreparedHistories) -> None:
    histories = [stored(store, u) for u in store.user_ids()] + [History()]
    together = predictor.recommend(histories, 5)
    for history, answer in zip(histories, together, strict=True):
        alone = predictor.recommend([history], 5)[0]
        assert [i["item_id"] for i in alone["items"]] == [i["item_id"] for i in answer["items"]]
        for a, b in zip(alone["items"], answer["items"], strict=True):
            assert a["score"] == pytest.approx(b["score"], rel=1e-5, abs=1e-5)
            assert a["tasks"] == pytest.approx(b["tasks"], rel=1e-5, abs=1e-5)


def test_an_empty_history_gets_the_popularity_list_in_its_order(predictor: Predictor) -> None:
    answer = predictor.recommend([History()], 6)[0]
    assert answer["degraded"] == [NO_HISTORY]
    order = sorted(range(len(predictor.item_ids)), key=lambda i: (-float(predictor.popularity_N[i]), i))[:6]
    assert [i["item_id"] for i in answer["items"]] == [predictor.item_ids[i] for i in order]
    assert all(0 <= i["tasks"]["click"] <= 1 for i in answer["items"])


def test_final_weights_do_not_reorder_the_popularity_list(tiny_run: TinyRun) -> None:
    p = tiny_run.predictor
    before = p.recommend([History()], 6)[0]["items"]
    p.final_weights["rating"] = 100.0
    try:
        after = p.recommend([History()], 6)[0]["items"]
    finally:
        p.final_weights["rating"] = 0.0
    assert [i["item_id"] for i in before] == [i["item_id"] for i in after]


def test_k_beyond_the_catalogue_gives_what_there_is_and_each_item_once(predictor: Predictor, store: PreparedHistories) -> None:
    items = predictor.recommend([stored(store, "u1")], 10_000)[0]["items"]
    assert len(items) == len(predictor.item_ids) == len({i["item_id"] for i in items})


def test_seen_items_are_left_out_and_the_list_is_filled_up(tiny_run: TinyRun, store: PreparedHistories) -> None:
    p = with_exclude_seen(tiny_run)
    for user in store.user_ids():
        history = stored(store, user)
        seen = set(history.item_ids) | set(history.seen_item_ids)
        got = [i["item_id"] for i in p.recommend([history], 1000)[0]["items"]]
        assert set(got) == set(p.item_ids) - seen and len(got) == len(set(got))


def test_a_user_who_has_seen_everything_gets_an_empty_list(tiny_run: TinyRun) -> None:
    p = with_exclude_seen(tiny_run)
    history = History(item_ids=p.item_ids, times=list(range(len(p.item_ids))))
    assert p.recommend([history], 5)[0]["items"] == []


def test_unknown_items_of_a_history_are_left_out_and_marked(predictor: Predictor, store: PreparedHistories) -> None:
    history = History(["i1", "gone", "i2"], [1, 2, 3], {"click": [1, 1, 1]})
    answer = predictor.recommend([history, History(["gone"], [1])], 4)
    known = predictor.recommend([History(["i1", "i2"], [1, 3], {"click": [1, 1]})], 4)[0]
    assert answer[0]["degraded"] == [UNKNOWN_HISTORY_ITEMS]
    assert [i["item_id"] for i in answer[0]["items"]] == [i["item_id"] for i in known["items"]]
    assert [i["score"] for i in answer[0]["items"]] == pytest.approx([i["score"] for i in known["items"]], rel=1e-5)
    assert answer[1]["degraded"] == [UNKNOWN_HISTORY_ITEMS, NO_HISTORY]


def test_only_the_last_events_of_a_long_history_count(predictor: Predictor) -> None:
    n = predictor.schema.window - 1
    ids = [f"i{j % 20}" for j in range(50)]
    times = [j * tiny.HOUR for j in range(50)]
    whole = predictor.recommend([History(ids, times)], 3)[0]
    tail = predictor.recommend([History(ids[-n:], times[-n:])], 3)[0]
    assert whole["items"] == tail["items"]


def test_at_cuts_the_history_strictly_before(predictor: Predictor) -> None:
    history = History(["i1", "i2", "i3"], [10, 20, 20], {"click": [1, 1, 1]}, {"device": ["web"] * 3}, ["i9"], [5])
    assert list(history.before(20).item_ids) == ["i1"]
    assert list(history.before(21).item_ids) == ["i1", "i2", "i3"]
    assert list(history.before(5).item_ids) == [] and list(history.before(5).seen_item_ids) == []
    assert len(history.before(20).context["device"]) == 1
    assert predictor.recommend([history.before(1)], 2)[0]["degraded"] == [NO_HISTORY]


def test_score_items_agrees_with_recommend(predictor: Predictor, store: PreparedHistories) -> None:
    history = stored(store, "u2")
    items = predictor.recommend([history], 5)[0]["items"]
    scored = predictor.score_items(history, [i["item_id"] for i in items])["items"]
    for a, b in zip(items, scored, strict=True):
        assert a["item_id"] == b["item_id"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-5)
        assert a["tasks"] == pytest.approx(b["tasks"], rel=1e-5, abs=1e-6)


def test_an_unknown_item_is_named(predictor: Predictor) -> None:
    with pytest.raises(UnknownItemError, match="'nope'"):
        predictor.score_items(History(), ["i1", "nope"])
    with pytest.raises(UnknownItemError, match="'nope'"):
        predictor.similar("nope", 3)


def test_similar_leaves_out_the_item_itself_and_is_sorted(predictor: Predictor) -> None:
    similar = predictor.similar("i3", 1000)
    assert len(similar) == len(predictor.item_ids) - 1
    assert "i3" not in {s["item_id"] for s in similar}
    scores = [s["score"] for s in similar]
    assert scores == sorted(scores, reverse=True) and max(scores) <= 1 + 1e-5


def test_a_profile_is_a_distribution_per_attribute(predictor: Predictor, store: PreparedHistories) -> None:
    profile = predictor.profile(stored(store, "u3"))["profile"]
    assert set(profile) == {"taste", "age_group"} and set(profile["age_group"]) == {"<25", "25-34", "35+"}
    for values in profile.values():
        assert sum(values.values()) == pytest.approx(1, abs=1e-5)


def test_the_final_score_is_the_weighted_sum(tiny_run: TinyRun) -> None:
    p = tiny_run.predictor
    candidates = Candidates(torch.tensor([[7, 3, 5, NONE]]), torch.tensor([[1.0, 0.9, 0.5, float("-inf")]]), torch.tensor([False]))
    rating = p.model.pointwise["rating"]
    mean, std = rating.mean, rating.std  # type: ignore[attr-defined]
    predictions = {"rating": torch.tensor([[mean, mean - std, mean + 2 * std, mean]]), "click": torch.full((1, 4), 0.9)}
    p.final_weights |= {"rating": 0.5}
    try:
        ranked = p.finalise(candidates, predictions, 4)
    finally:
        p.final_weights["rating"] = 0.0
    assert ranked.item_BK.tolist() == [[5, 7, 3, NONE]]
    torch.testing.assert_close(ranked.score_BK[0, :3], torch.tensor([1.5, 1.0, 0.4]))
    torch.testing.assert_close(ranked.tasks_BK["retrieval"][0, :3], torch.tensor([0.5, 1.0, 0.9]))


def test_ties_in_the_final_score_go_by_catalogue_position(predictor: Predictor) -> None:
    candidates = Candidates(torch.tensor([[7, 3, 5, 1]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([False]))
    predictions = {"rating": torch.zeros(1, 4), "click": torch.full((1, 4), 0.5)}
    assert predictor.finalise(candidates, predictions, 3).item_BK.tolist() == [[3, 5, 7]]


def test_encode_state_does_not_depend_on_the_clock(predictor: Predictor) -> None:
    early = History(["i1", "i2"], [0, tiny.HOUR], {"click": [1, 1]})
    late = History(["i1", "i2"], [10**12, 10**12 + tiny.HOUR], {"click": [1, 1]})
    states = [predictor.encode_state(predictor.encode_histories([h]).batch) for h in (early, late)]
    np.testing.assert_array_equal(states[0].numpy(), states[1].numpy())
