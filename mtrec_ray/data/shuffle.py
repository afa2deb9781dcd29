"""A shuffle through files: rows go to their partition without any process holding more than a piece. No Ray here.

A piece of a table becomes one Arrow file with one record batch per partition, in order. Whoever works on a partition
reads its batch of every file. Nothing is held between the two, whatever the size of the log, and a task that is run
again writes the same file again. (Ray Data's hash shuffle keeps a partition's rows in the memory of its aggregators.)
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec_ray import storage


def write_piece(uri: str, table: pa.Table, part: NDArray[np.integer], partitions: int) -> None:
    """Write rows by partition; rows of one partition keep their order. part: partition of each row."""
    order = np.argsort(part.astype(np.int16) if partitions < 2**15 else part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(partitions + 1))
    whole = storage.one_batch(table.take(pa.array(order)))
    batches = (whole.slice(start, stop - start) for start, stop in itertools.pairwise(bounds))
    storage.write_batches(uri, table.schema, batches, compression="lz4")


def read_partition(root: str, number: int) -> pa.Table | None:
    """A partition's rows of all pieces below a directory, in the order of the pieces' names; None without pieces."""
    paths = storage.list_files(root, ".arrow")
    batches = [storage.read_batch(storage.join(root, path.rsplit("/", 1)[1]), number) for path in paths]
    return pa.Table.from_batches(batches) if batches else None
