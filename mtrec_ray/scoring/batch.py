"""Batch scoring by Ray Data actors through the predictor: lists, states and profiles of users, given pairs, similar items."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.predictor import FilterError
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.scoring import asked
from mtrec_ray.scoring.asked import Piece, ScoringError, Split
from mtrec_ray.scoring.batch_size import best_batch
from mtrec_ray.scoring.shards import Output
from mtrec_ray.scoring.tables import OF_USERS, Ask, Tally, similar_tables, user_tables
from mtrec_ray.serving.sharded import ShardedIndex
from mtrec_ray.training.worker import load_schema
from mtrec_ray.watch import give_back_memory

log = logging.getLogger(__name__)

ITEMS = 10_000
"""Items of a shard of similar items."""
READ = 1024
"""Histories that are read together."""

Shard = dict[str, Any]
"""name; store: path of a part of the store, or None; asked: folder of the rows that ask for something, or None; piece: of a file of
histories, or None; items: range of the catalogue, or None."""


class _Actor:
    """One predictor per actor; a row is a shard."""

    def __init__(
        self, bundle_uri: str, root: str, identity: dict[str, Any], config: RunConfig, device: str, text_prefix: str | None,
        index: ShardedIndex | None,
    ) -> None:  # fmt: skip
        torch.set_num_threads(1)
        self.config, self.what = config, str(identity["what"])
        self.predictor = bundle.load(bundle_uri, verify=False, device=device)
        if index is not None:
            self.predictor.index = index
        if config.scoring.precision == "int8":
            self.predictor.to_int8()
        self.output = Output(root, identity)
        if text_prefix is not None:
            self.predictor.event_texts.known = EventTexts.open(text_prefix)
        self.batch = config.scoring.batch_users

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"error": b"", **self._shard(item["row"])}
        except (ValueError, storage.StorageError) as error:  # a user's mistake, or no space: said once, by the driver
            return {"error": pickle.dumps(error), "users": 0, "asked": 0, "items": 0}

    def _shard(self, shard: Shard) -> dict[str, int]:
        tally = Tally()
        if shard["items"] is not None:
            begin, end = shard["items"]
            tables = similar_tables(self.predictor, begin, end, self.config.scoring.k, READ, tally)
        else:
            ask = self._ask(shard, tally)
            if self.batch == "auto":
                self.batch = self._trial(shard, ask)
            tables = user_tables(self.predictor, self._histories(shard), replace(ask, batch_users=int(self.batch)), tally)
        self.output.write(shard["name"], tables, lambda: asdict(tally))
        give_back_memory()
        return {"users": tally.users, "asked": tally.asked, "items": tally.items}

    def _ask(self, shard: Shard, tally: Tally) -> Ask:
        scoring = self.config.scoring
        ask = Ask(self.what, scoring.k, where=scoring.where, skip_unknown=scoring.unknown_users == "skip")
        if shard["asked"] is None:
            return ask
        with tally.timed("read"):
            rows = asked.asked_of(*shard["asked"])
            once = asked.distinct_rows(rows)
            tally.asked, tally.doubled = len(rows), len(rows) - len(once)
        users = once["user_id"].combine_chunks().unique()
        return replace(ask, users=users, pairs=once if self.what == "pairs" else None)

    def _histories(self, shard: Shard) -> Iterator[pa.Table]:
        """Pieces of the store, or the histories of a file."""
        if shard["piece"] is not None:
            return iter([self._given(shard["piece"])])
        return iter(()) if shard["store"] is None else storage.iter_tables(shard["store"], READ)

    def _given(self, piece: Piece) -> pa.Table:
        uri, where = str(self.config.scoring.histories), f"{piece.path}, row groups {piece.row_groups[0]} to {piece.row_groups[-1]}"
        names = pq.read_schema(piece.path, filesystem=storage.resolve(uri)[0]).names
        table = asked.as_store(asked.read_piece(uri, piece, names), where)
        if len(table["user_id"].unique()) < len(table):
            raise ScoringError(f"scoring.histories: {where}: a user_id stands in more than one row; give each user one history")
        return table

    def _trial(self, shard: Shard, ask: Ask) -> int:
        """How many users together: tried on the first ones here, again and again where they are few."""
        first = next(iter(user for user in self._histories(shard) if len(user)), None)
        if first is None:
            return 256
        ask = replace(ask, users=None) if ask.pairs is None else ask

        def run(users: int) -> None:
            rows = pa.concat_tables(islice(_again(first), -(-users // len(first)))).slice(0, users)
            for _ in user_tables(self.predictor, [rows], replace(ask, batch_users=users), Tally()):
                pass

        return best_batch(run)


def _again(table: pa.Table) -> Iterator[pa.Table]:
    while True:
        yield table


def shards_of_store(data: storage.Directory) -> list[Shard]:
    """Every part of the store."""
    return [_shard(_name(p), store=p) for p in storage.list_uris(data.path("store"), ".parquet")]


def shards_of_rows(data: storage.Directory, folder: str, partitions: Sequence[int]) -> list[Shard]:
    """The partitions that a file of users or pairs names."""
    there = {_name(p): p for p in storage.list_uris(data.path("store"), ".parquet")}
    names = {number: f"part-{number:05d}" for number in sorted(partitions)}
    return [_shard(name, store=there.get(name), asked=(folder, number)) for number, name in names.items()]


def shards_of_histories(found: Sequence[Piece]) -> list[Shard]:
    return [_shard(f"part-{number:05d}", piece=piece) for number, piece in enumerate(found)]


def shards_of_items(items: int) -> list[Shard]:
    """Ranges of the catalogue's positions."""
    bounds = [(b, min(b + ITEMS, items)) for b in range(0, items, ITEMS)]
    return [_shard(f"part-{number:05d}", items=bound) for number, bound in enumerate(bounds)]


