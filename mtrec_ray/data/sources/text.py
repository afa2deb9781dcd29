"""CSV and RecBole atomic files: read in a stream, of bounded memory, by one task."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources.base import COMPRESSED, Block, Broken, Description, File, SourceError, Unit, doubled

_BLOCK = 8 << 20
_HEAD = 1 << 16
_LONGEST_HEADER = 4 << 20
_MARK = "\ufdd0"  # no character: Unicode leaves it to programs
_UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Layout:
    """How the text of a file is divided."""

    delimiter: str
    """One character, or `::`."""
    quoted: bool
    header: bool = True
    """Whether the first line holds names."""
    names: tuple[str, ...] | None = None
    """Names of the columns; None takes the header's."""
    encoding: str = "utf-8"


def layout_of(table: TableConfig) -> Layout:
    if table.format == "recbole":
        return Layout(table.delimiter or "\t", quoted=False)
    return Layout(table.delimiter or ",", quoted=True, header=table.header is None, names=table.header, encoding=table.encoding)


def suffixes() -> tuple[str, ...]:
    return tuple(".csv" + c for c in COMPRESSED)


def describe(table: TableConfig, file: File) -> Description:
    names = [plain(table, n) for n in header(layout_of(table), file)]
    return Description(dict.fromkeys(names), [(None, None)], double=doubled(names))


def read(table: TableConfig, file: File, unit: Unit, columns: list[str], lists: Set[str]) -> Iterator[Block]:
    layout = layout_of(table)
    names = [plain(table, n) for n in header(layout, file)]
    for name in columns:
        if names.count(name) != 1:
            raise SourceError(f"{file.path} was replaced while the table was read: its header has no column {name!r} now")
    yield from read_text(layout, file, names, columns, unit.base)


def plain(table: TableConfig, name: str) -> str:
    """A header's name without the type that an atomic file writes behind it."""
    return name.split(":", 1)[0] if table.format == "recbole" else name


def header(layout: Layout, file: File) -> list[str]:
    """Names of the columns. Raises SourceError for a file without even a header."""
    if layout.names is not None:
        return list(layout.names)
    line, _ = _first_line(layout, file)
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if layout.quoted else csv.QUOTE_NONE
    try:
        names = [n.strip() for n in next(csv.reader([line], delimiter=layout.delimiter, quoting=quoting), [])]
    except csv.Error as error:
        raise SourceError(f"{file.path}: the first line is no header: {error}") from None
    if not names:
        raise SourceError(f"{file.path} is empty: it has not even a header; delete it or write it again")
    return names


def _first_line(layout: Layout, file: File) -> tuple[str, bool]:
    """The first line and whether anything but line ends follows."""
    head = b""
    with _open(layout, file) as stream:
        while len(head) < _LONGEST_HEADER and (piece := stream.read(_HEAD)):
            head += piece
            if b"\n" in head.strip(b"\r\n"):
                break
    first, _, rest = head.decode("utf-8-sig", errors="replace").partition("\n")
    return first.rstrip("\r"), bool(rest.strip("\r\n"))


def _open(layout: Layout, file: File) -> pa.NativeFile:
    """The text as a stream of UTF-8 with delimiters of one character."""
    stream = file.stream()
    if layout.encoding != "utf-8":
        stream = pa.transcoding_input_stream(stream, layout.encoding, "utf-8")
    if layout.delimiter == "::":
        stream = pa.TransformInputStream(stream, _Replace(b"::", _UNIT_SEPARATOR.encode()))
    return stream


