from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import storage
from mtrec_ray.config import TrainConfig
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.models.item_tower import IdResiduals, ItemTower
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.training.feed import WindowCache, collate
from mtrec_ray.training.worker import build_feed, build_model, load_schema
from tests import tiny
from tests.conftest import TinyRun


@pytest.fixture
def cache(tiny_run: TinyRun) -> WindowCache:
    return WindowCache.from_table(storage.read_table(tiny_run.data.path("windows", "train")))


@pytest.fixture
def model(tiny_run: TinyRun) -> Recommender:
    return build_model(tiny_run.config, load_schema(tiny_run.data.prefix), None).eval()


def test_a_later_event_never_changes_an_earlier_state(model: Recommender, cache: WindowCache) -> None:
    batch = collate(cache, np.arange(4), model.schema)
    item_vec = model.item_vectors()
    before = model.states(item_vec, batch.history)
    S = batch.history.item_BS.shape[1]
    for position in range(S):
        batch.history.item_BS[:, position] = (batch.history.item_BS[:, position] + 1) % model.schema.n_train_items
        after = model.states(item_vec, batch.history)
        torch.testing.assert_close(after[:, : position + 1], before[:, : position + 1])
        assert not torch.allclose(after[:, position + 1], before[:, position + 1])
        before = after


def test_padding_does_not_change_a_state(model: Recommender, cache: WindowCache) -> None:
    lengths = np.diff(cache.offsets["history"])
    short = int(np.argmin(np.where(lengths > 0, lengths, 99)))
    long = int(np.argmax(lengths))
    assert lengths[short] < lengths[long]
    item_vec = model.item_vectors()
    alone = model.encode(item_vec, collate(cache, np.array([short]), model.schema).history)
    padded = model.encode(item_vec, collate(cache, np.array([short, long]), model.schema).history)
    torch.testing.assert_close(padded[:1], alone)


def test_a_users_first_event_is_trained_from_the_start_token(model: Recommender, cache: WindowCache) -> None:
    first = np.flatnonzero(cache.columns["target_pos"] == 0)
    assert len(first)
    window = int(np.searchsorted(cache.offsets["target"], first[0], side="right") - 1)
    batch = collate(cache, np.array([window]), model.schema)
    batch.targets.positive_M &= batch.targets.pos_M == 0
    if not batch.targets.positive_M.any():
        batch.targets.positive_M[0] = True
    model.zero_grad()
    model(batch)[0][0].backward()
    assert model.trunk.start.grad is not None and model.trunk.start.grad.abs().sum() > 0


def test_an_item_outside_the_training_catalogue_is_its_text_alone(tiny_run: TinyRun) -> None:
    schema = load_schema(tiny_run.data.prefix)
    text = torch.nn.functional.normalize(torch.randn(schema.n_items, 12), dim=-1)
    model = build_model(tiny_run.config, schema, text).eval()
    vectors = model.item_vectors()
    assert schema.n_items == schema.n_train_items + 1
    expected = model.item_tower.text(text * 12**0.5)[-1]
    torch.testing.assert_close(vectors[-1], expected)
    assert not torch.allclose(vectors[0], model.item_tower.text(text * 12**0.5)[0])


def test_id_dropout_depends_on_seed_and_step_alone(tiny_run: TinyRun) -> None:
    def drawn(seed: int, step: int, noise: int) -> torch.Tensor:
        torch.manual_seed(0)
        tower = ItemTower(tiny_run.config.model, 50, 4, seed)
        torch.manual_seed(noise)  # what a rank drew before must not matter
        return tower.train_vectors(torch.zeros(50, 4), None, step).vec_UD

    assert torch.equal(drawn(0, 3, 1), drawn(0, 3, 2))
    assert not torch.equal(drawn(0, 3, 1), drawn(0, 4, 1))
    assert not torch.equal(drawn(0, 3, 1), drawn(1, 3, 1))


def test_hashed_residuals_follow_the_id_and_not_its_number(tiny_run: TinyRun) -> None:
    config = tiny_run.config.model.model_copy(update={"id_buckets": 50})
    residuals = IdResiduals(config, 300, 1.0)
    ids = np.array([f"item {i}" for i in range(300)], dtype=object)
    residuals.name_items(hash_ids(ids))
    assert residuals.table.weight.shape == (50, config.width)
    first = residuals(slice(300))
    pairs = {tuple(sorted(p)) for p in residuals.bucket_N2.tolist()}
    assert len(pairs) > 200  # far more items are told apart than there are rows
    turned = ids[::-1].copy()
    residuals.name_items(hash_ids(turned))
    torch.testing.assert_close(residuals(slice(300)), first.flip(0))
    some = torch.tensor([3, 17, 299])
    torch.testing.assert_close(residuals(some), first.flip(0)[some])


def test_a_model_with_hashed_ids_is_trained_bundled_and_served(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["model"].update(id_buckets=7))
    model = tiny.train_locally(config, tiny_run.data)
    trained = model.schema.n_train_items
    vectors = model.item_vectors()
    assert len(set(map(tuple, vectors[:trained].tolist()))) > 7 and not vectors[trained:].any()
    predictor = tiny.write_bundle(config, tiny_run.data, model, tmp_path / "bundle")
    torch.testing.assert_close(predictor.item_vec_ND, vectors)
    history = PreparedHistories(tiny_run.data.root).get("u3")
    assert history is not None and len(predictor.recommend([history], 3)[0]["items"]) == 3


