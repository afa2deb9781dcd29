"""Files that are damaged, vanish, change or differ from one another: the message names the file, nothing crashes otherwise."""

from __future__ import annotations

import gzip
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources import ROW, SourceError, id_strings, list_units, read_unit
from mtrec_ray.data.validate import validate
from tests.tiny import make_config, read_all
from tests.unit.test_sources import FILE, read


def parquet(path: Path, size: int = 3, /, **columns: Any) -> TableConfig:
    pq.write_table(pa.table(columns or {"u": [f"u{i}" for i in range(size)]}), path)
    return TableConfig(path=str(path.parent))


def csv_files(folder: Path, *texts: str | bytes) -> TableConfig:
    for number, text in enumerate(texts):
        (folder / f"{number}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return TableConfig(path=str(folder), format="csv")


# --------------------------------------------------------------------------- damaged files


def test_a_parquet_file_with_a_damaged_footer_among_many_is_named_before_anything_is_read(tmp_path: Path) -> None:
    for name in "abcde":
        table = parquet(tmp_path / f"{name}.parquet")
    content = (tmp_path / "c.parquet").read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    damaged = content[: -8 - length] + b"\xff" * length + content[-8:]
    (tmp_path / "c.parquet").write_bytes(damaged)
    with pytest.raises(SourceError, match=r"interactions: .*c\.parquet cannot be read as parquet"):
        list_units(table, ["u"], "interactions")


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_parquet_file_with_a_damaged_page_is_named_when_it_is_read(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"u": [f"user {i}" for i in range(20_000)]})
    pq.write_table(rows, path, compression=compression, use_dictionary=False, write_page_checksum=True)
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF  # one bit pattern in the middle of the data
    path.write_bytes(damaged)
    table = TableConfig(path=str(path))
    [unit] = list_units(table, ["u"], "interactions")
    with pytest.raises(SourceError, match=r"a\.parquet cannot be read as parquet"):
        list(read_unit(table, unit, ["u"]))


def test_no_byte_of_a_parquet_file_can_be_damaged_into_a_raw_traceback(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"u": [f"user {i}" for i in range(300)], "n": list(range(300))}), path, row_group_size=100)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            damaged[place] = rng.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read(TableConfig(path=str(path)), ["u", "n"])
        except SourceError as error:
            refused += "a.parquet" in str(error)
    assert refused > 100


@pytest.mark.parametrize("format", ["csv", "jsonl"])
@pytest.mark.parametrize("cut", [1, 5, 3000], ids=["in the checksum", "at the checksum", "in the middle"])
def test_compressed_text_that_ends_too_soon_is_named(tmp_path: Path, format: str, cut: int) -> None:
    lines = (f"{i},{i * 7919 % 1000}" if format == "csv" else f'{{"u": {i}, "v": {i * 7919 % 1000}}}' for i in range(5000))
    text = "\n".join(["u,v", *lines] if format == "csv" else lines) + "\n"
    path = tmp_path / f"a.{format}.gz"
    path.write_bytes(gzip.compress(text.encode())[:-cut])
    with pytest.raises(SourceError, match=rf"a\.{format}\.gz cannot be read as {format}: Truncated"):
        read(TableConfig(path=str(path), format=format), ["u"])  # type: ignore[arg-type]


def test_a_file_that_is_not_compressed_as_its_name_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_text("u\n1\n")
    with pytest.raises(SourceError, match=r"a\.csv\.gz cannot be read as csv"):
        list_units(TableConfig(path=str(tmp_path), format="csv"), ["u"], "interactions")


def test_an_empty_csv_file_among_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"interactions: .*1\.csv is empty"):
        list_units(csv_files(tmp_path, "u\n1\n", "", "u\n2\n"), ["u"], "interactions")


def test_files_without_rows_among_others_give_none(tmp_path: Path) -> None:
    assert read(csv_files(tmp_path, "u\n", "u\n1\n", "u"), ["u"]) == ([(FILE, "1")], [])
    for name, n in (("a", 0), ("b", 2), ("c", 0)):
        table = parquet(tmp_path / f"{name}.parquet", n)
    assert [r[1] for r in read(table, ["u"])[0]] == ["u0", "u1"]


@pytest.mark.parametrize("text", ['u,v\n1,a\n2,"b\n3,c\n4,d\n', 'u,v\n1,a\n2,"b\n3,c', 'u,v\n1,a\n"2,b\n3,c\n'])
def test_a_quote_that_is_never_closed_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match=r"0\.csv: a quote is opened and never closed; the last row holds every line"):
        read(csv_files(tmp_path, text), ["v"])


