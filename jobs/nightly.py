"""The nightly loop, one command that goes on where it was stopped: append, retrain warm, gate, score, roll out, keep the last.

python -m jobs.nightly --config jobs/configs/shop.yaml --out runs/shop
python -m jobs.nightly --config ... --out s3://bucket/shop --store redis://HOST:6379/0 --log s3://bucket/shop/log \\
    --dashboard http://127.0.0.1:8265 --url http://127.0.0.1:8000
python -m jobs.nightly --config ... --out runs/shop --rollback --dashboard ... --url ...

Exit codes: 0 the new bundle serves (or nothing is new), 2 something is wrong, 3 the new bundle was held back. See docs/nightly.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from jobs import export_events
from jobs.command import USER_ERRORS, plain, show_log
from mtrec_ray import lock, storage
from mtrec_ray.config import load_config
from mtrec_ray.nightly import HELD_BACK, Night, Settings, roll_back, run_night
from mtrec_ray.serving.rollout import NotDeployedError, Target, roll_out


def _first(root: str) -> bool:
    return not storage.exists(storage.join(root, "bundle", "manifest.json"))


def _reached(target: Target, first: bool) -> bool:
    """Whether there is a service to roll out to, said before hours of training. Raises RolloutError; not on the first night for an
    application that cannot have been deployed yet, since it needs a bundle."""
    try:
        target.check()
    except NotDeployedError as error:
        if not first:
            raise
        print(f"the first night: nothing is rolled out ({error})", file=sys.stderr)
        return False
    return True


def _export(root: str, log: str, store: str | None) -> None:
    """What the service kept since the last night joins the log. Raises RuntimeError."""
    if _first(root):
        return  # nothing has served yet
    arguments = ["--run", root, "--to", log, *([] if store is None else ["--store", store])]
    with lock.only_writer(root):
        code = export_events.main(arguments)
    if code != 0:
        raise RuntimeError("the service's events could not be exported; see above")


def _told(night: Night) -> int:
    for sentence in night.limits:
        print(f"limit broken: {sentence}", file=sys.stderr)
    print(f"{night.name}: {night.verdict}" + (f", bundle {night.bundle[:12]}" if night.bundle else ""))
    return HELD_BACK if night.verdict == "held back" else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.nightly", description="Append, retrain, gate, score, roll out.")
    parser.add_argument("--config", required=True, help="YAML of the run")
    parser.add_argument("--out", help="directory or URI of all nights (default runs/NAME with the config's name)")
    parser.add_argument("--noninferior", type=float, default=0.02, metavar="SHARE", help="how much worse the new one may be")
    parser.add_argument("--gate", action="append", default=[], metavar="TASK/METRIC", help="what that holds for; may be repeated")
    parser.add_argument("--keep", type=int, default=7, metavar="N", help="nights that stay (default 7)")
    parser.add_argument("--anew", action="store_true", help="prepare the whole log anew, after a change of the section data")
    parser.add_argument("--from-scratch", action="store_true", help="train without the weights of the bundle that serves")
    parser.add_argument("--again", action="store_true", help="another night though no events are new, such as with other settings")
    parser.add_argument("--no-score", action="store_true", help="write no lists")
    parser.add_argument("--log", help="directory or URI that data.interactions reads: the service's events go there first")
    parser.add_argument("--store", help="of the service, a file or Redis' URL (default OUT/live/histories.sqlite)")
    parser.add_argument("--dashboard", help="of the cluster that serves: roll out there")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--app", default="recommend", help="the Serve application")
    parser.add_argument("--token-env", metavar="NAME", help="environment variable with a token of the service")
    parser.add_argument("--rollback", action="store_true", help="serve the bundle of the night before instead")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_args(argv)
    if args.store is not None and args.log is None:
        parser.error("--store STORE needs --log DIRECTORY")
    if not 0 <= args.noninferior < 1 or args.keep < 1:
        parser.error("--noninferior is a share from 0 to below 1, --keep a number from 1")
    show_log()
    try:
        config = load_config(args.config, args.overrides)
        root = args.out or f"runs/{config.name}"
        token = None if args.token_env is None else os.environ.get(args.token_env)
        if args.token_env is not None and token is None:
            raise ValueError(f"--token-env: {args.token_env} is not set")
        target = None if args.dashboard is None else Target(args.dashboard, args.url.rstrip("/"), args.app, token)
        if args.rollback:  # a service that is down may be why
            rolled = None if target is None else partial(roll_out, target)
            return _told(roll_back(config, root, rolled))
        reached = target is not None and _reached(target, _first(root))
        rolled = partial(roll_out, target) if target is not None and reached else None
        if args.log is not None:
            _export(root, args.log, args.store)
        settings = Settings(args.noninferior, tuple(args.gate), args.keep, args.anew, args.from_scratch, args.again)
        return _told(run_night(config, root, settings, rolled, score=not args.no_score))
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
