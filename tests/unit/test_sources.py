from __future__ import annotations

import csv
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources import ROW, SourceError, Unit, id_strings, list_units, read_unit
from tests.tiny import read_all

Broken = list[tuple[int, str]]
FILE = 1 << 40  # the row numbers of the second file start here


def read(table: TableConfig, needed: Sequence[str], units: Iterable[Unit] | None = None) -> tuple[list[tuple[Any, ...]], Broken]:
    """(row number, values ...) of every row of the units in the order given, and the broken rows."""
    rows: list[tuple[Any, ...]] = []
    broken: Broken = []
    for unit in units if units is not None else list_units(table, list(needed), "interactions"):
        for block, bad in read_unit(table, unit, list(needed)):
            assert block.column_names == [*needed, ROW]
            rows += zip(block[ROW].to_pylist(), *(block[n].to_pylist() for n in needed), strict=True)
            broken += bad
    return rows, broken


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TableConfig]:
    """make(text, format=..., ...) -> the configuration of one file that holds the text."""

    def write(content: str | bytes, **settings: Any) -> TableConfig:
        path = tmp_path / "log.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return TableConfig(path=str(path), **{"format": "csv", **settings})

    return write


Make = Callable[..., TableConfig]


# --------------------------------------------------------------------------- CSV


def test_a_csv_file_is_read_as_strings_with_row_numbers(make: Make) -> None:
    table = make("user_id,item_id,rating\n1,007,4.50\n2,,\n")
    assert read(table, ["user_id", "item_id", "rating"]) == ([(0, "1", "007", "4.50"), (1, "2", None, None)], [])


def test_only_the_needed_columns_are_read_in_the_order_asked_for(make: Make) -> None:
    assert read(make("a,b,c\n1,2,3\n"), ["c", "a"])[0] == [(0, "3", "1")]


def test_columns_are_mapped_from_the_names_in_the_file(make: Make) -> None:
    table = make("who,what,item_id\nu,x,i\n", columns={"user_id": "who"})
    assert read(table, ["user_id", "item_id"])[0] == [(0, "u", "i")]


def test_one_column_may_serve_two_names(make: Make) -> None:
    assert read(make("a\n5\n", columns={"x": "a", "y": "a"}), ["x", "y"])[0] == [(0, "5", "5")]


def test_a_quoted_csv_keeps_delimiters_quotes_and_newlines_inside_quotes(make: Make) -> None:
    table = make('"a","b"\n"x,y","say ""hi"""\n"two\nlines","ü"\n')
    assert read(table, ["a", "b"]) == ([(0, "x,y", 'say "hi"'), (1, "two\nlines", "ü")], [])


@pytest.mark.parametrize(
    "content",
    ["a,b\r\n1,2\r\n", b"\xef\xbb\xbfa,b\n1,2\n", b'\xef\xbb\xbf"a","b"\n1,2\n', "a,b\n1,2", "a,b\n\n1,2\n\n"],
    ids=["CRLF", "byte order mark", "mark and quotes", "no newline at the end", "blank lines"],
)
def test_csv_of_other_programs_is_read_alike(make: Make, content: str | bytes) -> None:
    assert read(make(content), ["a", "b"]) == ([(0, "1", "2")], [])


def test_another_delimiter_is_used_where_the_config_says_so(make: Make) -> None:
    assert read(make("a;b\n1,5;2\n", delimiter=";"), ["a", "b"])[0] == [(0, "1,5", "2")]


def test_a_csv_of_a_header_alone_has_no_rows(make: Make) -> None:
    assert read(make("a,b\n"), ["a"]) == ([], [])
    assert read_all(make("a,b\n"), ["a"], "items").num_rows == 0


def test_a_csv_of_a_header_alone_without_a_newline_has_no_rows(make: Make) -> None:
    assert read(make("a,b"), ["a"]) == ([], [])


def test_rows_with_too_few_or_too_many_columns_come_back_as_broken_rows(make: Make) -> None:
    table = make("a,b\n1,2\n3\n5,6,7\n8,9\n")
    rows, broken = read(table, ["a", "b"])
    assert [r[1:] for r in rows] == [("1", "2"), ("8", "9")]
    assert broken == [(1, "3"), (2, "5,6,7")]


