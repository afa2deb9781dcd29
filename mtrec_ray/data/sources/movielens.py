"""The files of MovieLens 100K, 1M, 20M, 25M, 32M and latest as GroupLens packs them (https://grouplens.org/datasets/movielens/).

ratings: user_id, item_id, rating, timestamp. Movies: item_id, title, year, genres. Users: user_id, gender, age,
occupation, zip. A year is taken out of the title; genres are joined with ', '.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from mtrec_ray.config import TableConfig
from mtrec_ray.data.sources.base import Block, Description, File, SourceError, Unit
from mtrec_ray.data.sources.text import Layout, read_text

_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_OCCUPATIONS = (
    *("other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service"),
    *("doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer", "retired"),
    *("sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman", "unemployed", "writer"),
)
_RATINGS = ("user_id", "item_id", "rating", "timestamp")


@dataclass(frozen=True)
class _Kind:
    """One of the files: how it is written, and how its columns become ours."""

    layout: Layout
    columns: tuple[str, ...]
    derive: Callable[[pa.Table], dict[str, pa.ChunkedArray]] | None = None


def _titles(block: pa.Table) -> dict[str, pa.ChunkedArray]:
    parts = pc.extract_regex(block["title"], r"(?s)^(?P<title>.*) \((?P<year>[0-9]{4})\)\s*$")
    title = pc.if_else(parts.is_null(), block["title"], pc.struct_field(parts, "title"))
    return {"item_id": block["item_id"], "title": title, "year": pc.struct_field(parts, "year")}


def _movies(block: pa.Table) -> dict[str, pa.ChunkedArray]:
    genres = pc.replace_substring(block["genres"], "|", ", ")
    return {**_titles(block), "genres": pc.if_else(pc.equal(genres, "(no genres listed)"), pa.scalar(None, pa.string()), genres)}


def _movies_100k(block: pa.Table) -> dict[str, pa.ChunkedArray]:
    flags = zip(*(block[g].to_pylist() for g in _GENRES), strict=True)
    genres = [", ".join(g for g, flag in zip(_GENRES, row, strict=True) if flag == "1") for row in flags]
    return {**_titles(block), "genres": pa.chunked_array([pa.array(genres, pa.string())])}


def _users(block: pa.Table) -> dict[str, pa.ChunkedArray]:
    place = pc.index_in(block["occupation"], value_set=pa.array([str(i) for i in range(len(_OCCUPATIONS))]))
    names = pa.array(_OCCUPATIONS).take(place.combine_chunks())
    return {n: block[n] if n != "occupation" else pa.chunked_array([names]) for n in block.column_names}


def _old(delimiter: str, *names: str) -> Layout:
    return Layout(delimiter, quoted=False, header=False, names=names, encoding="latin-1")


_ITEM = ("item_id", "title", "year", "genres")
_FILES = {
    "u.data": _Kind(_old("\t", *_RATINGS), _RATINGS),
    "u.item": _Kind(_old("|", "item_id", "title", "released", "on_video", "url", *_GENRES), _ITEM, _movies_100k),
    "u.user": _Kind(_old("|", "user_id", "age", "gender", "occupation", "zip"), ("user_id", "age", "gender", "occupation", "zip")),
    "ratings.dat": _Kind(_old("::", *_RATINGS), _RATINGS),
    "movies.dat": _Kind(_old("::", "item_id", "title", "genres"), _ITEM, _movies),
    "users.dat": _Kind(
        _old("::", "user_id", "gender", "age", "occupation", "zip"), ("user_id", "gender", "age", "occupation", "zip"), _users
    ),
    "ratings.csv": _Kind(Layout(",", quoted=True, names=_RATINGS), _RATINGS),
    "movies.csv": _Kind(Layout(",", quoted=True, names=("item_id", "title", "genres")), _ITEM, _movies),
}


def suffixes() -> tuple[str, ...]:
    return tuple(_FILES)


def describe(table: TableConfig, file: File) -> Description:
    return Description(dict.fromkeys(_kind(file).columns), [(None, None)])


def read(table: TableConfig, file: File, unit: Unit, columns: list[str], lists: Set[str]) -> Iterator[Block]:
    kind = _kind(file)
    assert kind.layout.names is not None
    raw = columns if kind.derive is None else list(kind.layout.names)
    for block, rows, broken in read_text(kind.layout, file, kind.layout.names, raw, unit.base):
        derived = {n: block[n] for n in raw} if kind.derive is None else kind.derive(block)
        yield pa.table({n: derived[n] for n in columns}), rows, broken


def _kind(file: File) -> _Kind:
    for name, kind in _FILES.items():
        if file.name.startswith(name):  # and may be compressed
            return kind
    raise SourceError(f"{file.path} is no MovieLens file; name one of {', '.join(_FILES)}")
