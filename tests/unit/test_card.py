"""The model card of a bundle, and a run in MLflow."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from mtrec_ray import storage, tracking
from mtrec_ray.config import RunConfig, TrackingConfig
from mtrec_ray.evaluation.card import model_card
from tests.conftest import TinyRun

METRICS: dict[str, Any] = {
    "bundle": "b" * 64, "data": "d" * 64, "protocol": "time",
    "model": {"retrieval": {"ndcg@10": 0.25, "hr@10": 0.5, "n": 11.0, "coverage@10": 1.0}, "click": {"auc": 0.7, "n": 40.0}},
    "intervals": {"retrieval": {"ndcg@10": [0.1, 0.4]}, "click": {"auc": [None, None]}},
    "comparison": {"baseline": "ease", "metric": "ndcg@10", "difference": 0.05, "low": -0.01, "high": 0.1},
    "slices": {"cold_user": {"retrieval": {"ndcg@10": 0.2}}, "age=<25": {"click": {"auc": 0.6}}},
    "unmeasured": {"taste": "no test user has one"},
}  # fmt: skip
DATA = {"rows": {"events": 12345, "users": 24, "train_targets": 9000, "test_targets": 1000, "quarantined": 7}}
TRAINING = {"best_epoch": 3, "seconds": 61.2, "workers": 2}


def test_a_card_says_what_from_what_how_good_and_for_whom_not(tiny_run: TinyRun) -> None:
    card = model_card(tiny_run.config, METRICS, DATA, TRAINING)
    for sentence in (
        "# tiny", "Bundle `bbbbbbbbbbbb`, of prepared data `dddddddddddd`", "`click` (binary), λ = 0.5",
        "none: items are known by their ids",
        "12,345 events of 24 users; 9,000 targets trained, 1,000 tested, 7 rows of the log were refused. Protocol `time`.",
        "Trained for 61 s on 2 worker(s)", "was number 3.", "| retrieval | ndcg@10 | 0.2500 | 0.1000 to 0.4000 | 11 |",
        "| click | auc | 0.7000 |  | 40 |", "Best baseline: ease; the model minus it, ndcg@10: +0.0500 [-0.0100, +0.1000].",
        "| cold_user | 0.2000 |", "Not measured: taste: no test user has one.", "only an experiment says",
    ):  # fmt: skip
        assert sentence in card, sentence
    assert "coverage@10" not in card and "Sensitive" not in card


def test_a_card_says_when_the_protocol_leaks_time_and_names_what_is_sensitive(tiny_run: TinyRun) -> None:
    data = tiny_run.config.data.model_copy(update={"protocol": "leave_one_out", "sensitive": ("age_group",)})
    card = model_card(tiny_run.config.model_copy(update={"data": data}), METRICS, DATA, {})
    assert "later events of other users: not a forecast" in card and "shown to nobody: " in card and "Trained for" not in card
    none = METRICS | {"comparison": {"baseline": None, "difference": None}, "slices": {}, "unmeasured": {}}
    assert "Best baseline" not in model_card(tiny_run.config, none, DATA, TRAINING)


def tracked(run: TinyRun, uri: str) -> RunConfig:
    return run.config.model_copy(update={"tracking": TrackingConfig(mlflow=uri, experiment="shop")})


@pytest.mark.slow
def test_a_run_is_noted_in_mlflow_with_settings_metrics_and_file(tiny_run: TinyRun, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    storage.write_json(tmp_path / "run" / "metrics.json", METRICS)
    for _ in range(2):  # the experiment is there the second time
        tracking.track(tracked(tiny_run, str(tmp_path / "mlruns")), str(tmp_path / "run"))
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    found = client.search_runs([client.get_experiment_by_name("shop").experiment_id])
    assert len(found) == 2 and {r.info.status for r in found} == {"FINISHED"}
    assert found[0].data.metrics["retrieval/ndcg_at_10"] == 0.25
    assert found[0].data.params["train.epochs"] == "3" and found[0].data.tags["bundle"] == "b" * 64
    assert [f.path for f in client.list_artifacts(found[0].info.run_id)] == ["metrics.json"]


def test_mlflow_that_cannot_be_reached_or_is_missing_costs_the_run_nothing(
    tiny_run: TinyRun, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("refused")

    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'mlflow'", name="mlflow")

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(tracking, "_mlflow", unreachable)
        tracking.track(tracked(tiny_run, "http://user:secret@host:1"), str(tmp_path))
        monkeypatch.setattr(tracking, "_mlflow", missing)
        tracking.track(tracked(tiny_run, "http://host:1"), str(tmp_path))
        tracking.track(tiny_run.config, str(tmp_path))  # nobody asked for it
    assert [r.getMessage() for r in caplog.records] == [
        "tracking: http://host:1 could not be told of the run; the run itself is whole",
        "tracking: mlflow is missing: pip install 'mtrec_ray[tracking]'",
    ]
