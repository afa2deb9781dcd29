"""Search for a better configuration, on valid alone.

python -m jobs.tune --config jobs/configs/ml100k.yaml --space jobs/configs/tune/ml100k.yaml [--trials 32] [key=value ...]
"""

from __future__ import annotations

import argparse
import shlex
import sys

from jobs.command import USER_ERRORS, plain, show_log
from mtrec_ray import storage
from mtrec_ray.config import load_config
from mtrec_ray.tuning.space import load_space
from mtrec_ray.tuning.trials import changes, finalist_table, lines, summary, table


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 when no trial succeeded or for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jobs.tune", description="Search for a better configuration, on valid alone.")
    parser.add_argument("--config", required=True, help="YAML of the run, such as jobs/configs/ml100k.yaml")
    parser.add_argument("--space", required=True, help="YAML of the search space, such as jobs/configs/tune/ml100k.yaml")
    parser.add_argument("--out", help="directory or URI (default runs/NAME-tune with the config's name)")
    parser.add_argument("--trials", type=_positive, default=32, help="configurations to try, the given one among them")
    parser.add_argument("--minutes", type=_minutes, help="budget of the search; start again with more to go on")
    parser.add_argument("--parallel", type=_positive, help="trials at a time (default: one per core)")
    parser.add_argument("--finalists", type=_count, default=0, help="best trials that are retrained with other seeds")
    parser.add_argument("--seeds", type=_positive, default=3, help="seeds of each finalist")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value, such as train.epochs=60")
    args = parser.parse_args(argv)
    show_log()
    try:
        config = load_config(args.config, args.overrides)
        space = load_space(args.space, config)
        from mtrec_ray.tuning.job import Plan, tune  # Ray starts late: mistakes above are said at once

        out = args.out or f"runs/{config.name}-tune"
        command = "python -m jobs.tune " + shlex.join(sys.argv[1:] if argv is None else argv)
        plan = Plan(args.trials, args.minutes, args.parallel, args.finalists, args.seeds, command)
        outcome = tune(config, space, out, plan)
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    print(f"\n{len(outcome.trials)} trials: {summary(outcome.trials)}\n")
    print(lines(table(outcome.trials)))
    if outcome.finalists:
        print(f"\nFinalists, valid {outcome.monitor} with other seeds\n\n{lines(finalist_table(outcome.finalists))}")
    assert outcome.best is not None
    if outcome.best.number:
        print(f"\n{lines(changes(outcome.trials[0], outcome.best))}")
    print(f"\nbest: trial {outcome.best.number} in {storage.join(out, 'best.yaml')}; all trials: {storage.join(out, 'trials.csv')}")
    if any(t.state in ("waiting", "unfinished") for t in outcome.trials):
        print("not all trials are over: the same command goes on with them")
    return 0


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if _count(text) == 0:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
