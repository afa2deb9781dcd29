"""The loop of pre-training in plain torch: the same alone and under DDP (DESIGN §1.5: sums over global counts)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.pretraining.blocks import order
from mtrec_ray.pretraining.objectives import Examples, Objective, spread
from mtrec_ray.training import distributed
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.step import autocast, build_optimizer, build_scheduler, distribute

log = logging.getLogger(__name__)

EVALUATION = 1 << 40
"""Seed of the masks of held-out texts: no step of training has it."""
ROWS_AT_ONCE = 32


class PretrainStopped(RuntimeError):
    """A run that cannot go on."""


@dataclass
class Progress:
    epoch: int = 0
    step: int = 0
    """Within the epoch."""
    global_step: int = 0


Report = Callable[[int, dict[str, float]], None]
"""(epoch, scalars), called by every rank with the same numbers; epoch -1 is before training."""


def fit(
    config: PretrainConfig,
    seed: int,
    objective: Objective,
    report: Report,
    checkpoints: Checkpoints | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train the objective's module in place -> {"measure": its name, that name: held-out values before training and after every
    epoch, "steps", …}.

    A killed run goes on from its last checkpoint. Raises PretrainStopped when the loss is not finite.
    """
    started, device = time.perf_counter(), device or torch.device("cpu")
    losses, name = objective.module.to(device), objective.measure
    steps_per_epoch = -(-objective.rows // config.batch_blocks)
    steps = steps_per_epoch * config.epochs
    optimizer = build_optimizer(losses, config)
    scheduler = build_scheduler(optimizer, steps, round(config.warmup_share * steps), cosine=True)
    progress, history, tokens, seconds = Progress(), [], 0, 0.0
    resumed = None if checkpoints is None else checkpoints.resume()
    if resumed is not None:
        losses.load_state_dict(resumed["losses"])
        optimizer.load_state_dict(resumed["optimizer"])
        scheduler.load_state_dict(resumed["scheduler"])
        progress, history, tokens = Progress(**resumed["progress"]), resumed["history"], resumed["tokens"]
        seconds = resumed["seconds"]
    else:
        history.append(measured(objective, device))
        report(-1, {f"{name}/{k}": v for k, v in history[0].items()})

    def save() -> None:
        if checkpoints is not None and distributed.rank() == 0:
            checkpoints.save({
                "losses": losses.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                "progress": asdict(progress), "history": history, "tokens": tokens,
                "seconds": seconds + time.perf_counter() - started,
            })  # fmt: skip

    wrapped = distribute(losses)
    while progress.epoch < config.epochs:
        losses.train()
        rows = objective.epoch(seed * 1_000_003 + progress.epoch)
        place = torch.from_numpy(order(len(rows), seed + progress.epoch))
        total, count = torch.zeros((), device=device), 0
        while progress.step < steps_per_epoch:
            index = place[progress.step * config.batch_blocks : (progress.step + 1) * config.batch_blocks]
            examples = rows.batch(index, _seed(seed, progress.global_step))
            total += _step(config, wrapped, optimizer, examples, seed, progress, device)
            scheduler.step()
            count, tokens = count + examples.labels, tokens + examples.tokens
            progress.step, progress.global_step = progress.step + 1, progress.global_step + 1
            if progress.global_step % config.checkpoint_every == 0 and progress.step < steps_per_epoch:
                save()
        history.append(measured(objective, device))
        mean = float(total) / max(1, count)
        scalars = {"train/loss": mean, "train/learning_rate": float(scheduler.get_last_lr()[0])}
        scalars |= {f"{name}/{k}": v for k, v in history[-1].items()}
        log.info("epoch %d/%d | loss %.4f | held-out %s %s", progress.epoch + 1, config.epochs, mean, name,
                 " ".join(f"{k}={v:.4g}" for k, v in history[-1].items()))  # fmt: skip
        report(progress.epoch, scalars)
        progress = Progress(progress.epoch + 1, 0, progress.global_step)
        save()
    return {name: history, "measure": name, "objective": objective.name, "steps": steps, "tokens": tokens,
            "seconds": seconds + time.perf_counter() - started, "rows": objective.rows,
            "held_out_rows": {k: len(v) for k, v in objective.held.items()}}  # fmt: skip


def _step(
    config: PretrainConfig, wrapped: nn.Module, optimizer: torch.optim.Optimizer, examples: Examples, seed: int, progress: Progress,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """One optimiser step on a global batch -> loss sum over all ranks."""
    rank, world = distributed.rank(), distributed.world_size()
    torch.manual_seed(_seed(seed, progress.global_step) + rank + 1)  # dropout
    optimizer.zero_grad(set_to_none=True)
    with autocast(device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32):
        loss_sum = wrapped(*(t.to(device) for t in spread(examples, rank, world)))
    (loss_sum * world / max(1, examples.labels)).backward()  # DDP averages over the ranks
    torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.clip_norm)
    optimizer.step()
    total = distributed.all_reduce_sum(loss_sum.detach().clone())
    if not bool(torch.isfinite(total)):
        raise PretrainStopped(
            f"epoch {progress.epoch}, step {progress.step}: the loss is {float(total)}. Lower pretrain.learning_rate; no "
            "checkpoint was written after this step"
        )
    return total


@torch.no_grad()
def measured(objective: Objective, device: torch.device) -> dict[str, float]:
    """The objective's measure of the mean loss on held-out texts, by kind; masks and batches are the same every time."""
    objective.module.eval()
    rank, world = distributed.rank(), distributed.world_size()
    out = {}
    for kind, rows in objective.held.items():
        total, count = torch.zeros(1, dtype=torch.float64, device=device), 0
        for number, begin in enumerate(range(0, len(rows), ROWS_AT_ONCE)):
            examples = rows.batch(torch.arange(begin, min(begin + ROWS_AT_ONCE, len(rows))), EVALUATION + number)
            count += examples.labels
            total += objective.module(*(t.to(device) for t in spread(examples, rank, world)))
        out[kind] = objective.summary(float(distributed.all_reduce_sum(total)) / max(1, count))
    return out


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 4_099) % 2**62
