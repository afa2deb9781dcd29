"""What eight bits save and cost in scoring: `python -m benchmarks.scoring_int8`.

Quality on ML-100K (jobs/configs/ml100k.yaml, leave-one-out, the whole catalogue ranked, one run: runs/bench/quality-0, which the
benchmark `quality` makes too, or that of --run): item vectors rounded to int8 with a scale per item, heads and sharing layers with
int8 weights (`scoring.precision: int8`), and both. Speed on one thread: a single query against 1,000,000 vectors × 64 as those
of `benchmarks.ann` (`index.precision`: int8, bf16), and four heads on 256 users × 200 candidates (benchmarks/many_users.py).

Value: NDCG@10 with both over NDCG@10 in float32.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.ann import NOTHING, vectors_like_trained
from benchmarks.many_users import config_of, make_bundle
from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray import bundle, storage
from mtrec_ray.evaluation.evaluate import quick_metrics, quick_statistics
from mtrec_ray.models.int8 import rounded, size_bytes
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.exact import ExactIndex
from mtrec_ray.retrieval.reduced import build_reduced
from mtrec_ray.training.worker import mapped_windows

LOST = 0.01
"""Of NDCG@10, and of RMSE in stars, that may be lost."""


def variant(root: str, items: bool, heads: bool) -> Predictor:
    predictor = bundle.load(root)
    if items:
        int8_ND, scale_N1 = rounded(predictor.item_vec_ND)
        catalogue = storage.read_table(storage.join(bundle.prefix_of(root), "catalogue.parquet"))
        predictor = Predictor(
            predictor.config, predictor.schema, catalogue, predictor.model, int8_ND.float() * scale_N1, predictor.fingerprint
        )
    return predictor.to_int8() if heads else predictor


def quality(run: Path) -> dict[str, dict[str, float]]:
    """Variant -> NDCG@10, HR@10, RMSE on the test part."""
    cache = mapped_windows(storage.Directory(str(run / "data")).prefix, "test")
    out = {}
    for name, items, heads in (
        ("float32", False, False), ("items int8", True, False), ("heads int8", False, True), ("both int8", True, True),
    ):  # fmt: skip
        predictor = variant(str(run / "bundle"), items, heads)
        folds = predictor.config.evaluation.profile_folds_test
        found = quick_metrics(predictor, quick_statistics(predictor, cache, np.arange(len(cache)), folds), folds)
        out[name] = {
            "ndcg@10": found["retrieval"]["ndcg@10"],
            "hr@10": found["retrieval"]["hr@10"],
            "rmse": found["rating"]["rmse"],
        }
    return out


def turns(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            if number:  # the first is warm-up
                taken[name].append(time.perf_counter() - started)
    return taken


def _each(index: ExactIndex, asked: Sequence[torch.Tensor]) -> None:
    for query in asked:
        index.search(query, 100, NOTHING)


def search_speed(items: int) -> dict[str, Any]:
    item, query = vectors_like_trained(items, 120)
    exact = ExactIndex(item)
    reduced = {p: build_reduced(item, query[:40], 100, p, 0.5) for p in ("int8", "bf16")}  # type: ignore[arg-type]
    asked = torch.split(query[40:60], 1)
    sides: dict[str, Callable[[], Any]] = {"float32": partial(_each, exact, asked)}
    for name, index in reduced.items():
        sides[name] = partial(_each, index, asked)
    taken = turns(sides, 5)
    return {
        "items": items, "queries_per_second": {n: len(asked) / float(np.median(v)) for n, v in taken.items()},
        "recall": {n: i.facts["recall"] for n, i in reduced.items()},
        "bytes": {"float32": item.nbytes, **{n: i.reduced_ND.nbytes for n, i in reduced.items()}},
    }  # fmt: skip


def heads_speed(folder: Path) -> dict[str, Any]:
    config = config_of(2000, 1)
    root = make_bundle(config, 2000, folder)
    plain, small = bundle.load(root), bundle.load(root).to_int8()
    generator = torch.Generator().manual_seed(0)
    state, items = torch.randn(256, 64, generator=generator), torch.randint(2000, (256, 200), generator=generator)
    taken = turns({n: partial(p.score, state, items, {}) for n, p in (("float32", plain), ("int8", small))}, 10)
    parts = {n: [p.model.sharing, *p.model.pointwise.values()] for n, p in (("float32", plain), ("int8", small))}
    return {
        "users_per_second": {n: 256 / float(np.median(v)) for n, v in taken.items()},
        "bytes": {n: sum(size_bytes(m) for m in p) for n, p in parts.items()},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="What eight bits save and cost in scoring.")
    parser.add_argument("--run", type=Path, help="a run of ML-100K that is there already, such as runs/demo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = args.run or Path("runs/bench/quality-0")
    if args.run is None:
        fetch_ml100k(Path(".data/ml-100k"))
        command = [sys.executable, "-m", "jobs.pipeline", "--config", "jobs/configs/ml100k.yaml", "--out", str(run), "seed=0"]
        if subprocess.run(command, check=False).returncode:
            return 2
    found: dict[str, Any] = {"run": str(run), "quality": quality(run), "search": search_speed(1_000_000)}
    with tempfile.TemporaryDirectory() as folder:
        found["heads"] = heads_speed(Path(folder))
    print(json.dumps(found))
    before, after = found["quality"]["float32"], found["quality"]["both int8"]
    ratio = after["ndcg@10"] / before["ndcg@10"]
    ok = ratio >= 1 - LOST and after["rmse"] - before["rmse"] <= LOST
    return finish("scoring_int8", ratio, "NDCG@10 over float32's", f">= {1 - LOST}, RMSE at most {LOST} more", ok, found)


if __name__ == "__main__":
    sys.exit(main())
