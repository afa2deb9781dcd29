"""Remove users from a run: prepared data, quarantine, top lists, live histories; list the bundles that were trained with them.

python -m jobs.forget --run runs/NAME --user ID [--user ID ...] [--also runs/OTHER ...] [--store redis://HOST:6379/0]

Ids are the log's own; where the data hold pseudonyms, the key is read from where the configuration says. A later
preparation leaves these users out, though the log's files still hold them.
"""

from __future__ import annotations

import argparse
import sys

from jobs.command import USER_ERRORS, plain
from mtrec_ray import storage
from mtrec_ray.config import PseudonymConfig
from mtrec_ray.data.forget import forget
from mtrec_ray.privacy import Pseudonyms
from mtrec_ray.serving.export import is_url
from mtrec_ray.serving.redis_store import RedisStore
from mtrec_ray.serving.sqlite_store import SqliteStore
from mtrec_ray.serving.store import HistoryStore


def _live(run: str, store: str | None) -> HistoryStore | None:
    """Where live histories are; None where nothing was ever kept."""
    if store is None:
        own = storage.join(run, "live", "histories.sqlite")
        if not storage.is_local(run) or not storage.exists(own):
            return None
        store = own
    return RedisStore(store, [], [], 1) if is_url(store) else SqliteStore(store, [], [], 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.forget", description="Remove users from a run.")
    parser.add_argument("--run", required=True, help="run directory or URI")
    parser.add_argument("--user", action="append", required=True, metavar="ID", help="may be given several times")
    parser.add_argument("--also", action="append", default=[], metavar="RUN", help="further runs to look for bundles in")
    parser.add_argument("--store", help="live histories: a file, or URL of Redis or Valkey (default RUN/live/histories.sqlite)")
    args = parser.parse_args(argv)
    try:
        manifest = storage.Directory(storage.join(args.run, "data")).manifest
        settings = manifest["covered"]["data"]["pseudonyms"]
        users = list(args.user)
        if settings is not None:
            pseudonyms = Pseudonyms.load(PseudonymConfig.model_validate(settings), manifest["pseudonym_key"])
            users = [pseudonyms.one(u) for u in users]
        found = forget(args.run, users, args.also)
        kept = _live(args.run, args.store)
        if kept is not None:
            found.rows["live histories"] = kept.forget(users)
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    for place, rows in found.rows.items():
        print(f"{place}: {rows} row(s) removed")
    if not any(found.rows.values()):
        print("no row of these users was found; a later preparation leaves them out all the same")
    for bundle in found.bundles:
        print(f"trained with these data: {bundle}; train it again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
