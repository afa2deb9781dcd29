"""SASRec here, in RecTools and in RecBole: `python -m benchmarks.vs_sasrec [--run DIR]`.

ML-100K, leave-one-out, the same training events in the same order. Width 64, 2 layers, 2 heads, windows of 100, dropout 0.3,
learning rate 1e-3, ids alone, full softmax, float32, one thread each, each system in its own environment (made on the first
run). RecTools' SASRec has an inner width of 64, so that is everybody's; its pre-norm layers, with 256, are measured beside
it. Batches of 32 windows here and there (RecTools is slower with its default of 128), RecBole's default of 2048.

Targets are the positions whose next item is trained, without padding: all of a user here, the last 100 of a user and
epoch in RecTools, one a row in RecBole. Rounds of the three alternate, after a warm-up each. Seconds are those of the
processor, which are the wall's on an idle machine; rates by the wall are in the detail. The picture's lists of ten come from each
system's own scores, without the items of the training history, and are judged here.
Value: targets per second ÷ RecTools', medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.environments import SCRIPTS, environment, run_script
from benchmarks.logs import write_logs
from benchmarks.peers.common import MARK, peak_rss_mib
from benchmarks.report import finish
from benchmarks.timed import prepared, retrieval_alone, train_for
from mtrec_ray import storage
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.worker import load_schema, mapped_windows

PICTURE = Path("docs/pictures/vs_sasrec.svg")
SAME = {"width": 64, "layers": 2, "heads": 2, "inner": 64, "dropout": 0.3, "window": 100, "learning_rate": 1e-3, "seed": 0}
BATCH = {"rectools": 32, "recbole": 2048}
TARGET = ">= 1.1 x RecTools and >= 10 x RecBole"


def ndcg(lists: dict[str, list[int]], valid: dict[str, int]) -> float:
    """NDCG@10 of one relevant item a user."""
    assert lists.keys() == valid.keys(), "a system left users out"
    ranks = [lists[u].index(i) + 1 if i in lists[u] else None for u, i in valid.items()]
    return sum(1 / math.log2(r + 1) for r in ranks if r) / len(valid)


def own_lists(model: Any, config: Any, run: Path) -> dict[str, list[int]]:
    """Ten items for each user's valid moment, from the predictor."""
    from mtrec_ray.evaluation.measure import Moments

    data = storage.Directory(run / "data")
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    with torch.no_grad():
        predictor = Predictor(config, schema, catalogue, model, model.eval().item_vectors(), "benchmark")
    cache = mapped_windows(data.prefix, "valid")
    moments = Moments.of(schema, cache, np.arange(len(cache)))
    state_BD = predictor.encode_state(moments.encoded.batch)
    top = predictor.retrieve(state_BD, moments.encoded.batch.length_B, moments.encoded.seen, 10).item_BK[:, :10].tolist()
    return {str(u): row for u, row in enumerate(top)}


def ours(settings: dict[str, Any], run: Path) -> list[dict[str, Any]]:
    """Points of this project's loop in this process."""
    overrides = {"model.feed_forward": settings["inner"], "train.precision": settings["own_precision"], "train.epochs": 10_000,
                 "train.patience": 10_000, "model.trunk": "sasrec", "model.dropout": settings["dropout"]}  # fmt: skip
    config = retrieval_alone(overrides)
    points = train_for(config, run, False, settings["seconds"], settings["every"], settings["lists"], settings["warm_up"])
    for p in points:
        p["valid"] = {"lists": own_lists(p.pop("model"), config, run)} if settings["lists"] else None
        p["peak_rss_mib"] = peak_rss_mib()
    return points


