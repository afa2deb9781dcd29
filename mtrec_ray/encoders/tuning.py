"""Fine-tuning inside the recommender: the text vectors of a step, with gradients into the TextEncoder.

The items of the global batch are encoded once: the ranks share the distinct texts out and gather the vectors, whose gradients
go back to the rank that encoded them. With `items_per_step` only some of them get gradients and the others are read from the
cache of last vectors, which every step renews (central encoding and cached embeddings: Xiao et al. 2021, Training Large-Scale
News Recommenders with Pretrained Language Models in the Loop, arXiv 2102.09268).
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtrec_ray.config import EncoderConfig, TuningConfig
from mtrec_ray.encoders.loading import EncoderError, save_model
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.training import distributed

NONE = -1
"""Text of an item without one."""


class TunedTexts(nn.Module):
    """The TextEncoder and the texts of the catalogue. Its dropout is off, so that a step is the same on any number of ranks."""

    text_N: Tensor

    def __init__(self, config: EncoderConfig, texts: Sequence[str | None], seed: int) -> None:
        """texts: of the whole catalogue. Raises EncoderError."""
        super().__init__()
        assert config.tuning is not None
        check_tuning(config)
        self.tuning, self.seed = config.tuning, seed
        self.encoder = TextEncoder(config.model_copy(update={"precision": "float32", "compile": False}))
        known = sorted({t for t in texts if t})
        self.pieces, _ = self.encoder.tokens(known)
        number = {t: i for i, t in enumerate(known) if self.pieces[i]}
        text_N = torch.tensor([number.get(t, NONE) if t else NONE for t in texts], dtype=torch.int64)
        self.register_buffer("text_N", text_N, persistent=False)
        self.model = _prepared(self.encoder.model, self.tuning, seed)
        self.encoder.model = self.model

    def forward(self, text_NE: Tensor, item_U: Tensor | None, n_items: int, step: int) -> Tensor:
        """Text vectors of a step -> (U, E), or (n_items, E) where item_U is None: the whole training catalogue.

        text_NE: the cache, renewed in place for what is encoded.
        """
        items = torch.arange(n_items, device=text_NE.device) if item_U is None else item_U
        text_W = self._chosen(items, step)
        vector_WE = self._encode(text_W)
        place_N = torch.searchsorted(text_W, self.text_N).clamp(max=len(text_W) - 1)
        fresh_N = text_W[place_N] == self.text_N
        with torch.no_grad():
            text_NE[fresh_N] = vector_WE.detach()[place_N[fresh_N]].to(text_NE.dtype)
        return torch.where(fresh_N[items, None], vector_WE[place_N[items]], text_NE[items])

    @torch.no_grad()
    def refresh(self, text_NE: Tensor) -> None:
        """Encode all texts with the weights of now, each rank its share, into the cache."""
        self.encoder.device = text_NE.device
        text_W = torch.arange(len(self.pieces), device=text_NE.device)
        text_W = text_W[torch.tensor([bool(p) for p in self.pieces], device=text_NE.device)]
        vector_WE, place = self._encode(text_W), torch.searchsorted(text_W, self.text_N.clamp(min=0))
        text_NE[self.text_N >= 0] = vector_WE[place[self.text_N >= 0]].to(text_NE.dtype)

    def export(self, folder: str) -> None:
        """Write a Hugging Face directory, local or on an object store, adapters merged."""
        model = self.model.merge_and_unload() if self.tuning.kind == "lora" else self.model  # type: ignore[operator]
        save_model(model, self.encoder.tokenizer, folder)

    def _chosen(self, items: Tensor, step: int) -> Tensor:
        """Texts that the global batch reads, or a draw of `items_per_step` of them: ascending, the same on every rank. Never none:
        DDP waits for the encoder's gradients, be they zero."""
        wanted_N = torch.zeros(len(self.text_N), device=items.device)
        wanted_N[items] = 1
        wanted_N = distributed.all_reduce_sum(wanted_N)
        text_W = torch.unique(self.text_N[(wanted_N > 0) & (self.text_N >= 0)])
        limit = self.tuning.items_per_step
        if not len(text_W):
            return self.text_N[self.text_N >= 0][:1]
        if limit is None or len(text_W) <= limit:
            return text_W
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step * 4_099 + 17) % 2**63)
        drawn = torch.randperm(len(text_W), generator=generator)[:limit].sort().values
        return text_W[drawn.to(text_W.device)]

    def _encode(self, text_W: Tensor) -> Tensor:
        """Vectors of some texts, encoded by all ranks together."""
        self.encoder.device = text_W.device
        world, rank = distributed.world_size(), distributed.rank()
        counts = [len(part) for part in torch.tensor_split(text_W, world)]
        mine = torch.tensor_split(text_W, world)[rank].tolist()
        # a rank without a share encodes one text all the same: DDP waits for the gradients of every rank
        pieces = [self.pieces[i] for i in mine] or [self.pieces[int(text_W[0])]]
        order, vectors = [], []
        for places in self.encoder.batches([len(p) for p in pieces]):
            order += places
            vectors.append(self._batch([pieces[i] for i in places]))
        vector_PE = torch.cat(vectors).float()[torch.argsort(torch.tensor(order, device=text_W.device))][: len(mine)]
        return distributed.gather_rows(vector_PE, counts)

    def _batch(self, pieces: list[list[int]]) -> Tensor:
        if self.tuning.checkpointing and torch.is_grad_enabled():
            return checkpoint(self.encoder.vectors, pieces, use_reentrant=False)  # type: ignore[no-any-return]
        return self.encoder.vectors(pieces)

    def __deepcopy__(self, memo: dict[int, Any]) -> TunedTexts:
        """Of weights alone (for the moving average): texts and tokenizer are shared."""
        made = TunedTexts.__new__(TunedTexts)
        memo[id(self)] = made
        shared = {"pieces", "encoder"}
        made.__dict__ = {k: v if k in shared else copy.deepcopy(v, memo) for k, v in self.__dict__.items()}
        made.encoder = copy.copy(self.encoder)
        made.encoder.model = made.model
        return made


def check_texts(texts: Sequence[str | None]) -> None:
    """Raises EncoderError when there is nothing to read."""
    if not any(texts):
        raise EncoderError("encoder.tuning: no item has a text, so there is nothing to train the encoder on; take it away")


def check_tuning(config: EncoderConfig) -> None:
    """Raises EncoderError for what cannot be fine-tuned, or not here."""
    if config.tuning is not None and config.tuning.kind == "lora" and importlib.util.find_spec("peft") is None:
        raise EncoderError("encoder.tuning.kind: lora needs peft; pip install 'mtrec_ray[adapters]'")


def _prepared(model: Any, tuning: TuningConfig, seed: int) -> nn.Module:
    """The model with what is trained, dropout off."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if tuning.kind == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        model = get_peft_model(model, LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "pooler" in name:  # not used: DDP would wait for its gradients
            parameter.requires_grad_(False)
    return model  # type: ignore[no-any-return]
