"""The whole main job on a tiny log of baskets with impressions: `group`, `time`, two DDP workers, a text encoder that reads the
items and what users wrote of them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from mtrec_ray import bundle, storage
from mtrec_ray.config import RunConfig, parse_config
from mtrec_ray.evaluation import runner
from mtrec_ray.histories import History
from mtrec_ray.pipeline import STAGES, StageError, run_stages
from mtrec_ray.serving.history import PreparedHistories
from tests import tiny
from tests.conftest import TinyRun

pytestmark = pytest.mark.ray
EPOCHS = 10


@pytest.fixture(scope="module")
def run(ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    folder = tmp_path_factory.mktemp("e2e")
    tiny.write_log(folder, users=40, visits=16, seed=5)
    tiny.write_encoder(folder / "encoder")
    tiny.write_features(folder)

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["partitions"] = 6
        tiny.with_reviews(folder)(raw)
        raw["evaluation"]["baselines"] = ["popularity", "popularity_recent", "itemknn", "ease", "ials", "bpr", "tasks"]
        raw["train"] |= {"epochs": EPOCHS, "patience": EPOCHS, "monitor": "click/auc"}

    config = tiny.make_config(folder, change)
    run_stages(config, str(folder / "run"), STAGES)
    return config, folder / "run"


def read_metrics(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "metrics.json").read_text()))


def test_metrics_have_the_promised_form(run: tuple[RunConfig, Path]) -> None:
    metrics = read_metrics(run[1])
    assert {"protocol", "model", "baselines", "slices", "rows", "timing", "peak_rss_mib"} <= set(metrics)
    assert metrics["protocol"] == "time"
    model = metrics["model"]
    assert {"ndcg@10", "hr@10", "recall@10", "recall@20", "mrr"} <= set(model["retrieval"])
    assert {"rmse", "mae"} <= set(model["rating"]) and {"auc", "logloss"} <= set(model["click"])
    assert {"accuracy", "macro_f1"} <= set(model["taste"]) and "hit@10" in model["similar"]
    rankers = {"popularity", "popularity_recent", "itemknn", "ease", "ials", "bpr"}
    others = {"item_mean", "user_mean", "majority", "item_bag"}
    assert set(metrics["baselines"]) == rankers | others | {"gradient_boosting", "item_vectors"}
    assert set(metrics["timing"]) == set(metrics["peak_rss_mib"]) == set(STAGES)
    assert {"cold_user", "cold_item"} <= set(metrics["slices"])
    assert all(math.isfinite(v) for task in model.values() for v in task.values())


def test_every_row_is_accounted_for(run: tuple[RunConfig, Path]) -> None:
    rows = read_metrics(run[1])["rows"]
    data, training = rows["data"], rows["training"]
    assert data["read"] == data["events"] + data["quarantined"]
    assert data["train_targets"] + data["valid_targets"] + data["test_targets"] == data["events"]
    assert training["rows_read"] == training["rows_trained"] + training["rows_dropped"]
    assert training["rows_trained"] == data["train_windows"] * EPOCHS and training["workers"] == 2
    assert training["events"] == data["train_targets"] * EPOCHS


def test_the_model_learned_what_the_log_says(run: tuple[RunConfig, Path]) -> None:
    """Even users click even items with 0.8, others with 0.15: the click head must find most of that."""
    assert read_metrics(run[1])["model"]["click"]["auc"] > 0.7


def test_no_test_event_was_trained_or_shown(run: tuple[RunConfig, Path]) -> None:
    data = storage.Directory(str(run[1] / "data"))
    valid_from, test_from = data.manifest["cuts"]
    train = storage.read_table(data.path("windows", "train")).to_pylist()
    assert max(t for w in train for t in [*w["target_time"], *w["history_time"]]) < valid_from
    for name, begin in (("valid", valid_from), ("test", test_from)):
        for w in storage.read_table(data.path("windows", name)).to_pylist():
            assert len(set(w["target_time"])) == 1 and w["target_time"][0] >= begin
            assert all(t < w["target_time"][0] for t in w["history_time"])


def test_impressions_without_a_click_are_targets_but_never_history_or_positives(run: tuple[RunConfig, Path]) -> None:
    data = storage.Directory(str(run[1] / "data"))
    windows = storage.read_table(data.path("windows", "train")).to_pylist()
    clicks = [c for w in windows for c in w["label_click"]]
    assert 0 < np.mean(clicks) < 1
    assert all(a == 1 for w in windows for a in w["history_action_click"])
    assert all(p == c for w in windows for p, c in zip(w["target_positive"], w["label_click"], strict=True))


def test_scores_have_the_promised_columns_and_ranks(run: tuple[RunConfig, Path]) -> None:
    config, out = run
    table = pq.read_table(out / "scores")
    assert table.column_names == ["user_id", "item_id", "rank", "score", "retrieval", "click", "rating"]
    by_user: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        by_user.setdefault(row["user_id"], []).append(row)
    assert set(by_user) == set(PreparedHistories(str(out / "data")).user_ids())
    for rows in by_user.values():
        assert [r["rank"] for r in rows] == list(range(1, config.scoring.k + 1))
        assert [r["score"] for r in rows] == sorted((r["score"] for r in rows), reverse=True)
    metadata = pq.read_schema(next((out / "scores").glob("part-*.parquet"))).metadata
    assert metadata[b"bundle"].decode() == bundle.load(str(out / "bundle")).fingerprint


def test_what_users_wrote_is_encoded_once_and_changes_what_they_are_told(run: tuple[RunConfig, Path]) -> None:
    """The store's histories have the texts; in batch they are read from the encode stage, here they are encoded again."""
    config, out = run
    text = storage.Directory(str(out / "text")).manifest
    assert text["event_texts"] == text["event_texts_encoded"] > 5
    predictor, store = bundle.load(str(out / "bundle")), PreparedHistories(str(out / "data"))
    scores = pq.read_table(out / "scores").to_pandas()
    changed = 0
    for user in [u for u in store.user_ids() if (store.get(u) or History()).item_ids][:8]:
        history = store.get(user)
        assert history is not None
        found = predictor.recommend([history], config.scoring.k)[0]["items"]
        told = scores[scores.user_id == user].sort_values("rank")["score"].tolist()
        assert [i["score"] for i in found] == pytest.approx(told, rel=1e-5, abs=1e-5)
        silent = predictor.recommend([replace(history, context=history.context | {"review": []})], config.scoring.k)[0]["items"]
        changed += [i["score"] for i in silent] != [i["score"] for i in found]
    assert changed > 0


