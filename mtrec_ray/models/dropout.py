"""Dropout whose draws are cheap on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Inverted dropout (Srivastava et al. 2014). On a CPU torch draws one number per element from a serial generator, which
    took a tenth of a training step; here a 64-bit draw serves four elements, so that p is a multiple of 2^-16."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.level = round(p * 65536)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.level:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
        keep = draws.view(torch.int16)[: x.numel()].view(x.shape) >= self.level - 32768
        return x * keep.to(x.dtype).mul_(65536 / (65536 - self.level))
