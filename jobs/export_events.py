"""What the service kept, as files: `jobs.prepare --append` reads them next.

python -m jobs.export_events --run runs/shop --to data/shop/log [--store redis://HOST:6379/0]
    events
python -m jobs.export_events --run runs/shop --to data/shop/log --unanswered click --within-minutes 60
    and, as rows with click = 0, shown items on which no click followed
python -m jobs.export_events --run runs/shop --lists data/shop/shown
    lists as they were shown: a row per place, with scores and propensity

Only what came since the last call is written. The store is the run's own file unless another file or a server is named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from jobs.command import USER_ERRORS, plain
from mtrec_ray import bundle, storage
from mtrec_ray.serving.export import ExportError, export_events, export_lists, export_unanswered, is_url
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
    parser.add_argument("--to", help="directory for events, such as that of the log")
    parser.add_argument("--unanswered", metavar="LABEL", help="also shown items without an event of this label, as its zeros")
    parser.add_argument("--within-minutes", type=float, default=60.0, help="after which an item counts as unanswered (default 60)")
    parser.add_argument("--lists", metavar="DIRECTORY", help="directory for lists as they were shown")
    parser.add_argument("--store", help="file of SQLite, or URL of Redis or Valkey (default RUN/live/histories.sqlite)")
    args = parser.parse_args(argv)
    try:
        if args.store is not None and not is_url(args.store) and not Path(args.store).is_file():
            raise ExportError(f"--store {args.store}: there is no such file; name the one that the service writes (store.path)")
        predictor = bundle.load(storage.join(args.run, "bundle"), verify=False)
        store = open_store(settings_of(args.store), storage.join(args.run, "data"), predictor)
        assert store is not None
        if args.to is None and args.lists is None:
            raise ExportError("nothing is asked for: give --to, --lists, or both")
        if args.unanswered is not None and args.to is None:
            raise ExportError("--unanswered are rows of the log: give --to too")
        if args.to is not None:
            to = storage.absolute(args.to)
            print(f"exported: {export_events(store, predictor.config, to)} events to {args.to}")
            if args.unanswered is not None:
                within, now = int(60_000 * args.within_minutes), time.time_ns() // 1_000_000
                rows = export_unanswered(store, predictor.config, to, args.unanswered, within, now)
                print(f"exported: {rows} shown items without {args.unanswered} to {args.to}")
        if args.lists is not None:
            print(f"exported: {export_lists(store, storage.absolute(args.lists))} lists to {args.lists}")
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
