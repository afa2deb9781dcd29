"""The nightly loop on a tiny shop: nights that go live, are held back, are stopped and go on, and are rolled back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import nightly as job
from mtrec_ray import bundle, lock, pipeline, storage
from mtrec_ray.config import RunConfig, load_config
from mtrec_ray.data.lineage import DataError
from mtrec_ray.nightly import Nights, Settings, roll_back, run_night
from mtrec_ray.pipeline import Run
from mtrec_ray.serving.rollout import RolloutError, with_bundle
from mtrec_ray.training import trainer
from tests import tiny

pytestmark = [pytest.mark.ray, pytest.mark.slow]
LOOSE = Settings(noninferior=0.99)
Out = Callable[[str, str], None]


@pytest.fixture
def shop(tmp_path: Path, ray_cluster: Any) -> Path:
    """A log of three days, of which the last two have not come yet."""
    tiny.write_log(tmp_path, users=40, files=4)
    (tmp_path / "later").mkdir()
    for n in (2, 3):
        shutil.move(str(tmp_path / "log" / f"part{n}.csv"), str(tmp_path / "later"))
    raw = tiny.raw_config(tmp_path)
    raw["train"] |= {"epochs": 2, "workers": 0}
    raw["data"]["partitions"] = 1  # one actor has it all
    raw["evaluation"] |= {"baselines": ["popularity"]}
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def config_of(shop: Path, *overrides: str) -> RunConfig:
    return load_config(shop / "shop.yaml", overrides)


def come(shop: Path, n: int) -> None:
    shutil.move(str(shop / "later" / f"part{n}.csv"), str(shop / "log"))


def test_nights_append_begin_warm_are_gated_go_live_and_can_be_taken_back(shop: Path) -> None:
    root, told = str(shop / "out"), []

    def out(uri: str, fingerprint: str) -> None:
        assert bundle.fingerprint_of(uri) == fingerprint
        told.append(fingerprint)

    config = config_of(shop)
    first = run_night(config, root, LOOSE, out)
    assert first.verdict == "live" and first.before == "" and told == [first.bundle] == [bundle.fingerprint_of(f"{root}/bundle")]
    folder = Path(root, "nights", first.name)
    assert (folder / "metrics.json").exists() and list((folder / "scores").glob("*.parquet"))
    assert "How good it is" in storage.read_bytes(storage.Directory(f"{root}/bundle").path(bundle.CARD)).decode()
    Run(config, root).evaluation.verify()
    assert run_night(config, root, LOOSE, out) == first and len(told) == 1  # nothing new came

    come(shop, 2)
    second = run_night(config, root, LOOSE, out)
    assert second.verdict == "live" and second.before == first.name and told == [first.bundle, second.bundle]
    run = Run(config, str(Path(root, "nights", second.name)))
    assert run.trained.manifest["training"]["best_epoch"] >= 0
    warm = bundle.load(run.bundle.root).config.train.warm_start
    assert warm is not None and warm.endswith(first.name)
    compared = storage.read_json(Path(run.out, "comparison.json"))
    row = next(r for r in compared["rows"] if (r["slice"], r["task"], r["metric"]) == ("all", "retrieval", "ndcg@10"))
    for side, there in (("a", "incumbent"), ("b", ".")):
        found = storage.read_json(Path(run.out, there, "metrics.json"))["model"]["retrieval"]["ndcg@10"]
        assert row[side] == pytest.approx(found, rel=1e-6) and Path(run.out, there, "report.html").exists()

    back = roll_back(config, root, out)
    assert back.name == first.name and told[-1] == first.bundle == bundle.fingerprint_of(f"{root}/bundle")
    assert Nights(root).nights[-1].verdict == "rolled back"
    assert run_night(config, root, LOOSE, out).verdict == "rolled back" and told[-1] == first.bundle  # not put back by itself
    with pytest.raises(ValueError, match="no bundle served before"):
        roll_back(config, root, out)

    come(shop, 3)
    third = run_night(config, root, Settings(noninferior=0.99, keep=1), out)
    assert third.before == first.name  # what served, not what was taken back
    assert {p.name for p in Path(root, "nights").iterdir()} == {first.name, third.name}


def test_a_worse_bundle_is_held_back_and_the_command_says_so(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(shop / "shop.yaml"), "--out", str(shop / "out")]
    assert job.main([*arguments, "train.epochs=6"]) == 0
    serving = bundle.fingerprint_of(str(shop / "out" / "bundle"))
    come(shop, 2)
    worse = ["--from-scratch", "--gate", "click/user_auc", "train.epochs=1", "train.learning_rate=1e-9"]
    assert job.main([*arguments, *worse]) == 3
    told = capsys.readouterr()
    assert "limit broken: click/user_auc" in told.err and "held back" in told.out
    assert bundle.fingerprint_of(str(shop / "out" / "bundle")) == serving
    night = Nights(str(shop / "out")).nights[-1]
    assert night.verdict == "held back" and not Path(shop, "out", "nights", night.name, "scores").exists()
    assert job.main([*arguments, "--noninferior", "0.99"]) == 0  # somebody looked at it, and said that it may
    assert Nights(str(shop / "out")).serving == night.name


@pytest.mark.parametrize("step", ["_index", "_score"])
def test_a_night_that_was_stopped_goes_on_where_it_was(shop: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    root = str(shop / "out")
    whole = getattr(pipeline.Run, step)

    def stopped(self: Run) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline.Run, step, stopped)
    with pytest.raises(KeyboardInterrupt):
        run_night(config_of(shop), root, LOOSE)
    assert not Path(root, "bundle").exists()
    monkeypatch.setattr(pipeline.Run, step, whole)
    monkeypatch.setattr(trainer, "TorchTrainer", lambda *_, **__: pytest.fail("it was trained already"))
    night = run_night(config_of(shop), root, LOOSE)
    assert night.verdict == "live" and [n.name for n in Nights(root).nights] == [night.name]


def test_a_bundle_that_does_not_serve_changes_nothing(shop: Path) -> None:
    root = str(shop / "out")

    def refuses(*_: str) -> None:
        raise RolloutError("it was refused")

    with pytest.raises(RolloutError):
        run_night(config_of(shop), root, LOOSE, refuses)
    assert not Path(root, "bundle").exists() and Nights(root).serving == ""
    assert run_night(config_of(shop), root, LOOSE).verdict == "live"


def test_two_nights_at_once_and_a_changed_log_are_refused(shop: Path) -> None:
    root = str(shop / "out")
    with lock.only_writer(root), pytest.raises(lock.HeldError, match="another job is writing here"):
        run_night(config_of(shop), root, LOOSE)
    run_night(config_of(shop), root, LOOSE, score=False)
    part = shop / "log" / "part0.csv"
    part.write_text(part.read_text() + part.read_text().splitlines()[-1] + "\n")
    with pytest.raises(DataError, match=r"--append: .*part0\.csv has changed"):
        run_night(config_of(shop), root, LOOSE)


def test_a_configuration_gets_another_bundle_in_all_its_deployments() -> None:
    old = {"bundle": "a", "drain_seconds": 5, "share": 0.5}
    mine = {"name": "recommend", "deployments": [{"name": "Ingress", "user_config": old}, {"name": "Heads"}]}
    other = {"name": "other", "deployments": [{"name": "Ingress", "user_config": old}]}
    found = with_bundle({"applications": [mine, other]}, "recommend", "b")["applications"]
    whole = {"bundle": "b", "canary": None, "share": 0.0}
    assert [d["user_config"] for d in found[0]["deployments"]] == [whole | {"drain_seconds": 5}, whole]
    assert found[1] == other and mine["deployments"][1] == {"name": "Heads"} and old["bundle"] == "a"


def test_mistakes_are_said_before_anything_runs(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", str(shop / "shop.yaml"), "--out", str(shop / "out")]
    assert job.main([*arguments, "--dashboard", "http://127.0.0.1:1"]) == 2
    assert "no Ray dashboard answers there" in capsys.readouterr().err
    assert job.main([*arguments, "--dashboard", "http://127.0.0.1:1", "--token-env", "NOWHERE"]) == 2
    assert "NOWHERE is not set" in capsys.readouterr().err
    assert not (shop / "out").exists()
