"""A few collectives that also work alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    return dist.get_world_size() if is_distributed() else 1


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def broadcast_tensor(value: torch.Tensor) -> torch.Tensor:
    """Rank 0's values, in place."""
    if is_distributed():
        dist.broadcast(value, 0)
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    if not is_distributed():
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(all_reduce_sum(torch.tensor(float(flag), device=device)) > 0)


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not is_distributed():
        return [value]
    out: list[Any] = [None] * world_size()
    dist.all_gather_object(out, value)
    return out


def gather_rows(row_PE: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """All ranks' rows on every rank, in the order of the ranks; counts: rows of each. The gradient of a row is the sum over all
    ranks and goes back to the rank that gave it."""
    if not is_distributed():
        return row_PE
    return _Gathered.apply(row_PE, counts, _own_group())  # type: ignore[no-any-return, no-untyped-call]


_groups: list[Any] = []
"""(the process group of all, another one of all ranks)."""


def _own_group() -> Any:
    """A process group for sums in the backward pass: DDP's run at the same time, in an order of theirs."""
    if not _groups or _groups[0] is not dist.group.WORLD:
        _groups[:] = [dist.group.WORLD, dist.new_group()]
    return _groups[1]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row_PE: torch.Tensor, counts: list[int], group: Any) -> torch.Tensor:  # type: ignore[override]
        ctx.counts, ctx.group = counts, group
        padded = row_PE.new_zeros(max(counts), row_PE.shape[1])
        padded[: len(row_PE)] = row_PE
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_WE: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        total_WE = grad_WE.contiguous().clone()
        dist.all_reduce(total_WE, group=ctx.group)
        begin = sum(ctx.counts[: rank()])
        return total_WE[begin : begin + ctx.counts[rank()]], None, None
