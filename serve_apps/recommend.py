"""The Serve application: `serve run serve_apps.recommend:build run=runs/ml100k`, or `serve deploy` with
serve_apps/recommend.yaml."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from ray import serve

from mtrec_ray import storage
from mtrec_ray.serving.deployments import build_graph


class Args(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid")

    run: str
    """Run directory or URI with bundle/ and data/."""


def build(args: Args, options: dict[str, dict[str, Any]] | None = None) -> serve.Application:
    """Application builder. Raises StorageError here, before any replica starts, when the run has no bundle.

    options: deployment name -> options, for callers that do not deploy the YAML.
    """
    for name in ("bundle", "data"):
        storage.Directory(storage.join(args.run, name)).manifest  # noqa: B018
    return build_graph(storage.join(args.run, "bundle"), storage.join(args.run, "data"), options or {})
