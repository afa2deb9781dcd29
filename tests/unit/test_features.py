"""Features: fitted by hand-checkable rules, and the same at prepare, in batch and when serving."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from mtrec_ray import feature_fit
from mtrec_ray.config import DataConfig
from mtrec_ray.config.features import FeatureConfig
from mtrec_ray.data.sources import ROW
from mtrec_ray.data.validate import list_columns, needed_columns, validate
from mtrec_ray.features import (
    LIMIT,
    MAX_VALUES,
    CategoricalSpec,
    FeatureError,
    FeatureSpec,
    MultihotSpec,
    NumericalSpec,
    dense,
    padded,
    text_of,
)
from mtrec_ray.models.batch import SESSION_BUCKETS, collate_history, session_bucket
from mtrec_ray.models.features import FeatureEmbedding
from mtrec_ray.serving import api


def feature(**fields: Any) -> FeatureConfig:
    return TypeAdapter(FeatureConfig).validate_python(fields)


def fitted(config: FeatureConfig, values: list[Any], kind: pa.DataType, rows: list[int] | None = None) -> Any:
    row = np.array(rows if rows is not None else range(len(values)), dtype=np.int64)
    return feature_fit.fit("f", config, feature_fit.count(config, pa.array(values, kind), row))


TEXTS = pa.list_(pa.string())

# --------------------------------------------------------------------------- vocabularies


def test_in_a_vocabulary_0_is_missing_1_is_any_other_value_and_values_count_from_2() -> None:
    spec = CategoricalSpec(name="device", values=("phone", "web"))
    encoded = spec.encode(["web", "phone", None, "fridge", ""])
    assert encoded.tolist() == [3, 2, 0, 1, 0] and encoded.dtype == np.int32
    assert spec.encode(pa.array(["web", "phone", None, "fridge", ""])).tolist() == [3, 2, 0, 1, 0]
    assert spec.size == 4
    assert spec.encode([]).tolist() == []


def test_rare_values_are_out_of_the_vocabulary() -> None:
    spec = fitted(feature(kind="categorical", min_count=2), ["a", "b", "a", None, "c", "b", "b"], pa.string())
    assert spec.values == ("a", "b") and spec.outside == 1
    assert spec.encode(["c", "a"]).tolist() == [1, 2]


def test_the_most_frequent_values_are_kept_and_ties_go_by_value() -> None:
    values = ["z", "z", "z", "c", "b", "b", "c", "a"]
    spec = fitted(feature(kind="categorical", max_values=2), values, pa.string())
    assert spec.values == ("b", "z") and spec.outside == 3


def test_a_set_is_the_numbers_of_its_values_each_once_in_ascending_order() -> None:
    spec = MultihotSpec(name="tags", values=("a", "b", "c"))
    lists = [["c", "a", "c"], [], None, ["x", "y", "b"], ["", None, "a"]]
    assert spec.encode(pa.array(lists, TEXTS)).to_pylist() == [[2, 4], [], [], [1, 3], [2]]
    assert spec.encode(lists).to_pylist() == [[2, 4], [], [], [1, 3], [2]]
    assert dense(spec.encode(lists)).tolist() == [[2, 4], [0, 0], [0, 0], [1, 3], [2, 0]]
    assert spec.encode(pa.array(lists, TEXTS).slice(3, 2)).to_pylist() == [[1, 3], [2]]


def test_a_vocabulary_of_sets_counts_every_value() -> None:
    config = feature(kind="multihot", min_count=2)
    spec = fitted(config, [["a", "b"], ["b"], None, [], ["c", "a"]], TEXTS)
    assert spec.values == ("a", "b") and spec.outside == 1


def test_a_text_is_cut_at_the_separator_alone_or_in_a_list() -> None:
    spec = MultihotSpec(name="genres", values=("Action", "Film Noir"), separator="|")
    assert spec.encode(["Action| Film Noir ", ["Film Noir|"], "|", None]).to_pylist() == [[2, 3], [3], [], []]
    whole = MultihotSpec(name="genres", values=("Action|Film Noir",))
    assert whole.encode(["Action|Film Noir"]).to_pylist() == [[2]]


def test_a_column_with_too_many_values_is_refused_as_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_fit, "MAX_DISTINCT", 2)
    with pytest.raises(FeatureError, match="3 different values"):
        fitted(feature(kind="categorical"), ["a", "b", "c"], pa.string())


def test_a_fixed_value_that_training_lacks_is_refused() -> None:
    with pytest.raises(FeatureError, match=r"at_inference: 7 is not in the vocabulary"):
        fitted(feature(kind="categorical", use="request", at_inference=7), ["1", "2"], pa.string())
    spec = fitted(feature(kind="categorical", use="request", at_inference=1), ["1", "2"], pa.string())
    assert spec.encode([spec.at_inference]).tolist() == [2]


# --------------------------------------------------------------------------- numbers


def test_standard_numbers_by_hand() -> None:
    spec = fitted(feature(kind="numerical"), [1.0, 3.0, None, 5.0], pa.float64())
    assert (spec.mean, spec.std, spec.fitted_on) == (3.0, pytest.approx(math.sqrt(8 / 3)), 3)
    z = spec.encode([3, 5.0, None, float("nan"), 1e300])
    assert z.dtype == np.float32
    np.testing.assert_allclose(z, [0, 2 / math.sqrt(8 / 3), np.nan, np.nan, LIMIT], rtol=1e-6)


@pytest.mark.parametrize("values", [[1.0, 1e200], [1e308, 1e308, -1e308], [1e-200, 2e-200, 3e-200], [0.0, 5e-324], [0.0, 0.0]])
def test_numbers_whose_squares_overflow_or_vanish_are_fitted_and_can_be_stored(values: list[float]) -> None:
    spec = fitted(feature(kind="numerical"), values, pa.float64())
    assert NumericalSpec.model_validate_json(spec.model_dump_json()) == spec
    z = spec.encode(values)
    assert np.isfinite(z).all() and (np.abs(z) <= 2).all()
    if values[0] not in (values[-1], 0.0):
        assert z.std() == pytest.approx(1, rel=1e-6)


def test_log_numbers_keep_their_sign() -> None:
    spec = fitted(feature(kind="numerical", transform="log"), [math.e - 1, 1 - math.e, 0.0], pa.float64())
    assert (spec.mean, spec.std) == (pytest.approx(0, abs=1e-12), pytest.approx(math.sqrt(2 / 3)))
    np.testing.assert_allclose(spec.encode([math.e - 1, 1 - math.e, 0]), np.array([1, -1, 0]) / math.sqrt(2 / 3), atol=1e-6)


def test_the_upper_edge_of_a_bucket_belongs_to_it() -> None:
    spec = fitted(feature(kind="numerical", transform="quantile", bins=2), [4.0, 1.0, 3.0, 2.0], pa.float64())
    assert spec.edges == (2.0,)
    assert spec.encode([None, -9, 2, 2.0000001, 99]).tolist() == [0, 1, 1, 2, 2]


def test_equal_numbers_share_a_bucket_and_no_bucket_is_without_training_values() -> None:
    values = [0.0] * 7 + [1.0, 2.0, 3.0]
    spec = fitted(feature(kind="numerical", transform="quantile", bins=10), values, pa.float64())
    assert spec.edges == (0.0, 1.0, 2.0)
    assert sorted(set(spec.encode(values).tolist())) == list(range(1, spec.size))
    constant = fitted(feature(kind="numerical", transform="quantile"), [5.0, 5.0], pa.float64())
    assert constant.edges == () and constant.encode([5, None]).tolist() == [1, 0]


@pytest.mark.parametrize("transform", ["standard", "log", "quantile"])
def test_a_column_without_numbers_or_with_one_number_can_be_encoded(transform: str) -> None:
    for values in ([None, None], [0.1, 0.1, 0.1]):
        spec = fitted(feature(kind="numerical", transform=transform), values, pa.float64())
        assert np.isfinite(spec.encode([0.1, 7])).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(2, 9))
def test_quantile_buckets_ascend_and_none_is_empty(values: list[float], bins: int) -> None:
    spec = fitted(feature(kind="numerical", transform="quantile", bins=bins), values, pa.float64())
    assert list(spec.edges) == sorted(set(spec.edges)) and len(spec.edges) < bins
    assert set(spec.encode(values).tolist()) == set(range(1, spec.size))


def test_no_fit_depends_on_the_number_or_order_of_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_fit, "SAMPLE", 50)
    rng = np.random.default_rng(0)
    numbers = pa.array(rng.lognormal(size=400))
    texts = pa.array([f"v{i}" for i in rng.integers(0, 30, 400)])
    rows = rng.permutation(400).astype(np.int64)
    for config, values in (
        (feature(kind="numerical", transform="quantile"), numbers),
        (feature(kind="numerical", transform="log"), numbers),
        (feature(kind="categorical", min_count=10, max_values=15), texts),
    ):
        found = []
        for parts in (1, 2, 7):
            pieces = np.array_split(rng.permutation(400), parts)
            counted = [feature_fit.count(config, values.take(pa.array(p)), rows[p]) for p in pieces]
            found.append(feature_fit.fit("f", config, feature_fit.merge(config, counted[::-1])))
        assert found[0] == found[1] == found[2]


def test_a_large_log_is_fitted_on_a_sample_within_the_stated_error() -> None:
    values = np.arange(300_000, dtype=np.float64)  # they drift with time, so that early events are no sample
    config = feature(kind="numerical", transform="quantile", bins=4)
    spec = fitted(config, values.tolist(), pa.float64())
    assert spec.fitted_on == feature_fit.SAMPLE
    np.testing.assert_allclose(np.array(spec.edges) / 300_000, [0.25, 0.5, 0.75], atol=0.009)


# --------------------------------------------------------------------------- one encode for all


def data_config() -> DataConfig:
    return DataConfig.model_validate(
        {
            "interactions": {"path": "log"},
            "labels": {"click": {"kind": "binary"}},
            "context": {
                "c": {"kind": "categorical"},
                "m": {"kind": "multihot", "separator": ";"},
                "n": {"kind": "numerical", "transform": "quantile"},
                "k": {"kind": "kept"},
            },
        }
    )


def clean(column: pa.Array, name: str) -> tuple[pa.Array, list[str]]:
    """A column of the log as prepare sees it -> (column of the clean log, reasons of quarantined rows)."""
    n = len(column)
    ids = {c: pa.array([f"{c}{i}" for i in range(n)]) for c in ("user_id", "item_id")}
    rest = {c: pa.nulls(n) for c in ("c", "m", "n", "k") if c != name}
    numbers = pa.array(range(n), pa.int64())
    table = pa.table(ids | rest | {"timestamp": numbers, "click": pa.array([1] * n), name: column, ROW: numbers})
    good, bad = validate(table, data_config(), "log")
    return good[name].combine_chunks(), bad["reason"].to_pylist()


def everywhere(spec: Any, column: pa.Array) -> tuple[Any, Any, Any]:
    """Encoded at prepare, in batch (from the store) and when serving (from JSON)."""
    kept, reasons = clean(column, spec.name)
    assert not reasons
    events = [api.Event.model_validate_json(json.dumps({"item_id": "i", "timestamp": 1, "context": {spec.name: v}}))
              for v in column.to_pylist()]  # fmt: skip
    served = spec.encode([e.context[spec.name] for e in events])
    return spec.encode(kept), spec.encode(kept.to_pylist()), served


texts = st.text(st.characters(codec="utf-8"), max_size=4)
columns = st.one_of(
    st.lists(st.none() | texts).map(lambda v: pa.array(v, pa.string())),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)).map(lambda v: pa.array(v, pa.int64())),
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False)).map(lambda v: pa.array(v, pa.float64())),
    st.lists(st.none() | st.booleans()).map(lambda v: pa.array(v, pa.bool_())),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(columns, st.lists(texts, max_size=5))
def test_a_categorical_value_has_one_number_at_prepare_in_batch_and_when_serving(column: pa.Array, more: list[str]) -> None:
    known = {text_of(v) for v in column.to_pylist()[::2]} | set(more)
    spec = CategoricalSpec(name="c", values=tuple(sorted(v for v in known if v)))
    prepared, batch, served = everywhere(spec, column)
    assert prepared.tolist() == batch.tolist() == served.tolist()
    assert all(code > 1 for code, v in zip(prepared.tolist(), column.to_pylist(), strict=True) if text_of(v) in known - {None, ""})


lists = st.lists(st.none() | st.lists(st.none() | st.text("ab; \u00a0é", max_size=4), max_size=4))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(lists)
def test_a_set_has_the_same_numbers_at_prepare_in_batch_and_when_serving(values: list[Any]) -> None:
    spec = MultihotSpec(name="m", values=("a", "ab", "b"), separator=";")
    joined = [None if v is None else ";".join(x or "" for x in v) for v in values]
    for column in (pa.array(values, TEXTS), pa.array(joined, pa.string())):
        prepared, batch, served = (e.to_pylist() for e in everywhere(spec, column))
        assert prepared == batch == served


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53), max_size=20),
    st.sampled_from(["standard", "log", "quantile"]),
)
def test_a_number_is_encoded_the_same_at_prepare_in_batch_and_when_serving(values: list[Any], transform: str) -> None:
    spec = NumericalSpec(name="n", transform=transform, mean=2.0, std=3.0, edges=(-1.0, 0.0, 0.5, 1e9))
    for encoded in everywhere(spec, pa.array([None if v is None else float(v) for v in values], pa.float64())):
        np.testing.assert_array_equal(encoded, spec.encode(values))


def test_a_spec_survives_its_own_json() -> None:
    adapter = TypeAdapter(FeatureSpec)
    for spec in (
        CategoricalSpec(name="a", values=("x",), use="request", at_inference="x"),
        CategoricalSpec(name="a", values=("1",), use="request", at_inference=1),
        MultihotSpec(name="a", values=("x",), use="request", at_inference=("x", 1), pool="sum"),
        NumericalSpec(name="a", transform="quantile", edges=(0.1, 1 / 3)),
    ):
        again = adapter.validate_json(adapter.dump_json(spec))
        assert again == spec and repr(again) == repr(spec)


# --------------------------------------------------------------------------- what is refused


def test_a_number_that_is_none_is_quarantined_and_a_missing_one_is_not() -> None:
    kept, reasons = clean(pa.array(["1.5", "cheap", None, "", "-2"]), "n")
    assert reasons == ["n is not a number"] and kept.to_pylist() == [1.5, None, None, -2.0]
    kept, reasons = clean(pa.array([0.5, math.inf, None, math.nan]), "k")
    assert reasons == ["k is not a number"] and kept.to_pylist() == [0.5, None, None]


def test_a_number_outside_its_bounds_is_quarantined() -> None:
    data = DataConfig.model_validate(
        data_config().model_dump() | {"context": {"k": {"kind": "kept", "min": 0, "max": 1}, "n": {"kind": "numerical", "min": 0}}}
    )
    table = pa.table({"user_id": ["u"] * 4, "item_id": ["i"] * 4, "timestamp": [1, 2, 3, 4], "click": [1] * 4,
                      "k": [0.5, 1.5, None, 1.0], "n": [1, 1, None, -1], ROW: pa.array(range(4), pa.int64())})  # fmt: skip
    good, bad = validate(table, data, "log")
    assert bad["reason"].to_pylist() == ["k is above 1", "n is below 0"]
    assert good["k"].to_pylist() == [0.5, None] and good["n"].to_pylist() == [1.0, None]


def test_an_event_with_too_many_values_is_quarantined() -> None:
    many = [str(i) for i in range(MAX_VALUES + 1)]
    _, reasons = clean(pa.array([["a"], many], TEXTS), "m")
    assert reasons == [f"m has more than {MAX_VALUES} values"]
    with pytest.raises(FeatureError, match=f"m: expected at most {MAX_VALUES} values"):
        MultihotSpec(name="m", values=()).encode([many])


def test_a_list_with_bytes_that_are_no_text_is_quarantined() -> None:
    column = pa.array([[b"a"], [b"a", b"\xff"], None], pa.list_(pa.binary()))
    kept, reasons = clean(column, "m")
    assert reasons == ["m holds bytes that are not UTF-8"] and kept.to_pylist() == [["a"], []]


def test_lists_are_read_where_a_feature_wants_them_and_nowhere_else() -> None:
    assert list_columns(data_config()) == {"m"}
    assert set(needed_columns(data_config())) >= {"c", "m", "n", "k"}


@pytest.mark.parametrize(
    ("spec", "value"),
    [
        (NumericalSpec(name="price"), "12"),
        (NumericalSpec(name="price"), True),
        (NumericalSpec(name="price"), math.inf),
        (NumericalSpec(name="price"), 10**400),
        (NumericalSpec(name="price"), [1.0]),
        (CategoricalSpec(name="price", values=()), ["a"]),
        (CategoricalSpec(name="price", values=()), {"a": 1}),
        (MultihotSpec(name="price", values=()), [["a"]]),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_with_the_features_name(spec: Any, value: Any) -> None:
    with pytest.raises(FeatureError, match=r"^price: expected .*(number|text)"):
        spec.encode([value])


# --------------------------------------------------------------------------- as vectors


def test_an_empty_set_is_zero_and_others_are_the_mean_or_sum_of_their_values() -> None:
    for pool in ("mean", "sum"):
        embed = FeatureEmbedding(MultihotSpec(name="m", values=("a", "b"), pool=pool), 3, 1.0)
        found = embed(torch.tensor([[[2, 3], [0, 0]], [[3, 0], [1, 0]]]))
        both = embed.embedding.weight[2] + embed.embedding.weight[3]
        assert found.shape == (2, 2, 3)
        torch.testing.assert_close(found[0, 0], both / 2 if pool == "mean" else both)
        torch.testing.assert_close(found[1, 0], embed.embedding.weight[3])
        assert not found[0, 1].any() and not found[1, 1].any()


def test_an_empty_batch_of_sets_is_an_empty_batch_of_vectors() -> None:
    embed = FeatureEmbedding(MultihotSpec(name="m", values=("a",)), 3, 1.0)
    for shape in ((0, 0, 1), (0, 1), (2, 0, 1)):
        assert embed(torch.zeros(shape, dtype=torch.int64)).shape == (*shape[:-1], 3)


def test_what_training_never_showed_says_nothing() -> None:
    number = FeatureEmbedding(NumericalSpec(name="n"), 3, 1.0)
    assert not number(torch.tensor([float("nan")])).any() and number(torch.tensor([0.0])).any()
    bucket = FeatureEmbedding(NumericalSpec(name="n", transform="quantile", edges=(1.0,)), 3, 1.0)
    assert not bucket(torch.tensor([0])).any() and bucket(torch.tensor([1])).any() and bucket(torch.tensor([2])).any()
    value = FeatureEmbedding(CategoricalSpec(name="n", values=("a",)), 3, 1.0)
    assert not value(torch.tensor([0, 1])).any() and value(torch.tensor([2])).any()


def test_lists_are_padded_with_0() -> None:
    assert padded(np.array([5, 6, 7]), np.array([2, 0, 1])).tolist() == [[5, 6], [0, 0], [7, 0]]
    assert padded(np.array([], np.int64), np.array([0, 0])).tolist() == [[0], [0]]
    assert padded(np.array([], np.int64), np.array([], np.int64)).shape == (0, 1)


# --------------------------------------------------------------------------- sessions


def test_places_in_a_session_by_hand() -> None:
    minute = 60_000
    time = np.array([0, 30, 61, 61, 91, 500, 501]) * minute
    first = np.array([True, False, False, False, False, False, True])
    assert session_bucket(time, first, 30 * minute).tolist() == [1, 2, 1, 2, 3, 1, 1]
    long = session_bucket(np.zeros(5000, np.int64), np.arange(5000) == 0, 1)
    assert long[:9].tolist() == [1, 2, 3, 4, 4, 4, 4, 5, 5] and long.max() < SESSION_BUCKETS


def test_a_session_does_not_reach_into_another_history() -> None:
    time = np.array([0, 1, 2, 3], dtype=np.int64)
    batch = collate_history(np.arange(4), time, np.array([1, 3]), {}, {}, session_gap_ms=10)
    assert batch.session_BS is not None and batch.session_BS.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert collate_history(np.arange(4), time, np.array([1, 3]), {}, {}).session_BS is None
