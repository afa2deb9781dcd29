"""What a history event says besides its item: actions, time gap, place in its session, features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig
from mtrec_ray.features import LIMIT
from mtrec_ray.models.batch import GAP_BUCKETS, SESSION_BUCKETS, HistoryBatch
from mtrec_ray.models.features import FeatureEmbedding
from mtrec_ray.schema import ActionSpec, LogSchema


class ActionEmbedding(nn.Module):
    """An action as a vector: an embedding of its value if it has few, else its standardised value, cut like a feature's."""

    values: Tensor

    def __init__(self, spec: ActionSpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        if spec.values is not None:
            self.register_buffer("values", torch.tensor(sorted(spec.values)), persistent=False)
            self.embedding = nn.Embedding(len(spec.values) + 1, width)  # 0: missing or unknown
        else:
            self.embedding = nn.Embedding(2, width)  # missing, present
            self.linear = nn.Linear(1, width, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, value: Tensor) -> Tensor:
        """value: float, NaN is missing, any shape -> shape + (D,)."""
        missing = torch.isnan(value)
        if self.spec.values is not None:
            place = torch.searchsorted(self.values, torch.nan_to_num(value)).clamp(max=len(self.values) - 1)
            known = ~missing & (self.values[place] == value)
            return self.embedding(torch.where(known, place + 1, 0))  # type: ignore[no-any-return]
        standard = torch.where(missing, 0.0, (value - self.spec.mean) / self.spec.std).clamp(-LIMIT, LIMIT)
        return self.embedding((~missing).long()) + self.linear(standard[..., None])  # type: ignore[no-any-return]


class EventTokens(nn.Module):
    """item vector + actions + time gap + place in the session + features -> token_BSD."""

    def __init__(self, config: ModelConfig, schema: LogSchema, text_width: int = 0) -> None:
        """text_width: of the TextEncoder's vectors, where events have texts."""
        super().__init__()
        self.actions = nn.ModuleDict({a.name: ActionEmbedding(a, config.width) for a in schema.actions})
        self.gap = nn.Embedding(GAP_BUCKETS, config.width)
        nn.init.normal_(self.gap.weight, std=0.02)
        self.context = nn.ModuleDict({c.name: FeatureEmbedding(c, config.width, 0.02, text_width) for c in schema.history_features})
        self.session = None if schema.session_gap_minutes is None else nn.Embedding(SESSION_BUCKETS, config.width)
        if self.session is not None:
            nn.init.normal_(self.session.weight, std=0.02)

    def forward(self, item_vec_BSD: Tensor, history: HistoryBatch) -> Tensor:
        """item_vec_BSD: vectors of the history's items."""
        token = item_vec_BSD + self.gap(history.gap_BS)
        for name, embed in self.actions.items():
            token = token + embed(history.actions_BS[name])
        for name, embed in self.context.items():
            token = token + embed(history.context_BS[name])
        if self.session is not None:
            assert history.session_BS is not None
            token = token + self.session(history.session_BS)
        return token
