"""Categories of items as numbers: columns of the items table, encoded in the catalogue. It knows no Ray.

The catalogue holds `feature_NAME`: the value's number in the vocabulary, or a list of them (features.py). An item is in one
of ten folds by the hash of its id: what is told of items is judged on held-out folds.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from mtrec_ray.features import FIRST, CategoricalSpec, MultihotSpec, dense
from mtrec_ray.schema import LogSchema

FloatArray = NDArray[np.float64]
ItemSpec = CategoricalSpec | MultihotSpec


def column_name(feature: str) -> str:
    """Of an item feature in the catalogue."""
    return f"feature_{feature}"


def spec_of(schema: LogSchema, feature: str) -> ItemSpec:
    """The fitted vocabulary. Raises ValueError where the data were prepared without it."""
    for spec in schema.item_features:
        if spec.name == feature:
            return spec
    raise ValueError(f"data.item_features.{feature}: the data were prepared without it; run jobs.prepare again")


def codes(catalogue: pa.Table, feature: str) -> NDArray[np.int64]:
    """-> (N, longest) numbers of the vocabulary, 0 where there is none."""
    column = catalogue[column_name(feature)].combine_chunks()
    found = dense(column if isinstance(column, pa.ListArray) else column.to_numpy(zero_copy_only=False))
    return found.astype(np.int64).reshape(len(column), -1)


def multi_hot(code_NL: NDArray[np.int64], n_values: int) -> FloatArray:
    """1 for every value of the vocabulary that an item has -> (N, values); values outside it are none."""
    out = np.zeros((len(code_NL), n_values + FIRST))
    np.put_along_axis(out, code_NL, 1.0, axis=1)
    return out[:, FIRST:]


def shares(code_NL: NDArray[np.int64], n_values: int) -> FloatArray:
    """The same with one divided equally among an item's values; zeros for an item without any."""
    hot = multi_hot(code_NL, n_values)
    return hot / np.maximum(hot.sum(1, keepdims=True), 1)


def item_fold(item_ids: pa.Array) -> NDArray[np.int8]:
    """Items hashed into ten folds."""
    hashed = pd.util.hash_array(item_ids.to_pandas().to_numpy(dtype=object), hash_key="mtrec_item_folds", categorize=False)
    return ((hashed >> np.uint64(32)) % np.uint64(10)).astype(np.int8)
