"""`model`: the trunk, the item tower and the sharing layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mtrec_ray.config.base import Int, Model


class ModelConfig(Model):
    """The trunk, the item tower and the sharing layers."""

    trunk: Literal["sasrec", "ligr", "hstu"] = "hstu"
    """What reads the history; see docs/models.md."""
    width: Int = Field(default=64, ge=4)
    """D."""
    layers: Int = Field(default=2, ge=1)
    heads: Int = Field(default=2, ge=1)
    feed_forward: Int = Field(default=256, ge=4)
    """Inner width of the trunk's feed-forward layers; `hstu` has none."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    id_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of items whose id residual is dropped in a step, so that text alone must serve."""
    id_buckets: Int | None = Field(default=None, ge=2)
    """Rows of the table of id residuals, shared by hash of the item's id, for catalogues of many millions. Default: a row
    for every training item."""
    sharing: Literal["shared_bottom", "mmoe", "cgc", "ple", "pepnet"] = "shared_bottom"
    """What the pointwise tasks share; see docs/sharing.md."""
    sharing_width: Int = Field(default=64, ge=1)
    """H: width of the sharing layers, of every expert and of what each head reads."""
    experts: Int = Field(default=4, ge=1)
    """`mmoe`: experts. `cgc`, `ple`: experts that all tasks share, in each level."""
    task_experts: Int = Field(default=1, ge=1)
    """`cgc`, `ple`: private experts of each task, in each level."""
    sharing_layers: Int = Field(default=2, ge=1)
    """`ple`: levels; one level is `cgc`."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads {self.heads}")
        return self
