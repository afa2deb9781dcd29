"""`model`: the trunk, the item tower and the sharing layers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mtrec_ray.config.base import Int, Model


class ModelConfig(Model):
    """The trunk, the item tower and the sharing layers."""

    trunk: Literal["sasrec", "ligr", "hstu"] = "sasrec"
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
    sharing: Literal["shared_bottom"] = "shared_bottom"
    """What the pointwise tasks share; see mtrec_ray/models/sharing."""
    sharing_width: Int = Field(default=64, ge=1)
    """Width of the sharing layers."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width: {self.width} is not a multiple of heads {self.heads}")
        return self
