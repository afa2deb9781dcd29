"""TextEncoder: item text -> vector, through any encoder or decoder model of Hugging Face transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.config import EncoderConfig


class EncoderError(ValueError):
    """A text encoder that cannot be loaded, with the cure."""


def resolve_model(name: str) -> str:
    """`package:NAME/DIR` -> the directory inside the installed package; everything else as it is."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise EncoderError(f"encoder.model {name!r}: the package {package} is not installed; pip install it (or name a directory)")
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise EncoderError(f"encoder.model {name!r}: the package {package} has no directory {folder!r}")
    return str(path)


class TextEncoder:
    """A frozen text encoder on one device.

    Raises EncoderError when the model is a directory without config or weights, or a hub name that cannot be
    reached.
    """

    def __init__(self, config: EncoderConfig, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        self.config = config
        path = resolve_model(config.model)
        if os.sep in path and Path(path).exists() and not (Path(path) / "config.json").exists():
            raise EncoderError(f"encoder.model {config.model!r}: no config.json in {path}; it is not a Hugging Face model")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModel.from_pretrained(path, dtype=torch.float32).eval().to(device)
        except (OSError, ValueError) as error:
            raise EncoderError(
                f"encoder.model {config.model!r} cannot be loaded: {str(error).splitlines()[0]} "
                "(a local directory needs config, tokenizer and weights; a hub name needs a network)"
            ) from None
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] | None = None) -> NDArray[np.float32]:
        """Texts -> unit vectors (len(texts), E), in the order given. Batches are sorted by length."""
        out = np.zeros((len(texts), self.width), np.float32)
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), self.config.batch_size):
            chosen = order[start : start + self.config.batch_size]
            out[chosen] = self._encode_batch([texts[i] for i in chosen]).cpu().numpy()
            if progress is not None:
                progress(len(chosen))
        return out

    @torch.inference_mode()
    def _encode_batch(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.config.max_tokens, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        hidden_BSE = self.model(**tokens).last_hidden_state
        return torch.nn.functional.normalize(pool(hidden_BSE, tokens["attention_mask"], self.config.pooling), dim=-1)


def pool(hidden_BSE: Tensor, mask_BS: Tensor, how: str) -> Tensor:
    """Token vectors -> one vector per text. Padding (mask 0, at the end) never counts."""
    if how == "cls":
        return hidden_BSE[:, 0]
    if how == "last":
        last_B = mask_BS.sum(1).clamp(min=1) - 1
        return hidden_BSE[torch.arange(len(hidden_BSE)), last_B]
    weight = mask_BS[..., None].to(hidden_BSE.dtype)
    return (hidden_BSE * weight).sum(1) / weight.sum(1).clamp(min=1)
