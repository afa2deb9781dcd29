"""docs/tasks.md: its settings load, and the kind that it adds is trained, judged and answered. No Ray."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtrec_ray import tasks
from mtrec_ray.config import ConfigError
from mtrec_ray.evaluation.evaluate import MODEL
from mtrec_ray.histories import History
from tests import tiny
from tests.unit.test_evaluation import evaluate_locally

PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def count_kind() -> Iterator[tasks.Kind]:
    """The page's module, registered for one test."""
    module = types.ModuleType("count_of_the_docs")
    (code,) = blocks("python")
    exec(compile(code, "docs/tasks.md", "exec", dont_inherit=True), module.__dict__)
    tasks.register(module.KIND)
    yield module.KIND
    del tasks.KINDS["count"]


def counted(raw: dict[str, Any]) -> None:
    raw["tasks"] = {"retrieval": {"kind": "retrieval"}, "units": {"kind": "count", "label": "rating", "final_weight": 0.5}}
    raw["train"] |= {"epochs": 2}


@pytest.mark.slow
def test_the_kind_of_the_page_works_from_loading_to_lists(count_kind: tasks.Kind, tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    config = tiny.make_config(tmp_path, counted)
    data = tiny.prepare_locally(config, tmp_path / "data")
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / "bundle")
    metrics = evaluate_locally(data, predictor).metrics
    assert metrics["model"]["units"]["deviance"] > 0 and metrics["intervals"].keys() >= {"units"}
    for baseline in ("item_mean", "user_mean", "gradient_boosting"):
        assert metrics["baselines"][baseline]["units"]["deviance"] > 0
    assert "deviance" in metrics["slices"]["warm_user"]["units"]
    first = predictor.recommend([History(["i1"], [1])], 3)[0]["items"][0]
    assert first["tasks"]["units"] > 0 and MODEL == "model"


def test_a_kind_that_nobody_registered_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.units\.kind: 'count' is unknown; it is one of \['binary', 'item_attribute'"):
        tiny.make_config(tmp_path, counted)


def test_a_name_is_registered_once(count_kind: tasks.Kind) -> None:
    tasks.register(count_kind)  # the same again is fine
    other = tasks.Kind("count", count_kind.config, count_kind.task, count_kind.judge)
    changed = tasks.Kind("binary", count_kind.config, count_kind.task, count_kind.judge)
    assert other == count_kind
    with pytest.raises(ValueError, match="there is a kind 'binary' of tasks already"):
        tasks.register(changed)


def test_the_settings_of_the_page_load(tmp_path: Path) -> None:
    (settings,) = (yaml.safe_load(b) for b in blocks("yaml"))

    def take(raw: dict[str, Any]) -> None:
        raw["data"]["labels"] |= settings["data"]["labels"]
        raw["data"]["item_features"] = settings["data"]["item_features"]
        raw["data"]["attributes"]["gender"] = {"column": "gender"}
        raw["tasks"] = settings["tasks"]

    assert set(tiny.make_config(tmp_path, take).tasks) == set(settings["tasks"])
