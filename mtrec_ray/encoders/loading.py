"""Finding and loading a language model and its tokenizer, with messages for the person whose configuration names them."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from mtrec_ray import storage
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
GGUF = ".gguf"


class EncoderError(ValueError):
    """A text encoder that cannot be loaded, with the cure."""


def resolve_model(name: str) -> str:
    """`package:NAME/PATH` -> the directory or GGUF file inside the installed package; everything else as it is."""
    if not name.startswith("package:"):
        return name
    package, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None or spec.origin is None:
        raise EncoderError(f"encoder.model {name!r}: the package {package} is not installed; pip install it (or name a directory)")
    path = Path(spec.origin).parent / inside
    if name.endswith(GGUF) and not path.is_file():
        raise EncoderError(f"encoder.model {name!r}: the package {package} has no file {inside!r}")
    if not name.endswith(GGUF) and not path.is_dir():
        raise EncoderError(f"encoder.model {name!r}: the package {package} has no directory {inside!r}")
    return str(path)


def encoder_identity(config: EncoderConfig) -> dict[str, Any]:
    """What decides a text's vector: the model's files (or hub name), pooling, length, instruction, precision."""
    path = resolve_model(config.model)
    content = storage.file_fingerprint(path) if Path(path).exists() else path
    settings = config.model_dump(mode="json", include={"model", "pooling", "max_tokens", "instruction", "long_texts", "precision"})
    return settings | {"content": content}


def source(name: str, path: str, key: str = "encoder.model") -> dict[str, Any]:
    """What from_pretrained is called with. Raises EncoderError when a GGUF file or what reads it is missing."""
    if not path.endswith(GGUF):
        return {"pretrained_model_name_or_path": path}
    if not Path(path).is_file():
        raise EncoderError(f"{key} {name!r}: there is no file {path}")
    lacking = [p for p in ("gguf", "accelerate") if importlib.util.find_spec(p) is None]
    if lacking:
        raise EncoderError(f"{key} {name!r}: a GGUF file needs {' and '.join(lacking)}; pip install 'mtrec_ray[gguf]'")
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}


def load_tokenizer(name: str, path: str, key: str = "encoder.model") -> Any:
    """The tokenizer of a model. Raises EncoderError, told of the configuration's key, when the directory is no Hugging Face
    model or has no tokenizer."""
    from transformers import AutoTokenizer

    given = source(name, path, key)
    if "gguf_file" not in given:
        if os.sep in path and Path(path).exists() and not (Path(path) / "config.json").exists():
            raise EncoderError(f"{key} {name!r}: no config.json in {path}; it is not a Hugging Face model")
        if Path(path).is_dir() and not any((Path(path) / file).exists() for file in _TOKENIZER_FILES):
            raise EncoderError(f"{key} {name!r}: {path} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    try:
        return AutoTokenizer.from_pretrained(**given)
    except Exception as error:  # transformers and tokenizers each have their own
        raise EncoderError(cannot_load(key, name, error)) from None


def load_model(name: str, path: str, tokenizer: Any, key: str = "encoder.model") -> Any:
    """The transformer in float32. Raises EncoderError for missing weights, and for a tokenizer of another model."""
    from transformers import AutoModel

    try:
        model, info = AutoModel.from_pretrained(**source(name, path, key), dtype=torch.float32, output_loading_info=True)
    except EncoderError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        raise EncoderError(cannot_load(key, name, error)) from None
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)  # the pooler is not used
    if missing:
        raise EncoderError(f"{key} {name!r}: the weights of {path} lack {missing[:3]} ({len(missing)} in all)")
    check_tokens(name, len(tokenizer), model.config.vocab_size, key)
    return plain_weights(model)


def plain_weights(model: Any) -> Any:
    """A model that can be saved: what transformers reads from a GGUF file has float32 weights, but calls itself quantized."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
    return model


def save_model(model: Any, tokenizer: Any, folder: str) -> None:
    """Write a Hugging Face directory, local or on an object store."""
    with tempfile.TemporaryDirectory() as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for file in sorted(Path(draft).iterdir()):
            storage.write_bytes(storage.join(folder, file.name), file.read_bytes())


def check_tokens(name: str, tokens: int, vocabulary: int, key: str) -> None:
    """Raises EncoderError when a tokenizer has numbers that the model has no vector for."""
    if tokens > vocabulary:
        raise EncoderError(
            f"{key} {name!r}: the tokenizer's {tokens} tokens do not fit the model's {vocabulary}; it belongs to another model: "
            "put the model's own tokenizer beside its weights"
        )


def longest_input(model: Any, tokenizer: Any, wanted: int) -> int:
    """Tokens of the longest input: what is wanted, as far as model and tokenizer go."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted
    embeddings = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
    if isinstance(embeddings, torch.nn.Embedding) and embeddings.padding_idx is not None:
        positions -= embeddings.padding_idx + 1  # RoBERTa counts from behind the padding's
    return int(min(wanted, positions, tokenizer.model_max_length))


def cannot_load(key: str, name: str, error: Exception) -> str:
    return (
        f"{key} {name!r} cannot be loaded: {(str(error) or type(error).__name__).splitlines()[0]} "
        "(a local directory needs config, tokenizer and weights; a hub name needs a network)"
    )
