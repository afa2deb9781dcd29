"""Filters, and a catalogue that changes while it is served: as if the index had been built anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray import bundle
from mtrec_ray.histories import History
from mtrec_ray.predictor import FilterError, Predictor, UnknownItemError
from mtrec_ray.retrieval.exact import NONE, ExactIndex, merge, top_k
from mtrec_ray.retrieval.ivf import IvfIndex, build_ivf
from mtrec_ray.retrieval.live import LiveIndex
from tests import tiny
from tests.conftest import TinyRun
from tests.unit.test_ivf import clustered

NOTHING = np.zeros(0, np.int64)
Built = tuple[IvfIndex, torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def built() -> Built:
    items, queries = clustered(12_000, 200)
    return build_ivf(items, queries, 50), items, queries


def sorted_answer(
    items: torch.Tensor, queries: torch.Tensor, k: int, exclude: list[np.ndarray], allowed: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    score = queries @ items.T
    score[:, torch.from_numpy(~allowed)] = float("-inf")
    for row, out in enumerate(exclude):
        score[row, torch.from_numpy(out)] = float("-inf")
    return top_k(score, k)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), rows=st.sampled_from([1, 3, 12]), n=st.sampled_from([5, 300, 9000]), share=st.floats(0, 1))
def test_a_filter_gives_what_a_sort_of_the_allowed_items_gives(seed: int, rows: int, n: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    items = torch.from_numpy(rng.integers(-3, 4, (n, 4)).astype(np.float32))  # whole numbers: ties, and no rounding
    queries = torch.from_numpy(rng.integers(-3, 4, (rows, 4)).astype(np.float32))
    exclude = [np.flatnonzero(rng.random(n) < 0.1) for _ in range(rows)]
    allowed = rng.random(n) < share
    found = ExactIndex(items).search(queries, 20, exclude, allowed)
    expected = sorted_answer(items, queries, 20, exclude, allowed)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.8])
def test_the_approximate_index_keeps_k_filled_and_its_recall_behind_a_filter(built: Built, share: float) -> None:
    """One that has nothing to do with the vectors, and one that takes whole regions away."""
    index, items, queries = built
    rng = np.random.default_rng(1)
    direction = items @ torch.from_numpy(rng.standard_normal(16).astype(np.float32))
    regions = direction.numpy() > np.quantile(direction.numpy(), 1 - share)
    seen = [np.flatnonzero(rng.random(12_000) < 0.005) for _ in range(200)]
    for allowed in (rng.random(12_000) < share, regions if share else np.zeros(12_000, bool)):
        item, _ = index.search(queries, 50, seen, allowed)
        expected = sorted_answer(items, queries, 50, seen, allowed)
        assert ((item == NONE) == (expected[0] == NONE)).all()
        there = item[item != NONE].numpy()
        assert allowed[there].all()
        hits = [len(np.intersect1d(a[a >= 0], b[b >= 0])) for a, b in zip(item.numpy(), expected[0].numpy(), strict=True)]
        assert sum(hits) >= 0.95 * int((expected[0] != NONE).sum())


def test_lists_of_parts_are_merged_as_one_list_ties_by_position() -> None:
    a = torch.tensor([[4, 0, NONE]]), torch.tensor([[3.0, 1.0, -np.inf]])
    b = torch.tensor([[2, 9]]), torch.tensor([[3.0, 2.0]])
    item, score = merge([a, b], 3)
    assert item.tolist() == [[2, 4, 9]] and score.tolist() == [[3.0, 3.0, 2.0]]
    item, score = merge([a, b], 5)
    assert item.tolist() == [[2, 4, 9, 0, NONE]]


@pytest.mark.slow
@pytest.mark.parametrize("n_gone", [0, 40, 3000])
@pytest.mark.parametrize("kind", ["exact", "ivf"])
def test_a_changed_index_answers_like_one_that_was_built_anew(built: Built, kind: str, n_gone: int) -> None:
    index, items, queries = built
    rng = np.random.default_rng(n_gone)
    joined = clustered(200, 1, seed=5)[0]
    gone = np.sort(rng.choice(12_200, n_gone, replace=False))
    live = LiveIndex(ExactIndex(items) if kind == "exact" else index, joined, gone)
    assert len(live) == 12_200
    now = torch.cat([items, joined])
    standing = ~np.isin(np.arange(12_200), gone)
    seen = [np.flatnonzero(rng.random(12_200) < 0.005) for _ in range(200)]
    for allowed in (None, rng.random(12_200) < 0.6):
        found = live.search(queries, 50, seen, allowed)[0].numpy()
        expected = sorted_answer(now, queries, 50, seen, standing if allowed is None else standing & allowed)[0].numpy()
        assert not np.isin(found, gone).any() and (found != NONE).all()
        hits = np.mean([len(np.intersect1d(a, b)) / 50 for a, b in zip(found, expected, strict=True)])
        assert hits == 1 if kind == "exact" else hits > 0.95
    assert (live.scores(queries)[:, torch.from_numpy(gone)] == -np.inf).all()


# ------------------------------------------------------------------ the predictor

HISTORY = History(["i1", "i2", "i5"], [0, 1000, 2000], {"click": [1, 1, 1]})


def listed(predictor: Predictor, history: History = HISTORY, k: int = 30, **more: Any) -> list[str]:
    return [i["item_id"] for i in predictor.recommend([history], k, **more)[0]["items"]]


def test_a_blocked_item_is_in_no_list_and_stays_what_it_is_in_histories(tiny_run: TinyRun) -> None:
    plain = tiny_run.predictor
    best = listed(plain)[0]
    changed = plain.with_changes(blocked=[best, "nobody"])
    assert best in listed(plain) and listed(changed) == listed(plain)[1:]
    assert listed(changed, History()) == [i for i in listed(plain, History()) if i != best]
    assert best not in [i["item_id"] for i in changed.similar("i1", 30)]
    history = History([best], [0], {"click": [1]})
    assert changed.recommend([history], 3)[0]["degraded"] == []
    assert torch.equal(*[p.encode_state(p.encode_histories([history]).batch) for p in (plain, changed)])
    assert changed.score_items(HISTORY, [best]) == plain.score_items(HISTORY, [best])


def test_a_removed_item_is_unknown_everywhere_and_comes_back_with_its_change_undone(tiny_run: TinyRun) -> None:
    plain = tiny_run.predictor
    changed = plain.with_changes(removed=["i2"])
    assert "i2" not in listed(changed, History()) and "i2" in listed(plain, History())
    for ask in (lambda: changed.score_items(HISTORY, ["i1", "i2"]), lambda: changed.similar("i2", 3)):
        with pytest.raises(UnknownItemError, match="'i2'"):
            ask()
    answer = changed.recommend([HISTORY], 3)[0]
    assert answer["degraded"] == ["unknown_history_items"]
    assert listed(changed.with_changes()) == listed(plain)  # changes are told in whole, from the bundle's catalogue


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> tuple[Predictor, Any]:
    """A run whose items have texts -> (predictor, a TextEncoder's encode)."""
    folder = tmp_path_factory.mktemp("live")
    tiny.write_log(folder)
    tiny.write_encoder(folder / "encoder")

    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(folder / "encoder"), "batch_size": 8}
        raw["data"]["item_features"] = {"genre": {"kind": "categorical"}}
        raw["tasks"]["genres"] = {"kind": "profile", "interest": "genre", "weight": 0.1}

    config = tiny.make_config(folder, change)
    data = tiny.prepare_locally(config, folder / "data")
    text = tiny.encode_locally(config, data, folder / "text")
    tiny.write_bundle(config, data, tiny.train_locally(config, data, text), folder / "bundle", text)
    from mtrec_ray.encoders.text import TextEncoder

    assert config.encoder is not None
    return bundle.load(str(folder / "bundle")), TextEncoder(config.encoder).encode


