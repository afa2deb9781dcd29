"""Rows of tokens: texts packed without gaps, and the masks of masked language modelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -100
"""Label of a position without a loss."""


@dataclass(frozen=True)
class Special:
    """Numbers of a tokenizer's own tokens."""

    begin: tuple[int, ...]
    """In front of every row: [CLS], or nothing."""
    between: tuple[int, ...]
    """After every text: [SEP] or end of text."""
    pad: int
    mask: int | None
    never: tuple[int, ...]
    """Never masked and never drawn in place of a masked one."""
    vocabulary: int

    @classmethod
    def of(cls, tokenizer: Any) -> Special:
        end = next(t for t in (tokenizer.sep_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0) if t is not None)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        begin = () if tokenizer.cls_token_id is None else (tokenizer.cls_token_id,)
        return cls(begin, (end,), pad, tokenizer.mask_token_id, tuple(sorted({*tokenizer.all_special_ids, pad})), len(tokenizer))


def rows_of(texts: list[list[int]], block: int, special: Special) -> int:
    """Rows that the texts fill, in any order."""
    return -(-sum(len(t) + len(special.between) for t in texts) // (block - len(special.begin)))


def pack(texts: list[list[int]], block: int, special: Special) -> tuple[Tensor, Tensor]:
    """Token lists, in this order -> token_NT (int64) and real_NT (bool), T = block. Nothing is cut off: a text goes on in the
    next row, and the last row is padded (RoBERTa's full sentences, Liu et al. 2019, arXiv 1907.11692)."""
    body, rows = block - len(special.begin), rows_of(texts, block, special)
    stream = np.concatenate([np.zeros(0, np.int64), *[np.array([*t, *special.between], np.int64) for t in texts]])
    token = np.full((rows, block), special.pad, np.int64)
    token[:, : len(special.begin)] = special.begin
    filled = np.full(rows * body, special.pad, np.int64)
    filled[: len(stream)] = stream
    token[:, len(special.begin) :] = filled.reshape(rows, body)
    real = np.zeros((rows, block), bool)
    real[:, : len(special.begin)] = True
    real[:, len(special.begin) :] = (np.arange(rows * body) < len(stream)).reshape(rows, body)
    return torch.from_numpy(token), torch.from_numpy(real)


def masked(token_BT: Tensor, real_BT: Tensor, special: Special, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """What the model sees and what it must say -> (token_BT, label_BT).

    `share` of the real tokens are chosen anew for every seed (dynamic masking); of these 80 % become the mask, 10 % a random
    token, 10 % stay (Devlin et al. 2019, arXiv 1810.04805). transformers' DataCollatorForLanguageModeling does this from a state of
    its own; here a step's masks come from its seed alone, on any number of ranks and after a resume.
    """
    assert special.mask is not None
    generator = torch.Generator().manual_seed(seed % 2**63)
    never = torch.zeros(special.vocabulary, dtype=torch.bool)
    never[[t for t in special.never if t < special.vocabulary]] = True
    u, kind = (torch.rand(token_BT.shape, generator=generator) for _ in range(2))
    chosen = (u < share) & real_BT & ~never[token_BT]
    usable = torch.nonzero(~never).flatten()
    drawn = usable[torch.randint(len(usable), token_BT.shape, generator=generator)]
    seen = torch.where(chosen & (kind < 0.8), special.mask, token_BT)
    seen = torch.where(chosen & (kind >= 0.9), drawn, seen)
    return seen, torch.where(chosen, token_BT, IGNORED)


def following(token_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Label of causal language modelling: the next token of the row, where it is a real one -> label_BT."""
    label = torch.full_like(token_BT, IGNORED)
    label[:, :-1] = torch.where(real_BT[:, 1:], token_BT[:, 1:], IGNORED)
    return label


def order(n: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(n)
