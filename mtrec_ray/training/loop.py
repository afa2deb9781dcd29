"""The training loop: plain torch, the same alone, under torchrun and under Ray Train.

    python -m mtrec_ray.training.loop --config FILE --data DIR [--text DIR] --out DIR
    torchrun --nproc-per-node 2 -m mtrec_ray.training.loop --config FILE --data DIR [--text DIR] --out DIR

A step is in step.py. Every draw is seeded by (seed, global step, rank), so a run that goes on from a checkpoint draws what the
uninterrupted one drew.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtrec_ray.config import GAIN, RunConfig, TrainConfig
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.training import distributed
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.feed import Feed
from mtrec_ray.training.guard import FiniteLoss, TrainingStopped, check_weights, step_errors
from mtrec_ray.training.progress import EpochSums, Progress
from mtrec_ray.training.step import build_losses, build_optimizer, build_scheduler, distribute, train_step, working_precision

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]

CHECK_EVERY = 50
"""Steps between looks at the losses on a GPU; the step that went wrong is found exactly all the same."""


class Report(Protocol):
    """Called by every rank after every epoch, with the same numbers."""

    def __call__(self, epoch: int, scalars: dict[str, float]) -> None: ...


@dataclass
class Fitted:
    """What training gives: the best weights and how it went."""

    best_state: dict[str, Tensor]
    """Of the recommender, without the TextEncoder."""
    best_epoch: int
    best_value: float
    rows_read: int
    rows_trained: int
    seconds: float
    events: int
    """Targets trained."""
    parameters: dict[str, int]
    """How many there are, and how many were trained."""
    encoder_state: dict[str, Tensor] | None = None
    """Where the TextEncoder was trained: its best weights, and below the vectors that they give the catalogue."""
    text_NE: Tensor | None = None


TUNED, TEXT = "tuned.", "text_NE"
"""Of the best state's names: weights of the TextEncoder, and its vectors."""


