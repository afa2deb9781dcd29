"""`encoder`: the language model that reads the items' texts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtrec_ray.config.base import Int, Model


class TuningConfig(Model):
    """Gradients of the recommender's own losses reach the TextEncoder (docs/finetuning.md)."""

    kind: Literal["full", "lora"] = "full"
    """`full`: all weights. `lora`: low-rank adapters in the attention (needs the extra `adapters`), merged at export."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Of the encoder; train.learning_rate is that of the rest. Adapters want some 1e-3."""
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_share: float = Field(default=0.06, ge=0, lt=1)
    """Of all steps."""
    rank: Int = Field(default=8, ge=1)
    """`lora`: rank of the adapters."""
    items_per_step: Int | None = Field(default=None, ge=1)
    """Items of a step's batch and negatives that are encoded with gradients, chosen at random where there are more; the others
    are read from the cache of their last vectors. Default: all of them."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""


class EncoderConfig(Model):
    """The TextEncoder: a transformer from Hugging Face."""

    model: str
    """A local directory, `package:NAME/DIR` (a directory inside an installed package) or a hub name; or a GGUF file in one of
    the first two (needs the extra `gguf`)."""
    pooling: Literal["mean", "last", "cls"] = "mean"
    instruction: str = ""
    """Written in front of every text, as decoders trained for embeddings want it."""
    max_tokens: Int = Field(default=128, ge=4)
    long_texts: Literal["cut", "chunks"] = "cut"
    """What becomes of a text beyond max_tokens: cut off, or encoded in pieces whose vectors are averaged by their tokens."""
    precision: Literal["auto", "float32", "bf16", "int8"] = "auto"
    """`auto`: bf16 on a GPU that has it, else float32. `int8`: weights and matrix products of eight bits, for CPUs."""
    compile: bool = False
    """`torch.compile` the frozen encoder: needs a C++ compiler and minutes to start; int8 gains most."""
    batch_size: Int = Field(default=64, ge=1)
    """Texts encoded together, at most."""
    workers: Int = Field(default=1, ge=1)
    """Ray Data actors."""
    use_gpu: bool = False
    """One GPU for every actor."""
    tuning: TuningConfig | None = None
    """None: the encoder is frozen and its vectors are made once."""
