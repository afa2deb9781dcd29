"""`pretrain`: a checkpoint goes on learning on the run's own texts (docs/pretraining.md)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mtrec_ray.config.base import Int, Model


class PretrainConfig(Model):
    """How `jobs.pretrain` goes on with a language model on item texts and histories written as text, or on pairs of items."""

    model: str | None = None
    """Where to start from, as encoder.model; None: encoder.model."""
    fresh: bool = False
    """Random weights instead of the checkpoint's: its configuration and tokenizer alone are used."""
    objective: Literal["auto", "mlm", "clm", "contrastive", "distil"] = "auto"
    """`mlm`, `clm`: masked or causal language modelling; `auto`: masked where the architecture has it. `contrastive`: texts of
    items that one user takes one after the other get near vectors. `distil`: fewer layers learn the vectors of all."""
    texts: tuple[Literal["items", "histories"], ...] = ("items", "histories")
    history_items: Int = Field(default=20, ge=2)
    """Titles in a history's text; a longer history makes several."""
    max_users: Int = Field(default=100_000, ge=1)
    """Histories are written for so many users at most, chosen by a hash of their id."""
    block: Int = Field(default=128, ge=8)
    """Tokens of a training row; texts are packed into rows without gaps."""
    pair_distance: Int = Field(default=3, ge=1)
    """`contrastive`: how far apart in a user's positives the two items of a pair may be."""
    pairs: Int = Field(default=20_000, ge=1)
    """`contrastive`: pairs of an epoch, drawn from all there are."""
    temperature: float = Field(default=0.05, gt=0)
    layers: Int = Field(default=2, ge=1)
    """`distil`: layers that are kept, evenly spread over those of the checkpoint."""
    mask_share: float = Field(default=0.15, gt=0, lt=1)
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Share of items and of users whose texts are not trained on, for the perplexity."""
    epochs: Int = Field(default=3, ge=1)
    batch_blocks: Int = Field(default=32, ge=1)
    """Rows of a global batch, over all workers: packed rows, pairs or texts. Of `contrastive` all other items of the batch are
    negatives, so it wants 128 and more."""
    learning_rate: float = Field(default=5e-5, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_share: float = Field(default=0.06, ge=0, lt=1)
    """Of all steps; then a cosine to zero."""
    clip_norm: float = Field(default=1.0, gt=0)
    workers: Int = Field(default=1, ge=1)
    threads: Int = Field(default=1, ge=1)
    use_gpu: bool = False
    checkpoint_every: Int = Field(default=200, ge=1)
    """Steps."""
    max_failures: Int = Field(default=1, ge=0)
