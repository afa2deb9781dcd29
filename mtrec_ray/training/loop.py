"""The training loop: plain torch, the same alone, under torchrun and under Ray Train.

    python -m mtrec_ray.training.loop --config FILE --data DIR [--text DIR] --out DIR
    torchrun --nproc-per-node 2 -m mtrec_ray.training.loop --config FILE --data DIR [--text DIR] --out DIR

Every loss is divided by the global count of its labels and scaled by the world size (DDP averages), so one
worker and N workers make the same update from the same global batch (DESIGN §1.5).
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtrec_ray.balancing.weights import build_balancer
from mtrec_ray.config import RunConfig, TrainConfig
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.training import distributed
from mtrec_ray.training.feed import CachedFeed

log = logging.getLogger(__name__)

Metrics = dict[str, dict[str, float]]


class Report(Protocol):
    """Called by every rank after every epoch. state is the checkpoint on rank 0 and None on all others."""

    def __call__(self, epoch: int, scalars: dict[str, float], state: dict[str, Any] | None) -> None: ...


@dataclass
class Fitted:
    """What training gives: the best weights and how it went."""

    best_state: dict[str, Tensor]
    best_epoch: int
    best_value: float
    rows_read: int
    rows_trained: int
    seconds: float
    events: int
    """Targets trained."""


class _Losses(nn.Module):
    """The module that DDP wraps: recommender and balancer together, so that the balancer's parameters are
    averaged too."""

    def __init__(self, model: Recommender, balancer: nn.Module) -> None:
        super().__init__()
        self.model, self.balancer = model, balancer

    def forward(self, batch: Any, scale_T: Tensor, present_T: Tensor) -> tuple[Tensor, Tensor]:
        """-> (what to minimise on this rank, detached loss sums)."""
        sum_T = self.model(batch)
        return self.balancer(sum_T * scale_T, present_T), sum_T.detach()


def train_step(losses: nn.Module, model: Recommender, optimizer: torch.optim.Optimizer, micro: list[Any],
               clip_norm: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One optimiser step on this rank's micro-batches of a global batch.

    -> (this rank's loss_sum_T, global count_T).
    """
    count_T = distributed.all_reduce_sum(torch.stack([model.counts(b) for b in micro]).sum(0))
    present_T = (count_T > 0).float()
    scale_T = distributed.world_size() / count_T.clamp(min=1e-12) * present_T
    optimizer.zero_grad(set_to_none=True)
    total_T = torch.zeros_like(count_T)
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        quiet = contextlib.nullcontext() if last or not hasattr(losses, "no_sync") else losses.no_sync()  # type: ignore[operator]
        with quiet:
            loss, sum_T = losses(batch, scale_T, present_T / len(micro))
            loss.backward()
        total_T += sum_T
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(losses.parameters(), clip_norm)
    optimizer.step()
    return total_T, count_T


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); no decay on biases, norms and learned task weights."""
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then constant or a cosine to zero over all configured epochs."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def fit(
    config: RunConfig,
    model: Recommender,
    feed: CachedFeed,
    evaluate: Callable[[Recommender], Metrics],
    report: Report,
    resume: dict[str, Any] | None = None,
    device: torch.device | None = None,
) -> Fitted:
    """Train until the epochs are over or the monitored metric has stopped improving.

    evaluate: model -> metrics on valid; called by every rank, same result on every rank.
    Raises ValueError when a loss is not finite, naming epoch, step and task.
    """
    device = device or torch.device("cpu")
    train, names = config.train, list(config.tasks)
    balancer = build_balancer(config.balancing, [t.weight for t in config.tasks.values()])
    losses: nn.Module = _Losses(model, balancer).to(device)
    optimizer = build_optimizer(losses, train)
    scheduler = build_scheduler(optimizer, train, train.epochs * feed.steps_per_epoch)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(train.ema)) if train.ema else None  # type: ignore[no-untyped-call]
    first_epoch, best_value, best_epoch, bad_epochs = 0, -math.inf, -1, 0
    best_state: dict[str, Tensor] = {}
    if resume is not None:
        losses.load_state_dict(resume["losses"])
        optimizer.load_state_dict(resume["optimizer"])
        scheduler.load_state_dict(resume["scheduler"])
        first_epoch, best_value, best_epoch = resume["epoch"], resume["best_value"], resume["best_epoch"]
        bad_epochs, best_state = resume["bad_epochs"], resume["best_state"]
        if average is not None:
            average.load_state_dict(resume["average"])
    wrapped = DistributedDataParallel(losses) if distributed.is_distributed() else losses

    rank, started = distributed.rank(), time.perf_counter()
    rows_read = rows_trained = events = 0
    for epoch in range(first_epoch, train.epochs):
        if bad_epochs >= train.patience:
            break
        model.train()
        epoch_started = time.perf_counter()
        seen = torch.zeros(3)
        sums_T, counts_T = torch.zeros(len(names), device=device), torch.zeros(len(names), device=device)
        for step, micro in enumerate(feed.epoch(epoch)):
            seen += torch.tensor([sum(len(b.history) for b in micro), sum(len(b.targets) for b in micro), 1])
            torch.manual_seed(_step_seed(config.seed, epoch * feed.steps_per_epoch + step, rank))
            sum_T, count_T = train_step(wrapped, model, optimizer, [b.to(device) for b in micro], train.clip_norm)
            scheduler.step()
            if average is not None:
                average.update_parameters(model)
            sums_T, counts_T = sums_T + sum_T, counts_T + count_T
            if step % 50 == 0 and not bool(torch.isfinite(sum_T).all()):
                broken = [n for n, v in zip(names, sum_T.tolist(), strict=True) if not math.isfinite(v)]
                raise ValueError(f"epoch {epoch}, step {step}: the loss of {broken} is not finite; lower train.learning_rate")
        distributed.all_reduce_sum(seen)
        distributed.all_reduce_sum(sums_T)
        rows_read += len(feed.cache)
        rows_trained += int(seen[0])
        events += int(seen[1])
        mean_T = (sums_T / counts_T.clamp(min=1e-12)).tolist()
        if not all(math.isfinite(v) for v in mean_T):
            raise ValueError(f"epoch {epoch}: a loss is not finite ({dict(zip(names, mean_T, strict=True))})")
        scalars = {f"train/{n}/loss": v for n, v in zip(names, mean_T, strict=True)}
        scalars |= {f"lambda/{n}": v for n, v in zip(names, balancer.current().tolist(), strict=True)}
        scalars |= {"train/seconds": time.perf_counter() - epoch_started, "train/windows": float(seen[0]),
                    "train/learning_rate": float(scheduler.get_last_lr()[0])}  # fmt: skip

        if (epoch + 1) % train.evaluate_every == 0 or epoch + 1 == train.epochs:
            kept = model if average is None else average.module
            assert isinstance(kept, Recommender)
            kept.eval()
            valid = evaluate(kept)
            scalars |= {f"valid/{t}/{m}": v for t, ms in valid.items() for m, v in ms.items()}
            value = _monitored(valid, train.monitor)
            if value > best_value:
                best_value, best_epoch, bad_epochs = value, epoch, 0
                best_state = {k: v.detach().cpu().clone() for k, v in kept.state_dict().items()}
            else:
                bad_epochs += train.evaluate_every
        if rank == 0:
            _progress(epoch, train, scalars, best_epoch, best_value)
        state = None
        if rank == 0:
            state = {
                "losses": losses.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                "epoch": epoch + 1, "step": (epoch + 1) * feed.steps_per_epoch, "best_value": best_value,
                "best_epoch": best_epoch, "bad_epochs": bad_epochs, "best_state": best_state,
                "average": None if average is None else average.state_dict(),
            }  # fmt: skip
        report(epoch, scalars, state)
    return Fitted(best_state, best_epoch, best_value, rows_read, rows_trained, time.perf_counter() - started, events)


def _monitored(valid: Metrics, monitor: str) -> float:
    """The monitored value, negated where lower is better."""
    task, _, metric = monitor.partition("/")
    try:
        value = valid[task][metric]
    except KeyError:
        have = sorted(f"{t}/{m}" for t, ms in valid.items() for m in ms)
        raise ValueError(f"train.monitor: {monitor!r} was not measured on valid; there is {have}") from None
    return -value if metric in LOWER_IS_BETTER else value


def _step_seed(seed: int, step: int, rank: int) -> int:
    return (seed * 1_000_003 + step * 4_099 + rank) % 2**63


def _progress(epoch: int, train: TrainConfig, scalars: dict[str, float], best_epoch: int, best_value: float) -> None:
    shown = " ".join(f"{n.split('/')[1]}={v:.4f}" for n, v in scalars.items() if n.startswith("train/") and n.endswith("/loss"))
    monitored = scalars.get(f"valid/{train.monitor}")
    valid = (
        "" if monitored is None else f" | valid {train.monitor} {monitored:.4f} (best {abs(best_value):.4f} at {best_epoch + 1})"
    )
    log.info("epoch %d/%d %.1fs | %s%s", epoch + 1, train.epochs, scalars["train/seconds"], shown, valid)


def main() -> None:
    """Command line; under torchrun every process calls this."""
    from mtrec_ray.training.worker import main as worker_main

    worker_main()


if __name__ == "__main__":
    main()
