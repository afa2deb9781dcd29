"""Events that the service kept, as files of the log: `jobs.prepare --append` reads them next.

python -m jobs.export_events --run runs/shop --to data/shop/log [--store redis://HOST:6379/0]

Only what came since the last call is written. The store is the run's own file unless another file or a server is named.
"""

from __future__ import annotations

import argparse
import sys

from jobs.command import USER_ERRORS, plain
from mtrec_ray import bundle, storage
from mtrec_ray.serving.export import export_events, is_url
from mtrec_ray.serving.settings import StoreSettings, open_store


def settings_of(store: str | None) -> StoreSettings:
    """Of a store as the command line names it: a server's URL, a file, or nothing for the run's own file."""
    if store is None:
        return StoreSettings()
    return StoreSettings(kind="redis", url=store) if is_url(store) else StoreSettings(path=store)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jobs.export_events", description="Write kept events as files of the log.")
    parser.add_argument("--run", required=True, help="run directory or URI")
    parser.add_argument("--to", required=True, help="directory, such as that of the log")
    parser.add_argument("--store", help="file of SQLite, or URL of Redis or Valkey (default RUN/live/histories.sqlite)")
    args = parser.parse_args(argv)
    try:
        predictor = bundle.load(storage.join(args.run, "bundle"), verify=False)
        store = open_store(settings_of(args.store), storage.join(args.run, "data"), predictor)
        assert store is not None
        print(f"exported: {export_events(store, predictor.config, storage.absolute(args.to))} events to {args.to}")
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