@pytest.mark.parametrize(
    ("content", "good", "bad"),
    [
        ("a,b\n1\n2,3,4\n", [], ["1", "2,3,4"]),
        ("a,b\n1\n2,3\n", ["2"], ["1"]),
        ("a,b\n2,3\n1\n", ["2"], ["1"]),
        ("a,b\n2,3\n1", ["2"], ["1"]),
    ],
    ids=["all", "first", "last", "last without a newline"],
)
def test_no_broken_row_is_lost_wherever_it_stands(make: Make, content: str, good: list[str], bad: list[str]) -> None:
    rows, broken = read(make(content), ["a", "b"])
    assert [r[1] for r in rows] == good and [text for _, text in broken] == bad


def test_broken_rows_of_a_file_of_many_blocks_are_counted_once(make: Make) -> None:
    line = "x" * 999
    lines = [line if i % 1000 == 500 else f"{line},{i}" for i in range(20_000)]  # about 20 MB: three blocks
    rows, broken = read(make("a,b\n" + "\n".join(lines) + "\n"), ["b"])
    assert len(rows) == 19_980 and len(broken) == 20
    assert [r[1] for r in rows] == [str(i) for i in range(20_000) if i % 1000 != 500]
    assert [number for number, _ in broken] == [i for i in range(20_000) if i % 1000 == 500]


def test_good_rows_keep_the_order_of_the_log_around_broken_ones(make: Make) -> None:
    rows, _ = read(make("a,b\n1,2\nbroken\n3,4\nbroken\n5,6\n"), ["a"])
    assert [r[1] for r in sorted(rows)] == ["1", "3", "5"]


def test_a_rows_number_is_its_position_in_the_file_behind_a_broken_row_too(make: Make) -> None:
    rows, broken = read(make("a,b\n1,2\nbroken\n3,4\n"), ["a", "b"])
    assert (rows, broken) == ([(0, "1", "2"), (2, "3", "4")], [(1, "broken")])


def test_quoted_newlines_are_read_in_files_of_many_blocks(make: Make) -> None:
    text = "first\n" + "x" * 5000 + "\nlast"  # 8 MiB end among the x: one newline before in the quotes, one behind
    rows, broken = read(make("a,b\n" + "".join(f'{i},"{text}"\n' for i in range(1800))), ["b"])
    assert not broken
    assert [r[1] for r in rows] == [text] * 1800


@pytest.mark.parametrize(("header", "needed"), [("a, b", ["a", "b"]), ('a,"b,c"', ["a", "b,c"])])
def test_a_header_with_spaces_or_quoted_delimiters_is_read(make: Make, header: str, needed: list[str]) -> None:
    assert read(make(header + "\n1,2\n"), needed)[0] == [(0, "1", "2")]


def test_a_parquet_file_that_breaks_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), path)
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)  # the footer stays whole
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"log\.parquet cannot be read as parquet"):
        read(TableConfig(path=str(path)), ["a"])


_odd_id = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(_odd_id, _odd_id), min_size=1, max_size=6))
def test_odd_unicode_ids_survive_a_quoted_csv(tmp_path_factory: pytest.TempPathFactory, ids: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("user_id", "item_id"), *ids])
    table = read_all(TableConfig(path=str(path), format="csv"), ["user_id", "item_id"], "items")
    # the empty string is a missing id
    assert list(zip(table["user_id"].to_pylist(), table["item_id"].to_pylist(), strict=True)) == [
        (u or None, i or None) for u, i in ids
    ]


@settings(max_examples=50, deadline=None)
@given(st.lists(_odd_id.filter(lambda s: not set(s) & set("\t\n\r") and s), min_size=1, max_size=6))
def test_odd_unicode_ids_survive_an_atomic_file(tmp_path_factory: pytest.TempPathFactory, ids: list[str]) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.inter"
    path.write_bytes("".join(f"{line}\n" for line in ["user_id:token\tn:float", *(f"{i}\t1" for i in ids)]).encode())
    rows, broken = read(TableConfig(path=str(path), format="recbole"), ["user_id", "n"])
    assert [r[1] for r in rows] == ids and not broken


# --------------------------------------------------------------------------- recbole


def test_an_atomic_file_is_tab_separated_with_typed_headers_and_knows_no_quotes(make: Make) -> None:
    table = make('user_id:token\titem_id:token\trating:float\n1\t"a\t4\n2\tb, c\t5\n', format="recbole")
    assert read(table, ["user_id", "item_id", "rating"])[0] == [(0, "1", '"a', "4"), (1, "2", "b, c", "5")]


def test_columns_of_an_atomic_file_are_mapped_by_their_plain_names(make: Make) -> None:
    table = make("item_id:token\tmovie_title:token_seq\n1\tHeat\n", format="recbole", columns={"title": "movie_title"})
    assert read(table, ["item_id", "title"])[0] == [(0, "1", "Heat")]


# --------------------------------------------------------------------------- Parquet


