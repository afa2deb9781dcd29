"""Histories of the prepared data: files of user partitions, which batch scoring reads and live stores begin with."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import pyarrow as pa

from mtrec_ray import storage
from mtrec_ray.data.partition import user_partition
from mtrec_ray.histories import History


def histories_from_table(table: pa.Table) -> list[History]:
    """Rows of the store -> histories, in the table's order."""
    actions = [n.removeprefix("history_action_") for n in table.column_names if n.startswith("history_action_")]
    context = [n.removeprefix("history_context_") for n in table.column_names if n.startswith("history_context_")]
    columns = {n: table[n].to_pylist() for n in table.column_names}
    return [
        History(
            item_ids=columns["history_item_id"][i],
            times=columns["history_time"][i],
            actions={a: columns[f"history_action_{a}"][i] for a in actions},
            context={c: columns[f"history_context_{c}"][i] for c in context},
            seen_item_ids=columns["seen_item_id"][i],
            seen_times=columns["seen_time"][i],
        )
        for i in range(len(table))
    ]


class PreparedHistories:
    """Read-only histories by user id. Partitions are read when first asked for; the last `keep` stay in memory.

    `version` changes with the data, so that answers can say which history they used. When data are published anew (an
    append, a forgotten user) the old files go, and the store turns to the new ones as it meets the first that is gone.
    """

    def __init__(self, data_root: str, keep: int = 64) -> None:
        self.directory = storage.Directory(data_root)
        self._keep = keep
        self._parts: OrderedDict[int, tuple[pa.Table, dict[str, int]]] = OrderedDict()
        self._lock = threading.Lock()
        self._open()

    def _open(self) -> None:
        """What is published now. Raises StorageError where nothing is."""
        manifest = self.directory.manifest
        self.partitions, self.version = int(manifest["partitions"]), str(manifest["inputs"])[:16]
        self._prefix, self._files = storage.join(self.directory.root, manifest["prefix"]), set(manifest["files"])
        self._parts.clear()

    def get(self, user_id: str) -> History | None:
        """A user's history; None for a user that the store lacks. Raises StorageError when its files are gone."""
        with self._lock:
            try:
                table, rows = self._part(user_id)
            except (storage.StorageError, FileNotFoundError):
                self._open()
                table, rows = self._part(user_id)
        row = rows.get(user_id)
        return None if row is None else histories_from_table(table.slice(row, 1))[0]

    def user_ids(self) -> Sequence[str]:
        """Every user, sorted. For demonstrations and tests: it reads the whole store's id column."""
        return sorted(storage.read_table(storage.join(self._prefix, "store"), ["user_id"])["user_id"].to_pylist())

    def _part(self, user_id: str) -> tuple[pa.Table, dict[str, int]]:
        """The partition that holds a user, empty where no user is in it."""
        number = int(user_partition([user_id], self.partitions)[0])
        if number not in self._parts:
            name = f"store/part-{number:05d}.parquet"
            there = name in self._files
            table = (
                storage.read_table(storage.join(self._prefix, name)) if there else pa.table({"user_id": pa.array([], pa.string())})
            )
            self._parts[number] = (table, {u: i for i, u in enumerate(table["user_id"].to_pylist())})
        self._parts.move_to_end(number)
        while len(self._parts) > self._keep:
            self._parts.popitem(last=False)
        return self._parts[number]
