"""Reading cached text vectors."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mtrec_ray import storage


def load_text_vectors(prefix: str, catalogue: pa.Table) -> torch.Tensor:
    """text_NE in the catalogue's order; an item without a text has the zero vector.

    Raises StorageError when a text of the catalogue was never encoded.
    """
    vectors = np.load(io.BytesIO(storage.read_bytes(storage.join(prefix, "vectors.npy"))))
    texts = storage.read_table(storage.join(prefix, "texts.parquet"))["text"].combine_chunks()
    wanted = catalogue["text"].combine_chunks()
    wanted = pc.if_else(pc.equal(wanted, ""), pa.scalar(None, pa.string()), wanted)
    place = pc.index_in(wanted, value_set=texts)
    unknown = pc.and_(place.is_null(), wanted.is_valid())
    if pc.any(unknown).as_py():
        example = wanted.filter(unknown)[0].as_py()
        raise storage.StorageError(f"{prefix}: no vector for the text {example!r}; run jobs.encode again")
    position = place.fill_null(-1).to_numpy()
    out = np.zeros((len(catalogue), vectors.shape[1]), np.float32)
    out[position >= 0] = vectors[position[position >= 0]]
    return torch.from_numpy(out)