def test_published_directories_verify(run: tuple[RunConfig, Path]) -> None:
    for name in ("data", "text", "train", "bundle"):
        storage.Directory(str(run[1] / name)).verify()
    assert list((run[1] / "train" / "tensorboard").rglob("events.out.tfevents*"))


def test_a_second_run_reuses_every_stage(run: tuple[RunConfig, Path]) -> None:
    config, out = run
    watched = [*out.glob("*/manifest.json"), *out.glob("scores/*.parquet")]
    before = {p: p.stat().st_mtime_ns for p in watched}
    timing = read_metrics(out)["timing"]
    run_stages(config, str(out), STAGES)
    assert {p: p.stat().st_mtime_ns for p in watched} == before
    assert read_metrics(out)["timing"] == timing


def test_a_change_reruns_only_what_depends_on_it(run: tuple[RunConfig, Path]) -> None:
    config, out = run
    raw = config.model_dump(mode="json")
    raw["scoring"]["k"] = 3
    stages = ("data", "text", "train", "bundle")
    before = [(out / n / "manifest.json").stat().st_mtime_ns for n in stages]
    run_stages(parse_config(raw), str(out), STAGES)
    assert [(out / n / "manifest.json").stat().st_mtime_ns for n in stages] == before
    assert max(pq.read_table(out / "scores")["rank"].to_pylist()) == 3


def test_a_stage_before_its_input_says_which_one_is_missing(run: tuple[RunConfig, Path], tmp_path: Path) -> None:
    for stage, needs in (
        ("encode", "prepare"),
        ("train", "prepare"),
        ("index", "train"),
        ("evaluate", "train"),
        ("score", "evaluate"),
    ):
        with pytest.raises(StageError, match=rf"jobs\.{needs}"):
            run_stages(run[0], str(tmp_path / "empty"), (stage,))


