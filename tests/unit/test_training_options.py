"""What `train` may ask for: bf16, compilation, clipping, warm-up, cosine; each works on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, TrainConfig
from mtrec_ray.models.trunks.base import Trunk
from mtrec_ray.training import worker
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.guard import TrainingStopped
from mtrec_ray.training.loop import Training
from mtrec_ray.training.step import build_optimizer, build_scheduler, train_step, working_precision
from mtrec_ray.training.worker import build_feed, build_model, check_machine, load_schema, run_worker
from tests import tiny
from tests.conftest import TinyRun

CPU = torch.device("cpu")


def trained(run: TinyRun, steps: int = 4, **train: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(sum of the tasks' mean losses per step, weights)."""
    config = tiny.make_config(run.folder, lambda raw: raw["train"].update(train))
    schema = load_schema(run.data.prefix)
    cache = WindowCache.from_table(storage.read_table(storage.join(run.data.prefix, "windows", "train")))
    model = build_model(config, schema, None).train()
    training = Training(config, model, 10, CPU)
    losses = []
    for number, micro in enumerate(build_feed(config, schema, cache, 0, 1).epoch(0)):
        if number == steps:
            break
        step = train_step(training.losses, training.optimizer, micro, config.train.clip_norm, training.precision)
        losses.append(float((step.loss_sum_T / step.count_T.clamp(min=1)).sum()))
        training.scheduler.step()
    return losses, {k: v.clone() for k, v in model.state_dict().items()}


def test_bf16_follows_float32_to_its_own_precision_and_keeps_float32_weights(tiny_run: TinyRun) -> None:
    exact, weights = trained(tiny_run)
    rounded, other = trained(tiny_run, precision="bf16")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert all(v.dtype == weights[k].dtype for k, v in other.items())


def test_auto_precision_is_float32_without_a_gpu(tiny_folder: Path) -> None:
    for asked, given in {"auto": torch.float32, "float32": torch.float32, "bf16": torch.bfloat16}.items():
        config = tiny.make_config(tiny_folder, lambda raw, asked=asked: raw["train"].update(precision=asked))  # type: ignore[misc]
        assert working_precision(config, CPU) == given


