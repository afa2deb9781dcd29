"""Items become integers: sorted ranges of ids, each given its numbers by one task. No Ray here.

A partition lists its distinct items in order (`distinct_items`). Splitters from samples of these lists cut all ids
into ranges; one task per range merges the lists' shares (`number_range`), and tells every partition what its own items
became (`Codes`). Nobody ever holds all ids, and the numbers do not depend on how many ranges there are:

    training items, by id; then all others, by id

In an appended log the training items of before keep their numbers, and new training items come after them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

IntArray = NDArray[np.int64]

OLD, NEW, REST = 0, 1, 2
"""A training item of the log before an append; a new training item; an item without a training event."""
ITEMS = pa.schema([("item_id", pa.string()), ("trained", pa.int64()), ("count", pa.int64())])
"""trained: training events; count: those that are history."""
_SAMPLES = 256


@dataclass(frozen=True)
class Numbers:
    """How many items there are, and where each range of ids begins among those of its kind."""

    old: int
    new_start: IntArray
    rest_start: IntArray

    @classmethod
    def of(cls, old: int, new: IntArray, rest: IntArray) -> Numbers:
        """old: training items before the append; new, rest: how many each range holds."""
        return cls(old, np.concatenate([[0], np.cumsum(new)]), np.concatenate([[0], np.cumsum(rest)]))

    @property
    def train(self) -> int:
        return self.old + int(self.new_start[-1])

    @property
    def items(self) -> int:
        return self.train + int(self.rest_start[-1])

    def positions(self, kind: NDArray[np.int8], rank: IntArray, which: int) -> IntArray:
        """Catalogue positions of items of one range."""
        start = np.array([0, self.old + self.new_start[which], self.train + self.rest_start[which]])
        return np.asarray(start[kind] + rank)


def sorted_dictionary(values: pa.Array | pa.ChunkedArray) -> tuple[pa.Array, NDArray[np.int64]]:
    """Strings -> (distinct values in order, code of each); a missing value has the code -1."""
    encoded = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    if not pa.types.is_dictionary(encoded.type):
        encoded = encoded.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order) + 1, np.int64)
    rank[order], rank[len(order)] = np.arange(len(order)), -1
    codes = encoded.indices.fill_null(len(order)).to_numpy()
    return encoded.dictionary.take(pa.array(order)), rank[codes]


def distinct_items(item_ids: pa.Array, codes: IntArray, trained: NDArray[np.bool_], shown: NDArray[np.bool_]) -> pa.Table:
    """item_ids: distinct and sorted, codes: of each event; shown: events that are history."""

    def count(mask: NDArray[np.bool_]) -> pa.Array:
        return pa.array(np.bincount(codes[mask], minlength=len(item_ids)))

    return pa.table([item_ids, count(trained), count(trained & shown)], schema=ITEMS)


def sample(item_ids: pa.Array) -> list[str]:
    """Evenly spaced ids of a sorted list."""
    return list(item_ids.take(pa.array(np.unique(np.linspace(0, len(item_ids) - 1, _SAMPLES).astype(np.int64)))).to_pylist())


def splitters(samples: Iterable[list[str]], ranges: int) -> list[str]:
    """Where to cut all ids into about equal ranges -> at most ranges - 1 ids; a range begins with its splitter."""
    every = sorted(s for part in samples for s in part)
    return sorted({every[len(every) * i // ranges] for i in range(1, ranges)} - {every[0]}) if every else []


def share(table: pa.Table, bounds: list[str], which: int) -> pa.Table:
    """The rows of a table whose item_id lies in a range."""
    low, high = (None, *bounds)[which], (*bounds, None)[which]
    ids = table["item_id"]
    if low is not None:
        table = table.filter(pc.greater_equal(ids, low))
        ids = table["item_id"]
    return table if high is None else table.filter(pc.less(ids, high))


@dataclass(frozen=True)
class Numbered:
    """The items of one range."""

    item_ids: pa.Array
    """Distinct, sorted."""
    kind: NDArray[np.int8]
    rank: IntArray
    """OLD: the catalogue position; NEW and REST: the place among those of this range."""
    count: IntArray
    codes: list[IntArray]
    """For each list handed in: where its items stand in item_ids."""


def number_range(lists: list[pa.Table], others: list[pa.Array], before: pa.Table | None = None) -> Numbered:
    """Merge a range's share of every partition's distinct items.

    others: further ids (of the items table), events or not; before: item_id and position of the training items of the
    log before an append.
    """
    ids = [t["item_id"].combine_chunks() for t in lists] + others
    if before is not None:
        ids.append(before["item_id"].combine_chunks())
    item_ids, codes = sorted_dictionary(pa.concat_arrays([i.cast(pa.string()) for i in ids] or [pa.array([], pa.string())]))
    bounds = np.cumsum([0, *[len(t) for t in lists]])
    own = [codes[a:b] for a, b in itertools.pairwise(bounds)]
    trained, count = np.zeros(len(item_ids), np.int64), np.zeros(len(item_ids), np.int64)
    for table, code in zip(lists, own, strict=True):
        trained[code] += table["trained"].to_numpy()
        count[code] += table["count"].to_numpy()
    kind = np.where(trained > 0, NEW, REST).astype(np.int8)
    rank = np.where(kind == NEW, np.cumsum(kind == NEW), np.cumsum(kind == REST)) - 1
    if before is not None:
        places = codes[len(codes) - len(before) :]
        kind[places], rank[places] = OLD, before["position"].to_numpy()
        rank[kind == NEW], rank[kind == REST] = np.arange((kind == NEW).sum()), np.arange((kind == REST).sum())
    return Numbered(item_ids, kind, rank, np.where(kind == REST, 0, count), own)
