"""The `stream` feed: windows as an iterator gives them, for data that shall not be cached on every node.

Every window that the iterators of all ranks give is trained once, whatever each of them gets: a rank whose windows are used
up takes part with empty batches until all ranks are done. An epoch can be entered at its start alone.

It knows no Ray: an adapter gives the Arrow tables (`trainer.py`: Ray Data; `file_tables`: the files themselves).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.training import distributed
from mtrec_ray.training.feed import PairSampler, WindowCache, collate

Tables = Callable[[int], Iterator[pa.Table]]
"""Epoch -> this rank's windows in tables of any size. Together the ranks give every window once."""
REMEMBERED = 64
"""Steps whose rows a message can still name."""


def file_tables(windows_uri: str, seed: int, rank: int, world: int) -> Tables:
    """Tables without Ray Data: every rank reads its share of the files, in an order of the epoch's own."""
    filesystem, _ = storage.resolve(windows_uri)
    paths = storage.list_files(windows_uri, ".parquet")

    def tables(epoch: int) -> Iterator[pa.Table]:
        order = np.random.default_rng((seed, epoch)).permutation(len(paths))
        for number in order[rank::world]:
            yield pq.read_table(paths[number], filesystem=filesystem, partitioning=None)

    return tables


def count_windows(windows_uri: str) -> tuple[int, pa.Table]:
    """-> (windows of all files, an empty table of their form), from the files' footers."""
    filesystem, _ = storage.resolve(windows_uri)
    paths = storage.list_files(windows_uri, ".parquet")
    if not paths:
        raise storage.StorageError(f"{windows_uri}: no Parquet files")
    total = sum(pq.read_metadata(p, filesystem=filesystem).num_rows for p in paths)
    return total, pq.read_schema(paths[0], filesystem=filesystem).empty_table()


class StreamFeed:
    """Batches of one rank, shuffled within a buffer.

    The global batch has `batch_windows` windows until the first rank is done, then fewer.
    """

    exact = False

    def __init__(
        self,
        tables: Tables,
        windows: int,
        empty: pa.Table,
        schema: LogSchema,
        *,
        batch_windows: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
        masked_folds: tuple[int, ...],
        pairs: PairSampler | None,
        buffer: int,
        texts: EventTexts | None = None,
    ) -> None:
        """windows: of all ranks; empty: a table of the windows' form without rows; buffer: windows to shuffle together."""
        self.tables, self.windows, self.empty, self.schema = tables, windows, WindowCache.from_table(empty, texts), schema
        self.texts = texts
        self.batch_windows, self.accumulate, self.seed = batch_windows, accumulate, seed
        self.rank, self.world = rank, world
        self.masked_folds, self.pairs, self.buffer = masked_folds, pairs, buffer
        self._recent: deque[tuple[int, int, WindowCache, NDArray[np.int64]]] = deque(maxlen=REMEMBERED)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.windows // self.batch_windows)

    def epoch(self, epoch: int, first_step: int = 0, global_step: int = 0) -> Iterator[list[Batch]]:
        assert first_step == 0, "a stream starts at the epoch's start"
        mine, step = self._batches(epoch), 0
        nothing = np.zeros(0, np.int64)
        while True:
            found = next(mine, None)
            if not distributed.any_rank(found is not None):
                return
            cache, index = (self.empty, nothing) if found is None else found
            self._recent.append((epoch, step, cache, index))
            yield [
                collate(
                    cache,
                    np.sort(micro),
                    self.schema,
                    masked_folds=self.masked_folds,
                    pairs=self.pairs,
                    epoch=epoch,
                    step=global_step + step,
                )
                for micro in np.array_split(index, self.accumulate)
            ]
            step += 1

    def _batches(self, epoch: int) -> Iterator[tuple[WindowCache, NDArray[np.int64]]]:
        """This rank's share of every global batch; none is short but the last."""
        size = max(1, len(np.array_split(np.arange(self.batch_windows), self.world)[self.rank]))
        rng = np.random.default_rng((self.seed, epoch, self.rank))
        held: list[pa.Table] = []
        tables = self.tables(epoch)
        while True:
            table = next(tables, None)
            if table is not None:
                held.append(table)
                if sum(map(len, held)) < max(self.buffer, size):
                    continue
            if not held:
                return
            chunk = pa.concat_tables(held)
            order = rng.permutation(len(chunk))
            full = len(chunk) if table is None else len(chunk) // size * size
            cache = WindowCache.from_table(chunk, self.texts)
            for start in range(0, full, size):
                yield cache, order[start : min(start + size, full)]
            held = [chunk.take(np.sort(order[full:]))] if full < len(chunk) else []

    def rows(self, epoch: int, step: int, together: bool) -> list[str]:
        """This rank's windows; those of all ranks when they ask together."""
        found = [(cache, index) for e, s, cache, index in self._recent if (e, s) == (epoch, step)]
        mine = [w for cache, index in found for w in cache.describe(np.sort(index), self.schema)]
        return [w for rank in distributed.gather_objects(mine) for w in rank] if together else mine
