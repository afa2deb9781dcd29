"""Compare two runs on the same test users: `python -m jobs.compare RUN_A RUN_B --noninferior 0.02`.

A is what there is, B what might replace it. A side may be several runs of other seeds, joined by commas. Prints B - A
with 95 % intervals. Exit codes: 0 within the limits, 2 the runs cannot be compared, 3 a declared limit is broken.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from mtrec_ray import storage
from mtrec_ray.evaluation.compare import CompareError, Row, broken_limits, compare, load
from mtrec_ray.evaluation.reduce import WHOLE

LIMIT_BROKEN = 3


def table(rows: list[Row]) -> str:
    """Rows as text, one metric a line."""
    lines = [f"{'slice':24} {'metric':32} {'A':>9} {'B':>9} {'B - A':>9}  95 % interval"]
    for row in rows:
        ends = "no interval" if row.low is None or row.high is None else f"[{row.low:+.4f}, {row.high:+.4f}]"
        lines.append(
            f"{row.slice:24} {row.name:32} {row.a:9.4f} {row.b:9.4f} {row.difference:+9.4f}  {ends} {row.verdict}".rstrip()
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description="Paired comparison of two evaluated runs.")
    parser.add_argument("run_a", help="run directory, or several joined by commas (seeds)")
    parser.add_argument("run_b", help="the same for the candidate")
    parser.add_argument("--noninferior", type=float, metavar="SHARE", help="how much worse B may be, as a share of A's value")
    parser.add_argument(
        "--gate", action="append", metavar="TASK/METRIC",
        help="what the limit holds for (default: ndcg@10 of the retrieval task); `SLICE|TASK/METRIC` for a slice; may be repeated",
    )  # fmt: skip
    parser.add_argument("--metric", help="show this task/metric alone, on every slice")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(arguments)
    if args.gate and args.noninferior is None:
        parser.error("--gate needs --noninferior SHARE")
    if args.noninferior is not None and not 0 <= args.noninferior < 1:
        parser.error("--noninferior is a share from 0 to below 1, such as 0.02")
    try:
        side_a, side_b = ([load(r) for r in side.split(",")] for side in (args.run_a, args.run_b))
        rows = compare(side_a, side_b)
        gates = args.gate or [f"{side_a[0].facts.get('retrieval', 'retrieval')}/ndcg@10"]
        broken = [] if args.noninferior is None else broken_limits(rows, gates, args.noninferior)
    except (CompareError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    shown = [r for r in rows if r.name == args.metric] if args.metric else rows
    if not shown:
        print(f"error: no metric {args.metric!r}; there is {sorted({r.name for r in rows if r.slice == WHOLE})}", file=sys.stderr)
        return 2
    print(table(shown))
    if args.json is not None:
        args.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    for sentence in broken:
        print(f"limit broken: {sentence}", file=sys.stderr)
    if args.noninferior is not None and not broken:
        print(f"within the limit of {args.noninferior:.1%}: {', '.join(gates)}")
    return LIMIT_BROKEN if broken else 0


if __name__ == "__main__":
    sys.exit(main())
