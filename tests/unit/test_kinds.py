"""Every kind of task on the tiny log: trained, judged beside its baselines, bundled and answered. No Ray."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtrec_ray import bundle, item_features, storage
from mtrec_ray.config import ConfigError, RunConfig, parse_config
from mtrec_ray.data.lineage import DataError
from mtrec_ray.evaluation.evaluate import MODEL, evaluate_items, evaluate_part, merge_reduced
from mtrec_ray.evaluation.measure import Model, Moments
from mtrec_ray.evaluation.runner import report_numbers
from mtrec_ray.evaluation.statistics import Resampler
from mtrec_ray.evaluation.task_baselines import fit_task_baselines
from mtrec_ray.histories import History
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LabelStats
from mtrec_ray.scoring.tables import Ask, Tally, user_tables
from mtrec_ray.serving.history import histories_from_table
from mtrec_ray.tasks.interest import Interest
from mtrec_ray.tasks.item_attribute import ItemAttribute
from mtrec_ray.tasks.multiclass import Multiclass
from mtrec_ray.tasks.multilabel import Multilabel
from mtrec_ray.tasks.regression import Regression, two_hot
from mtrec_ray.training.feed import WindowCache, collate
from mtrec_ray.training.worker import build_model, load_schema, tell_items
from tests import tiny
from tests.unit import test_append


def every_kind(raw: dict[str, Any]) -> None:
    """Item features beside a text that does not tell them, and a task of every kind."""
    raw["data"]["text"] = {"template": "{name}", "title": "name"}
    raw["data"]["labels"]["rating"]["values"] = [1, 2, 3, 4, 5]
    raw["data"]["labels"]["top"] = {"expression": "rating >= 5", "kind": "binary"}
    raw["data"]["item_features"] = {"genre": {"kind": "categorical"}, "tags": {"kind": "multihot", "separator": "|"}}
    raw["tasks"] |= {
        "robust": {"kind": "regression", "label": "rating", "loss": "huber", "delta": 0.5},
        "binned": {"kind": "regression", "label": "rating", "bins": [1, 2, 3, 4, 5]},
        "stars": {"kind": "multiclass", "label": "rating"},
        "both": {"kind": "multilabel", "labels": ["click", "like"]},
        "likes": {"kind": "profile", "interest": "genre"},
        "tags": {"kind": "profile", "interest": "tags"},
        "genre": {"kind": "item_attribute", "column": "genre"},
        "tagged": {"kind": "item_attribute", "column": "tags"},
    }
    raw["train"] |= {"epochs": 6}


def write_items(folder: Path, items: int) -> None:
    rows = ["item_id,name,genre,tags"]
    for i in range(items):
        tags = "" if i == 3 else "|".join(["even" if i % 2 == 0 else "odd", *(["third"] if i % 3 == 0 else [])])
        rows.append(f"i{i},Thing {i},{'even' if i % 2 == 0 else 'odd'},{tags}")
    (folder / "items.csv").write_text("\n".join([*rows, "new,Thing new,even,even | strange"]) + "\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[storage.Directory, Predictor]:
    folder = tmp_path_factory.mktemp("kinds")
    tiny.write_log(folder, users=40, items=40)
    write_items(folder, 40)
    config = tiny.make_config(folder, every_kind)
    data = tiny.prepare_locally(config, folder / "data")
    return data, tiny.write_bundle(config, data, tiny.train_locally(config, data), folder / "bundle")


def windows_of(data: storage.Directory, split: str) -> WindowCache:
    return WindowCache.from_table(storage.read_table(data.path("windows", split)))


Metrics = dict[str, Any]


@pytest.fixture(scope="module")
def metrics(run: tuple[storage.Directory, Predictor]) -> Metrics:
    data, predictor = run
    train, valid, test = (windows_of(data, s) for s in ("train", "valid", "test"))
    baselines = fit_task_baselines(predictor, train, valid)
    systems = {MODEL: Model(predictor), **{n: f.system for n, f in baselines.items()}}
    resampler, folds = Resampler(40), predictor.config.evaluation.profile_folds_test
    reduced = evaluate_part(systems, predictor, test, set(train.user_ids.to_pylist()), resampler, folds, at_once=7)
    reduced = merge_reduced([reduced, evaluate_items(systems, predictor, resampler, folds)])
    found = report_numbers(predictor.config, data, predictor, reduced, baselines, {}, resampler).metrics
    json.dumps(found, allow_nan=False)
    return found


def test_every_kind_is_judged_beside_a_baseline(metrics: Metrics) -> None:
    model, baselines = metrics["model"], metrics["baselines"]
    assert not metrics["unmeasured"]
    expected = {
        "robust": {"rmse", "mae"}, "binned": {"rmse", "mae"}, "stars": {"accuracy", "macro_f1", "logloss"},
        "both": {"macro_auc", "micro_auc", "auc:click", "auc:like", "logloss"}, "likes": {"hit@1", "logloss", "kl"},
        "tags": {"hit@1", "logloss", "kl"}, "genre": {"accuracy", "macro_f1"}, "tagged": {"micro_auc", "macro_auc"},
    }  # fmt: skip
    assert {task: set(model[task]) - {"n"} for task in expected} == expected
    for name in ("item_mean", "user_mean", "gradient_boosting"):
        assert {"robust", "binned", "stars", "both"} <= set(baselines[name])
    assert {"likes", "tags"} == set(baselines["history_shares"])
    assert {"taste", "age_group", "likes", "tags", "genre", "tagged"} == set(baselines["majority"])
    assert baselines["majority"]["tagged"]["macro_auc"] == 0.5
    assert metrics["tuning"]["history_shares"]["tries"] == 4


def test_the_model_learns_what_the_log_holds(metrics: Metrics) -> None:
    """Even users choose even items and rate them high."""
    model, baselines = metrics["model"], metrics["baselines"]
    assert model["stars"]["logloss"] < np.log(5) and model["genre"]["accuracy"] > baselines["majority"]["genre"]["accuracy"]
    assert model["likes"]["logloss"] < baselines["majority"]["likes"]["logloss"] and model["likes"]["hit@1"] > 0.6
    assert model["taste"]["accuracy"] > baselines["majority"]["taste"]["accuracy"]


def test_one_number_per_task_and_item_leaves_the_system(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    store = storage.read_table(data.path("store"))
    table = pa.concat_tables(user_tables(predictor, [store], Ask("lists", 3, 8), Tally()))
    pointwise = {"click", "rating", "robust", "binned", "stars", "both"}
    assert set(table.column_names) == {"user_id", "item_id", "rank", "score", "retrieval", *pointwise}
    answer = predictor.recommend([History(["i1", "i2"], [1, 2])], 3)[0]
    assert set(answer["items"][0]["tasks"]) == {"retrieval", *pointwise}
    state_BD = predictor.encode_state(predictor.encode_histories([History(["i1"], [1])]).batch)
    items = torch.arange(5)[None]
    context = predictor.encode_context([{}])
    numbers, full = predictor.score(state_BD, items, context), predictor.distributions(state_BD, items, context)
    assert set(full) == {"stars", "both"}
    torch.testing.assert_close(full["stars"].sum(-1), torch.ones(1, 5))
    torch.testing.assert_close(numbers["stars"], full["stars"] @ torch.arange(1.0, 6.0))
    torch.testing.assert_close(numbers["both"], full["both"].mean(-1))
    assert numbers["binned"].min() >= 1 and numbers["binned"].max() <= 5


def test_profiles_tell_interests_and_the_whole_history_counts(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    store = storage.read_table(data.path("store"))
    history = histories_from_table(store)[0]
    profile = predictor.profile(history)["profile"]
    assert set(profile) == {"taste", "age_group", "genre", "tags"} and set(profile["genre"]) == {"even", "odd"}
    assert all(sum(values.values()) == pytest.approx(1, abs=1e-5) for values in profile.values())
    without = History(history.item_ids, history.times, history.actions, history.context)
    longer = History(
        history.item_ids, history.times, history.actions, history.context, [f"i{i}" for i in range(0, 40, 2)], [0] * 20
    )
    told = [predictor.profile(h)["profile"]["genre"]["even"] for h in (without, longer)]
    assert told[1] > told[0]  # events before the window are even items


def test_evaluation_and_requests_tell_the_same_profile(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    test = windows_of(data, "test")
    moments = Moments.of(predictor.schema, test, np.arange(len(test)))
    answers = Model(predictor).profiles(moments)
    row = int(np.argmax([len(v) for v in moments.encoded.visible]))
    h, _ = test.gather("history", np.array([row]))
    seen, _ = test.gather("seen", np.array([row]))
    ids, devices = predictor.item_ids, predictor.schema.context[0].values  # type: ignore[union-attr]
    history = History(
        [ids[i] for i in test.columns["history_item"][h]],
        test.columns["history_time"][h].tolist(),
        {a.name: test.columns[f"history_action_{a.name}"][h].tolist() for a in predictor.schema.actions},
        {"device": [devices[c - 2] if c >= 2 else None for c in test.columns["history_context_device"][h]]},
        [ids[i] for i in test.columns["seen_item"][seen]],
        [0] * len(seen),
    )  # fmt: skip
    told = predictor.profile(history)["profile"]
    for task, key in (("taste", "taste"), ("likes", "genre"), ("tags", "tags")):
        assert list(told[key].values()) == pytest.approx(answers[task][row].tolist(), abs=1e-5), task


def test_an_item_attribute_is_told_by_id(run: tuple[storage.Directory, Predictor]) -> None:
    _, predictor = run
    told = predictor.item_attributes("i4")
    assert set(told) == {"genre", "tags"} and sum(told["genre"].values()) == pytest.approx(1, abs=1e-5)
    assert set(told["tags"]) == {"even", "odd", "third"}  # "strange" is on no trained item


def test_held_out_items_train_no_item_attribute(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    task = predictor.model.item_tasks["tagged"]
    assert isinstance(task, ItemAttribute)
    fold = item_features.item_fold(catalogue["item_id"].combine_chunks())
    trained = task.trained_K.numpy()
    assert len(trained) and not np.isin(fold[trained], (0, 1, 2)).any()
    untagged = predictor.position["i3"]
    assert untagged not in trained and trained.max() < predictor.schema.n_train_items


def test_the_catalogue_holds_numbers_and_the_bundle_needs_nothing_else(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    row = predictor.position["i0"]
    spec = item_features.spec_of(predictor.schema, "tags")
    assert [spec.values[c - 2] for c in catalogue["feature_tags"][row].as_py()] == ["even", "third"]
    again = bundle.load(str(Path(data.root).parent / "bundle"))
    history = History(["i1", "i2"], [1, 2])
    assert again.profile(history) == predictor.profile(history)


# --------------------------------------------------------------------------- interest, by hand


def test_an_interest_is_trained_on_later_positives_alone(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    train = windows_of(data, "train")
    task = predictor.model.profiles["likes"]
    assert isinstance(task, Interest)
    batch = collate(train, np.arange(6), predictor.schema)
    place, target, weight = task._trained(batch)
    L = batch.history.item_BS.shape[1] + 1
    share = task.share_NC
    found = dict(zip(place.tolist(), target.tolist(), strict=True))
    expected: dict[int, list[float]] = {}
    t = batch.targets
    for window in range(6):
        for pos in {int(p) for p, w, ok in zip(t.pos_M, t.window_M, t.positive_M, strict=True) if int(w) == window and ok}:
            later = [share[i] for i, p, w, ok in zip(t.item_M, t.pos_M, t.window_M, t.positive_M, strict=True)
                     if int(w) == window and ok and int(p) >= pos]  # fmt: skip
            expected[window * L + pos] = (torch.stack(later).sum(0) / len(later)).tolist()
    assert set(found) == set(expected)
    for where, values in expected.items():
        assert found[where] == pytest.approx(values, abs=1e-6)
    per_window = torch.zeros(6).index_add(0, place // L, weight)
    present = per_window > 0
    torch.testing.assert_close(per_window[present], batch.profile_weight_B[present])


def pointwise_batch(labels: dict[str, list[float]]) -> Any:
    """Targets with these labels; the losses of pointwise tasks read nothing else of a batch."""
    return SimpleNamespace(targets=SimpleNamespace(labels_M={n: torch.tensor(v) for n, v in labels.items()}))


def shared_of(*rows: list[float]) -> Any:
    return SimpleNamespace(shared={"t": torch.tensor(rows)})


def identity(task: Any) -> Any:
    """The task with a head that hands on what it reads."""
    with torch.no_grad():
        task.head.weight.copy_(torch.eye(*task.head.weight.shape))
        task.head.bias.zero_()
    return task


NAN = float("nan")
STATS = LabelStats(count=4, mean=3.0, std=2.0, values=(1.0, 2.0, 5.0))


def test_huber_counts_large_errors_linearly() -> None:
    task = identity(Regression("t", "y", STATS, 1, delta=0.5))
    # errors in standard deviations: 0.25 (squared, halved) and 2 - (-1) = 3 (0.5 · (3 - 0.25))
    found = task.loss_sum(shared_of([0.25], [2.0], [9.0]), pointwise_batch({"y": [3.0, 1.0, NAN]}))
    assert float(found) == pytest.approx(0.5 * 0.25**2 + 0.5 * (3 - 0.25))


def test_bins_are_trained_by_cross_entropy_and_predict_their_mean() -> None:
    task = identity(Regression("t", "y", STATS, 3, bins=(1.0, 2.0, 5.0)))
    logits = [0.0, 1.0, 2.0]
    p = np.exp(logits) / np.exp(logits).sum()
    found = task.loss_sum(shared_of(logits, logits), pointwise_batch({"y": [2.0, 4.25]}))
    assert float(found) == pytest.approx(-np.log(p[1]) - 0.25 * np.log(p[1]) - 0.75 * np.log(p[2]), rel=1e-5)
    assert float(task.predict(torch.tensor(logits))) == pytest.approx(p @ [1, 2, 5], rel=1e-5)


def test_multiclass_is_a_softmax_over_the_values_and_a_missing_label_is_masked() -> None:
    task = identity(Multiclass("t", "y", STATS, 3))
    logits = [0.0, 1.0, 2.0]
    p = np.exp(logits) / np.exp(logits).sum()
    batch = pointwise_batch({"y": [5.0, NAN, 1.0]})
    assert int(task.count(batch)) == 2
    assert float(task.loss_sum(shared_of(logits, logits, logits), batch)) == pytest.approx(-np.log(p[2]) - np.log(p[0]), rel=1e-5)
    assert float(task.predict(torch.tensor(logits))) == pytest.approx(p @ [1, 2, 5], rel=1e-5)


def test_multilabel_counts_every_pair_that_has_its_label() -> None:
    task = identity(Multilabel("t", ("a", "b"), 2))
    batch = pointwise_batch({"a": [1.0, NAN], "b": [0.0, 1.0]})
    assert int(task.count(batch)) == 3
    expected = np.log1p(np.exp(-0.5)) + np.log1p(np.exp(2.0)) + np.log1p(np.exp(-1.0))
    assert float(task.loss_sum(shared_of([0.5, 2.0], [7.0, 1.0]), batch)) == pytest.approx(expected, rel=1e-5)


def test_two_hot_shares_have_the_label_as_their_mean() -> None:
    bins = torch.tensor([1.0, 2.0, 5.0])
    found = two_hot(torch.tensor([1.0, 2.0, 2.75, 5.0, 9.0, -1.0]), bins)
    expected = [[1, 0, 0], [0, 1, 0], [0, 0.75, 0.25], [0, 0, 1], [0, 0, 1], [1, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


def test_a_model_without_the_items_categories_says_so(run: tuple[storage.Directory, Predictor]) -> None:
    data, predictor = run
    model = build_model(predictor.config, load_schema(data.prefix), None)
    with pytest.raises(RuntimeError, match=r"tasks\.likes: the model was not given the items' genre"):
        model.counts(collate(windows_of(data, "train"), np.arange(2), predictor.schema))


# --------------------------------------------------------------------------- refused


def refusal(folder: Path, change: Any) -> str:
    raw = tiny.raw_config(folder)
    every_kind(raw)
    change(raw)
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("stars", {"kind": "multiclass", "label": "click"}, "tasks.stars.label: 'click' has no classes; list them"),
        ("stars", {"kind": "multiclass", "label": "nope"}, "tasks.stars.label: 'nope' is not among data.labels"),
        ("both", {"kind": "multilabel", "labels": ["click"]}, "tasks.both.labels: at least two"),
        ("both", {"kind": "multilabel", "labels": ["click", "click"]}, "tasks.both.labels: at least two different"),
        ("both", {"kind": "multilabel", "labels": ["click", "nope"]}, "tasks.both.labels: 'nope' is not among"),
        ("both", {"kind": "multilabel", "labels": ["click", "rating"]}, "tasks.both.labels: 'rating' is numeric"),
        ("robust", {"kind": "regression", "label": "rating", "delta": 2}, "tasks.robust.delta: it belongs to loss: huber"),
        ("robust", {"kind": "regression", "label": "rating", "loss": "cubic"}, "tasks.robust.loss: "),
        ("binned", {"kind": "regression", "label": "rating", "bins": [3, 2]}, "tasks.binned.bins: at least two increasing"),
        ("binned", {"kind": "regression", "label": "rating", "bins": [2, 5]}, "tasks.binned.bins: [1.0] are values of 'rating'"),
        ("binned", {"kind": "regression", "label": "rating", "bins": [1, 5], "loss": "huber"}, "tasks.binned.loss: with bins"),
        ("likes", {"kind": "profile"}, "tasks.likes: name either attribute (of the user) or interest"),
        ("likes", {"kind": "profile", "interest": "colour"}, "tasks.likes.interest: 'colour' is not among data.item_features"),
        ("again", {"kind": "profile", "interest": "genre"}, "tasks.likes: tasks ['likes', 'again'] tell the same"),
        ("genre", {"kind": "item_attribute", "column": "colour"}, "tasks.genre.column: 'colour' is not among data.item_features"),
    ],
)  # fmt: skip
def test_what_a_kind_cannot_do_is_refused_with_its_key(tmp_path: Path, task: str, fields: dict[str, Any], message: str) -> None:
    assert message in refusal(tmp_path, lambda raw: raw["tasks"].update({task: fields}))


def test_an_item_attribute_that_the_text_tells_is_refused_and_an_interest_is_not(tmp_path: Path) -> None:
    def tell(raw: dict[str, Any]) -> None:
        raw["data"]["text"]["template"] = "{name} {genre}"

    message = refusal(tmp_path, tell)
    assert "tasks.genre.column: 'genre' stands in data.text.template as {genre}" in message and "take it out" in message

    def under_another_name(raw: dict[str, Any]) -> None:
        raw["data"]["items"]["columns"] = {"words": "genre"}
        raw["data"]["text"]["template"] = "{name} {words}"

    assert "stands in data.text.template as {words}" in refusal(tmp_path, under_another_name)
    raw = tiny.raw_config(tmp_path)
    every_kind(raw)
    tell(raw)
    del raw["tasks"]["genre"]
    assert isinstance(parse_config(raw), RunConfig)


def test_an_attribute_may_not_choose_the_history(tmp_path: Path) -> None:
    """Which events are history would tell the model what it is to guess."""

    def leak(raw: dict[str, Any]) -> None:
        raw["data"]["labels"]["age"] = {"min": 0}
        raw["data"]["history"] = "age > 20 and click > 0"

    assert "'age' is a profile attribute and may not be an input feature" in refusal(tmp_path, leak)


def test_an_item_feature_named_like_an_attribute_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, lambda raw: raw["data"]["item_features"].update(taste={"kind": "categorical"}))
    assert "data.item_features.taste: an attribute of users has this name" in message


def test_an_item_feature_without_two_values_is_refused_at_prepare(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    rows = ["item_id,name,genre,tags", *[f"i{i},Thing {i},same,a|b" for i in range(20)]]
    (tmp_path / "items.csv").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"data\.item_features\.genre: .* have 1 value"):
        tiny.prepare_locally(tiny.make_config(tmp_path, every_kind), tmp_path / "data")


def test_a_label_that_no_training_event_has_is_refused_with_the_tasks_that_read_it(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    write_items(tmp_path, 20)
    for part in (tmp_path / "log").glob("*.csv"):
        header, *rows = part.read_text().splitlines()
        empty = [",".join([*(c := r.split(","))[:4], "", c[5]]) for r in rows]
        part.write_text("\n".join([header, *empty]) + "\n")
    config = tiny.make_config(tmp_path, every_kind)
    with pytest.raises(DataError, match=r"tasks\.rating, tasks\.robust, tasks\.binned, tasks\.stars: no training event has the"):
        tiny.prepare_locally(config, tmp_path / "data")

    def only_click(raw: dict[str, Any]) -> None:
        every_kind(raw)
        raw["tasks"] = {n: t for n, t in raw["tasks"].items() if t.get("label") != "rating" and n != "both"}

    tiny.prepare_locally(tiny.make_config(tmp_path, only_click), tmp_path / "data")
    with pytest.raises(DataError, match="no training event has the label 'rating'"):  # the data are there, for other tasks
        tiny.prepare_locally(config, tmp_path / "data")


@pytest.mark.slow
def test_days_appended_have_the_item_features_of_preparing_everything_at_once(tmp_path: Path) -> None:
    files = test_append.write_days(tmp_path, 3)
    write_items(tmp_path, 20)
    config = tiny.make_config(tmp_path, lambda raw: (every_kind(raw), raw["data"].update(max_bad_share=0.5))[0])
    at_once = tiny.prepare_locally(config, tmp_path / "once")
    last = files[2].read_bytes()
    files[2].unlink()
    tiny.prepare_locally(config, tmp_path / "grown")
    files[2].write_bytes(last)
    grown = test_append.append(config, tmp_path / "grown")

    def told(data: storage.Directory) -> list[dict[str, Any]]:
        columns = ["item_id", "feature_genre", "feature_tags"]
        return sorted(storage.read_table(data.path("catalogue.parquet"), columns).to_pylist(), key=lambda row: row["item_id"])

    assert grown.manifest["generation"] == 1 and told(grown) == told(at_once)
    assert load_schema(grown.prefix).item_features == load_schema(at_once.prefix).item_features
    assert told(grown)[-1] == {"item_id": "new", "feature_genre": 2, "feature_tags": [1, 2]}  # "strange" is no training item's


# --------------------------------------------------------------------------- on several ranks


def losses_of(predictor: Predictor, cache: WindowCache, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (loss sums, counts) of every task on some windows, without dropout."""
    batch = collate(cache, index, predictor.schema, masked_folds=(0, 1, 2))
    sums, _ = predictor.model(batch)
    return torch.stack(list(sums)), predictor.model.counts(batch)


