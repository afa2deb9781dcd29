"""The sum of −log softmax over many candidates, with its gradient made in the same pass.

    loss = Σ_p (log Z_row(p) − s_p),   Z_r = Σ_{targets t of r} e^{s_t} + Σ_{columns u not hidden in r} e^{s_ru + bias_u}

Rows are done in blocks that fit a processor's cache. A block's logits become their own exponentials in place, which
the two products of the gradient read at once; nothing of the size rows x candidates outlives its block. Scaling a row
by 1 / Z commutes with these products, so it is done on vectors of width D. As in "Cut Your Losses in Large-Vocabulary
Language Models" (Wijmans et al. 2024, arXiv 2411.09009), whose kernels are for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CACHED = {"cpu": 1 << 18}
"""Logits of a block by device: 1 MiB on a CPU."""
OTHERWISE = 1 << 25
LEAST_ROWS = 16


@dataclass(frozen=True)
class Hidden:
    """Candidates that leave a row's denominator, as places row · columns + column, row after row."""

    place: Tensor

    def within(self, edges: Tensor) -> list[int]:
        """Bounds of the blocks whose first places are `edges`."""
        return torch.searchsorted(self.place, edges).tolist()  # type: ignore[no-any-return]


def softmax_loss(
    query_RD: Tensor,
    vec_CD: Tensor,
    row_P: Tensor,
    target_P: Tensor,
    columns: int,
    hidden: list[Hidden],
    bias_U: Tensor | None = None,
) -> Tensor:
    """Sum over the P targets.

    vec_CD: vectors; the first U = `columns` of them are the candidates of every row. row_P, ascending: each target's row;
    target_P: its place in vec_CD. A target that stands twice in a row counts once in the denominator. `hidden` must
    hide every target that is a candidate too.
    """
    return _SoftmaxLoss.apply(query_RD, vec_CD, row_P, target_P, columns, hidden, bias_U)  # type: ignore[no-any-return, no-untyped-call]


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_RD: Tensor,
        vec_CD: Tensor,
        row_P: Tensor,
        target_P: Tensor,
        columns: int,
        hidden: list[Hidden],
        bias_U: Tensor | None,
    ) -> Tensor:
        R = len(query_RD)
        vec_UD = vec_CD[:columns]
        q_PD, v_PD = query_RD[row_P].float(), vec_CD[target_P].float()
        score_P = (q_PD * v_PD).sum(-1)
        once_P = _once(row_P, target_P)
        peak_R = score_P.new_full((R,), float("-inf")).scatter_reduce_(0, row_P, score_P, "amax")
        own_R = torch.zeros_like(peak_R).index_add_(0, row_P, once_P * torch.exp(score_P - peak_R[row_P])).log_().add_(peak_R)
        count_R = torch.bincount(row_P, minlength=R).to(score_P.dtype)
        wanted = any(ctx.needs_input_grad[:2])
        grad_query, grad_vec = torch.zeros_like(query_RD), torch.zeros_like(vec_CD)
        log_z_R = torch.empty_like(own_R)
        block = max(LEAST_ROWS, CACHED.get(query_RD.device.type, OTHERWISE) // max(1, columns))
        edges = torch.arange(0, R + block, block, device=query_RD.device).clamp(max=R)
        bounds = [h.within(edges * columns) for h in hidden]
        low = _autocast(query_RD)
        candidates_UD = vec_UD.to(low)
        for i, begin in enumerate(range(0, R, block)):
            end = min(begin + block, R)
            rows = query_RD[begin:end]
            logit = (rows.to(low) @ candidates_UD.T).float()
            if bias_U is not None:
                logit += bias_U
            for h, bound in zip(hidden, bounds, strict=True):
                logit.view(-1).index_fill_(0, h.place[bound[i] : bound[i + 1]] - begin * columns, float("-inf"))
            top = logit.amax(1).clamp_(min=torch.finfo(logit.dtype).min)  # a row may have no candidate left
            logit.sub_(top[:, None]).exp_()
            log_z = torch.logaddexp(logit.sum(1).log_().add_(top), own_R[begin:end])
            log_z_R[begin:end] = log_z
            if wanted:
                scale = (count_R[begin:end] * torch.exp(top - log_z))[:, None]
                share = logit.to(low)
                grad_query[begin:end] = (share @ candidates_UD) * scale
                grad_vec[:columns] += share.T @ (rows * scale).to(low)
        if wanted:
            slope_P = once_P * count_R[row_P] * torch.exp(score_P - log_z_R[row_P]) - 1
            grad_query.index_add_(0, row_P, (slope_P[:, None] * v_PD).to(grad_query.dtype))
            grad_vec.index_add_(0, target_P, (slope_P[:, None] * q_PD).to(grad_vec.dtype))
        ctx.save_for_backward(grad_query, grad_vec)
        return (count_R * log_z_R).sum() - score_P.sum()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_query, grad_vec = ctx.saved_tensors
        return grad_query * grad[0], grad_vec * grad[0], None, None, None, None, None


def _once(row_P: Tensor, target_P: Tensor) -> Tensor:
    """1 for the first of a row's equal targets, 0 for its repetitions (float)."""
    key_P = row_P * (target_P.max() + 1 if len(target_P) else 1) + target_P
    order = torch.argsort(key_P, stable=True)
    new = torch.ones(len(key_P), device=key_P.device)
    new[order[1:]] = (key_P[order[1:]] != key_P[order[:-1]]).float()
    return new


def _autocast(like: Tensor) -> torch.dtype:
    """The type of matrix products here and now."""
    kind = like.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