@pytest.mark.parametrize("text", ['u,v\n1,5" pipe\n2,b\n', 'u,v\n1,a\n2,5" pipe\n', 'u,v\n1,a\n2,"b\nb"\n', 'u,v\n1,a\n2,"b'])
def test_other_quotes_do_not_look_like_one_that_is_never_closed(tmp_path: Path, text: str) -> None:
    rows, broken = read(csv_files(tmp_path, text), ["u", "v"])
    assert [r[1] for r in rows] == ["1", "2"][: len(rows)] and not broken


@pytest.mark.slow
@pytest.mark.parametrize(
    "tail", ['2,"b\n' + "3,c\n" * 8_000_000, "2," + "b" * (30 << 20) + "\n3,c\n"], ids=["open quote", "long value"]
)
def test_a_csv_row_longer_than_a_block_is_named(tmp_path: Path, tail: str) -> None:
    with pytest.raises(SourceError, match=r"0\.csv: a row is longer than 8 MiB, or a quote is opened and never closed"):
        read(csv_files(tmp_path, "u,v\n1,a\n" + tail), ["u", "v"])


# --------------------------------------------------------------------------- bytes that are not UTF-8


def test_csv_rows_of_bytes_that_are_not_utf8_are_broken_rows_with_their_number(tmp_path: Path) -> None:
    rows, broken = read(csv_files(tmp_path, b"u,v\n1,a\n2,caf\xe9\n3,c\n\xff,d\n5,e\n"), ["u", "v"])
    assert rows == [(0, "1", "a"), (2, "3", "c"), (4, "5", "e")]
    assert broken == [(1, "2,caf\ufffd"), (3, "\ufffd,d")]


def test_a_row_with_both_faults_is_one_broken_row(tmp_path: Path) -> None:
    assert read(csv_files(tmp_path, b"u,v\n1,a\n2,\xe9,b\n3,\xe9\n4,c\n"), ["u"]) == (
        [(0, "1"), (2, "3"), (3, "4")],
        [(1, "2,\ufffd,b")],
    )


def test_characters_cut_by_the_end_of_a_block_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("u\n" + "x😀\n" * 3_000_000, encoding="utf-8")  # 18 MB: blocks of 8 MiB end inside
    table = TableConfig(path=str(tmp_path), format="csv")
    [unit] = list_units(table, ["u"], "interactions")
    found = [(block["u"].unique().to_pylist(), len(block), broken) for block, broken in read_unit(table, unit, ["u"])]
    assert all(values == ["x😀"] and not broken for values, _, broken in found)
    assert sum(n for _, n, _ in found) == 3_000_000


def test_bytes_that_are_not_utf8_in_a_column_that_is_not_read_do_not_matter(tmp_path: Path) -> None:
    assert read(csv_files(tmp_path, b"u,caf\xe9\n1,\xe9\n"), ["u"]) == ([(0, "1")], [])


def test_parquet_text_that_is_not_utf8_is_a_broken_row(tmp_path: Path) -> None:
    wrong = pa.StringArray.from_buffers(2, *pa.array([b"a", b"\xe9"]).buffers()[1:])
    table = parquet(tmp_path / "a.parquet", u=wrong, n=[1, 2])
    assert read(table, ["u", "n"]) == ([(0, "a", 1)], [(1, "2,\ufffd")])
    with pytest.raises(SourceError, match=r"items: .*a\.parquet row 1 holds bytes that are not UTF-8: '\ufffd'"):
        read_all(table, ["u"], "items")


# --------------------------------------------------------------------------- files that vanish or change


def vanish(path: Path) -> None:
    path.unlink()


def other_size(path: Path) -> None:
    path.write_bytes(path.read_bytes() * 2)


def same_size(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(0, 1_000_000_000))


@pytest.mark.parametrize("change", [vanish, other_size, same_size])
@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_a_file_that_vanishes_or_is_replaced_after_it_was_listed_is_named(
    tmp_path: Path, format: str, change: Callable[[Path], None]
) -> None:
    for name in "ab":
        if format == "parquet":
            parquet(tmp_path / f"{name}.parquet")
        else:
            (tmp_path / f"{name}.{format}").write_text("u\n1\n" if format == "csv" else '{"u": 1}\n')
    table = TableConfig(path=str(tmp_path), format=format)  # type: ignore[arg-type]
    units = list_units(table, ["u"], "interactions")
    change(tmp_path / f"b.{format}")
    assert list(read_unit(table, units[0], ["u"]))
    with pytest.raises(SourceError, match=rf"b\.{format} (is gone|was replaced or changed since the table was listed)"):
        list(read_unit(table, units[1], ["u"]))


