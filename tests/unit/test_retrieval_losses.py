"""Retrieval losses against the plain formula, and samples that are right on average and the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ConfigError, RetrievalTask, SimilarityTask
from mtrec_ray.models.batch import Batch, HistoryBatch, TargetBatch
from mtrec_ray.models.item_tower import ItemVectors
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import Forward, build_task
from mtrec_ray.tasks import softmax as softmax_module
from mtrec_ray.tasks.negatives import Negatives, column_of
from mtrec_ray.tasks.retrieval import GeneralisedBce, Retrieval, SampledSoftmax
from mtrec_ray.tasks.similarity import Similarity
from mtrec_ray.training.worker import build_model, load_schema, run_worker
from tests import tiny
from tests.conftest import TinyRun

N, D, B, S = 40, 6, 3, 5
ALL = 200_000


def make_batch(step: int = 0) -> Batch:
    """Moments with several positives, a repeated target, a target seen before, non-positives; distinct histories."""
    generator = torch.Generator().manual_seed(3)
    window = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    pos = torch.tensor([0, 2, 2, 5, 1, 1, 3, 0, 4])
    item = torch.tensor([5, 7, 9, 1, 12, 12, 30, 2, 39])
    positive = torch.tensor([True, True, True, True, True, True, True, False, True])
    history = torch.randint(0, N, (B, S), generator=generator)
    history[0, 0] = 1  # seen, and a target later
    zeros = torch.zeros(B, S, dtype=torch.long)
    return Batch(
        HistoryBatch(history, torch.full((B,), S), zeros, zeros),
        TargetBatch(window, pos, item, positive, {}, {}),
        {},
        torch.ones(B),
        torch.tensor([1, 2, 3, 1]),
        torch.tensor([4, 5, 6, 8]),
        step,
    )


def make_forward() -> Forward:
    generator = torch.Generator().manual_seed(4)
    state = torch.randn(B, S + 1, D, generator=generator).requires_grad_()
    return Forward(state, ItemVectors(torch.randn(N, D, generator=generator).requires_grad_()), {})


def moments(batch: Batch) -> Iterator[tuple[int, int, int, set[int]]]:
    """Window, position and item of each positive, and all positives of its moment."""
    t = batch.targets
    triples = torch.stack([t.window_M, t.pos_M, t.item_M], 1)[t.positive_M].tolist()
    for w, p, i in triples:
        yield w, p, i, {item for window, pos, item in triples if (window, pos) == (w, p)}


def plain(task: Retrieval, forward: Forward, batch: Batch, exclude_seen: bool) -> Tensor:
    """The definition, one positive at a time."""
    total = forward.state_BLD.new_zeros(())
    for w, p, i, own in moments(batch):
        logit = task.query(forward.state_BLD[w, p]) @ forward.items.vec_UD.T
        gone = set(batch.history.item_BS[w, :p].tolist()) - own if exclude_seen else set()
        kept = [j for j in range(N) if j not in gone]
        total = total + torch.logsumexp(logit[kept], 0) - logit[i]
    return total


def gradients(task: nn.Module, forward: Forward, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [forward.state_BLD, forward.items.vec_UD, *task.query.parameters()]))  # type: ignore[union-attr]


def sampled(kind: type[Any], exclude_seen: bool, draws: int, alpha: float, *more: float) -> Any:
    torch.manual_seed(0)
    task = kind("r", D, exclude_seen, Negatives("r", N, draws, alpha), *more)
    task.fit_items(torch.arange(N).float() ** 2, 0)
    return task


@pytest.mark.parametrize("block", [1, 1 << 18])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_softmax_and_its_gradient_are_those_of_the_plain_formula(
    exclude_seen: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(softmax_module.CACHED, "cpu", block)
    monkeypatch.setattr(softmax_module, "LEAST_ROWS", 2)
    task, forward, batch = Retrieval("r", D, exclude_seen), make_forward(), make_batch()
    expected = plain(task, forward, batch, exclude_seen)
    loss = task.loss_sum(forward, batch)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(task, forward, 0.3 * loss), gradients(task, forward, 0.3 * expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(task.loss_sum(forward, batch), expected)


def test_the_gradient_may_be_asked_for_twice() -> None:
    """Gramian balancers go back from each task to the state, and then once through everything."""
    task, forward = Retrieval("r", D, True), make_forward()
    loss = task.loss_sum(forward, make_batch())
    (first,) = torch.autograd.grad(loss, forward.state_BLD, retain_graph=True)
    (second,) = torch.autograd.grad(loss, forward.state_BLD)
    assert torch.equal(first, second) and first.abs().sum() > 0


def test_large_logits_stay_finite_and_a_row_may_have_no_candidate_but_its_target() -> None:
    query, vec = torch.tensor([[300.0], [-300.0]]).requires_grad_(), torch.tensor([[1.0], [-1.0], [0.5]])
    row, target = torch.tensor([0, 1]), torch.tensor([0, 0])
    gone = softmax_module.Hidden(torch.tensor([0, 1, 2, 3]))  # all of row 0, the target of row 1
    loss = softmax_module.softmax_loss(query, vec, row, target, 3, [gone])
    assert loss.item() == pytest.approx(600.0)
    loss.backward()
    assert torch.isfinite(query.grad).all() and query.grad[0] == 0  # type: ignore[index]


@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_with_many_negatives_the_sampled_softmax_is_the_full_one(exclude_seen: bool, alpha: float) -> None:
    task, forward, batch = sampled(SampledSoftmax, exclude_seen, ALL, alpha), make_forward(), make_batch()
    expected = plain(task, forward, batch, exclude_seen)
    loss = task.loss_sum(forward, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    for found, wanted in zip(gradients(task, forward, loss), gradients(task, forward, expected), strict=True):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.slow
def test_the_sampled_denominator_is_right_on_average() -> None:
    """Few draws: the mean of Z over steps is Z. Without the correction, or with the hits, it would be far off."""
    task, forward, batch = sampled(SampledSoftmax, True, 5, 0.75), make_forward(), make_batch()
    rows = task.rows(forward, batch)
    with torch.no_grad():
        row = int((rows.window_R * (S + 1) + rows.pos_R == 2).nonzero())  # window 0, position 2: targets 7 and 9
        score_N = task.query(rows.state_RD[row]) @ forward.items.vec_UD.T
        seen = batch.history.item_BS[0, :2].tolist()
        rest = [i for i in range(N) if i not in (7, 9, *seen)]
        found = []
        for step in range(20_000):
            item, count = task.negatives.draw(step)
            kept = ~torch.isin(item, torch.tensor([7, 9, *seen]))
            found.append(torch.exp(score_N[item[kept]] + task.negatives.correction(item, count)[kept]).sum())
        mean, error = torch.stack(found).mean(), torch.stack(found).std() / math.sqrt(len(found))
    assert abs(float(mean - torch.exp(score_N[rest]).sum())) < 4 * float(error)
    assert float(error) < 0.05 * float(mean)


def test_a_sampled_softmax_by_hand() -> None:
    task, forward, batch = sampled(SampledSoftmax, True, 12, 0.5), make_forward(), make_batch(step=4)
    item, count = task.negatives.draw(4)
    q = (1 + torch.arange(N).double() ** 2) ** 0.5
    q = q / q.sum()
    expected = 0.0
    for w, p, i, own in moments(batch):
        score = (task.query(forward.state_BLD[w, p]) @ forward.items.vec_UD.T).tolist()
        seen = set(batch.history.item_BS[w, :p].tolist())
        z = sum(math.exp(score[j]) for j in own)
        z += sum(
            n / (12 * float(q[j])) * math.exp(score[j])
            for j, n in zip(item.tolist(), count.tolist(), strict=True)
            if j not in own | seen
        )
        expected += math.log(z) - score[i]
    assert task.loss_sum(forward, batch).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("calibration", [0.0, 0.75])
def test_gbce_by_hand(calibration: float) -> None:
    task, forward, batch = sampled(GeneralisedBce, False, 12, 0.0, calibration), make_forward(), make_batch(step=1)
    item, count = task.negatives.draw(1)
    a = 12 / (N - 1)
    beta = a * (calibration * (1 - 1 / a) + 1 / a)
    assert beta == pytest.approx(1.0) if calibration == 0 else beta < 1
    expected = 0.0
    for w, p, i, own in moments(batch):
        score = (task.query(forward.state_BLD[w, p]) @ forward.items.vec_UD.T).tolist()
        loss = beta * math.log1p(math.exp(-score[i]))
        loss += sum(n * math.log1p(math.exp(score[j])) for j, n in zip(item.tolist(), count.tolist(), strict=True) if j not in own)
        expected += loss / 13
    loss = task.loss_sum(forward, batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(g.abs().sum() > 0 for g in gradients(task, forward, loss))


def test_negatives_depend_on_seed_task_and_step_alone() -> None:
    def drawn(seed: int, name: str, step: int, noise: int) -> list[int]:
        torch.manual_seed(noise)  # what a rank drew before must not matter
        negatives = Negatives(name, 1000, 50, 0.5)
        negatives.fit(torch.ones(1000), seed)
        return negatives.draw(step)[0].tolist()  # type: ignore[no-any-return]

    same = drawn(0, "r", 3, 1)
    assert drawn(0, "r", 3, 2) == same
    assert len({tuple(same), tuple(drawn(1, "r", 3, 1)), tuple(drawn(0, "s", 3, 1)), tuple(drawn(0, "r", 4, 1))}) == 4


def test_negatives_are_drawn_by_popularity() -> None:
    negatives = Negatives("r", 3, 300_000, 0.5)
    negatives.fit(torch.tensor([0.0, 3.0, 8.0]), 0)
    item, count = negatives.draw(0)
    torch.testing.assert_close(negatives.probability(item), torch.tensor([1.0, 2.0, 3.0]).double() / 6)
    torch.testing.assert_close(count / 300_000, torch.tensor([1.0, 2.0, 3.0]) / 6, rtol=0.02, atol=0)
    assert column_of(torch.tensor([[2, 9], [0, 5]]), torch.tensor([2, 5])).tolist() == [[0, -1], [-1, 1]]


@pytest.mark.parametrize("kind", [Retrieval, SampledSoftmax, GeneralisedBce])
def test_two_halves_of_a_batch_make_the_sum_of_the_whole(kind: Any) -> None:
    """So do two ranks: they see the same negatives."""
    more = () if kind is not GeneralisedBce else (0.75,)
    task = sampled(kind, True, 10, 0.5, *more) if kind is not Retrieval else Retrieval("r", D, True)
    forward, whole = make_forward(), make_batch(step=7)
    total = torch.zeros(())
    for windows in ([0, 2], [1]):
        part = make_batch(step=7)
        part.targets.positive_M &= torch.isin(part.targets.window_M, torch.tensor(windows))
        total = total + task.loss_sum(forward, part)
    torch.testing.assert_close(total, task.loss_sum(forward, whole))


@pytest.mark.parametrize("kind", [SampledSoftmax, GeneralisedBce])
def test_a_batch_without_positives_gives_a_zero_with_gradients(kind: Any) -> None:
    more = () if kind is SampledSoftmax else (0.75,)
    task, forward, batch = sampled(kind, True, 10, 0.0, *more), make_forward(), make_batch()
    batch.targets.positive_M[:] = False
    loss = task.loss_sum(forward, batch)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(task, forward, loss))


def test_similarity_with_many_negatives_is_the_one_over_the_catalogue() -> None:
    forward, batch = make_forward(), make_batch()
    torch.manual_seed(0)
    full, some = Similarity("s", D, 0.3), Similarity("s", D, 0.3, Negatives("s", N, ALL, 0.75))
    some.load_state_dict(full.state_dict())
    some.fit_items(torch.arange(N).float(), 0)
    vec = full.vectors(forward.items.vec_UD)
    logit = vec[batch.pair_anchor_P] @ vec.T / 0.3
    logit = logit.scatter(1, batch.pair_anchor_P[:, None], float("-inf"))
    expected = F.cross_entropy(logit, batch.pair_positive_P, reduction="sum")
    wanted = torch.autograd.grad(expected, forward.items.vec_UD)[0]
    torch.testing.assert_close(full.loss_sum(forward, batch), expected)
    torch.testing.assert_close(
        torch.autograd.grad(full.loss_sum(forward, batch), forward.items.vec_UD)[0], wanted, rtol=1e-4, atol=1e-6
    )
    loss = some.loss_sum(forward, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=0.01)
    found = torch.autograd.grad(loss, forward.items.vec_UD)[0]
    assert (found - wanted).norm() < 0.03 * wanted.norm()
    batch.pair_anchor_P = batch.pair_positive_P = torch.zeros(0, dtype=torch.long)
    assert some.loss_sum(forward, batch).item() == 0


def test_losses_are_built_from_the_configuration(tiny_run: TinyRun) -> None:
    schema: LogSchema = load_schema(tiny_run.data.prefix)

    def built(**settings: object) -> Any:
        return build_task("r", RetrievalTask.model_validate({"kind": "retrieval", **settings}), schema, tiny_run.config.model)

    assert type(built()) is Retrieval
    task = built(loss="sampled_softmax", negatives=9)
    assert type(task) is SampledSoftmax and (task.negatives.draws, task.negatives.alpha) == (9, 0.75)
    assert built(loss="sampled_softmax", negatives=9, popularity=0).negatives.alpha == 0
    task = built(loss="gbce", negatives=9, calibration=0.5)
    assert type(task) is GeneralisedBce and task.negatives.alpha == 0 and task.calibration == 0.5
    similarity = build_task("s", SimilarityTask(kind="similarity", negatives=4), schema, tiny_run.config.model)
    assert isinstance(similarity, Similarity) and similarity.negatives is not None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"negatives": 5}, r"tasks\.retrieval\.negatives: loss softmax reads all items"),
        ({"loss": "gbce"}, r"tasks\.retrieval\.negatives: loss gbce needs a number"),
        ({"loss": "gbce", "negatives": 5, "popularity": 0.5}, r"tasks\.retrieval\.popularity: only loss sampled_softmax"),
        ({"loss": "sampled_softmax", "negatives": 5, "calibration": 0.5}, r"tasks\.retrieval\.calibration: only loss gbce"),
        ({"loss": "hinge"}, r"tasks\.retrieval\.loss|tasks\.retrieval\.retrieval\.loss"),
    ],
)
def test_contradictions_are_refused_with_the_path_of_the_key(tiny_run: TinyRun, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.make_config(tiny_run.folder, lambda raw: raw["tasks"]["retrieval"].update(settings))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"loss": "sampled_softmax", "negatives": 6}, {"loss": "gbce", "negatives": 6}])
@pytest.mark.parametrize("trunk", ["ligr", "hstu"])
def test_a_model_with_another_trunk_and_loss_is_trained_bundled_and_served(
    tiny_run: TinyRun, tmp_path: Any, trunk: str, settings: dict[str, Any]
) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["model"]["trunk"] = trunk
        raw["tasks"]["retrieval"] |= settings
        raw["tasks"]["similar"]["negatives"] = 5

    config = tiny.make_config(tiny_run.folder, change)
    model = tiny.train_locally(config, tiny_run.data)
    predictor = tiny.write_bundle(config, tiny_run.data, model, tmp_path / "bundle")
    torch.testing.assert_close(predictor.item_vec_ND, model.item_vectors())
    assert not any("cumulative" in name for name in model.state_dict())  # draws belong to training alone


def test_the_worker_tells_tasks_how_popular_items_are(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.make_config(
        tiny_run.folder,
        lambda raw: raw["tasks"]["retrieval"].update(loss="sampled_softmax", negatives=6, popularity=1.0) or raw.update(seed=5),
    )
    told: list[Negatives] = []
    monkeypatch.setattr("mtrec_ray.training.worker.fit", lambda config, model, *_: told.append(model.retrieval.negatives))
    run_worker(config, tiny_run.data.prefix, None, lambda *_: None)
    count = tiny_run.predictor.popularity_N * tiny_run.predictor.trained_events
    weight = 1 + count[: len(told[0].cumulative_N)].double()
    torch.testing.assert_close(told[0].probability(torch.arange(len(weight))), weight / weight.sum(), rtol=1e-5, atol=1e-8)
    assert told[0].seed == 5
    fresh: Any = build_model(config, load_schema(tiny_run.data.prefix), None)
    assert not torch.equal(fresh.retrieval.negatives.cumulative_N, told[0].cumulative_N)
