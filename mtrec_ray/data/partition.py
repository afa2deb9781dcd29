"""Which partition a user is in. Prepare, the history store and batch scoring agree on this. No Ray here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray


def hash_ids(ids: Any) -> NDArray[np.uint64]:
    """Ids (Arrow strings, or any sequence) -> SipHash of each with pandas' fixed key; 0 for a missing one.

    Arrow ids are hashed once per distinct id."""
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    if not isinstance(ids, pa.Array):
        return np.asarray(pd.util.hash_array(np.asarray(ids, dtype=object), categorize=False))
    encoded = ids.dictionary_encode()
    distinct = encoded.dictionary.to_numpy(zero_copy_only=False)
    hashed = np.append(pd.util.hash_array(distinct, categorize=False), np.uint64(0))
    return np.asarray(hashed[encoded.indices.fill_null(len(distinct)).to_numpy()])


def user_partition(user_ids: Any, partitions: int) -> NDArray[np.int32]:
    """The id's hash modulo the number of partitions."""
    return (hash_ids(user_ids) % np.uint64(partitions)).astype(np.int32)