class Training:
    """Everything that changes while training: what a checkpoint holds."""

    def __init__(self, config: RunConfig, model: Recommender, steps_per_epoch: int, device: torch.device) -> None:
        train = config.train
        self.losses = build_losses(config, model).to(device)
        self.precision = working_precision(config, device)
        self.model = model
        tuning = None if config.encoder is None or model.tuned is None else config.encoder.tuning
        self.optimizer = build_optimizer(self.losses, train, tuning)
        self.scheduler = build_scheduler(
            self.optimizer, train.epochs * steps_per_epoch, train.warmup_steps, train.schedule == "cosine", tuning
        )
        ema = get_ema_multi_avg_fn(train.ema) if train.ema else None  # type: ignore[no-untyped-call]
        text_NE, model.text_NE = model.text_NE, None  # no copy of it at every step
        self.average = AveragedModel(model, multi_avg_fn=ema) if ema else None
        model.text_NE = text_NE
        if self.average is not None:  # a frozen encoder's vectors never change
            self.kept.text_NE = text_NE if text_NE is None or tuning is None else text_NE.clone()
        if train.compile:
            model.trunk.compile(dynamic=True)
        self.progress = Progress()
        self.best_state: dict[str, Tensor] = {}

    def state(self) -> dict[str, Any]:
        return {
            "losses": self.losses.state_dict(), "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "progress": asdict(self.progress), "best_state": self.best_state,
            "text_NE": None if self.model.tuned is None else self.model.text_NE,
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        self.losses.load_state_dict(state["losses"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.progress, self.best_state = Progress(**state["progress"]), state["best_state"]
        if self.model.tuned is not None:
            self.model.text_NE.copy_(state["text_NE"])  # type: ignore[union-attr]

    def take_best(self) -> None:
        """Keep what was just evaluated as the best."""
        self.best_state = {k: v.detach().cpu().clone() for k, v in self.kept.state_dict().items()}
        if self.kept.tuned is not None and self.kept.text_NE is not None:
            self.best_state[TEXT] = self.kept.text_NE.detach().cpu().clone()

    @property
    def kept(self) -> Recommender:
        """The weights that are evaluated and kept."""
        kept = self.model if self.average is None else self.average.module
        assert isinstance(kept, Recommender)
        return kept


def fit(
    config: RunConfig,
    model: Recommender,
    feed: Feed,
    evaluate: Callable[[Recommender], Metrics],
    report: Report,
    checkpoints: Checkpoints | None = None,
    device: torch.device | None = None,
) -> Fitted:
    """Train until the epochs are over or the monitored metric has stopped improving.

    evaluate: model -> metrics on valid; called by every rank, same result on every rank.
    checkpoints: where the run is kept; it goes on from what is there.
    Raises TrainingStopped (a loss that is not finite, memory, missing rows) with the batch's coordinates, CheckpointError.
    """
    device = device or torch.device("cpu")
    train, names, rank = config.train, list(config.tasks), distributed.rank()
    run = Training(config, model, feed.steps_per_epoch, device)
    resumed = None if checkpoints is None else checkpoints.resume()
    if resumed is not None:
        run.restore(resumed)
        if rank == 0:
            log.info("resumed at epoch %d, step %d", run.progress.epoch, run.progress.step)
    wrapped = distribute(run.losses)
    progress = run.progress

    def kept() -> str:
        last = None if checkpoints is None else checkpoints.last
        return "There is no checkpoint yet" if last is None else f"The last good checkpoint stays: {last}"

    def save() -> None:
        if checkpoints is not None and rank == 0:
            checkpoints.save(run.state())

    def check(finite: FiniteLoss) -> None:
        finite.check(feed, progress.epoch, kept)
        check_weights(run.losses.parameters(), feed, progress.epoch, progress.step - 1, kept)

    while progress.epoch < train.epochs and progress.bad_epochs < train.patience:
        model.train()
        epoch, started, before = progress.epoch, time.perf_counter(), progress.seconds
        sums = EpochSums(len(names), device, progress.sums)
        finite = FiniteLoss(names, device)
        steps = feed.epoch(epoch, progress.step, progress.global_step)
        while True:
            with step_errors(feed, epoch, progress.step, kept):
                micro = next(steps, None)
                if micro is None:
                    break
                torch.manual_seed(_step_seed(config.seed, progress.global_step, rank))
                step = train_step(wrapped, run.optimizer, [b.to(device) for b in micro], train.clip_norm, run.precision)
            finite.note(progress.step, step.loss_sum_T)
            sums.add(step.loss_sum_T, step.count_T, step.size_2)
            run.scheduler.step()
            if run.average is not None:
                run.average.update_parameters(model)
            progress.step, progress.global_step = progress.step + 1, progress.global_step + 1
            if device.type == "cpu" or progress.step % CHECK_EVERY == 0:  # elsewhere it waits for the device
                finite.check(feed, epoch, kept)
            due = train.checkpoint_every and progress.step % train.checkpoint_every == 0
            if due and feed.exact and progress.step < feed.steps_per_epoch:
                check(finite)
                progress.sums, progress.seconds = sums.values(), before + time.perf_counter() - started
                save()
        check(finite)
        trained = before + time.perf_counter() - started
        if sums.windows != feed.windows:
            raise TrainingStopped(f"epoch {epoch}: the feed has {feed.windows} windows, but {sums.windows} were trained. {kept()}")
        mean_loss_T, balancer = sums.mean_loss_T, run.losses.balancer
        balancer.end_epoch(torch.tensor(mean_loss_T))
        scalars = {f"train/{n}/loss": v for n, v in zip(names, mean_loss_T, strict=True)}
        scalars |= {f"lambda/{n}": v for n, v in zip(names, balancer.current().tolist(), strict=True)}
        if run.losses.record is not None:
            scalars |= run.losses.record.scalars(names)
        scalars |= {"train/seconds": trained, "train/windows": sums.windows, "train/targets": sums.targets,
                    "train/windows_dropped": feed.windows - sums.windows, "train/steps": progress.step,
                    "train/learning_rate": float(run.scheduler.get_last_lr()[0])}  # fmt: skip
        if (epoch + 1) % train.evaluate_every == 0 or epoch + 1 == train.epochs:
            run.kept.eval()
            run.kept.refresh_texts()
            valid = evaluate(run.kept)
            scalars |= {f"valid/{t}/{m}": v for t, ms in valid.items() for m, v in ms.items()}
            value = monitored(valid, train)
            if math.isnan(value):
                raise TrainingStopped(
                    f"epoch {epoch}: {train.monitor} is not a number on valid, so no checkpoint can be chosen by it: valid has too "
                    f"few labels of the task (an AUC needs both kinds). Name another train.monitor. {kept()}"
                )
            if train.reference:
                scalars["valid/gain"] = relative_gain(valid, train.reference)
            if value > progress.best_value:
                progress.best_value, progress.best_epoch, progress.bad_epochs = value, epoch, 0
                run.take_best()
            else:
                progress.bad_epochs += train.evaluate_every
        if rank == 0:
            _progress(epoch, train, scalars, progress.best_epoch, progress.best_value)
        report(epoch, scalars)  # before the checkpoint: a kill in between reports the epoch twice, never not at all
        progress.end_epoch(feed.windows, sums.windows, sums.targets, before + time.perf_counter() - started)
        save()
    best, counts = dict(run.best_state), {"all": 0, "trained": 0}
    for parameter in model.parameters():
        counts["all"] += parameter.numel()
        counts["trained"] += parameter.numel() * parameter.requires_grad
    text_NE, encoder = best.pop(TEXT, None), {k.removeprefix(TUNED): best.pop(k) for k in list(best) if k.startswith(TUNED)}
    return Fitted(best, progress.best_epoch, progress.best_value, progress.rows_read, progress.rows_trained,
                  progress.total_seconds, progress.events, counts, encoder or None, text_NE)  # fmt: skip


def monitored(valid: Metrics, train: TrainConfig) -> float:
    """What selects the best checkpoint; more is better. Raises ValueError for what was not measured."""
    if train.monitor == GAIN:
        return relative_gain(valid, train.reference)
    value, sign = _measured(valid, train.monitor, "train.monitor")
    return sign * value


def relative_gain(valid: Metrics, reference: dict[str, float]) -> float:
    """Mean of ± (value - reference) / |reference| over the reference's metrics, + where more is better (the Δm of Maninis et
    al. 2019, arXiv 1904.08918). Raises ValueError for what was not measured."""
    gains = []
    for name, base in reference.items():
        value, sign = _measured(valid, name, f"train.reference.{name}")
        gains.append(sign * (value - base) / abs(base))
    return sum(gains) / len(gains)


def _measured(valid: Metrics, name: str, key: str) -> tuple[float, int]:
    """(value of task/metric, 1 where more is better or -1)."""
    task, _, metric = name.partition("/")
    try:
        return valid[task][metric], -1 if metric in LOWER_IS_BETTER else 1
    except KeyError:
        have = sorted(f"{t}/{m}" for t, ms in valid.items() for m in ms)
        raise ValueError(f"{key}: {name!r} was not measured on valid; there is {have}") from None


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 4_099 + rank) % 2**63


def _progress(epoch: int, train: TrainConfig, scalars: dict[str, float], best_epoch: int, best_value: float) -> None:
    shown = " ".join(f"{n.split('/')[1]}={v:.4f}" for n, v in scalars.items() if n.startswith("train/") and n.endswith("/loss"))
    value = scalars.get(f"valid/{train.monitor}")
    best = best_value if train.monitor == GAIN else abs(best_value)
    valid = "" if value is None else f" | valid {train.monitor} {value:.4f} (best {best:.4f} at {best_epoch + 1})"
    log.info("epoch %d/%d %.1fs | %s%s", epoch + 1, train.epochs, scalars["train/seconds"], shown, valid)


def main() -> None:
    """Command line; under torchrun every process calls this."""
    from mtrec_ray.training.worker import main as worker_main

    worker_main()


if __name__ == "__main__":
    main()
