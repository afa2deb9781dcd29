"""Go on with the pre-training of a language model on a run's own texts.

python -m jobs.pretrain --config jobs/configs/ml100k.yaml [--out runs/ml100k] [key=value ...]

Needs prepared data (jobs.prepare); they are made where they are missing. Writes OUT/pretrained; the last line is what
encoder.model names from then on.
"""

from __future__ import annotations

import argparse
import sys

from jobs.command import USER_ERRORS, plain, show_log
from mtrec_ray.config import load_config
from mtrec_ray.pipeline import run_stages


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 with one message on standard error for a mistake that the user can mend."""
    parser = argparse.ArgumentParser(prog="python -m jobs.pretrain", description="Pre-train a language model on a run's own texts.")
    parser.add_argument("--config", required=True, help="YAML of the run, such as jobs/configs/ml100k.yaml")
    parser.add_argument("--out", help="run directory or URI (default runs/NAME with the config's name)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", help="key.path=value, such as pretrain.epochs=5")
    args = parser.parse_args(argv)
    show_log()
    try:
        config = load_config(args.config, args.overrides)
        run = run_stages(config, args.out or f"runs/{config.name}", ("prepare",))
        from mtrec_ray.pretraining.trainer import pretrain

        directory = pretrain(config, run.data, run.path("pretrained"))
    except USER_ERRORS as error:
        if args.debug:
            raise
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    facts = directory.manifest["pretraining"]
    measure = facts["measure"]
    before, after = facts[measure][0], facts[measure][-1]
    for kind, rows in facts["held_out_rows"].items():
        print(f"held-out {measure} of {kind} ({rows} rows): {before[kind]:.4g} before, {after[kind]:.4g} after")
    print(f"encoder.model={directory.path('model')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
