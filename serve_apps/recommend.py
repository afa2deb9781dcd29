"""The Serve application: `serve run serve_apps.recommend:build run=runs/ml100k`, or `serve deploy` with
serve_apps/recommend.yaml."""

# no `from __future__ import annotations` here: Serve reads the class in build's signature to validate the arguments

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from mtrec_ray import storage
from mtrec_ray.serving.deployments import build_graph
from mtrec_ray.serving.settings import ServingSettings


class Args(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """Run directory or URI with bundle/ and data/."""
    options: dict[str, dict[str, Any]] = {}
    """Deployment name -> Serve options, for callers that do not deploy the YAML."""
    serving: ServingSettings = ServingSettings()
    """Store of live histories, tokens, limits (docs/serving.md)."""
    fused: bool = False
    """All stages in the ingress: for small installations."""


def build(args: Args) -> serve.Application:
    """Application builder. Raises StorageError, or ValueError for a store that cannot be here, before any replica starts."""
    for name in ("bundle", "data"):
        storage.Directory(storage.join(args.run, name)).manifest  # noqa: B018
    return build_graph(storage.join(args.run, "bundle"), storage.join(args.run, "data"), args.options, args.serving, args.fused)
