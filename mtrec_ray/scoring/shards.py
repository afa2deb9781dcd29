"""Shards of a batch output: which of them count, how all are published at once, and how they are proved. It knows no Ray.

    ROOT/NAME.parquet                       published shards
    ROOT/_manifest.json                     written last: identity, sums, and rows, bytes and SHA-256 of every shard
    ROOT/_draft/IDENTITY/NAME.parquet       shards of an output that is not whole yet
    ROOT/_draft/IDENTITY/_done/NAME.json    written after its shard's data: from now on the shard counts

A rerun of the same identity (bundle, data, arguments) goes on with the shards that do not count yet; another one starts anew, so
two outputs never mix. Publishing goes on where it was killed.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.data.partition import hash_ids

MANIFEST = "_manifest.json"
SUMMED = ("users", "unknown", "items", "rows", "fallbacks", "empty", "doubled", "unknown_items", "bytes")


class VerifyError(ValueError):
    """A published output that is not what its manifest says."""


class Output:
    """A batch output below `root`, made from `identity`."""

    def __init__(self, root: str, identity: Mapping[str, Any]) -> None:
        self.root, self.identity = root, dict(identity)
        self.draft = storage.join(root, "_draft", storage.fingerprint(self.identity)[:16])

    def published(self) -> dict[str, Any] | None:
        """The manifest where this very output is published."""
        manifest = read_manifest(self.root)
        same = manifest is not None and manifest.get("identity") == self.identity and "shards" in manifest
        return manifest if same else None

    def check_place(self) -> None:
        """Raises ValueError where something lies that no output of this kind left: it would be published over."""
        if not storage.exists(self.root) or storage.exists(storage.join(self.root, "_draft")):  # published half, perhaps
            return
        path = storage.resolve(self.root)[1]
        there = [p.removeprefix(path + "/") for p in storage.list_files(self.root)]
        strange = there if read_manifest(self.root) is None else [n for n in there if not re.fullmatch(r"part-\d+\.parquet", n)]
        if strange:
            raise ValueError(
                f"{self.root}: not empty, and {strange[0]!r} ({len(strange)} such files) is of no output of this kind; choose "
                "another place, or empty this one"
            )

    def begin(self) -> dict[str, dict[str, Any]]:
        """Drop the drafts of other outputs -> shards that count already. Raises ValueError as check_place does."""
        self.check_place()
        drafts = storage.join(self.root, "_draft")
        path = storage.resolve(drafts)[1]
        names = {p.removeprefix(path + "/").split("/")[0] for p in storage.list_files(drafts)} if storage.exists(drafts) else set()
        for name in names - {storage.resolve(self.draft)[1].rsplit("/", 1)[1]}:
            storage.delete(storage.join(drafts, name))
        return self.done()

    def done(self) -> dict[str, dict[str, Any]]:
        """Shards that count -> what is known of them."""
        folder = storage.join(self.draft, "_done")
        if not storage.exists(folder):
            return {}
        found = {}
        for path in storage.list_files(folder, ".json"):
            name = path.rsplit("/", 1)[1].removesuffix(".json")
            found[name] = dict(storage.read_json(storage.join(folder, f"{name}.json")))
        return found

    def write(self, name: str, tables: Iterable[pa.Table], facts: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """A shard: its data, table by table, then its entry. facts: asked for when the last table is written.

        The data get their name when they are whole, since an actor of a killed job may still be at the same shard.
        """
        uri, rows = storage.join(self.draft, f"_{name}-{uuid.uuid4().hex[:12]}.parquet"), 0

        def counted() -> Iterable[pa.Table]:
            nonlocal rows
            for table in tables:
                rows += len(table)
                yield table

        storage.write_tables(uri, counted())
        entry = dict(facts()) | contents(uri, rows)
        filesystem, path = storage.resolve(uri)
        filesystem.move(path, storage.resolve(storage.join(self.draft, f"{name}.parquet"))[1])
        storage.write_json(storage.join(self.draft, "_done", f"{name}.json"), entry)
        return entry

    def publish(self, names: Sequence[str]) -> dict[str, Any]:
        """Put the shards in the place of what was published before -> the manifest."""
        shards = self.done()
        missing = sorted(set(names) - set(shards))
        assert not missing and len(shards) == len(names), missing
        manifest_uri, cleared = storage.join(self.root, MANIFEST), storage.join(self.draft, "_cleared.json")
        filesystem, path = storage.resolve(self.root)
        if not storage.exists(cleared):
            storage.delete(manifest_uri)  # from now on nothing is published, until all of it is
            for old in published_files(self.root):
                filesystem.delete_file(old)
            storage.write_json(cleared, {})
        for name in names:
            source = storage.join(self.draft, f"{name}.parquet")
            if storage.exists(source):
                filesystem.move(storage.resolve(source)[1], f"{path}/{name}.parquet")
        counts: dict[str, Any] = {key: sum(int(s.get(key, 0)) for s in shards.values()) for key in SUMMED}
        stages = sorted({stage for s in shards.values() for stage in s["seconds"]})
        counts |= {"seconds": {stage: round(sum(s["seconds"].get(stage, 0.0) for s in shards.values()), 3) for stage in stages}}
        manifest = {"identity": self.identity, "counts": counts, "shards": shards}
        storage.write_json(manifest_uri, manifest)
        storage.delete(storage.join(self.root, "_draft"))
        return manifest


def read_manifest(root: str) -> dict[str, Any] | None:
    uri = storage.join(root, MANIFEST)
    return dict(storage.read_json(uri)) if storage.exists(uri) else None


def published_files(root: str) -> list[str]:
    """Paths of the shards that lie directly below the root."""
    if not storage.exists(root):
        return []
    _, path = storage.resolve(root)
    return [p for p in storage.list_files(root, ".parquet") if "/" not in p.removeprefix(path + "/")]


def contents(uri: str, rows: int) -> dict[str, Any]:
    """What a shard's file holds."""
    filesystem, path = storage.resolve(uri)
    return {"rows": rows, "bytes": int(filesystem.get_file_info(path).size), "sha256": storage.file_fingerprint_of_path(uri, path)}


