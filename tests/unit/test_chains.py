"""Binary tasks: losses by hand, and chains of them along a funnel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mtrec_ray import storage
from mtrec_ray.config import BinaryTask, ConfigError, RunConfig
from mtrec_ray.models.batch import Batch
from mtrec_ray.models.chains import Chains, Transfer, logit_of_both, parents_first
from mtrec_ray.models.item_tower import ItemVectors
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.tasks import Binary, Forward
from mtrec_ray.training.feed import WindowCache, collate
from mtrec_ray.training.worker import build_model, load_schema
from tests import tiny
from tests.unit.test_tasks import make_batch

NAN = float("nan")
LN3 = math.log(3)
STEPS = ("click", "cart", "purchase")


def binary(name: str = "t", **config: Any) -> Binary:
    """A task on the label y whose logit is what it reads."""
    task = Binary(name, BinaryTask(kind="binary", label="y", **config), 1)
    with torch.no_grad():
        task.head.weight.fill_(1.0)
        task.head.bias.zero_()
    return task


def loss_of(task: Binary, shared: list[list[float]], labels: list[float]) -> float:
    n = len(labels)
    batch = make_batch([0] * n, [0] * n, [True] * n, labels)
    forward = Forward(torch.zeros(2, 4, 2), ItemVectors(torch.zeros(3, 2)), {"t": torch.tensor(shared)})
    return float(task.loss_sum(forward, batch).detach())


# ------------------------------------------------------------------ losses


def test_focal_loss_by_hand() -> None:
    task = binary(loss="focal", focal_gamma=2)
    # p = 3/4: a positive is 1/4 away from its label, a negative 3/4
    expected = -((1 / 4) ** 2) * math.log(3 / 4) - (3 / 4) ** 2 * math.log(1 / 4)
    assert loss_of(task, [[LN3], [LN3], [5.0]], [1.0, 0.0, NAN]) == pytest.approx(expected, rel=1e-6)


def test_focal_loss_without_gamma_is_cross_entropy() -> None:
    shared, labels = [[-2.0], [0.5], [3.0]], [1.0, 0.0, 1.0]
    bce = F.binary_cross_entropy_with_logits(torch.tensor(shared)[:, 0], torch.tensor(labels), reduction="sum")
    assert loss_of(binary(loss="focal", focal_gamma=0), shared, labels) == pytest.approx(float(bce), rel=1e-6)
    assert loss_of(binary(), shared, labels) == pytest.approx(float(bce), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_a_loss_and_its_gradient_stay_finite_at_any_logit(gamma: float) -> None:
    task = binary(loss="focal", focal_gamma=gamma)
    logit = torch.tensor([-200.0, -50.0, 0.0, 50.0, 200.0], requires_grad=True)
    for y in (torch.ones(5), torch.zeros(5)):
        loss = task.losses(logit, y).sum()
        (gradient,) = torch.autograd.grad(loss, logit)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_positive_weight_multiplies_the_odds() -> None:
    assert loss_of(binary(positive_weight=5), [[LN3], [LN3]], [1.0, 0.0]) == pytest.approx(-5 * math.log(3 / 4) - math.log(1 / 4))
    # one positive in four, the odds 1 : 3; weight 6 makes them 2 : 1, and there the loss is flat
    logit = torch.full((4,), math.log(2), requires_grad=True)
    binary(positive_weight=6).losses(logit, torch.tensor([1.0, 0.0, 0.0, 0.0])).sum().backward()
    assert float(logit.grad.sum()) == pytest.approx(0, abs=1e-6)  # type: ignore[union-attr]


# ------------------------------------------------------------------ probabilities of a chain


def test_log_probabilities_of_both_are_those_of_float64() -> None:
    values = torch.tensor([-90.0, -30.0, -8.0, -1.0, 0.0, 0.3, 5.0, 17.0, 30.0, 80.0])
    a, b = (v.flatten() for v in torch.meshgrid(values, values, indexing="ij"))
    z = logit_of_both(a, b)
    log_p = F.logsigmoid(a.double()) + F.logsigmoid(b.double())
    log_not_p = torch.where(log_p > math.log(0.5), torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))
    loss = [binary().losses(z, torch.full_like(z, y)).double() for y in (1.0, 0.0)]
    torch.testing.assert_close(-loss[0], log_p, rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(-loss[1], log_not_p, rtol=1e-5, atol=1e-30)


def test_gradients_of_both_stay_finite() -> None:
    a = torch.tensor([-200.0, 0.0, 200.0], requires_grad=True)
    b = torch.tensor([200.0, -200.0, 200.0], requires_grad=True)
    z = logit_of_both(a, b)
    F.binary_cross_entropy_with_logits(z, torch.tensor([1.0, 0.0, 1.0])).backward()
    assert torch.isfinite(z).all() and torch.isfinite(a.grad).all() and torch.isfinite(b.grad).all()  # type: ignore[arg-type]


def funnel(chain: str, names: tuple[str, ...] = STEPS) -> tuple[Chains, dict[str, Binary]]:
    config = {
        n: BinaryTask(kind="binary", label=n, chain=chain if i else "esmm", depends_on=STEPS[i - 1] if i else None)  # type: ignore[arg-type]
        for i, n in enumerate(STEPS)
    }
    config = {n: config[n] for n in names}
    return Chains(config, 1), {n: Binary(n, t, 1) for n, t in config.items()}


def filled(heads: dict[str, Binary]) -> dict[str, Binary]:
    for head in heads.values():
        torch.nn.init.ones_(head.head.weight)
        torch.nn.init.zeros_(head.head.bias)
    return heads


def test_esmm_multiplies_along_a_chain_of_three() -> None:
    chains, heads = funnel("esmm")
    filled(heads)
    shared = {"click": torch.tensor([[0.0]]), "cart": torch.tensor([[LN3]]), "purchase": torch.tensor([[-LN3]])}
    read = chains(shared, heads)
    assert [v.shape[-1] for v in read.values()] == [1, 2, 2]
    found = [float(heads[n].predict(read[n]).detach()) for n in STEPS]
    assert found == pytest.approx([1 / 2, 1 / 2 * 3 / 4, 1 / 2 * 3 / 4 * 1 / 4], rel=1e-6)
    final = heads["purchase"].final(heads["purchase"].predict(read["purchase"]))
    assert float(final) == pytest.approx(math.log(3 / 32 / (29 / 32)), rel=1e-5)


def test_the_order_of_tasks_does_not_matter() -> None:
    chains, heads = funnel("aitm")
    turned, others = funnel("aitm", STEPS[::-1])
    turned.load_state_dict(chains.state_dict())
    for name in STEPS:
        others[name].load_state_dict(heads[name].state_dict())
    shared = {n: torch.randn(5, 1) for n in STEPS}
    expected, found = chains(shared, heads), turned({n: shared[n] for n in STEPS[::-1]}, others)
    for name in STEPS:
        torch.testing.assert_close(others[name].predict(found[name]), heads[name].predict(expected[name]))
    assert list(parents_first({"purchase": "cart", "cart": "click", "like": "click"})) == ["cart", "like", "purchase"]


def test_esmm_is_trained_by_the_product_over_all_impressions_and_both_heads_learn() -> None:
    chains, heads = funnel("esmm")
    filled(heads)
    shared = {"click": torch.zeros(3, 1), "cart": torch.full((3, 1), LN3), "purchase": torch.zeros(3, 1)}
    batch = make_batch([0] * 3, [0] * 3, [True] * 3, [NAN] * 3)
    # never clicked, clicked and in the cart, and one that nobody knows
    batch.targets.labels_M = {"cart": torch.tensor([0.0, 1.0, NAN]), "click": torch.tensor([0.0, 1.0, 1.0])}
    loss = heads["cart"].loss_sum(Forward(torch.zeros(2, 4, 2), ItemVectors(torch.zeros(3, 2)), chains(shared, heads)), batch)
    assert float(heads["cart"].count(batch)) == 2
    assert float(loss.detach()) == pytest.approx(-math.log(1 - 3 / 8) - math.log(3 / 8), rel=1e-6)
    loss.backward()
    # d/da of −log p is −(1 − σ(a)), of −log(1 − p) it is p (1 − σ(a)) / (1 − p)
    for name, rest in (("click", 1 / 2), ("cart", 1 / 4)):
        gradient = heads[name].head.bias.grad
        assert gradient is not None and float(gradient) == pytest.approx(rest * (3 / 5 - 1), rel=1e-5)
    assert heads["purchase"].head.bias.grad is None


def test_aitm_attends_to_what_the_step_before_knows() -> None:
    transfer = Transfer(1)
    with torch.no_grad():
        transfer.carry.weight.fill_(1.0)
        transfer.carry.bias.zero_()
        transfer.value.weight.fill_(2.0)
        transfer.query.weight.fill_(2.0)
        transfer.key.weight.fill_(LN3 / (100 - 4) / 2)
    # u is 2 (own) and 10 (carried); <Qu, Ku> is c · 4 and c · 100 with c = ln 3 / 96: weights 1/4 and 3/4; V doubles
    assert float(transfer(torch.tensor([2.0]), torch.tensor([10.0]))) == pytest.approx(2 * (1 / 4 * 2 + 3 / 4 * 10), rel=1e-5)


def test_aitms_second_step_reads_the_first_and_the_third_what_the_second_made_of_it() -> None:
    chains, heads = funnel("aitm")
    shared = {n: torch.randn(4, 1) for n in STEPS}
    read = chains(shared, heads)
    cart = chains.transfers["cart"](shared["cart"], shared["click"])
    torch.testing.assert_close(read["cart"][:, :1], cart)
    torch.testing.assert_close(read["purchase"][:, :1], chains.transfers["purchase"](shared["purchase"], cart))
    torch.testing.assert_close(heads["cart"].predict(read["cart"]), torch.sigmoid(heads["cart"].head(cart)[:, 0]))


def test_aitms_calibrator_costs_what_exceeds_the_step_before() -> None:
    task = binary(depends_on="click", chain="aitm", calibration=0.5)
    # p = 3/4 after 1/2 (too much by 1/4), and p = 1/4 after 3/4
    expected = -math.log(3 / 4) + 0.5 * 1 / 4 - math.log(3 / 4)
    assert loss_of(task, [[LN3, 0.0], [-LN3, LN3], [9.0, 0.0]], [1.0, 0.0, NAN]) == pytest.approx(expected, rel=1e-6)


# ------------------------------------------------------------------ in the recommender


def funnel_config(folder: Path, chain: str, turned: bool = False) -> RunConfig:
    def change(raw: dict[str, Any]) -> None:
        raw["data"]["labels"] |= {
            "rated": {"expression": "present(rating)", "kind": "binary"},
            "liked": {"expression": "present(rating) and rating >= 4", "kind": "binary"},
        }
        raw["model"]["sharing"] = "mmoe"
        raw["tasks"]["rated"] = {"kind": "binary", "label": "rated", "depends_on": "click", "chain": chain}
        raw["tasks"]["liked"] = {"kind": "binary", "label": "liked", "depends_on": "rated", "chain": chain, "final_weight": 1}
        raw["train"]["epochs"] = 1
        if turned:
            raw["tasks"] = dict(reversed(raw["tasks"].items()))

    return tiny.make_config(folder, change)


@pytest.fixture(scope="module")
def data(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> storage.Directory:
    return tiny.prepare_locally(funnel_config(tiny_folder, "esmm"), tmp_path_factory.mktemp("funnel"))


def batch_of(data: storage.Directory, model: Recommender) -> Batch:
    cache = WindowCache.from_table(storage.read_table(data.path("windows", "train")))
    return collate(cache, np.arange(6), model.schema)


@pytest.mark.parametrize("chain", ["esmm", "aitm"])
def test_a_funnel_is_trained_bundled_and_served(chain: str, tiny_folder: Path, data: storage.Directory, tmp_path: Path) -> None:
    config = funnel_config(tiny_folder, chain)
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / "bundle")
    history = PreparedHistories(data.root).get("u3")
    assert history is not None
    answer = predictor.recommend([history], 20)[0]["items"]
    assert len(answer) > 3
    for item in answer:
        tasks = item["tasks"]
        assert 0 < tasks["liked"] < 1
        assert item["score"] == pytest.approx(
            tasks["retrieval"] + math.log(tasks["liked"] / (1 - tasks["liked"])), rel=1e-4, abs=1e-4
        )
        if chain == "esmm":
            assert tasks["liked"] < tasks["rated"] < tasks["click"]


@pytest.mark.parametrize("chain", ["esmm", "aitm"])
def test_the_losses_of_a_funnel_do_not_depend_on_the_order_of_tasks(chain: str, tiny_folder: Path, data: storage.Directory) -> None:
    schema = load_schema(data.prefix)
    model = build_model(funnel_config(tiny_folder, chain), schema, None).train()
    other = build_model(funnel_config(tiny_folder, chain, turned=True), schema, None).train()
    state = model.state_dict()
    pointwise, turned = list(model.pointwise), list(other.pointwise)
    order = [pointwise.index(n) for n in turned]
    state["sharing.gate.weight"] = state["sharing.gate.weight"][order]  # the rows of the gates go by the tasks' order
    state["sharing.gate.bias"] = state["sharing.gate.bias"].view(len(order), -1)[order].flatten()
    other.load_state_dict(state)
    batch = batch_of(data, model)
    torch.testing.assert_close(torch.stack(other(batch)[0]), torch.stack(model(batch)[0]).flip(0))


def test_the_gradient_of_the_last_step_reaches_the_first_head(tiny_folder: Path, data: storage.Directory) -> None:
    model = build_model(funnel_config(tiny_folder, "esmm"), load_schema(data.prefix), None).train()
    loss_T = torch.stack(model(batch_of(data, model))[0])
    loss_T[[t.name for t in model.task_list].index("liked")].backward()
    for name in ("click", "rated", "liked"):
        gradient = model.get_parameter(f"tasks.{name}.head.weight").grad
        assert gradient is not None and gradient.any()
    gradient = model.get_parameter("tasks.rating.head.weight").grad
    assert gradient is not None and not gradient.any()


# ------------------------------------------------------------------ refused at load


def refused(folder: Path, tasks: dict[str, dict[str, Any]]) -> str:
    with pytest.raises(ConfigError) as error:
        tiny.make_config(
            folder, lambda raw: raw["tasks"].update({n: {"kind": "binary", "label": "click"} | t for n, t in tasks.items()})
        )
    return str(error.value)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"buy": {"depends_on": "clik"}}, "tasks.buy.depends_on: 'clik' is not a task; the binary ones are ['click']"),
        ({"buy": {"depends_on": "rating"}}, "tasks.buy.depends_on: 'rating' is of kind regression; the binary tasks are ['click']"),
        ({"buy": {"depends_on": "buy"}}, "tasks.buy.depends_on: the task itself; name the task before it, one of ['click']"),
        ({"buy": {"chain": "aitm"}}, "tasks.buy.chain: aitm needs depends_on"),
        ({"buy": {"depends_on": "click", "chain": "mmoe"}}, "tasks.buy.chain: Input should be 'esmm' or 'aitm'"),
        ({"buy": {"depends_on": "cart"}, "cart": {"depends_on": "pay"}, "pay": {"depends_on": "cart"}},
         "tasks.buy.depends_on: a cycle, cart → pay → cart; the first step of a funnel depends on nothing"),
        ({"buy": {"loss": "hinge"}}, "tasks.buy.loss: Input should be 'bce' or 'focal'"),
        ({"buy": {"positive_weight": 0}}, "tasks.buy.positive_weight: Input should be greater than 0"),
        ({"buy": {"loss": "focal", "focal_gamma": -1}}, "tasks.buy.focal_gamma: Input should be greater than or equal to 0"),
        ({"buy": {"depends_on": "click", "calibration": -1}}, "tasks.buy.calibration: Input should be greater than or equal to 0"),
    ],
)  # fmt: skip
def test_impossible_chains_are_refused_with_the_key_and_the_cure(
    tmp_path: Path, tasks: dict[str, dict[str, Any]], message: str
) -> None:
    assert message in refused(tmp_path, tasks)
