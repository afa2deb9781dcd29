"""Sharing layers against values computed by hand, and what holds for all of them.

By hand: gelu(x) is x to seven digits from 10 on, a gate of logits (ln 3, 0) is (3/4, 1/4), and 2 · sigmoid(ln 3) is 3/2.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, ModelConfig, RunConfig
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.models.sharing import CGC, PLE, SHARING, Inputs, MMoE, PEPNet, SharedBottom, Sharing, build_sharing
from mtrec_ray.models.sharing.base import MANY
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.training.feed import WindowCache, collate
from mtrec_ray.training.loop import build_optimizer
from mtrec_ray.training.worker import build_model, load_schema
from tests import tiny
from tests.conftest import TinyRun

KINDS = sorted(SHARING)
LN3 = math.log(3)
STATE = torch.tensor([[1.0, 1.0, 0.0, 0.0]])  # its numbers sum to 2, those of the item to 3, those of the product to 1
ITEM = torch.tensor([[1.0, 0.0, 2.0, 0.0]])
NO_CONTEXT = torch.zeros(1, 0)
OF_STATE, OF_ITEM, OF_PRODUCT = (torch.eye(3).repeat_interleave(4, dim=1)[i] for i in range(3))
"""Rows of a first layer that sum a part of x."""


def config_of(kind: str, **values: Any) -> ModelConfig:
    return ModelConfig(width=4, sharing=kind, dropout=0.0, **values)  # type: ignore[arg-type]


def fill(module: nn.Module, **values: Any) -> None:
    """All parameters zero but those given: name_with_double__underscores=values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        for name, value in values.items():
            parameter = module.get_parameter(name.replace("__", "."))
            parameter.copy_(torch.as_tensor(value).reshape(parameter.shape))


def numbers(layer: Sharing) -> list[float]:
    return [round(float(v.detach()), 4) for v in layer(STATE, ITEM, NO_CONTEXT).values()]


def inputs(rows: int, context: int = 3, width: int = 4) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    return torch.randn(rows, width), torch.randn(rows, width), torch.randn(rows, context)


# ------------------------------------------------------------------ by hand


def test_mmoe_mixes_the_experts_by_the_gate_of_each_task() -> None:
    layer = MMoE(config_of("mmoe", sharing_width=1, experts=2), ["a", "b"], 0)
    experts = torch.stack([10 * OF_STATE, 10 * OF_ITEM])  # 20 and 30, then times 1 and times 2
    gate = torch.zeros(2, 2, 12)
    gate[1, 1] = LN3 * OF_PRODUCT
    fill(layer, first__weight=experts, second__weight=[1.0, 2.0], gate__weight=gate, gate__bias=[LN3, 0.0, 0.0, 0.0])
    assert numbers(layer) == [3 / 4 * 20 + 1 / 4 * 60, 1 / 4 * 20 + 3 / 4 * 60]


def private_and_shared(**more: Any) -> dict[str, Any]:
    """First level: the private experts are 20 for a and 30 for b, the shared one is 10; a weighs 3 : 1, b weighs 1 : 4."""
    return {
        "levels__0__private_first__weight": torch.stack([10 * OF_STATE, 10 * OF_ITEM]),
        "levels__0__private_second__weight": [1.0, 1.0],
        "levels__0__shared_first__weight": 10 * OF_PRODUCT,
        "levels__0__shared_second__weight": [1.0],
        "levels__0__gate__bias": [LN3, 0.0, 0.0, math.log(4)],
        **more,
    }


def test_cgc_mixes_a_tasks_private_experts_with_the_shared_ones() -> None:
    layer = CGC(config_of("cgc", sharing_width=1, experts=1), ["a", "b"], 0)
    fill(layer, **private_and_shared())
    assert numbers(layer) == [3 / 4 * 20 + 1 / 4 * 10, 1 / 5 * 30 + 4 / 5 * 10]


