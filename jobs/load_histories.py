"""Put every prepared history into the store of live histories at once: `python -m jobs.load_histories --run runs/shop
[--store redis://HOST:6379/0]`.

Not needed: a store begins with the prepared history of each user that it meets. It spares the first request of a user the
reading of prepared files. Run it again after `jobs.prepare`; what is there already counts once.
"""

from __future__ import annotations

import argparse
import sys
import time

from jobs.command import USER_ERRORS, plain
from jobs.export_events import settings_of
from mtrec_ray import bundle, storage
from mtrec_ray.scoring.batch import READ
from mtrec_ray.serving.settings import open_store


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jobs.load_histories", description="Put prepared histories into the store.")
    parser.add_argument("--run", required=True, help="run directory or URI")
    parser.add_argument("--store", help="file of SQLite, or URL of Redis or Valkey (default RUN/live/histories.sqlite)")
    args = parser.parse_args(argv)
    try:
        predictor = bundle.load(storage.join(args.run, "bundle"), verify=False)
        data = storage.Directory(storage.join(args.run, "data"))
        store = open_store(settings_of(args.store), data.root, predictor)
        assert store is not None
        parts, users, began = storage.list_uris(data.path("store"), ".parquet"), 0, time.perf_counter()
        for number, part in enumerate(parts, 1):
            users += store.load(storage.iter_tables(part, READ))
            rate = users / (time.perf_counter() - began)
            print(
                f"\rloaded: {users} users of {number}/{len(parts)} parts, {rate:.0f} users/s", end="", file=sys.stderr, flush=True
            )
        print(file=sys.stderr)
        print(f"loaded: {users} users")
        store.close()
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
