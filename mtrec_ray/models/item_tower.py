"""The item tower: an item is its text plus a correction (DESIGN §1.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig


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
        self.residual = nn.Embedding(n_train_items, config.width)
        nn.init.normal_(self.residual.weight, std=0.02 if text_width else config.width**-0.5)

    def forward(self, text_NE: Tensor | None, n_items: int, step: int | None = None) -> Tensor:
        """Item vectors of the first n_items of the catalogue -> item_vec_ND.

        text_NE: unit-length text vectors (or None without text); step: the training step, None at inference.
        """
        residual_ND = self.residual.weight[:n_items]
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
