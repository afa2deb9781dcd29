"""sasrec: a causal pre-norm transformer over events (SASRec: Kang & McAuley 2018, arXiv 1808.09781)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.dropout import Dropout
from mtrec_ray.models.trunks.attention import AttentionLayer
from mtrec_ray.models.trunks.base import Scope, Trunk


class SasRecLayer(AttentionLayer):
    """x + Attention(norm(x)), then x + W₂ gelu(W₁ norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm_attention = nn.LayerNorm(config.width)
        self.norm_forward = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, config.feed_forward)
        self.down = nn.Linear(config.feed_forward, config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BQD: Tensor, scope: Scope, index: int) -> Tensor:
        x_BQD = x_BQD + self.dropout(self.attend(self.norm_attention(x_BQD), scope, index))
        return x_BQD + self.dropout(self.down(F.gelu(self.up(self.norm_forward(x_BQD)))))  # type: ignore[no-any-return]


class SasRec(Trunk):
    """Learned positions, counted from the start token."""

    def __init__(self, config: ModelConfig, length: int) -> None:
        super().__init__(config, length, lambda: SasRecLayer(config), position=True)
