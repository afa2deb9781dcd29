"""Write RUN/report.html, one self-contained page about an evaluated run: `python -m jobs.report runs/ml100k`."""

from __future__ import annotations

import argparse
import sys

from jobs.command import USER_ERRORS, plain


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.report", description="Write the evaluation report of a run.")
    parser.add_argument("run", help="run directory, such as runs/ml100k")
    parser.add_argument("--data", help="its prepared data, if not in RUN/data: a night's are in OUT/data")
    args = parser.parse_args()
    try:
        from mtrec_ray.evaluation.report import write_report

        print(write_report(args.run, args.data))
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is missing: pip install 'mtrec_ray[report]'", file=sys.stderr)
        return 2
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
