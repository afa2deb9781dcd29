"""One optimiser step, the same (but for dropout) from the same global batch on any number of ranks (DESIGN §1.5).

Every loss sum is divided by the global count of its labels and scaled by the world size, since DDP averages.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtrec_ray.balancing import Balancer, GradientRecord, build_balancer, gramian
from mtrec_ray.config import PretrainConfig, RunConfig, TrainConfig, TuningConfig
from mtrec_ray.models.batch import Batch
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.training import distributed

WIDE = 256
"""Width from which bfloat16 pays on a GPU: a narrow model waits for the launches of its kernels, and casts are more of them (a
step of width 64 took 20 ms in float32 with TF32 and 27 ms in bfloat16, one of width 512 103 and 72; benchmarks/gpu_step.py)."""


class Losses(nn.Module):
    """The module that DDP wraps: recommender and balancer together, so that the balancer's parameters are averaged too."""

    def __init__(self, model: Recommender, balancer: Balancer, record: GradientRecord | None = None, record_every: int = 1) -> None:
        super().__init__()
        self.model, self.balancer, self.record, self.record_every = model, balancer, record, record_every
        self._sum_T: Tensor | None = None
        self._gramian_TT: Tensor | None = None

    def forward(self, batch: Batch, count_T: Tensor, micro_batches: int) -> tuple[Tensor, Tensor]:
        """-> (what to minimise on this rank, detached loss sums).

        count_T: labels of the whole global batch. With one micro-batch λ comes from this very batch, else from the step
        before (`settle`).
        """
        sums, state_BLD = self.model(batch)
        sum_T, present_T = torch.stack(sums), (count_T > 0).float()
        share_T = present_T / count_T.clamp(min=1e-12)
        if self._wants_gramian(batch.step):
            found_TT = gramian(sums, state_BLD) * torch.outer(share_T, share_T)
            self._gramian_TT = found_TT if self._gramian_TT is None else self._gramian_TT + found_TT
        if self.balancer.needs_losses:
            self._sum_T = (
                sum_T.detach().clone() if self._sum_T is None else self._sum_T + sum_T.detach()
            )  # summed over ranks in place
        if micro_batches == 1:
            self.settle(count_T, batch.step)
        # this rank's shares of the mean losses; DDP will average them over the ranks
        return self.balancer(sum_T * share_T * distributed.world_size(), present_T / micro_batches), sum_T.detach()

    def settle(self, count_T: Tensor, step: int) -> None:
        """Show the balancer what the whole global batch said; all ranks go on with rank 0's λ."""
        gramian_TT, sum_T = self._gramian_TT, self._sum_T
        self._gramian_TT = self._sum_T = None
        if sum_T is not None:
            sum_T = distributed.all_reduce_sum(sum_T)
            self.balancer.see_losses(sum_T / count_T.clamp(min=1e-12), (count_T > 0).float())
        if gramian_TT is not None:
            gramian_TT = distributed.all_reduce_sum(gramian_TT)
            if self.record is not None:
                self.record.add(gramian_TT)
            if self.balancer.needs_gramian:
                if distributed.rank() == 0:
                    self.balancer.see_gramian(gramian_TT, step)
                for value in self.balancer.state_dict().values():
                    distributed.broadcast_tensor(value)

    def _wants_gramian(self, step: int) -> bool:
        if not torch.is_grad_enabled():
            return False
        if self.balancer.needs_gramian:
            return step % self.balancer.update_every == 0
        return self.record is not None and step % self.record_every == 0


@dataclass
class Step:
    """What one optimiser step counted, over all ranks."""

    loss_sum_T: Tensor
    count_T: Tensor
    size_2: Tensor
    """Windows and targets."""


def build_losses(config: RunConfig, model: Recommender) -> Losses:
    """Model, balancer and record of a run. Raises MissingSolver."""
    balancer = build_balancer(config.balancing, [t.weight for t in config.tasks.values()], config.seed)
    record = GradientRecord(len(config.tasks)) if config.balancing.record else None
    return Losses(model, balancer, record, config.balancing.record_every)


