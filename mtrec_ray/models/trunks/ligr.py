"""ligr: gated residuals and SwiGLU (LiGR: Borisyuk et al. 2025, arXiv 2502.03417; as in eSASRec, arXiv 2508.06450)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.dropout import Dropout
from mtrec_ray.models.trunks.attention import AttentionLayer
from mtrec_ray.models.trunks.base import Scope, Trunk


class LigrLayer(AttentionLayer):
    """x + σ(G₁ x + b₁) ⊙ Attention(norm(x)), then x + σ(G₂ x + b₂) ⊙ SwiGLU(norm(x)).

    SwiGLU(z) = W₂ (silu(W₁ z) ⊙ W₃ z) without biases (Shazeer 2020, arXiv 2002.05202): at equal `feed_forward` it has half
    as many weights again as that of `sasrec`. The gates read x before its norm, one number per dimension. RecTools' LiGRLayers are
    the same but for dropout on attention weights.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm_attention = nn.LayerNorm(config.width)
        self.norm_forward = nn.LayerNorm(config.width)
        self.gate_attention = nn.Linear(config.width, config.width)
        self.gate_forward = nn.Linear(config.width, config.width)
        self.up = nn.Linear(config.width, 2 * config.feed_forward, bias=False)  # W₁ and W₃
        self.down = nn.Linear(config.feed_forward, config.width, bias=False)
        self.dropout_hidden = Dropout(config.dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BQD: Tensor, scope: Scope, index: int) -> Tensor:
        attended = self.dropout(self.attend(self.norm_attention(x_BQD), scope, index))
        x_BQD = x_BQD + torch.sigmoid(self.gate_attention(x_BQD)) * attended
        silu, linear = self.up(self.norm_forward(x_BQD)).chunk(2, dim=-1)
        hidden = self.down(self.dropout_hidden(F.silu(silu) * linear))
        return x_BQD + torch.sigmoid(self.gate_forward(x_BQD)) * self.dropout(hidden)  # type: ignore[no-any-return]


class Ligr(Trunk):
    """Learned positions, counted from the start token."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__(config, length, lambda: LigrLayer(config), position=True)
