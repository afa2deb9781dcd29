"""The catalogue: every item with its text, title and training popularity; its place there is the item's integer."""

from __future__ import annotations

import string
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.data.sources import SourceError


def item_columns(data: DataConfig) -> list[str]:
    """Columns of the items table that the configuration reads."""
    if data.items is None:
        return []
    names = ["item_id"]
    if data.text is not None:
        names += [f for _, f, _, _ in string.Formatter().parse(data.text.template) if f]
        names += [data.text.title, *data.text.columns]
    return list(dict.fromkeys(names))


def user_columns(data: DataConfig) -> list[str]:
    """Columns of the users table that the configuration reads."""
    return [] if data.users is None else ["user_id", *dict.fromkeys(a.column for a in data.attributes.values())]


def check_unique(table: pa.Table, key: str, what: str, sensitive: Collection[str] = ()) -> None:
    """Raises SourceError when an id occurs twice in what is a whole table, or the whole share of its ids."""
    counts = pc.value_counts(table[key].combine_chunks())
    double = counts.field("values").filter(pc.greater(counts.field("counts"), 1)).to_pylist()
    if double:
        shown = "(withheld)" if key in sensitive else repr(double[0])
        raise SourceError(f"{what}: {key} {shown} occurs more than once ({len(double)} such ids)")


def catalogue_rows(
    data: DataConfig, items: pa.Table | None, item_ids: pa.Array, trained: NDArray[np.bool_], count: NDArray[np.int64],
    recent: NDArray[np.int64],
) -> pa.Table:  # fmt: skip
    """item_id, trained, count, recent_count, title, text and further columns, one row per item id.

    items: rows of the items table as strings; ids that it lacks have no text, and their id as title. count: training
    events that are history; recent: those of the recent window. Raises SourceError for a doubled id in items.
    """
    columns: dict[str, pa.Array] = {
        "item_id": item_ids,
        "trained": pa.array(trained),
        "count": pa.array(count, pa.int64()),
        "recent_count": pa.array(recent, pa.int64()),
    }
    if items is not None:
        check_unique(items, "item_id", "items", data.sensitive_names)
    if items is None or data.text is None:
        columns["title"] = item_ids
        columns["text"] = pa.nulls(len(item_ids), pa.string())
        return pa.table(columns)
    rows = items.combine_chunks().take(pc.index_in(item_ids, value_set=items["item_id"].combine_chunks()))
    parts: list[pa.ChunkedArray | str] = []
    for literal, name, _, _ in string.Formatter().parse(data.text.template):
        parts.append(literal)
        if name is not None:
            parts.append(rows[name].fill_null(""))
    known = rows["item_id"].is_valid()
    text = pc.utf8_trim_whitespace(pc.binary_join_element_wise(*parts, ""))
    text = text if isinstance(text, pa.ChunkedArray) else pa.chunked_array([pa.array([text.as_py()] * len(rows), pa.string())])
    title = rows[data.text.title]
    columns["title"] = pc.coalesce(pc.if_else(pc.equal(title, ""), None, title), item_ids)
    columns["text"] = pc.if_else(known, text, pa.scalar(None, pa.string()))
    for name in data.text.columns:
        if name not in columns:
            columns[name] = rows[name]
    return pa.table(columns)