def test_a_parquet_file_replaced_by_one_with_other_rows_is_named(tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet", 3)
    [unit] = list_units(table, ["u"], "interactions")
    parquet(tmp_path / "a.parquet", 4)
    from dataclasses import replace

    with pytest.raises(SourceError, match=r"a\.parquet was replaced .*: row group 0 had 3 rows"):
        list(read_unit(table, replace(unit, size=None, modified=None), ["u"]))


def test_a_file_that_vanishes_while_the_table_is_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = csv_files(tmp_path, "u\n1\n", "u\n2\n")
    from mtrec_ray.data.sources import units

    found = units._files(table, "interactions")
    (tmp_path / "1.csv").unlink()
    monkeypatch.setattr(units, "_files", lambda *_: found)
    with pytest.raises(SourceError, match=r"interactions: .*1\.csv cannot be read as csv"):
        list_units(table, ["u"], "interactions")


# --------------------------------------------------------------------------- schemas that change between files


def test_a_column_that_one_parquet_file_lacks_is_named_before_anything_is_read(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", u=[1], v=[1])
    table = parquet(tmp_path / "b.parquet", u=[1], w=[1])
    with pytest.raises(SourceError, match=r"b\.parquet has no column 'v' \(needed as 'v'\); it has \['u', 'w'\]"):
        list_units(table, ["u", "v"], "interactions")


IDS: list[pa.Array] = [
    pa.array([7, 10]),
    pa.array(["7", "10"]),
    pa.array([7.0, 10.0]),
    pa.array([7, 10], pa.uint64()),
    pa.array([7, 10], pa.int8()),
    pa.array([7, 10], pa.decimal128(12, 0)),
    pa.array(["7", "10"]).dictionary_encode(),
    pa.array([7, 10]).dictionary_encode(),
    pa.array(["7", "10"], pa.large_string()),
    pa.array(["7", "10"], pa.string_view()),
    pa.array([b"7", b"10"]),
]


def test_ids_come_out_the_same_whatever_type_each_file_gives_them(tmp_path: Path) -> None:
    for number, ids in enumerate(IDS):
        table = parquet(tmp_path / f"{number:02d}.parquet", u=ids)
    assert read_all(table, ["u"], "items")["u"].to_pylist() == ["7", "10"] * len(IDS)


def test_text_ids_are_kept_as_they_are_written(tmp_path: Path) -> None:
    odd = ["007", "1.0", "1", "1e3", " x ", "NULL", "nan", "😀", "\u202eע", "a\nb", "é", "e\u0301", "a\u0000b"]
    quoted = "u\n" + "".join(f'"{i}"\n' for i in odd)
    assert read_all(csv_files(tmp_path, quoted), ["u"], "items")["u"].to_pylist() == odd
    assert read_all(parquet(tmp_path / "a.parquet", u=odd), ["u"], "items")["u"].to_pylist() == odd


MILLISECONDS = [1_700_000_000_123, 1_700_000_001_000]
TIMES: list[pa.Array] = [
    pa.array(MILLISECONDS),
    pa.array(MILLISECONDS, pa.timestamp("ms")),
    pa.array([t * 1000 for t in MILLISECONDS], pa.timestamp("us")),
    pa.array([t * 1_000_000 for t in MILLISECONDS], pa.timestamp("ns")),
    pa.array(MILLISECONDS, pa.timestamp("ms", "Europe/Berlin")),
    pa.array([float(t) for t in MILLISECONDS]),
    pa.array([str(t) for t in MILLISECONDS]),
]


def events(table: TableConfig, folder: Path) -> pa.Table:
    data = make_config(folder, lambda raw: raw["data"].update(context=[])).data
    needed = ["user_id", "item_id", "timestamp", "click", "rating"]
    pieces = []
    for unit in list_units(table, needed, "interactions"):
        for block, _ in read_unit(table, unit, needed):
            good, bad = validate(block, data, unit.path, None, None)
            assert not len(bad), bad.to_pylist()
            pieces.append(good)
    return pa.concat_tables(pieces)


def test_times_may_be_timestamps_in_one_file_and_numbers_of_the_configured_unit_in_another(tmp_path: Path) -> None:
    for number, times in enumerate(TIMES):
        table = parquet(
            tmp_path / f"{number}.parquet", user_id=["a", "b"], item_id=[1, 2], click=[0, 1], rating=[1, 2], timestamp=times
        )
    assert events(table, tmp_path)["timestamp"].to_pylist() == MILLISECONDS * len(TIMES)


def test_dates_are_times_at_midnight(tmp_path: Path) -> None:
    for number, kind in enumerate((pa.date32(), pa.date64())):
        day = pa.array([19_675], pa.int32()).cast(pa.date32()).cast(kind)
        table = parquet(tmp_path / f"{number}.parquet", user_id=["a"], item_id=[1], click=[0], rating=[1], timestamp=day)
    assert events(table, tmp_path)["timestamp"].to_pylist() == [19_675 * 86_400_000] * 2


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (pa.array([["a"]]), "list<"),
        (pa.array([{"id": 1}]), "struct<"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "map<"),
        (pa.array([b"0123456789abcdef"], pa.binary(16)), "fixed_size_binary"),
        (pa.array([5], pa.duration("ms")), "duration"),
        (pa.array([5], pa.time32("ms")), "time32"),
    ],
)
def test_a_column_that_holds_no_plain_values_is_refused_by_its_name_before_anything_is_read(
    tmp_path: Path, column: pa.Array, kind: str
) -> None:
    parquet(tmp_path / "a.parquet", item_id=["x"])
    table = parquet(tmp_path / "b.parquet", item_id=column)
    with pytest.raises(
        SourceError, match=rf"interactions: .*b\.parquet: column 'item_id' .* is of type {kind}.*not one value per row"
    ):
        list_units(table, ["item_id"], "interactions")
    with pytest.raises(SourceError, match=r"items: .*b\.parquet: column 'item_id'"):
        read_all(table, ["item_id"], "items")