def replace_shard(root: str, name: str, table: pa.Table) -> None:
    """Other rows in a published shard, and a manifest that says so; the shard is replaced as a whole."""
    filesystem, path = storage.resolve(storage.join(root, f"{name}.parquet"))
    draft = storage.join(root, f"_replace-{name}.parquet")
    storage.write_table(draft, table)
    facts = contents(draft, len(table))
    filesystem.move(storage.resolve(draft)[1], path)
    manifest = read_manifest(root)
    if manifest is None:
        return
    before = manifest.get("shards", {}).get(name)
    if before is not None:
        for key in ("rows", "bytes"):
            manifest["counts"][key] += facts[key] - before[key]
        manifest["shards"][name] = before | facts
    storage.write_json(storage.join(root, MANIFEST), manifest)


def verify(root: str) -> dict[str, Any]:
    """Read every shard again -> the manifest's counts. Raises VerifyError, naming the shard, for anything that is not as written:
    a file too many or too few, another checksum or number of rows, ranks that do not count from 1, a user (or
    item) in two places."""
    manifest = read_manifest(root)
    if manifest is None:
        raise VerifyError(f"{root}: nothing is published here (no {MANIFEST}); run jobs.score")
    if "shards" not in manifest:
        raise VerifyError(f"{root}: written by an older version, which kept no checksums; run jobs.score again")
    shards: dict[str, dict[str, Any]] = manifest["shards"]
    there = {p.rsplit("/", 1)[1].removesuffix(".parquet") for p in published_files(root)}
    if there != set(shards):
        odd = sorted(there ^ set(shards))
        raise VerifyError(f"{root}: {odd[:3]} ({len(odd)} in all) are not both in the manifest and here; run jobs.score again")
    users = []
    for name, entry in sorted(shards.items()):
        uri = storage.join(root, f"{name}.parquet")
        found = contents(uri, int(entry["rows"]))
        if found["sha256"] != entry["sha256"]:
            raise VerifyError(f"{uri}: the checksum differs from the manifest's: damaged or changed; run jobs.score again")
        table = storage.read_table(uri)
        if len(table) != entry["rows"]:
            raise VerifyError(f"{uri}: {len(table)} rows, and the manifest says {entry['rows']}")
        if len(table):
            ranks = table["rank"].to_numpy() if "rank" in table.column_names else None
            users.append(_users(uri, hash_ids(table[table.column_names[0]]), ranks))
    together = np.concatenate(users) if users else np.zeros(0, np.uint64)
    if len(np.unique(together)) < len(together):
        raise VerifyError(f"{root}: a user (or an item) stands in two places")
    total = {key: sum(int(s.get(key, 0)) for s in shards.values()) for key in SUMMED}
    wrong = [key for key in SUMMED if manifest["counts"].get(key, 0) != total[key]]
    if wrong:
        raise VerifyError(f"{root}: the manifest's {wrong} are not the sums of its shards")
    return dict(manifest["counts"])


def _users(uri: str, user: NDArray[np.uint64], rank: NDArray[Any] | None) -> NDArray[np.uint64]:
    """Hashes of a shard's users (or items), whose rows must stand together, with ranks that count from 1 where there are any."""
    begins = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    expected = np.arange(len(user)) - np.repeat(begins, np.diff(np.append(begins, len(user)))) + 1
    if rank is not None and (rank != expected).any():
        raise VerifyError(f"{uri}: row {int(np.flatnonzero(rank != expected)[0])}: ranks do not count from 1")
    return user[begins]
