"""TextEncoder: item text -> vector, through any encoder or decoder model of Hugging Face transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.config import EncoderConfig
from mtrec_ray.encoders.loading import EncoderError, load_model, load_tokenizer, longest_input, resolve_model
from mtrec_ray.models.int8 import to_int8

CPU_TOKENS = 512
"""Tokens of a batch on a CPU, so that its activations may stay in a core's cache."""


class TextEncoder:
    """A frozen text encoder on one device.

    Raises EncoderError when the model is a directory without config or weights, a hub name that cannot be
    reached, or has another model's tokenizer.
    """

    def __init__(self, config: EncoderConfig, device: str | torch.device = "cpu") -> None:
        self.config, path = config, resolve_model(config.model)
        self.tokenizer = load_tokenizer(config.model, path)
        self.model = load_model(config.model, path, self.tokenizer).eval()
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise EncoderError(f"encoder.model {config.model!r}: the tokenizer of {path} has neither a pad nor an eos token")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.max_tokens = longest_input(self.model, self.tokenizer, config.max_tokens)
        self._check_instruction()
        self.device = torch.device(device)
        self.precision = _precision(config, self.device)
        if self.precision == "int8":
            to_int8(self.model)
        self.model.to(self.device, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        if config.compile:
            self.model.compile(dynamic=True)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def tokens(self, texts: Sequence[str]) -> tuple[list[list[int]], NDArray[np.int64]]:
        """-> (token numbers of every piece, which text each belongs to). A text is one piece unless `long_texts: chunks` makes
        more of it."""
        if not texts:
            return [], np.zeros(0, np.int64)
        chunks = self.config.long_texts == "chunks"
        found = self.tokenizer(
            [self.config.instruction + t for t in texts], truncation=True, max_length=self.max_tokens,
            return_overflowing_tokens=chunks, return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )  # fmt: skip
        owner = found["overflow_to_sample_mapping"] if chunks else range(len(texts))
        return found["input_ids"], np.asarray(owner, np.int64)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Texts -> unit vectors (len(texts), E), in the order given; a text without a token has the zero vector."""
        pieces, owner = self.tokens(texts)
        total = np.zeros((len(texts), self.width), np.float32)
        left = np.bincount(owner, minlength=len(texts))
        for places in self.batches([len(p) for p in pieces]):
            with torch.inference_mode():
                vector = self.vectors([pieces[i] for i in places]).float().cpu().numpy()
            mine = owner[places]
            np.add.at(total, mine, vector * np.array([[len(pieces[i])] for i in places], np.float32))
            if progress is not None:
                before, left = left, left - np.bincount(mine, minlength=len(texts))
                progress(int(((left == 0) & (before > 0)).sum()))
        return np.asarray(total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12), np.float32)

    def batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Places of the pieces that are encoded together: near in length, so that there is little padding; empty ones are none."""
        order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        begin = 0
        while begin < len(order):
            count = self.config.batch_size
            if self.device.type == "cpu":
                count = min(count, max(1, CPU_TOKENS // lengths[order[begin]]))
            yield order[begin : begin + count]
            begin += count

    def vectors(self, pieces: Sequence[Sequence[int]]) -> Tensor:
        """Token numbers of B pieces, none of them empty -> unit vectors_BE, with gradients where they are on."""
        longest = max(map(len, pieces))
        token_BS = torch.full((len(pieces), longest), self.tokenizer.pad_token_id)
        for row, piece in zip(token_BS, pieces, strict=True):
            row[: len(piece)] = torch.tensor(piece)
        length_B = torch.tensor([len(p) for p in pieces])
        mask_BS = (torch.arange(longest) < length_B[:, None]).long().to(self.device)
        even = int(length_B.min()) == longest  # nothing is padded: attention is faster without a mask
        hidden_BSE = self.model(input_ids=token_BS.to(self.device), attention_mask=None if even else mask_BS).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden_BSE, mask_BS, self.config.pooling), dim=-1)

    def _check_instruction(self) -> None:
        if self.config.instruction:
            used = len(self.tokenizer(self.config.instruction)["input_ids"])
            if used >= self.max_tokens:
                raise EncoderError(f"encoder.instruction: its {used} tokens leave no room in {self.max_tokens}; shorten it")


def _precision(config: EncoderConfig, device: torch.device) -> str:
    """Raises EncoderError for int8 on a GPU."""
    if config.precision == "int8" and device.type != "cpu":
        raise EncoderError("encoder.precision: int8 is for CPUs; on a GPU take bf16 or auto")
    if config.precision != "auto":
        return config.precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"


def pool(hidden_BSE: Tensor, mask_BS: Tensor, how: str) -> Tensor:
    """Token vectors -> one vector per text. Padding (mask 0), on either side, never counts."""
    if how in ("cls", "last"):
        place_S = torch.arange(1, mask_BS.shape[1] + 1, device=mask_BS.device)
        place_B = (mask_BS * (place_S if how == "last" else place_S.flip(0))).argmax(1)
        return hidden_BSE[torch.arange(len(hidden_BSE), device=mask_BS.device), place_B]
    weight = mask_BS[..., None].to(hidden_BSE.dtype)
    return (hidden_BSE * weight).sum(1) / weight.sum(1).clamp(min=1)
