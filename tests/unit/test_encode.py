"""The encode stage without a cluster: what is known already is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtrec_ray import storage
from tests import tiny
from tests.conftest import TinyRun


def test_texts_that_are_known_are_not_encoded_again(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Two new items, or another encoder: two texts, or all."""
    model = {"model": str(tiny.write_encoder(tmp_path / "encoder")), "batch_size": 8}
    config = tiny.make_config(tiny_run.folder, lambda raw: raw.update(encoder=model))
    first = tiny.encode_locally(config, tiny_run.data, tmp_path / "text")
    before = storage.read_table(first.path("texts.parquet"))["text"].to_pylist()
    vectors = np.load(first.path("vectors.npy"))
    catalogue = storage.read_table(tiny_run.data.path("catalogue.parquet"))
    position = catalogue.column_names.index("text")
    texts = [*catalogue["text"].to_pylist()[:-2], "Thing 27, odd", "Thing 28, even"]
    grown = storage.Directory(tmp_path / "grown")
    prefix = grown.begin("1" * 64)
    storage.write_table(storage.join(prefix, "catalogue.parquet"), catalogue.set_column(position, "text", [texts]))
    grown.publish("1" * 64)
    again = tiny.encode_locally(config, grown, tmp_path / "text")
    assert again.manifest["encoded"] == 2 and again.manifest["texts"] == 21
    found = dict(
        zip(storage.read_table(again.path("texts.parquet"))["text"].to_pylist(), np.load(again.path("vectors.npy")), strict=True)
    )
    for text, vector in zip(before, vectors, strict=True):
        if text in found:
            np.testing.assert_array_equal(found[text], vector)
    other = config.model_copy(update={"encoder": config.encoder.model_copy(update={"pooling": "cls"})})  # type: ignore[union-attr]
    whole = tiny.encode_locally(other, grown, tmp_path / "text")
    assert whole.manifest["encoded"] == 21
