"""Comparing runs: paired, over seeds, and refused where a difference would mean nothing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.compare import LIMIT_BROKEN, main
from mtrec_ray import storage
from mtrec_ray.evaluation.compare import CompareError, Judged, broken_limits, compare, load, over_seeds
from mtrec_ray.evaluation.statistics import Resampler, Statistics, user_hash

USERS = user_hash(np.array([f"u{i}" for i in range(200)], dtype=object))
BASE = np.random.default_rng(0).random(200)


def values_of(per_user: np.ndarray, resamples: int = 400) -> np.ndarray:
    statistics = Statistics()
    weights = Resampler(resamples).weights(USERS).astype(float)
    statistics.add_means(weights, {"x": (per_user, np.ones(len(per_user)))})
    return statistics.mean("x")


def write_run(folder: Path, metrics: dict[str, np.ndarray], **facts: Any) -> str:
    """A run directory with an evaluation: metric key -> value per user."""
    directory = storage.Directory(str(folder / "evaluation"))
    prefix = directory.begin("0" * 64)
    resamples = facts.get("resamples", 400)
    buffer = io.BytesIO()
    np.savez(buffer, **{n: values_of(v, resamples) for n, v in metrics.items()})  # type: ignore[arg-type]
    storage.write_bytes(storage.join(prefix, "resamples.npz"), buffer.getvalue())
    directory.publish(
        "0" * 64, **({"data": "d1", "protocol": "time", "seed": 0, "resamples": 400, "tasks": {"like": {"label": "like"}}} | facts)
    )
    return str(folder)


NDCG, RMSE, SLICE = "all|retrieval|ndcg@10", "all|rating|rmse", "cold_user|retrieval|ndcg@10"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[str, str, str]:
    """A; B a little better; C worse in ranking and on a slice, better in rating."""
    noise = np.random.default_rng(1).normal(0, 0.02, 200)
    a = write_run(tmp_path / "a", {NDCG: BASE, RMSE: BASE + 1, SLICE: BASE, "all|retrieval|n": BASE})
    b = write_run(tmp_path / "b", {NDCG: BASE + 0.02 + noise, RMSE: BASE + 1, SLICE: BASE, "all|like|auc": BASE})
    c = write_run(tmp_path / "c", {NDCG: BASE - 0.05 + noise, RMSE: BASE + 0.9, SLICE: BASE - 0.2})
    return a, b, c


def test_differences_are_b_minus_a_paired_by_user(runs: tuple[str, str, str]) -> None:
    rows = {(r.slice, r.name): r for r in compare([load(runs[0])], [load(runs[1])])}
    assert set(rows) == {("all", "retrieval/ndcg@10"), ("all", "rating/rmse"), ("cold_user", "retrieval/ndcg@10")}  # what both have
    row = rows["all", "retrieval/ndcg@10"]
    assert row.a == pytest.approx(BASE.mean()) and row.difference == pytest.approx(row.b - row.a)
    assert row.low is not None and row.high is not None and 0.01 < row.low < row.difference < row.high < 0.03
    assert row.verdict == "better" and rows["all", "rating/rmse"].verdict == ""


def test_smaller_is_better_for_errors(runs: tuple[str, str, str]) -> None:
    rows = {r.name: r for r in compare([load(runs[0])], [load(runs[2])]) if r.slice == "all"}
    assert rows["rating/rmse"].difference == pytest.approx(-0.1) and rows["rating/rmse"].verdict == "better"
    assert rows["retrieval/ndcg@10"].verdict == "worse"
    swapped = {r.name: r for r in compare([load(runs[2])], [load(runs[0])]) if r.slice == "all"}
    assert broken_limits(list(swapped.values()), ["rating/rmse"], 0.01) and not broken_limits(
        list(rows.values()), ["rating/rmse"], 0.0
    )


def test_the_gate_exits_with_three_when_a_limit_is_broken(runs: tuple[str, str, str], capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = runs
    assert main([a, b, "--noninferior", "0.02"]) == 0
    assert "within the limit" in capsys.readouterr().out
    assert main([a, c, "--noninferior", "0.02"]) == LIMIT_BROKEN == 3
    assert "limit broken: retrieval/ndcg@10: B may be worse than A by 0.05" in capsys.readouterr().err
    assert main([a, c, "--noninferior", "0.2"]) == 0  # a tenth of 0.5 is allowed to go
    assert main([a, c, "--noninferior", "0.2", "--gate", "cold_user|retrieval/ndcg@10"]) == 3
    assert main([a, c, "--noninferior", "0.02", "--gate", "rating/rmse"]) == 0
    assert main([a, c]) == 0  # nothing was declared


def test_the_table_shows_slices_and_goes_to_json(
    runs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([runs[0], runs[1], "--metric", "retrieval/ndcg@10", "--json", str(tmp_path / "rows.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("all ") and "better" in lines[1] and lines[2].startswith("cold_user ")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 3


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"data": "d2"}, "other prepared data"),
        ({"protocol": "random"}, "another protocol"),
        ({"seed": 1}, "other users were drawn"),
        ({"resamples": 50}, "another evaluation.bootstrap"),
        ({"profile_folds": [7]}, "judged on other users"),
        ({"tasks": {"like": {"label": "click"}}}, "mean something else"),
    ],
)
def test_runs_of_other_data_protocol_or_draws_are_refused(
    runs: tuple[str, str, str], tmp_path: Path, facts: dict[str, Any], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other", {NDCG: BASE}, **facts)
    assert main([runs[0], other]) == 2
    captured = capsys.readouterr()
    assert says in captured.err and other in captured.err and captured.out == ""


def test_a_run_without_evaluation_a_missing_gate_and_no_interval_are_refused(
    runs: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([runs[0], str(tmp_path / "nothing")]) == 2 and "jobs.evaluate" in capsys.readouterr().err
    assert main([runs[0], runs[1], "--noninferior", "0.1", "--gate", "like/auc"]) == 2  # A never measured it
    assert "like/auc" in capsys.readouterr().err
    plain = [write_run(tmp_path / n, {NDCG: BASE}, resamples=0) for n in ("p", "q")]
    assert main([*plain]) == 2 and "evaluation.bootstrap is 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([runs[0], runs[1], "--noninferior", "1.5"])
    with pytest.raises(SystemExit):
        main([runs[0], runs[1], "--gate", "rating/rmse"])


def test_a_slice_may_have_any_name() -> None:
    facts = {"data": "d", "protocol": "time", "seed": 0, "resamples": 100}
    value = np.linspace(0, 1, 101)
    key = "genre=Action|Comedy|retrieval|ndcg@10"
    (row,) = compare([Judged("a", facts, {key: value})], [Judged("b", facts, {key: value + 1})])
    assert (row.slice, row.name, row.difference) == ("genre=Action|Comedy", "retrieval/ndcg@10", 1.0)


def test_the_gate_follows_the_name_of_the_retrieval_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / n, {"all|next|ndcg@10": BASE}, retrieval="next") for n in ("a", "b")]
    assert main([*runs, "--noninferior", "0.01"]) == 0 and "next/ndcg@10" in capsys.readouterr().out


def test_a_single_test_user_gives_no_interval_and_no_verdict() -> None:
    facts = {"data": "d", "protocol": "time", "seed": 0, "resamples": 100}
    one, two = (Judged(n, facts, {NDCG: np.array([v])}) for n, v in (("a", 0.1), ("b", 0.9)))
    with pytest.raises(CompareError, match="fewer than 10 test users"):
        compare([one], [two])


def test_seeds_are_a_second_level(tmp_path: Path) -> None:
    """Runs that differ by seed widen the interval; equal runs leave it as it is."""
    rng = np.random.default_rng(2)
    shifts = rng.normal(0, 0.05, 5)
    seeds = [load(write_run(tmp_path / f"s{i}", {NDCG: BASE + s})) for i, s in enumerate(shifts)]
    same = [load(write_run(tmp_path / f"t{i}", {NDCG: BASE})) for i in range(5)]
    base = [load(write_run(tmp_path / "base", {NDCG: BASE}))]
    (wide,), (narrow,) = compare(base, seeds), compare(base, same)
    assert wide.difference == pytest.approx(shifts.mean()) and narrow.difference == pytest.approx(0)
    assert wide.low is not None and wide.high is not None and narrow.low is not None and narrow.high is not None
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * shifts.std(ddof=1) / np.sqrt(5), rel=0.2)
    assert narrow.high - narrow.low < 1e-9
    np.testing.assert_array_equal(over_seeds(seeds, 1)[NDCG], over_seeds(seeds, 1)[NDCG])
