from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray.config import DataConfig
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.data.sources import ROW
from mtrec_ray.data.validate import QUARANTINE, derive, event_schema, needed_columns, validate

NAN = float("nan")
GOOD = {"user_id": "u", "item_id": "i", "timestamp": "1000", "rating": "4", "stars": "1", "click": "1", "device": "web"}
ITEMS, USERS = pa.array(["i", "j"]), pa.array(["u", "v"])


def config(**change: Any) -> DataConfig:
    """rating from 1 to 5, stars among 0, 1 and 2, a binary click, a derived like, a context column."""
    raw: dict[str, Any] = {
        "interactions": {"path": "log"},
        "labels": {
            "rating": {"min": 1, "max": 5},
            "like": {"expression": "rating >= 4", "kind": "binary"},
            "stars": {"values": [0, 1, 2]},
            "click": {"kind": "binary"},
        },
        "context": ["device"],
    }
    return DataConfig.model_validate(raw | change)


def log(*rows: dict[str, Any], **columns: Any) -> pa.Table:
    """Rows that differ from GOOD, as a CSV would come (strings); `columns` replaces whole columns."""
    table: dict[str, Any] = {n: [(GOOD | row)[n] for row in rows or ({},)] for n in GOOD}
    table |= columns
    length = len(table["user_id"])
    table = {n: pa.array(v if len(v) == length else v * length) if isinstance(v, list) else v for n, v in table.items()}
    return pa.table(table | {ROW: pa.array(range(100, 100 + length), pa.int64())})


def run(table: pa.Table, data: DataConfig | None = None, items: Any = ITEMS) -> tuple[pa.Table, pa.Table]:
    data = data or config()
    events, rejected = validate(table, data, "log.csv", None if items is None else np.sort(hash_ids(items)))
    assert events.schema == event_schema(data) and rejected.schema == QUARANTINE
    assert sorted(events[ROW].to_pylist() + rejected[ROW].to_pylist()) == table[ROW].to_pylist()
    return events, rejected


def reason(row: dict[str, Any], data: DataConfig | None = None, **known: Any) -> str:
    """The reason why a row is quarantined, between two good ones that stay."""
    events, rejected = run(log({}, row, {}), data, **known)
    assert events[ROW].to_pylist() == [100, 102]
    [why] = rejected["reason"].to_pylist()
    return str(why)


def kept(column: pa.Array, name: str = "rating", **settings: Any) -> list[float | int]:
    """What becomes of a typed column, all of whose rows must be good."""
    events, rejected = run(log(*[{}] * len(column), **{name: column}), config(**settings))
    assert not rejected["reason"].to_pylist()
    return events[name].to_pylist()  # type: ignore[no-any-return]


def values(table: pa.Table, name: str) -> list[float | None]:
    """A column with None for NaN; Arrow's own nulls are not allowed in it."""
    assert table[name].null_count == 0
    return [None if np.isnan(v) else v for v in table[name].to_pylist()]


# --------------------------------------------------------------------------- good rows


def test_a_good_row_becomes_a_typed_event() -> None:
    events, rejected = run(log({}))
    assert rejected.num_rows == 0
    assert events.to_pylist() == [
        {
            "user_id": "u",
            "item_id": "i",
            "timestamp": 1000,
            ROW: 100,
            "rating": 4,
            "like": 1,
            "stars": 1,
            "click": 1,
            "device": "web",
        }
    ]


def test_the_columns_read_are_ids_time_plain_labels_and_context() -> None:
    assert needed_columns(config()) == ["user_id", "item_id", "timestamp", "rating", "stars", "click", "device"]


def test_ids_are_strings_as_they_stand_in_the_log() -> None:
    events, _ = run(log({"user_id": "007", "item_id": " ü"}), items=None)
    assert (events["user_id"].to_pylist(), events["item_id"].to_pylist()) == (["007"], [" ü"])


def test_integer_ids_of_a_typed_log_are_strings_too() -> None:
    events, _ = run(log({}, user_id=pa.array([7]), item_id=pa.array([12.0])), items=None)
    assert (events["user_id"].to_pylist(), events["item_id"].to_pylist()) == (["7"], ["12"])


def test_missing_labels_and_context_are_kept_as_missing() -> None:
    events, rejected = run(log({"rating": None, "stars": None, "click": None, "device": None}))
    assert rejected.num_rows == 0
    assert [values(events, n) for n in ("rating", "like", "stars", "click")] == [[None]] * 4
    assert events["device"].to_pylist() == [None]


