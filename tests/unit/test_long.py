"""Long logs: by hand, against plain loops over the rows, and against the wide log that says the same."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, DataConfig, RunConfig, parse_config
from mtrec_ray.data import events as stage
from mtrec_ray.data import fit, windows
from mtrec_ray.data.long import HOUR_MS, Joined, join
from mtrec_ray.data.sources import ROW
from mtrec_ray.data.validate import REQUEST, TYPE, VALUE, event_schema, needed_columns, row_schema, validate
from tests import tiny

NAN = float("nan")


class Row(NamedTuple):
    """A row of a long log; its place in the log is its row number. Times are hours."""

    time: int
    type: str
    item: str = "x"
    value: float | None = None
    request: str | None = None
    user: str = "u"


def run_config(history: str = "click > 0 or present(rating)", same_time: str = "group", **long: Any) -> RunConfig:
    """show, and three actions: click (binary), buy (binary, and its price numeric), rate (numeric)."""
    section = {"type": "what", "value": "number", "impression": "show", "attribution_hours": 4}
    section |= {"labels": {"click": "click", "bought": "buy", "price": "buy", "rating": "rate"}}
    return parse_config(
        {
            "name": "long",
            "data": {
                "interactions": {"path": "log"},
                "long": section | long,
                "labels": {
                    "click": {"kind": "binary"},
                    "bought": {"kind": "binary"},
                    "price": {},
                    "rating": {"min": 1, "max": 5},
                    "like": {"expression": "rating >= 4", "kind": "binary"},
                },
                "history": history,
                "same_time": same_time,
            },
            "tasks": {"retrieval": {"kind": "retrieval", "positive": "bought > 0 or like > 0"}},
            "train": {"monitor": "retrieval/ndcg@10"},
        }
    )


def config(**long: Any) -> DataConfig:
    return run_config(**long).data


BY_REQUEST: dict[str, Any] = {"request": "request", "attribution_hours": None}


def table_of(log: list[Row], data: DataConfig) -> pa.Table:
    """Sorted by (user, time, row), with ids as dictionaries, as `settle_partition` hands it over."""
    order = sorted(range(len(log)), key=lambda i: (log[i].user, log[i].time, i))
    rows = [log[i] for i in order]
    columns = {
        "user_id": [r.user for r in rows],
        "item_id": [r.item for r in rows],
        "timestamp": [r.time * HOUR_MS for r in rows],
        ROW: order,
        TYPE: [r.type for r in rows],
        VALUE: [NAN if r.value is None else r.value for r in rows],
        REQUEST: [r.request for r in rows],
    }
    return stage._encoded(pa.table(columns, schema=row_schema(data)))


def joined(log: list[Row], data: DataConfig | None = None) -> Joined:
    data = data or config()
    out = join(table_of(log, data), data)
    assert out.events.column_names == event_schema(data).names
    return out


def events_of(log: list[Row], data: DataConfig | None = None) -> dict[int, dict[str, float | None]]:
    """Row number of each event -> its labels and shown labels; None is missing."""
    out = {}
    for event in joined(log, data).events.to_pylist():
        row = event.pop(ROW)
        out[row] = {n: None if math.isnan(v) else v for n, v in event.items() if n not in ("user_id", "item_id", "timestamp")}
    return out


def labels_of(log: list[Row], name: str, data: DataConfig | None = None) -> dict[int, float | None]:
    return {row: labels[name] for row, labels in events_of(log, data).items()}


# --------------------------------------------------------------------------- by hand


def test_an_impression_gets_the_labels_of_its_actions() -> None:
    log = [Row(0, "show"), Row(1, "click"), Row(2, "buy", value=9.5), Row(3, "rate", value=4)]
    [labels] = events_of(log).values()
    expected = {"click": 1, "bought": 1, "price": 9.5, "rating": 4, "like": 1}
    assert labels == expected | {f"shown_{n}": v for n, v in expected.items()}


def test_an_impression_without_actions_has_binary_labels_of_zero_and_no_others() -> None:
    [labels] = events_of([Row(0, "show")]).values()
    expected = {"click": 0, "bought": 0, "price": None, "rating": None, "like": None}
    assert labels == expected | {f"shown_{n}": v for n, v in expected.items()}


def test_an_action_belongs_to_the_latest_impression_of_its_user_and_item_at_its_time_or_before() -> None:
    log = [Row(0, "show"), Row(1, "show"), Row(1, "show", "y"), Row(1, "show", user="v"), Row(2, "click"), Row(3, "show")]
    assert labels_of(log, "click") == {0: 0, 1: 1, 2: 0, 3: 0, 5: 0}
    assert labels_of([Row(1, "click"), Row(1, "show")], "click") == {1: 1}


def test_in_a_log_with_an_order_an_action_belongs_to_no_impression_that_comes_later_at_the_same_time() -> None:
    data = run_config(same_time="order").data
    assert labels_of([Row(1, "click"), Row(1, "show")], "click", data) == {0: 1, 1: 0}
    assert labels_of([Row(1, "show"), Row(1, "click")], "click", data) == {0: 1}


def test_an_action_after_the_attribution_window_is_an_event_of_its_own_with_its_own_label_only() -> None:
    log = [Row(0, "show"), Row(4, "click"), Row(5, "rate", value=3)]
    found = events_of(log)
    assert list(found) == [0, 2]
    assert (found[0]["click"], found[0]["rating"]) == (1, None)
    assert {n: v for n, v in found[2].items() if v is not None} == {"rating": 3, "shown_rating": 3, "like": 0, "shown_like": 0}


def test_an_action_does_not_belong_to_an_older_impression_where_the_latest_is_too_old() -> None:
    assert labels_of([Row(0, "show"), Row(9, "click")], "click", config(attribution_hours=8)) == {0: 0, 1: 1}


def test_the_latest_value_of_a_numeric_label_counts() -> None:
    log = [Row(0, "show"), Row(1, "rate", value=5), Row(1, "rate", value=2), Row(0, "rate", value=1)]
    assert labels_of(log, "rating") == {0: 2}


def test_a_row_without_a_value_does_not_hide_an_earlier_value() -> None:
    log = [Row(0, "show"), Row(1, "buy", value=7), Row(2, "buy")]
    [labels] = events_of(log).values()
    assert (labels["bought"], labels["price"]) == (1, 7)


def test_with_a_request_an_action_belongs_to_the_impression_of_that_request() -> None:
    log = [Row(0, "show", request="a"), Row(1, "show", request="b"), Row(99, "click", request="a"), Row(2, "click", request="c")]
    assert labels_of(log, "click", config(**BY_REQUEST)) == {0: 1, 1: 0, 3: 1}


def test_the_attribution_window_bounds_requests_too() -> None:
    log = [Row(0, "show", request="a"), Row(5, "click", request="a")]
    assert labels_of(log, "click", config(request="request")) == {0: 0, 1: 1}


def test_rows_without_a_request_match_nothing() -> None:
    log = [Row(0, "show"), Row(1, "click")]
    assert labels_of(log, "click", config(**BY_REQUEST)) == {0: 0, 1: 1}


def test_unmatched_actions_that_are_no_events_are_counted_all_the_same() -> None:
    log = [Row(0, "click", "y", user="w"), Row(0, "show"), Row(1, "click"), Row(2, "click", "y")]
    out = joined(log, config(unmatched="quarantine"))
    assert out.events[ROW].to_pylist() == [1] and out.unmatched.tolist() == [False, False, True, True]
    assert out.counts() == {"matched": 1, "unmatched": 2, "late_click": 0, "late_bought": 0, "late_price": 0, "late_rating": 0}
    for name, left in (("user_id", "u"), ("item_id", "x")):
        assert out.events[name].combine_chunks().dictionary.to_pylist() == [left]


def test_without_impressions_every_row_is_an_event() -> None:
    log = [Row(0, "click"), Row(1, "buy", value=3), Row(1, "click")]
    found = events_of(log, config(impression=None, attribution_hours=None))
    assert [(r, e["click"], e["bought"], e["price"]) for r, e in found.items()] == [
        (0, 1, None, None),
        (1, None, 1, 3),
        (2, 1, None, None),
    ]


@pytest.mark.parametrize("same_time", ["group", "order"])
def test_a_label_that_comes_after_the_next_event_began_is_the_targets_but_not_the_historys(same_time: str) -> None:
    log = [Row(0, "show"), Row(1, "rate", value=5), Row(2, "show", "y"), Row(2, "click"), Row(3, "rate", value=1)]
    out = joined(log, run_config(same_time=same_time).data)
    first = out.events.to_pylist()[0]
    assert (first["click"], first["rating"], first["like"]) == (1, 1, 0)
    assert (first["shown_click"], first["shown_rating"], first["shown_like"]) == (0, 5, 1)
    assert out.late == {"click": 1, "bought": 0, "price": 0, "rating": 1}


def test_ties_are_no_next_event_where_a_time_is_a_basket() -> None:
    log = [Row(0, "show"), Row(0, "show", "y"), Row(1, "click"), Row(2, "show", "z")]
    assert labels_of(log, "shown_click")[0] == 1
    assert labels_of(log, "shown_click", run_config(same_time="order").data)[0] == 0


def test_an_organic_event_ends_what_is_known_of_the_one_before() -> None:
    log = [Row(0, "show"), Row(1, "click", "y"), Row(2, "click")]
    assert labels_of(log, "shown_click") == {0: 0, 1: 1}
    assert labels_of(log, "shown_click", config(unmatched="quarantine")) == {0: 1}


def test_other_users_end_nothing() -> None:
    log = [Row(0, "show", user="u"), Row(1, "show", user="a"), Row(1, "show", user="w"), Row(2, "click", user="u")]
    assert labels_of(log, "shown_click")[0] == 1


def test_a_partition_without_rows_has_no_events() -> None:
    assert len(joined([]).events) == 0


def test_a_late_label_is_a_target_and_not_in_the_window_that_follows() -> None:
    run = run_config()
    log = [Row(0, "show"), Row(1, "rate", value=2), Row(2, "show", "y"), Row(3, "click", "y"), Row(4, "show", "z")]
    log += [Row(4, "rate", value=5), Row(4, "buy", value=8), Row(5, "click", "y")]  # all of them late
    events = fit.to_events(run, joined(log, run.data).events)
    assert events.is_history.tolist() == [True, True, False] and events.is_positive.tolist() == [True, False, False]
    split = np.zeros(3, np.int8)
    layout = windows.train_layout(events, split, 10, "group")
    [row] = windows.windows_table(
        layout, events, np.arange(3, dtype=np.int32), split, {}, {}, ["click", "bought", "rating"], {}, np.zeros(1, np.int8)
    ).to_pylist()
    assert row["history_item"] == [0, 1] and row["target_pos"] == [0, 1, 2]
    assert row["history_action_click"] == [0, 1] and row["history_action_bought"] == [0, 0]
    assert row["history_action_rating"][0] == 2 and row["history_positive"] == [0, 0]
    assert row["label_rating"][0] == 5 and row["label_bought"] == [1, 0, 0] and row["target_positive"] == [1, 0, 0]
    stored = windows.store_table(windows.store_layout(events, split, "time", 10, "group"), events, ["rating"], []).to_pylist()
    assert stored[0]["history_action_rating"][0] == 2


# --------------------------------------------------------------------------- against plain loops

_logs = st.lists(
    st.builds(
        Row,
        time=st.integers(0, 8),
        type=st.sampled_from(["show", "show", "click", "buy", "rate"]),
        item=st.sampled_from(["x", "y"]),
        value=st.sampled_from([None, 1.0, 2.0, 5.0]),
        request=st.sampled_from([None, "a", "b"]),
        user=st.sampled_from(["u", "v"]),
    ),
    max_size=14,
)
_sections = st.sampled_from(
    [{}, {"attribution_hours": 2}, BY_REQUEST, {"request": "request"}, {"unmatched": "quarantine"},
     {"impression": None, "attribution_hours": None,
      "labels": {"click": "click", "bought": "buy", "price": "rate", "rating": "show"}}]
)  # fmt: skip
_orders = st.sampled_from(["group", "order"])


def moment(log: list[Row], row: int, data: DataConfig) -> tuple[int, ...]:
    return (log[row].time,) if data.same_time == "group" else (log[row].time, row)


def reference(log: list[Row], data: DataConfig) -> dict[int, dict[str, float | None]]:
    """The plain labels of every event and what the history shows of them, row by row."""
    long = data.long
    assert long is not None
    order = sorted(range(len(log)), key=lambda i: (log[i].time, i))
    owner: dict[int, int] = {}
    for i in order:
        if log[i].type == long.impression:
            owner[i] = i
            continue
        best = None
        for j in order:
            same = (log[j].user, log[j].item) == (log[i].user, log[i].item) and log[j].type == long.impression
            if same and long.request is not None:
                same = log[j].request is not None and log[j].request == log[i].request
            if same and moment(log, j, data) <= moment(log, i, data):
                best = j
        if best is not None and long.attribution_hours is not None and log[i].time - log[best].time > long.attribution_hours:
            best = None
        if best is not None:
            owner[i] = best
        elif long.unmatched == "keep":
            owner[i] = i
    events = [i for i in order if owner.get(i) == i]
    out: dict[int, dict[str, float | None]] = {}
    for e in events:
        after = [moment(log, o, data) for o in events if log[o].user == log[e].user and moment(log, o, data) > moment(log, e, data)]
        out[e] = {}
        for name, kind in long.labels.items():
            for prefix, end in (("", (99,)), ("shown_", min(after, default=(99,)))):
                mine = [r for r in order if owner.get(r) == e and log[r].type == kind and moment(log, r, data) < end]
                if data.labels[name].kind == "binary":
                    missing = 0.0 if log[e].type == long.impression else None
                    out[e][prefix + name] = 1.0 if mine else missing
                else:
                    values = [log[r].value for r in mine if log[r].value is not None]
                    out[e][prefix + name] = values[-1] if values else None
    return out


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(log=_logs, section=_sections, same_time=_orders)
def test_the_join_equals_plain_loops(log: list[Row], section: dict[str, Any], same_time: str) -> None:
    data = run_config(same_time=same_time, **section).data
    expected = reference(log, data)
    found = events_of(log, data)
    assert {e: {n: labels[n] for n in expected[e]} for e, labels in found.items()} == expected
    out = joined(log, data)
    assert len(out.events) + out.matched + (out.unmatched.sum() if section.get("unmatched") == "quarantine" else 0) == len(log)
    for name in ("click", "bought", "price", "rating"):
        assert out.late[name] == sum(labels[name] != labels[f"shown_{name}"] for labels in expected.values())


def histories(log: list[Row], run: RunConfig) -> dict[int, list[Any]]:
    """Row of each event -> all that a target there sees of its user's history, and -1 - user: all that is ever shown."""
    events = fit.to_events(run, joined(log, run.data).events)
    visible = windows.visible_history(events, events.is_history, run.data.same_time)
    items = events.item_ids.to_pylist()
    assert events.shown_positive is not None
    shown = [events.shown_positive, *events.shown.values()]
    out = {}
    for user, name in enumerate(events.user_ids.to_pylist()):
        mine = np.flatnonzero(events.user == user)
        entries = [
            (log[events.row[i]], events.time[i], items[i], *(str(v[i]) for v in shown)) for i in mine if events.is_history[i]
        ]
        out |= {int(events.row[i]): entries[: visible[i]] for i in mine}
        out[-1 - ord(name)] = entries
    return out


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(log=_logs, section=_sections, same_time=_orders, history=st.sampled_from(["click > 0 or present(rating)", "1 > 0"]))
def test_what_a_target_sees_is_what_the_log_said_before_its_moment(
    log: list[Row], section: dict[str, Any], same_time: str, history: str
) -> None:
    """The log is cut before each target: its history is the same to the last value, so nothing in it came later."""
    run = run_config(history, same_time, **section)
    for row, seen in histories(log, run).items():
        if row >= 0:
            before = [r for i, r in enumerate(log) if moment(log, i, run.data) < moment(log, row, run.data)]
            assert histories(before, run).get(-1 - ord(log[row].user), []) == seen


