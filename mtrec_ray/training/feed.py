"""The `cached` feed: memory-mapped windows, a seeded global permutation, constant global batches.

Each rank takes its slice of every global batch; the cursor is (epoch, step), so a run can stop and go on
anywhere, with any number of ranks, and nothing is dropped: the last batch of an epoch is just smaller.
"""

from __future__ import annotations

import fcntl
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.features import InputSpec, padded
from mtrec_ray.hashing import GOLDEN, mix
from mtrec_ray.models.batch import Batch, TargetBatch, collate_history, feature_tensor
from mtrec_ray.schema import LogSchema

_RAGGED = {"history": "history", "target": "target", "label": "target", "seen": "seen"}
"""First word of a list column -> the group whose offsets it shares."""


class WindowCache:
    """Windows as flat arrays: `columns[name]` and, for lists, `offsets["history" | "target" | "seen"]`; lists within lists
    (multi-hot features) have `offsets[name]` of their own, one range per entry."""

    def __init__(
        self,
        columns: dict[str, NDArray[Any]],
        offsets: dict[str, NDArray[np.int64]],
        user_ids: pa.Array,
        texts: EventTexts | None = None,
    ) -> None:
        """texts: vectors of the events' free texts, where there are such features."""
        self.columns, self.offsets, self.user_ids, self.texts = columns, offsets, user_ids, texts

    def __len__(self) -> int:
        return len(self.columns["window"])

    @classmethod
    def from_table(cls, table: pa.Table, texts: EventTexts | None = None) -> WindowCache:
        """In memory, from the Parquet form (evaluation, tests)."""
        columns: dict[str, NDArray[Any]] = {}
        offsets: dict[str, NDArray[np.int64]] = {}
        for name in table.column_names:
            if name == "user_id":
                continue
            column = table[name].combine_chunks()
            if pa.types.is_list(column.type):
                flat = column.flatten()
                if pa.types.is_list(flat.type):
                    inner = np.diff(flat.offsets.to_numpy())
                    offsets[name] = np.concatenate([[0], np.cumsum(inner)]).astype(np.int64)
                    flat = flat.flatten()
                columns[name] = flat.to_numpy(zero_copy_only=False)
                lengths = np.diff(column.offsets.to_numpy())
                offsets[_RAGGED[name.split("_", 1)[0]]] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            else:
                columns[name] = column.to_numpy(zero_copy_only=False)
        return cls(columns, offsets, table["user_id"].combine_chunks(), texts)

    @classmethod
    def build(cls, windows_uri: str, folder: str | Path) -> Path:
        """Write the flat form of a directory of window files into `folder`, file by file; reuse it if it is there.

        Every process of a node may call it at once: one of them builds, the others wait for it. What a killed one left is
        built anew.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel frees it when its holder dies
            if not (folder / "user_id.arrow").exists():
                draft = folder.with_name(f"{folder.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                cls._write(windows_uri, draft)
                draft.rename(folder)
        return folder

    @classmethod
    def _write(cls, windows_uri: str, draft: Path) -> None:
        kinds: dict[str, str] = {}
        ends: defaultdict[str, int] = defaultdict(int)
        users = []
        filesystem, _ = storage.resolve(windows_uri)

        def append(name: str, values: NDArray[Any]) -> None:
            kinds[name] = values.dtype.str
            with open(draft / f"{name}.bin", "ab") as handle:
                handle.write(np.ascontiguousarray(values).tobytes())

        for path in storage.list_files(windows_uri, ".parquet"):
            part = cls.from_table(pq.read_table(path, filesystem=filesystem))
            users.append(part.user_ids)
            for name, values in part.columns.items():
                append(name, values)
            for group, values in part.offsets.items():
                append(f"{group}.offsets", values[1:] + ends[group] if f"{group}.offsets" in kinds else values)
                ends[group] += int(values[-1])
        storage.write_json(draft / "dtypes.json", kinds)
        with pa.OSFile(str(draft / "user_id.arrow"), "wb") as sink:
            table = pa.table({"user_id": pa.chunked_array(users, pa.string())})
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)

    @classmethod
    def open(cls, folder: str | Path, texts: EventTexts | None = None) -> WindowCache:
        """Memory-map a folder made by `build`."""
        folder = Path(folder)
        kinds = storage.read_json(folder / "dtypes.json")
        columns, offsets = {}, {}
        for name, kind in kinds.items():
            path = folder / f"{name}.bin"
            empty = path.stat().st_size == 0
            values = np.zeros(0, kind) if empty else np.memmap(path, dtype=kind, mode="r")
            if name.endswith(".offsets"):
                offsets[name.removesuffix(".offsets")] = values
            else:
                columns[name] = values
        with pa.memory_map(str(folder / "user_id.arrow")) as source:
            user_ids = pa.ipc.open_file(source).read_all()["user_id"].combine_chunks()
        return cls(columns, offsets, user_ids, texts)

    @cached_property
    def first_of_user(self) -> NDArray[np.int64]:
        """The first window of each window's user; a user's windows stand together."""
        codes = self.user_ids.dictionary_encode().indices.to_numpy()
        new = np.ones(len(self), dtype=bool)
        new[1:] = codes[1:] != codes[:-1]
        return np.maximum.accumulate(np.where(new, np.arange(len(self)), 0))

    def gather(self, group: str, index: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ragged ranges of some windows -> (flat positions into the group's columns, length of each)."""
        start, stop = self.offsets[group][index], self.offsets[group][index + 1]
        if group == "seen":  # a moment holds what the user's moment before did not
            start = self.offsets[group][self.first_of_user[index]]
        length = np.asarray(stop - start)
        begin = np.concatenate([[0], np.cumsum(length)])[:-1]
        return np.arange(length.sum()) + np.repeat(start - begin, length), length

    def feature(self, name: str, spec: InputSpec, index: NDArray[np.int64]) -> NDArray[Any]:
        """Encoded values of a feature's column at flat positions; rows where it is multi-hot, vectors where it is a text."""
        if name in self.offsets:
            flat, length = self.gather(name, index)
            return padded(self.columns[name][flat], length)
        if spec.kind == "text":
            assert self.texts is not None, "windows with texts are opened with their vectors"
            return self.texts(self.columns[name][index])
        return self.columns[name][index]

    def describe(self, index: NDArray[np.int64], schema: LogSchema) -> list[str]:
        """Windows in words, for messages: user (unless sensitive), number of the window, first row of the log among its targets."""
        secret = "user_id" in schema.sensitive
        offsets, rows = self.offsets["target"], self.columns["target_row"]
        found = []
        for i in index.tolist():
            first = f"targets from log row {rows[offsets[i]]}" if offsets[i] < offsets[i + 1] else "no targets"
            user = "(withheld)" if secret else repr(self.user_ids[i].as_py())
            found.append(f"user {user} window {self.columns['window'][i]} ({first})")
        return found


