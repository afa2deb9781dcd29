from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_ray.config import DataConfig
from mtrec_ray.data import build, events, ids, sources
from mtrec_ray.data.catalogue import catalogue_rows, check_unique, item_columns, user_columns
from mtrec_ray.data.sources import SourceError

ITEMS = """item_id,name,year,genre,unused
b,Heat,1995,Crime,x
a,Alien,,Horror,x
d,,1999,,x
"""
USERS = """user_id,gender,age
u,F,30
v,,
"""

Make = Callable[..., DataConfig]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(items=..., users=..., **data) -> a data configuration over the CSV texts (None: no such table)."""

    def write(items: str | None = ITEMS, users: str | None = None, **change: Any) -> DataConfig:
        raw: dict[str, Any] = {"interactions": {"path": "log"}, "labels": {"rating": {}}}
        if items is not None:
            (tmp_path / "items.csv").write_text(items, encoding="utf-8")
            raw["items"] = {"format": "csv", "path": str(tmp_path / "items.csv")}
            raw["text"] = {"template": "{name} ({year}). {genre}", "title": "name", "columns": ["genre"]}
        if users is not None:
            (tmp_path / "users.csv").write_text(users, encoding="utf-8")
            raw["users"] = {"format": "csv", "path": str(tmp_path / "users.csv")}
            raw["attributes"] = {"sex": {"column": "gender"}, "age_group": {"column": "age", "bins": [25]}}
        return DataConfig.model_validate({**raw, **change})

    return write


def with_items(make: Make, text: dict[str, Any] | None, **items: Any) -> DataConfig:
    """A data configuration with another items table."""
    data = make(text=text)
    assert data.items is not None
    return data.model_copy(update={"items": data.items.model_copy(update=items)})


def read(data: DataConfig, what: str) -> pa.Table:
    """A table as preparation reads it, unit by unit, and its ids checked."""
    config, columns = (data.items, item_columns(data)) if what == "items" else (data.users, user_columns(data))
    assert config is not None
    job = events.Job(SimpleNamespace(data=data), tempfile.mkdtemp(), 1, {what: sources.list_units(config, columns, what)})
    for number in range(len(job.units[what])):
        events.read_table_unit(job, (what, number))
    if what == "users":
        table = events.users_of(job, 0)
        assert table is not None
        return table
    table = pa.concat_tables(build._item_units(build.Plan(job, []), columns))
    check_unique(table, "item_id", what)
    return table


def make_catalogue(
    data: DataConfig, counts: dict[str, int], recent: dict[str, int] | None = None, others: tuple[str, ...] = ()
) -> pa.Table:
    """counts: history events of the training items; others: items that have no training event."""
    logged = sorted({*counts, *others})
    shown = [counts.get(i, 0) for i in logged]
    partition = pa.table([logged, [int(i in counts) for i in logged], shown], schema=ids.ITEMS)
    items = read(data, "items") if data.items is not None else None
    found = ids.number_range([partition], [] if items is None else [items["item_id"].combine_chunks()])
    order = np.lexsort((found.rank, found.kind))
    item_ids = found.item_ids.take(pa.array(order))
    recents = np.array([(recent or {}).get(i, 0) for i in item_ids.to_pylist()], np.int64)
    return catalogue_rows(data, items, item_ids, found.kind[order] != ids.REST, found.count[order], recents)


# --------------------------------------------------------------------------- order and counts


def test_training_items_come_first_and_sorted_and_the_others_sorted_behind(make: Make) -> None:
    catalogue = make_catalogue(make(), {"z": 1, "d": 2, "b": 1}, others=("y", "c", "d"))
    assert catalogue["item_id"].to_pylist() == ["b", "d", "z", "a", "c", "y"]
    assert catalogue["trained"].to_pylist() == [True, True, True, False, False, False]


def test_the_order_does_not_depend_on_the_order_of_the_inputs(make: Make) -> None:
    one = make_catalogue(make(), {"b": 1, "d": 2}, others=("x", "y"))
    lines = ITEMS.splitlines()
    other = make_catalogue(make("\n".join([lines[0], *reversed(lines[1:])]) + "\n"), {"d": 2, "b": 1}, others=("y", "x", "x"))
    assert one.equals(other)


def test_an_id_is_one_item_whichever_source_names_it(make: Make) -> None:
    catalogue = make_catalogue(make(), {"a": 1}, others=("a", "b"))
    assert catalogue["item_id"].to_pylist() == ["a", "b", "d"]


def test_counts_are_those_of_the_training_part_and_zero_elsewhere(make: Make) -> None:
    catalogue = make_catalogue(make(), {"b": 3, "d": 0}, {"b": 2})
    assert catalogue.select(["item_id", "trained", "count", "recent_count"]).to_pylist() == [
        {"item_id": "b", "trained": True, "count": 3, "recent_count": 2},
        {"item_id": "d", "trained": True, "count": 0, "recent_count": 0},  # an impression alone makes it a training item
        {"item_id": "a", "trained": False, "count": 0, "recent_count": 0},
    ]


def test_ids_are_sorted_as_strings(make: Make) -> None:
    catalogue = make_catalogue(make(None), {"10": 1, "9": 1, "Z": 1, "a": 1, "é": 1})
    assert catalogue["item_id"].to_pylist() == ["10", "9", "Z", "a", "é"]


def test_integer_ids_of_a_typed_items_table_meet_the_strings_of_the_log(make: Make, tmp_path: Path) -> None:
    pq.write_table(pa.table({"item_id": [2, 1], "name": ["two", "one"]}), tmp_path / "items.parquet")
    data = with_items(make, text={"template": "{name}", "title": "name"}, path=str(tmp_path / "items.parquet"), format="parquet")
    catalogue = make_catalogue(data, {"1": 1})
    assert catalogue.select(["item_id", "text"]).to_pydict() == {"item_id": ["1", "2"], "text": ["one", "two"]}


# --------------------------------------------------------------------------- texts


def test_texts_follow_the_template_and_missing_fields_are_empty(make: Make) -> None:
    catalogue = make_catalogue(make(), {"b": 1})
    assert dict(zip(catalogue["item_id"].to_pylist(), catalogue["text"].to_pylist(), strict=True)) == {
        "b": "Heat (1995). Crime",
        "a": "Alien (). Horror",
        "d": "(1999).",  # stripped at both ends
    }


def test_the_title_is_the_id_where_the_items_table_has_none(make: Make) -> None:
    catalogue = make_catalogue(make(), {"b": 1})
    assert catalogue["title"].to_pylist() == ["Heat", "Alien", "d"]


def test_an_item_that_the_items_table_lacks_has_no_text_and_its_id_as_title(make: Make) -> None:
    catalogue = make_catalogue(make(), {"new": 1})
    assert catalogue.slice(0, 1).select(["item_id", "title", "text", "genre"]).to_pylist() == [
        {"item_id": "new", "title": "new", "text": None, "genre": None}
    ]


def test_further_columns_are_kept_with_their_missing_values(make: Make) -> None:
    catalogue = make_catalogue(make(), {})
    assert catalogue.column_names == ["item_id", "trained", "count", "recent_count", "title", "text", "genre"]
    assert catalogue["genre"].to_pylist() == ["Horror", "Crime", None]


def test_a_template_may_use_a_column_twice_and_the_id_and_braces(make: Make) -> None:
    data = make(text={"template": "{{{item_id}}} {name} {name}", "title": "name"})
    assert make_catalogue(data, {})["text"].to_pylist()[1] == "{b} Heat Heat"


def test_braces_inside_a_value_are_text(make: Make) -> None:
    data = make("item_id,name\na,{year} of {0}\n", text={"template": "{name}!", "title": "name"})
    assert make_catalogue(data, {})["text"].to_pylist() == ["{year} of {0}!"]


def test_without_text_items_are_ids_only(make: Make) -> None:
    data = make(text=None)
    catalogue = make_catalogue(data, {"b": 1})
    assert catalogue.column_names == ["item_id", "trained", "count", "recent_count", "title", "text"]
    assert catalogue["title"].to_pylist() == catalogue["item_id"].to_pylist() == ["b", "a", "d"]
    assert catalogue["text"].to_pylist() == [None] * 3


def test_without_an_items_table_the_catalogue_is_the_log(make: Make) -> None:
    catalogue = make_catalogue(make(None), {"x": 2}, others=("w",))
    assert catalogue.to_pylist() == [
        {"item_id": "x", "trained": True, "count": 2, "recent_count": 0, "title": "x", "text": None},
        {"item_id": "w", "trained": False, "count": 0, "recent_count": 0, "title": "w", "text": None},
    ]


def test_a_catalogue_of_nothing_is_an_empty_table(make: Make) -> None:
    assert make_catalogue(make("item_id,name,year,genre\n"), {}).num_rows == 0
    assert make_catalogue(make(None), {}).num_rows == 0


# --------------------------------------------------------------------------- the tables of items and users


def test_the_items_columns_read_are_those_of_template_title_and_extras_once(make: Make) -> None:
    assert item_columns(make()) == ["item_id", "name", "year", "genre"]
    assert item_columns(make(text=None)) == ["item_id"]
    assert item_columns(make(None)) == []


def test_items_are_read_as_strings_with_mapped_columns(make: Make, tmp_path: Path) -> None:
    (tmp_path / "goods.csv").write_text("sku,label\n007,Bond\n")
    columns = {"item_id": "sku", "name": "label"}
    data = with_items(make, text={"template": "{name}", "title": "name"}, path=str(tmp_path / "goods.csv"), columns=columns)
    assert read(data, "items").to_pylist() == [{"item_id": "007", "name": "Bond"}]


def test_there_are_no_items_and_users_without_their_tables(make: Make) -> None:
    assert item_columns(make(None)) == user_columns(make(None)) == []
    assert events.users_of(events.Job(SimpleNamespace(data=make(None)), "", 1), 0) is None


def test_users_are_read_with_the_columns_of_their_attributes(make: Make) -> None:
    assert read(make(None, USERS), "users").to_pylist() == [
        {"user_id": "u", "gender": "F", "age": "30"},
        {"user_id": "v", "gender": None, "age": None},
    ]


def test_a_double_item_id_is_refused_by_name(make: Make) -> None:
    with pytest.raises(SourceError, match=r"items: item_id 'b' occurs more than once \(1 such ids\)"):
        read(make(ITEMS + "b,Heat again,1995,Crime,x\n"), "items")


def test_double_item_ids_are_found_across_the_files_of_a_folder(make: Make, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("one", "two"):
        (tmp_path / "folder" / f"{name}.csv").write_text("item_id\na\n")
    data = with_items(make, text=None, path=str(tmp_path / "folder"))
    with pytest.raises(SourceError, match="'a' occurs more than once"):
        read(data, "items")


def test_a_missing_item_id_is_refused_with_its_row(make: Make) -> None:
    with pytest.raises(SourceError, match=r"items: .*items\.csv: 2 row\(s\) without item_id; the first is row 3$"):
        read(make(ITEMS + ',No id,2000,,x\n"",No id,2000,,x\n'), "items")


def test_double_and_missing_user_ids_are_refused_too(make: Make) -> None:
    with pytest.raises(SourceError, match="users: user_id 'u' occurs more than once"):
        read(make(None, USERS + "u,M,40\n"), "users")
    with pytest.raises(SourceError, match=r"users: .*users\.csv: 1 row\(s\) without user_id; the first is row 2"):
        read(make(None, USERS + ",M,40\n"), "users")


def test_a_field_of_the_template_that_the_items_table_lacks_is_refused(make: Make) -> None:
    data = make(text={"template": "{name} by {author}", "title": "name"})
    with pytest.raises(SourceError, match=r"has no column 'author'.*data\.items\.columns"):
        read(data, "items")


def test_an_attribute_column_that_the_users_table_lacks_is_refused(make: Make) -> None:
    with pytest.raises(SourceError, match=r"has no column 'age'.*data\.users\.columns"):
        read(make(None, "user_id,gender\nu,F\n"), "users")
