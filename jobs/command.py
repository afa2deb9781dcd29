"""What the jobs share: parse, run stages, say errors plainly."""

from __future__ import annotations

import argparse
import logging
import os
import sys

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray.exceptions
import ray.train

from mtrec_ray import storage
from mtrec_ray.config import load_config

LOST = (ray.exceptions.RayActorError, ray.train.ControllerError)
"""A part of Ray died, and Ray did not start it again."""
USER_ERRORS = (ValueError, RuntimeError, *LOST)
"""What one message says: a mistake that can be mended, or something that the same command mends."""


def main(stages: tuple[str, ...], description: str, argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs." + (stages[0] if len(stages) == 1 else "pipeline"), description=description
    )
    parser.add_argument("--config", required=True, help="YAML of the run, such as jobs/configs/ml100k.yaml")
    parser.add_argument("--out", help="run directory or URI (default runs/NAME with the config's name)")
    if "prepare" in stages:
        parser.add_argument("--append", action="store_true", help="files of the log that are new join the prepared data")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value, such as tasks.rating.weight=0.5")
    args = parser.parse_args(argv)
    show_log()
    from mtrec_ray.pipeline import run_stages  # everything: jobs that run no stage need not wait for it

    try:
        config = load_config(args.config, args.overrides)
        run_stages(config, args.out or f"runs/{config.name}", stages, getattr(args, "append", False))
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


class _WithoutKeys(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return storage.without_keys(super().format(record))


def show_log() -> None:
    """Progress on standard error, without the keys that URIs may hold."""
    logging.basicConfig(level=logging.INFO, force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_WithoutKeys("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("ray").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def plain(error: BaseException) -> str:
    """The message of an error; of one raised in a worker, its cause's."""
    if isinstance(error, LOST):
        first = (str(error) or type(error).__name__).splitlines()[0]
        return (
            f"a part of Ray died: {storage.without_keys(first)} The same command goes on where this one ended; --debug shows more"
        )
    cause = getattr(error, "cause", None)
    while isinstance(cause, BaseException):
        error, cause = cause, getattr(cause, "cause", None)
    return storage.without_keys(str(error)) or type(error).__name__
