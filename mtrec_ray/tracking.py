"""A finished run in MLflow: its settings, its test metrics, its files. Nothing that fails here costs the run anything."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtrec_ray import storage
from mtrec_ray.config import RunConfig

log = logging.getLogger(__name__)

FILES = ("metrics.json",)
"""Of the run directory."""


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """{"a": {"b": 1}} -> ("a.b", 1)."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def track(config: RunConfig, run: str) -> None:
    """Note an evaluated run where `tracking.mlflow` says."""
    if config.tracking.mlflow is None:
        return
    try:
        _mlflow(config, run)
    except ModuleNotFoundError as error:
        log.warning("tracking: %s is missing: pip install 'mtrec_ray[tracking]'", error.name)
    except Exception:
        log.exception("tracking: %s could not be told of the run; the run itself is whole", storage.shown(config.tracking.mlflow))


def _mlflow(config: RunConfig, run: str) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    uri = str(config.tracking.mlflow)
    if "://" not in uri:  # a directory, as asked; MLflow's own default is a database by now
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        uri = Path(uri).absolute().as_uri()
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(config.tracking.experiment)
    experiment = found.experiment_id if found is not None else client.create_experiment(config.tracking.experiment)
    metrics = storage.read_json(storage.join(run, "metrics.json"))
    name = storage.shown(run).rstrip("/").rsplit("/", 1)[-1]
    tags = {"bundle": metrics["bundle"], "data": metrics["data"], "run": storage.shown(run), "protocol": metrics["protocol"]}
    made = client.create_run(experiment, run_name=f"{config.name} {name}", tags=tags)
    # MLflow's names may not hold @
    numbers = {n.replace("@", "_at_").replace(".", "/"): float(v) for n, v in flat(metrics["model"]) if isinstance(v, int | float)}
    params = [Param(n, storage.without_keys(str(v))[:500]) for n, v in flat(config.model_dump(mode="json"))]
    for begin in range(0, len(params), 100):
        client.log_batch(made.info.run_id, params=params[begin : begin + 100])
    for begin in range(0, len(numbers), 1000):
        part = list(numbers.items())[begin : begin + 1000]
        client.log_batch(made.info.run_id, metrics=[Metric(n, v, 0, 0) for n, v in part])
    with tempfile.TemporaryDirectory() as folder:
        for file in FILES:
            Path(folder, file).write_bytes(storage.read_bytes(storage.join(run, file)))
            client.log_artifact(made.info.run_id, str(Path(folder, file)))
    client.set_terminated(made.info.run_id)
    log.info("tracking: %s, experiment %s", storage.shown(uri), config.tracking.experiment)
