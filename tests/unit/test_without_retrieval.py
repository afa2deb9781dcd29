"""A run without a retrieval task: it is prepared, trained and judged, and refuses what needs candidates. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import pipeline, storage
from mtrec_ray.config import NoRetrievalError, RunConfig
from mtrec_ray.evaluation.baselines import RANKERS
from mtrec_ray.evaluation.evaluate import MODEL, evaluate_part
from mtrec_ray.evaluation.measure import Model
from mtrec_ray.evaluation.runner import _fit, report_numbers
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.histories import History
from mtrec_ray.predictor import Predictor
from mtrec_ray.scoring.tables import Ask, Tally, user_tables
from mtrec_ray.training.feed import WindowCache, collate
from tests import tiny

RATING: dict[str, Any] = {"rating": {"kind": "regression", "label": "rating"}}


def config_of(folder: Path, tasks: dict[str, Any], monitor: str) -> RunConfig:
    def change(raw: dict[str, Any]) -> None:
        raw["tasks"] = tasks
        raw["train"] |= {"monitor": monitor, "epochs": 2}
        raw["evaluation"] |= {"baselines": list(RANKERS[:2])}

    return tiny.make_config(folder, change)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> tuple[storage.Directory, Predictor]:
    folder = tmp_path_factory.mktemp("rated")
    tiny.write_log(folder)
    config = config_of(folder, RATING, "rating/rmse")
    data = tiny.prepare_locally(config, folder / "data")
    return data, tiny.write_bundle(config, data, tiny.train_locally(config, data), folder / "bundle")


def test_a_rating_task_alone_is_trained_and_judged_and_ranking_baselines_are_skipped(
    rated: tuple[storage.Directory, Predictor],
) -> None:
    data, predictor = rated
    baselines, skipped = _fit(predictor.config, data, predictor)
    assert not baselines and skipped == dict.fromkeys(RANKERS[:2], "there is no task of kind retrieval")
    test = WindowCache.from_table(storage.read_table(data.path("windows", "test")))
    reduced = evaluate_part({MODEL: Model(predictor)}, predictor, test, set(), Resampler(20), (0, 1))
    metrics = report_numbers(predictor.config, data, predictor, reduced, baselines, skipped, Resampler(20)).metrics
    json.dumps(metrics, allow_nan=False)
    assert set(metrics["model"]) == {"rating"} and metrics["model"]["rating"]["rmse"] > 0
    assert metrics["comparison"] == {} and "moments" not in metrics["slices"]["cold_user"]
    assert "rmse" in metrics["slices"]["cold_user"]["rating"]


def test_whatever_needs_candidates_refuses_with_the_key_and_the_cure(rated: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = rated
    cure = "tasks: .* needs a task of kind retrieval.*add retrieval"
    with pytest.raises(NoRetrievalError, match=cure):
        predictor.recommend([History(["i1"], [1])], 3)
    with pytest.raises(NoRetrievalError, match=cure):
        next(user_tables(predictor, [storage.read_table(data.path("store"))], Ask(), Tally()))
    with pytest.raises(NoRetrievalError, match="the score stage"):
        pipeline.run_stages(predictor.config, "never", ("prepare", "score"))


def test_serving_refuses_before_any_replica_starts(rated: tuple[storage.Directory, Predictor], tmp_path: Path) -> None:
    from mtrec_ray.serving.deployments import build_graph

    data, _ = rated
    with pytest.raises(NoRetrievalError, match="tasks: serving needs"):
        build_graph(str(Path(data.root).parent / "bundle"), data.root)


@pytest.mark.parametrize(
    ("tasks", "idle"),
    [
        (RATING, set()),
        ({"taste": {"kind": "profile", "attribute": "taste"}}, set()),
        ({"similar": {"kind": "similarity"}}, {"tokens", "trunk"}),
    ],
)
def test_every_parameter_that_is_trained_gets_a_gradient(
    rated: tuple[storage.Directory, Predictor], tmp_path: Path, tasks: dict[str, Any], idle: set[str]
) -> None:
    """DDP waits for the gradient of each of them."""
    data, predictor = rated
    from mtrec_ray.models.recommender import Recommender

    raw = predictor.config.model_dump(mode="json") | {"tasks": tasks}
    raw["train"] |= {"monitor": f"{next(iter(tasks))}/n"}
    model = Recommender(RunConfig.model_validate(raw), predictor.schema, None).train()
    train = WindowCache.from_table(storage.read_table(data.path("windows", "train")))
    torch.stack(model(collate(train, np.arange(4), predictor.schema))[0]).sum().backward()
    without = {n.split(".")[0] for n, p in model.named_parameters() if p.grad is None}
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert without == frozen == idle
    assert torch.isfinite(model.item_vectors()).all()