# --------------------------------------------------------------------------- rows and settings that cannot be


def raw(*rows: dict[str, Any]) -> pa.Table:
    good = {"user_id": "u", "item_id": "i", "timestamp": "1000", "what": "rate", "number": "4", "request": "r"}
    table = {n: pa.array([(good | row)[n] for row in rows], pa.string()) for n in good}
    return pa.table(table | {ROW: pa.array(range(len(rows)), pa.int64())})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"what": None}, "what is missing"),
        ({"what": ""}, "what is missing"),
        ({"what": "swipe"}, "what is not one of ['show', 'click', 'buy', 'rate']"),
        ({"number": "good"}, "rating is not a number"),
        ({"number": "9"}, "rating is above 5"),
        ({"number": "0"}, "rating is below 1"),
        ({"number": None}, "rating is missing"),
        ({"what": "buy", "number": "cheap"}, "price is not a number"),
    ],
)
def test_a_bad_row_of_a_long_log_is_quarantined_with_its_reason(row: dict[str, Any], reason: str) -> None:
    rows, rejected = validate(raw({}, row, {}), config(), "log.csv")
    assert rows[ROW].to_pylist() == [0, 2] and rejected["reason"].to_pylist() == [reason]
    assert rows.schema == row_schema(config())


def test_a_value_is_read_only_where_the_type_gives_a_number() -> None:
    rows, rejected = validate(
        raw({"what": "click", "number": "?"}, {"what": "show", "number": "77"}, {"what": "buy"}), config(), "f"
    )
    assert len(rejected) == 0 and str(rows[VALUE].to_pylist()) == "[nan, nan, 4.0]"
    assert rows[REQUEST].to_pylist() == [None] * 3  # not configured
    rows, _ = validate(raw({}), config(**BY_REQUEST), "f")
    assert rows[REQUEST].to_pylist() == ["r"]


