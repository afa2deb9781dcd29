"""What a thousand million users would cost: `python -m benchmarks.scaling`; writes docs/scaling.md.

Unit costs are those of the committed results (`benchmarks/results/`), beside two measured here: bytes of a prepared event, and
bytes of a user in the live store. They are multiplied, not measured, at the sizes asked for (defaults: 10^9 users, 10^8 items,
10^11 events, 10,000 requests per second); prices are assumptions to be changed (`--core-hour`, `--gpu-hour`,
`--terabyte-month`).

Value: dollars of one whole night (append, warm epoch, scoring of everybody).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from jinja2 import Environment

from benchmarks.generate import generate
from benchmarks.report import RESULTS, finish
from benchmarks.world import Parameters
from mtrec_ray import runtime, storage
from mtrec_ray.config import load_config
from mtrec_ray.data.prepare import prepare
from mtrec_ray.histories import History
from mtrec_ray.serving.sqlite_store import SqliteStore
from mtrec_ray.serving.store import events_of

TEMPLATE = Path(__file__).parent / "scaling.md.jinja"
PAGE = Path(__file__).parent.parent / "docs" / "scaling.md"
WIDTH, TEXT = 64, 384
EVENTS, STORED = 1_000_000, 100
HISTORY, ANSWER = 100 * 20, 10 * 100
BETWEEN = WIDTH * 4 + 200 * 8 + 200 * 4 * 4
"""Bytes of a request by shape: a history of 100 events and the answer; between stages a state, 200 candidates with scores, and four
tasks' predictions of them."""


def found(name: str) -> dict[str, Any]:
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["detail"])


def size(folder: Path, *parts: str) -> int:
    return sum(p.stat().st_size for part in parts for p in (folder / part).rglob("*") if p.is_file())


def bytes_of_an_event(folder: Path) -> dict[str, float]:
    """Of the log as Parquet, and of what preparation makes of it."""
    generate(Parameters(events=EVENTS), folder / "log")
    config = load_config(folder / "log" / "run.yaml")

    def in_this_process(function: Any, shared: Any, items: Any, *_: Any, **__: Any) -> Any:
        return ((place, function(shared, item)) for place, item in enumerate(items))

    with mock.patch.object(runtime, "for_each", in_this_process):
        prefix = Path(storage.resolve(prepare(config, str(folder / "data")).prefix)[1])
    return {"log": size(folder / "log", "log") / EVENTS} | {
        part: size(prefix, part) / EVENTS for part in ("events", "windows", "store")
    }


def bytes_of_a_user(folder: Path) -> float:
    """In SQLite, with a hundred events."""
    store = SqliteStore(str(folder / "live.sqlite"), ["rating"], [], 2 * STORED, lambda _: None, "0")
    users = 2000
    for user in range(users):
        times = [1_700_000_000_000 + 60_000 * n for n in range(STORED)]
        history = History([f"item{(user * 31 + n) % 9973}" for n in range(STORED)], times, {"rating": [4.0] * STORED})
        store.append(events_of(f"user{user}", history))
    store.close()
    return size(folder, ".") / users