def test_parts_of_a_batch_add_up_to_the_whole(run: tuple[storage.Directory, Predictor]) -> None:
    """What ranks sum is what one worker would have: the mean loss does not depend on who had which window."""
    data, predictor = run
    train = windows_of(data, "train")
    whole, count = losses_of(predictor, train, np.arange(12))
    parts = [losses_of(predictor, train, index) for index in (np.arange(5), np.arange(5, 12))]
    total = sum(p[1] for p in parts)
    present = count > 0
    mean = sum(p[0] for p in parts)[present] / total[present]  # type: ignore[index]
    torch.testing.assert_close(mean, whole[present] / count[present], rtol=1e-5, atol=1e-6)
    assert int(present.sum()) >= 12  # without pairs there is no similarity


def test_a_batch_without_labels_gives_every_kind_a_zero_with_gradients(run: tuple[storage.Directory, Predictor]) -> None:
    """A rank without labels takes part in every collective; item attributes are on every rank."""
    data, predictor = run
    train = windows_of(data, "train")
    model = build_model(predictor.config, predictor.schema, None)
    model.read_catalogue(storage.read_table(data.path("catalogue.parquet")))
    batch = collate(train, np.zeros(0, np.int64), predictor.schema)
    losses, _ = model(batch)
    for task, loss in zip(model.task_list, losses, strict=True):
        if task.name not in ("genre", "tagged"):
            assert float(loss) == 0 == float(task.count(batch)), task.name
        model.zero_grad()
        loss.backward(retain_graph=True)
        missing = [n for n, p in task.named_parameters() if p.grad is None]
        assert not missing, (task.name, missing)


