"""Encoded features as vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.features import FIRST, MISSING, InputSpec, NumericalSpec, TextSpec


class FeatureEmbedding(nn.Module):
    """A feature's encoded value (features.py) as a vector of `width`.

    Numbers of a vocabulary and buckets have an embedding each, sets the mean or sum of theirs, standardised numbers a line, texts
    a projection of the TextEncoder's vector (of `text_width`, zero where there is none); missing numbers have an embedding of
    their own. What training may never show (missing, out of the vocabulary) starts as zero, so that it says nothing until it is
    learned; the empty set is always zero.
    """

    def __init__(self, spec: InputSpec, width: int, std: float, text_width: int = 0) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.linear = None
        self.embedding: nn.Embedding | nn.EmbeddingBag | None
        if isinstance(spec, TextSpec):
            self.embedding, self.linear = None, nn.Linear(text_width, width, bias=False)
            nn.init.normal_(self.linear.weight, std=std)
            return
        if isinstance(spec, NumericalSpec) and spec.transform != "quantile":
            self.embedding, untrained = nn.Embedding(2, width), [0]  # missing, present
            self.linear = nn.Linear(1, width, bias=False)
        elif isinstance(spec, NumericalSpec):
            self.embedding, untrained = nn.Embedding(spec.size, width), [MISSING]
        elif spec.kind == "multihot":
            self.embedding = nn.EmbeddingBag(spec.size, width, mode=spec.pool, padding_idx=MISSING)
            untrained = list(range(FIRST))
        else:
            self.embedding, untrained = nn.Embedding(spec.size, width), list(range(FIRST))
        nn.init.normal_(self.embedding.weight, std=std)
        with torch.no_grad():
            self.embedding.weight[untrained] = 0.0

    def forward(self, value: Tensor) -> Tensor:
        """int64 or float32 of any shape -> shape + (width,); sets: shape + (longest,) -> shape + (width,); texts: shape +
        (text_width,) -> shape + (width,)."""
        if self.embedding is None:
            assert self.linear is not None
            return self.linear(torch.nan_to_num(value))  # type: ignore[no-any-return]
        if self.linear is not None:
            missing = torch.isnan(value)
            line = self.linear(torch.nan_to_num(value)[..., None])
            return self.embedding((~missing).long()) + line  # type: ignore[no-any-return]
        if isinstance(self.embedding, nn.EmbeddingBag):
            return self.embedding(value.flatten(0, -2)).unflatten(0, value.shape[:-1])  # type: ignore[no-any-return]
        return self.embedding(value)  # type: ignore[no-any-return]
