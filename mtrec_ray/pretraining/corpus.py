"""The texts: items as the encoder reads them, and histories written as text, of the train part alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.schema import LogSchema

BETWEEN = "; "
"""Between the titles of a history."""
PARTS = 1000
COLUMNS = ["user_id", "target_item", "target_time", "target_positive"]


class CorpusError(ValueError):
    """Texts that nothing can be learnt from, with the cure."""


@dataclass
class Corpus:
    """What is trained on, and what is held out by kind of text."""

    train: list[str] = field(default_factory=list)
    held: dict[str, list[str]] = field(default_factory=dict)
    """`items`, `histories`: never empty."""


def build_corpus(config: PretrainConfig, data_prefix: str) -> Corpus:
    """Prepared data -> texts. No item without a training event, and no event of valid or test, is read.

    Whole items and whole users are held out, by a hash of their id. Raises CorpusError.
    """
    schema = LogSchema.model_validate_json(storage.read_bytes(storage.join(data_prefix, "schema.json")))
    catalogue = storage.read_table(storage.join(data_prefix, "catalogue.parquet"), ["item_id", "title", "text"])
    catalogue = catalogue.slice(0, schema.n_train_items)
    corpus = Corpus()
    if "items" in config.texts:
        _add(corpus, "items", *_items(catalogue), config.held_out)
    if "histories" in config.texts:
        _add(corpus, "histories", *_histories(config, data_prefix, catalogue), config.held_out)
    if not corpus.train:
        raise CorpusError("pretrain.texts: there is no text; declare data.text, or take histories of items with titles")
    return corpus


def _add(corpus: Corpus, kind: str, texts: list[str], owner: NDArray[np.uint64], held_out: float) -> None:
    held = is_held(owner, held_out)
    corpus.train += [t for t, h in zip(texts, held, strict=True) if not h]
    kept = [t for t, h in zip(texts, held, strict=True) if h]
    if kept:
        corpus.held[kind] = kept


def _items(catalogue: pa.Table) -> tuple[list[str], NDArray[np.uint64]]:
    """Distinct texts and the hash of each one, so that items with one text are on one side."""
    texts = sorted({t for t in catalogue["text"].to_pylist() if t})
    return texts, hash_ids(pa.array(texts, pa.string()))


def _histories(config: PretrainConfig, data_prefix: str, catalogue: pa.Table) -> tuple[list[str], NDArray[np.uint64]]:
    """Titles of a user's positive training targets in order of time, `history_items` to a text; a hash of the user each.

    Every event is a target once, so no event is told twice.
    """
    titles = np.array(catalogue["title"].to_pylist(), dtype=object)
    texts: list[str] = []
    owners: list[np.uint64] = []
    for user, item in sequences(config, data_prefix):
        for begin in range(0, len(item), config.history_items):
            named = [str(t) for t in titles[item[begin : begin + config.history_items]] if t]
            if len(named) > 1:
                texts.append(BETWEEN.join(named))
                owners.append(user)
    return texts, np.array(owners, dtype=np.uint64)


def sequences(config: PretrainConfig, data_prefix: str) -> Iterator[tuple[np.uint64, NDArray[np.int64]]]:
    """(hash of the user, positive training targets in order of time) of every chosen user."""
    users = _chosen_users(config, data_prefix)
    for uri in _files(data_prefix):  # a user's windows are all in one file
        flat = _positives(storage.read_table(uri, COLUMNS), users)
        user, item = flat["user"].to_numpy(), flat["item"].to_numpy()
        for rows in np.split(np.arange(len(user)), np.flatnonzero(user[1:] != user[:-1]) + 1):
            if len(rows):
                yield user[rows[0]], item[rows]


def is_held(owner: NDArray[np.uint64], held_out: float) -> NDArray[np.bool_]:
    """Whether a hash is among those held out."""
    return np.asarray(owner % PARTS < round(held_out * PARTS))


def _files(data_prefix: str) -> list[str]:
    folder = storage.join(data_prefix, "windows", "train")
    return [storage.join(folder, name.rsplit("/", 1)[-1]) for name in storage.list_files(folder, ".parquet")]


def _chosen_users(config: PretrainConfig, data_prefix: str) -> NDArray[np.uint64]:
    """Hashes of the users whose histories are written."""
    known = [hash_ids(storage.read_table(uri, ["user_id"])["user_id"]) for uri in _files(data_prefix)]
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *known]))[: config.max_users]


def _positives(table: pa.Table, users: NDArray[np.uint64]) -> pa.Table:
    """Positive targets, by user and time: user (hash), item."""
    lists = {n: table[n].combine_chunks() for n in COLUMNS[1:]}
    row = pc.list_parent_indices(lists["target_item"]).to_numpy()
    user = hash_ids(table["user_id"])[row]
    flat = {n: v.flatten().to_numpy(zero_copy_only=False) for n, v in lists.items()}
    kept = flat["target_positive"].astype(bool) & np.isin(user, users)
    order = np.lexsort((flat["target_time"][kept], user[kept]))  # stable: equal times stay in the log's order
    return pa.table({"user": user[kept][order], "item": flat["target_item"][kept][order]})
