"""encode: every distinct item text through the TextEncoder, by Ray Data actors, cached by text and model."""

from __future__ import annotations

import io
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, RunConfig
from mtrec_ray.encoders.text import TextEncoder, resolve_model

log = logging.getLogger(__name__)


class _Actor:
    """One encoder per actor."""

    def __init__(self, config: EncoderConfig) -> None:
        torch.set_num_threads(1)
        self.encoder = TextEncoder(config, "cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = batch["text"].tolist()
        return {"place": batch["place"], "vector": self.encoder.encode(texts)}


def encoder_identity(config: EncoderConfig) -> dict[str, Any]:
    """What decides a text's vector: the model's files (or hub name), pooling, length."""
    path = resolve_model(config.model)
    content = storage.file_fingerprint(path) if Path(path).is_dir() else path
    return {"model": config.model, "content": content, "pooling": config.pooling, "max_tokens": config.max_tokens}


def encode(config: RunConfig, data: storage.Directory, root: str) -> storage.Directory | None:
    """Vectors of all texts of the catalogue -> published directory with texts.parquet and vectors.npy.

    None without an encoder in the config. Raises EncoderError before any worker starts.
    """
    if config.encoder is None:
        return None
    catalogue = storage.read_table(data.path("catalogue.parquet"), ["text"])
    texts = sorted({t for t in catalogue["text"].to_pylist() if t}, key=lambda t: (len(t), t))
    identity = encoder_identity(config.encoder)
    inputs = storage.fingerprint({"texts": texts, "encoder": identity})
    directory = storage.Directory(root)
    if directory.is_published(inputs):
        log.info("encode: reused %s", directory.root)
        return directory
    TextEncoder(config.encoder)  # what is wrong with the model is said here, before any worker starts
    prefix = directory.begin(inputs)
    started = time.perf_counter()
    vectors: np.ndarray | None = None
    done = 0
    size = config.encoder.batch_size * 4
    rows = [{"place": i, "text": t} for i, t in enumerate(texts)]
    dataset = ray.data.from_items(rows, override_num_blocks=max(1, min(64, len(rows) // size))).map_batches(
        _Actor,
        fn_constructor_args=(config.encoder,),
        batch_size=size,
        compute=ray.data.ActorPoolStrategy(size=config.encoder.workers),
    )
    for batch in dataset.iter_batches(batch_size=None):
        if vectors is None:
            vectors = np.zeros((len(texts), batch["vector"].shape[1]), np.float32)
        vectors[batch["place"]] = np.stack(list(batch["vector"]))
        done += len(batch["place"])
        log.info("encode: %d of %d texts, %.0f per second", done, len(texts), done / (time.perf_counter() - started))
    assert vectors is not None and done == len(texts)
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    storage.write_bytes(storage.join(prefix, "vectors.npy"), buffer.getvalue())
    storage.write_table(storage.join(prefix, "texts.parquet"), pa.table({"text": pa.array(texts, pa.string())}))
    directory.publish(inputs, kind="text", encoder=identity, width=int(vectors.shape[1]), texts=len(texts))
    return directory
