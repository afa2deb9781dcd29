"""What pre-training learns: language modelling, near vectors for items taken together, the vectors of a larger model.

An objective gives the examples of an epoch, the module that DDP wraps (examples -> sum of losses) and what is measured on held-out
texts. A batch is drawn and made from its seed alone; `loop.py` splits it over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.encoders.text import pool
from mtrec_ray.pretraining.blocks import IGNORED, Special, following, masked, order, pack, rows_of
from mtrec_ray.training import distributed


@dataclass
class Examples:
    """Rows of a global batch."""

    inputs: tuple[Tensor, ...]
    """Of the objective's module, a row per example in each."""
    labels: int
    """What the loss is divided by."""
    tokens: int


class Source(Protocol):
    """The examples of an epoch, or those held out."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, seed: int) -> Examples: ...


class Objective(Protocol):
    name: str
    measure: str
    """What is measured on held-out texts."""
    module: nn.Module
    """(*inputs, weight_B) -> sum of losses over rows of weight 1; those of weight 0 are padding."""
    held: dict[str, Source]
    rows: int
    """Examples of an epoch."""

    def epoch(self, seed: int) -> Source: ...

    def summary(self, mean_loss: float) -> float:
        """What is reported of a mean loss."""


def spread(examples: Examples, rank: int, world: int) -> tuple[Tensor, ...]:
    """A rank's rows, equally many on every rank, and their weights: the last ones may be padding of weight 0."""
    n = len(examples.inputs[0])
    place = torch.arange(rank, world * -(-n // world), world)
    weight_B = (place < n).float()
    return (*(t[place.clamp(max=n - 1)] for t in examples.inputs), weight_B)


# -- language modelling


class LanguageModelling:
    """Masked or causal language modelling over packed rows."""

    measure = "perplexity"

    def __init__(
        self, config: PretrainConfig, model: nn.Module, train: list[list[int]], held: dict[str, list[list[int]]], special: Special,
        mlm: bool,
    ) -> None:  # fmt: skip
        self.name = "mlm" if mlm else "clm"
        self.config, self.special, self.mlm, self.train = config, special, mlm, train
        self.module: nn.Module = TokenLosses(model)
        self.held: dict[str, Source] = {kind: Rows(t, config, special, mlm) for kind, t in held.items()}
        self.rows = rows_of(train, config.block, special)

    def epoch(self, seed: int) -> Rows:
        """Texts packed in another order."""
        return Rows([self.train[i] for i in order(len(self.train), seed)], self.config, self.special, self.mlm)

    def summary(self, mean_loss: float) -> float:
        return math.exp(min(50.0, mean_loss))


class Rows:
    """Packed rows and what is asked about them."""

    def __init__(self, texts: list[list[int]], config: PretrainConfig, special: Special, mlm: bool) -> None:
        self.config, self.special, self.mlm = config, special, mlm
        self.token_NT, self.real_NT = pack(texts, config.block, special)

    def __len__(self) -> int:
        return len(self.token_NT)

    def batch(self, index: Tensor, seed: int) -> Examples:
        """Inputs token_BT, real_BT, label_BT."""
        token, real = self.token_NT[index], self.real_NT[index]
        if self.mlm:
            seen, label = masked(token, real, self.special, self.config.mask_share, seed)
        else:
            seen, label = token, following(token, real)
        return Examples((seen, real, label), int((label != IGNORED).sum()), int(real.sum()))


HEADS = ("cls", "lm_head")
"""Names of a language model's head that reads hidden states alone; of another one all logits are made."""


class TokenLosses(nn.Module):
    """Rows -> sum of −log p over their labels. The head, half of a small model's work, reads the labelled positions alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.head = next((n for n in HEADS if hasattr(model, n) and getattr(model, "base_model", model) is not model), None)

    def forward(self, token_BT: Tensor, real_BT: Tensor, label_BT: Tensor, weight_B: Tensor) -> Tensor:
        label_BT = torch.where(weight_B[:, None] > 0, label_BT, IGNORED)
        asked_BT, inputs = label_BT != IGNORED, {"input_ids": token_BT, "attention_mask": real_BT.long()}
        if self.head is None:
            logit_QV = self.model(**inputs).logits[asked_BT]
        else:
            hidden_BTE = self.model.base_model(**inputs).last_hidden_state  # type: ignore[operator, union-attr]
            logit_QV = getattr(self.model, self.head)(hidden_BTE[asked_BT])
        return F.cross_entropy(logit_QV.float(), label_BT[asked_BT], reduction="sum")


# -- vectors


class Padded:
    """Token lists as a matrix."""

    def __init__(self, pieces: Sequence[Sequence[int]], pad: int) -> None:
        width = max(map(len, pieces), default=1)
        self.token_NS = torch.full((len(pieces), width), pad)
        self.length_N = torch.tensor([len(p) for p in pieces], dtype=torch.int64)
        for row, piece in zip(self.token_NS, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece)

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """-> token_BS, length_B, as wide as the longest needs."""
        length_B = self.length_N[index]
        return self.token_NS[index][:, : int(length_B.max())], length_B


class Vectors(nn.Module):
    """Token lists -> unit vectors, as the TextEncoder makes them."""

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model, self.pooling = model, pooling

    def forward(self, token_BS: Tensor, length_B: Tensor) -> Tensor:
        mask_BS = (torch.arange(token_BS.shape[1], device=token_BS.device) < length_B[:, None]).long()
        hidden_BSE = self.model(input_ids=token_BS, attention_mask=mask_BS).last_hidden_state
        return F.normalize(pool(hidden_BSE.float(), mask_BS, self.pooling), dim=-1)


class Contrastive:
    """InfoNCE over the pairs of a global batch, in both directions (van den Oord et al. 2018, arXiv 1807.03748; the multiple
    negatives ranking loss of sentence-transformers). A text that is one of the pair's own is no negative of it."""

    name, measure = "contrastive", "info_nce"

    def __init__(
        self, config: PretrainConfig, model: nn.Module, pooling: str, texts: Padded, train: Tensor, held: Tensor
    ) -> None:  # fmt: skip
        """texts: of all items; train, held: pairs (P, 2) of their numbers."""
        self.config, self.texts, self.train = config, texts, train
        self.module: nn.Module = PairLosses(Vectors(model, pooling), config.temperature)
        self.held: dict[str, Source] = {"pairs": Pairs(texts, held)} if len(held) else {}
        self.rows = min(config.pairs, len(train))

    def epoch(self, seed: int) -> Pairs:
        """Pairs drawn anew."""
        return Pairs(self.texts, self.train[torch.from_numpy(order(len(self.train), seed)[: self.rows])])

    def summary(self, mean_loss: float) -> float:
        return mean_loss


class Pairs:
    def __init__(self, texts: Padded, pair_P2: Tensor) -> None:
        self.texts, self.pair_P2 = texts, pair_P2

    def __len__(self) -> int:
        return len(self.pair_P2)

    def batch(self, index: Tensor, seed: int) -> Examples:
        """Inputs tokens and lengths of both sides, and the texts' numbers."""
        a_B, b_B = self.pair_P2[index].unbind(1)
        (token_a, length_a), (token_b, length_b) = self.texts.rows(a_B), self.texts.rows(b_B)
        tokens = int(length_a.sum() + length_b.sum())
        return Examples((token_a, length_a, token_b, length_b, a_B, b_B), len(index), tokens)


class PairLosses(nn.Module):
    """Pairs -> sum over them of the mean of −log softmax in both directions, over all ranks' pairs."""

    def __init__(self, vectors: Vectors, temperature: float) -> None:
        super().__init__()
        self.vectors, self.temperature = vectors, temperature

    def forward(
        self, token_a: Tensor, length_a: Tensor, token_b: Tensor, length_b: Tensor, a_B: Tensor, b_B: Tensor, weight_B: Tensor
    ) -> Tensor:  # fmt: skip
        vector_aE, vector_bE = self.vectors(token_a, length_a), self.vectors(token_b, length_b)
        counts = [len(a_B)] * distributed.world_size()
        side_AE, side_BE = distributed.gather_rows(vector_aE, counts), distributed.gather_rows(vector_bE, counts)
        facts = distributed.gather_rows(torch.stack([a_B.double(), b_B.double(), weight_B.double()], 1), counts)
        own = torch.arange(len(a_B), device=a_B.device) + distributed.rank() * len(a_B)
        total = self._side(vector_aE, side_BE, facts[:, 1], facts[:, 2], a_B, b_B, own, weight_B)
        return (total + self._side(vector_bE, side_AE, facts[:, 0], facts[:, 2], b_B, a_B, own, weight_B)) / 2

    def _side(
        self, anchor_RE: Tensor, side_BE: Tensor, text_B: Tensor, real_B: Tensor, mine_R: Tensor, other_R: Tensor, own_R: Tensor,
        weight_R: Tensor,
    ) -> Tensor:  # fmt: skip
        score_RB = anchor_RE @ side_BE.T / self.temperature
        away = (text_B[None] == mine_R[:, None]) | (text_B[None] == other_R[:, None]) | (real_B[None] == 0)
        away[torch.arange(len(own_R), device=own_R.device), own_R] = False
        loss_R = F.cross_entropy(score_RB.masked_fill(away, float("-inf")), own_R, reduction="none")
        return (loss_R * weight_R).sum()


class Distillation:
    """A model's vectors from one with fewer layers: squared distance of unit vectors, twice one minus their cosine (the
    embedding distillation of Reimers & Gurevych 2020, arXiv 2004.09813)."""

    name, measure = "distil", "distance"

    def __init__(
        self, model: nn.Module, pooling: str, train: tuple[Padded, Tensor], held: dict[str, tuple[Padded, Tensor]]
    ) -> None:
        """train, held: texts and the teacher's vectors."""
        self.train = Taught(*train)
        self.module: nn.Module = Distances(Vectors(model, pooling))
        self.held: dict[str, Source] = {kind: Taught(*pair) for kind, pair in held.items()}
        self.rows = len(self.train)

    def epoch(self, seed: int) -> Taught:
        return self.train

    def summary(self, mean_loss: float) -> float:
        return mean_loss


class Taught:
    def __init__(self, texts: Padded, teacher_NE: Tensor) -> None:
        self.texts, self.teacher_NE = texts, teacher_NE

    def __len__(self) -> int:
        return len(self.teacher_NE)

    def batch(self, index: Tensor, seed: int) -> Examples:
        token, length = self.texts.rows(index)
        return Examples((token, length, self.teacher_NE[index]), len(index), int(length.sum()))


class Distances(nn.Module):
    def __init__(self, vectors: Vectors) -> None:
        super().__init__()
        self.vectors = vectors

    def forward(self, token_BS: Tensor, length_B: Tensor, teacher_BE: Tensor, weight_B: Tensor) -> Tensor:
        return (((self.vectors(token_BS, length_B) - teacher_BE) ** 2).sum(1) * weight_B).sum()


def shortened(model: Any, layers: int) -> Any:
    """The model with so many of its layers, evenly spread from the first to the last, in place (Sanh et al. 2019, DistilBERT,
    arXiv 1910.01108). Raises ValueError when it has no more."""
    name, stack = layer_stack(model)
    if layers >= len(stack):
        raise ValueError(f"{layers} layers of {len(stack)}: there is nothing to leave out")
    kept = sorted({round(i) for i in np.linspace(0, len(stack) - 1, layers)})
    parent = model.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList([stack[i] for i in kept]))
    model.config.num_hidden_layers = len(kept)
    for place, layer in enumerate(stack[i] for i in kept):  # some count themselves, for a cache
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    return model


def layer_stack(model: Any) -> tuple[str, nn.ModuleList]:
    """(name, the transformer's layers). Raises ValueError for an architecture that keeps them otherwise."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise ValueError(f"{model.config.model_type} has no list of {model.config.num_hidden_layers} layers to choose from")