def write_parquet(path: Path, values: list[int], group: int, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"n": values, **columns}), path, row_group_size=group)


def test_every_row_group_of_every_parquet_file_is_a_unit(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", [5, 6], group=2)
    write_parquet(tmp_path / "a.parquet", [0, 1, 2, 3, 4], group=2)
    units = list_units(TableConfig(path=str(tmp_path)), ["n"], "interactions")
    assert [(u.number, Path(u.path).name, u.file_index, u.row_group, u.first_row) for u in units] == [
        (0, "a.parquet", 0, 0, 0),
        (1, "a.parquet", 0, 1, 2),
        (2, "a.parquet", 0, 2, 4),
        (3, "b.parquet", 1, 0, 0),
    ]


def test_row_numbers_are_the_file_times_2_to_the_40_plus_the_position(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [10, 11, 12], group=2)
    write_parquet(tmp_path / "b.parquet", [20, 21, 22], group=2)
    rows, _ = read(TableConfig(path=str(tmp_path)), ["n"])
    assert rows == [(0, 10), (1, 11), (2, 12), (FILE, 20), (FILE + 1, 21), (FILE + 2, 22)]


@pytest.mark.parametrize("format", ["parquet", "csv"])
def test_row_numbers_follow_the_log_whatever_order_units_are_read_in(tmp_path: Path, format: str) -> None:
    for number in range(3):
        values = list(range(number * 10, number * 10 + 7))
        if format == "parquet":
            write_parquet(tmp_path / f"part-{number}.parquet", values, group=3)
        else:
            (tmp_path / f"part-{number}.csv").write_text("n\n" + "".join(f"{v}\n" for v in values))
    table = TableConfig(path=str(tmp_path), format=format)  # type: ignore[arg-type]
    units = list_units(table, ["n"], "interactions")
    expected = [v for number in range(3) for v in range(number * 10, number * 10 + 7)]
    for seed in range(5):
        random.Random(seed).shuffle(units)
        rows, _ = read(table, ["n"], units)
        assert [int(v) for _, v in sorted(rows)] == expected
        assert len({row for row, _ in rows}) == len(expected)


def test_parquet_columns_keep_their_types_and_may_be_mapped_twice(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1], group=1, t=pa.array([5], pa.timestamp("us")))
    table = TableConfig(path=str(tmp_path / "a.parquet"), columns={"timestamp": "t", "again": "t"})
    [unit] = list_units(table, ["timestamp", "n"], "interactions")
    [(block, broken)] = read_unit(table, unit, ["timestamp", "again", "n"])
    assert block.schema.types == [pa.timestamp("us"), pa.timestamp("us"), pa.int64(), pa.int64()] and not broken


