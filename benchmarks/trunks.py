"""Which trunk and which loss win per second of training: `python -m benchmarks.trunks [--run DIR] [--seconds S]`.

ML-100K, leave-one-out, retrieval alone, text and ids, one thread, one seed, all settings but trunk and loss as in
jobs/configs/ml100k.yaml. Every cell trains for equally many seconds of processor time. Value: valid NDCG@10 of the default
trunk and loss minus that of the best cell, so 0 where the default wins; ok while no cell is better by more than 0.005.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.report import finish
from benchmarks.timed import prepared, retrieval_alone, train_for
from mtrec_ray.config import ModelConfig, RetrievalTask

TRUNKS = ("sasrec", "ligr", "hstu")
LOSSES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sampled_softmax": {"negatives": 512},
    "gbce": {"negatives": 256},
}
MARGIN = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trunks")
    parser.add_argument("--run", type=Path, default=Path("runs/bench/ml100k"), help="prepared and encoded run directory")
    parser.add_argument("--seconds", type=float, default=40.0)
    args = parser.parse_args()
    run = prepared(args.run, ("prepare", "encode"))
    cells: dict[str, Any] = {}
    for loss, settings in LOSSES.items():
        for trunk in TRUNKS:
            overrides = {"model.trunk": trunk, "tasks.retrieval.loss": loss, "train.epochs": 10_000, "train.patience": 10_000}
            overrides |= {f"tasks.retrieval.{k}": v for k, v in settings.items()}
            points = train_for(retrieval_alone(overrides), run, True, args.seconds, args.seconds / 4)
            cells[f"{trunk}/{loss}"] = {"ndcg@10": max(p["ndcg@10"] for p in points), "points": points, **settings}
            print(f"{trunk}/{loss}: {cells[f'{trunk}/{loss}']}", file=sys.stderr, flush=True)
    best = max(cells, key=lambda name: cells[name]["ndcg@10"])
    default = f"{ModelConfig().trunk}/{RetrievalTask(kind='retrieval').loss}"
    value = cells[default]["ndcg@10"] - cells[best]["ndcg@10"]
    detail = {"cells": cells, "default": default, "best": best, "seconds": args.seconds}
    return finish("trunks", value, "valid ndcg@10", f">= -{MARGIN}", value >= -MARGIN, detail)


if __name__ == "__main__":
    sys.exit(main())