def _shard(name: str, **of: Any) -> Shard:
    return {"name": name, "store": None, "asked": None, "piece": None, "items": None, **of}


def _name(path: str) -> str:
    return storage.resolve(path)[1].rsplit("/", 1)[1].removesuffix(".parquet")


def check_output(config: RunConfig, what: str) -> None:
    """Raises ScoringError, NoRetrievalError for an output that the run's tasks do not give, or that the settings do not fit."""
    scoring = config.scoring
    if what in ("lists", "pairs"):
        config.require_retrieval("batch scoring")
    if what == "profiles" and not any(t.kind == "profile" for t in config.tasks.values()):
        raise ScoringError("profiles: the run has no task of kind profile; add one and train again")
    if (what == "pairs") != (scoring.pairs is not None):
        raise ScoringError(
            "scoring.pairs: a file with columns user_id and item_id is what --what pairs reads, and nothing else does"
        )
    if what == "pairs" and (scoring.users is not None or scoring.histories is not None):
        raise ScoringError("scoring.pairs: it names its users; take scoring.users and scoring.histories away")
    if scoring.where and what != "lists":
        raise ScoringError(f"scoring.where: a filter is for lists, not for {what}")


def check_catalogue(config: RunConfig, bundle_root: str, what: str) -> None:
    """Raises ScoringError where the catalogue cannot give what is asked for."""
    scoring = config.scoring
    catalogue = storage.read_table(storage.join(storage.Directory(bundle_root).prefix, "catalogue.parquet"), ["item_id"])
    left = len(catalogue) - (what == "similar")
    if what in ("lists", "similar") and scoring.k > left:
        raise ScoringError(f"scoring.k: {scoring.k} items of a list, and the catalogue has {left} to give; take at most so many")
    if scoring.where:
        try:
            if not bundle.load(bundle_root, verify=False).allowed(scoring.where).any():
                raise ScoringError(
                    f"scoring.where: no item of the catalogue has all of {dict(scoring.where)}; every list would be empty"
                )
        except FilterError as error:
            raise ScoringError(f"scoring.where: {error}") from None