def test_a_job_killed_while_it_writes_scores_leaves_the_old_ones(
    run: tuple[RunConfig, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after shards were written and before they were all there: the published lists stay whole."""
    from mtrec_ray.scoring import batch

    config, out = run
    raw = config.model_dump(mode="json")
    raw["scoring"]["k"] = 2
    before = pq.read_table(out / "scores")

    class Died(RuntimeError):
        pass

    def die(*_: Any, **__: Any) -> Any:
        draft = out / "scores" / "_draft" / "0123456789abcdef"
        draft.mkdir(parents=True)
        (draft / "part-00000.parquet").write_bytes(b"half")
        raise Died

    monkeypatch.setattr(batch.ray.data, "from_items", die)
    with pytest.raises(Died):
        run_stages(parse_config(raw), str(out), ("score",))
    monkeypatch.undo()
    assert pq.read_table(out / "scores").equals(before)
    run_stages(parse_config(raw), str(out), ("score",))
    assert not (out / "scores" / "_draft").exists() and os.path.exists(out / "scores" / "_manifest.json")


def test_blocks_in_flight_change_no_digit(run: tuple[RunConfig, Path]) -> None:
    """Evaluations of one bundle, in this process and with three blocks in flight, are equal to the last bit."""
    from mtrec_ray.evaluation.baselines import ItemVectors, Popularity
    from mtrec_ray.evaluation.runner import measure_split
    from mtrec_ray.evaluation.statistics import Resampler

    out = run[1]
    data, prefix = storage.Directory(str(out / "data")), storage.Directory(str(out / "bundle")).prefix
    parts = storage.list_files(data.path("windows", "test"), ".parquet")
    assert len(parts) == 6
    count = storage.read_table(data.path("catalogue.parquet"), ["count"])["count"].to_numpy().astype(np.float32)
    systems = {"popularity": Popularity(count), "item_vectors": ItemVectors(bundle.load(prefix).item_vec_ND)}
    text = storage.Directory(str(out / "text")).prefix
    here, three = (measure_split(data, prefix, "test", systems, Resampler(30), n, text) for n in (0, 3))
    assert set(here) == set(three) == {"model", *systems}
    for system in here:
        assert set(here[system]) == set(three[system]) and len(here[system]) > 5
        for part, statistics in here[system].items():
            other = three[system][part]
            assert set(statistics.sums) == set(other.sums) and set(statistics.scores) == set(other.scores)
            assert all(np.array_equal(v, other.sums[n]) for n, v in statistics.sums.items())
            for name, scores in statistics.scores.items():
                for kind in ("label", "prediction", "user"):
                    assert np.array_equal(getattr(scores, kind), getattr(other.scores[name], kind))


def test_an_actor_that_starts_when_all_is_done_and_gone_does_not_fail(run: tuple[RunConfig, Path]) -> None:
    from mtrec_ray.evaluation.runner import _Actor
    from mtrec_ray.evaluation.statistics import Resampler

    prefix, text = (storage.Directory(str(run[1] / part)).prefix for part in ("bundle", "text"))
    assert _Actor(prefix, [], Resampler(3), text).predictor.item_ids


def test_a_run_compares_with_itself_and_the_gate_holds(run: tuple[RunConfig, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.compare import main

    assert main([str(run[1]), str(run[1]), "--noninferior", "0.01", "--gate", "click/auc"]) == 0
    assert "retrieval/ndcg@10" in capsys.readouterr().out


@pytest.mark.parametrize("few", [0, runner.FEW])
def test_a_broken_model_is_said_plainly_here_and_through_the_actors(
    ray_cluster: Any, tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    from mtrec_ray.evaluation.evaluate import EvaluationError

    monkeypatch.setattr(runner, "FEW", few)
    broken = bundle.load(tiny_run.bundle_root)
    broken.model.trunk.norm.weight.data.fill_(float("nan"))
    tiny.write_bundle(tiny_run.config, tiny_run.data, broken.model, tmp_path / "bundle")
    quick = parse_config(tiny_run.config.model_dump(mode="json") | {"evaluation": {"baselines": [], "bootstrap": 0}})
    with pytest.raises(EvaluationError, match="retrieval scores contain NaN or infinity: the model is broken"):
        runner.evaluate(quick, tiny_run.data, str(tmp_path / "bundle"))


def test_the_report_is_one_page_that_needs_nothing_else(run: tuple[RunConfig, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = (run[1] / "report.html").read_text(encoding="utf-8")
    for heading in ("In short", "Which item comes next", "For whom it works", "Similar items", "The data", "Drift", "Training",
                    "Are predicted probabilities right?", "Profiles: what was guessed", "What was dropped, and why"):  # fmt: skip
        assert heading in page, heading
    assert page.count("<svg") == 7  # ranking, calibration, confusion, slices, activity, popularity, training
    for outside in ("<script", "<link", "<img", "src=", "@import", "url(http"):
        assert outside not in page, outside
    ndcg = read_metrics(run[1])["model"]["retrieval"]["ndcg@10"]
    assert f"<b>{ndcg:.3f}</b><span>retrieval: ndcg@10</span>" in page and "Thing 3" in page
    assert "built-in method" not in page and "None" not in page


def test_reporting_a_run_that_is_not_there_is_one_message(tmp_path: Path) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "jobs.report", str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no" in done.stderr and "Traceback" not in done.stderr


def test_other_baselines_are_evaluated_without_training_again(run: tuple[RunConfig, Path]) -> None:
    config, out = run
    raw = config.model_dump(mode="json")
    raw["evaluation"] |= {"baselines": ["popularity"], "bootstrap": 25}
    before = (out / "train" / "manifest.json").stat().st_mtime_ns
    run_stages(parse_config(raw), str(out), STAGES[:5])
    assert (out / "train" / "manifest.json").stat().st_mtime_ns == before
    metrics = read_metrics(out)
    assert set(metrics["baselines"]) == {"popularity"} and metrics["comparison"]["resamples"] == 25