def child(system: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of one system, in a process of its own with one thread."""
    if system == "ours":
        return run_script(system, [sys.executable, "-m", "benchmarks.vs_sasrec", "--child", json.dumps(settings)])
    script = SCRIPTS.absolute() / f"{system}_sasrec.py"
    return run_script(system, [environment(system), str(script), json.dumps(settings)], settings["folder"])


def rates(systems: dict[str, tuple[str, dict[str, Any]]], rounds: int, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Targets per second of each system by round."""
    found: dict[str, dict[str, list[float]]] = {name: {"processor": [], "wall": []} for name in systems}
    for number in range(rounds):
        for name, (system, settings) in systems.items():
            last = child(system, settings | {"seconds": seconds, "every": seconds, "lists": False, "warm_up": True})[-1]
            found[name]["processor"].append(last["targets"] / last["seconds"])
            found[name]["wall"].append(last["targets"] / last["wall"])
            print(f"round {number + 1}, {name}: {found[name]['processor'][-1]:.0f} targets per second", file=sys.stderr, flush=True)
    return found


def draw(curves: dict[str, list[dict[str, float]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "svg.hashsalt": "vs_sasrec"}
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    for (name, points), colour in zip(curves.items(), ("#1f5fd0", "#d1495b", "#8b95a3"), strict=True):
        axes.plot([p["seconds"] for p in points], [p["ndcg@10"] for p in points], "o-", markersize=3, color=colour, label=name)
    axes.set_xlabel("seconds of training, one thread")
    axes.set_ylabel("valid NDCG@10")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vs_sasrec")
    parser.add_argument("--run", type=Path, default=Path("runs/bench/ml100k"), help="prepared run directory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement of speed")
    parser.add_argument("--curve", type=float, default=120.0, help="seconds of each curve")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        for point in ours(args.child, Path(args.child["run"])):
            print(MARK + json.dumps(point), flush=True)
        return 0
    started = time.perf_counter()
    run = prepared(args.run, ("prepare",))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        valid = {str(u): i for u, i in write_logs(run, folder)["valid"]["item"].items()}
        common = SAME | {
            "run": str(run.absolute()),
            "folder": name,
            "test": False,
        }
        base = {s: common | {"batch": BATCH.get(s, 32), "precision": "32-true", "own_precision": "float32", "pre_norm": False}
                for s in ("ours", "rectools", "recbole")}  # fmt: skip
        half = {"precision": "bf16-mixed", "own_precision": "bf16"}
        systems = {
            "ours": ("ours", base["ours"]),
            "rectools": ("rectools", base["rectools"]),
            "recbole": ("recbole", base["recbole"]),
            "ours, inner 256": ("ours", base["ours"] | {"inner": 256}),
            "rectools, pre-norm, inner 256": ("rectools", base["rectools"] | {"pre_norm": True}),
            "ours, bf16": ("ours", base["ours"] | half),
            "rectools, bf16": ("rectools", base["rectools"] | half),
        }
        found = rates(systems, args.rounds, args.seconds)
        curves = {}
        for system in base:
            told = child(system, base[system] | {"seconds": args.curve, "every": args.curve / 12, "lists": True, "warm_up": False})
            curves[system] = [
                {"seconds": p["seconds"], "wall": p["wall"], "targets": p["targets"], "ndcg@10": ndcg(p["valid"]["lists"], valid)}
                for p in told if p["valid"]
            ]  # fmt: skip
            print(f"{system}: {curves[system]}", file=sys.stderr, flush=True)
    draw(curves)
    rate = {name: median(r["processor"]) for name, r in found.items()}
    wall = {name: median(r["wall"]) for name, r in found.items()}
    value = rate["ours"] / rate["rectools"]
    detail: dict[str, Any] = {
        "asked": {"rounds": args.rounds, "seconds": args.seconds, "curve": args.curve},
        "settings": SAME, "batch": {"ours": 32, **BATCH}, "rounds": found, "median_targets_per_second": rate, "curves": curves,
        "ratio": {
            "rectools": value, "recbole": rate["ours"] / rate["recbole"], "rectools by the wall": wall["ours"] / wall["rectools"],
            "recbole by the wall": wall["ours"] / wall["recbole"],
            "rectools, inner 256": rate["ours, inner 256"] / rate["rectools, pre-norm, inner 256"],
            "rectools, bf16": rate["ours, bf16"] / rate["rectools, bf16"],
        },
        "minutes": (time.perf_counter() - started) / 60,
    }  # fmt: skip
    return finish("vs_sasrec", value, "ratio", TARGET, value >= 1.1 and detail["ratio"]["recbole"] >= 10, detail)


if __name__ == "__main__":
    sys.exit(main())
