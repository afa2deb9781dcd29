"""The whole main job on MovieLens-100K, then real HTTP requests: `python -m jobs.demo` (that is `make demo`).

Fetches the data, runs the pipeline into runs/demo, starts Ray Serve, asks it, prints a summary, stops Serve.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from jobs import command, fetch
from jobs.serve import start
from mtrec_ray import storage
from mtrec_ray.pipeline import STAGES
from mtrec_ray.serving.history import PreparedHistories

CAP = ["train.epochs=30", "train.schedule=cosine", "train.learning_rate=0.002", "train.warmup_steps=60", "train.evaluate_every=2"]
"""The demo's capped budget; jobs/configs/ml100k.yaml alone trains longer and better."""


def show_metrics(console: Console, metrics: dict[str, Any]) -> None:
    """Test metrics of the model beside the baselines."""
    ranking = Table(title=f"Next item, {metrics['protocol']}, full catalogue, seen items excluded")
    names = ["ndcg@10", "hr@10", "recall@20", "mrr"]
    for column in ["", *names]:
        ranking.add_column(column, justify="left" if not column else "right")
    rows = {"mtrec_ray": metrics["model"]["retrieval"]}
    rows |= {n: b["retrieval"] for n, b in metrics["baselines"].items() if "retrieval" in b}
    for name, values in rows.items():
        ranking.add_row(name, *[f"{values[n]:.4f}" for n in names])
    console.print(ranking)
    c = metrics["comparison"]
    console.print(
        f"ndcg@10 minus {c['baseline']}: {c['difference']:+.4f}, 95 % interval [{c['low']:+.4f}, {c['high']:+.4f}] "
        f"over {c['users']:.0f} users"
    )
    others = Table(title="The other tasks of the same model")
    for column in ("task", "metric", "mtrec_ray", "baseline"):
        others.add_column(column)
    for task, values in metrics["model"].items():
        for metric in ("rmse", "auc", "accuracy", "macro_f1", "hit@10"):
            if task == "retrieval" or metric not in values:
                continue
            beside = [f"{n} {b[task][metric]:.4f}" for n, b in metrics["baselines"].items() if metric in b.get(task, {})]
            others.add_row(task, metric, f"{values[metric]:.4f}", ", ".join(beside))
    console.print(others)


def show_user(console: Console, client: httpx.Client, store: PreparedHistories, titles: dict[str, str], user_id: str) -> None:
    """One user: recent history, recommendations with numbers per task, profile."""
    history = store.get(user_id)
    assert history is not None
    recent = Table(title=f"User {user_id}: the last of {len(history.item_ids) + len(history.seen_item_ids)} events")
    recent.add_column("title")
    recent.add_column("rating", justify="right")
    for item_id, rating in list(zip(history.item_ids, history.actions["rating"], strict=True))[-6:]:
        recent.add_row(titles.get(item_id, item_id), f"{rating:g}")
    console.print(recent)

    answer = post(client, "/recommend", {"user_id": user_id, "k": 10})
    table = Table(title=f"Recommended to user {user_id} (bundle {answer['bundle'][:12]})")
    tasks = list(answer["items"][0]["tasks"])
    for column in ("", "title", "score", *tasks):
        table.add_column(column, justify="left" if column == "title" else "right")
    for place, item in enumerate(answer["items"], 1):
        table.add_row(str(place), item["title"], f"{item['score']:.3f}", *[f"{item['tasks'][t]:.3f}" for t in tasks])
    console.print(table)

    profile = post(client, "/profile", {"user_id": user_id})["profile"]
    for attribute, values in profile.items():
        best = sorted(values.items(), key=lambda v: -v[1])[:4]
        console.print(f"profile {attribute}: " + ", ".join(f"{value} {p:.0%}" for value, p in best))


def show_similar(console: Console, client: httpx.Client, item_id: str, title: str) -> None:
    """The nearest items of one item."""
    answer = post(client, "/similar", {"item_id": item_id, "k": 5})
    table = Table(title=f"Similar to {title}")
    table.add_column("title")
    table.add_column("cosine", justify="right")
    for item in answer["items"]:
        table.add_row(item["title"], f"{item['score']:.3f}")
    console.print(table)


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    if response.status_code != 200:
        raise RuntimeError(f"POST {path} {body}: {response.status_code} {response.text}")
    return dict(response.json())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.demo", description="The main job on MovieLens-100K, served and asked.")
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--user", default="196")
    parser.add_argument("--item", default="50", help="the film whose similar items are shown")
    args = parser.parse_args()
    console, started = Console(width=110), time.perf_counter()
    try:
        fetch.fetch_ml100k(Path(".data/ml-100k"))
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    config = str(Path(__file__).parent / "configs" / "ml100k.yaml")
    code = command.main(STAGES, "demo", ["--config", config, "--out", args.out, *CAP])
    if code:
        return code
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = start(args.out, args.port)
    try:
        metrics = storage.read_json(storage.join(args.out, "metrics.json"))
        catalogue = storage.read_table(storage.Directory(f"{args.out}/bundle").path("catalogue.parquet"), ["item_id", "title"])
        titles = dict(zip(catalogue["item_id"].to_pylist(), catalogue["title"].to_pylist(), strict=True))
        with httpx.Client(base_url=f"http://127.0.0.1:{args.port}", timeout=30) as client:
            health = client.get("/healthz").json()
            console.rule("mtrec_ray demo")
            show_metrics(console, metrics)
            show_user(console, client, PreparedHistories(f"{args.out}/data"), titles, args.user)
            show_similar(console, client, args.item, titles[args.item])
            stranger = post(client, "/recommend", {"user_id": "a user nobody knows", "k": 1})
            console.print(
                f"an unknown user gets the popularity list, marked {stranger['degraded']}: {stranger['items'][0]['title']}, ..."
            )
            console.print(f"health: {health['status']}, bundle {health['bundle'][:12]}")
    finally:
        stop()
    timing = ", ".join(f"{k} {v:.0f} s" for k, v in metrics["timing"].items())
    peak = max(metrics["peak_rss_mib"].values())
    console.print(f"stages: {timing}; largest process {peak:.0f} MiB; all of it {time.perf_counter() - started:.0f} s")
    console.print(f"metrics: {args.out}/metrics.json  lists: {args.out}/scores  serve it: make serve RUN={args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
