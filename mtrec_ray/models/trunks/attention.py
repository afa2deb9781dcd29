"""Causal softmax attention: softmax(Q Kᵀ / √E) V with H heads of width E = D / H (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.trunks.base import Layer, Scope


class AttentionLayer(Layer):
    """Holds the projections of its attention; subclasses say what stands around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def attend(self, x_BQD: Tensor, scope: Scope, index: int) -> Tensor:
        B, Q, D = x_BQD.shape
        q, k, v = self.qkv(x_BQD).view(B, Q, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        k, v = scope.known(index, k, v)
        mask = scope.visible_BQK[:, None] if scope.append else None
        if x_BQD.device.type == "cpu":  # in bf16 the backward pass of its kernel is 8 x slower on a CPU
            q, k, v = q.float(), k.float(), v.float()
        # no dropout on attention weights: it keeps CPUs and GPUs from the fused kernel (3.5 x slower here)
        with torch.autocast("cpu", enabled=False):
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(attended.transpose(1, 2).reshape(B, Q, D))  # type: ignore[no-any-return]
