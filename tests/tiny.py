"""A tiny synthetic log of baskets with impressions, and everything made from it without a Ray cluster."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec_ray import bundle, runtime, storage
from mtrec_ray.config import EncoderConfig, RunConfig, TableConfig, parse_config
from mtrec_ray.data import sources
from mtrec_ray.data.prepare import prepare
from mtrec_ray.encoders import bulk
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.worker import build_model, load_schema, run_worker

HOUR = 3_600_000


def write_log(folder: Path, users: int = 24, items: int = 20, visits: int = 12, seed: int = 0, files: int = 3) -> None:
    """log/*.csv, items.csv, users.csv. A visit shows four items at one time; the even user likes even items."""
    rng = np.random.default_rng(seed)
    rows: list[list[Any]] = []
    for user in range(users):
        time = 1_700_000_000_000 + int(rng.integers(0, 48)) * HOUR
        for _ in range(int(rng.integers(4, visits + 1))):
            time += int(rng.integers(1, 30)) * HOUR
            for item in rng.choice(items, 4, replace=False):
                click = int(rng.random() < (0.8 if item % 2 == user % 2 else 0.15))
                rating = int(rng.integers(3, 6) if item % 2 == user % 2 else rng.integers(1, 4)) if click else ""
                rows.append([f"u{user}", f"i{item}", time, click, rating, "phone" if user % 3 else "web"])
    rows.sort(key=lambda r: r[2])  # a log in the order of time; ties keep an arbitrary order of rows
    (folder / "log").mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        with open(folder / "log" / f"part{number}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["user", "item", "ts", "click", "rating", "device"])
            writer.writerows(rows[i] for i in part)
    with open(folder / "items.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "name", "genre"])
        writer.writerows([f"i{i}", f"Thing {i}", "even" if i % 2 == 0 else "odd"] for i in range(items))
        writer.writerow(["new", "Thing new", "even"])  # no training event
    with open(folder / "users.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["user_id", "taste", "age"])
        writer.writerows([f"u{u}", "even" if u % 2 == 0 else "odd", 20 + u] for u in range(users))


def raw_config(folder: Path) -> dict[str, Any]:
    """The tiny log's configuration as a mapping: baskets (`group`), the time protocol, impressions as targets."""
    return {
        "name": "tiny",
        "data": {
            "interactions": {
                "format": "csv",
                "path": str(folder / "log"),
                "columns": {"user_id": "user", "item_id": "item", "timestamp": "ts"},
            },
            "items": {"format": "csv", "path": str(folder / "items.csv")},
            "users": {"format": "csv", "path": str(folder / "users.csv")},
            "labels": {
                "click": {"kind": "binary"},
                "rating": {"min": 1, "max": 5},
                "like": {"expression": "rating >= 4", "kind": "binary"},
            },
            "actions": ["click", "rating"],
            "history": "click > 0",
            "context": ["device"],
            "attributes": {"taste": {"column": "taste"}, "age_group": {"column": "age", "bins": [25, 35]}},
            "text": {"template": "{name}, {genre}", "title": "name", "columns": ["genre"]},
            "same_time": "group",
            "protocol": "time",
            "window": 8,
            "partitions": 3,
        },
        "model": {"width": 16, "layers": 1, "heads": 2, "feed_forward": 32, "dropout": 0.0, "id_dropout": 0.2, "sharing_width": 16},
        "tasks": {
            "retrieval": {"kind": "retrieval"},
            "click": {"kind": "binary", "label": "click", "weight": 0.5},
            "rating": {"kind": "regression", "label": "rating", "weight": 0.5},
            "similar": {"kind": "similarity", "weight": 0.1, "within_hours": 72, "share": 1.0},
            "taste": {"kind": "profile", "attribute": "taste", "weight": 0.1},
            "age_group": {"kind": "profile", "attribute": "age_group", "weight": 0.1},
        },
        "train": {"epochs": 3, "batch_windows": 16, "learning_rate": 0.01, "workers": 2},
        "ranking": {"candidates": 10},
        "scoring": {"k": 5, "batch_users": 7},
        "evaluation": {"bootstrap": 50},
    }


def write_features(folder: Path, files: int = 2) -> None:
    """features/*.parquet: the log of `write_log` with position (whole numbers), price and propensity (numbers), tags (lists) and
    review (text).

    Rows keep their order. A price is missing in every seventh row, tags in every fifth, a review where nothing was clicked.
    """
    log = pd.concat([pd.read_csv(p) for p in sorted((folder / "log").glob("*.csv"))], ignore_index=True)
    number = log["item"].str.extract(r"(\d+)")[0].astype(int)
    place = np.arange(len(log))
    log["position"] = log.groupby(["user", "ts"]).cumcount() + 1
    log["price"] = np.where(place % 7 == 0, np.nan, (1.5 + number) * np.where(place % 3 == 0, 0.5, 1.0))
    log["propensity"] = 1 / log["position"]
    log["tags"] = [None if i % 5 == 0 else ["even" if n % 2 == 0 else "odd", f"t{n % 3}", f"rare{n}"] for i, n in enumerate(number)]
    clicked = log["click"] == 1
    log["review"] = [
        f"Thing {n} even" if c and i % 4 else ("  " if c else None) for i, (n, c) in enumerate(zip(number, clicked, strict=True))
    ]
    (folder / "features").mkdir(exist_ok=True)
    for part, rows in enumerate(np.array_split(place, files)):
        pq.write_table(pa.Table.from_pandas(log.iloc[rows], preserve_index=False), folder / "features" / f"part{part}.parquet")


def with_features(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Every kind of feature, and sessions."""

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["interactions"] |= {"format": "parquet", "path": str(folder / "features")}
        raw["data"]["session_gap_minutes"] = 720
        raw["data"]["context"] = {
            "device": {"kind": "categorical"},
            "price": {"kind": "numerical", "transform": "log", "min": 0},
            "price_band": {"kind": "numerical", "transform": "quantile", "bins": 4, "use": "request"},
            "tags": {"kind": "multihot", "max_values": 6},
            "position": {"kind": "categorical", "use": "request", "at_inference": 1},
            "propensity": {"kind": "kept", "min": 0, "max": 1},
        }
        raw["data"]["interactions"]["columns"]["price_band"] = "price"

    return change


def make_config(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> RunConfig:
    raw = raw_config(folder)
    if change is not None:
        change(raw)
    return parse_config(raw)


def read_all(table: TableConfig, needed: list[str], what: str) -> pa.Table:
    """Every unit of a small table, as strings."""
    units = sources.list_units(table, needed, what, set(needed))
    return pa.concat_tables([sources.read_strings(table, unit, needed, what) for unit in units])


def in_this_process(function: Callable[[Any, Any], Any], shared: Any, items: Any, what: str, **_: Any) -> Iterator[tuple[int, Any]]:
    """`runtime.for_each` without a cluster; the last item is done first, since no order is promised."""
    for place in reversed(range(len(items))):
        yield place, function(shared, items[place])


def prepare_locally(config: RunConfig, root: str | Path) -> storage.Directory:
    """`prepare` without a Ray cluster: the same tasks, run in this process."""
    with mock.patch.object(runtime, "for_each", in_this_process):
        return prepare(config, str(root))


def with_reviews(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A free text in every event of a history, and the tiny encoder."""

    def change(raw: dict[str, Any]) -> None:
        raw["data"]["interactions"] |= {"format": "parquet", "path": str(folder / "features")}
        raw["data"]["context"] = {"device": {"kind": "categorical"}, "review": {"kind": "text"}}
        raw["encoder"] = {"model": str(folder / "encoder"), "batch_size": 8}

    return change


def encode_locally(config: RunConfig, data: storage.Directory, root: str | Path) -> storage.Directory:
    """`encode` without a Ray cluster."""

    def shards(encoder: EncoderConfig, folder: str, parts: list[list[str]]) -> None:
        for number, texts in enumerate(parts):
            storage.write_bytes(bulk._file(folder, number), bulk._bytes(TextEncoder(encoder).encode(texts)))

    with mock.patch.object(bulk, "_encode_shards", shards):
        found = bulk.encode(config, data, str(root))
    assert found is not None
    return found


def train_locally(config: RunConfig, data: storage.Directory, text: storage.Directory | None = None) -> Recommender:
    """The loop in this process -> the best model."""
    fitted = run_worker(config, data.prefix, None if text is None else text.prefix, lambda *_: None)
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    model = build_model(config, load_schema(data.prefix), None if text is None else load_text_vectors(text.prefix, catalogue))
    model.load_state_dict(fitted.best_state)
    return model.eval()


def write_bundle(
    config: RunConfig, data: storage.Directory, model: Recommender, root: str | Path, text: storage.Directory | None = None
) -> Predictor:
    """Bundle the model, published, and load it again."""
    directory = storage.Directory(root)
    prefix = directory.begin("0" * 64)
    catalogue = storage.read_table(data.path("catalogue.parquet"))
    fingerprint = bundle.write(prefix, config, load_schema(data.prefix), catalogue, model, text and text.manifest["encoder"])
    storage.write_json(storage.join(prefix, "metrics.json"), {})
    directory.publish("0" * 64, kind="bundle", fingerprint=fingerprint)
    return bundle.load(str(root))


def write_encoder(folder: Path, seed: int = 0) -> Path:
    """A tiny BERT with random weights and a word tokenizer, as a Hugging Face directory. It understands nothing:
    it is here so that the encode stage runs."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "Thing", "even", "odd", "new", ",", *map(str, range(30))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    return folder


def with_item_texts(folder: Path) -> Callable[[dict[str, Any]], None]:
    """Items have texts and a category; what is seen is left out."""

    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(folder / "encoder"), "batch_size": 8}
        raw["data"] |= {"exclude_seen": True, "item_features": {"genre": {"kind": "categorical"}}}

    return change


def write_shop(folder: Path) -> tuple[RunConfig, storage.Directory, storage.Directory, Predictor]:
    """A run directory to serve, with item texts -> its configuration, data, text vectors and predictor."""
    write_log(folder)
    write_encoder(folder / "encoder")
    config = make_config(folder, with_item_texts(folder))
    data = prepare_locally(config, folder / "data")
    text = encode_locally(config, data, folder / "text")
    return config, data, text, write_bundle(config, data, train_locally(config, data, text), folder / "bundle", text)
