"""The bundle: everything a trained recommender is, in one published, fingerprinted directory.

ROOT/manifest.json                  written last by evaluation: publishes
ROOT/<inputs>/config.json           the run's configuration
ROOT/<inputs>/schema.json           fitted transforms (LogSchema)
ROOT/<inputs>/catalogue.parquet     ids, titles, texts, popularity (the fallback)
ROOT/<inputs>/text_encoder.json     which TextEncoder made the text vectors
ROOT/<inputs>/weights.safetensors   the model
ROOT/<inputs>/items.safetensors     item_vec_ND
ROOT/<inputs>/index.json            how candidates are searched, and with what recall
ROOT/<inputs>/index.faiss           the lists of an approximate index
ROOT/<inputs>/texts.safetensors     text_NE in half precision, for search by text
ROOT/<inputs>/golden.json           requests with their answers (golden.py)
ROOT/<inputs>/fingerprint.json      SHA-256 over all of the above
ROOT/<inputs>/metrics.json          added by evaluation; not part of the fingerprint
ROOT/<inputs>/model_card.md         the same for people (evaluation/card.py)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mtrec_ray import golden, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.predictor import Predictor
from mtrec_ray.retrieval.ivf import IvfIndex
from mtrec_ray.retrieval.reduced import ReducedIndex
from mtrec_ray.schema import LogSchema

LISTS, VECTORS, TEXTS, GOLDEN = "index.faiss", "items.safetensors", "texts.safetensors", "golden.json"
CARD = "model_card.md"
_UNHASHED = ("metrics.json", CARD, "fingerprint.json")


class BundleError(storage.StorageError):
    """A bundle that is missing, incomplete, damaged or of another schema version."""


def write(
    prefix: str,
    config: RunConfig,
    schema: LogSchema,
    catalogue: pa.Table,
    model: Recommender,
    text_encoder: dict[str, Any] | None,
    index: IvfIndex | ReducedIndex | None = None,
) -> str:
    """Write an unpublished bundle that `load(prefix)` can already read -> its fingerprint.

    index: of the model's item vectors; None is the exact one.
    """
    model = model.eval()
    with torch.no_grad():
        item_vec_ND = model.item_vectors()
    text_width = 0 if model.text_NE is None else int(model.text_NE.shape[1])  # type: ignore[union-attr, index]
    files = {
        "config.json": config.model_dump_json(indent=1).encode(),
        "schema.json": schema.model_dump_json(indent=1).encode(),
        "text_encoder.json": json.dumps({"encoder": text_encoder, "width": text_width}, sort_keys=True).encode(),
        "weights.safetensors": save_tensors({k: v.contiguous() for k, v in model.state_dict().items()}),
        VECTORS: save_tensors({"item_vec_ND": item_vec_ND.contiguous()}),
        "index.json": json.dumps({"kind": "exact"} if index is None else {"kind": index.kind, **index.facts}).encode(),
    }
    if isinstance(index, IvfIndex):
        files[LISTS] = index.save()
    if model.text_NE is not None:
        files[TEXTS] = save_tensors({"text_NE": model.text_NE.half().contiguous()})  # type: ignore[union-attr, operator]
    for name, content in files.items():
        storage.write_bytes(storage.join(prefix, name), content)
    storage.write_table(storage.join(prefix, "catalogue.parquet"), catalogue)
    # what a reader will have, not what is in memory here
    storage.write_json(storage.join(prefix, GOLDEN), golden.make(_assemble(prefix, "", "cpu")))
    fingerprint = compute_fingerprint(prefix)
    storage.write_json(
        storage.join(prefix, "fingerprint.json"), {"fingerprint": fingerprint, "schema_version": storage.SCHEMA_VERSION}
    )
    return fingerprint


def compute_fingerprint(prefix: str) -> str:
    """SHA-256 over the names and contents of every file but the metrics."""
    base = storage.resolve(prefix)[1]
    names = {p.removeprefix(base + "/"): p for p in storage.list_files(prefix)}
    hashes = {n: storage.file_fingerprint_of_path(prefix, p) for n, p in names.items() if n not in _UNHASHED}
    return storage.fingerprint({"schema_version": storage.SCHEMA_VERSION, "files": hashes})


def find(uri: str) -> str:
    """The bundle of a run, or the bundle itself, by whichever of the two a person named."""
    inside = storage.join(uri, "bundle")
    return inside if storage.exists(storage.join(inside, "manifest.json")) else uri


def prefix_of(uri: str) -> str:
    """Where the files of a bundle are. Raises BundleError."""
    if storage.exists(storage.join(uri, "fingerprint.json")):
        return uri
    try:
        return storage.Directory(uri).prefix
    except storage.StorageError as error:
        raise BundleError(f"no bundle: {error}; python -m jobs.pipeline makes one") from None


def item_vectors(uri: str, begin: int = 0, end: int | None = None) -> Tensor:
    """item_vec_ND from one catalogue position to another. A local bundle's are memory-mapped: processes of a machine share
    them, and no more is read than is looked at."""
    return _vectors(prefix_of(uri), begin, end)


def _vectors(prefix: str, begin: int = 0, end: int | None = None) -> Tensor:
    file = storage.join(prefix, VECTORS)
    if not storage.is_local(file):
        return load_tensors(storage.read_bytes(file))["item_vec_ND"][begin:end]
    with safe_open(storage.resolve(file)[1], framework="pt") as tensors:
        return tensors.get_slice("item_vec_ND")[begin:end] if begin or end is not None else tensors.get_tensor("item_vec_ND")


def fingerprint_of(uri: str) -> str:
    """What a bundle says of itself. Raises BundleError, StorageError."""
    return str(storage.read_json(storage.join(prefix_of(uri), "fingerprint.json"))["fingerprint"])


def find_golden(uri: str) -> dict[str, Any] | None:
    """Requests with their answers, as of golden.check; None for a bundle of an older version."""
    file = storage.join(prefix_of(uri), GOLDEN)
    return dict(storage.read_json(file)) if storage.exists(file) else None


def text_vectors(uri: str) -> Tensor | None:
    """text_NE (half precision) of the catalogue, memory-mapped where it is local; None where items have no texts."""
    file = storage.join(prefix_of(uri), TEXTS)
    if not storage.exists(file):
        return None
    if not storage.is_local(file):
        return load_tensors(storage.read_bytes(file))["text_NE"]
    with safe_open(storage.resolve(file)[1], framework="pt") as tensors:
        return tensors.get_tensor("text_NE")  # type: ignore[no-any-return]


def load(uri: str, verify: bool = True, device: str = "cpu") -> Predictor:
    """A predictor from a published bundle (`runs/NAME/bundle`) or from an unpublished prefix.

    verify: hash the files and compare with the fingerprint. device: where the model works.
    Raises BundleError, saying what is wrong.
    """
    prefix = prefix_of(uri)
    stated = storage.read_json(storage.join(prefix, "fingerprint.json"))
    if stated.get("schema_version") != storage.SCHEMA_VERSION:
        raise BundleError(f"{prefix}: schema_version {stated.get('schema_version')!r}, this version reads {storage.SCHEMA_VERSION}")
    if verify and compute_fingerprint(prefix) != stated["fingerprint"]:
        raise BundleError(f"{prefix}: the files do not match the fingerprint {stated['fingerprint'][:12]}: damaged or changed")

    return _assemble(prefix, stated["fingerprint"], device)


def _assemble(prefix: str, fingerprint: str, device: str) -> Predictor:
    """The files of a bundle -> a predictor."""

    def read(name: str) -> bytes:
        return storage.read_bytes(storage.join(prefix, name))

    config = RunConfig.model_validate_json(read("config.json"))
    schema = LogSchema.model_validate_json(read("schema.json"))
    catalogue = storage.read_table(storage.join(prefix, "catalogue.parquet"))
    text = json.loads(read("text_encoder.json"))
    width = text["width"]
    model = Recommender(config, schema, torch.zeros(0, width) if width else None)
    model.load_state_dict(load_tensors(read("weights.safetensors")))
    item_vec_ND = _vectors(prefix).to(device)
    facts = json.loads(read("index.json"))
    index: IvfIndex | ReducedIndex | None = None
    if "precision" in facts:
        index = ReducedIndex(item_vec_ND, facts["precision"], facts)
    if facts["kind"] == IvfIndex.kind:
        lists = storage.join(prefix, LISTS)
        content = Path(storage.resolve(lists)[1]) if storage.is_local(prefix) else storage.read_bytes(lists)
        index = IvfIndex.load(content, item_vec_ND, facts)
    return Predictor(config, schema, catalogue, model.to(device), item_vec_ND, fingerprint, text["encoder"], index)