def train_step(losses: nn.Module, optimizer: torch.optim.Optimizer, micro: list[Batch], clip_norm: float | None = None,
               precision: torch.dtype = torch.float32) -> Step:  # fmt: skip
    """One optimiser step on this rank's micro-batches of a global batch. losses: Losses, or DDP around them."""
    inner = losses.module if isinstance(losses, DistributedDataParallel) else losses
    assert isinstance(inner, Losses)
    model, balancer = inner.model, inner.balancer
    local_T = torch.stack([model.counts(b) for b in micro]).sum(0)
    size_2 = local_T.new_tensor([sum(len(b.history) for b in micro), sum(len(b.targets) for b in micro)])
    counted = distributed.all_reduce_sum(torch.cat([local_T, size_2]))
    count_T, size_2 = counted[:-2], counted[-2:]
    optimizer.zero_grad(set_to_none=True)
    total_T = torch.zeros_like(count_T)
    on_gpu = count_T.is_cuda
    draws = (torch.get_rng_state(), torch.cuda.get_rng_state() if on_gpu else None) if balancer.needs_losses_after else None
    for i, batch in enumerate(micro):
        last = i == len(micro) - 1
        quiet = contextlib.nullcontext() if last or not hasattr(losses, "no_sync") else losses.no_sync()  # type: ignore[operator]
        with quiet:
            with autocast(count_T.device, precision):
                loss, sum_T = losses(batch, count_T, len(micro))
            loss.backward()
        total_T += sum_T
    if len(micro) > 1:
        inner.settle(count_T, micro[0].step)
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(losses.parameters(), clip_norm)
    optimizer.step()
    total_T = distributed.all_reduce_sum(total_T)
    if draws is not None:  # the same batch with the same dropout
        torch.set_rng_state(draws[0])
        if draws[1] is not None:
            torch.cuda.set_rng_state(draws[1])
        with torch.no_grad(), autocast(count_T.device, precision):
            after_T = distributed.all_reduce_sum(torch.stack([torch.stack(model(b)[0]) for b in micro]).sum(0))
        balancer.see_losses_after(after_T / count_T.clamp(min=1e-12), (count_T > 0).float())
    return Step(total_T, count_T, size_2)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Matrix products in bfloat16 where that is the precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)


def working_precision(config: RunConfig, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 for a model of some width on a GPU that has it, else float32."""
    precision = config.train.precision
    if precision != "auto":
        return torch.bfloat16 if precision == "bf16" else torch.float32
    pays = device.type == "cuda" and config.model.width >= WIDE and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if pays else torch.float32


def distribute(losses: nn.Module) -> nn.Module:
    """Under DDP where there is a process group. No buffer of the model changes in training, and the balancer sees to its
    own: none is sent around at every step."""
    if not distributed.is_distributed():
        return losses
    known = inspect.signature(DistributedDataParallel).parameters
    quiet = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name in torch 2.11
    options: dict[str, Any] = {quiet: False}
    return DistributedDataParallel(losses, **options)


def build_optimizer(
    model: nn.Module, config: TrainConfig | PretrainConfig, tuning: TuningConfig | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused; no decay on biases, norms and learned task weights.

    tuning: learning rate and decay of the TextEncoder's parameters, which are the last two groups then.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = [p for n, p in named if ".tuned." in n]
    groups = _groups([p for n, p in named if ".tuned." not in n], config)
    if tuning is not None:
        groups += [g | {"lr": tuning.learning_rate} for g in _groups(inner, tuning)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def _groups(parameters: list[nn.Parameter], config: TrainConfig | PretrainConfig | TuningConfig) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_scheduler(
    optimizer: torch.optim.Optimizer, steps: int, warmup: int, cosine: bool, tuning: TuningConfig | None = None
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up of so many steps, then constant or a cosine to zero over all steps; the TextEncoder has its own."""
    factors = [_factor(steps, warmup, cosine)] * len(optimizer.param_groups)
    if tuning is not None:
        factors[-2:] = [_factor(steps, round(tuning.warmup_share * steps), tuning.schedule == "cosine")] * 2
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _factor(steps: int, warmup: int, cosine: bool) -> Callable[[int], float]:

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if not cosine:
            return 1.0
        share = (step - warmup) / max(1, steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return factor
