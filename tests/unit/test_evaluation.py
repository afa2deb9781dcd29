"""Evaluation of a tiny run under every protocol, and what broken input gets. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.evaluation.baselines import RANKERS, fit_rankers
from mtrec_ray.evaluation.evaluate import MODEL, EvaluationError, evaluate_part, merge_reduced, user_blocks
from mtrec_ray.evaluation.measure import Model, Moments
from mtrec_ray.evaluation.metrics import BrokenScoresError
from mtrec_ray.evaluation.reduce import WHOLE, points_of, summarise
from mtrec_ray.evaluation.runner import Evaluation, evaluate, report_numbers
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.evaluation.task_baselines import ItemMeans, fit_task_baselines
from mtrec_ray.training.feed import WindowCache
from tests import tiny
from tests.conftest import TinyRun


def windows_of(data: storage.Directory, split: str) -> WindowCache:
    return WindowCache.from_table(storage.read_table(data.path("windows", split)))


def evaluate_locally(data: storage.Directory, predictor: Any, resamples: int = 40) -> Evaluation:
    """What `evaluate` does, without its actors."""
    train, valid, test = (windows_of(data, s) for s in ("train", "valid", "test"))
    table = storage.read_table(data.path("catalogue.parquet"), ["count", "recent_count"])
    catalogue = {c: table[c].to_numpy().astype(np.float64) for c in table.column_names}
    baselines, skipped = fit_rankers(RANKERS[:4], predictor, catalogue, train, valid)
    baselines |= fit_task_baselines(predictor, train, valid)
    systems = {MODEL: Model(predictor), **{n: f.system for n, f in baselines.items()}}
    resampler = Resampler(resamples)
    reduced = evaluate_part(systems, predictor, test, set(train.user_ids.to_pylist()), resampler, (0, 1), at_once=7)
    return report_numbers(predictor.config, data, predictor, reduced, baselines, skipped, resampler)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["time", "leave_one_out", "user_holdout", "item_holdout", "random"])
def test_every_protocol_trains_and_is_evaluated_beside_its_baselines(tmp_path: Path, protocol: str) -> None:
    tiny.write_log(tmp_path, users=40, items=40, seed=2)

    def change(raw: dict[str, Any]) -> None:
        raw["data"] |= {"protocol": protocol, "holdout": [0.2, 0.2]}
        raw["train"] |= {"epochs": 2}

    config = tiny.make_config(tmp_path, change)
    data = tiny.prepare_locally(config, tmp_path / "data")
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), tmp_path / "bundle")
    metrics = evaluate_locally(data, predictor).metrics
    assert metrics["protocol"] == protocol
    assert {"ndcg@10", "map", "coverage@10", "diversity@10"} <= set(metrics["model"]["retrieval"])
    assert {"rmse"} <= set(metrics["model"]["rating"]) and {"auc", "ece"} <= set(metrics["model"]["click"])
    assert {"itemknn", "ease", "item_mean", "gradient_boosting", "majority", "item_bag", "item_vectors"} <= set(
        metrics["baselines"]
    )
    moments = metrics["model"]["retrieval"]["moments"]
    slices = metrics["slices"]
    if protocol == "user_holdout":
        assert slices["cold_user"]["moments"] == moments
    elif protocol == "item_holdout":
        assert slices["cold_item"]["moments"] == moments  # nothing that is judged was trained
        held = windows_of(data, "test").columns["target_item"]
        assert held.min() >= predictor.schema.n_train_items
        assert len(predictor.model.item_tower.residual.table.weight) == predictor.schema.n_train_items < predictor.schema.n_items
    else:
        assert slices["cold_user"]["moments"] < moments


def test_a_model_of_nans_is_refused_before_it_looks_valid(tiny_run: TinyRun) -> None:
    predictor = bundle.load(tiny_run.bundle_root)
    test = windows_of(tiny_run.data, "test")
    with torch.no_grad():
        next(iter(predictor.model.trunk.parameters())).fill_(float("nan"))
    with pytest.raises(BrokenScoresError, match="retrieval scores contain NaN"):
        evaluate_part({MODEL: Model(predictor)}, predictor, test, set(), Resampler(), (0, 1))
    healthy = bundle.load(tiny_run.bundle_root)
    with torch.no_grad():
        healthy.model.sharing.layers[0].weight.fill_(float("nan"))
    with pytest.raises(BrokenScoresError, match="predictions of"):
        evaluate_part({MODEL: Model(healthy)}, healthy, test, set(), Resampler(), (0, 1))


def test_a_history_of_items_without_training_events_breaks_nothing(tiny_run: TinyRun) -> None:
    predictor, test = bundle.load(tiny_run.bundle_root), windows_of(tiny_run.data, "test")
    test.columns["history_item"] = np.full_like(test.columns["history_item"], predictor.schema.n_items - 1)  # "new"
    test.columns["seen_item"] = np.full_like(test.columns["seen_item"], predictor.schema.n_items - 1)
    reduced = evaluate_part({MODEL: Model(predictor)}, predictor, test, set(), Resampler(20), (0, 1))
    metrics = report_numbers(predictor.config, tiny_run.data, predictor, reduced, {}, {}, Resampler(20)).metrics
    json.dumps(metrics, allow_nan=False)
    assert metrics["model"]["retrieval"]["popularity_lift@10"] > 1  # any item is more popular than one without events


def test_a_split_without_test_targets_is_refused(tmp_path: Path) -> None:
    """leave_one_out on users with two positives each leaves nothing to test."""
    (tmp_path / "log").mkdir()
    rows = ["user,item,ts,click,rating,device"]
    rows += [f"u{u},i{i},{1_700_000_000_000 + i},1,{3 + i},web" for u in range(6) for i in range(2)]
    (tmp_path / "log" / "part.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "items.csv").write_text("item_id,name,genre\ni0,A,x\ni1,B,x\n")
    (tmp_path / "users.csv").write_text("user_id,taste,age\n" + "".join(f"u{u},{'ab'[u % 2]},3{u}\n" for u in range(6)))
    config = tiny.make_config(tmp_path, lambda raw: raw["data"].update(protocol="leave_one_out"))
    data = tiny.prepare_locally(config, tmp_path / "data")
    from mtrec_ray.training.worker import build_model, load_schema

    model = build_model(config, load_schema(data.prefix), None).eval()
    tiny.write_bundle(config, data, model, tmp_path / "bundle")
    with pytest.raises(EvaluationError, match="leave_one_out leaves no test targets"):
        evaluate(config, data, str(tmp_path / "bundle"))


def test_a_task_without_labels_in_the_test_is_named(tiny_run: TinyRun) -> None:
    predictor, test = bundle.load(tiny_run.bundle_root), windows_of(tiny_run.data, "test")
    test.columns["label_rating"] = np.full_like(test.columns["label_rating"], np.nan)
    reduced = evaluate_part({MODEL: Model(predictor)}, predictor, test, set(), Resampler(20), (0, 1))
    metrics = report_numbers(predictor.config, tiny_run.data, predictor, reduced, {}, {}, Resampler(20)).metrics
    assert metrics["model"]["rating"] == {} and metrics["intervals"]["rating"] == {}
    assert metrics["unmeasured"]["rating"] == "no target with the label in this split"


def test_users_at_once_change_no_metric(tiny_run: TinyRun) -> None:
    predictor, test = bundle.load(tiny_run.bundle_root), windows_of(tiny_run.data, "test")
    found = []
    for at_once in (1, 5, 1000):
        reduced = evaluate_part({MODEL: Model(predictor)}, predictor, test, set(), Resampler(10), (0, 1), at_once)
        found.append(points_of(summarise(merge_reduced([reduced])[MODEL][WHOLE], dict(predictor.config.tasks), Resampler(10))))
    for other in found[1:]:
        for task, values in found[0].items():
            assert other[task] == pytest.approx(values, rel=1e-6), task


def test_blocks_hold_whole_users(tiny_run: TinyRun) -> None:
    test = windows_of(tiny_run.data, "test")
    ids = np.array(test.user_ids.to_pylist())
    blocks = user_blocks(test.user_ids, 3)
    assert sorted(np.concatenate(blocks)) == list(range(len(test)))
    users = [set(ids[b]) for b in blocks]
    assert all(len(u) <= 3 for u in users) and sum(map(len, users)) == len(set(ids))


# --------------------------------------------------------------------------- baselines of the other tasks


def test_a_training_row_sees_earlier_labels_of_its_item_alone() -> None:
    item, label = np.array([0, 1, 0, 0, 1]), np.array([1.0, 5.0, 4.0, np.nan, 2.0])
    time, row = np.array([30, 10, 10, 40, 10]), np.arange(5)
    means = ItemMeans(item, label, 3)
    assert means.means().tolist() == [2.5, 3.5, 3]  # an item without labels has the overall mean
    # shrunk by one overall mean (3); item 0 in time: 4 at 10, 1 at 30, none at 40; item 1: 5, then 2 in the next row
    found = means.earlier(item, label, time, row)
    assert found[:, 0].tolist() == pytest.approx([(4 + 3) / 2, 3, 3, (4 + 1 + 3) / 3, (5 + 3) / 2])
    assert np.expm1(found[:, 1]).tolist() == pytest.approx([1, 0, 0, 2, 1])
    changed = label.copy()
    changed[0] = 5.0
    assert means.earlier(item, changed, time, row)[0].tolist() == found[0].tolist()  # its own label moves nothing of it
    assert means.features(np.array([0]))[0, 0] == (5 + 3) / 3


def test_boosting_sees_what_is_visible_at_each_target_alone(tiny_run: TinyRun) -> None:
    from mtrec_ray.evaluation.task_baselines import _user_features

    train, schema = windows_of(tiny_run.data, "train"), bundle.load(tiny_run.bundle_root).schema
    target, length = train.gather("target", np.arange(len(train)))
    start = np.repeat(train.offsets["history"][:-1], length)
    found = _user_features(train, schema, target, start)
    rating = next(i for i, a in enumerate(schema.actions) if a.name == "rating") + 1
    for row in range(0, len(target), 7):
        pos = train.columns["target_pos"][target[row]]
        shown = train.columns["history_action_rating"][start[row] : start[row] + pos]
        shown = shown[~np.isnan(shown)]
        assert found[row, 0] == pytest.approx(np.log1p(pos))
        assert found[row, rating] == pytest.approx(shown.mean(), rel=1e-5) if len(shown) else np.isnan(found[row, rating])


@pytest.mark.slow
def test_the_item_bag_learns_an_attribute_that_the_items_show(tiny_run: TinyRun) -> None:
    """Even users like even items: on them the bag is right where the majority cannot be."""
    predictor = bundle.load(tiny_run.bundle_root)
    train, valid, test = (windows_of(tiny_run.data, s) for s in ("train", "valid", "test"))
    fitted = fit_task_baselines(predictor, train, valid)
    moments = Moments.of(predictor.schema, test, np.arange(len(test)))
    taste = test.columns["profile_taste"]
    right = {n: (fitted[n].system.profiles(moments)["taste"].argmax(1) == taste).mean() for n in ("item_bag", "majority")}
    assert right["item_bag"] > 0.8 > right["majority"]
    assert fitted["item_bag"].tries == 5 and "taste_c" in fitted["item_bag"].chosen
