"""Trials and the board: what is noted, kept, ranked and written. No Ray."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from mtrec_ray.config import load_config
from mtrec_ray.tuning.board import Board
from mtrec_ray.tuning.space import with_values
from mtrec_ray.tuning.trials import (
    Epoch,
    Finalist,
    Trial,
    changes,
    csv_text,
    finalist_table,
    lines,
    load,
    ranked,
    ranked_finalists,
    save,
    summary,
    table,
    yaml_text,
)
from tests import tiny

NDCG, RMSE = "retrieval/ndcg@10", "rating/rmse"


def trial(number: int, *values: float, monitor: str = NDCG, state: Any = "done", seed: int | None = None) -> Trial:
    history = [Epoch(i, 1.5, {monitor: v, "click/auc": 0.5 + 0.01 * i}) for i, v in enumerate(values, 1)]
    return Trial(number, {"model.width": 8 * number + 8}, monitor, seed, state, history)


class Stops:
    """Lets nobody go on after an epoch, and notes who was asked about."""

    def __init__(self, after: int) -> None:
        self.after, self.asked = after, []  # type: ignore[var-annotated]

    def goes_on(self, name: str, epoch: int, score: float) -> bool:
        self.asked.append((name, epoch, score))
        return epoch < self.after


def result(epoch: int, value: float, monitor: str = NDCG) -> dict[str, Any]:
    return {"epoch": epoch, "seconds": 1.0, f"valid/{monitor}": value, "train/rating/loss": 9.0, "time_total_s": 3}


def test_the_best_epoch_is_the_highest_value_or_the_lowest_error() -> None:
    assert trial(1, 0.1, 0.3, 0.2).value == 0.3
    errors = trial(1, 1.2, 0.9, 1.0, monitor=RMSE)
    assert errors.value == 0.9 and errors.best is not None and errors.best.epoch == 2
    assert [t.number for t in ranked([trial(1, 1.1, monitor=RMSE), trial(2, 0.9, monitor=RMSE)])] == [2, 1]
    assert trial(1, 0.2, 0.4, monitor="gain").value == 0.4


def test_ranking_leaves_out_what_failed_and_keeps_what_was_stopped() -> None:
    trials = [trial(0, 0.2), trial(1, 0.9, state="failed"), trial(2, 0.3, state="stopped"), trial(3), trial(4, 0.3)]
    assert [t.number for t in ranked(trials)] == [2, 4, 0]


def test_a_trial_is_kept_as_it_was(tmp_path: Path) -> None:
    kept = trial(7, 0.1, 0.2, state="stopped")
    save(str(tmp_path), kept)
    assert load(str(tmp_path), Trial(7, kept.values, NDCG)) == kept
    unknown = Trial(8, {}, NDCG)
    assert load(str(tmp_path), unknown) is unknown


def test_an_epoch_that_is_trained_again_replaces_what_was_noted() -> None:
    found = trial(1, 0.1, 0.2, 0.9)
    found.add(Epoch(3, 1.0, {NDCG: 0.3}))
    found.add(Epoch(2, 1.0, {NDCG: 0.25}))  # gone on from an earlier checkpoint
    assert [e.epoch for e in found.history] == [1, 2] and found.value == 0.25


def test_the_board_notes_valid_alone_and_keeps_it_at_once(tmp_path: Path) -> None:
    board = Board(str(tmp_path), [Trial(1, {}, NDCG)], {"0001": 3}, None)
    assert board.report("0001", result(1, 0.1) | {"valid/click/auc": 0.6, "valid/like/auc": float("nan")})
    kept = load(str(tmp_path), Trial(1, {}, NDCG))  # a value that is no number is none
    assert kept.state == "unfinished" and kept.history == [Epoch(1, 1.0, {NDCG: 0.1, "click/auc": 0.6})]
    assert board.report("0001", result(2, 0.2)) and board.report("0001", {"finished": True})
    assert load(str(tmp_path), Trial(1, {}, NDCG)).state == "done"
    assert board.report("0001", {"finished": True}) and board.over == 1  # Tune repeats the last word


def test_the_board_stops_who_falls_behind_but_never_the_start_or_in_the_last_epoch(tmp_path: Path) -> None:
    halving = Stops(after=2)
    board = Board(str(tmp_path), [Trial(n, {}, RMSE) for n in range(3)], dict.fromkeys(("0000", "0001", "0002"), 3), halving)
    for name in board.trials:
        assert board.report(name, result(1, 1.0, RMSE))
    assert board.report("0000", result(2, 1.1, RMSE))
    assert not board.report("0001", result(2, 1.1, RMSE))
    assert halving.asked[-1] == ("0001", 2, -1.0)  # the best so far, higher is better
    assert load(str(tmp_path), Trial(1, {}, RMSE)).state == "stopped" and board.trials["0001"].value == 1.0
    assert board.report("0002", result(3, 0.5, RMSE))
    assert board.trials["0002"].state == "unfinished"


def test_an_epoch_without_evaluation_decides_nothing(tmp_path: Path) -> None:
    halving = Stops(after=0)
    board = Board(str(tmp_path), [Trial(1, {}, NDCG)], {"0001": 3}, halving)
    assert board.report("0001", {"epoch": 1, "seconds": 1.0})
    assert halving.asked == []


def test_what_earlier_calls_measured_is_told_to_the_halving_again(tmp_path: Path) -> None:
    halving = Stops(after=99)
    board = Board(str(tmp_path), [trial(0, 0.1, 0.3, 0.2), trial(1, 0.2, state="unfinished")], {"0000": 3, "0001": 3}, halving)
    assert halving.asked == [("0000", 1, 0.1), ("0000", 2, 0.3), ("0000", 3, 0.3), ("0001", 1, 0.2)]
    assert board.waiting == ["0001"]


def test_a_failed_trial_says_why_and_is_not_waited_for(tmp_path: Path) -> None:
    board = Board(str(tmp_path), [trial(1, 0.4, state="unfinished"), Trial(2, {}, NDCG)], {"0001": 3, "0002": 3}, None)
    assert board.report("0001", {"error": "TrainingStopped: the loss is not finite"})
    kept = load(str(tmp_path), Trial(1, {}, NDCG))
    assert kept.state == "failed" and "not finite" in kept.message and not kept.succeeded
    board.fail("0002", "its process died")
    assert not ranked(list(board.trials.values())) and summary(list(board.trials.values())) == "2 failed"


def test_the_csv_has_a_row_for_every_trial_with_all_valid_metrics_at_its_best_epoch() -> None:
    refused = Trial(2, {"model.width": 9, "model.heads": [1, 2]}, NDCG, state="refused", message="model: width, heads")
    rows = list(csv.DictReader(io.StringIO(csv_text([trial(0, 0.1, 0.3, 0.2), trial(1, seed=4), refused]))))
    assert [r["trial"] for r in rows] == ["0000", "0001-seed4", "0002"]
    assert (rows[0]["value"], rows[0]["best_epoch"], rows[0]["epochs"], rows[0]["seconds"]) == ("0.3", "2", "3", "4.5")
    assert rows[0]["click/auc"] == "0.52" and rows[0]["model.width"] == "8"
    assert rows[2]["state"] == "refused" and rows[2]["message"] == "model: width, heads" and rows[2]["model.heads"] == "[1, 2]"


def test_the_table_shows_the_start_first_and_then_the_best() -> None:
    rows = table([trial(0, 0.2), trial(1, 0.1), trial(2, 0.3), trial(3, 0.25, state="failed")], best=1)
    assert [r[0] for r in rows] == ["trial", "start", "2"]
    assert lines(rows).splitlines()[1].split() == ["start", "0.2000", "0.5100", "1", "done"]
    assert rows[0] == ["trial", f"valid {NDCG}", "click/auc", "epochs", "state"]
    assert table([trial(0, 0.2)], values=True)[1][-1] == "8"
    assert changes(trial(0), trial(2)) == [["", "start", "best"], ["model.width", "8", "24"]]


def test_finalists_are_ranked_by_their_mean_and_only_when_all_seeds_are_done() -> None:
    lucky = Finalist(1, {}, (trial(1, 0.5, seed=1), trial(1, 0.1, seed=2)))
    steady = Finalist(2, {}, (trial(2, 0.4, seed=1), trial(2, 0.4, seed=2)))
    broken = Finalist(3, {}, (trial(3, 0.9, seed=1), trial(3, 0.9, seed=2, state="failed")))
    assert [f.number for f in ranked_finalists([lucky, broken, steady])] == [2, 1]
    assert lucky.mean == pytest.approx(0.3) and lucky.stdev == pytest.approx(0.2828, abs=1e-4)
    assert steady.metrics()[NDCG] == pytest.approx(0.4)
    assert [r[0] for r in finalist_table([lucky, broken, steady])] == ["finalist", "2", "1", "3"]
    errors = [Finalist(n, {}, (trial(n, v, monitor=RMSE, seed=1),)) for n, v in ((1, 1.1), (2, 0.9))]
    assert ranked_finalists(errors)[0].number == 2


def test_the_best_configuration_as_yaml_is_read_back_to_the_same_one(tmp_path: Path) -> None:
    config = tiny.make_config(tmp_path, lambda raw: raw["data"].update(context={"device": {"kind": "categorical"}}))
    values = {
        "train.learning_rate": 3e-05,
        "tasks.rating.weight": 0.01234,
        "balancing.kind": "uncertainty",
        "train.clip_norm": None,
    }
    best = with_values(config, values)
    path = tmp_path / "best.yaml"
    path.write_text(yaml_text(best, ["Found by jobs.tune.", "valid 0.1"]))
    assert path.read_text().startswith("# Found by jobs.tune.\n# valid 0.1\nname: tiny\n")
    assert load_config(path) == best != config


@pytest.mark.slow
def test_the_page_shows_every_trial_and_escapes_what_it_shows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from mtrec_ray.tuning.page import page

    trials = [
        trial(0, 0.1, 0.2),
        trial(1, 0.3, state="stopped"),
        Trial(2, {"model.width": 9}, NDCG, state="refused", message="<no>"),
    ]
    for t, kind in zip(trials, ("static", "uncertainty", "static"), strict=True):
        t.values = t.values | {"balancing.kind": kind, "train.learning_rate": 10.0 ** (-t.number - 1)}
    text = page("a <b> run", trials, [Finalist(1, {}, (trial(1, 0.4, seed=1),))])
    assert text.count("<svg") == 2 and "&lt;no&gt;" in text and "a &lt;b&gt; run" in text and "<b>" not in text
    assert "Finalists" in text and "log" not in page("x", trials[:1], [])