def test_lists_of_an_items_table_become_text_and_lists_of_objects_are_refused(tmp_path: Path) -> None:
    kinds = [pa.list_(pa.string()), pa.large_list(pa.string()), pa.list_(pa.string(), 2)]
    for number, kind in enumerate(kinds):
        table = parquet(tmp_path / f"{number}.parquet", item_id=["a", "b"], tags=pa.array([["x", "y"], ["z", None]], kind))
    assert read_all(table, ["item_id", "tags"], "items")["tags"].to_pylist() == ["x, y", "z"] * 3
    table = parquet(tmp_path / "z.parquet", item_id=["a"], tags=[[{"x": 1}]])
    with pytest.raises(SourceError, match=r"z\.parquet: column 'tags'"):
        read_all(table, ["item_id", "tags"], "items")


def test_lists_cut_out_of_larger_ones_are_joined_right() -> None:
    values = pa.array([["a"], ["b", "c"], None, [], ["d", None]])
    for start, end in itertools.combinations(range(6), 2):
        out = id_strings(pa.chunked_array([values.slice(start, end - start)])).to_pylist()
        assert out == ["a", "b, c", None, None, "d"][start:end]


def test_a_column_that_occurs_twice_is_refused_only_when_it_is_needed(tmp_path: Path) -> None:
    table = csv_files(tmp_path, "u,x,x\n1,2,3\n")
    assert read(table, ["u"])[0] == [(0, "1")]
    with pytest.raises(SourceError, match=r"0\.csv has the column 'x' \(needed as 'x'\) more than once"):
        list_units(table, ["u", "x"], "interactions")
    pq.write_table(pa.table([[1], [2], [3]], names=["u", "x", "x"]), tmp_path / "a.parquet")
    table = TableConfig(path=str(tmp_path))
    assert read(table, ["u"])[0] == [(0, 1)]
    with pytest.raises(SourceError, match=r"a\.parquet has the column 'x' .* more than once"):
        list_units(table, ["x"], "interactions")


# --------------------------------------------------------------------------- listing


def test_many_files_are_listed_at_once_and_the_first_error_in_their_order_is_the_one_raised(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02d}.csv").write_text("u\n1\n" if number % 20 else "w\n1\n")
    table = TableConfig(path=str(tmp_path), format="csv")
    with pytest.raises(SourceError, match=r"00\.csv has no column 'u'"):
        list_units(table, ["u"], "interactions")
    assert [Path(u.path).name for u in list_units(table, [], "interactions")] == [f"{n:02d}.csv" for n in range(60)]


def test_listing_reads_footers_and_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Iterable[Any]:
        raise AssertionError("data were read")

    parquet(tmp_path / "a.parquet", 1000)
    csv_files(tmp_path, "u\n1\n")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", forbidden)
    monkeypatch.setattr("pyarrow.csv.open_csv", forbidden)
    for format in ("parquet", "csv"):
        assert list_units(TableConfig(path=str(tmp_path), format=format), ["u"], "interactions")  # type: ignore[arg-type]


def test_row_numbers_are_int64(tmp_path: Path) -> None:
    table = parquet(tmp_path / "a.parquet")
    [unit] = list_units(table, ["u"], "interactions")
    [(block, _)] = read_unit(table, unit, ["u"])
    assert block.schema.field(ROW).type == pa.int64()
