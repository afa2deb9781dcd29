"""The catalogue: every item, training items first, with its text, title and training popularity."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.data.sources import SourceError, read_all


def item_columns(data: DataConfig) -> list[str]:
    """Columns of the items table that the configuration reads."""
    if data.items is None:
        return []
    import string

    names = ["item_id"]
    if data.text is not None:
        names += [f for _, f, _, _ in string.Formatter().parse(data.text.template) if f]
        names += [data.text.title, *data.text.columns]
    return list(dict.fromkeys(names))


def read_items(data: DataConfig) -> pa.Table | None:
    """The items table as strings; None without one. Raises SourceError for missing or double ids."""
    return None if data.items is None else _unique(read_all(data.items, item_columns(data), "items"), "item_id", "items")


def read_users(data: DataConfig) -> pa.Table | None:
    """The users table as strings; None without one. Raises SourceError for missing or double ids."""
    if data.users is None:
        return None
    columns = ["user_id", *dict.fromkeys(a.column for a in data.attributes.values())]
    return _unique(read_all(data.users, columns, "users"), "user_id", "users")


def _unique(table: pa.Table, key: str, what: str) -> pa.Table:
    if table[key].null_count:
        raise SourceError(
            f"{what}: {table[key].null_count} row(s) without {key}; the first is row {pc.index(table[key].is_null(), True).as_py()}"
        )
    counts = pc.value_counts(table[key].combine_chunks())
    double = [c["values"].as_py() for c in counts if c["counts"].as_py() > 1]
    if double:
        raise SourceError(f"{what}: {key} {double[0]!r} occurs more than once ({len(double)} such ids)")
    return table


def build_catalogue(
    data: DataConfig,
    items: pa.Table | None,
    counts: Mapping[str, int],
    recent: Mapping[str, int],
    others: NDArray[np.object_],
) -> pa.Table:
    """item_id, trained, count, recent_count, text, title and further columns.

    counts: training events per item (the training catalogue); recent: those of the recent window;
    others: ids of items outside the training catalogue that the log names.
    Order: training items by id, then all others by id: the position is the item's integer everywhere.
    """
    trained = sorted(counts)
    known = set(items["item_id"].to_pylist()) if items is not None else set()
    rest = sorted((known | set(others.tolist())) - set(trained))
    ids = [*trained, *rest]
    columns: dict[str, pa.Array] = {
        "item_id": pa.array(ids, pa.string()),
        "trained": pa.array([True] * len(trained) + [False] * len(rest)),
        "count": pa.array([counts.get(i, 0) for i in ids], pa.int64()),
        "recent_count": pa.array([recent.get(i, 0) for i in ids], pa.int64()),
    }
    if items is None or data.text is None:
        columns["title"] = columns["item_id"]
        columns["text"] = pa.array([None] * len(ids), pa.string())
        return pa.table(columns)
    position = pc.index_in(columns["item_id"], value_set=items["item_id"].combine_chunks())
    rows = items.take(position).to_pylist()
    texts = [data.text.template.format(**{k: v or "" for k, v in r.items()}).strip() if r["item_id"] else None for r in rows]
    titles = [r[data.text.title] or i for r, i in zip(rows, ids, strict=True)]
    columns["title"] = pa.array(titles, pa.string())
    columns["text"] = pa.array(texts, pa.string())
    for name in data.text.columns:
        if name not in columns:
            columns[name] = pa.array([r[name] for r in rows], pa.string())
    return pa.table(columns)
