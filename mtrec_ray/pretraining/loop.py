"""Masked or causal language modelling in plain torch: the same alone and under DDP (DESIGN §1.5: sums over global counts)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.pretraining.blocks import IGNORED, Special, following, masked, order, pack, rows_of
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
class Texts:
    """Token lists: what is trained on, and what is held out by kind of text."""

    train: list[list[int]]
    held: dict[str, list[list[int]]]


@dataclass
class Progress:
    epoch: int = 0
    step: int = 0
    """Within the epoch."""
    global_step: int = 0


Report = Callable[[int, dict[str, float]], None]
"""(epoch, scalars), called by every rank with the same numbers; epoch -1 is before training."""


class LossSum(nn.Module):
    """The module that DDP wraps: rows -> sum of −log p over their labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_BT: Tensor, real_BT: Tensor, label_BT: Tensor) -> Tensor:
        logit_BTV = self.model(input_ids=token_BT, attention_mask=real_BT.long()).logits
        return F.cross_entropy(logit_BTV.flatten(0, 1).float(), label_BT.flatten(), ignore_index=IGNORED, reduction="sum")


class Rows:
    """Rows of one epoch, and what is asked about them."""

    def __init__(self, texts: list[list[int]], config: PretrainConfig, special: Special, mlm: bool) -> None:
        self.config, self.special, self.mlm = config, special, mlm
        self.token_NT, self.real_NT = pack(texts, config.block, special)

    def __len__(self) -> int:
        return len(self.token_NT)

    def batch(self, index: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """A global batch -> (token_BT, real_BT, label_BT); the masks come from the seed alone."""
        token, real = self.token_NT[index], self.real_NT[index]
        if not self.mlm:
            return token, real, following(token, real)
        seen, label = masked(token, real, self.special, self.config.mask_share, seed)
        return seen, real, label


def fit(
    config: PretrainConfig,
    seed: int,
    model: nn.Module,
    texts: Texts,
    special: Special,
    mlm: bool,
    report: Report,
    checkpoints: Checkpoints | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Train `model` (a Hugging Face model with `.logits`) in place -> {"perplexity": one per evaluation, "steps", "tokens", …}.

    Texts are packed in another order every epoch; perplexity is that of the held-out texts, by kind, before training and after
    every epoch. A killed run goes on from its last checkpoint. Raises PretrainStopped when the loss is not finite.
    """
    started, device = time.perf_counter(), device or torch.device("cpu")
    losses = LossSum(model.to(device))
    held = {kind: Rows(t, config, special, mlm) for kind, t in texts.held.items()}
    n_rows = rows_of(texts.train, config.block, special)
    steps_per_epoch = -(-n_rows // config.batch_blocks)
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
        history.append(perplexity(losses, held, device))
        report(-1, {f"perplexity/{k}": v for k, v in history[0].items()})

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
        rows = _epoch_rows(texts, config, special, mlm, seed, progress.epoch)
        place = torch.from_numpy(order(len(rows), seed + progress.epoch))
        total, count = torch.zeros((), device=device), 0
        while progress.step < steps_per_epoch:
            index = place[progress.step * config.batch_blocks : (progress.step + 1) * config.batch_blocks]
            loss_sum, labels = _step(config, wrapped, optimizer, rows, index, seed, progress, device)
            scheduler.step()
            total, count, tokens = total + loss_sum, count + labels, tokens + int(rows.real_NT[index].sum())
            progress.step, progress.global_step = progress.step + 1, progress.global_step + 1
            if progress.global_step % config.checkpoint_every == 0 and progress.step < steps_per_epoch:
                save()
        history.append(perplexity(losses, held, device))
        mean = float(total) / max(1, count)
        scalars = {"train/loss": mean, "train/learning_rate": float(scheduler.get_last_lr()[0])}
        scalars |= {f"perplexity/{k}": v for k, v in history[-1].items()}
        log.info("epoch %d/%d | loss %.4f | held-out perplexity %s", progress.epoch + 1, config.epochs, mean,
                 " ".join(f"{k}={v:.2f}" for k, v in history[-1].items()))  # fmt: skip
        report(progress.epoch, scalars)
        progress = Progress(progress.epoch + 1, 0, progress.global_step)
        save()
    return {"perplexity": history, "steps": steps, "tokens": tokens, "seconds": seconds + time.perf_counter() - started,
            "rows": n_rows, "texts": len(texts.train),
            "held_out": {k: len(v) for k, v in texts.held.items()}}  # fmt: skip


def _step(
    config: PretrainConfig, wrapped: nn.Module, optimizer: torch.optim.Optimizer, rows: Rows, index: Tensor, seed: int,
    progress: Progress, device: torch.device,
) -> tuple[Tensor, int]:  # fmt: skip
    """One optimiser step on a global batch -> (loss sum, labels), over all ranks."""
    token, real, label = rows.batch(index, _seed(seed, progress.global_step))
    labels = int((label != IGNORED).sum())
    rank, world = distributed.rank(), distributed.world_size()
    mine = slice(rank, None, world)
    if rank >= len(index):  # DDP waits for every rank: one without rows reads the first one and says nothing
        token, real, label = token[:1], real[:1], torch.full_like(label[:1], IGNORED)
    else:
        token, real, label = token[mine], real[mine], label[mine]
    torch.manual_seed(_seed(seed, progress.global_step) + rank + 1)  # dropout
    optimizer.zero_grad(set_to_none=True)
    with autocast(device, torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32):
        loss_sum = wrapped(token.to(device), real.to(device), label.to(device))
    (loss_sum * world / max(1, labels)).backward()  # DDP averages over the ranks
    torch.nn.utils.clip_grad_norm_(wrapped.parameters(), config.clip_norm)
    optimizer.step()
    total = distributed.all_reduce_sum(loss_sum.detach().clone())
    if not bool(torch.isfinite(total)):
        raise PretrainStopped(
            f"epoch {progress.epoch}, step {progress.step}: the loss is {float(total)}. Lower pretrain.learning_rate; no "
            "checkpoint was written after this step"
        )
    return total, labels


@torch.no_grad()
def perplexity(losses: LossSum, held: dict[str, Rows], device: torch.device) -> dict[str, float]:
    """exp of the mean −log p of the held-out labels, by kind of text; the masks are the same every time."""
    losses.eval()
    out = {}
    for kind, rows in held.items():
        total, count = torch.zeros(2, dtype=torch.float64, device=device), 0
        for number, begin in enumerate(range(0, len(rows), ROWS_AT_ONCE)):
            token, real, label = rows.batch(torch.arange(begin, min(begin + ROWS_AT_ONCE, len(rows))), EVALUATION + number)
            count += int((label != IGNORED).sum())
            if number % distributed.world_size() == distributed.rank():
                total[0] += losses(token.to(device), real.to(device), label.to(device))
        out[kind] = math.exp(min(50.0, float(distributed.all_reduce_sum(total)[0]) / max(1, count)))
    return out


def _epoch_rows(texts: Texts, config: PretrainConfig, special: Special, mlm: bool, seed: int, epoch: int) -> Rows:
    return Rows([texts.train[i] for i in order(len(texts.train), seed * 1_000_003 + epoch)], config, special, mlm)


def _seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step * 4_099) % 2**62
