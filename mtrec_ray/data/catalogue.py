"""The catalogue: every item with its text, title and training popularity; its place there is the item's integer."""

from __future__ import annotations

import string
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.config.features import ItemFeatureConfig, MultihotItemFeature
from mtrec_ray.data.sources import SourceError
from mtrec_ray.features import clean_lists
from mtrec_ray.item_features import column_name


def item_columns(data: DataConfig) -> list[str]:
    """Columns of the items table that the configuration reads."""
    if data.items is None:
        return []
    names = ["item_id"]
    if data.text is not None:
        names += data.text.fields
        names += [data.text.title, *data.text.columns]
    names += data.item_features
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


def feature_column(values: pa.ChunkedArray, feature: ItemFeatureConfig) -> pa.Array:
    """An item feature's column as strings -> texts, or lists of texts; an empty text is none."""
    texts = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    if not isinstance(feature, MultihotItemFeature):
        return texts
    alone = pa.ListArray.from_arrays(pa.array(np.arange(len(texts) + 1, dtype=np.int32)), texts)
    return clean_lists(alone, feature.separator)


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
    rows = None
    if items is not None:
        rows = items.combine_chunks().take(pc.index_in(item_ids, value_set=items["item_id"].combine_chunks()))
        columns |= {column_name(n): feature_column(rows[n], f) for n, f in data.item_features.items()}
    if rows is None or data.text is None:
        columns["title"] = item_ids
        columns["text"] = pa.nulls(len(item_ids), pa.string())
        return pa.table(columns)
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
