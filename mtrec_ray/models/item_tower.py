"""The item tower: an item is its text plus a correction (DESIGN §1.3)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig
from mtrec_ray.hashing import GOLDEN, mix


class IdResiduals(nn.Module):
    """A learned vector per training item: a row of its own, or the sum of two rows of a bounded table.

    The two rows are chosen by hashes of the item's id, so that two items share both of them about once in buckets²
    pairs (double hashing, Zhang et al. 2020, arXiv 2007.14523). The table's size does not grow with the catalogue.
    """

    bucket_N2: Tensor

    def __init__(self, config: ModelConfig, n_train_items: int, std: float) -> None:
        super().__init__()
        self.buckets = config.id_buckets
        self.table = nn.Embedding(n_train_items if self.buckets is None else self.buckets, config.width)
        nn.init.normal_(self.table.weight, std=std if self.buckets is None else std * 0.5**0.5)
        if self.buckets is not None:
            self.register_buffer("bucket_N2", torch.zeros(n_train_items, 2, dtype=torch.int64))

    def name_items(self, hash_N: NDArray[np.uint64]) -> None:
        """hash_N: a hash of every training item's id, which chooses its rows; needed once, before training."""
        if self.buckets is not None:
            rows = [mix(hash_N), mix(hash_N ^ np.uint64(GOLDEN))]
            self.bucket_N2.copy_(torch.from_numpy(np.stack([r % np.uint64(self.buckets) for r in rows], 1).astype(np.int64)))

    def forward(self, n_items: int) -> Tensor:
        """-> residual_ND of the first n_items training items."""
        if self.buckets is None:
            return self.table.weight[:n_items]
        return self.table(self.bucket_N2[:n_items]).sum(1)  # type: ignore[no-any-return]


class ItemTower(nn.Module):
    """item vector = projection of the text vector + id residual.

    The residual is zero for items outside the training catalogue, and dropped at random in training, drawn
    from (seed, step) for the whole catalogue so that every rank drops the same items.
    Without text (text_width 0) the residual is the whole vector.
    """

    def __init__(self, config: ModelConfig, n_train_items: int, text_width: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.id_dropout = config.id_dropout if text_width else 0.0
        self.text = nn.Linear(text_width, config.width) if text_width else None
        self.residual = IdResiduals(config, n_train_items, 0.02 if text_width else config.width**-0.5)

    def forward(self, text_NE: Tensor | None, n_items: int, step: int | None = None) -> Tensor:
        """Item vectors of the first n_items of the catalogue -> item_vec_ND.

        text_NE: unit-length text vectors (or None without text); step: the training step, None at inference.
        """
        residual_ND = self.residual(n_items)
        if self.training and step is not None and self.id_dropout:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            keep = torch.rand(len(residual_ND), generator=generator).to(residual_ND.device) >= self.id_dropout
            residual_ND = residual_ND * keep[:, None]
        missing = n_items - len(residual_ND)
        if missing > 0:
            residual_ND = torch.cat([residual_ND, residual_ND.new_zeros(missing, residual_ND.shape[1])])
        if self.text is None:
            return residual_ND
        assert text_NE is not None
        return residual_ND + self.text(text_NE[:n_items] * text_NE.shape[1] ** 0.5)  # type: ignore[no-any-return]
