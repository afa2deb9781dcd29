"""Give a Serve application another bundle, and wait until it answers from it. The application's file is docs/serving.md's."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

log = logging.getLogger(__name__)

IN_A_ROW = 5
"""Answers that name the new bundle, before it counts as serving: ingress replicas answer in turn."""


class RolloutError(RuntimeError):
    """A bundle that does not serve; what served before still does."""


@dataclass(frozen=True)
class Target:
    """A Serve application on a cluster."""

    address: str
    """Of the dashboard, such as http://127.0.0.1:8265."""
    url: str
    """Of the service, such as http://127.0.0.1:8000."""
    app: str = "recommend"
    token: str | None = None
    timeout: float = 300.0

    def deployed(self) -> tuple[ServeSubmissionClient, dict[str, Any]]:
        """-> a client, and the configuration as `serve deploy` would take it. Raises RolloutError."""
        try:
            client = ServeSubmissionClient(self.address)
            details = client.get_serve_details()
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            raise RolloutError(f"{self.address}: no Ray dashboard answers there: {error}") from None
        apps = {n: a.get("deployed_app_config") for n, a in details.get("applications", {}).items()}
        if apps.get(self.app) is None:
            there = sorted(n for n, config in apps.items() if config) or "none"
            raise RolloutError(
                f"{self.address}: no application {self.app!r} that `serve deploy` has deployed (there: {there}); deploy "
                "serve_apps/recommend.yaml first"
            )
        config = {"applications": [c for c in apps.values() if c]}
        return client, config | {k: details[k] for k in ("proxy_location", "http_options", "grpc_options") if details.get(k)}

    def served(self) -> tuple[str, Mapping[str, str]]:
        """-> the bundle that the service answers from, and what it refused."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        found = requests.get(f"{self.url}/versions", headers=headers, timeout=10)
        found.raise_for_status()
        told = found.json()
        return told["current"], told["refused"]


def with_bundle(config: Mapping[str, Any], app: str, uri: str) -> dict[str, Any]:
    """The configuration with another bundle for all of an application's stages, and no canary."""
    changed = copy.deepcopy(dict(config))
    for one in changed["applications"]:
        for deployment in one.get("deployments", []) if one["name"] == app else []:
            deployment["user_config"] = {**(deployment.get("user_config") or {}), "bundle": uri, "canary": None, "share": 0.0}
    return changed


def roll_out(target: Target, uri: str, fingerprint: str) -> None:
    """Raises RolloutError where the new bundle is refused or does not serve in time; then the old configuration is back."""
    client, before = target.deployed()
    client.deploy_applications(with_bundle(before, target.app, uri))
    until, right, why = time.monotonic() + target.timeout, 0, "it did not answer"
    while right < IN_A_ROW and time.monotonic() < until:
        try:
            current, refused = target.served()
        except requests.RequestException as error:
            right, why = 0, str(error)
        else:
            right = right + 1 if current == fingerprint else 0
            why = f"it still serves {current[:12]}"
            if uri in refused:
                why = f"it was refused: {refused[uri]}"
                break
        time.sleep(0.5)
    if right < IN_A_ROW:
        client.deploy_applications(before)
        raise RolloutError(f"{target.url}: {uri} ({fingerprint[:12]}) does not serve: {why}. What served before was deployed again")
    log.info("rollout: %s serves %s", target.url, fingerprint[:12])