def test_the_columns_read_of_a_long_log_are_its_own() -> None:
    assert needed_columns(config(request="request")) == ["user_id", "item_id", "timestamp", "what", "number", "request"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": {"click": "click"}},
            r"data.long.labels: a type for each of the labels \['bought', 'click', 'price', 'rating'\]",
        ),
        (
            {"labels": {"click": "show", "bought": "buy", "price": "buy", "rating": "rate"}},
            "'show' are impressions and cannot give",
        ),
        ({"value": None}, r"data.long.value: the column with the numbers of \['price', 'rating'\]"),
        ({"impression": None}, "data.long.impression: without it nothing is matched"),
        ({"attribution_hours": None}, "data.long.attribution_hours: needed where there is no request"),
        ({"attribution_hours": 0}, "data.long.attribution_hours: Input should be greater than 0"),
        ({"when": "x"}, "data.long.when: unknown key"),
    ],
)
def test_a_section_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**change)


def test_a_label_that_would_stand_in_for_a_shown_one_is_refused() -> None:
    labels = {"click": {"kind": "binary"}, "shown_click": {"kind": "binary"}}
    long = {"labels": {"click": "a", "shown_click": "b"}}
    with pytest.raises(ValueError, match=r"\['shown_click'\] would stand in"):
        DataConfig.model_validate({"interactions": {"path": "log"}, "labels": labels, "long": long})


