"""The command line of the nightly loop: what it exports, what it says, what it ends with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import nightly as job
from mtrec_ray import storage
from mtrec_ray.nightly import Night, Settings
from mtrec_ray.serving.rollout import NotDeployedError, RolloutError, Target
from tests import tiny


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tiny.write_log(tmp_path)
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(tiny.raw_config(tmp_path)))
    return ["--config", str(tmp_path / "shop.yaml"), "--out", str(tmp_path / "out")]


def nights(monkeypatch: pytest.MonkeyPatch, verdict: str = "live") -> list[Any]:
    asked: list[Any] = []

    def run_night(config: Any, root: str, settings: Settings, rolled: Any, score: bool) -> Night:
        asked.append((root, settings, rolled, score))
        return Night(
            "2026-01-01-abc", "d", "b" * 64, verdict=verdict, limits=["click/auc: worse"] if verdict == "held back" else []
        )

    monkeypatch.setattr(job, "run_night", run_night)
    return asked


def test_settings_reach_the_night(command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked = nights(monkeypatch)
    assert job.main([*command, "--gate", "click/auc", "--noninferior", "0.1", "--keep", "3", "--anew", "--no-score"]) == 0
    [(root, settings, rolled, score)] = asked
    assert root == command[-1] and rolled is None and not score
    assert settings == Settings(noninferior=0.1, gates=("click/auc",), keep=3, anew=True, from_scratch=False)
    assert capsys.readouterr().out == "2026-01-01-abc: live, bundle bbbbbbbbbbbb\n"


def test_a_night_that_is_held_back_ends_with_three(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nights(monkeypatch, "held back")
    assert job.main(command) == 3
    assert "limit broken: click/auc: worse" in capsys.readouterr().err


def test_what_the_service_kept_is_exported_first_but_not_before_there_is_one(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[list[str]] = []
    code = 0

    def export(arguments: list[str]) -> int:
        calls.append(arguments)
        return code

    monkeypatch.setattr(job.export_events, "main", export)
    asked, out = nights(monkeypatch), command[-1]
    assert job.main([*command, "--log", "log"]) == 0 and calls == []
    storage.write_json(f"{out}/bundle/manifest.json", {})
    assert job.main([*command, "--log", "log"]) == 0
    assert job.main([*command, "--log", "log", "--store", "redis://h:1/0"]) == 0
    assert calls == [["--run", out, "--to", "log"], ["--run", out, "--to", "log", "--store", "redis://h:1/0"]]
    code = 2
    assert job.main([*command, "--log", "log"]) == 2 and len(asked) == 3  # nothing is trained on half of the events
    assert "could not be exported" in capsys.readouterr().err


def test_on_the_first_night_there_may_be_nothing_to_roll_out_to_and_later_there_must_be(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(self: Target) -> None:
        raise wrong

    monkeypatch.setattr(Target, "check", check)
    asked, served = nights(monkeypatch), [*command, "--dashboard", "http://d"]
    wrong: Exception = NotDeployedError("no application; deploy serve_apps/recommend.yaml first")
    assert job.main([*served, "--again"]) == 0 and asked[0][2] is None and asked[0][1].again
    assert "the first night: nothing is rolled out (no application" in capsys.readouterr().err
    storage.write_json(f"{command[-1]}/bundle/manifest.json", {})
    assert job.main(served) == 2 and "serve_apps/recommend.yaml" in capsys.readouterr().err
    wrong = RolloutError("the service does not answer")
    assert job.main(served) == 2 and len(asked) == 1
    monkeypatch.setattr(job, "roll_back", lambda config, root, rolled: Night("before", "d") if rolled is not None else None)
    assert job.main([*served, "--rollback"]) == 0  # a service that is down may be why
    monkeypatch.setattr(Target, "check", lambda self: None)
    assert job.main(served) == 0 and asked[1][2] is not None


@pytest.mark.parametrize("wrong", [["--store", "x"], ["--keep", "0"], ["--noninferior", "1"], ["--noninferior", "-0.1"]])
def test_wrong_options_are_refused(command: list[str], wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        job.main([*command, *wrong])
