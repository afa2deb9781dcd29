"""sasrec: a causal pre-norm transformer over events (SASRec: Kang & McAuley 2018, arXiv 1808.09781)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.trunks.base import Trunk


class Layer(nn.Module):
    """Pre-norm self-attention and feed-forward, each with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm_forward = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).view(B, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        # no dropout on attention weights: it keeps CPUs and GPUs from the fused kernel (3.5 x slower here)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.dropout(self.out(attended.transpose(1, 2).reshape(B, L, D)))
        return x_BLD + self.dropout(self.down(F.gelu(self.up(self.norm_forward(x_BLD)))))  # type: ignore[no-any-return]


class SasRec(Trunk):
    """Learned positions, counted from the start token."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__()
        self.length = length
        self.start = nn.Parameter(torch.randn(config.width) * 0.02)
        self.position = nn.Embedding(length, config.width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, token_BSD: Tensor, time_BS: Tensor) -> Tensor:
        B, S, D = token_BSD.shape
        assert self.length > S, f"{S} events do not fit a window of {self.length}"
        x_BLD = torch.cat([self.start.expand(B, 1, D), token_BSD], dim=1)
        x_BLD = self.dropout(x_BLD + self.position.weight[: S + 1])
        for layer in self.layers:
            x_BLD = layer(x_BLD)
        return self.norm(x_BLD)  # type: ignore[no-any-return]
