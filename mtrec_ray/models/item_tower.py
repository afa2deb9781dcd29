"""The item tower: an item is its text plus a correction (DESIGN §1.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.hashing import GOLDEN, mix


class ItemLookup(Protocol):
    """Item vectors by catalogue position: positions of any shape -> shape + (D,)."""

    def __getitem__(self, item: Tensor, /) -> Tensor: ...


@dataclass
class ItemVectors:
    """Vectors of the training catalogue, or of the items alone that a batch reads; looked up by catalogue position."""

    vec_UD: Tensor
    item_U: Tensor | None = None
    """Ascending catalogue positions of the rows; None: row i is item i."""

    def __getitem__(self, item: Tensor) -> Tensor:
        """Catalogue positions of any shape -> shape + (D,). The backward of an embedding is faster than that of indexing."""
        return F.embedding(item if self.item_U is None else torch.searchsorted(self.item_U, item), self.vec_UD)

    @property
    def all_ND(self) -> Tensor:
        """The whole training catalogue, for a task that asked for it (`Task.reads_items`)."""
        if self.item_U is not None:
            raise RuntimeError(f"{len(self.item_U)} item vectors were made, not the catalogue; its task must ask for all of them")
        return self.vec_UD


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

    def forward(self, items: slice | Tensor) -> Tensor:
        """Some training items -> residual_UD."""
        if self.buckets is not None:
            return self.table(self.bucket_N2[items]).sum(1)  # type: ignore[no-any-return]
        return self.table.weight[items] if isinstance(items, slice) else self.table(items)  # type: ignore[no-any-return]


class ItemTower(nn.Module):
    """item vector = projection of the text vector + id residual.

    The residual is zero for items outside the training catalogue, and dropped at random in training, drawn
    from (seed, step) for the whole catalogue so that every rank drops the same items.
    Without text (text_width 0) the residual is the whole vector.
    """

    def __init__(self, config: ModelConfig, n_train_items: int, text_width: int, seed: int) -> None:
        super().__init__()
        self.seed, self.n_train_items = seed, n_train_items
        self.id_dropout = config.id_dropout if text_width else 0.0
        self.text = nn.Linear(text_width, config.width) if text_width else None
        self.residual = IdResiduals(config, n_train_items, 0.02 if text_width else config.width**-0.5)

    def forward(self, text_NE: Tensor | None, n_items: int) -> Tensor:
        """Inference: vectors of the first n_items of the catalogue -> item_vec_ND. text_NE: unit-length text vectors, or None
        without text."""
        residual_ND = self.residual(slice(n_items))
        missing = n_items - len(residual_ND)
        if missing > 0:
            residual_ND = torch.cat([residual_ND, residual_ND.new_zeros(missing, residual_ND.shape[1])])
        return self._with_text(residual_ND, None if text_NE is None else text_NE[:n_items])

    def with_texts(self, text_UE: Tensor, item_U: Tensor) -> Tensor:
        """Inference: vectors of items by other texts than in training. item_U: their catalogue positions; what is not in the
        training catalogue (-1 too) has no residual."""
        trained = (item_U >= 0) & (item_U < self.n_train_items)
        residual_UD = text_UE.new_zeros(len(item_U), self.residual.table.weight.shape[1])
        residual_UD[trained] = self.residual(item_U[trained])
        return self._with_text(residual_UD, text_UE)

    def train_vectors(self, text_UE: Tensor | None, item_U: Tensor | None, step: int) -> ItemVectors:
        """Training: vectors of some training items (ascending), None for all of them, at a step. text_UE: theirs."""
        items = slice(self.n_train_items) if item_U is None else item_U
        residual_UD = self.residual(items)
        if self.training and self.id_dropout:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
            keep_N = torch.rand(self.n_train_items, generator=generator) >= self.id_dropout
            residual_UD = residual_UD * keep_N.to(residual_UD.device)[items, None]
        return ItemVectors(self._with_text(residual_UD, text_UE), item_U)

    def _with_text(self, residual_UD: Tensor, text_UE: Tensor | None) -> Tensor:
        if self.text is None:
            return residual_UD
        assert text_UE is not None
        return residual_UD + self.text(text_UE * text_UE.shape[1] ** 0.5)  # type: ignore[no-any-return]