def row(item_id: str, title: str, genre: int) -> pa.Table:
    return pa.table({"item_id": [item_id], "title": [title], "feature_genre": pa.array([genre], pa.int32())})


def test_an_item_that_joins_is_recommended_by_its_text_and_read_in_histories(reading: tuple[Predictor, Any]) -> None:
    plain, encode = reading
    genre = plain.schema.item_features[0]
    even = genre.values.index("even") + 2
    # "new" is in the catalogue without a training event: what joins with its text is what it is
    vector = torch.from_numpy(np.asarray(encode(["Thing new, even"])))
    changed = plain.with_changes(row("joined", "A thing that joined", even), vector)
    names = listed(changed)
    assert "joined" in names and set(names) == {*listed(plain), "joined"}
    scores = {i["item_id"]: i for i in changed.recommend([HISTORY], 30)[0]["items"]}
    assert scores["joined"]["score"] == pytest.approx(scores["new"]["score"], rel=1e-4, abs=1e-5)
    assert scores["joined"]["title"] == "A thing that joined"
    assert scores["joined"]["tasks"]["rating"] == pytest.approx(scores["new"]["tasks"]["rating"], rel=1e-4)
    assert changed.similar("joined", 1)[0]["item_id"] == "new" and changed.similar("joined", 1)[0]["score"] > 0.999
    states = [
        changed.encode_state(changed.encode_histories([History(["i1", name], [0, 1000], {"click": [1, 1]})]).batch)
        for name in ("joined", "new", "i3")
    ]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(states[0], states[2], atol=1e-3)
    history = History(["i1", "joined"], [0, 1000], {"click": [1, 1]})
    assert changed.profile(history)["profile"].keys() == plain.profile(HISTORY)["profile"].keys()
    assert "joined" in listed(changed, where={"genre": ["even"]}) and "joined" not in listed(changed, where={"genre": ["odd"]})
    assert "joined" not in listed(plain)


