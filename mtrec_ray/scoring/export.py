"""Published lists in other forms: JSON lines, or keys of Redis or Valkey. It knows no Ray.

Both are made from the published Parquet, so they are of one bundle and can be made again; readers see all of the new lists or
all of the old ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from mtrec_ray import storage
from mtrec_ray.scoring.shards import MANIFEST, VerifyError, read_manifest

log = logging.getLogger(__name__)

READ = 50_000
"""Rows read together."""
SENT = 1000
"""Keys sent to Redis together."""


class ExportError(ValueError):
    """A target that cannot be written."""


def lists_of(root: str, shard: str) -> Iterator[dict[str, Any]]:
    """{"user_id", "items": [{"item_id", "score", ...}]} of every user of a shard, best first; of similar items {"item_id", ...}."""
    of: str | None = None
    items: list[dict[str, Any]] = []
    key = ""
    for table in storage.iter_tables(storage.join(root, f"{shard}.parquet"), READ):
        key = table.column_names[0]
        for row in table.drop_columns([n for n in ("rank",) if n in table.column_names]).to_pylist():
            owner = row.pop(key)
            if owner != of and of is not None:
                yield {key: of, "items": items}
                items = []
            of = owner
            items.append({n: None if v != v else v for n, v in row.items()})  # JSON has no NaN
    if of is not None:
        yield {key: of, "items": items}


def _published(root: str) -> dict[str, Any]:
    manifest = read_manifest(root)
    if manifest is None or "shards" not in manifest:
        raise VerifyError(f"{root}: nothing is published here (no {MANIFEST}); run jobs.score")
    return manifest


def to_jsonl(root: str, target: str) -> int:
    """ROOT's shards as TARGET/NAME.jsonl, a line per user (or item), and a manifest, written last -> lines."""
    manifest, lines = _published(root), 0
    done = storage.join(target, MANIFEST)
    storage.delete(done)
    for path in storage.list_files(target, ".jsonl") if storage.exists(target) else ():
        if path.rsplit("/", 1)[1].removesuffix(".jsonl") not in manifest["shards"]:
            storage.resolve(target)[0].delete_file(path)
    for shard in sorted(manifest["shards"]):
        text = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lists_of(root, shard)]
        storage.write_bytes(storage.join(target, f"{shard}.jsonl"), "".join(text).encode())
        lines += len(text)
    storage.write_json(done, {"identity": manifest["identity"], "lines": lines})
    return lines


def to_redis(root: str, url: str, prefix: str = "mtrec") -> int:
    """Every list as the key PREFIX:VERSION:ID (JSON), then PREFIX:current = VERSION, then the version before goes -> keys.

    VERSION is of the lists' contents. A reader gets PREFIX:current, then its key; both in one script or transaction where the
    version may change in between. Raises ExportError.
    """
    try:
        import redis
    except ModuleNotFoundError:
        raise ExportError("Redis needs the package redis: pip install 'mtrec_ray[redis]'") from None
    manifest = _published(root)
    version = storage.fingerprint({name: entry["sha256"] for name, entry in manifest["shards"].items()})[:16]
    sent = 0
    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=5, decode_responses=True)
        before = str(client.get(f"{prefix}:current") or "")
        for shard in sorted(manifest["shards"]):
            pipe = client.pipeline(transaction=False)
            for line in lists_of(root, shard):
                owner = next(iter(line.values()))
                pipe.set(f"{prefix}:{version}:{owner}", json.dumps(line, ensure_ascii=False, allow_nan=False))
                sent += 1
                if len(pipe) >= SENT:
                    pipe.execute()
            pipe.execute()
        client.set(f"{prefix}:current", version)
        if before not in ("", version):
            batch: list[str] = []
            for key in client.scan_iter(f"{prefix}:{before}:*", count=SENT):
                batch.append(key)
                if len(batch) >= SENT:
                    client.unlink(*batch)
                    batch = []
            if batch:
                client.unlink(*batch)
    except (redis.RedisError, ValueError) as error:
        raise ExportError(
            f"Redis: {type(error).__name__}: {error}; {sent} keys were sent, and readers have what they had"
        ) from None
    return sent
