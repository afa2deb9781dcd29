"""Which partition a user is in. Prepare, the history store and batch scoring agree on this. No Ray here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray


def user_partition(user_ids: Sequence[str] | NDArray[np.object_], partitions: int) -> NDArray[np.int32]:
    """SipHash of the id with pandas' fixed key, modulo the number of partitions."""
    ids = np.asarray(user_ids, dtype=object)
    return (pd.util.hash_array(ids, categorize=False) % np.uint64(partitions)).astype(np.int32)
