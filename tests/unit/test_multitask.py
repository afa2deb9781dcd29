"""The study of tasks together and apart: cells, resumption, decisions, gate, page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from jobs import tasks as job
from mtrec_ray import lock, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.multitask import cells as cells_module
from mtrec_ray.multitask import run as run_module
from mtrec_ray.multitask import study as study_module
from mtrec_ray.multitask.cells import Bench, Cell, run_cell, run_cells
from mtrec_ray.multitask.findings import execute
from mtrec_ray.multitask.objective import MetricError, check_choices, choose_metrics, gains, mean_gain, relative_gain
from mtrec_ray.multitask.results import gradients, seesaw, summarise_gains
from mtrec_ray.multitask.run import Settings, axis, study_tasks
from mtrec_ray.multitask.study import Plan, Study, StudyError, fitting_epochs
from mtrec_ray.training.worker import load_schema
from tests import tiny
from tests.conftest import TinyRun

METRIC = {"retrieval": "ndcg@10", "click": "auc", "rating": "rmse"}


def three_tasks(raw: dict[str, Any]) -> None:
    raw["tasks"] = {n: raw["tasks"][n] for n in METRIC}


@pytest.fixture
def config(tiny_run: TinyRun) -> RunConfig:
    return tiny.make_config(tiny_run.folder, three_tasks)


@pytest.fixture
def bench(tiny_run: TinyRun, config: RunConfig, tmp_path: Path) -> Bench:
    return Bench(config, tiny_run.data.root, None, str(tmp_path / "cells"), METRIC, epochs=2)


GAIN = {("click", "rating"): -0.10, ("rating", "click"): -0.08, ("retrieval", "click"): 0.05, ("click", "retrieval"): 0.05}
"""(from, to) -> what it brings."""
VARIANT = {"uncertainty": 0.03}
ALONE = {"retrieval": 0.2, "click": 0.6, "rating": 1.0}


def made_up(bench: Bench, cell: Cell) -> dict[str, Any]:
    """A finished cell whose numbers are known: gains add up, seeds differ a little."""
    values = {}
    for task in cell.tasks:
        gain = sum(GAIN.get((other, task), 0.0) for other in cell.tasks) + (0 if cell.alone else VARIANT.get(cell.balancing, 0.0))
        sign = -1 if bench.metrics[task] == "rmse" else 1
        values[task] = ALONE[task] * (1 + sign * gain) * (1 + 0.001 * cell.seed)
    record = [{"retrieval/norm": 1.0, "click/norm": 0.1 * e, "click|retrieval/cosine": 0.2 * e} for e in (1, 2)]
    noise = np.random.default_rng(3).normal(0, 0.01, 50)  # of users: the same for all
    found = {
        "fingerprint": bench.fingerprint(cell), "cell": cells_module.facts(cell), "epochs": bench.epochs, "steps": 10,
        "best_epoch": 1, "seconds": 1.0, "valid": values, "history": [],
        "valid_mean_gain": mean_gain(values, cell.reference, bench.metrics),
        "test": {t: {bench.metrics[t]: v} for t, v in values.items()},
        "gradients": record if cell.record else [], "losses": [],
        "resamples": {t: [v, *(v * (1 + noise)).tolist()] for t, v in values.items()},
    }  # fmt: skip
    storage.write_json(bench.path(cell), found)
    return found


class Counting:
    """Makes cells up, counts them, and dies after some."""

    def __init__(self, dies_after: int | None = None, fails: Callable[[Cell], bool] = lambda _: False) -> None:
        self.trained: list[Cell] = []
        self.dies_after, self.fails = dies_after, fails

    def __call__(self, bench: Bench, cells: Sequence[Cell]) -> Iterator[tuple[int, dict[str, Any]]]:
        for place, cell in enumerate(cells):
            if self.dies_after is not None and len(self.trained) >= self.dies_after:
                raise KeyboardInterrupt
            self.trained.append(cell)
            if self.fails(cell):
                yield place, {"cell": cells_module.facts(cell), "error": "TrainingStopped: the loss is not finite", "seconds": 1.0}
            else:
                yield place, made_up(bench, cell)


# --------------------------------------------------------------------------- metrics and gains


def test_a_gain_is_the_better_part_whatever_the_direction() -> None:
    assert relative_gain(np.array(0.3), np.array(0.2), "auc") == pytest.approx(0.5)
    assert relative_gain(np.array(0.9), np.array(1.0), "rmse") == pytest.approx(0.1)
    assert np.isnan(relative_gain(np.array(0.3), np.array(0.0), "hit@10"))
    values, reference = {"a": 0.3, "b": 0.9, "c": 1.0}, {"a": 0.2, "b": 1.0, "d": 1.0}
    assert gains(values, reference, {"a": "auc", "b": "rmse", "c": "auc"}) == pytest.approx({"a": 0.5, "b": 0.1})
    assert mean_gain(values, reference, {"a": "auc", "b": "rmse", "c": "auc"}) == pytest.approx(0.3)
    assert mean_gain({"a": 1.0}, {}, {"a": "auc"}) is None


def test_every_task_has_a_metric_and_it_can_be_chosen(tiny_run: TinyRun) -> None:
    schema = load_schema(tiny_run.data.prefix)
    chosen = choose_metrics(tiny_run.config, schema, ["retrieval=ndcg", "rating=mae"])
    assert chosen == {
        "retrieval": "ndcg",
        "click": "auc",
        "rating": "mae",
        "similar": "hit@10",
        "taste": "auc",
        "age_group": "macro_f1",
    }
    for wrong, says in {"nobody=auc": "nobody=auc", "rating": "TASK=METRIC", "rating=auc": "rmse"}.items():
        with pytest.raises(MetricError, match=says):
            choose_metrics(tiny_run.config, schema, [wrong])
    with pytest.raises(MetricError, match=r"age_group=auc.* 3 classes"):
        choose_metrics(tiny_run.config, schema, ["age_group=auc"])


def test_a_metric_that_a_column_cannot_have_is_refused(tmp_path: Path) -> None:
    def two_columns(raw: dict[str, Any]) -> None:
        raw["data"]["text"] = {"template": "{name}", "title": "name"}
        raw["data"]["item_features"] = {"genre": {"kind": "categorical"}, "tags": {"kind": "multihot", "separator": "|"}}
        raw["tasks"] |= {c: {"kind": "item_attribute", "column": c} for c in ("genre", "tags")}

    config = tiny.make_config(tmp_path, two_columns)
    assert check_choices(config, ["genre=macro_f1", "tags=micro_auc"]) == {"genre": "macro_f1", "tags": "micro_auc"}
    for wrong in ("genre=macro_auc", "tags=accuracy"):
        with pytest.raises(MetricError, match=wrong):
            check_choices(config, [wrong])


def test_a_task_without_resamples_does_not_take_the_interval_of_the_mean() -> None:
    found = {"a": np.linspace(0.0, 0.2, 51), "b": np.array([0.4])}
    means = summarise_gains(found, {"a": [1.0], "b": [1.0]}, {"a": [1.0], "b": [1.4]})  # type: ignore[dict-item]
    assert means["mean"]["tasks"] == ["a"] and means["mean"]["low"] is not None and means["tasks"]["b"]["low"] is None


def test_the_gate_looks_at_the_unfavourable_end() -> None:
    joint = {"tasks": {
        "fine": {"gain": 0.01, "low": -0.02, "high": 0.04}, "worse": {"gain": -0.02, "low": -0.05, "high": 0.01},
        "few": {"gain": 0.1, "low": None, "high": None},
    }}  # fmt: skip
    broken, unknown = seesaw(joint, 0.03)
    assert len(broken) == 1 and broken[0].startswith("worse:") and "5.0%" in broken[0] and unknown[0].startswith("few:")
    assert seesaw(joint, 0.05)[0] == []


def test_gradients_are_kept_per_epoch_with_their_means() -> None:
    record = [{"a/norm": 1.0, "b/norm": 3.0, "a|b/cosine": -0.5}, {"a/norm": 2.0, "a|b/cosine": 0.1}]
    found = gradients({"gradients": record})
    assert found["norm"] == {"a": [1.0, 2.0], "b": [3.0, None]} and found["cosine"] == {"a|b": [-0.5, 0.1]}
    assert found["mean_cosine"]["a|b"] == pytest.approx(-0.2) and found["mean_norm"]["b"] == 3.0
    assert gradients({"gradients": [{}, {}]}) == {} == gradients(None)


# --------------------------------------------------------------------------- cells


def test_every_cell_has_the_same_budget_and_a_task_alone_stands_for_itself(bench: Bench) -> None:
    impatient = bench.config.model_copy(update={"train": bench.config.train.model_copy(update={"patience": 1})})
    bench = replace(bench, config=impatient)
    alone, joint = bench.single("rating", 5), replace(bench.plain, balancing="uncertainty", reference={"rating": 1.0})
    a, b = bench.cell_config(alone), bench.cell_config(joint)
    assert list(a.tasks) == ["rating"] and a.tasks["rating"].weight == 1 and a.seed == 5
    assert a.train.monitor == "rating/rmse" and not a.train.reference
    assert b.train.monitor == "gain" and b.train.reference == {"rating/rmse": 1.0}
    assert a.balancing.kind == "static" and b.balancing.kind == "uncertainty" and b.tasks["rating"].weight == 0.5
    for c in (a, b):
        assert c.train.epochs == 2 and c.train.patience > 2 and c.train.workers == 0
    assert bench.cell_config(replace(joint)).train.learning_rate == bench.config.train.learning_rate


def test_a_chain_that_is_cut_leaves_a_task_that_stands_alone(tiny_run: TinyRun, tmp_path: Path) -> None:
    def funnel(raw: dict[str, Any]) -> None:
        like = {"kind": "binary", "label": "like", "depends_on": "click", "chain": "aitm", "calibration": 0.3}
        raw["tasks"] = {"retrieval": {"kind": "retrieval"}, "click": raw["tasks"]["click"], "like": like}

    config = tiny.make_config(tiny_run.folder, funnel)
    bench = Bench(config, tiny_run.data.root, None, str(tmp_path), {"retrieval": "ndcg@10", "click": "auc", "like": "auc"}, 1)
    whole, cut = bench.cell_config(bench.plain), bench.cell_config(replace(bench.plain, tasks=("retrieval", "like")))
    assert whole.tasks["like"].depends_on == "click" and cut.tasks["like"].depends_on is None  # type: ignore[attr-defined]
    assert bench.cell_config(bench.single("like", 0)).tasks["like"].depends_on is None  # type: ignore[attr-defined]


def test_the_declared_metric_can_choose_the_checkpoint(bench: Bench) -> None:
    bench = replace(bench, select="monitor")
    assert bench.cell_config(bench.plain).train.monitor == "retrieval/ndcg@10"
    assert bench.cell_config(bench.single("rating", 0)).train.monitor == "rating/rmse"
    rest = replace(bench.plain, tasks=("click", "rating"), reference={"click": 0.5})
    assert bench.cell_config(rest).train.monitor == "gain"  # the declared task is not in it


def test_what_a_cell_depends_on_is_in_its_fingerprint(bench: Bench, config: RunConfig) -> None:
    cell = replace(bench.plain, reference=ALONE)
    slower = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 0.5})})
    others = [
        bench.fingerprint(replace(cell, seed=1)), bench.fingerprint(replace(cell, tasks=("click", "rating"))),
        bench.fingerprint(replace(cell, balancing="uncertainty")), bench.fingerprint(replace(cell, reference={"click": 0.5})),
        replace(bench, epochs=3).fingerprint(cell), replace(bench, config=slower).fingerprint(cell),
        replace(bench, metrics=METRIC | {"rating": "mae"}).fingerprint(cell), replace(bench, select="monitor").fingerprint(cell),
    ]  # fmt: skip
    assert len({bench.fingerprint(cell), *others}) == 1 + len(others)
    assert bench.fingerprint(replace(cell)) == bench.fingerprint(cell)


def test_a_cell_keeps_its_best_checkpoint_and_its_test_metrics(bench: Bench, config: RunConfig) -> None:
    bench = replace(bench, epochs=3)
    found = run_cell(bench, replace(bench.plain, reference=ALONE))
    assert "error" not in found and found == bench.load(replace(bench.plain, reference=ALONE))
    history = found["history"]
    assert [h["epoch"] for h in history] == [0, 1, 2] and found["epochs"] == 3
    assert found["best_epoch"] == int(np.argmax([h["mean_gain"] for h in history]))
    assert found["valid"] == history[found["best_epoch"]]["values"]
    for task, metric in METRIC.items():
        values = found["resamples"][task]
        assert len(values) in (1, 1 + config.evaluation.bootstrap)  # few users have no resamples
        assert values[0] == pytest.approx(found["test"][task][metric], rel=1e-6)


def test_the_test_metrics_are_those_of_the_evaluation(bench: Bench, tiny_run: TinyRun) -> None:
    """The same numbers as `evaluate_part` gives for the same predictor."""
    from mtrec_ray.evaluation.evaluate import MODEL, evaluate_part
    from mtrec_ray.evaluation.measure import Model
    from mtrec_ray.evaluation.reduce import WHOLE, summarise
    from mtrec_ray.evaluation.statistics import Resampler
    from mtrec_ray.training.worker import mapped_windows

    predictor, settings = tiny_run.predictor, tiny_run.config.evaluation
    cache, resampler = mapped_windows(tiny_run.data.prefix, "test"), Resampler(settings.bootstrap, settings.seed)
    mine = cells_module.judge(predictor, cache, settings.profile_folds_test)
    whole = evaluate_part({MODEL: Model(predictor)}, predictor, cache, set(), resampler, settings.profile_folds_test)[MODEL][WHOLE]
    theirs = summarise(whole, dict(tiny_run.config.tasks), resampler)
    for task in ("retrieval", "click", "rating", "similar"):
        for name, values in mine[task].items():
            np.testing.assert_array_equal(values, theirs[task][name])


def test_cells_of_one_seed_train_on_the_same_steps(bench: Bench) -> None:
    steps = {c.tasks: run_cell(bench, c)["steps"] for c in (bench.single("rating", 0), bench.single("retrieval", 0), bench.plain)}
    assert len(set(steps.values())) == 1 and min(steps.values()) > 0


@pytest.mark.slow
def test_every_kind_of_task_can_stand_alone_and_together(tmp_path: Path) -> None:
    tiny.write_log(tmp_path, items=80)  # enough for the folds of items

    def every_kind(raw: dict[str, Any]) -> None:
        raw["data"]["item_features"] = {"genre": {"kind": "categorical"}}
        raw["data"]["text"]["template"] = "{name}"
        raw["data"]["labels"]["rating"]["values"] = [1, 2, 3, 4, 5]
        raw["tasks"] |= {
            "stars": {"kind": "multiclass", "label": "rating"},
            "both": {"kind": "multilabel", "labels": ["click", "like"]},
            "taste_next": {"kind": "profile", "interest": "genre"},
            "genre": {"kind": "item_attribute", "column": "genre"},
        }

    config = tiny.make_config(tmp_path, every_kind)
    data = tiny.prepare_locally(config, tmp_path / "data")
    metrics = choose_metrics(config, load_schema(data.prefix))
    assert metrics["stars"] == "macro_f1" and metrics["taste_next"] == "hit@1" and metrics["genre"] == "accuracy"
    bench = Bench(config, data.root, None, str(tmp_path / "cells"), metrics, epochs=1)
    for cell in (bench.plain, *(bench.single(t, 0) for t in ("stars", "both", "taste_next", "genre", "similar"))):
        found = run_cell(bench, replace(cell, reference={"rating": 1.0} if not cell.alone else {}))
        assert "error" not in found, found["error"]
        assert set(found["valid"]) <= set(cell.tasks) and {"stars", "both", "taste_next", "genre"} & set(cell.tasks) <= set(
            found["resamples"]
        )


def test_a_training_that_breaks_is_an_answer_and_no_file(bench: Bench) -> None:
    with mock.patch.object(cells_module, "run_worker", side_effect=RuntimeError("the loss is not finite")):
        found = run_cell(bench, bench.plain)
    assert found["error"] == "RuntimeError: the loss is not finite" and not list(Path(bench.out).glob("*"))


def test_a_half_written_cell_does_not_count(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    made_up(bench, bench.plain)
    path = Path(bench.path(bench.plain))
    whole = path.read_text()
    assert bench.load(bench.plain) is not None
    for broken in (whole[: len(whole) // 2], "", "[]", json.dumps({"fingerprint": "another"})):
        path.write_text(broken)
        assert bench.load(bench.plain) is None


# --------------------------------------------------------------------------- the study


def test_the_screen_trains_alone_together_and_all_but_one(bench: Bench) -> None:
    runner = Counting()
    execute(Study(bench, Plan(seeds=1), runner))
    groups = [c.tasks for c in runner.trained]
    assert groups[:4] == [("retrieval",), ("click",), ("rating",), ("retrieval", "click", "rating")]
    assert sorted(groups[4:]) == [("click", "rating"), ("retrieval", "click"), ("retrieval", "rating")]
    assert all(not c.reference for c in runner.trained if c.alone)
    assert all(set(c.reference) == set(c.tasks) for c in runner.trained if not c.alone)
    assert [c.record for c in runner.trained].count(True) == 1


def test_with_two_tasks_all_but_one_is_alone(tiny_run: TinyRun, tmp_path: Path) -> None:
    config = tiny.make_config(tiny_run.folder, lambda raw: raw.update(tasks={n: raw["tasks"][n] for n in ("retrieval", "click")}))
    runner = Counting()
    bench = Bench(config, tiny_run.data.root, None, str(tmp_path), {t: METRIC[t] for t in config.tasks}, 1)
    found = execute(Study(bench, Plan(seeds=1), runner))
    assert len(runner.trained) == 3 and set(found["leave_one_out"]) == {"retrieval", "click"}


def test_pairs_are_trained_where_wanted(tiny_run: TinyRun, tmp_path: Path) -> None:
    def four(raw: dict[str, Any]) -> None:
        raw["tasks"] = {n: raw["tasks"][n] for n in ("retrieval", "click", "rating", "similar")}

    config = tiny.make_config(tiny_run.folder, four)
    bench = Bench(config, tiny_run.data.root, None, str(tmp_path), METRIC | {"similar": "hit@10"}, 1)
    assert len(Study(bench, Plan(pairs=True)).screened_groups()) == 1 + 4 + 6
    assert len(Study(bench, Plan()).screened_groups()) == 1 + 4


def test_a_killed_study_goes_on_with_the_missing_cells(bench: Bench) -> None:
    whole = Counting()
    expected = execute(Study(replace(bench, out=bench.out + "-whole"), Plan(seeds=2), whole))
    killed = Counting(dies_after=5)
    with pytest.raises(KeyboardInterrupt):
        execute(Study(bench, Plan(seeds=2), killed))
    assert len(killed.trained) == 5
    resumed = Counting()
    found = execute(Study(bench, Plan(seeds=2), resumed))
    assert len(resumed.trained) == len(whole.trained) - 5 and not {c.name for c in resumed.trained} & {
        c.name for c in killed.trained
    }
    for key in ("joint", "leave_one_out", "grouping", "tasks", "failed"):
        assert found[key] == expected[key]
    again = Counting()
    assert execute(Study(bench, Plan(seeds=2), again))["joint"] == expected["joint"] and again.trained == []


def test_cells_of_another_configuration_do_not_mix(bench: Bench) -> None:
    first, second = Counting(), Counting()
    execute(Study(bench, Plan(seeds=1), first))
    other = bench.config.model_copy(update={"train": bench.config.train.model_copy(update={"weight_decay": 0.5})})
    execute(Study(replace(bench, config=other), Plan(seeds=1), second))
    assert len(second.trained) == len(first.trained)


def test_a_failed_cell_is_reported_the_others_go_on_and_it_is_tried_again(bench: Bench) -> None:
    failing = Counting(fails=lambda c: c.tasks == ("rating",))
    found = execute(Study(bench, Plan(seeds=1), failing))
    assert len(found["failed"]) == 1 and found["failed"][0].startswith("rating,") and "not finite" in found["failed"][0]
    assert set(found["joint"]["tasks"]) == {"retrieval", "click"} and len(failing.trained) == 7
    mended = Counting()
    execute(Study(bench, Plan(seeds=1), mended))
    # what was judged against the missing reference is judged anew
    assert sorted(c.tasks for c in mended.trained) == [
        ("click", "rating"),
        ("rating",),
        ("retrieval", "click", "rating"),
        ("retrieval", "rating"),
    ]


def test_a_joint_model_that_cannot_be_trained_is_an_error(bench: Bench) -> None:
    with pytest.raises(StudyError, match=r"joint model could not be trained.*not finite"):
        execute(Study(bench, Plan(seeds=1), Counting(fails=lambda c: len(c.tasks) == 3)))


def test_gains_affinities_and_groups_follow_from_the_cells(bench: Bench) -> None:
    found = execute(Study(bench, Plan(seeds=3), Counting()))
    joint = {t: g["gain"] for t, g in found["joint"]["tasks"].items()}
    assert joint == pytest.approx({"retrieval": 0.05, "click": 0.05 - 0.08, "rating": -0.10}, abs=1e-6)
    assert found["leave_one_out"]["click"]["tasks"]["rating"]["gain"] == pytest.approx(-0.1, abs=1e-6)
    for (source, to), gain in GAIN.items():
        assert found["grouping"]["affinity"][source][to] == pytest.approx(gain, abs=1e-9)
    assert found["grouping"]["recommended"] == [["retrieval", "click"], ["rating"]]
    over = found["grouping"]["over_together"]["tasks"]
    assert over["rating"]["gain"] == pytest.approx(0.1 / 1.1, abs=1e-6) and over["rating"]["low"] > 0
    assert {c["name"]: c["models"] for c in found["grouping"]["candidates"]} == {"together": 1, "groups": 2, "alone": 3}
    assert found["gradients"]["mean_cosine"] == {"click|retrieval": pytest.approx(0.3)}
    assert sum(c["cell"]["tasks"] == ["rating"] for c in found["cells"]) == 3  # three seeds


def test_the_plain_sum_is_always_in_the_grid(bench: Bench) -> None:
    assert Study(bench, Plan()).variants() == []
    assert Study(bench, Plan(balancing=("uncertainty",))).variants() == [
        ("shared_bottom", "static"),
        ("shared_bottom", "uncertainty"),
    ]
    learned = bench.config.model_copy(update={"balancing": bench.config.balancing.model_copy(update={"kind": "uncertainty"})})
    assert ("shared_bottom", "static") in Study(replace(bench, config=learned), Plan(sharing=("shared_bottom",))).variants()


def test_the_best_of_the_grid_is_compared_with_the_plain_sum_over_all_seeds(bench: Bench) -> None:
    runner = Counting()
    grid = execute(Study(bench, Plan(seeds=3, balancing=("uncertainty",)), runner))["grid"]
    assert grid["best"] == grid["recommended"] == ["shared_bottom", "uncertainty"]
    assert grid["over_plain"]["tasks"]["retrieval"]["gain"] == pytest.approx(0.03 / 1.05, abs=1e-6)
    assert sum(c.balancing == "uncertainty" for c in runner.trained) == 3
    with mock.patch.dict(VARIANT, {"uncertainty": 0.001}):  # not worth it
        other = replace(bench, out=bench.out + "-other")
        grid = execute(Study(other, Plan(seeds=3, balancing=("uncertainty",)), Counting()))["grid"]
    assert grid["best"] == ["shared_bottom", "uncertainty"] and grid["recommended"] == grid["plain"] == ["shared_bottom", "static"]


def test_what_this_machine_cannot_have_is_left_out_of_the_grid_with_the_reason(bench: Bench) -> None:
    from mtrec_ray.balancing import MissingSolver

    def without_torchjd(config: RunConfig) -> None:
        if config.balancing.kind == "upgrad":
            raise MissingSolver("balancing.kind: upgrad needs torchjd: pip install 'mtrec_ray[balancing]'")

    with mock.patch.object(study_module, "check_machine", without_torchjd):
        found = execute(Study(bench, Plan(seeds=1, balancing=("upgrad", "uncertainty")), Counting()))
    assert [row["balancing"] for row in found["grid"]["rows"]] == ["static", "uncertainty"] and found["failed"] == []
    assert found["grid"]["refused"][0]["balancing"] == "upgrad" and "pip install" in found["grid"]["refused"][0]["why"]

    with mock.patch.object(study_module, "check_machine", without_torchjd):
        both = execute(Study(bench, Plan(seeds=1, sharing=("mmoe",), balancing=("upgrad",)), Counting()))
    assert [(r["sharing"], r["balancing"]) for r in both["grid"]["rows"]] == [("shared_bottom", "static"), ("mmoe", "static")]


def test_epochs_follow_from_the_slowest_model() -> None:
    assert fitting_epochs({"a": 2.0, "b": 6.0}, 3, 90) == 27
    assert fitting_epochs({"a": 2.0}, 3, 30) == 30
    assert fitting_epochs({"a": 1000.0}, 3, 30) == 1


@pytest.mark.slow
def test_the_budget_is_measured_once(bench: Bench, tiny_run: TinyRun, config: RunConfig, tmp_path: Path) -> None:
    settings = Settings(Plan(seeds=1), cell_minutes=0.1)
    with mock.patch.object(run_module, "epoch_seconds", return_value=1.0) as measured:
        first = study_tasks(config, tiny_run.data, None, str(tmp_path / "out"), settings, Counting())
    assert measured.call_count == 1 and first["settings"]["epochs"] == 3  # what train.epochs allows
    with mock.patch.object(run_module, "epoch_seconds", return_value=100.0) as measured:
        second = study_tasks(config, tiny_run.data, None, str(tmp_path / "out"), settings, Counting())
    assert measured.call_count == 0 and second["fingerprint"] == first["fingerprint"]


# --------------------------------------------------------------------------- the job


@pytest.fixture
def started(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Path]]:
    """Runs the job on the tiny data: (arguments, change of the config) -> (exit code, OUT)."""
    import yaml

    def stages(config: RunConfig, out: str, stages: tuple[str, ...]) -> Any:
        return mock.Mock(data=tiny_run.data, text=None, path=lambda *parts: storage.join(out, *parts))

    monkeypatch.setattr(job, "run_stages", stages)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str, runner: Any = run_cells, change: Callable[[dict[str, Any]], None] = three_tasks) -> tuple[int, Path]:
        raw = tiny.raw_config(tiny_run.folder)
        change(raw)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        monkeypatch.setattr(job, "run_cells", runner)
        code = job.main(["--config", str(tmp_path / "run.yaml"), *arguments])
        return code, tmp_path / "runs" / "tiny" / "tasks"

    return start


@pytest.mark.slow
def test_the_job_trains_for_real_and_writes_json_and_page(
    started: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    def two(raw: dict[str, Any]) -> None:
        raw["tasks"] = {n: raw["tasks"][n] for n in ("retrieval", "rating")}

    code, out = started("--epochs", "1", "--seeds", "1", "--balancing", "uncertainty", change=two)
    assert code == 0
    found = json.loads((out / "tasks.json").read_text())
    assert {
        "tasks",
        "joint",
        "leave_one_out",
        "grouping",
        "grid",
        "gradients",
        "cells",
        "settings",
        "fingerprint",
        "config",
    } <= set(found)
    assert found["settings"]["epochs"] == 1 and len(found["cells"]) == len(list((out / "cells").glob("*.json"))) == 4
    assert found["tasks"] == {
        "retrieval": {"kind": "retrieval", "metric": "ndcg@10"},
        "rating": {"kind": "regression", "metric": "rmse"},
    }
    page = (out / "tasks.html").read_text()
    assert page.count("<svg") >= 5 and "Recommended" in page
    assert "src=" not in page and "<link" not in page and "<script" not in page  # works without network
    shown = capsys.readouterr().out
    assert "ndcg@10" in shown and "Recommended" in shown and "tasks.json" in shown


@pytest.mark.slow
def test_the_page_shows_gradients_gate_and_grid(started: Callable[..., tuple[int, Path]]) -> None:
    code, out = started("--epochs", "2", "--seeds", "2", "--balancing", "uncertainty", "--seesaw", "0.03", runner=Counting())
    page = (out / "tasks.html").read_text()
    assert code == job.LIMIT_BROKEN == 3
    assert "Do the gradients conflict?" in page and "kept no record" not in page and "norm of the gradient" in page
    assert "Seesaw." in page and "rating: the joint model may be worse" in page and "The best one against the plain sum" in page


@pytest.mark.slow
def test_the_gate_says_which_task_loses(started: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    assert started("--epochs", "1", "--seeds", "1", "--seesaw", "0.2", runner=Counting())[0] == 0
    capsys.readouterr()
    assert started("--epochs", "1", "--seeds", "1", "--seesaw", "0.03", runner=Counting())[0] == 3
    errors = capsys.readouterr().err
    assert "limit broken: rating" in errors and "limit broken: retrieval" not in errors
    assert started("--epochs", "1", "--seeds", "1", runner=Counting())[0] == 0  # nothing was declared


@pytest.mark.slow
def test_a_failed_cell_makes_the_job_exit_with_two(
    started: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = started("--epochs", "1", "--seeds", "1", runner=Counting(fails=lambda c: c.tasks == ("rating",)))
    assert code == 2 and "failed: rating, " in capsys.readouterr().err
    assert json.loads((out / "tasks.json").read_text())["failed"] and "<b>Failed.</b>" in (out / "tasks.html").read_text()


def one_task(raw: dict[str, Any]) -> None:
    raw["tasks"] = {"retrieval": raw["tasks"]["retrieval"]}


def thirteen_tasks(raw: dict[str, Any]) -> None:
    raw["tasks"] = {"retrieval": raw["tasks"]["retrieval"]} | {f"rating{i}": raw["tasks"]["rating"] for i in range(12)}


@pytest.mark.parametrize(
    ("arguments", "change", "says"),
    [
        ([], one_task, "nothing to compare"),
        ([], thirteen_tasks, "13 are too many"),
        (["--metric", "ratings=rmse"], three_tasks, "--metric 'ratings=rmse'"),
        (["--metric", "rating=auc"], three_tasks, "--metric 'rating=auc'"),
        (["--balancing", "static,magic"], three_tasks, "--balancing: unknown ['magic']"),
        (["--sharing", "magic"], three_tasks, "--sharing: unknown ['magic']"),
        (["--seesaw", "0.03", "evaluation.bootstrap=0"], three_tasks, "--seesaw: evaluation.bootstrap is 0"),
        (["nonsense.key=1"], three_tasks, "nonsense"),
    ],
)
def test_bad_input_is_named_before_anything_is_prepared(
    started: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], change: Callable[[dict[str, Any]], None], says: str,
) -> None:  # fmt: skip
    with mock.patch.object(job, "study_tasks", side_effect=AssertionError("must not be reached")):
        code, out = started(*arguments, change=change)
    assert code == 2 and says in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize("arguments", [["--seesaw", "1.5"], ["--epochs", "0"], ["--cell-minutes", "-1"], ["--select", "best"]])
def test_values_that_make_no_sense_are_refused_by_the_parser(
    started: Callable[..., tuple[int, Path]], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit):
        started(*arguments)


def test_two_jobs_do_not_write_into_one_folder(bench: Bench, tiny_run: TinyRun, config: RunConfig, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with lock.only_writer(out), pytest.raises(storage.StorageError, match="another job"):
        study_tasks(config, tiny_run.data, None, out, Settings(epochs=1), Counting())


def test_names_of_an_axis_may_have_spaces() -> None:
    assert axis("--balancing", "static, uncertainty", ("static", "uncertainty")) == ("static", "uncertainty")
    assert axis("--balancing", None, ("static",)) == ()
