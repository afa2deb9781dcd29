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

_OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")


def write_piece(uri: str, table: pa.Table, part: NDArray[np.integer], partitions: int) -> None:
    """Write rows by partition; rows of one partition keep their order. part: partition of each row."""
    order = np.argsort(part.astype(np.int16) if partitions < 2**15 else part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(partitions + 1))
    batch = table.take(pa.array(order)).combine_chunks().to_batches()
    whole = batch[0] if batch else pa.RecordBatch.from_pylist([], schema=table.schema)
    filesystem, path = storage.resolve(uri)
    filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    with filesystem.open_output_stream(path) as sink, pa.ipc.new_file(sink, table.schema, options=_OPTIONS) as writer:
        for start, stop in itertools.pairwise(bounds):
            writer.write_batch(whole.slice(start, stop - start))


def read_partition(root: str, number: int) -> pa.Table | None:
    """A partition's rows of all pieces below a directory, in the order of the pieces' names; None without pieces."""
    filesystem, _ = storage.resolve(root)
    batches = []
    for path in storage.list_files(root, ".arrow"):
        with filesystem.open_input_file(path) as source:
            batches.append(pa.ipc.open_file(source).get_batch(number))
    return pa.Table.from_batches(batches) if batches else None