def test_ple_hands_the_mix_of_all_experts_to_the_shared_experts_of_the_next_level() -> None:
    layer = PLE(config_of("ple", sharing_width=1, experts=1, sharing_layers=2), ["a", "b"], 0)
    a, b, shared = 17.5, 14.0, 1 / 4 * 20 + 1 / 4 * 30 + 1 / 2 * 10
    second = {
        "levels__0__shared_gate__bias": [0.0, 0.0, math.log(2)],
        "levels__1__private_first__weight": [1.0, 1.0],
        "levels__1__private_second__weight": [1.0, 2.0],
        "levels__1__shared_first__weight": [1.0],
        "levels__1__shared_second__weight": [3.0],
    }
    fill(layer, **private_and_shared(**second))
    assert numbers(layer) == [(a + 3 * shared) / 2, (2 * b + 3 * shared) / 2]


def test_pepnet_scales_the_input_and_then_each_hidden_layer_of_each_task() -> None:
    layer = PEPNet(config_of("pepnet", sharing_width=1), ["a", "b"], 0)
    fill(
        layer,
        input_gate__second__bias=[LN3] * 12,  # everything times 1.5
        tower_1__weight=torch.stack([10 * OF_STATE, 10 * OF_ITEM]),
        tower_2__weight=[1.0, 4.0],
        gate_1__second__bias=[0.0, -LN3],  # a times 1, b times 0.5
        gate_2__first__weight=torch.cat([torch.full((4,), LN3 / 2), torch.zeros(16)]),  # reads the state's sum, 2
        gate_2__second__weight=[1.0, 0.0],  # a times 1.5, b times 1
    )
    assert numbers(layer) == [1.5 * 1.5 * 20, 4 * 0.5 * 1.5 * 30]


def test_pepnets_gates_choose_but_do_not_teach_state_and_item() -> None:
    layer = PEPNet(config_of("pepnet", sharing_width=3), ["a", "b"], 3)
    with torch.no_grad():
        layer.tower_1.weight[:, :12] = 0  # the towers read the context alone: state and item act through the gates
    state, item, context = (t.requires_grad_() for t in inputs(5))
    out = torch.stack(list(layer(state, item, context).values()))
    out.sum().backward()
    assert state.grad is not None and not state.grad.any() and item.grad is not None and not item.grad.any()
    assert context.grad is not None and context.grad.any()
    moved = torch.stack(list(layer(state + 1, item, context).values()))
    assert not torch.allclose(moved, out)


# ------------------------------------------------------------------ relations


def test_mmoe_with_one_expert_is_the_shared_bottom() -> None:
    bottom = SharedBottom(config_of("shared_bottom"), ["a", "b"], 3)
    layer = MMoE(config_of("mmoe", experts=1), ["a", "b"], 3)
    first, second = bottom.layers[0], bottom.layers[3]
    with torch.no_grad():
        for stacked, linear in ((layer.first, first), (layer.second, second)):
            stacked.weight[0] = linear.weight
            stacked.bias.copy_(linear.bias)
    expected = bottom(*inputs(7))
    for name, values in layer(*inputs(7)).items():
        torch.testing.assert_close(values, expected[name])


def test_ple_with_one_level_is_cgc() -> None:
    values = {"experts": 2, "task_experts": 3}
    ple, cgc = PLE(config_of("ple", sharing_layers=1, **values), ["a", "b"], 3), CGC(config_of("cgc", **values), ["a", "b"], 3)
    ple.load_state_dict(cgc.state_dict())
    expected = cgc(*inputs(7))
    for name, out in ple(*inputs(7)).items():
        torch.testing.assert_close(out, expected[name])


def test_gates_sum_to_one() -> None:
    x = Inputs(*inputs(7))
    mmoe = MMoE(config_of("mmoe", experts=3), ["a", "b"], 3)
    cgc = CGC(config_of("cgc", experts=3, task_experts=2), ["a", "b"], 3)
    ple = PLE(config_of("ple", experts=3, task_experts=2), ["a", "b"], 3)
    first: Any = ple.levels[0]
    for gates, shape in (
        (mmoe.gates(x), (7, 2, 3)),
        (cgc.levels[0].gates(x), (7, 2, 5)),  # type: ignore[operator]
        (first.weights(x), (7, 3, 7)),  # rows a, b and the shared stream; columns 2 + 2 private experts, 3 shared ones
    ):
        assert gates.shape == shape and (gates >= 0).all()
        torch.testing.assert_close(gates.sum(-1), torch.ones(shape[:-1]))


