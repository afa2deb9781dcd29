"""Items that join, change or leave a catalogue while it is served. It knows no Ray.

A store keeps the last state of every item that was touched; the number of a change grows. A replica reads what is newer than
what it has (`LiveItems.refresh`) and makes of a bundle's predictor the one for the catalogue as it is now. Items that join have
positions in the order in which they first did, and keep them, so that stages with older and newer states understand each other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from mtrec_ray.config import RunConfig
from mtrec_ray.data.catalogue import catalogue_rows, item_columns
from mtrec_ray.features import FeatureError, text_of
from mtrec_ray.item_features import column_name
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LogSchema


class ItemError(ValueError):
    """An item that the catalogue cannot take; the message names the column."""


@dataclass(frozen=True)
class StoredItem:
    """The last state of an item that was touched."""

    item_id: str
    number: int = 0
    """Of the last change."""
    place: int | None = None
    """Order among the items that joined; None for one that never did."""
    columns: Mapping[str, Any] | None = None
    """Its row of the items table; None where the bundle's own is meant."""
    vector: bytes = b""
    """Of its text, float32."""
    encoder: str = ""
    """Which TextEncoder made the vector."""
    available: bool = True
    blocked: bool = False
    deleted: bool = False

    def changed(self, number: int, place: int, fields: Mapping[str, Any]) -> StoredItem:
        """After a change. place: that it gets if it joins now."""
        joins = self.place is None and fields.get("columns") is not None
        return replace(self, number=number, place=place if joins else self.place, **fields)


FIELDS = ("columns", "vector", "encoder", "available", "blocked", "deleted")
"""What a change may say."""


class ItemStore(Protocol):
    """Where changes of items are kept. Raises StoreError where it cannot be reached."""

    def change_item(self, item_id: str, fields: Mapping[str, Any]) -> StoredItem:
        """Some of FIELDS become others; durable when this returns -> the item's state."""

    def items_since(self, number: int) -> list[StoredItem]:
        """Items whose last change is later, in the order of changes."""


class ItemRules:
    """A row of the items table as somebody sends it -> what a predictor reads of it, as preparation makes it."""

    def __init__(self, config: RunConfig, schema: LogSchema) -> None:
        self.config, self.specs = config, {s.name: s for s in schema.item_features}
        self.names = [n for n in item_columns(config.data) if n != "item_id"]

    def check(self, columns: Mapping[str, Any]) -> dict[str, str | None]:
        """Values as texts. Raises ItemError."""
        if not self.names or self.config.data.text is None:
            raise ItemError(
                "items of this bundle have no texts: one that joins could not be told from others; train with data.text"
            )
        out: dict[str, str | None] = {}
        for name, value in columns.items():
            if name not in self.names:
                raise ItemError(f"columns: unknown {name!r}; the configuration reads {self.names}")
            try:
                out[name] = text_of(value)
            except FeatureError as error:
                raise ItemError(f"columns.{name}: {error}") from None
        if not any(out.get(name) for name in self.config.data.text.fields):
            raise ItemError(f"columns: none of {list(self.config.data.text.fields)} is given, and the item's text is made of them")
        return out

    def rows(self, items: Sequence[tuple[str, Mapping[str, Any]]]) -> pa.Table:
        """Catalogue rows (item_id, title, text, feature_NAME as numbers ...) of some items."""
        ids = pa.array([i for i, _ in items], pa.string())
        given = {n: pa.array([c.get(n) for _, c in items], pa.string()) for n in self.names}
        nothing = np.zeros(len(items), np.int64)
        table = catalogue_rows(
            self.config.data, pa.table({"item_id": ids, **given}), ids, nothing.astype(bool), nothing, nothing
        )  # fmt: skip
        for name, spec in self.specs.items():
            codes, place = spec.encode(table[column_name(name)].combine_chunks()), table.column_names.index(column_name(name))
            table = table.set_column(place, column_name(name), codes if isinstance(codes, pa.Array) else pa.array(codes))
        return table


Encode = Callable[[Sequence[str]], np.ndarray[Any, np.dtype[np.float32]]]


class LiveItems:
    """What a replica knows of changed items. Any thread may ask."""

    def __init__(self, since: Callable[[int], list[StoredItem]]) -> None:
        """since: ItemStore.items_since."""
        self._since, self._lock = since, threading.Lock()
        self.number, self._rows = 0, dict[str, StoredItem]()

    def refresh(self) -> int:
        """Read what is newer -> the number that is known now. Raises StoreError."""
        with self._lock:
            for item in self._since(self.number):
                self._rows[item.item_id] = item
                self.number = max(self.number, item.number)
            return self.number

    def get(self, item_id: str) -> StoredItem | None:
        return self._rows.get(item_id)

    def predictor(self, base: Predictor, encoder: str, encode: Encode) -> tuple[int, Predictor]:
        """base, for the catalogue as it is known now -> (its number, itself).

        encoder: which TextEncoder base reads; texts whose vectors are another's are encoded anew.
        """
        with self._lock:
            number, rows = self.number, list(self._rows.values())
        if not number:
            return 0, base
        joined = sorted((r for r in rows if r.place is not None), key=lambda r: r.place or 0)
        removed = {r.item_id for r in rows if r.deleted}
        blocked = {r.item_id for r in rows if r.blocked or not r.available}
        if not joined or base.model.item_tower.text is None:  # (a model of ids alone cannot take them)
            return number, base.with_changes(removed=removed, blocked=blocked)
        table = ItemRules(base.config, base.schema).rows([(r.item_id, r.columns or {}) for r in joined])
        vectors = [np.frombuffer(r.vector, np.float32) if r.encoder == encoder else None for r in joined]
        stale = [n for n, v in enumerate(vectors) if v is None]
        if stale:
            texts = table["text"].to_pylist()
            for n, vector in zip(stale, encode([texts[n] or "" for n in stale]), strict=True):
                vectors[n] = vector
        text_AE = torch.from_numpy(np.stack([v for v in vectors if v is not None]))
        return number, base.with_changes(table, text_AE, removed, blocked)
