"""encode: every distinct text of items and of events through the TextEncoder, by Ray Data actors, cached by text and model.

Texts are sorted by length and cut into shards. A finished shard is a file, so a killed job goes on with those that are missing;
texts that the last published vectors of the same encoder already hold are not encoded again. Texts of events (features of kind
`text`) are kept as hashes: what a user wrote stands in the prepared data alone.
"""

from __future__ import annotations

import io
import logging
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from numpy.typing import NDArray

from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, RunConfig
from mtrec_ray.encoders.event_texts import EventTexts, texts_of_events, write_event_texts
from mtrec_ray.encoders.loading import encoder_identity
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.features import hash_texts

log = logging.getLogger(__name__)

SHARD = 1024
"""Texts of a shard."""


class _Actor:
    """One encoder per actor. A shard is written whole or not at all."""

    def __init__(self, config: EncoderConfig, folder: str) -> None:
        torch.set_num_threads(1)
        self.folder = folder
        self.encoder = TextEncoder(config, "cuda" if config.use_gpu else "cpu")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number, texts in zip(batch["shard"], batch["texts"], strict=True):
            storage.write_bytes(_file(self.folder, int(number)), _bytes(self.encoder.encode(list(texts))))
        return {"shard": batch["shard"], "count": np.array([len(t) for t in batch["texts"]])}


def encode(config: RunConfig, data: storage.Directory, root: str) -> storage.Directory | None:
    """Vectors of all texts of the catalogue -> published directory with texts.parquet and vectors.npy; where events have texts,
    their hashes and vectors too (event_texts.py).

    None without an encoder in the config. Raises EncoderError before any worker starts.
    """
    if config.encoder is None:
        return None
    catalogue = storage.read_table(data.path("catalogue.parquet"), ["text"])
    texts = sorted({t for t in catalogue["text"].to_pylist() if t}, key=lambda t: (len(t), t))
    identity = encoder_identity(config.encoder)
    parts: dict[str, Any] = {"texts": texts, "encoder": identity}
    events = _texts_of_events(data, [n for n, feature in config.data.context.items() if feature.kind == "text"])
    if events is not None:
        parts["events"] = storage.sha256(np.array(sorted(events), np.int64).tobytes())
    inputs = storage.fingerprint(parts)
    directory = storage.Directory(root)
    if directory.is_published(inputs):
        log.info("encode: reused %s", directory.root)
        return directory
    width = TextEncoder(config.encoder).width  # what is wrong with the model is said here, before any worker starts
    vectors = np.zeros((len(texts), width), np.float32)
    known = _known(directory, texts, identity, vectors)
    folder = storage.join(directory.root, "_shards", inputs[:16])
    facts = {"texts": len(texts), "encoded": _encode_rest(config.encoder, folder, texts, known, vectors)}
    if events is not None:
        hash_K = np.array(sorted(events), np.int64)
        vec_KE = np.zeros((len(hash_K), width), np.float32)
        known = _known_events(directory, hash_K, identity, vec_KE)
        said = [events[h] for h in hash_K.tolist()]
        new = _encode_rest(config.encoder, folder + "_events", said, known, vec_KE)
        facts |= {"event_texts": len(hash_K), "event_texts_encoded": new}
    prefix = directory.begin(inputs)
    storage.write_bytes(storage.join(prefix, "vectors.npy"), _bytes(vectors))
    storage.write_table(storage.join(prefix, "texts.parquet"), pa.table({"text": pa.array(texts, pa.string())}))
    if events is not None:
        write_event_texts(prefix, hash_K, vec_KE)
    directory.publish(inputs, kind="text", encoder=identity, width=width, **facts)
    storage.delete(storage.join(directory.root, "_shards"))
    return directory


def _texts_of_events(data: storage.Directory, names: list[str]) -> dict[int, str] | None:
    """Hash -> text of all events; None without such features."""
    if not names:
        return None
    found: dict[int, str] = {}
    for texts in texts_of_events(data, names):
        found |= zip(hash_texts(texts).tolist(), texts.to_pylist(), strict=True)
    return found


def _encode_rest(
    config: EncoderConfig, folder: str, texts: list[str], known: NDArray[np.bool_], vectors: NDArray[np.float32]
) -> int:
    """Fill in the vectors that are not known -> how many those were."""
    new = np.flatnonzero(~known)
    if len(new) < len(texts):
        log.info("encode: %d of %d texts are known from the vectors before", len(texts) - len(new), len(texts))
    new = new[np.argsort([len(texts[i]) for i in new], kind="stable")]
    shards = [new[begin : begin + SHARD] for begin in range(0, len(new), SHARD)]
    _encode_shards(config, folder, [[texts[i] for i in places] for places in shards])
    for number, places in enumerate(shards):
        vectors[places] = _read(folder, number)
    return len(new)


def _known_events(
    directory: storage.Directory, hash_K: NDArray[np.int64], identity: dict[str, Any], vec_KE: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """As `_known`, for hashes."""
    nothing = np.zeros(len(hash_K), dtype=bool)
    try:
        same = directory.manifest.get("encoder") == identity
        old = EventTexts.open(directory.prefix) if same else None
    except storage.StorageError:
        return nothing
    if old is None:
        return nothing
    place = old.find(hash_K)
    found: NDArray[np.bool_] = place >= 0
    vec_KE[found] = old.vec_KE[place[found]]
    return found


def _known(
    directory: storage.Directory, texts: list[str], identity: dict[str, Any], vectors: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Fill in what the published vectors of the same encoder hold -> which texts those were."""
    nothing = np.zeros(len(texts), dtype=bool)
    try:
        if directory.manifest.get("encoder") != identity:
            return nothing
    except storage.StorageError:  # none, or one of another version
        return nothing
    old = storage.read_table(directory.path("texts.parquet"))["text"].combine_chunks()
    place = pc.index_in(pa.array(texts, pa.string()), value_set=old).fill_null(-1).to_numpy()
    found: NDArray[np.bool_] = place >= 0
    vectors[found] = np.load(io.BytesIO(storage.read_bytes(directory.path("vectors.npy"))))[place[found]]
    return found


def _encode_shards(config: EncoderConfig, folder: str, shards: list[list[str]]) -> None:
    """Write the shards that are not there yet."""
    missing = [i for i in range(len(shards)) if not storage.exists(_file(folder, i))]
    total, started = sum(map(len, shards)), time.perf_counter()
    done = total - sum(len(shards[i]) for i in missing)
    if done:
        log.info("encode: %d of %d texts were encoded by a run before", done, total)
    if not missing:
        return
    dataset = ray.data.from_items(
        [{"shard": i, "texts": shards[i]} for i in missing], override_num_blocks=len(missing)
    ).map_batches(
        _Actor,
        fn_constructor_args=(config, folder),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(missing))),
        num_gpus=1 if config.use_gpu else 0,
    )  # fmt: skip
    before = done
    for batch in dataset.iter_batches(batch_size=None):
        done += int(batch["count"].sum())
        log.info("encode: %d of %d texts, %.0f per second", done, total, (done - before) / (time.perf_counter() - started))
    assert done == total, (done, total)


def _file(folder: str, number: int) -> str:
    return storage.join(folder, f"{number:06d}.npy")


def _read(folder: str, number: int) -> NDArray[np.float32]:
    return np.asarray(np.load(io.BytesIO(storage.read_bytes(_file(folder, number)))), np.float32)


def _bytes(vectors: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vectors)
    return buffer.getvalue()
