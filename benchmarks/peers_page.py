"""docs/peers.md and its two pictures, from the committed results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from jinja2 import Environment

from benchmarks.report import RESULTS

PAGE, TEMPLATE = Path("docs/peers.md"), Path(__file__).parent / "peers.md.jinja"
QUALITY, SPEED = Path("docs/pictures/peers_quality.svg"), Path("docs/pictures/peers_speed.svg")
OWN, OTHER, GREY = "#1f5fd0", "#d1495b", "#8b95a3"
TASKS = {"retrieval": "NDCG@10", "rating": "RMSE", "like": "AUC"}
LOWER = ("rating",)
"""Tasks whose metric is better when it is lower."""


def found(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))


def speeds() -> list[dict[str, Any]]:
    """Side-by-side measurements of parts: what, the peer, the ratio (above 1: faster here), by which benchmark."""
    sasrec, encode, topk = (found(n)["detail"] for n in ("vs_sasrec", "encode", "exact_topk"))
    prepare, ann, serve = (found(n)["detail"] for n in ("prepare", "ann", "serve_latency"))
    polars = median(prepare["seconds"]), median(prepare["polars_seconds"])
    hnsw = median(ann["queries_per_second"]["ivf"]) / ann["hnsw"]["queries_per_second"]
    rows = [
        ("train SASRec, targets per second", "RecBole", sasrec["ratio"]["recbole"], "vs_sasrec"),
        ("train SASRec, targets per second", "RecTools", sasrec["ratio"]["rectools"], "vs_sasrec"),
        ("encode texts, float32", "sentence-transformers", encode["ratio"], "encode"),
        ("exact top 100 of 100,000 items, users per second", "implicit", topk["ratio"], "exact_topk"),
        ("exact top 100 of 100,000 items, users per second", "torch", topk["over_torch"], "exact_topk"),
        (f"approximate top 100 of a million, recall {ann['recall']:.2f} to {ann['hnsw']['recall']:.2f}", "faiss HNSW", hnsw, "ann"),
        ("prepare ten million events in bounded memory", "Polars in memory", polars[1] / polars[0], "prepare"),
        ("HTTP requests per second, every answer computed", "bare FastAPI", serve["fused_over_bare"]["computed"], "serve_latency"),
        (
            "HTTP requests per second, answers remembered here, not there",
            "bare FastAPI",
            serve["fused_over_bare"]["as deployed"],
            "serve_latency",
        ),
    ]
    return [dict(zip(("what", "peer", "ratio", "by"), row, strict=True)) for row in rows]


def better(task: str, a: float, b: float) -> bool:
    return a < b if task in LOWER else a > b


def wins(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Where another system is ahead of the main job: in a metric, in seconds of training, in memory."""
    own, others = rows[0], [r for r in rows if r["system"] != rows[0]["system"]]

    def named(row: Mapping[str, Any]) -> str:
        return f"{row['system']}'s {row['model']}"

    ahead = [f"{named(r)} ({TASKS[t]})" for r in others for t in r["tasks"]
             if better(t, r["test"][t]["mean"], own["test"][t]["mean"])]  # fmt: skip
    cost = {key: mean(own["cost"][key]) for key in ("seconds", "peak_rss_mib")}
    return {"quality": ahead} | {key: [named(r) for r in others if mean(r["cost"][key]) < value] for key, value in cost.items()}


def draw_quality(rows: Sequence[Mapping[str, Any]]) -> None:
    """Each task's metric with its 95 % interval, a system a line, with the seconds of a training."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(TASKS), figsize=(12.5, 3.2))
    for axes, (task, metric) in zip(panels, TASKS.items(), strict=True):
        told = sorted((r for r in rows if task in r["tasks"]), key=lambda r: r["test"][task]["mean"], reverse=task in LOWER)
        for place, row in enumerate(told):
            colour = OWN if row["system"] == rows[0]["system"] else OTHER
            axes.plot(row["test"][task]["interval"], [place] * 2, color=colour, alpha=0.4, linewidth=2)
            axes.plot(row["test"][task]["mean"], place, "o", color=colour, markersize=5)
        names = [f"{r['system']}: {r['model'].partition(',')[0]}, {mean(r['cost']['seconds']):.3g} s" for r in told]
        axes.set_yticks(range(len(told)), names, fontsize=7)
        axes.set_ylim(-0.6, len(told) - 0.4)
        axes.set_title(f"{task}: {metric}" + (" (lower is better)" if task in LOWER else ""), fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(QUALITY, bbox_inches="tight", metadata={"Date": None})


def draw_speed(rows: Sequence[Mapping[str, Any]]) -> None:
    """How many times as fast as the peer, on a logarithmic axis."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8.4, 0.42 * len(rows) + 0.8))
    for place, row in enumerate(reversed(rows)):
        axes.barh(place, row["ratio"] - 1, left=1, color=OWN if row["ratio"] >= 1 else OTHER, height=0.6)
        axes.annotate(f"{row['ratio']:.2f}", (max(row["ratio"], 1), place), xytext=(4, -3), textcoords="offset points", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{r['what']}\nthan {r['peer']}" for r in reversed(rows)], fontsize=7)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.set_xlabel("times as fast as the other system")
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(SPEED, bbox_inches="tight", metadata={"Date": None})


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "peers"}
    return plt


def write_page() -> None:
    whole = found("against_peers")
    rows = whole["detail"]["rows"]
    limits = {r["system"]: r["setting"]["seconds"] for r in rows if "seconds" in r["setting"]}
    draw_quality(rows)
    draw_speed(speeds())
    template = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    told = template.render(
        rows=rows, tasks=TASKS, lower=LOWER, speeds=speeds(), wins=wins(rows), machine=whole["machine"], date=whole["date"],
        errors=whole["detail"]["errors"], mean=mean, limits=limits,
        polars_gib=found("prepare")["detail"]["polars_peak_mib"] / 1024,
    )  # fmt: skip
    PAGE.write_text(told, encoding="utf-8")