def test_an_action_missing_is_not_an_action_of_zero(model: Recommender) -> None:
    click = model.tokens.actions["click"]
    rating = model.tokens.actions["rating"]
    for embed in (click, rating):
        missing, zero = embed(torch.tensor([float("nan"), 0.0]))
        assert torch.isfinite(missing).all()
        assert not torch.allclose(missing, zero)


def test_a_wild_action_does_not_drown_the_state(model: Recommender) -> None:
    rating = model.tokens.actions["rating"]
    high, higher, highest = rating(torch.tensor([1e3, 1e30, float("inf")]))
    assert torch.isfinite(high).all() and torch.equal(high, higher) and torch.equal(high, highest)


def test_tokens_change_with_every_part_of_an_event(model: Recommender, cache: WindowCache) -> None:
    batch = collate(cache, np.array([int(np.argmax(np.diff(cache.offsets["history"])))]), model.schema).history
    base = model.tokens(model.item_vectors()[batch.item_BS], batch)
    batch.gap_BS[0, 1] = (batch.gap_BS[0, 1] + 5) % 30
    gap = model.tokens(model.item_vectors()[batch.item_BS], batch)
    batch.context_BS["device"][0, 1] = (batch.context_BS["device"][0, 1] + 1) % 3
    context = model.tokens(model.item_vectors()[batch.item_BS], batch)
    batch.actions_BS["click"][0, 1] = 0.0
    action = model.tokens(model.item_vectors()[batch.item_BS], batch)
    for a, b in ((base, gap), (gap, context), (context, action)):
        assert not torch.allclose(a[0, 1], b[0, 1])
        torch.testing.assert_close(a[0, 0], b[0, 0])


def test_the_best_checkpoint_has_the_smallest_error_and_the_largest_gain() -> None:
    from mtrec_ray.training.loop import monitored

    good = {"like": {"auc": 0.9, "ece": 0.1, "normalised_entropy": 0.5, "logloss": 0.3}, "rating": {"rmse": 1.0, "mae": 0.8}}
    bad = {"like": {"auc": 0.8, "ece": 0.2, "normalised_entropy": 0.6, "logloss": 0.4}, "rating": {"rmse": 1.1, "mae": 0.9}}
    for task, metrics in good.items():
        for metric in metrics:
            train = TrainConfig(monitor=f"{task}/{metric}")
            assert monitored(good, train) > monitored(bad, train), metric


def test_the_relative_gain_counts_errors_downwards_and_says_what_was_not_measured() -> None:
    from mtrec_ray.training.loop import monitored

    train = TrainConfig(monitor="gain", reference={"like/auc": 0.8, "rating/rmse": 1.0})
    assert monitored({"like": {"auc": 0.84}, "rating": {"rmse": 0.9}}, train) == pytest.approx((0.05 + 0.1) / 2)
    assert monitored({"like": {"auc": 0.8}, "rating": {"rmse": 1.2}}, train) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match=r"train\.reference\.rating/rmse: .* there is \['like/auc'\]"):
        monitored({"like": {"auc": 0.84}}, train)


@pytest.mark.parametrize("buckets", [None, 7])
def test_the_items_of_a_batch_alone_give_what_the_whole_catalogue_gives(
    tiny_run: TinyRun, cache: WindowCache, buckets: int | None
) -> None:
    """Losses and every gradient, with id dropout, from the vectors of the batch's items and the negatives alone."""

    def change(raw: dict[str, Any]) -> None:
        raw["model"].update(id_dropout=0.3, dropout=0.0, id_buckets=buckets)
        raw["train"].update(batch_windows=1)
        raw["tasks"]["retrieval"].update(loss="sampled_softmax", negatives=3)
        raw["tasks"]["similar"].update(negatives=3)

    config, schema = tiny.make_config(tiny_run.folder, change), load_schema(tiny_run.data.prefix)
    torch.manual_seed(2)
    model = build_model(config, schema, torch.nn.functional.normalize(torch.randn(schema.n_items, 6), dim=-1))
    model.fit_items(np.arange(schema.n_train_items, dtype=np.uint64), torch.ones(schema.n_train_items))
    batch = next(iter(build_feed(config, schema, cache, 0, 1).epoch(0)))[0]
    items = model.items_of(batch)
    assert items is not None and len(items) < schema.n_train_items

    def found() -> list[torch.Tensor]:
        losses = torch.stack(model.train()(batch)[0])
        return [losses, *torch.autograd.grad(losses.sum(), [p for p in model.parameters() if p.requires_grad])]

    some = found()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "items_of", lambda batch: None)
        for one, other in zip(some, found(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_task_that_reads_the_whole_catalogue_gets_it(tiny_run: TinyRun, cache: WindowCache, model: Recommender) -> None:
    batch = next(iter(build_feed(tiny_run.config, model.schema, cache, 0, 1).epoch(0)))[0]
    assert model.items_of(batch) is None
    some = model.item_tower.train_vectors(None, torch.tensor([1, 4]), 0)
    torch.testing.assert_close(some[torch.tensor([[4], [1]])][:, 0], model.item_vectors()[[4, 1]])
    with pytest.raises(RuntimeError, match="2 item vectors were made, not the catalogue"):
        _ = some.all_ND