def score(
    config: RunConfig,
    data: storage.Directory,
    bundle_root: str,
    root: str,
    text_prefix: str | None = None,
    what: str = "lists",
) -> dict[str, Any]:
    """Top lists (or states, or profiles) of every user of the store, of those of a file, or of the histories of a file; given
    pairs; or similar items of every item, as ROOT/part-*.parquet -> sums over all shards (docs/scoring.md) and seconds of stages.

    A part of the store (of the file, of the catalogue) is a shard; what a killed call had finished is not done again, with whatever
    number of workers, and what was published before stays until all of the new one is there (shards.py). text_prefix: of
    the encode stage, so that the texts of histories are not encoded again.
    Raises ScoringError, StorageError, NoRetrievalError.
    """
    scoring = config.scoring
    check_output(config, what)
    check_catalogue(config, bundle_root, what)
    identity: dict[str, Any] = {
        "bundle": storage.Directory(bundle_root).manifest["fingerprint"],
        "data": data.manifest["inputs"],
        "k": scoring.k,
        "what": what,
        "precision": scoring.precision,
        "where": {n: sorted(v) for n, v in scoring.where.items()},
    }
    of_users, rows, key = what in OF_USERS, scoring.pairs if what == "pairs" else scoring.users, ""
    found: list[Piece] = []
    if of_users and rows is not None:
        key = "scoring.pairs" if what == "pairs" else "scoring.users"
        columns = ("user_id", "item_id") if what == "pairs" else ("user_id",)
        found, identity["rows"] = asked.pieces(rows, key, columns)
        identity["unknown_users"] = scoring.unknown_users
    elif of_users and scoring.histories is not None:
        found, identity["histories"] = asked.histories(scoring.histories, load_schema(data.prefix))
    output = Output(root, identity)
    manifest = output.published()
    if manifest is not None:
        log.info("score: reused %s", root)
        storage.delete(storage.join(root, "_draft"))
        return dict(manifest["counts"])
    done = output.begin()
    if not of_users:
        shards, total = shards_of_items(load_schema(data.prefix).n_items), load_schema(data.prefix).n_items
    elif rows is not None:
        folder, per_partition = split_rows(config, data, rows, key, columns, found, storage.join(output.draft, "_asked"))
        shards, total = shards_of_rows(data, folder, list(per_partition)), sum(per_partition.values())
    elif scoring.histories is not None:
        shards, total = shards_of_histories(found), sum(p.rows for p in found)
    else:
        shards, total = shards_of_store(data), int(data.manifest["rows"]["users"])
    missing = [s for s in shards if s["name"] not in done]
    unit = "items" if not of_users else "users" if rows is None else "asked"
    before = sum(int(entry[unit]) for entry in done.values())
    if done:
        log.info("score: %d of %d shards (%d %s) were finished by a run before", len(done), len(shards), before, unit)
    if missing:
        _run(config, bundle_root, root, identity, text_prefix, missing, runtime.Progress(unit, total, before))
    counts = dict(output.publish([s["name"] for s in shards])["counts"])
    log.info("score: %s", counts)
    return counts


def split_rows(
    config: RunConfig, data: storage.Directory, uri: str, key: str, columns: tuple[str, ...], found: Sequence[Piece], folder: str
) -> tuple[str, dict[int, int]]:
    """A file of users or pairs by the store's partitions -> (folder, rows of every partition); once for an output. Raises
    ScoringError."""
    counts_uri = storage.join(folder, "_counts.json")
    if storage.exists(counts_uri):
        return folder, {int(p): int(n) for p, n in storage.read_json(counts_uri).items()}
    if storage.exists(folder):  # a split that was killed
        storage.delete(folder)
    settings = config.data.pseudonyms
    pseudonyms = None if settings is None else Pseudonyms.load(settings, data.manifest["pseudonym_key"])
    split = Split(uri, key, columns, folder, int(data.manifest["partitions"]), pseudonyms)
    counts: dict[int, int] = {}
    for _, part in runtime.for_each(asked.split_piece, split, list(enumerate(found)), f"score: {key}"):
        for partition, rows in part.items():
            counts[partition] = counts.get(partition, 0) + rows
    storage.write_json(counts_uri, {str(p): n for p, n in counts.items()})
    return folder, counts


def _run(
    config: RunConfig, bundle_root: str, root: str, identity: dict[str, Any], text_prefix: str | None, missing: list[Shard],
    progress: runtime.Progress,
) -> None:  # fmt: skip
    """Score the shards that do not count yet. Raises what a shard raised, and PreflightError."""
    scoring, resources = config.scoring, runtime.capacity()
    workers = min(scoring.workers, len(missing))
    gpu = scoring.use_gpu is True or (scoring.use_gpu == "auto" and resources.get("GPU", 0) >= workers)
    if gpu and resources.get("GPU", 0) < workers:
        raise runtime.PreflightError(
            f"scoring.use_gpu with {workers} workers, but the cluster has {resources.get('GPU', 0):g} GPUs: scoring would wait for "
            "ever. Lower scoring.workers, or set it to false"
        )
    shards = config.index.shards if config.index.shards > 1 and identity["what"] == "lists" else 0
    if workers + shards > resources.get("CPU", 0):
        raise runtime.PreflightError(
            f"scoring.workers is {scoring.workers} and index.shards {config.index.shards}, but the cluster has "
            f"{resources.get('CPU', 0):g} CPUs: scoring would wait for ever. Lower them, or add nodes"
        )
    items = load_schema(storage.Directory(bundle_root).prefix).n_items if shards else 0
    index = ShardedIndex(bundle_root, items, shards) if shards else None
    try:
        dataset = ray.data.from_items([{"row": s} for s in missing], override_num_blocks=len(missing)).map(
            _Actor,
            fn_constructor_args=(bundle_root, root, identity, config, "cuda" if gpu else "cpu", text_prefix, index),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_gpus=1 if gpu else None,
        )
        for row in runtime.rows_of(dataset, "score: shards", len(missing), progress=progress):
            if row["error"]:
                raise pickle.loads(row["error"])
    finally:
        if index is not None:
            index.close()
