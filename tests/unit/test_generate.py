"""The generator: the same log however it is cut, known truth, exact counts, a configuration that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import impressions, world
from benchmarks.generate import click_probability, generate
from benchmarks.world import DAY_MS, DEVICES, START_MS, Parameters, World
from mtrec_ray.config import load_config
from tests import tiny

EVENTS = 40_000
REQUEST_ITEM = ["request_id", "item_id"]


def read_log(folder: Path) -> pa.Table:
    paths = sorted((folder / "log").rglob("*.parquet"))
    return pa.concat_tables(pq.read_table(p, partitioning=None) for p in paths).combine_chunks()


def make(folder: Path, files: int | None = None, split_days: bool = False, **parameters: Any) -> tuple[pa.Table, dict[str, Any]]:
    truth = generate(Parameters(**{"events": EVENTS, "users": 300, "days": 8, "seed": 5} | parameters), folder, files, split_days)
    return read_log(folder), truth


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impressions, "CHUNK", 1 << 13)  # so that small logs have several
    monkeypatch.setattr(world, "CHUNK", 1 << 13)


@pytest.fixture
def wide(tmp_path: Path) -> pa.Table:
    return make(tmp_path / "wide")[0]


@pytest.mark.slow
@pytest.mark.parametrize("parameters", [{}, {"dirty": 0.05}, {"long": True}, {"long": True, "dirty": 0.05}])
def test_the_same_rows_in_the_same_order_however_they_are_cut(tmp_path: Path, parameters: dict[str, Any]) -> None:
    whole, _ = make(tmp_path / "one", 1, **parameters)
    for name, files, split_days in (("seven", 7, False), ("days", 3, True)):
        table, _ = make(tmp_path / name, files, split_days, **parameters)
        assert table.equals(whole)
    assert len(list((tmp_path / "seven" / "log").glob("*.parquet"))) == 7
    days = sorted(p.name for p in (tmp_path / "days" / "log").iterdir())
    assert days[:8] == [f"day=2024-01-0{d}" for d in range(1, 9)]
    assert len(days) == 8 or parameters.get("long")  # late clicks and ratings


def test_another_seed_is_another_log(tmp_path: Path, wide: pa.Table) -> None:
    other, _ = make(tmp_path / "other", seed=6)
    assert not other["item_id"].equals(wide["item_id"])


def test_chunks_are_drawn_anew(wide: pa.Table) -> None:
    first, second = (wide["item_id"].slice(c * (1 << 13), 1000).to_pylist() for c in (0, 1))
    assert np.mean([a == b for a, b in zip(first, second, strict=True)]) < 0.1


def test_a_day_directory_holds_that_day(tmp_path: Path) -> None:
    make(tmp_path / "log", split_days=True)
    for number, folder in enumerate(sorted((tmp_path / "log" / "log").iterdir())):
        times = pq.read_table(folder, partitioning=None)["timestamp"].to_numpy()
        assert set((times - START_MS) // DAY_MS) == {number}


def test_a_log_is_exact_in_number_in_order_and_made_of_slates(wide: pa.Table) -> None:
    assert len(wide) == EVENTS
    frame = wide.to_pandas()
    assert frame["timestamp"].is_monotonic_increasing
    requests = frame.groupby("request_id", sort=False)
    assert (requests["timestamp"].nunique() == 1).all() and (requests["user_id"].nunique() == 1).all()
    assert (requests["item_id"].nunique() == requests.size()).all() and requests.size().between(1, 6).all()
    assert (frame["position"] == requests.cumcount() + 1).all()
    assert (frame["purchase"] <= frame["click"]).all()
    rated = frame["rating"].notna()
    assert frame.loc[rated, "click"].all() and set(frame["rating"].dropna()) == {1, 2, 3, 4, 5}
    assert 0 < frame["device"].isna().mean() < 0.03


def test_clicks_follow_the_true_probability_and_nothing_does_better(tmp_path: Path) -> None:
    table, _ = make(tmp_path / "log")
    p, click = click_probability(tmp_path / "log", table), table["click"].to_numpy()
    deciles = np.array_split(np.argsort(p), 10)
    for part in deciles:
        expected, error = p[part].mean(), np.sqrt((p[part] * (1 - p[part])).sum()) / len(part)
        assert abs(click[part].mean() - expected) < 4 * error
    bayes = roc_auc_score(click, p)
    assert 0.7 < bayes < 0.9
    position = -table["position"].to_numpy()
    frame = table.to_pandas()
    in_sample = frame.groupby("item_id")["click"].transform("mean") + frame.groupby("user_id")["click"].transform("mean")
    assert roc_auc_score(click, position) < bayes and roc_auc_score(click, in_sample) < bayes


def test_propensity_is_the_probability_that_a_slot_shows_the_item() -> None:
    made = World(Parameters(1000, items=200, users=50, seed=2))
    rng, s, n = np.random.default_rng(0), 0.4, 200_000
    user, stratum = np.full(n, 7), rng.integers(0, world.STRATA, n)
    item, propensity = made.draw_items(rng, s, user, stratum)
    counts = np.bincount(item, minlength=200)
    told = np.zeros(200)
    told[item] = propensity
    assert told.sum() == pytest.approx(1, abs=0.01)  # items that were never drawn are rare
    assert np.abs(counts / n - told).max() < 5 * np.sqrt(told.max() / n)
    assert (made.item_birth[item] <= s).all()


def test_popularity_has_a_long_tail_and_activity_varies(wide: pa.Table) -> None:
    frame = wide.to_pandas()
    items, users = frame["item_id"].value_counts(), frame["user_id"].value_counts()
    assert items.iloc[: len(items) // 10].sum() > 0.3 * EVENTS
    assert users.iloc[0] > 5 * users.median()


def test_interests_drift() -> None:
    made = World(Parameters(1000, users=500))
    alignment = np.einsum("ud,ud->u", made.start_UD, made.end_UD)
    assert 0.3 < (alignment < 0.9).mean() < 0.6


def test_titles_and_segments_tell_of_topics(tmp_path: Path) -> None:
    make(tmp_path / "log")
    truth = pq.read_table(tmp_path / "log" / "truth" / "items.parquet")["topic"].to_numpy()
    items = pq.read_table(tmp_path / "log" / "items.parquet").to_pydict()
    for topic, title, category in zip(truth, items["title"], items["category"], strict=True):
        assert category == world.TOPICS[topic] and set(title.split()[1:]) <= set(world.WORDS[topic])
    users = pq.read_table(tmp_path / "log" / "users.parquet").to_pydict()
    first = World(Parameters(EVENTS, users=300, days=8, seed=5)).likes_start_U3[:, 0]
    told = np.array([list(world.SEGMENTS).index(s) for s in users["segment"]])
    assert (told == first // 4).mean() > 0.75


def test_long_rows_joined_give_the_wide_log(tmp_path: Path, wide: pa.Table) -> None:
    table, truth = make(tmp_path / "long", long=True)
    long = table.to_pandas()
    assert len(long) == truth["rows"] and long["timestamp"].is_monotonic_increasing
    assert long["event_type"].value_counts().to_dict() == truth["counts"]
    joined = wide.to_pandas().set_index(REQUEST_ITEM)
    shown = long[long["event_type"] == "impression"].set_index(REQUEST_ITEM)
    assert shown["price"].equals(joined["price"]) and shown["value"].isna().all()
    for label in ("click", "purchase", "rating"):
        values = long[long["event_type"] == label].set_index(REQUEST_ITEM)
        expected = joined[label] if label == "rating" else joined[label].where(joined[label] > 0)
        assert values["value"].reindex(joined.index).astype(float).equals(expected.astype(float))
        assert (values["timestamp"] > joined["timestamp"].reindex(values.index)).all()
        assert values["price"].isna().all()


def test_bad_rows_are_extra_and_counted_exactly(tmp_path: Path, wide: pa.Table) -> None:
    table, truth = make(tmp_path / "dirty", dirty=0.05)
    dirty = truth["dirty"]
    assert len(table) == EVENTS + sum(dirty.values()) == truth["rows"] and min(dirty.values()) > 0
    times = table["timestamp"]
    found = {
        "user_id is missing": table["user_id"].null_count,
        "item_id is missing": table["item_id"].null_count,
        "timestamp is missing": times.null_count,
        "timestamp is negative": pc.sum(pc.less(times, 0)).as_py(),
        "timestamp is in microseconds": pc.sum(pc.greater(times, 10**15)).as_py(),
        "item_id is unknown": pc.sum(pc.equal(table["item_id"], "i-unknown")).as_py(),
        "click is 2": pc.sum(pc.equal(table["click"], 2)).as_py(),
        "rating is 9": pc.sum(pc.equal(table["rating"], 9)).as_py(),
    }
    assert found | {"duplicate": dirty["duplicate"]} == dirty
    frame = table.to_pandas()
    assert frame.duplicated().sum() == dirty["duplicate"]
    good = frame.drop_duplicates().dropna(subset=["user_id", "item_id", "timestamp"])
    good = good[(good["timestamp"] >= 0) & (good["timestamp"] < 10**15) & (good["item_id"] != "i-unknown")]
    good = good[(good["click"] != 2) & (good["rating"] != 9)]
    assert good["propensity"].tolist() == wide["propensity"].to_pylist()


def test_mtrec_ray_prepares_the_log_with_its_run_yaml_and_quarantines_exactly_the_bad_rows(tmp_path: Path) -> None:
    _, truth = make(tmp_path / "log", events=10_000, dirty=0.03)
    config = load_config(tmp_path / "log" / "run.yaml")
    rows = tiny.prepare_locally(config, tmp_path / "data").manifest["rows"]
    assert rows["events"] == 10_000
    assert rows["quarantined"] == sum(truth["dirty"].values())
    assert rows["reasons"]["duplicate event"] == truth["dirty"]["duplicate"]


def test_a_finished_log_is_kept_and_anything_else_is_refused(tmp_path: Path) -> None:
    _, truth = make(tmp_path / "log")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "log").rglob("*")}
    assert make(tmp_path / "log")[1] == truth
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "log").rglob("*")}
    with pytest.raises(ValueError, match="something else"):
        make(tmp_path / "log", seed=9)
    (tmp_path / "log" / "truth.json").unlink()
    with pytest.raises(ValueError, match="a part of it"):
        make(tmp_path / "log")


@pytest.mark.parametrize(
    ("parameters", "message"), [({"events": 0}, "at least 1"), ({"items": 10}, "too few"), ({"dirty": 2.0}, "between 0 and 1")]
)
def test_impossible_parameters_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parameters(**{"events": 100} | parameters)


def test_a_tiny_log_works_and_truth_says_what_it_is(tmp_path: Path) -> None:
    table, truth = make(tmp_path / "log", events=7)
    assert len(table) == 7 and json.loads((tmp_path / "log" / "truth.json").read_text()) == truth
    assert set(pc.unique(table["device"]).to_pylist()) <= {*DEVICES, None}