# --------------------------------------------------------------------------- prepare


def write_long_log(folder: Path) -> dict[str, int]:
    """The tiny wide log as a long one in long/*.csv: clicks and ratings come minutes later, each as a row -> rows."""
    rng = np.random.default_rng(5)
    rows: list[list[Any]] = []
    for path in sorted((folder / "log").glob("*.csv")):
        with open(path, newline="", encoding="utf-8") as file:
            for wide in csv.DictReader(file):
                user, item, time = wide["user"], wide["item"], int(wide["ts"])
                request = f"{user}@{time}"
                rows.append([user, item, time, "show", "", request, wide["device"]])
                later = [time + int(m) * 60_000 for m in rng.integers(1, 50, 2)]
                if wide["click"] == "1":
                    rows.append([user, item, min(later), "click", "", request, "?"])
                if wide["rating"]:
                    rows.append([user, item, max(later), "rate", wide["rating"], request, "?"])
    rows.sort(key=lambda r: r[2])
    (folder / "long").mkdir()
    for number, part in enumerate(np.array_split(np.arange(len(rows)), 2)):
        with open(folder / "long" / f"part{number}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "ts", "what", "number", "request", "device"])
            writer.writerows(rows[i] for i in part)
    return {kind: sum(r[3] == kind for r in rows) for kind in ("show", "click", "rate")}


def tiny_config(folder: Path, change: dict[str, Any]) -> RunConfig:
    return tiny.make_config(folder, lambda raw: raw["data"].update(change))


def long_section(**change: Any) -> dict[str, Any]:
    return {"type": "what", "value": "number", "impression": "show", "labels": {"click": "click", "rating": "rate"}, **change}


@pytest.mark.slow
@pytest.mark.parametrize("match", [{"request": "request"}, {"attribution_hours": 1}])
def test_a_long_log_and_the_wide_log_that_says_the_same_give_the_same_windows(tmp_path: Path, match: dict[str, Any]) -> None:
    tiny.write_log(tmp_path)
    counted = write_long_log(tmp_path)
    interactions = tiny.raw_config(tmp_path)["data"]["interactions"] | {"path": str(tmp_path / "long")}
    wide = tiny.prepare_locally(tiny.make_config(tmp_path), tmp_path / "a")
    change = {"interactions": interactions, "long": long_section(**match)}
    long = tiny.prepare_locally(tiny_config(tmp_path, change), tmp_path / "b")
    for part in ("windows/train", "windows/valid", "windows/test", "store", "catalogue.parquet"):
        one, two = (storage.read_table(d.path(part)) for d in (wide, long))
        names = [n for n in one.column_names if n not in ("history_row", "target_row")]
        assert one.column_names == two.column_names and len(one) > 0
        for name in names:
            assert str(one[name].to_pylist()) == str(two[name].to_pylist()), (part, name)  # text, for NaN is not NaN
    assert Path(wide.path("schema.json")).read_bytes() == Path(long.path("schema.json")).read_bytes()
    rows = long.manifest["rows"]
    assert rows["read"] == sum(counted.values()) and rows["events"] == counted["show"]
    assert rows["matched"] == counted["click"] + counted["rate"]
    assert (rows["unmatched"], rows["late_click"], rows["late_rating"]) == (0, 0, 0)
    assert not {"matched", "unmatched"} & set(wide.manifest["rows"])
    assert long.manifest["test_sha256"] == wide.manifest["test_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("unmatched", ["keep", "quarantine"])
def test_every_row_of_a_long_log_is_an_event_a_label_or_in_quarantine(tmp_path: Path, unmatched: str) -> None:
    tiny.write_log(tmp_path)
    counted = write_long_log(tmp_path)
    with open(tmp_path / "long" / "more.csv", "w", newline="", encoding="utf-8") as file:
        time = 1_700_000_000_000
        writer = csv.writer(file)
        writer.writerow(["user", "item", "ts", "what", "number", "request", "device"])
        writer.writerows([["u0", "i0", time, "swipe", "", "", ""], ["u0", "i0", time, "click", "", "", ""]])
        writer.writerows([["u0", "i0", time, "click", "", "", ""], ["u0", "i1", time, "rate", 9, "", ""]])
    interactions = tiny.raw_config(tmp_path)["data"]["interactions"] | {"path": str(tmp_path / "long")}
    change = {"interactions": interactions, "long": long_section(request="request", unmatched=unmatched)}
    prepared = tiny.prepare_locally(tiny_config(tmp_path, change), tmp_path / "data")
    rows = prepared.manifest["rows"]
    reasons = {"duplicate event": 1, "rating is above 5": 1, "what is not one of ['show', 'click', 'rate']": 1}
    if unmatched == "quarantine":
        reasons["what matches no show"] = 1
    assert rows["reasons"] == reasons and rows["quarantined"] == sum(reasons.values())
    assert rows["read"] == sum(counted.values()) + 4 == rows["events"] + rows["matched"] + rows["quarantined"]
    assert rows["unmatched"] == 1 and rows["events"] == counted["show"] + (unmatched == "keep")
    assert rows["events"] == rows["train_targets"] + rows["valid_targets"] + rows["test_targets"]