COMBINATIONS = [
    ("sasrec", "shared_bottom", None), ("sasrec", "mmoe", 5), ("ligr", "cgc", None), ("ligr", "ple", 5), ("hstu", "pepnet", None),
    ("hstu", "ple", 5), ("hstu", "mmoe", None),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(("trunk", "sharing", "negatives"), COMBINATIONS)
def test_every_weight_gets_a_gradient_even_on_a_rank_without_windows(
    run: tuple[storage.Directory, Predictor], trunk: str, sharing: str, negatives: int | None, empty: bool
) -> None:
    """DDP waits for the gradients of all weights that are trained: a rank with an empty batch must have them too."""
    data, predictor = run
    raw = predictor.config.model_dump(mode="json")
    raw["model"] |= {"trunk": trunk, "sharing": sharing}
    if negatives is not None:
        raw["tasks"]["retrieval"] |= {"loss": "sampled_softmax", "negatives": negatives}
        raw["tasks"]["similar"] |= {"negatives": negatives}
    config, schema = parse_config(raw, "test"), predictor.schema
    model = build_model(config, schema, torch.nn.functional.normalize(torch.randn(schema.n_items, 6), dim=-1)).train()
    tell_items(model, storage.read_table(data.path("catalogue.parquet")))
    cache = WindowCache.from_table(storage.read_table(data.path("windows", "train")))
    batch = collate(cache, np.arange(0 if empty else 12), schema)
    losses, _ = model(batch)
    torch.stack(losses).sum().backward()
    assert all(bool(torch.isfinite(loss)) for loss in losses)
    left_out = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not left_out
    if empty:
        told_of_items = ("genre", "tagged", "item_tower")  # the same items on every rank, whatever its windows
        moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert all(n.startswith("item_tower") or n.split(".")[1] in told_of_items for n in moved), moved
