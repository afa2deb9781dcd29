"""JSON Lines, MovieLens files, Hive partitions and compressed text."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtrec_ray.config import ConfigError, TableConfig, parse_config
from mtrec_ray.data.sources import SourceError, id_strings, jsonl, list_units
from tests.tiny import raw_config, read_all
from tests.unit.test_sources import FILE, read


def json_lines(path: Path, rows: Iterable[Any]) -> TableConfig:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows), encoding="utf-8")
    return TableConfig(path=str(path), format="jsonl")


# --------------------------------------------------------------------------- JSON Lines


def test_json_lines_keep_types_and_a_missing_key_is_null(tmp_path: Path) -> None:
    table = json_lines(tmp_path / "a.jsonl", [{"u": "007", "n": 1, "x": 4.5, "b": True}, {"u": "8"}, {"u": None, "n": None}])
    assert read(table, ["u", "n", "x", "b"]) == (
        [(0, "007", 1, 4.5, True), (1, "8", None, None, None), (2, None, None, None, None)],
        [],
    )


def test_nested_objects_are_addressed_by_dotted_names(tmp_path: Path) -> None:
    table = json_lines(
        tmp_path / "a.jsonl", [{"user": {"id": 5, "at": {"city": "Ulm"}}, "i": "x"}, {"user": None, "i": "y"}, {"i": "z"}]
    )
    table = table.model_copy(update={"columns": {"user_id": "user.id", "city": "user.at.city", "item_id": "i"}})
    assert read(table, ["user_id", "city", "item_id"])[0] == [(0, 5, "Ulm", "x"), (1, None, None, "y"), (2, None, None, "z")]


def test_a_line_that_is_no_object_is_a_broken_row_with_its_number_and_text(tmp_path: Path) -> None:
    lines = [
        '{"u": "a"}',
        "no json",
        '{"u": "b"',
        "[1]",
        "",
        '{"u": "c"} {"u": "d"}',
        '{"u": "\\ud800"}',
        '{"u": {"x": 1}}',
        '{"u": "e"}',
    ]
    rows, broken = read(json_lines(tmp_path / "a.jsonl", lines), ["u"])
    assert rows == [(0, "a"), (8, "e")]
    assert broken == [(i, lines[i]) for i in (1, 2, 3, 5, 6, 7)]


def test_an_object_over_two_lines_is_two_broken_rows(tmp_path: Path) -> None:
    rows, broken = read(json_lines(tmp_path / "a.jsonl", ['{"u":', '"a"}', '{"u": "b"}']), ["u"])
    assert rows == [(2, "b")] and broken == [(0, '{"u":'), (1, '"a"}')]


def test_a_line_of_bytes_that_are_not_utf8_is_a_broken_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"u": "a"}\n{"u": "caf\xe9"}\n{"u": "b"}\n')
    rows, broken = read(TableConfig(path=str(tmp_path / "a.jsonl"), format="jsonl"), ["u"])
    assert rows == [(0, "a"), (2, "b")] and broken == [(1, '{"u": "caf\ufffd"}')]


def test_json_lines_of_other_programs_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"u": 1}\r\n\r\n{"u": 2}')
    assert read(TableConfig(path=str(tmp_path), format="jsonl"), ["u"]) == ([(0, 1), (2, 2)], [])


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([1, "1", 2.0, 2.5, True, None], ["1", "1", "2", "2.5", "true", None]),
        ([1, 2.5], ["1", "2.5"]),
        ([2**70, 1], [str(2**70), "1"]),
        ([2**63 + 1], [str(2**63 + 1)]),
        (["2020-01-01", "2020-01-02"], ["2020-01-01", "2020-01-02"]),
        (["1.0", "01"], ["1.0", "01"]),
        (["\u0000", "ع", "😀", "a\nb", " "], ["\u0000", "ع", "😀", "a\nb", " "]),
    ],
)
def test_json_values_of_mixed_kinds_become_the_same_ids(tmp_path: Path, values: list[Any], texts: list[str | None]) -> None:
    table = json_lines(tmp_path / "a.jsonl", [{"u": v} for v in values])
    assert read_all(table, ["u"], "items")["u"].to_pylist() == texts


def test_a_value_that_changes_its_kind_late_in_the_file_is_kept(tmp_path: Path) -> None:
    table = json_lines(tmp_path / "a.jsonl", [*({"u": i} for i in range(500)), {"u": "x"}, {"v": 1}, {"u": {}}])
    rows, broken = read(table, ["u", "v"])
    assert [str(r[1]) for r in rows] == [*map(str, range(500)), "x", "None"]
    assert rows[-1][2] == 1 and broken == [(502, '{"u": {}}')]


def test_files_of_many_blocks_keep_row_numbers_and_broken_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_BLOCK", 1000)
    lines = ["broken" if i % 100 == 7 else json.dumps({"u": f"é{i}", "n": i}) for i in range(2000)]
    rows, broken = read(json_lines(tmp_path / "a.jsonl", lines), ["u", "n"])
    assert rows == [(i, f"é{i}", i) for i in range(2000) if i % 100 != 7]
    assert broken == [(i, "broken") for i in range(7, 2000, 100)]


def test_a_sparse_key_is_read_by_the_fast_way(tmp_path: Path) -> None:
    text = "".join(json.dumps({"u": i, **({"n": i} if i == 900 else {})}) + "\n" for i in range(1000)).encode()
    block = jsonl._fast(text, ["u", "n"], 1000, lists=frozenset())
    assert block is not None and block["n"].null_count == 999 and block["n"][900].as_py() == 900


_value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=4))


@pytest.mark.slow
@example([{"u": 2**53 + 1}, {"u": 0.0}])
@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.fixed_dictionaries({}, optional={"u": _value, "v": st.one_of(st.integers(0, 5), st.text(max_size=3))}), max_size=6)
)
def test_the_fast_way_gives_what_line_by_line_gives(rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    fast = jsonl._fast(text, ["u", "v"], len(rows), lists=frozenset())
    if fast is not None:
        slow, _, broken = jsonl._slow(text, ["u", "v"], 0, lists=frozenset())
        assert not broken and fast.num_rows == slow.num_rows
        for name in ("u", "v"):
            assert id_strings(fast[name]).to_pylist() == id_strings(slow[name]).to_pylist()


def test_lists_of_text_are_joined_in_items_and_refused_as_ids(tmp_path: Path) -> None:
    rows = [
        {"i": "a", "c": ["x", "y"]},
        {"i": "b", "c": []},
        {"i": "c"},
        {"i": "d", "c": ["é", None, "z"]},
        {"i": "e", "c": [1, 2.0]},
    ]
    table = json_lines(tmp_path / "a.jsonl", rows)
    assert read_all(table, ["i", "c"], "items")["c"].to_pylist() == ["x, y", None, None, "é, z", "1, 2"]
    with pytest.raises(SourceError, match=r"a\.jsonl: column 'c' .* is of type list<.*>, not one value per row"):
        list_units(table, ["c"], "interactions")


def test_an_object_as_an_id_is_refused_with_what_to_name_instead(tmp_path: Path) -> None:
    table = json_lines(tmp_path / "a.jsonl", [{"user_id": {"id": 1}}])
    with pytest.raises(SourceError, match=r"interactions: .*a\.jsonl: column 'user_id' .* is an object.* such as user_id\.id"):
        list_units(table, ["user_id"], "interactions")


def test_a_json_file_without_ids_is_refused_and_without_a_label_is_not(tmp_path: Path) -> None:
    table = json_lines(tmp_path / "a.jsonl", [{"user": 1}])
    assert list_units(table, ["rare_label"], "interactions")
    with pytest.raises(SourceError, match=r"a\.jsonl has no column 'user_id'.*it has \['user'\].*data\.interactions\.columns"):
        list_units(table, ["user_id"], "interactions")


def test_an_empty_json_lines_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    json_lines(tmp_path / "b.jsonl", [{"u": 1}])
    assert read(TableConfig(path=str(tmp_path), format="jsonl"), ["u"])[0] == [(FILE, 1)]


# --------------------------------------------------------------------------- compressed


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize(("ending", "pack"), [(".gz", gzip.compress), (".zst", zstd), (".bz2", bz2.compress), ("", bytes)])
@pytest.mark.parametrize(("format", "text"), [("csv", b"u\n1\n2\n"), ("jsonl", b'{"u": "1"}\n{"u": "2"}\n')])
def test_compressed_text_is_read_by_the_ending_of_its_name(
    tmp_path: Path, ending: str, pack: Any, format: str, text: bytes
) -> None:
    (tmp_path / f"a.{format}{ending}").write_bytes(pack(text))
    (tmp_path / f"a.other{ending}").write_bytes(b"not ours")
    assert read(TableConfig(path=str(tmp_path), format=format), ["u"]) == ([(0, "1"), (1, "2")], [])  # type: ignore[arg-type]


def test_a_compressed_file_of_a_header_alone_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"u,v\n"))
    assert read(TableConfig(path=str(tmp_path), format="csv"), ["u"]) == ([], [])


# --------------------------------------------------------------------------- CSV


def test_a_csv_without_a_header_takes_its_names_from_the_config(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1;x\n2;y\n")
    table = TableConfig(path=str(tmp_path), format="csv", delimiter=";", header=("u", "i"))
    assert read(table, ["i", "u"])[0] == [(0, "x", "1"), (1, "y", "2")]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_csv_of_another_encoding_is_read_as_the_config_says(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.csv").write_bytes("u,né\n1,café\n".encode(encoding))
    table = TableConfig(path=str(tmp_path), format="csv", encoding=encoding)
    assert read(table, ["u", "né"])[0] == [(0, "1", "café")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"delimiter": "::"}, "delimiter: one"),
        ({"format": "jsonl", "delimiter": ","}, "delimiter: one"),
        ({"format": "parquet", "header": ["a"]}, "belong to format csv"),
        ({"format": "csv", "encoding": "klingon"}, "'klingon' is unknown"),
    ],
)
def test_settings_of_another_format_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    raw = raw_config(tmp_path)
    raw["data"]["interactions"] |= change
    with pytest.raises(ConfigError, match=words):
        parse_config(raw)


# --------------------------------------------------------------------------- Hive partitions


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_partitions_named_in_the_path_are_columns_of_strings(tmp_path: Path, format: str) -> None:
    for day, store, value in (("2024-01-02", "a b%2F", 2), ("2024-01-01", "x", 1), ("2024-01-03", "__HIVE_DEFAULT_PARTITION__", 3)):
        folder = tmp_path / f"day={day}" / f"store={store}"
        folder.mkdir(parents=True)
        if format == "parquet":
            pq.write_table(pa.table({"n": [value]}), folder / "p.parquet")
        elif format == "csv":
            (folder / "p.csv").write_text(f"n\n{value}\n")
        else:
            (folder / "p.jsonl").write_text(f'{{"n": {value}}}\n')
    table = TableConfig(path=str(tmp_path), format=format, columns={"when": "day"})  # type: ignore[arg-type]
    rows, _ = read(table, ["n", "when", "store"])
    assert [(int(r[1]), *r[2:]) for r in rows] == [(1, "2024-01-01", "x"), (2, "2024-01-02", "a b/"), (3, "2024-01-03", None)]


def test_a_partition_that_one_path_lacks_is_refused_with_the_file(tmp_path: Path) -> None:
    for folder in ("day=1", "other"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"n": [1]}), tmp_path / folder / "p.parquet")
    with pytest.raises(SourceError, match=r"other/p\.parquet has no column 'day'"):
        list_units(TableConfig(path=str(tmp_path)), ["n", "day"], "interactions")


# --------------------------------------------------------------------------- MovieLens


def movielens(path: Path, text: str, encoding: str = "latin-1") -> TableConfig:
    path.write_bytes(text.encode(encoding))
    return TableConfig(path=str(path), format="movielens")


RATINGS = ["user_id", "item_id", "rating", "timestamp"]
MOVIES = ["item_id", "title", "year", "genres"]
USERS = ["user_id", "gender", "age", "occupation", "zip"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("u.data", "196\t242\t3\t881250949\n186\t302\t3.5\t891717742\n"),
        ("ratings.dat", "196::242::3::881250949\n186::302::3.5::891717742\n"),
        ("ratings.csv", "userId,movieId,rating,timestamp\n196,242,3,881250949\n186,302,3.5,891717742\n"),
    ],
)
def test_ratings_of_every_movielens_are_one_table(tmp_path: Path, name: str, text: str) -> None:
    rows, broken = read(movielens(tmp_path / name, text), RATINGS)
    assert rows == [(0, "196", "242", "3", "881250949"), (1, "186", "302", "3.5", "891717742")] and not broken


def flags(*on: int) -> str:
    return "|".join("1" if i in on else "0" for i in range(19))


@pytest.mark.parametrize(
    ("name", "text", "encoding"),
    [
        (
            "u.item",
            f"1|Toy Story (1995)|01-Jan-1995||http://x|{flags(3, 4, 5)}\n2|Misérables, Les (1995)|||u|{flags()}\n"
            f"3|unknown||||{flags(0)}\n",
            "latin-1",
        ),
        (
            "movies.dat",
            "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1995)::\n3::unknown::unknown\n",
            "latin-1",
        ),
        (
            "movies.csv",
            "movieId,title,genres\r\n1,Toy Story (1995),Animation|Children's|Comedy\r\n"
            '2,"Misérables, Les (1995)",(no genres listed)\r\n3,unknown,unknown\r\n',
            "utf-8",
        ),
    ],
)
def test_movies_of_every_movielens_are_one_table(tmp_path: Path, name: str, text: str, encoding: str) -> None:
    assert read_all(movielens(tmp_path / name, text, encoding), MOVIES, "items").to_pylist() == [
        {"item_id": "1", "title": "Toy Story", "year": "1995", "genres": "Animation, Children's, Comedy"},
        {"item_id": "2", "title": "Misérables, Les", "year": "1995", "genres": None},
        {"item_id": "3", "title": "unknown", "year": None, "genres": "unknown"},
    ]


@pytest.mark.parametrize(
    ("name", "text"), [("u.user", "1|24|M|technician/engineer|85711\n"), ("users.dat", "1::M::24::17::85711\n")]
)
def test_users_of_every_movielens_are_one_table(tmp_path: Path, name: str, text: str) -> None:
    table = movielens(tmp_path / name, text)
    expected = {"user_id": "1", "gender": "M", "age": "24", "occupation": "technician/engineer", "zip": "85711"}
    assert read_all(table, USERS, "users").to_pylist() == [expected]


def test_a_broken_line_of_a_movielens_file_is_a_broken_row(tmp_path: Path) -> None:
    rows, broken = read(movielens(tmp_path / "ratings.dat", "1::2::3::4\n1::2::3\n5::6::7::8\n"), RATINGS)
    assert [r[0] for r in rows] == [0, 2] and [number for number, _ in broken] == [1]


def test_two_colons_are_found_where_a_block_of_the_file_ends_between_them() -> None:
    from mtrec_ray.data.sources.text import _Replace

    text = b"1::2:3::::4:"
    for cut in range(len(text)):
        replace = _Replace(b"::", b"|")
        assert replace(text[:cut]) + replace(text[cut:]) + replace(b"") == text.replace(b"::", b"|") if cut else True


@pytest.mark.parametrize("name", ["tags.csv", "ratings.txt"])
def test_another_file_is_no_movielens_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=f"interactions: .*{name} is no MovieLens file; name one of u.data"):
        list_units(movielens(tmp_path / name, "x"), RATINGS, "interactions")


def test_a_movielens_directory_is_refused_with_the_names_of_its_files(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is a directory; name one of its files: .*ratings\.dat"):
        list_units(TableConfig(path=str(tmp_path), format="movielens"), RATINGS, "interactions")


def test_a_movielens_column_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"u\.data has no column 'click'.*it has \['item_id', 'rating'"):
        list_units(movielens(tmp_path / "u.data", "1\t2\t3\t4\n"), ["click"], "interactions")


def test_a_compressed_movielens_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "u.data.gz").write_bytes(gzip.compress(b"1\t2\t3\t4\n"))
    assert read(TableConfig(path=str(tmp_path / "u.data.gz"), format="movielens"), RATINGS)[0] == [(0, "1", "2", "3", "4")]
