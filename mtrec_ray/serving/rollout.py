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


STALE_SECONDS = 15.0
"""For so long the service may still tell why it refused the same bundle the last time."""


PATIENCE_SECONDS = 30.0
"""For so long a service may be away before a night refuses to begin."""


class RolloutError(RuntimeError):
    """A bundle that does not serve; what served before still does."""


class RestoreError(RuntimeError):
    """A rollout that failed, and what served before could not be deployed again."""


class NotDeployedError(RolloutError):
    """A cluster without the application."""


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
            raise NotDeployedError(
                f"{self.address}: no application {self.app!r} that `serve deploy` has deployed (there: {there}); deploy "
                "serve_apps/recommend.yaml first"
            )
        config = {"applications": [c for c in apps.values() if c]}
        return client, config | {k: details[k] for k in ("proxy_location", "http_options", "grpc_options") if details.get(k)}

    def served(self) -> tuple[str, Mapping[str, str]]:
        """-> the bundle that the service answers from, and what it refused. Raises RolloutError for an answer of somebody else."""
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        found = requests.get(f"{self.url}/versions", headers=headers, timeout=10)
        found.raise_for_status()
        try:
            told = found.json()
            return str(told["current"]), dict(told["refused"])
        except (ValueError, KeyError, TypeError):
            raise RolloutError(f"{self.url}/versions: this is no answer of the service; correct --url") from None

    def check(self) -> None:
        """Raises RolloutError where a rollout could not even begin."""
        self.deployed()
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self.served()
                return
            except requests.RequestException as error:
                if time.monotonic() > until:
                    cure = "correct --url or --token-env, or mend the service (--rollback does not wait for it)"
                    raise RolloutError(f"{self.url}: the service does not answer ({error}); {cure}") from None
            time.sleep(2)


def with_bundle(config: Mapping[str, Any], app: str, uri: str) -> dict[str, Any]:
    """The configuration with another bundle for all of an application's stages, and no canary."""
    changed = copy.deepcopy(dict(config))
    for one in changed["applications"]:
        for deployment in one.get("deployments", []) if one["name"] == app else []:
            deployment["user_config"] = {**(deployment.get("user_config") or {}), "bundle": uri, "canary": None, "share": 0.0}
    return changed


def roll_out(target: Target, uri: str, fingerprint: str) -> None:
    """Raises RolloutError where the new bundle is refused or does not serve in time; then, and whatever else stops it, the old
    configuration is back. Raises RestoreError where even that could not be."""
    client, before = target.deployed()
    stale = _refusal(target, uri)
    try:
        _deploy(target, client, with_bundle(before, target.app, uri))
        why = _waited(target, uri, fingerprint, stale)
        if why:
            raise RolloutError(
                f"{target.url}: {uri} ({fingerprint[:12]}) does not serve: {why}. What served before was deployed again"
            )
    except BaseException:
        try:
            _deploy(target, client, before)
        except RolloutError as error:
            raise RestoreError(
                f"{error}; {uri} may serve now. When it answers again: python -m jobs.nightly ... --rollback"
            ) from None
        raise
    log.info("rollout: %s serves %s", target.url, fingerprint[:12])


def _deploy(target: Target, client: ServeSubmissionClient, config: Mapping[str, Any]) -> None:
    try:
        client.deploy_applications(dict(config))
    except (OSError, RuntimeError) as error:  # requests' own errors are OSErrors
        raise RolloutError(f"{target.address}: the dashboard took no configuration: {error}") from None


def _refusal(target: Target, uri: str) -> str | None:
    """Why the service refused this bundle the last time."""
    try:
        return target.served()[1].get(uri)
    except requests.RequestException:
        return None


def _waited(target: Target, uri: str, fingerprint: str, stale: str | None) -> str:
    """-> empty once the service answers from the bundle, or why it does not. stale: a refusal that was told before."""
    begun, right, why = time.monotonic(), 0, "it did not answer"
    while time.monotonic() < begun + target.timeout:
        try:
            current, refused = target.served()
        except requests.RequestException as error:
            right, why = 0, str(error)
        else:
            right = right + 1 if current == fingerprint else 0
            if right == IN_A_ROW:
                return ""
            why, said = f"it still serves {current[:12]}", refused.get(uri)
            if said and (said != stale or time.monotonic() > begun + STALE_SECONDS):
                return f"it was refused: {said}"
        time.sleep(0.5)
    return why