def test_an_item_told_anew_keeps_what_was_learned_of_it(reading: tuple[Predictor, Any]) -> None:
    plain, encode = reading
    vector = torch.from_numpy(np.asarray(encode(["Thing 4, even"])))
    same = plain.with_changes(row("i4", "Thing four", 2), vector)
    assert listed(same, History())[:5] == listed(plain, History())[:5]  # and its popularity
    before, after = ({i["item_id"]: i for i in p.recommend([HISTORY], 30)[0]["items"]} for p in (plain, same))
    assert before.keys() == after.keys() and after["i4"]["title"] == "Thing four"
    for name in before:
        assert after[name]["score"] == pytest.approx(before[name]["score"], rel=1e-4, abs=1e-5)
    history = History(["i4"], [0], {"click": [1]})
    for name, values in plain.profile(history)["profile"].items():
        assert same.profile(history)["profile"][name] == pytest.approx(values, rel=1e-3)
    assert not {"i4"} & set(listed(same.with_changes(row("i4", "x", 2), vector, blocked=["i4"])))


def test_what_cannot_join_is_refused(tiny_run: TinyRun, reading: tuple[Predictor, Any]) -> None:
    with pytest.raises(ValueError, match="this model reads none"):
        tiny_run.predictor.with_changes(pa.table({"item_id": ["x"], "title": ["x"]}), torch.zeros(1, 4))
    twice = pa.concat_tables([row("x", "x", 2), row("x", "y", 2)])
    with pytest.raises(ValueError, match="joins twice"):
        reading[0].with_changes(twice, torch.zeros(2, 4))


def test_a_filter_by_attributes_fills_the_list_with_what_is_allowed(reading: tuple[Predictor, Any]) -> None:
    predictor = reading[0]
    assert [int(i.removeprefix("i")) % 2 for i in listed(predictor, where={"genre": ["odd"]})] == [1] * 10
    assert listed(predictor, where={"genre": ["odd", "even"]}) == listed(predictor)
    assert listed(predictor, History(), where={"genre": ["odd"]})[0] in listed(predictor, History())
    assert listed(predictor, where={"genre": []}) == []
    with pytest.raises(FilterError, match=r"'colour' is no attribute of items; known are \['genre'\]"):
        predictor.allowed({"colour": ["red"]})
    with pytest.raises(FilterError, match=r"genre: no item has 'red'; some that items have: \['even', 'odd'\]"):
        predictor.allowed({"genre": ["red"]})
