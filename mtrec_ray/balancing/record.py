"""How the tasks' gradients at the state agree, over an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class GradientRecord(nn.Module):
    """Mean norms and mean pairwise cosines of the Gramians seen in an epoch; buffers, so that a checkpoint keeps them."""

    cosine_TT: Tensor
    pairs_TT: Tensor
    norm_T: Tensor
    seen_T: Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        for name in ("cosine_TT", "pairs_TT"):
            self.register_buffer(name, torch.zeros(tasks, tasks, dtype=torch.float64))
        for name in ("norm_T", "seen_T"):
            self.register_buffer(name, torch.zeros(tasks, dtype=torch.float64))

    def add(self, gramian_TT: Tensor) -> None:
        """A task without a gradient in this batch is not counted."""
        norm_T = gramian_TT.diagonal().clamp(min=0).sqrt()
        there_T = (norm_T > 0).double()
        there_TT = there_T[:, None] * there_T[None, :]
        outer_TT = norm_T[:, None] * norm_T[None, :]
        self.cosine_TT += torch.where(there_TT > 0, gramian_TT / outer_TT.clamp(min=1e-300), 0.0)
        self.pairs_TT += there_TT
        self.norm_T += norm_T
        self.seen_T += there_T

    def scalars(self, names: Sequence[str]) -> dict[str, float]:
        """`gradient/TASK/norm` and `gradient/A|B/cosine` of the epoch; empties the record."""
        out = {}
        for i, a in enumerate(names):
            if self.seen_T[i] > 0:
                out[f"gradient/{a}/norm"] = float(self.norm_T[i] / self.seen_T[i])
            for j, b in enumerate(names[:i]):
                if self.pairs_TT[i, j] > 0:
                    out[f"gradient/{b}|{a}/cosine"] = float(self.cosine_TT[i, j] / self.pairs_TT[i, j])
        for buffer in self.buffers():
            buffer.zero_()
        return out