def test_a_label_column_without_any_value_is_missing_everywhere() -> None:
    events, _ = run(log({}, {}, rating=pa.nulls(2)))
    assert values(events, "rating") == [None, None]


@pytest.mark.parametrize("name", ["rating", "stars", "click"])
def test_an_empty_quoted_label_is_a_missing_label(name: str) -> None:
    events, rejected = run(log({name: ""}))  # a CSV field "" as sources.read_unit gives it
    assert rejected.num_rows == 0 and values(events, name) == [None]


def test_a_derived_label_is_missing_where_its_input_is() -> None:
    events, _ = run(log({"rating": "5"}, {"rating": "3.5"}, {"rating": None}, {"rating": "4"}))
    assert values(events, "like") == [1, 0, None, 1]


def test_derive_keeps_the_order_of_the_config() -> None:
    data = config()
    plain = {"click": np.array([1.0]), "stars": np.array([2.0]), "rating": np.array([NAN])}
    out = derive(plain, data, 1)
    assert list(out) == ["rating", "like", "stars", "click"]
    assert np.isnan(out["like"]).tolist() == [True]


def test_an_empty_table_gives_two_empty_tables() -> None:
    events, rejected = run(log({}).slice(0, 0))
    assert (events.num_rows, rejected.num_rows) == (0, 0)


# --------------------------------------------------------------------------- reasons


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"user_id": None}, "user_id is missing"),
        ({"user_id": ""}, "user_id is missing"),
        ({"item_id": None}, "item_id is missing"),
        ({"item_id": ""}, "item_id is missing"),
        ({"timestamp": None}, "timestamp is missing"),
        ({"timestamp": "yesterday"}, "timestamp is not a number"),
        ({"timestamp": "2020-01-01 10:00"}, "timestamp is not a number"),
        ({"timestamp": "nan"}, "timestamp is not a number"),
        ({"timestamp": "-1"}, "timestamp is outside 1970 to 2200 (time_unit ms)"),
        ({"timestamp": "inf"}, "timestamp is outside 1970 to 2200 (time_unit ms)"),
        ({"timestamp": "7258118400001"}, "timestamp is outside 1970 to 2200 (time_unit ms)"),
        ({"rating": "good"}, "rating is not a number"),
        ({"rating": "1e39"}, "rating is too large for a 32-bit number"),
        ({"rating": "4,5"}, "rating is not a number"),
        ({"rating": "nan"}, "rating is not a number"),
        ({"rating": "inf"}, "rating is not a number"),
        ({"rating": "-inf"}, "rating is not a number"),
        ({"rating": "0.5"}, "rating is below 1"),
        ({"rating": "5.01"}, "rating is above 5"),
        ({"stars": "3"}, "stars is not one of its values"),
        ({"stars": "0.5"}, "stars is not one of its values"),
        ({"click": "2"}, "click is not 0 or 1"),
        ({"click": "0.5"}, "click is not 0 or 1"),
        ({"click": "yes"}, "click is not a number"),
        ({"item_id": "unknown"}, "item_id is not in the items table"),
    ],
)
def test_a_bad_row_is_quarantined_with_its_reason(row: dict[str, Any], expected: str) -> None:
    assert reason(row) == expected


def test_the_limits_themselves_are_good() -> None:
    events, rejected = run(log({"rating": "1", "stars": "0", "click": "0"}, {"rating": "5", "stars": "2", "click": "1.0"}))
    assert rejected.num_rows == 0 and events["rating"].to_pylist() == [1, 5]


def test_the_first_and_the_last_moment_are_good() -> None:
    events, rejected = run(log({"timestamp": "0"}, {"timestamp": "7258118400000"}))
    assert rejected.num_rows == 0 and events["timestamp"].to_pylist() == [0, 7_258_118_400_000]


def test_the_first_reason_that_applies_is_kept() -> None:
    assert reason({"user_id": None, "item_id": None, "timestamp": "x", "rating": "9"}) == "user_id is missing"
    assert reason({"timestamp": "x", "rating": "9"}) == "timestamp is not a number"
    assert reason({"rating": "9", "click": "7", "item_id": "unknown"}) == "rating is above 5"