def test_a_parquet_file_without_rows_has_no_rows(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", pa.array([], pa.int64()), group=1)
    table = TableConfig(path=str(tmp_path))
    assert read(table, ["n"]) == ([], [])
    assert read_all(table, ["n"], "items").schema == pa.schema([("n", pa.string())])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1 this is no Parquet file PAR1", b"user_id,item_id\n"])
def test_a_corrupt_parquet_file_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    write_parquet(tmp_path / "a.parquet", [1], group=1)
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(SourceError, match=r"interactions: .*b\.parquet cannot be read as parquet"):
        list_units(TableConfig(path=str(tmp_path)), ["n"], "interactions")


def test_a_parquet_file_cut_off_in_the_middle_is_refused_with_its_name(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", list(range(1000)), group=100)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read as parquet"):
        list_units(TableConfig(path=str(tmp_path)), ["n"], "interactions")


# --------------------------------------------------------------------------- folders and refusals


def test_a_folder_means_its_files_of_the_format_in_name_order(tmp_path: Path) -> None:
    for name, value in (("b.csv", 2), ("a.csv", 1), ("inner/c.csv", 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"n\n{value}\n")
    (tmp_path / "readme.txt").write_text("not a log")
    (tmp_path / ".hidden.csv").write_text("n\n9\n")
    rows, _ = read(TableConfig(path=str(tmp_path), format="csv"), ["n"])
    assert rows == [(0, "1"), (FILE, "2"), (2 * FILE, "3")]


def test_files_of_a_folder_may_have_their_columns_in_different_orders(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    (tmp_path / "b.csv").write_text("y,z,x\n4,5,3\n")
    assert read(TableConfig(path=str(tmp_path), format="csv"), ["x", "y"])[0] == [(0, "1", "2"), (FILE, "3", "4")]


def test_a_path_may_be_a_uri(make: Make) -> None:
    table = make("a\n1\n")
    assert read(table.model_copy(update={"path": Path(table.path).as_uri()}), ["a"])[0] == [(0, "1")]


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"items: .*/nothing\.csv does not exist"):
        list_units(TableConfig(path=str(tmp_path / "nothing.csv"), format="csv"), ["a"], "items")


@pytest.mark.parametrize("format", ["parquet", "csv", "recbole"])
def test_an_empty_folder_is_refused(tmp_path: Path, format: str) -> None:
    with pytest.raises(SourceError, match=f"interactions: .* holds no {format} files"):
        list_units(TableConfig(path=str(tmp_path), format=format), ["a"], "interactions")  # type: ignore[arg-type]


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("a\n1\n")
    with pytest.raises(SourceError, match="holds no parquet files"):
        list_units(TableConfig(path=str(tmp_path)), ["a"], "interactions")


def test_an_empty_file_is_refused_with_its_name(make: Make) -> None:
    for format in ("csv", "recbole"):
        with pytest.raises(SourceError, match=r"interactions: .*log\.csv is empty"):
            list_units(make("", format=format), ["a"], "interactions")


@pytest.mark.parametrize("format", ["csv", "recbole", "parquet"])
def test_a_missing_column_is_refused_with_the_file_the_column_and_the_config_key(make: Make, format: str) -> None:
    table = make("who:token\tn:float\n" if format == "recbole" else "who,n\n", format=format, columns={"user_id": "customer"})
    if format == "parquet":
        pq.write_table(pa.table({"who": ["u"], "n": [1]}), table.path)
    with pytest.raises(SourceError) as caught:
        list_units(table, ["n", "user_id"], "interactions")
    message = str(caught.value)
    assert "log.csv has no column 'customer' (needed as 'user_id')" in message
    assert "it has ['n', 'who']" in message
    assert "data.interactions.columns" in message


def test_a_column_missing_from_the_last_of_many_files_is_found_before_reading(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    (tmp_path / "b.csv").write_text("y\n1\n")
    with pytest.raises(SourceError, match=r"b\.csv has no column 'x'"):
        list_units(TableConfig(path=str(tmp_path), format="csv"), ["x"], "interactions")


# --------------------------------------------------------------------------- whole tables and ids


def test_read_all_gives_strings_of_every_file_in_order(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [1, 2, 3], group=2, name=["x", "", None])
    write_parquet(tmp_path / "b.parquet", [4], group=2, name=["z"])
    table = read_all(TableConfig(path=str(tmp_path)), ["n", "name"], "items")
    assert table.schema == pa.schema([("n", pa.string()), ("name", pa.string())])
    assert table.to_pydict() == {"n": ["1", "2", "3", "4"], "name": ["x", None, None, "z"]}


def test_read_all_refuses_broken_rows_with_the_file_and_the_text(make: Make) -> None:
    with pytest.raises(SourceError, match=r"items: .*log\.csv row 1 has another number of columns, .*: '3'"):
        read_all(make("a,b\n1,2\n3\n"), ["a"], "items")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["a", "", None, " ", "é"]), ["a", None, None, " ", "é"]),
        (pa.array(["a", ""], pa.large_string()), ["a", None]),
        (pa.array(["a", "", "a"]).dictionary_encode(), ["a", None, "a"]),
        (pa.array([7, None, -1]), ["7", None, "-1"]),
        (pa.array([2**63], pa.uint64()), ["9223372036854775808"]),
        (pa.array([7.0, None, 12345678.0]), ["7", None, "12345678"]),
        (pa.array([7.0], pa.float32()), ["7"]),
        (pa.array([0.5, 7.0]), ["0.5", "7"]),
        (pa.array([], pa.float64()), []),
        (pa.nulls(2), [None, None]),
        (pa.array([True, None]), ["true", None]),
    ],
    ids=["string", "large string", "dictionary", "int", "uint64", "float", "float32", "fraction", "empty", "null", "bool"],
)
def test_ids_of_every_type_become_strings_and_empty_ones_are_missing(values: pa.Array, expected: list[str | None]) -> None:
    out = id_strings(pa.chunked_array([values]))
    assert out.type == pa.string() and out.to_pylist() == expected


@pytest.mark.parametrize("odd", [float("nan"), 1e20, float("inf")])
def test_float_ids_beyond_whole_numbers_do_not_stop_the_job(odd: float) -> None:
    out = id_strings(pa.chunked_array([pa.array([7.0, odd], pa.float64())])).to_pylist()
    assert out[0] == "7"
    assert (out[1] is None) == (odd != odd)  # NaN is a missing id