def measured() -> dict[str, float]:
    """Unit costs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "user").mkdir()
        event, user = bytes_of_an_event(folder), bytes_of_a_user(folder / "user")
    step = found("gpu_step")["variants"]["large sasrec bf16"]
    size_of = step["size"]
    weights = size_of["layers"] * (4 * size_of["width"] ** 2 + 2 * size_of["width"] * size_of["feed_forward"])
    batch, ann, serve = found("batch_pipeline"), found("ann"), found("serve_latency")["variants"]
    best = {n: max(c["requests_per_second"] for c in serve[n].values()) for n in ("graph_throughput", "fused_throughput")}
    return {
        "append_over_all": json.loads((RESULTS / "append.json").read_text(encoding="utf-8"))["value"],
        "log_bytes_per_event": event["log"], "events_bytes_per_event": event["events"], "windows_bytes_per_event": event["windows"],
        "store_bytes_per_event": event["store"], "live_bytes_per_user": user,
        "prepare_core_seconds_per_event": 2 / found("prepare")["events_per_second"],
        "encode_core_seconds_per_item": 1 / found("encode")["texts_per_second"]["int8, compiled"],
        "train_gpu_seconds_per_event": 1 / step["tokens_per_second"], "trunk_gradient_bytes": 4.0 * weights,
        "train_step_seconds": step["seconds_per_step"], "train_tokens_per_step": float(size_of["windows"] * size_of["window"]),
        "train_gib": step["peak_gib"], "prepare_mib": found("prepare")["peak_mib"],
        "score_mib": batch["runs"]["all_users"]["peak_pss_mib"],
        "score_core_seconds_per_user": 2 / batch["runs"]["all_users"]["users_per_second"],
        "score_bytes_per_user": batch["runs"]["all_users"]["bytes"] / batch["runs"]["all_users"]["users"],
        "ann_core_seconds_per_query": 1 / sorted(ann["queries_per_second"]["ivf"])[2],
        "ann_bytes_per_item": ann["bytes"] / ann["items"],
        "ann_items": float(ann["items"]), "graph_requests_per_core": best["graph_throughput"] / 2,
        "fused_requests_per_core": best["fused_throughput"] / 2,
    }  # fmt: skip


def amount(value: float, unit: str) -> str:
    """12,300 core hours; 4.2 TB."""
    if unit == "B":
        for name, power in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
            if value >= power:
                return f"{value / power:,.1f} {name}"
        return f"{value:,.0f} B"
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:,.1f} {unit}"


def page(u: dict[str, float], a: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """docs/scaling.md, and the dollars of every stage."""
    day = a.events / 365
    hours = {
        "prepare all": a.events * u["prepare_core_seconds_per_event"] / 3600,
        "append a day": a.events * u["prepare_core_seconds_per_event"] / 3600 * u["append_over_all"],
        "encode all items": a.items * u["encode_core_seconds_per_item"] / 3600,
        "retrieve for everybody": a.users * u["ann_core_seconds_per_query"] * (a.items / u["ann_items"]) ** 0.5 / 3600,
        "score everybody's candidates": a.users * u["score_core_seconds_per_user"] / 3600,
    }
    trained = {"an epoch over all events": a.events, "a warm epoch over thirty days": 30 * day}
    gpu = {n: events * u["train_gpu_seconds_per_event"] / 3600 for n, events in trained.items()}
    dollars = {n: h * a.core_hour for n, h in hours.items()} | {n: h * a.gpu_hour for n, h in gpu.items()}
    prepared = u["events_bytes_per_event"] + u["windows_bytes_per_event"] + u["store_bytes_per_event"]
    texts, vectors, search = a.items * TEXT * 2.0, a.items * WIDTH * 4.0, a.items * u["ann_bytes_per_item"]
    per_event = u["windows_bytes_per_event"] + 2 * u["trunk_gradient_bytes"] / u["train_tokens_per_step"]
    wire = {
        "prepare all": a.events * (u["log_bytes_per_event"] + 2 * u["events_bytes_per_event"] + prepared),
        "append a day": day * u["log_bytes_per_event"] + 2 * a.events * prepared, "encode all items": texts,
        "retrieve for everybody": a.events * u["store_bytes_per_event"],
        "score everybody's candidates": a.users * u["score_bytes_per_user"],
    } | {n: events * per_event for n, events in trained.items()}  # fmt: skip
    held = {
        "prepare all": f"{u['prepare_mib'] / 1024:.1f} GiB, bounded", "append a day": f"{u['prepare_mib'] / 1024:.1f} GiB, bounded",
        "encode all items": "the encoder", "retrieve for everybody": amount(vectors + search, "B") + ", shared by a machine",
        "score everybody's candidates": f"{u['score_mib'] / 1024:.1f} GiB beside the catalogue",
    } | dict.fromkeys(trained, f"{u['train_gib']:.0f} GiB of a GPU; {amount(texts, 'B')} of text vectors")  # fmt: skip
    nightly = ("append a day", "a warm epoch over thirty days", "retrieve for everybody", "score everybody's candidates")
    night = sum(dollars[n] for n in nightly)
    asked = f"{a.requests:,} requests per second, "
    cores = {asked + k: a.requests / u[f"{n}_requests_per_core"] for n, k in (("graph", "five deployments"), ("fused", "one"))}
    time = {n: amount(h, "core hours") for n, h in hours.items()} | {n: amount(h, "GPU hours") for n, h in gpu.items()}
    work = [(n, t, f"{dollars[n]:,.0f}", amount(wire[n], "B"), held[n]) for n, t in time.items()]
    sent = {n: HISTORY + ANSWER + (0 if n.endswith("one") else BETWEEN) for n in cores}
    for n, c in cores.items():
        per_second = amount(a.requests * sent[n], "B") + " a second"
        work.append((n, amount(c, "cores"), f"{c * a.core_hour:,.0f} an hour", per_second, "the catalogue and an index"))
    kept = {
        "the log": a.events * u["log_bytes_per_event"], "prepared data": a.events * prepared,
        "lists of everybody": a.users * u["score_bytes_per_user"],
        "live histories (SQLite, 100 events each)": a.users * u["live_bytes_per_user"],
        "text vectors, half precision": texts, "item vectors, float32": vectors,
        "approximate index": search,
    }  # fmt: skip
    sizes = [(n, amount(b, "B"), f"{b / 1e12 * a.terabyte_month:,.0f}") for n, b in kept.items()]
    template = Environment(trim_blocks=False, keep_trailing_newline=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        **vars(a), u=u, prepared=prepared, work=work, kept=sizes, night=night, texts=amount(texts, "B"),
        table=amount(3 * vectors, "B"), width=WIDTH, gradient=amount(u["trunk_gradient_bytes"], "B"),
        outside=HISTORY + ANSWER, between=BETWEEN,
        gigabits=8 * 2 * u["trunk_gradient_bytes"] / u["train_step_seconds"] / 1e9,
    )  # fmt: skip
    return text, dollars | {"night": night}


def main() -> int:
    parser = argparse.ArgumentParser(description="What a thousand million users would cost.")
    parser.add_argument("--users", type=float, default=1e9)
    parser.add_argument("--items", type=float, default=1e8)
    parser.add_argument("--events", type=float, default=1e11)
    parser.add_argument("--requests", type=int, default=10_000, help="per second")
    parser.add_argument("--core-hour", type=float, default=0.02, help="dollars")
    parser.add_argument("--gpu-hour", type=float, default=4.0, help="dollars")
    parser.add_argument("--terabyte-month", type=float, default=23.0, help="dollars")
    args = parser.parse_args()
    units = measured()
    text, dollars = page(units, args)
    PAGE.write_text(text, encoding="utf-8")
    return finish(
        "scaling", dollars["night"], "dollars of a night at the sizes asked for", "none", True, {"units": units, "dollars": dollars}
    )


if __name__ == "__main__":
    sys.exit(main())