class _Replace:
    """Replace two bytes by others in a stream, also where a block ends between them."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self.old, self.new, self.kept = old, new, b""

    def __call__(self, piece: bytes) -> bytes:
        text = (self.kept + bytes(piece)).replace(self.old, self.new)
        self.kept = text[-1:] if piece and text[-1:] == self.old[:1] else b""
        return text[: len(text) - len(self.kept)]


class _Watch:
    """Watches text pass by: bytes that are not UTF-8 become MARK, quotes are counted, the end is kept."""

    def __init__(self) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.marked, self.quotes, self.end = False, 0, b""

    def __call__(self, piece: bytes) -> bytes:
        characters = self.decoder.decode(bytes(piece), final=not piece)
        try:
            text = characters.encode()
        except UnicodeEncodeError:
            self.marked = True
            text = re.sub("[\udc80-\udcff]", _MARK, characters).encode()
        self.quotes += text.count(b'"')
        self.end = (self.end + text)[-_HEAD:] if len(text) < _HEAD else text[-_HEAD:]
        return text

    def end_with(self, delimiter: str, width: int, wanted: Sequence[int], last: Sequence[str | None]) -> bool:
        """Whether the last line by itself is the last row. Where it is not, and the number of quotes is odd, a quote
        was opened and never closed. (The number alone tells nothing: quotes inside a value are let through.)"""
        line = self.end.rstrip(b"\r\n").rsplit(b"\n", 1)[-1].decode(errors="replace").rstrip("\r")
        values = next(csv.reader([line], delimiter=delimiter), [])
        return len(values) == width and all((last[i] or "") == values[w] for i, w in enumerate(wanted))


def _unmarked(block: pa.Table, numbers: NDArray[np.int64], broken: Broken) -> tuple[pa.Table, NDArray[np.int64]]:
    """The rows without a byte that is not UTF-8; the others go to `broken`."""
    bad = np.zeros(len(block), dtype=bool)
    for column in block.columns:
        bad |= pc.match_substring(column, _MARK).fill_null(False).to_numpy()
    for index in np.flatnonzero(bad):
        broken.append((int(numbers[index]), ",".join(_legible(c[int(index)].as_py() or "") for c in block.columns)))
    return block.filter(pa.array(~bad)), numbers[~bad]


def _legible(text: str) -> str:
    return text.replace(_MARK, "\ufffd")


def _batches(reader: pacsv.CSVStreamingReader, file: File) -> Iterator[pa.RecordBatch]:
    try:
        yield from reader
    except pa.ArrowInvalid as error:
        if "straddl" not in str(error):
            raise
        raise SourceError(f"{file.path}: a row is longer than {_BLOCK >> 20} MiB, or a quote is opened and never closed") from None


def read_text(layout: Layout, file: File, names: Sequence[str], columns: list[str], base: int) -> Iterator[Block]:
    """Rows of `columns`, which `names` places, as strings; empty and unquoted ones are null."""
    if not _first_line(layout, file)[1] and layout.header:
        return  # a header alone
    if not layout.header and not _first_line(layout, file)[0]:
        return  # nothing at all
    broken: Broken = []
    skip = 1 if layout.header else 0

    def not_a_row(row: pacsv.InvalidRow) -> str:
        broken.append((-1 if row.number is None else base + row.number - 1 - skip, _legible(row.text or "")))
        return "skip"

    places = [str(i) for i in range(len(names))]  # whatever the header calls them, and if twice
    wanted = {n: places[list(names).index(n)] for n in columns}
    watch = _Watch()
    with pa.TransformInputStream(_open(layout, file), watch) as source:
        reader = pacsv.open_csv(
            source,
            read_options=pacsv.ReadOptions(use_threads=False, block_size=_BLOCK, column_names=places, skip_rows=skip),
            parse_options=pacsv.ParseOptions(
                delimiter=_UNIT_SEPARATOR if layout.delimiter == "::" else layout.delimiter,
                quote_char='"' if layout.quoted else False,
                newlines_in_values=layout.quoted,
                invalid_row_handler=not_a_row,
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={place: pa.string() for place in wanted.values()},
                include_columns=sorted(set(wanted.values())) or places[:1],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )
        position = base
        last: pa.Table | None = None
        over = False  # whether the last row is none and goes over lines
        skipped: list[int] = []  # numbers of the rows that are none, which no good row may take
        for batch in _batches(reader, file):
            block = pa.table({n: pa.chunked_array([batch[place]]) for n, place in wanted.items()})
            skipped = sorted(n for n in {*skipped, *(number for number, _ in broken)} if n >= position)
            numbers = np.arange(position, position + len(batch) + len(skipped), dtype=np.int64)
            if skipped:
                numbers = np.setdiff1d(numbers, skipped)[: len(batch)]
            position = int(numbers[-1]) + 1 if len(numbers) else position
            last = block.slice(len(block) - 1) if len(block) else last
            found = broken.copy()
            broken.clear()
            over = bool(found) and found[-1][0] >= position and "\n" in found[-1][1].strip()
            if watch.marked and wanted:
                block, numbers = _unmarked(block, numbers, found)
            yield block, numbers, found
        if broken:
            over = "\n" in broken[-1][1].strip()
            yield pa.table({n: pa.array([], pa.string()) for n in columns}), np.zeros(0, np.int64), broken.copy()
    if layout.quoted and (over or last is not None):
        values = [last[n][0].as_py() for n in wanted] if last is not None else []
        if watch.quotes % 2 and (
            over or not watch.end_with(layout.delimiter, len(names), [int(p) for p in wanted.values()], values)
        ):
            raise SourceError(
                f"{file.path}: a quote is opened and never closed; the last row holds every line from there to the end"
            )
