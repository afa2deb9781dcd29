"""ML-100K, leave-one-out, three seeds, with the configuration that `jobs.tune` found: `python -m benchmarks.quality_best`.

Value: mean test NDCG@10. ok needs RMSE of the same models too. The tuning looked at valid alone; what it tried is in the
header of the configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.quality import run_seeds, summarise
from benchmarks.report import finish

CONFIG = Path("jobs/configs/ml100k_best.yaml")
TARGET = "ndcg@10 >= 0.120 and rmse <= 0.97, means of the same three models"
HOW = (
    "python -m jobs.tune --config jobs/configs/ml100k.yaml --space jobs/configs/tune/ml100k.yaml --out runs/ml100k-tune "
    "--trials 64 --finalists 3 --seeds 3"
)


def main() -> int:
    if not CONFIG.exists():
        print(f"{CONFIG} is missing. Find it with\n  {HOW}\nand copy runs/ml100k-tune/best.yaml there", file=sys.stderr)
        return 2
    runs = run_seeds(str(CONFIG), "quality-best")
    if runs is None:
        return 2
    detail = summarise(runs) | {"config": CONFIG.read_text(encoding="utf-8")}
    ndcg, rmse = (detail["model"][name]["mean"] for name in ("ndcg@10", "rmse"))
    return finish("quality_best", ndcg, "ndcg@10", TARGET, ndcg >= 0.120 and rmse <= 0.97, detail)


if __name__ == "__main__":
    sys.exit(main())
