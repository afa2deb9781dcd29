"""Every trunk keeps the contract of mtrec_ray/models/trunks/base.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.dropout import Dropout
from mtrec_ray.models.trunks import TRUNKS, Trunk, WindowFullError, build_trunk
from mtrec_ray.models.trunks.base import Scope
from mtrec_ray.models.trunks.hstu import BUCKETS, START, HstuLayer, time_bucket
from mtrec_ray.models.trunks.ligr import LigrLayer

L, D, B = 9, 8, 4
DAY = 86_400_000
every_trunk = pytest.mark.parametrize("name", TRUNKS)


def make(name: str, **changes: object) -> Trunk:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {"trunk": name, "width": D, "layers": 2, "heads": 2, "feed_forward": 12, "dropout": 0.0, **changes}
    )
    trunk = build_trunk(config, L)
    for parameter in trunk.parameters():  # far from the start, where much is almost zero or one
        torch.nn.init.normal_(parameter, std=0.5)
    return trunk.eval()


def histories(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """token_BSD, time_BS with ties and long gaps, length_B from nothing to a full window."""
    generator = torch.Generator().manual_seed(seed)
    token = torch.randn(B, L - 1, D, generator=generator)
    gap = torch.tensor([0, 1, 999, 60_000, DAY, 400 * DAY])[torch.randint(0, 6, (B, L - 1), generator=generator)]
    return token, 1_700_000_000_000 + gap.cumsum(1), torch.tensor([0, 3, L - 1, 5])


def one_scope(length: int) -> Scope:
    zero = torch.zeros(1, length, dtype=torch.long)
    return Scope(torch.arange(length)[None], zero, zero, None, append=False)


@every_trunk
def test_a_state_is_given_at_every_position(name: str) -> None:
    token, time, _ = histories()
    trunk = make(name)
    for S in (0, 1, L - 1):
        assert trunk(token[:, :S], time[:, :S]).shape == (B, S + 1, D)
    with pytest.raises(AssertionError, match="do not fit"):
        trunk(torch.cat([token, token], 1), torch.cat([time, time], 1))


@every_trunk
def test_later_events_and_their_times_leave_earlier_states_alone(name: str) -> None:
    token, time, _ = histories()
    trunk = make(name)
    before = trunk(token, time)
    for s in range(L - 1):
        changed, later = token.clone(), time.clone()
        changed[:, s:] += torch.randn(B, L - 1 - s, D)
        later[:, s:] += DAY
        after = trunk(changed, later)
        torch.testing.assert_close(after[:, : s + 1], before[:, : s + 1])
        assert not torch.isclose(after[:, s + 1], before[:, s + 1]).all(-1).any()


@every_trunk
def test_padding_never_changes_a_state(name: str) -> None:
    token, time, length = histories()
    trunk = make(name)
    padded = trunk(token, time)
    for row, n in enumerate(length.tolist()):
        alone = trunk(token[row : row + 1, :n], time[row : row + 1, :n])
        torch.testing.assert_close(padded[row : row + 1, : n + 1], alone, rtol=1e-5, atol=1e-5)


@every_trunk
def test_appending_one_event_equals_the_pass_over_the_whole_history(name: str) -> None:
    token, time, length = histories()
    trunk = make(name)
    whole = trunk(token, time)
    rows = torch.arange(B)
    with torch.no_grad():
        state, cache = trunk.prefill(token[:, :0], time[:, :0], torch.zeros(B, dtype=torch.long))
        torch.testing.assert_close(state, whole[:, 0], rtol=1e-5, atol=1e-5)
        for s in range(L - 1):
            state = trunk.append(token[:, s], time[:, s], cache)
            torch.testing.assert_close(state, whole[:, s + 1], rtol=1e-5, atol=1e-5)
        assert cache.full_B.all()
        # histories of different lengths, padded, then appended to together
        dirty = token.clone()
        dirty[rows[:, None], torch.arange(L - 1)[None]] = torch.where(
            torch.arange(L - 1)[None, :, None] < length[:, None, None], token, torch.full_like(token, 7.0)
        )
        fits = torch.tensor([0, 1, 3])
        state, cache = trunk.prefill(dirty[fits], time[fits], length[fits])
        torch.testing.assert_close(state, whole[fits, length[fits]], rtol=1e-5, atol=1e-5)
        for step in range(L - 1 - 5):
            place = length[fits] + step
            state = trunk.append(token[fits, place], time[fits, place], cache)
            torch.testing.assert_close(state, whole[fits, place + 1], rtol=1e-5, atol=1e-5)


@every_trunk
def test_a_full_window_refuses_another_event_and_stays_as_it_was(name: str) -> None:
    token, time, length = histories()
    trunk = make(name)
    with torch.no_grad():
        _, cache = trunk.prefill(token, time, length)
        kept = [k.clone() for k in cache.key]
        assert cache.full_B.tolist() == [False, False, True, False]
        with pytest.raises(WindowFullError, match=r"rows \[2\] hold 8 events"):
            trunk.append(token[:, 0], time[:, 0], cache)
    assert all(torch.equal(a, b) for a, b in zip(kept, cache.key, strict=True)) and cache.length_B.tolist() == [1, 4, 9, 6]


@every_trunk
def test_every_parameter_has_a_gradient(name: str) -> None:
    token, time, _ = histories()
    trunk = make(name).train()
    token.requires_grad_()
    state = trunk(token, time)
    (state * torch.randn_like(state)).sum().backward()
    assert token.grad is not None and token.grad.abs().sum() > 0
    for parameter_name, parameter in trunk.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@every_trunk
def test_dropout_acts_in_training_alone(name: str) -> None:
    token, time, _ = histories()
    trunk = make(name, dropout=0.5)
    assert torch.equal(trunk(token, time), trunk(token, time))
    trunk.train()
    assert not torch.equal(trunk(token, time), trunk(token, time))


def test_hstu_reads_differences_of_times_and_not_times() -> None:
    token, time, _ = histories()
    trunk = make("hstu")
    state = trunk(token, time)
    assert torch.equal(trunk(token, time + 977 * DAY + 13), state)
    assert not torch.allclose(trunk(token, time * 2)[:, -1], state[:, -1])
    for name in ("sasrec", "ligr"):
        assert torch.equal(make(name)(token, time), make(name)(token, time * 2))


def test_a_shift_of_the_start_tokens_time_means_nothing_to_hstu() -> None:
    token, time, _ = histories()
    trunk = make("hstu")
    scope_times = time - time[:, :1]  # the first event at 0, which is what stands for the start token
    assert torch.equal(trunk(token, scope_times), trunk(token, time))


def test_buckets_of_time_by_hand() -> None:
    seconds = torch.tensor([0, 0.4, 1, 3, 7, 86_399, 10.0**12], dtype=torch.float64)
    found = time_bucket((seconds * 1000).long()).tolist()
    assert found == [1, 1, 3, 5, 7, 1 + math.floor(2 * math.log2(86_400)), BUCKETS - 1]
    assert torch.equal(time_bucket(-(seconds * 1000).long()), time_bucket((seconds * 1000).long())) and START == 0


def test_hstu_attention_by_hand() -> None:
    config = ModelConfig(trunk="hstu", width=4, heads=1, layers=1, dropout=0.0)
    trunk = build_trunk(config, 3).eval()
    layer = trunk.layers[0]
    assert isinstance(layer, HstuLayer)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x = torch.randn(1, 3, 4)
    time = torch.tensor([[0, 5_000, 8_000]])
    scope = Scope(torch.arange(3)[None], time, time, None, append=False)
    scope.relative = trunk.relate(scope)
    u, v, q, k = F.silu(layer.uvqk(layer.norm_in(x)))[0].split(4, dim=-1)
    p, r = layer.position_bias, layer.time_bias
    bucket = {(0, 0): 0, (1, 0): 0, (2, 0): 0, (1, 1): 1, (2, 2): 1, (2, 1): 5}  # 3 s: 1 + floor(2 log2 4)
    rows = []
    for i in range(3):
        weights = [F.silu(q[i] @ k[j] + p[i - j] + r[bucket[i, j]]) / 3 for j in range(i + 1)]
        attended = sum(w * v[j] for j, w in enumerate(weights))
        rows.append(x[0, i] + layer.out(layer.norm_attended(attended) * u[i]))
    torch.testing.assert_close(layer(x, scope, 0)[0], torch.stack(rows), rtol=1e-5, atol=1e-5)


def test_ligr_by_hand() -> None:
    """One position: attention is its own value."""
    layer = LigrLayer(ModelConfig(trunk="ligr", width=4, heads=2, feed_forward=6, dropout=0.0)).eval()
    x = torch.randn(1, 1, 4)
    value = layer.qkv(layer.norm_attention(x))[..., 8:]
    y = x + torch.sigmoid(layer.gate_attention(x)) * layer.out(value)
    z = layer.norm_forward(y)
    w1, w3 = layer.up.weight[:6], layer.up.weight[6:]
    swiglu = (F.silu(z @ w1.T) * (z @ w3.T)) @ layer.down.weight.T
    expected = y + torch.sigmoid(layer.gate_forward(y)) * swiglu
    torch.testing.assert_close(layer(x, one_scope(1), 0), expected)


def test_a_closed_gate_leaves_the_residual_as_it_was() -> None:
    layer = LigrLayer(ModelConfig(trunk="ligr", width=4, heads=2, feed_forward=6, dropout=0.0)).eval()
    for gate in (layer.gate_attention, layer.gate_forward):
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, -200.0)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(layer(x, one_scope(3), 0), x)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.3).train()
    x = torch.ones(1000, 333, requires_grad=True)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert y.mean().item() == pytest.approx(1.0, abs=0.005)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # what is dropped gets no gradient
    columns = (y == 0).float().mean(0)
    assert columns.max() < 0.4 and columns.min() > 0.2  # no pattern along a row of draws
    assert torch.equal(Dropout(0.3).eval()(x), x) and torch.equal(Dropout(0.0).train()(x), x)
