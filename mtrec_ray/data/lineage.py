"""What prepared data were made from: which files, and, when days were appended or users forgotten, what came before.

`inputs` of a data directory's manifest changes whenever its content does. `covers` says which log and configuration
that content stands for: data that grew day by day cover the same as data prepared at once, and are not made anew.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from mtrec_ray import storage
from mtrec_ray.config import RunConfig, TableConfig
from mtrec_ray.data.sources import Unit

FORGOTTEN = "forgotten.json"
Files = dict[str, dict[str, Any]]
"""Path -> size, modified (ns), sha256."""


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
    files: dict[int, str] = field(default_factory=dict)
    """Names of the files that are there already, by their index."""


def table_files(table: TableConfig, known: Files) -> Files:
    """The files of a table with their content's hashes; those that look as they did when they were `known` are not
    read again."""
    filesystem, path = storage.resolve(table.path)
    info = filesystem.get_file_info(path)
    infos = [info] if info.is_file else filesystem.get_file_info(storage.list_files(table.path))

    def describe(info: Any) -> dict[str, Any]:
        seen = known.get(info.path)
        if seen and (seen["size"], seen["modified"]) == (info.size, info.mtime_ns):
            return seen
        return {
            "size": info.size, "modified": info.mtime_ns, "sha256": storage.file_fingerprint_of_path(table.path, info.path),
        }  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        return dict(zip([i.path for i in infos], pool.map(describe, infos), strict=True))


def covered(config: RunConfig, root: str, published: dict[str, Any] | None) -> dict[str, Any]:
    """Everything that prepared data depend on: the config's data part, the files' content, who was forgotten."""
    known: dict[str, Files] = (published or {}).get("covered", {}).get("files", {})
    tables = {n: getattr(config.data, n) for n in ("interactions", "items", "users")}
    return {
        "schema_version": storage.SCHEMA_VERSION,
        "data": config.data.model_dump(mode="json"),
        "positive": config.positive_expression,
        "files": {n: table_files(t, known.get(n, {})) for n, t in tables.items() if t is not None},
        "forgotten": sorted(forgotten(root)),
    }


def covers(parts: dict[str, Any]) -> str:
    """Fingerprint of what is covered: contents, not when files were written."""
    files = {n: [f["sha256"] for _, f in sorted(table.items())] for n, table in parts["files"].items()}
    return storage.fingerprint(parts | {"files": files})


def forgotten(root: str) -> frozenset[str]:
    """Hashes of the users that were forgotten, whom a later preparation leaves out."""
    uri = storage.join(root, FORGOTTEN)
    return frozenset(storage.read_json(uri)["users"]) if storage.exists(uri) else frozenset()


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
                f"--append: the configuration differs from the one of the published data ({', '.join(names) or what}); "
                "prepare anew without --append"
            )
    there: Files = old["files"]["interactions"]
    for path, found in parts["files"]["interactions"].items():
        if path in there and there[path]["sha256"] != found["sha256"]:
            raise DataError(f"--append: {path} has changed since it was prepared; prepare anew without --append")
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
        files=dict(enumerate(order)),
    )
    first = int(manifest["units"])
    return before, [replace(u, number=first + i, file_index=index[u.path]) for i, u in enumerate(kept)]