def test_times_in_the_wrong_unit_are_quarantined() -> None:
    seconds = config(time_unit="s")
    assert reason({"timestamp": "1700000000000"}, seconds) == "timestamp is outside 1970 to 2200 (time_unit s)"
    assert reason({"timestamp": "1700000000000000"}) == "timestamp is outside 1970 to 2200 (time_unit ms)"


def test_an_unknown_item_is_kept_where_the_config_says_so() -> None:
    events, rejected = run(log({"item_id": "x"}), config(unknown_items="keep"))
    assert events["item_id"].to_pylist() == ["x"] and rejected.num_rows == 0


def test_without_an_items_table_no_id_is_unknown() -> None:
    _, rejected = run(log({"item_id": "x"}), items=None)
    assert rejected.num_rows == 0


def test_infinity_in_a_label_without_limits_is_refused_too() -> None:
    data = config(labels={"rating": {}})
    assert reason({"rating": "1e999"}, data) == "rating is not a number"
    _, rejected = run(log({}, {}, rating=pa.array([float("inf"), -float("inf")])), data)
    assert rejected["reason"].to_pylist() == ["rating is not a number"] * 2


def test_a_quarantined_row_says_where_it_was_and_what_it_held() -> None:
    _, rejected = run(log({}, {"rating": "9", "device": None}))
    [row] = rejected.to_pylist()
    assert (row[ROW], row["file"], row["reason"]) == (101, "log.csv", "rating is above 5")
    assert "'rating': '9'" in row["raw"] and "'user_id': 'u'" in row["raw"] and ROW not in row["raw"]


# --------------------------------------------------------------------------- typed columns


@pytest.mark.parametrize(
    "column",
    [
        pa.array([4, 5], pa.int8()),
        pa.array([4, 5], pa.int64()),
        pa.array([4, 5], pa.uint32()),
        pa.array([4.0, 5.0], pa.float32()),
        pa.array([4.0, 5.0], pa.float64()),
        pa.array(["4", "5.0"], pa.large_string()),
    ],
    ids=lambda column: str(column.type),
)
def test_typed_label_columns_are_read(column: pa.Array) -> None:
    assert kept(column) == [4.0, 5.0]


@pytest.mark.parametrize(
    "column",
    [pa.array([decimal.Decimal("4.0"), decimal.Decimal("5.0")]), pa.array(["4", "5"]).dictionary_encode()],
    ids=["decimal", "dictionary"],
)
def test_decimal_and_dictionary_label_columns_are_read(column: pa.Array) -> None:
    assert kept(column) == [4.0, 5.0]


def test_nulls_and_nan_of_typed_label_columns_are_missing() -> None:
    for column in (pa.array([4, None]), pa.array([4.0, None]), pa.array([4.0, NAN])):
        events, rejected = run(log({}, {}, rating=column))
        assert rejected.num_rows == 0 and values(events, "rating") == [4, None]


def test_limits_hold_for_typed_label_columns() -> None:
    _, rejected = run(log({}, {}, {}, rating=pa.array([0, 6, 3])))
    assert rejected["reason"].to_pylist() == ["rating is below 1", "rating is above 5"]


def test_a_boolean_column_is_a_binary_label() -> None:
    events, rejected = run(log({}, {}, {}, click=pa.array([True, False, None])))
    assert rejected.num_rows == 0 and values(events, "click") == [1, 0, None]


def test_a_column_of_dates_is_no_label() -> None:
    _, rejected = run(log({}, rating=pa.array([dt.date(2020, 1, 1)])))
    assert rejected["reason"].to_pylist() == ["rating is not a number"]


@pytest.mark.parametrize(
    ("unit", "given", "expected"),
    [("s", "1700000000", 1_700_000_000_000), ("s", "1700000000.25", 1_700_000_000_250), ("ms", "1700000000123", 1_700_000_000_123),
     ("ms", "1000.9", 1000), ("us", "1700000000123999", 1_700_000_000_123), ("ns", "1700000000123500000", 1_700_000_000_123)],
)  # fmt: skip
def test_times_of_every_unit_become_whole_milliseconds(unit: str, given: str, expected: int) -> None:
    events, _ = run(log({"timestamp": given}), config(time_unit=unit))
    assert events["timestamp"].to_pylist() == [expected]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1000), ("ms", 1), ("us", 0.001)])
def test_integer_and_float_times_of_a_typed_log_are_converted_alike(unit: str, factor: float) -> None:
    given = int(1_700_000_000_000 / factor)
    for column in (pa.array([given]), pa.array([float(given)]), pa.array([str(given)])):
        assert kept(column, "timestamp", time_unit=unit) == [1_700_000_000_000]


