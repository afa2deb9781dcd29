"""Losses against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtrec_ray.config import BinaryTask
from mtrec_ray.models.batch import Batch, HistoryBatch, TargetBatch
from mtrec_ray.models.item_tower import ItemVectors
from mtrec_ray.schema import LabelStats
from mtrec_ray.tasks import Binary, Forward, Profile, Regression, Retrieval, Similarity
from mtrec_ray.tasks.wide import Bags, Wide

NAN = float("nan")


def make_batch(
    pos: list[int], item: list[int], positive: list[bool], labels: list[float], window: list[int] | None = None
) -> Batch:
    n = len(pos)
    return Batch(
        history=HistoryBatch(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 1]), *torch.zeros(2, 2, 3, dtype=torch.long)),
        targets=TargetBatch(
            window_M=torch.tensor(window or [0] * n),
            pos_M=torch.tensor(pos),
            item_M=torch.tensor(item),
            positive_M=torch.tensor(positive),
            labels_M={"y": torch.tensor(labels)},
            context_M={},
        ),
        profile_B={"taste": torch.tensor([1, 0])},
        profile_weight_B=torch.tensor([0.5, 1.0]),
        pair_anchor_P=torch.tensor([0]),
        pair_positive_P=torch.tensor([1]),
    )


def make_forward(shared: torch.Tensor | None = None) -> Forward:
    torch.manual_seed(0)
    return Forward(
        torch.randn(2, 4, 2),
        ItemVectors(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])),
        {} if shared is None else {"t": shared},
    )


def test_retrieval_is_log_softmax_over_the_catalogue_summed_over_positives() -> None:
    task = Retrieval("r", 2, exclude_seen=False)
    forward = make_forward()
    # two positives of one moment, one non-positive, one positive of another window
    batch = make_batch([1, 1, 2, 0], [0, 2, 1, 1], [True, True, False, True], [NAN] * 4, [0, 0, 0, 1])
    assert int(task.count(batch)) == 3
    expected = 0.0
    for window, pos, item in ((0, 1, 0), (0, 1, 2), (1, 0, 1)):
        logits = (task.query(forward.state_BLD[window, pos]) @ forward.items.vec_UD.T).tolist()
        expected += math.log(sum(math.exp(v) for v in logits)) - logits[item]
    assert float(task.loss_sum(forward, batch)) == pytest.approx(expected, rel=1e-5)


def test_with_exclude_seen_the_visible_history_leaves_the_denominator_but_never_a_target() -> None:
    task = Retrieval("r", 2, exclude_seen=True)
    forward = make_forward()
    batch = make_batch([0, 1, 3, 2], [1, 1, 2, 0], [True, True, True, True], [NAN] * 4, [0, 0, 0, 0])
    batch.history.item_BS = torch.tensor([[0, 1, 2], [2, 0, 0]])  # the second window's padding is item 0 and masks nothing
    # position -> (target, items left in the denominator); position 3 sees 0, 1 and its own target, 2
    left = {0: (1, [0, 1, 2]), 1: (1, [1, 2]), 3: (2, [2]), 2: (0, [0, 2])}
    expected = 0.0
    for pos, (item, denominator) in left.items():
        logits = (task.query(forward.state_BLD[0, pos]) @ forward.items.vec_UD.T).tolist()
        expected += math.log(sum(math.exp(logits[i]) for i in denominator)) - logits[item]
    assert float(task.loss_sum(forward, batch)) == pytest.approx(expected, rel=1e-5)
    alone = make_batch([1], [1], [True], [NAN], [1])
    alone.history.item_BS = batch.history.item_BS
    logits = (task.query(forward.state_BLD[1, 1]) @ forward.items.vec_UD.T).tolist()
    rest = math.log(sum(math.exp(logits[i]) for i in (0, 1)))
    assert float(task.loss_sum(forward, alone)) == pytest.approx(rest - logits[1], rel=1e-5)


def test_a_missing_label_is_masked_not_zero() -> None:
    shared = torch.randn(3, 4)
    batch = make_batch([0, 1, 2], [0, 1, 2], [True] * 3, [1.0, NAN, 0.0])
    keep = make_batch([0, 2], [0, 2], [True] * 2, [1.0, 0.0])
    for task in (
        Binary("t", BinaryTask(kind="binary", label="y"), 4),
        Regression("t", "y", LabelStats(count=3, mean=2.0, std=0.5), 4),
    ):
        assert int(task.count(batch)) == 2
        whole = task.loss_sum(make_forward(shared), batch)
        torch.testing.assert_close(whole, task.loss_sum(make_forward(shared[[0, 2]]), keep))


def test_regression_predicts_in_the_labels_units_and_final_is_standardised() -> None:
    task = Regression("t", "y", LabelStats(count=3, mean=3.5, std=2.0), 4)
    torch.nn.init.zeros_(task.head.weight)
    torch.nn.init.constant_(task.head.bias, 0.25)
    prediction = task.predict(torch.randn(5, 4))
    torch.testing.assert_close(prediction, torch.full((5,), 4.0))
    torch.testing.assert_close(task.final(prediction), torch.full((5,), 0.25))
    batch = make_batch([0], [0], [True], [5.5])
    assert float(task.loss_sum(make_forward(torch.zeros(1, 4)), batch)) == pytest.approx((0.25 - 1.0) ** 2)


def test_binary_loss_by_hand_and_final_is_the_logit() -> None:
    task = Binary("t", BinaryTask(kind="binary", label="y"), 1)
    torch.nn.init.ones_(task.head.weight)
    torch.nn.init.zeros_(task.head.bias)
    batch = make_batch([0, 1], [0, 1], [True, True], [1.0, 0.0])
    loss = task.loss_sum(make_forward(torch.tensor([[0.0], [2.0]])), batch)
    assert float(loss) == pytest.approx(math.log(2) + math.log(1 + math.exp(2)), rel=1e-6)
    torch.testing.assert_close(task.final(task.predict(torch.tensor([[1.5]]))), torch.tensor([1.5]))


def test_similarity_leaves_the_anchor_out_of_the_denominator() -> None:
    task = Similarity("s", 2, temperature=0.5)
    with torch.no_grad():
        task.project.weight.copy_(torch.eye(2))
    batch = make_batch([0], [0], [True], [NAN])
    loss = float(task.loss_sum(make_forward(), batch))  # anchor 0, positive 1; candidates 1 (cos 0) and 2 (cos 1/√2)
    assert loss == pytest.approx(math.log(1 + math.exp(math.sqrt(0.5) / 0.5)), rel=1e-5)


def test_profile_reads_each_windows_last_state_with_its_weight() -> None:
    task = Profile("p", "taste", ("a", "b"), 2, 3)
    forward = make_forward()
    batch = make_batch([0], [0], [True], [NAN])
    assert float(task.count(batch)) == 1.5
    ce = torch.nn.functional.cross_entropy
    with torch.no_grad():
        task.wide.weight.weight.normal_()
        task.head.weight.normal_()
    task.eval()  # no dropout
    batch.history.item_BS = torch.tensor([[0, 1, 0], [2, 0, 0]])
    expected = task.wide_penalty * 1.5 * (task.wide.penalty() + 0.5 * 300 * task.head.weight.square().sum())
    for window, last, items, weight, label in ((0, 3, [0, 1], 0.5, 1), (1, 1, [2], 1.0, 0)):
        bags, state = Bags.of_lists([np.array(items)]), forward.state_BLD[window, last][None]
        alone = task.wide(bags) + task.bias
        expected = expected + weight * (ce(task.logits(state, bags)[0], torch.tensor(label)) + ce(alone[0], torch.tensor(label)))
    torch.testing.assert_close(task.loss_sum(forward, batch), expected)


def test_the_deep_term_of_a_profile_moves_no_weight_of_the_wide_one() -> None:
    """The wide term is what tf-idf logistic regression would be, whatever the states say."""
    grads = []
    for scale in (0.0, 5.0):
        task = Profile("p", "taste", ("a", "b"), 2, 3).eval()
        torch.nn.init.constant_(task.head.weight, scale)
        task.head.weight.data[0] *= -1
        task.loss_sum(make_forward(), make_batch([0], [0], [True], [NAN])).backward()
        grads.append(task.wide.weight.weight.grad)
    torch.testing.assert_close(grads[0], grads[1])


def test_the_wide_term_is_linear_in_the_tf_idf_of_the_bag() -> None:
    wide = Wide(3, 1)
    wide.count_items(np.array([9, 4, 0]))
    idf = 1 + np.log(10 / np.array([10, 5, 1]))
    with torch.no_grad():
        wide.weight.weight.copy_(torch.tensor([[1.0], [10.0], [100.0]]))
    found = wide(Bags.of_lists([np.array([0, 2]), np.array([], np.int64), np.array([1, 7])]))  # 7 has no training event
    expected = [[10 * (idf[0] + 100 * idf[2]) / np.hypot(idf[0], idf[2])], [0.0], [100.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_a_masked_user_trains_no_profile() -> None:
    task = Profile("p", "taste", ("a", "b"), 2, 3)
    batch = make_batch([0], [0], [True], [NAN])
    batch.profile_B["taste"] = torch.tensor([-1, -1])
    assert float(task.count(batch)) == 0
    assert float(task.loss_sum(make_forward(), batch)) == 0


def test_every_task_takes_a_batch_without_its_labels() -> None:
    """A rank without labels takes part with a zero that has gradients (else DDP hangs)."""
    shared = torch.randn(1, 4, requires_grad=True)
    batch = make_batch([0], [0], [False], [NAN])
    batch.profile_B["taste"] = torch.tensor([-1, -1])
    batch.pair_anchor_P = batch.pair_positive_P = torch.zeros(0, dtype=torch.long)
    stats = LabelStats(count=1, mean=0.0, std=1.0)
    tasks = [
        Retrieval("r", 2, exclude_seen=False),
        Binary("t", BinaryTask(kind="binary", label="y"), 4),
        Regression("t", "y", stats, 4),
        Similarity("s", 2, 0.1),
        Profile("p", "taste", ("a", "b"), 2, 3),
    ]
    for task in tasks:
        loss = task.loss_sum(make_forward(shared), batch)
        assert float(loss) == 0
        loss.backward()
        for name, parameter in task.named_parameters():
            assert parameter.grad is not None and float(parameter.grad.abs().sum()) == 0, (task.name, name)
