"""What prepared data were made from: which files, and, when days were appended or users forgotten, what came before.

`inputs` of a data directory's manifest changes whenever its content does. `covers` says which log and configuration
that content stands for: data that grew day by day cover the same as data prepared at once, and are not made anew.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from mtrec_ray import storage
from mtrec_ray.config import RunConfig, TableConfig
from mtrec_ray.data.sources import Unit
from mtrec_ray.privacy import PseudonymKeyError

FORGOTTEN = "forgotten.json"
Files = dict[str, dict[str, Any]]
"""Path -> size, modified (ns), sha256."""


ANEW = "prepare anew, without --append (jobs.nightly: with --anew)"


class DataError(ValueError):
    """A log that cannot be prepared; nothing has been published."""


@dataclass(frozen=True)
class Before:
    """The published data that days are appended to."""

    prefix: str
    generation: int
    """How many times days were appended, this time included."""
    cuts: tuple[int, int]
    rest_hash: int
    n_train_items: int
    parts: dict[str, dict[str, int]]
    """Partition -> its counts."""
    settled: dict[str, dict[str, int]]
    """Partition -> its events, and what a long log's join says of it."""
    log_end: int
    read: int
    forgotten: int
    """Rows read, and those of forgotten users among them."""
    same_users: bool
    """Whether the users table is the one of before."""
    files: dict[int, str] = field(default_factory=dict)
    """Names of the files that are there already, by their index."""


def listed(config: RunConfig) -> dict[str, list[str]]:
    """Paths of the files of every table, none where a table cannot be listed (sources.py says why)."""

    def paths(table: TableConfig) -> list[str]:
        try:
            filesystem, path = storage.resolve(table.path)
            return [path] if filesystem.get_file_info(path).is_file else storage.list_files(table.path)
        except (pa.ArrowException, OSError):
            return []

    tables = {n: getattr(config.data, n) for n in ("interactions", "items", "users")}
    return {n: paths(t) for n, t in tables.items() if t is not None}


def table_files(table: TableConfig, paths: list[str], known: Files) -> Files:
    """Files of a table with their content's hashes; those that look as they did when they were `known` are not
    read again."""
    filesystem, _ = storage.resolve(table.path)
    infos = filesystem.get_file_info(paths)

    def describe(info: Any) -> dict[str, Any]:
        seen = known.get(info.path)
        if seen and (seen["size"], seen["modified"]) == (info.size, info.mtime_ns):
            return seen
        return {
            "size": info.size, "modified": info.mtime_ns, "sha256": storage.file_fingerprint_of_path(table.path, info.path),
        }  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        return dict(zip([i.path for i in infos], pool.map(describe, infos), strict=True))


def covered(config: RunConfig, root: str, published: dict[str, Any] | None, files: dict[str, list[str]]) -> dict[str, Any]:
    """Everything that prepared data depend on: the config's data part, the files' content, who was forgotten.

    files: from `listed`, before the log's units were: what arrives in between is read and not covered, never the reverse.
    """
    known: dict[str, Files] = (published or {}).get("covered", {}).get("files", {})
    return {
        "schema_version": storage.SCHEMA_VERSION,
        "data": config.data.model_dump(mode="json"),
        "positive": config.positive_expression,
        "files": {n: table_files(getattr(config.data, n), paths, known.get(n, {})) for n, paths in files.items()},
        "forgotten": sorted(forgotten(root)),
    }


def covers(parts: dict[str, Any]) -> str:
    """Fingerprint of what is covered: contents, not when files were written."""
    return storage.fingerprint(parts | {"files": {n: _contents(parts, n) for n in parts["files"]}})


def _contents(parts: dict[str, Any], table: str) -> list[str]:
    """Hashes of a table's files in the order of their names."""
    return [f["sha256"] for _, f in sorted(parts["files"].get(table, {}).items())]


def forgotten(root: str) -> frozenset[str]:
    """Hashes of the users that were forgotten, whom a later preparation leaves out."""
    uri = storage.join(root, FORGOTTEN)
    return frozenset(storage.read_json(uri)["users"]) if storage.exists(uri) else frozenset()


def check_forgotten(root: str, key_fingerprint: str | None) -> None:
    """Raise PseudonymKeyError where users were forgotten by other pseudonyms than those of a key: they would come back."""
    uri = storage.join(root, FORGOTTEN)
    if not storage.exists(uri):
        return
    found = storage.read_json(uri)
    of = found.get("pseudonym_key", key_fingerprint)
    if found["users"] and of != key_fingerprint:
        raise PseudonymKeyError(
            f"{uri} knows forgotten users by {_ids_of(of)}, and the configuration now says {_ids_of(key_fingerprint)}: they "
            "would come back. Delete that file, prepare, and run jobs.forget for them again at once"
        )


def _ids_of(key_fingerprint: str | None) -> str:
    return "the log's own ids" if key_fingerprint is None else f"pseudonyms of the key {key_fingerprint}"


def forgotten_hash(user_id: str) -> str:
    return storage.sha256(f"mtrec_ray forgotten {user_id}")


def appended(parts: dict[str, Any], manifest: dict[str, Any], prefix: str, units: list[Unit]) -> tuple[Before, list[Unit]]:
    """What is there, and the units of files that are not part of it yet, numbered on from them.

    Raises DataError where appending would not be the same as preparing anew.
    """
    old = manifest["covered"]
    for what in ("data", "positive", "schema_version"):
        if parts[what] != old[what]:
            names = [k for k in parts[what] if parts[what][k] != old[what].get(k)] if what == "data" else []
            raise DataError(
                f"--append: the configuration differs from the one of the published data ({', '.join(names) or what}); {ANEW}"
            )
    if parts["forgotten"] != old["forgotten"]:
        raise DataError("--append: jobs.forget was stopped before it had ended; run it again first, for the same users")
    there: Files = old["files"]["interactions"]
    gone = sorted(set(there) - set(parts["files"]["interactions"]))
    if gone:
        raise DataError(f"--append: {gone[0]} is gone since it was prepared ({len(gone)} such files); {ANEW}")
    for path, found in parts["files"]["interactions"].items():
        if path in there and there[path]["sha256"] != found["sha256"]:
            raise DataError(f"--append: {path} has changed since it was prepared; {ANEW}")
    order: list[str] = manifest["order"]
    new = sorted({u.path for u in units} - set(order))
    index = {path: len(order) + i for i, path in enumerate(new)}
    kept = [u for u in units if u.path in index]
    before = Before(
        prefix=prefix,
        generation=int(manifest["generation"]) + 1,
        cuts=(int(manifest["cuts"][0]), int(manifest["cuts"][1])),
        rest_hash=int(manifest["rest_hash"]),
        n_train_items=int(manifest["n_train_items"]),
        parts=manifest["parts"],
        settled=manifest["settled"],
        log_end=int(manifest["log_end"]),
        read=int(manifest["rows"]["read"]),
        forgotten=int(manifest["rows"]["forgotten"]),
        same_users=_contents(parts, "users") == _contents(old, "users"),
        files=dict(enumerate(order)),
    )
    first = int(manifest["units"])
    return before, [replace(u, number=first + i, file_index=index[u.path]) for i, u in enumerate(kept)]
