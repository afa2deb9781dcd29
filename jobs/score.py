"""Score in batch: every user's list, state or profile, given pairs, every item's similar items; prove or export what is there.

python -m jobs.score --config jobs/configs/ml100k.yaml --out runs/ml100k [--what similar] [key=value ...]
python -m jobs.score --verify runs/ml100k [--what similar]
python -m jobs.score --export runs/ml100k --to lists (a directory: JSON lines) or redis://HOST:PORT/0

A killed run goes on with the shards that are missing. `--verify` reads every shard again: checksums, counts, ranks, nobody twice.
"""

from __future__ import annotations

import argparse
import sys

from jobs.command import USER_ERRORS, plain, show_log
from mtrec_ray import runtime, storage
from mtrec_ray.config import load_config
from mtrec_ray.pipeline import Run, run_stages
from mtrec_ray.scoring.export import to_jsonl, to_redis
from mtrec_ray.scoring.shards import verify
from mtrec_ray.scoring.tables import FOLDERS


def prove(run: str, what: str = "lists") -> None:
    """Say what an output holds. Raises VerifyError where it is not what its manifest says."""
    counts = verify(storage.join(storage.absolute(run), FOLDERS[what]))
    who = f"{counts['items']} items" if what == "similar" else f"{counts['users']} users ({counts['fallbacks']} without a history)"
    print(f"verified: {who}, {counts['rows']} rows, {counts['bytes']} bytes")


def export(run: str, what: str, to: str) -> None:
    """Write a published output in another form. Raises VerifyError, ExportError."""
    root = storage.join(storage.absolute(run), FOLDERS[what])
    if to.startswith(("redis://", "rediss://", "unix://")):
        print(f"exported: {to_redis(root, to)} keys")
    else:
        print(f"exported: {to_jsonl(root, storage.absolute(to))} lines to {to}")


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jobs.score", description="Score in batch, or prove what is there.")
    parser.add_argument("--config", help="YAML of the run, such as jobs/configs/ml100k.yaml")
    parser.add_argument("--out", help="run directory or URI (default runs/NAME with the config's name)")
    parser.add_argument("--what", choices=list(FOLDERS), default="lists", help="default: lists, into scores/")
    parser.add_argument("--verify", metavar="RUN", help="read an output of this run again instead")
    parser.add_argument("--export", metavar="RUN", help="write an output of this run in another form instead")
    parser.add_argument("--to", help="of --export: a directory for JSON lines, or the URL of Redis or Valkey")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value, such as scoring.workers=4")
    args = parser.parse_args(argv)
    if [args.config, args.verify, args.export].count(None) != 2:
        parser.error("give one of --config, --verify and --export")
    if (args.export is None) != (args.to is None):
        parser.error("--export RUN needs --to TARGET, and nothing else does")
    show_log()
    try:
        if args.verify is not None:
            prove(args.verify, args.what)
            return 0
        if args.export is not None:
            export(args.export, args.what, args.to)
            return 0
        config = load_config(args.config, args.overrides)
        out = args.out or f"runs/{config.name}"
        if args.what == "lists":
            run_stages(config, out, ("score",))
            return 0
        runtime.connect()
        runtime.preflight(config, out)
        print(Run(config, out).output(args.what))
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
