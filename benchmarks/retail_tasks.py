"""Joint against single-task models on a year of groceries: `python -m benchmarks.retail_tasks`.

The Complete Journey (`python -m jobs.fetch completejourney`), protocol time, every task of its configuration; steps, seeds
and selection as in benchmarks/multitask_vs_single.py, one setting on each side.
Attributes are known of a third of the households and judged on a fifth of these, so the width of their intervals is measured
and told first.
Value: the worst 95 % bound of the relative gains over all tasks.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.multitask_vs_single import ALLOWED, arguments, compare, seeds_of
from benchmarks.report import finish
from jobs.fetch import fetch_completejourney
from mtrec_ray.config import load_config

CONFIG = "jobs/configs/completejourney.yaml"
RUN = "runs/bench/retail"
RETAIL = {"retrieval": "ndcg", "quantity": "rmse", "discount": "auc", "coupon": "auc"}
PROFILE = "accuracy"
"""Less noisy than macro-F1 with a dozen classes and 140 households."""
GAINS = 3


def metrics_of(config: str) -> dict[str, str]:
    """Task -> what it is judged by."""
    return {t: RETAIL.get(t, PROFILE) for t in load_config(config).tasks}


def main() -> int:
    parser = arguments("Joint against single-task models on The Complete Journey.", CONFIG, RUN, epochs=8)
    seeds_of(parser)
    args = parser.parse_args()
    if not args.prepared:
        fetch_completejourney(Path(".data/completejourney"))
    detail = compare(args, [{}], metrics_of(args.config))
    if detail is None:
        return 2
    gains = detail["gains"]["tasks"]
    worst, better = min(g["low"] for g in gains.values()), sorted(t for t, g in gains.items() if g["low"] > 0)
    detail |= {"significant_gains": better}
    target = f">= {-ALLOWED} for all tasks, and a gain above 0 of at least {GAINS}"
    ok = worst >= -ALLOWED and len(better) >= GAINS
    return finish("retail_tasks", worst, "worst 95 % bound of a relative gain", target, ok, detail)


if __name__ == "__main__":
    sys.exit(main())