@pytest.mark.parametrize(("width", "has", "given"), [(256, True, "bfloat16"), (256, False, "float32"), (64, True, "float32")])
def test_auto_precision_on_a_gpu_follows_from_the_width_and_the_card(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, width: int, has: bool, given: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    config = tiny.make_config(tiny_folder, lambda raw: raw["model"].update(width=width))
    assert working_precision(config, torch.device("cuda")) == getattr(torch, given)


def test_a_trunk_that_cannot_be_compiled_stops_the_run_with_the_cure(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        from torch._dynamo.exc import BackendCompilerFailed

        raise BackendCompilerFailed(refuse, AssertionError("no such tiling"), None)

    monkeypatch.setattr(Trunk, "forward", refuse)
    with pytest.raises(TrainingStopped, match=r"epoch 0, step 0: torch .* cannot compile the trunk here .*train.compile to false"):
        run_worker(tiny_run.config, tiny_run.data.prefix, None, lambda *_: None)


@pytest.mark.slow
def test_a_compiled_trunk_makes_the_same_steps_and_the_same_names_of_weights(tiny_run: TinyRun) -> None:
    exact, weights = trained(tiny_run, steps=2)
    compiled, other = trained(tiny_run, steps=2, compile=True)
    assert compiled == pytest.approx(exact, rel=1e-4)
    assert list(other) == list(weights)


@pytest.mark.parametrize("options", [{"precision": "bf16", "accumulate": 2, "clip_norm": 1.0, "schedule": "cosine", "ema": 0.9}])
def test_all_options_together_train_and_are_evaluated(tiny_run: TinyRun, options: dict[str, Any]) -> None:
    seen: list[dict[str, float]] = []
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(options | {"warmup_steps": 3, "epochs": 2}))
    fitted = run_worker(config, tiny_run.data.prefix, None, lambda _, scalars: seen.append(scalars))
    assert len(seen) == 2 and fitted.best_epoch >= 0
    assert all(v.dtype != torch.bfloat16 for v in fitted.best_state.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dwa", "famo", "upgrad", "nash_mtl"])
def test_balancers_train_and_report_their_weights_and_the_record(tiny_run: TinyRun, kind: str) -> None:
    seen: list[dict[str, float]] = []

    def change(raw: dict[str, Any]) -> None:
        raw["balancing"] = {"kind": kind, "record": True, "record_every": 1}
        raw["train"]["epochs"] = 3

    config = tiny.make_config(tiny_run.folder, change)
    run_worker(config, tiny_run.data.prefix, None, lambda _, scalars: seen.append(scalars))
    weights = [[scalars[f"lambda/{name}"] for name in config.tasks] for scalars in seen]
    static = [t.weight for t in config.tasks.values()]
    assert weights[-1] != pytest.approx(static)
    assert sum(weights[-1]) == pytest.approx(sum(static), rel=0.5 if kind == "dwa" else 1e-4)
    assert -1 <= seen[-1]["gradient/click|rating/cosine"] <= 1
    assert not any(n.startswith("gradient/similar/") for n in seen[-1])  # it does not read the state


def test_clipping_bounds_the_step(tiny_run: TinyRun) -> None:
    _, start = trained(tiny_run, steps=0)
    config = tiny.make_config(tiny_run.folder)
    schema = load_schema(tiny_run.data.prefix)
    cache = WindowCache.from_table(storage.read_table(storage.join(tiny_run.data.prefix, "windows", "train")))
    training = Training(config, build_model(config, schema, None).train(), 10, CPU)
    plain = torch.optim.SGD(training.losses.parameters(), lr=1.0)
    train_step(training.losses, plain, next(iter(build_feed(config, schema, cache, 0, 1).epoch(0))), clip_norm=0.1)
    moved = torch.sqrt(sum((v - start[k]).square().sum() for k, v in training.model.state_dict().items()))  # type: ignore[arg-type]
    assert float(moved) == pytest.approx(0.1, rel=1e-3)


def test_warm_up_is_linear_and_the_cosine_ends_at_zero() -> None:
    config = TrainConfig(learning_rate=1.0, schedule="cosine", warmup_steps=4)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config)
    scheduler = build_scheduler(optimizer, 12, config.warmup_steps, cosine=True)
    rates = []
    for _ in range(13):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0.0, abs=1e-9)


def test_compilation_without_a_compiler_is_refused_before_anything_starts(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny.make_config(tiny_run.folder, lambda raw: raw["train"].update(compile=True))
    monkeypatch.setattr(worker.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match=r"train\.compile: there is no C\+\+ compiler"):
        check_machine(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"balancing": {"kind": "magic"}}, r"balancing\.kind: .*'static', 'uncertainty'"),
        ({"train": {"monitor": "gain"}}, r"train\.monitor: gain needs train\.reference"),
        ({"train": {"reference": {"nothing/auc": 1.0}}}, r"train\.reference: 'nothing/auc' is not task/metric"),
        ({"train": {"reference": {"rating/rmse": 0.0}}}, r"train\.reference\.rating/rmse: a relative gain over 0"),
        ({"train": {"precision": "fp8"}}, r"train\.precision"),
    ],
)
def test_what_cannot_be_is_refused_at_load(tiny_run: TinyRun, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny.make_config(tiny_run.folder, lambda raw: raw.update({k: raw.get(k, {}) | v for k, v in change.items()}))


def test_a_monitored_metric_that_is_no_number_stops_at_the_first_evaluation(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no epoch would ever be the best one, and the run would end without weights."""
    monitor = tiny_run.config.train.monitor
    task, _, metric = monitor.partition("/")
    monkeypatch.setattr(worker, "valid_evaluator", lambda *_: lambda model: {task: {metric: float("nan")}})
    reported: list[int] = []
    with pytest.raises(TrainingStopped, match=f"epoch 0: {monitor} is not a number on valid.*Name another train.monitor"):
        run_worker(tiny_run.config, tiny_run.data.prefix, None, lambda epoch, _: reported.append(epoch))
    assert not reported