class PairSampler:
    """Similarity pairs of a batch: two training positives of one user, the earlier one in the window's history,
    close in place and time.

    Drawn by hashing (seed, epoch, row of the target), so they do not depend on ranks or batches.
    """

    def __init__(self, within_positions: int, within_hours: float, share: float, seed: int) -> None:
        self.within, self.within_ms, self.share, self.seed = within_positions, within_hours * 3.6e6, share, seed

    def __call__(
        self, cache: WindowCache, epoch: int, target: NDArray[np.int64], history_start: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """target: flat positions; history_start: flat position of each target's window's history."""
        columns = cache.columns
        noise = _hash(columns["target_row"][target], self.seed * 1_000_003 + epoch)
        back = 1 + (noise >> np.uint64(8)) % np.uint64(self.within)
        pos = columns["target_pos"][target].astype(np.int64)
        chosen = (noise % np.uint64(256)) < np.uint64(round(self.share * 256))
        chosen &= columns["target_positive"][target].astype(bool) & (pos >= back.astype(np.int64))
        target, anchor = target[chosen], (history_start + pos - back.astype(np.int64))[chosen]
        near = columns["target_time"][target] - columns["history_time"][anchor] <= self.within_ms
        near &= columns["history_positive"][anchor].astype(bool)
        a, b = columns["history_item"][anchor].astype(np.int64), columns["target_item"][target].astype(np.int64)
        near &= a != b
        return a[near], b[near]


def _hash(values: NDArray[np.integer[Any]], seed: int) -> NDArray[np.uint64]:
    """splitmix64 of (value, seed)."""
    with np.errstate(over="ignore"):
        return mix(values.astype(np.uint64) + np.uint64(seed * GOLDEN % 2**64))


def collate(
    cache: WindowCache,
    index: NDArray[np.int64],
    schema: LogSchema,
    *,
    masked_folds: tuple[int, ...] = (),
    pairs: PairSampler | None = None,
    epoch: int = 0,
    step: int = 0,
) -> Batch:
    """Some windows -> a batch. Users of `masked_folds` come without profile labels."""
    columns = cache.columns
    h, h_length = cache.gather("history", index)
    t, t_length = cache.gather("target", index)

    def tensor(values: NDArray[Any], dtype: Any) -> torch.Tensor:
        return torch.from_numpy(values.astype(dtype))

    history = collate_history(
        columns["history_item"][h],
        columns["history_time"][h],
        h_length,
        {a.name: columns[f"history_action_{a.name}"][h] for a in schema.actions},
        {c.name: cache.feature(f"history_context_{c.name}", c, h) for c in schema.history_features},
        schema.session_gap_ms,
    )
    targets = TargetBatch(
        window_M=torch.from_numpy(np.repeat(np.arange(len(index)), t_length)),
        pos_M=tensor(columns["target_pos"][t], np.int64),
        item_M=tensor(columns["target_item"][t], np.int64),
        positive_M=tensor(columns["target_positive"][t], bool),
        labels_M={n: tensor(columns[f"label_{n}"][t], np.float32) for n in schema.labels},
        context_M={c.name: feature_tensor(cache.feature(f"target_context_{c.name}", c, t)) for c in schema.request_features},
    )
    masked = np.isin(columns["fold"][index], masked_folds)
    profile = {}
    for a in schema.attributes:
        profile[a.name] = tensor(np.where(masked, -1, columns[f"profile_{a.name}"][index]), np.int64)
    anchor = positive = np.zeros(0, np.int64)
    if pairs is not None:
        anchor, positive = pairs(cache, epoch, t, np.repeat(cache.offsets["history"][index], t_length))
    return Batch(
        history=history,
        targets=targets,
        profile_B=profile,
        profile_weight_B=tensor(columns["profile_weight"][index], np.float32),
        pair_anchor_P=torch.from_numpy(anchor),
        pair_positive_P=torch.from_numpy(positive),
        step=step,
    )


class Feed(Protocol):
    """What the loop needs of a feed."""

    exact: bool
    """Whether an epoch can be entered at any step; else at its start alone."""

    @property
    def windows(self) -> int:
        """Windows of an epoch, over all ranks."""
        ...

    @property
    def steps_per_epoch(self) -> int:
        """Global steps; an estimate where the feed is not exact."""
        ...

    def epoch(self, epoch: int, first_step: int = 0, global_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step from `first_step` on; every rank yields equally often.

        global_step: optimiser steps done before `first_step`; it seeds what must be the same on all ranks.
        """
        ...

    def rows(self, epoch: int, step: int, together: bool) -> list[str]:
        """The windows of a step's global batch in words. together: whether every rank asks now."""
        ...


class CachedFeed:
    """Batches of one rank."""

    exact = True

    def __init__(
        self,
        cache: WindowCache,
        schema: LogSchema,
        *,
        batch_windows: int,
        accumulate: int,
        seed: int,
        rank: int,
        world: int,
        masked_folds: tuple[int, ...],
        pairs: PairSampler | None,
    ) -> None:
        self.cache, self.schema = cache, schema
        self.batch_windows, self.accumulate, self.seed = batch_windows, accumulate, seed
        self.rank, self.world = rank, world
        self.masked_folds, self.pairs = masked_folds, pairs

    @property
    def windows(self) -> int:
        return len(self.cache)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.cache) // self.batch_windows)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.cache))

    def _whole(self, order: NDArray[np.int64], step: int) -> NDArray[np.int64]:
        return order[step * self.batch_windows : (step + 1) * self.batch_windows]

    def epoch(self, epoch: int, first_step: int = 0, global_step: int | None = None) -> Iterator[list[Batch]]:
        order = self._order(epoch)
        start = epoch * self.steps_per_epoch + first_step if global_step is None else global_step
        for step in range(first_step, self.steps_per_epoch):
            mine = np.array_split(self._whole(order, step), self.world)[self.rank]
            yield [
                collate(
                    self.cache,
                    np.sort(micro),
                    self.schema,
                    masked_folds=self.masked_folds,
                    pairs=self.pairs,
                    epoch=epoch,
                    step=start + step - first_step,
                )
                for micro in np.array_split(mine, self.accumulate)
            ]

    def rows(self, epoch: int, step: int, together: bool = False) -> list[str]:
        return self.cache.describe(np.sort(self._whole(self._order(epoch), step)), self.schema)
