"""A run with every kind of feature: what is stored, what is trained, and that all callers read it the same way."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import ConfigError
from mtrec_ray.data.lineage import DataError
from mtrec_ray.evaluation.measure import Model, Moments
from mtrec_ray.features import CategoricalSpec, MultihotSpec, NumericalSpec
from mtrec_ray.histories import History
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.scoring.tables import Ask, Tally, user_tables
from mtrec_ray.serving import api
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.training.feed import WindowCache, collate
from mtrec_ray.training.worker import build_model, load_schema
from tests import tiny
from tests.conftest import TinyRun

SCORED = ("click", "rating")


def change_of(folder: Path) -> Any:
    def change(raw: dict[str, Any]) -> None:
        tiny.with_features(folder)(raw)
        raw["data"]["protocol"] = "leave_one_out"  # the store is what the test moments see

    return change


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("features")
    tiny.write_log(folder)
    tiny.write_features(folder)
    config = tiny.make_config(folder, change_of(folder))
    data = tiny.prepare_locally(config, folder / "data")
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data), folder / "bundle")
    return TinyRun(folder, config, data, predictor)


@pytest.fixture(scope="module")
def train(run: TinyRun) -> WindowCache:
    return WindowCache.from_table(storage.read_table(run.data.path("windows", "train")))


def raw_events(run: TinyRun) -> dict[tuple[str, str, int], dict[str, Any]]:
    rows = pq.read_table(run.folder / "features").to_pylist()
    return {(r["user"], r["item"], r["ts"]): r for r in rows}


def test_the_schema_holds_what_was_fitted_on_training_events(run: TinyRun) -> None:
    spec = {s.name: s for s in run.predictor.schema.context}
    assert list(spec) == ["device", "price", "price_band", "tags", "position", "propensity"]
    assert isinstance(spec["position"], CategoricalSpec) and spec["position"].values == ("1", "2", "3", "4")
    assert isinstance(spec["tags"], MultihotSpec) and len(spec["tags"].values) == 6
    assert {"even", "odd", "t0", "t1", "t2"} < set(spec["tags"].values) and spec["tags"].outside > 0
    assert isinstance(spec["price_band"], NumericalSpec) and len(spec["price_band"].edges) == 3
    train = storage.read_table(run.data.path("windows", "train"))
    assert isinstance(spec["price"], NumericalSpec)
    total = sum(len(t) for t in train["target_item"].to_pylist())
    assert 0.8 * total < spec["price"].fitted_on < total  # every seventh price is missing
    price = np.concatenate(train["target_context_price"].to_numpy())
    assert abs(np.nanmean(price)) < 1e-5 and np.nanstd(price) == pytest.approx(1, abs=1e-5) and np.isnan(price).any()


def test_windows_hold_the_columns_that_their_use_asks_for(run: TinyRun) -> None:
    columns = storage.read_table(run.data.path("windows", "valid")).column_names
    assert [c for c in columns if c.startswith("history_context_")] == [f"history_context_{n}" for n in ("device", "price", "tags")]
    asked = ("device", "price", "price_band", "tags", "position")
    assert [c for c in columns if c.startswith("target_context_")] == [f"target_context_{n}" for n in asked]
    assert [c for c in columns if c.startswith("target_kept_")] == ["target_kept_propensity"]
    stored = storage.read_table(run.data.path("store")).column_names
    assert [c for c in stored if c.startswith("history_context_")] == [f"history_context_{n}" for n in ("device", "price", "tags")]


def test_every_target_has_the_features_of_its_own_event(run: TinyRun) -> None:
    raw, spec = raw_events(run), {s.name: s for s in run.predictor.schema.request_features}
    checked = 0
    for name in ("train", "test"):
        for row in storage.read_table(run.data.path("windows", name)).to_pylist():
            for j, item in enumerate(row["target_item"]):
                event = raw[row["user_id"], run.predictor.item_ids[item], row["target_time"][j]]
                assert row["target_kept_propensity"][j] == event["propensity"]
                assert row["target_context_position"][j] == spec["position"].encode([event["position"]])[0]
                assert row["target_context_tags"][j] == spec["tags"].encode([event["tags"]]).to_pylist()[0]
                price = spec["price"].encode([event["price"]])
                np.testing.assert_array_equal(np.float32(row["target_context_price"][j]), price[0])
                checked += 1
    assert checked > 100


def test_a_cache_on_disk_gives_the_batches_of_the_table(run: TinyRun, train: WindowCache, tmp_path: Path) -> None:
    mapped = WindowCache.open(WindowCache.build(run.data.path("windows", "train"), tmp_path / "cache"))
    for index in (np.arange(len(train)), np.array([5, 2, 11])):
        one, two = (collate(c, index, run.predictor.schema) for c in (train, mapped))
        for left, right in ((one.history.context_BS, two.history.context_BS), (one.targets.context_M, two.targets.context_M)):
            assert left.keys() == right.keys()
            for name, values in left.items():
                assert torch.equal(values.nan_to_num(99), right[name].nan_to_num(99)), name
        assert one.history.context_BS["tags"].dim() == 3 and one.targets.context_M["tags"].dim() == 2


def same_batch(left: Any, right: Any) -> None:
    assert torch.equal(left.item_BS, right.item_BS) and torch.equal(left.gap_BS, right.gap_BS)
    assert torch.equal(left.session_BS, right.session_BS)
    for name, values in left.context_BS.items():
        assert torch.equal(values.nan_to_num(99), right.context_BS[name].nan_to_num(99)), name


def test_prepare_the_store_and_json_give_one_history(run: TinyRun) -> None:
    predictor, store = run.predictor, PreparedHistories(str(run.folder / "data"))
    test = WindowCache.from_table(storage.read_table(run.data.path("windows", "test")))
    users, first = np.unique(test.user_ids.to_pylist(), return_index=True)  # the store ends before the first test moment
    prepared = collate(test, first, predictor.schema).history
    stored = [store.get(u) for u in users]
    same_batch(prepared, predictor.encode_histories([h for h in stored if h is not None]).batch)
    sent = []
    for history in stored:
        assert history is not None
        body = [
            {"item_id": item, "timestamp": history.times[i], "actions": {a: none(v[i]) for a, v in history.actions.items()},
             "context": {c: v[i] for c, v in history.context.items()} | {"position": 3, "propensity": 0.5}}
            for i, item in enumerate(history.item_ids)
        ]  # fmt: skip
        request = api.RecommendRequest.model_validate_json(json.dumps({"history": body}, allow_nan=False))
        assert request.history is not None
        sent.append(api.inline_history(request.history, predictor.schema))
    same_batch(prepared, predictor.encode_histories(sent).batch)


def none(value: float) -> float | None:
    return None if np.isnan(value) else value


def some_history(run: TinyRun) -> History:
    store = PreparedHistories(str(run.folder / "data"))
    histories = [h for u in store.user_ids() if (h := store.get(u)) is not None]
    return max(histories, key=lambda h: len(h.item_ids))


def test_training_sees_the_position(run: TinyRun, train: WindowCache) -> None:
    schema = run.predictor.schema
    batch = collate(train, np.arange(len(train)), schema)
    assert len(batch.targets.context_M["position"].unique()) == 4
    model = run.predictor.model
    untrained = build_model(run.config, load_schema(run.data.prefix), None)
    moved = model.request_context["position"].embedding.weight != untrained.request_context["position"].embedding.weight
    assert moved[2:].any(1).all()
    with torch.no_grad():
        before, _ = model(batch)
        batch.targets.context_M["position"] = batch.targets.context_M["position"].flip(0)
        after, _ = model(batch)
    changed = dict(zip(run.config.tasks, (a != b for a, b in zip(before, after, strict=True)), strict=True))
    assert changed["click"] and changed["rating"] and not changed["retrieval"]


def test_the_position_of_a_request_changes_nothing_and_its_price_does(run: TinyRun) -> None:
    predictor, history = run.predictor, some_history(run)
    items = predictor.item_ids[:6]

    def answer(context: dict[str, Any]) -> dict[str, Any]:
        return predictor.score_items(history, items, context)

    even = {"price": 3, "tags": ["even"]}
    base = answer(even)
    for position in (1, "4", 99, None):
        assert answer(even | {"position": position}) == base
        assert predictor.recommend([history], 5, [{"position": position}]) == predictor.recommend([history], 5)
    for change in ({"price": 30}, {"tags": ["odd"]}, {"device": "web"}):
        other = answer(even | change)
        assert [i["tasks"]["click"] for i in other["items"]] != [i["tasks"]["click"] for i in base["items"]], change


def test_batch_scoring_is_the_predictor_with_an_empty_request(run: TinyRun) -> None:
    store = storage.read_table(run.data.path("store"))
    table = pa.concat_tables(user_tables(run.predictor, [store], Ask("lists", 3, 7), Tally()))
    history = PreparedHistories(str(run.folder / "data"))
    for user in store["user_id"].to_pylist()[:5]:
        known = history.get(user)
        assert known is not None
        [answer] = run.predictor.recommend([known], 3, [{"position": 4}])
        rows = [r for r in table.to_pylist() if r["user_id"] == user]
        assert [r["item_id"] for r in rows] == [i["item_id"] for i in answer["items"]]
        np.testing.assert_allclose([r["click"] for r in rows], [i["tasks"]["click"] for i in answer["items"]], rtol=1e-5)


def test_evaluation_fixes_the_position_too(run: TinyRun) -> None:
    def predictions(**columns: int) -> dict[str, np.ndarray]:
        cache = WindowCache.from_table(storage.read_table(run.data.path("windows", "test")))
        for name, value in columns.items():
            cache.columns[f"target_context_{name}"] = np.full_like(cache.columns[f"target_context_{name}"], value)
        moments = Moments.of(run.predictor.schema, cache, np.arange(len(cache)))
        return Model(run.predictor).predictions(moments)

    base, moved, dearer = predictions(), predictions(position=5), predictions(price=3)
    for task in SCORED:
        assert np.array_equal(base[task], moved[task]) and not np.array_equal(base[task], dearer[task])


def test_every_feature_of_a_past_event_changes_the_state(run: TinyRun) -> None:
    history = some_history(run)
    n = len(history.item_ids)

    def state(known: History) -> torch.Tensor:
        return run.predictor.encode_state(run.predictor.encode_histories([known]).batch)

    base = state(history)
    for name, values in (("device", ["phone"] * n), ("price", [99.0] * n), ("tags", [["odd", "t1"]] * n)):
        assert not torch.allclose(base, state(replace(history, context={**history.context, name: values}))), name
    torch.testing.assert_close(base, state(replace(history, context={**history.context, "position": [9] * n})))
    minutes = [history.times[-1] - (n - 1 - i) * 60_000 for i in range(n)]
    calm = [history.times[-1] - (n - 1 - i) * 86_400_000 for i in range(n)]
    sessions = [run.predictor.encode_histories([replace(history, times=t)]).batch.session_BS.tolist()[0] for t in (minutes, calm)]
    assert sessions[0][:3] == [1, 2, 3] and set(sessions[1]) == {1}


def test_an_empty_history_and_a_request_without_features_are_answered(run: TinyRun) -> None:
    [answer] = run.predictor.recommend([History()], 4)
    assert len(answer["items"]) == 4 and answer["degraded"] == ["no_history"]
    assert all(np.isfinite(list(i["tasks"].values())).all() for i in answer["items"])


def test_wrong_features_of_a_request_are_refused_by_name(run: TinyRun) -> None:
    schema = run.predictor.schema
    known = {c.name: c for c in schema.request_features}
    for context, message in (
        ({"moon": "full"}, r"^context: unknown column 'moon'; known are \['device', 'price', 'price_band', 'tags', 'position'\]"),
        ({"price": "12"}, r"^context\.price: expected a finite number, found '12'"),
        ({"device": ["web"]}, r"^context\.device: expected text or a number"),
        ({"propensity": 0.5}, "unknown column 'propensity'"),
    ):
        with pytest.raises(api.BadRequestError, match=message):
            api.check_context(context, known)  # type: ignore[arg-type]
    api.check_context({"price": 12, "tags": ["a", 1], "device": None, "position": 3}, known)
    event = {"item_id": "i1", "timestamp": 1, "context": {"tags": 3, "price": True}}
    with pytest.raises(api.BadRequestError, match=r"^history\[0\]: context\.price: expected a finite number, found True"):
        api.inline_history([api.Event.model_validate(event)], schema)


def test_a_bundle_that_is_read_again_gives_the_same_scores(run: TinyRun) -> None:
    again, history = bundle.load(run.bundle_root), some_history(run)
    request = {"price": 2, "tags": ["even", "t1"]}
    assert again.score_items(history, again.item_ids, request) == run.predictor.score_items(history, again.item_ids, request)


@pytest.mark.slow
@pytest.mark.parametrize(("partitions", "files"), [(1, 2), (5, 2)])
def test_the_fitted_features_do_not_depend_on_the_partitions(run: TinyRun, tmp_path: Path, partitions: int, files: int) -> None:
    def change(raw: dict[str, Any]) -> None:
        change_of(run.folder)(raw)
        raw["data"]["partitions"] = partitions

    data = tiny.prepare_locally(tiny.make_config(run.folder, change), tmp_path / "data")
    assert load_schema(data.prefix).context == run.predictor.schema.context


@pytest.mark.slow
def test_features_of_a_text_file_are_those_of_parquet(run: TinyRun, tmp_path: Path) -> None:
    rows = pq.read_table(run.folder / "features").to_pylist()
    with open(tmp_path / "log.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(r | {"tags": "|".join(r["tags"] or []), "click": int(r["click"])} for r in rows)
    with open(tmp_path / "log.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({k: None if v != v else v for k, v in r.items()}) + "\n" for r in rows)
    expected = storage.read_table(run.data.path("windows", "train"))
    for name in ("csv", "jsonl"):

        def change(raw: dict[str, Any], name: str = name) -> None:
            change_of(run.folder)(raw)
            raw["data"]["interactions"] |= {"format": name, "path": str(tmp_path / f"log.{name}")}
            raw["data"]["context"]["tags"] |= {"separator": "|"}

        data = tiny.prepare_locally(tiny.make_config(run.folder, change), tmp_path / name)
        found = storage.read_table(data.path("windows", "train"))
        for column in (c for c in expected.column_names if c.startswith(("history_context", "target_context", "target_kept"))):
            assert str(found[column].to_pylist()) == str(expected[column].to_pylist()), (name, column)


def test_two_rows_that_differ_in_a_list_are_two_events(tmp_path: Path) -> None:
    tiny.write_log(tmp_path)
    tiny.write_features(tmp_path)
    table = pq.read_table(tmp_path / "features")
    first = table.slice(1, 1)
    other = first.set_column(first.schema.get_field_index("tags"), "tags", [[["x"] * len(first["tags"][0])]])
    pq.write_table(first, tmp_path / "features" / "again.parquet")
    pq.write_table(other.cast(table.schema), tmp_path / "features" / "other.parquet")
    data = tiny.prepare_locally(tiny.make_config(tmp_path, tiny.with_features(tmp_path)), tmp_path / "data")
    assert data.manifest["rows"]["reasons"] == {"duplicate event": 1}
    assert data.manifest["rows"]["events"] == len(table) + 1


def test_a_fixed_value_that_the_log_lacks_stops_the_job(run: TinyRun, tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        change_of(run.folder)(raw)
        raw["data"]["context"]["position"]["at_inference"] = 0

    with pytest.raises(DataError, match=r"data\.context\.position\.at_inference: 0 is not in the vocabulary"):
        tiny.prepare_locally(tiny.make_config(run.folder, change), tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "position",
            {"kind": "categorical", "at_inference": 1},
            "data.context.position.at_inference: it fixes what",
        ),
        ("taste", {"kind": "multihot"}, "'taste' is a profile attribute and may not be an input feature"),
        ("years", {"kind": "numerical"}, "'years' is a profile attribute and may not be an input feature"),
        ("price", {"kind": "numerical", "transform": "cube"}, "data.context.price.transform"),
        ("price", {"kind": "numerical", "min": 2, "max": 1}, "data.context.price.min: it is above max"),
        ("price", {"kind": "categorical", "bins": 3}, "data.context.price.bins: unknown key"),
        ("price", {"kind": "number"}, "data.context.price"),
        ("click", {"kind": "categorical"}, "'click'] are labels already"),
    ],
)
def test_a_wrong_feature_is_refused_with_its_key(run: TinyRun, name: str, fields: dict[str, Any], message: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["data"]["context"] = {name: fields}
        raw["data"]["interactions"]["columns"]["years"] = "age"

    with pytest.raises(ConfigError) as refused:
        tiny.make_config(run.folder, change)
    assert message in str(refused.value)


def test_a_list_of_names_stands_for_categorical_features(run: TinyRun) -> None:
    def mapping(raw: dict[str, Any]) -> None:
        raw["data"]["context"] = {"device": {"kind": "categorical"}}

    def twice(raw: dict[str, Any]) -> None:
        raw["data"]["context"] = ["device", "device"]

    assert tiny.make_config(run.folder) == tiny.make_config(run.folder, mapping)
    with pytest.raises(ConfigError, match="listed twice"):
        tiny.make_config(run.folder, twice)


def test_without_features_and_sessions_the_model_has_no_weights_for_them(run: TinyRun) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["data"]["context"] = {}

    schema = load_schema(run.data.prefix).model_copy(update={"context": (), "session_gap_minutes": None})
    names = Recommender(tiny.make_config(run.folder, change), schema, None).state_dict()
    assert not [n for n in names if "context" in n or "session" in n]