def test_a_float_time_that_is_nan_is_quarantined() -> None:
    _, rejected = run(log({}, {}, timestamp=pa.array([NAN, None])))
    assert rejected["reason"].to_pylist() == ["timestamp is not a number", "timestamp is missing"]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Berlin"])
def test_timestamp_columns_bring_their_own_unit_and_zone(unit: str, zone: str | None) -> None:
    ticks = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    column = pa.array([1_700_000_000 * ticks], pa.timestamp(unit, zone))
    assert kept(column, "timestamp", time_unit="s") == [1_700_000_000_000]  # whatever time_unit says


def test_a_timestamp_column_is_cut_to_milliseconds_and_may_have_nulls() -> None:
    column = pa.array([1_700_000_000_123_999, None, -10_000_000], pa.timestamp("us"))
    events, rejected = run(log({}, {}, {}, timestamp=column))
    assert events["timestamp"].to_pylist() == [1_700_000_000_123]
    assert rejected["reason"].to_pylist() == ["timestamp is missing", "timestamp is outside 1970 to 2200 (time_unit ms)"]


def test_integer_times_in_nanoseconds_are_read() -> None:
    assert kept(pa.array([1_700_000_000_123_000_000]), "timestamp", time_unit="ns") == [1_700_000_000_123]


def test_a_huge_integer_label_is_quarantined() -> None:
    _, rejected = run(log({}, rating=pa.array([2**53 + 1])))
    assert rejected["reason"].to_pylist() == ["rating is above 5"]


def test_times_in_nanoseconds_are_exact_to_the_millisecond() -> None:
    expected = list(range(1_700_000_000_000, 1_700_000_000_100))
    assert kept(pa.array([f"{ms}000000" for ms in expected]), "timestamp", time_unit="ns") == expected


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 7_258_118_400_000), min_size=1, max_size=5))
def test_milliseconds_come_back_unchanged_from_whole_seconds_milliseconds_and_microseconds(times: list[int]) -> None:
    assert kept(pa.array([str(t) for t in times]), "timestamp") == times
    assert kept(pa.array([t * 1000 for t in times]), "timestamp", time_unit="us") == times
    whole = [t // 1000 for t in times]
    assert kept(pa.array(whole), "timestamp", time_unit="s") == [1000 * t for t in whole]


def test_a_float_id_that_is_nan_is_missing() -> None:
    _, rejected = run(log({}, {}, user_id=pa.array([7.0, NAN])), items=None)
    assert rejected["reason"].to_pylist() == ["user_id is missing"]


# --------------------------------------------------------------------------- nothing is lost

_cells = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["u", "w", "", None]),
        "item_id": st.sampled_from(["i", "x", "", None]),
        "timestamp": st.sampled_from(["1000", "-1", "x", "", None, "1e30"]),
        "rating": st.sampled_from(["4", "1", "0", "9", "inf", "nan", "?", None]),
        "stars": st.sampled_from(["1", "7", None]),
        "click": st.sampled_from(["0", "1", "2", None]),
        "device": st.sampled_from(["web", "", None]),
    }
)


def _plainly_good(row: dict[str, str | None]) -> bool:
    return (
        row["user_id"] in ("u", "w")
        and row["item_id"] == "i"
        and row["timestamp"] == "1000"
        and row["rating"] in ("4", "1", None)
        and row["stars"] in ("1", None)
        and row["click"] in ("0", "1", None)
    )


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.lists(_cells, min_size=1, max_size=8))
def test_every_row_is_in_exactly_one_of_the_two_and_in_the_right_one(rows: list[dict[str, str | None]]) -> None:
    table = log(**{n: pa.array([r[n] for r in rows], pa.string()) for n in GOOD})
    events, rejected = run(table)  # asserts that the two together are the table
    assert events[ROW].to_pylist() == [100 + i for i, r in enumerate(rows) if _plainly_good(r)]
    assert rejected["reason"].null_count == 0


def test_rows_of_a_table_in_several_chunks_are_all_judged() -> None:
    table = pa.concat_tables([log({}), log({"rating": "9"}), log({})]).drop_columns([ROW])
    table = table.append_column(ROW, pa.chunked_array([[100], [101, 102]], pa.int64()))
    events, rejected = run(table)
    assert events[ROW].to_pylist() == [100, 102] and rejected[ROW].to_pylist() == [101]