@pytest.mark.parametrize("kind", ["cgc", "ple"])
def test_private_experts_learn_nothing_from_another_tasks_loss(kind: str) -> None:
    layer: Any = build_sharing(config_of(kind, sharing_width=3, task_experts=2), ["a", "b"], 3)
    layer(*inputs(9))["a"].sum().backward()
    last = layer.levels[-1]
    first, second = last.private_first.weight.grad, last.private_second.weight.grad
    assert first[0].any() and not first[1].any()
    assert second[:2].any() and not second[2:].any()
    assert last.gate.weight.grad[0].any() and not last.gate.weight.grad[1].any()


# ------------------------------------------------------------------ what holds for all


@pytest.mark.parametrize("tasks", [["a"], ["a", "b", "c"]])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_when_every_task_has_labels(kind: str, tasks: list[str]) -> None:
    layer = build_sharing(config_of(kind, sharing_width=8), tasks, 3)
    out = layer(*inputs(50))
    assert list(out) == tasks and all(v.shape == (50, 8) for v in out.values())
    sum((v * torch.randn(50, 8)).sum() for v in out.values()).backward()  # type: ignore[union-attr]
    assert not [n for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("kind", KINDS)
def test_no_target_gives_a_gradient_of_zero(kind: str) -> None:
    layer = build_sharing(config_of(kind), ["a", "b"], 3)
    out = layer(*inputs(0))
    sum(v.sum() for v in out.values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("items", [1, 5, MANY + 3])
@pytest.mark.parametrize("kind", KINDS)
def test_one_state_for_many_items_gives_what_a_state_for_each_gives(kind: str, items: int, context: int) -> None:
    layer = build_sharing(ModelConfig(width=16, sharing=kind, dropout=0.0), ["a", "b"], context).double()
    torch.manual_seed(2)
    state, item, request = (torch.randn(3, n, w, dtype=torch.double) for n, w in ((1, 16), (items, 16), (1, context)))
    out = layer(state, item, request)
    flat = layer(*(t.expand(3, items, -1).reshape(3 * items, t.shape[-1]) for t in (state, item, request)))
    for name, values in out.items():
        torch.testing.assert_close(values.reshape(3 * items, -1), flat[name])


@pytest.mark.parametrize("kind", KINDS)
def test_no_bias_has_weight_decay(kind: str) -> None:
    layer = build_sharing(config_of(kind), ["a", "b"], 3)
    assert {p.ndim for n, p in layer.named_parameters() if n.endswith("bias")} == {1}
    assert all(p.ndim > 1 for n, p in layer.named_parameters() if n.endswith("weight"))


# ------------------------------------------------------------------ in the recommender


def run_config(folder: Path, kind: str, chain: str = "esmm") -> RunConfig:
    """Click, liked after a click, and a rating."""

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["labels"]["liked"] = {"expression": "present(rating) and rating >= 4", "kind": "binary"}
        raw["model"] |= {"sharing": kind, "experts": 2}
        raw["tasks"]["liked"] = {"kind": "binary", "label": "liked", "depends_on": "click", "chain": chain}
        raw["train"]["epochs"] = 1

    return tiny.make_config(folder, change)


@pytest.fixture(scope="module")
def liked(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> storage.Directory:
    """The tiny data with the label `liked`."""
    return tiny.prepare_locally(run_config(tiny_folder, "mmoe"), tmp_path_factory.mktemp("liked"))


def gradients(model: Recommender, data: storage.Directory, targets: bool) -> dict[str, torch.Tensor | None]:
    """Of a batch, with its targets or without any."""
    cache = WindowCache.from_table(storage.read_table(data.path("windows", "train")))
    batch = collate(cache, np.arange(8), model.schema)
    if not targets:
        t = batch.targets
        t.window_M, t.pos_M, t.item_M, t.positive_M = t.window_M[:0], t.pos_M[:0], t.item_M[:0], t.positive_M[:0]
        t.labels_M, t.context_M = ({k: v[:0] for k, v in d.items()} for d in (t.labels_M, t.context_M))
    torch.stack(model.train()(batch)[0]).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["esmm", "aitm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_takes_part_with_and_without_targets(
    kind: str, chain: str, tiny_folder: Path, liked: storage.Directory
) -> None:
    """DDP waits for the gradient of every parameter on every rank."""
    for targets in (True, False):
        model = build_model(run_config(tiny_folder, kind, chain), load_schema(liked.prefix), None)
        found = gradients(model, liked, targets)
        assert not [n for n, g in found.items() if g is None or not torch.isfinite(g).all()]
        if not targets:
            pointwise = ("sharing.", "chains.", "request_context.", "tasks.click.", "tasks.liked.", "tasks.rating.")
            assert not [n for n, g in found.items() if n.startswith(pointwise) and g is not None and g.any()]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_of_every_sharing_layer_answers_as_its_model(
    kind: str, tiny_folder: Path, liked: storage.Directory, tmp_path: Path
) -> None:
    config = run_config(tiny_folder, kind, "aitm" if kind == "ple" else "esmm")
    model = tiny.train_locally(config, liked)
    predictor = tiny.write_bundle(config, liked, model, tmp_path / "bundle")
    history = PreparedHistories(liked.root).get("u3")
    assert history is not None
    state_BD = predictor.encode_state(predictor.encode_histories([history, history]).batch)
    K = len(predictor.item_ids)
    item_BK = torch.arange(K).repeat(2, 1)
    context = predictor.encode_context([{"device": "phone"}, {"device": "web"}])
    found = predictor.score(state_BD, item_BK, context)
    with torch.no_grad():
        item_vec = model.item_vectors()[item_BK.flatten()]
        each = {n: v.repeat_interleave(K, dim=0) for n, v in context.items()}
        expected = model.predict(model.share(state_BD.repeat_interleave(K, dim=0), item_vec, each))
    assert set(found) == {"click", "rating", "liked"}
    for name, values in found.items():
        torch.testing.assert_close(values.flatten(), expected[name], rtol=1e-4, atol=1e-5)
    one = predictor.score(state_BD, item_BK[:, :1], context)
    torch.testing.assert_close(one["rating"], found["rating"][:, :1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_pointwise_task_there_is_no_layer_and_all_the_rest_works(
    kind: str, tiny_folder: Path, tiny_run: TinyRun, tmp_path: Path
) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["model"]["sharing"] = kind
        del raw["tasks"]["click"], raw["tasks"]["rating"]
        raw["train"]["epochs"] = 1

    config = tiny.make_config(tiny_folder, change)
    model = build_model(config, load_schema(tiny_run.data.prefix), None)
    assert not list(model.sharing.parameters()) and not list(model.request_context.parameters())
    assert not [n for n, g in gradients(model, tiny_run.data, True).items() if g is None]
    predictor = tiny.write_bundle(config, tiny_run.data, model, tmp_path / "bundle")
    history = PreparedHistories(tiny_run.data.root).get("u3")
    assert history is not None
    assert set(predictor.recommend([history], 3)[0]["items"][0]["tasks"]) == {"retrieval"}
    assert build_optimizer(model, config.train)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("sharing", "moe", "model.sharing: Input should be"),
        ("experts", 0, "model.experts: Input should be greater than or equal to 1"),
        ("task_experts", 0, "model.task_experts: Input should be greater than or equal to 1"),
        ("sharing_layers", 0, "model.sharing_layers: Input should be greater than or equal to 1"),
    ],
)
def test_impossible_layers_are_refused_with_the_key(tmp_path: Path, key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        tiny.make_config(tmp_path, lambda raw: raw["model"].update({key: value}))
