"""Exact search in fewer bits: nearly the same items, with their exact scores, measured when it is built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import parse_config
from mtrec_ray.histories import History
from mtrec_ray.models import int8
from mtrec_ray.pipeline import StageError
from mtrec_ray.retrieval.exact import NONE, ExactIndex, RecallError
from mtrec_ray.retrieval.reduced import Precision, ReducedIndex, build_reduced
from tests.conftest import TinyRun
from tests.unit.test_ivf import NOTHING, clustered, indexed


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_query_finds_nearly_all_and_their_scores_are_exact(precision: Precision) -> None:
    items, queries = clustered(12_000, 40)
    index = build_reduced(items, queries, 50, precision, 0.95)
    assert 0.98 < index.facts["recall"] <= 1 and index.facts["recall_at"] == 50 and index.facts["queries"] == 40
    exclude = np.sort((queries[0] @ items.T).argsort(descending=True)[:30].numpy())
    item, score = index.search(queries[:1], 50, [exclude])
    expected = ExactIndex(items).search(queries[:1], 50, [exclude])
    assert not np.isin(item[0].numpy(), exclude).any() and len(np.intersect1d(item[0], expected[0][0])) >= 48
    torch.testing.assert_close(score[0], items[item[0]] @ queries[0], atol=1e-4, rtol=1e-4)
    assert (score[0, 1:] <= score[0, :-1]).all()
    many = index.search(queries, 50, [NOTHING] * 40)  # a batch is searched in float32
    assert torch.equal(many[0], ExactIndex(items).search(queries, 50, [NOTHING] * 40)[0])


def test_ties_go_by_position_and_what_is_not_there_is_none() -> None:
    items = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    item, score = ReducedIndex(items, "int8", anywhere=True).search(torch.tensor([[1.0, 0.0]]), 4, [np.array([2])])
    assert item.tolist() == [[1, 0, 3, NONE]] and score[0, :3].tolist() == [2.0, 1.0, 1.0] and torch.isneginf(score[0, 3])


def test_a_cpu_without_vnni_searches_in_float32_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items, queries = clustered(2_000, 5)
    monkeypatch.setattr(int8, "NATIVE", False)
    assert build_reduced(items, queries, 20, "int8", 0.95).facts["recall"] > 0.95  # of eight bits: another CPU may serve it
    assert not caplog.records
    index = ReducedIndex(items, "int8", {"recall": 0.97})
    assert "no VNNI: searching in float32" in caplog.text and index.facts == {"recall": 0.97}
    monkeypatch.setattr(ReducedIndex, "near_scores", None)  # not looked at
    found, expected = (i.search(queries[:1], 20, [NOTHING]) for i in (index, ExactIndex(items)))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_one_that_finds_too_little_is_refused_with_its_figure() -> None:
    rng = np.random.default_rng(0)
    items = torch.from_numpy(rng.standard_normal((5000, 4)).astype(np.float32)) * 1e-3 + 1  # all but equal in eight bits
    queries = torch.from_numpy(rng.standard_normal((10, 4)).astype(np.float32))
    with pytest.raises(RecallError, match=r"0\.\d+ of the exact 20 candidates are found in int8, less than min_recall 0.95"):
        build_reduced(items, queries, 20, "int8", 0.95)
    with pytest.raises(RecallError, match="no users to measure it with"):
        build_reduced(items, queries[:0], 20, "int8", 0.95)


def test_a_bundle_says_its_precision_and_recall(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = indexed(tiny_run, tmp_path, kind="exact", precision="int8")
    facts = storage.read_json(storage.join(prefix, "index.json"))
    assert facts["kind"] == "exact" and facts["precision"] == "int8" and facts["recall"] > 0.95
    predictor = bundle.load(prefix)
    assert isinstance(predictor.index, ReducedIndex) and predictor.index.facts == facts
    history = History(["i1", "i2"], [0, 1000], {"click": [1, 1]})
    found, expected = (p.recommend([history], 5)[0]["items"] for p in (predictor, tiny_run.predictor))
    assert [i["item_id"] for i in found] == [i["item_id"] for i in expected]
    monkeypatch.setattr(ReducedIndex, "near_scores", lambda self, query_BD: torch.zeros(len(query_BD), len(self)))
    monkeypatch.setattr("mtrec_ray.retrieval.reduced.RESCORED", 1)
    with pytest.raises(StageError, match=r"less than min_recall 0\.95"):
        indexed(tiny_run, tmp_path / "strict", kind="exact", precision="int8")


def test_item_vectors_of_a_local_bundle_are_memory_mapped(tiny_run: TinyRun) -> None:
    vectors = bundle.item_vectors(str(tiny_run.bundle_root))
    assert torch.equal(vectors, tiny_run.predictor.item_vec_ND)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("items.safetensors")]
    address = vectors.data_ptr()
    assert any(int(a, 16) <= address < int(b, 16) for a, b in (line.split()[0].split("-") for line in mapped))
    assert torch.equal(bundle.item_vectors(str(tiny_run.bundle_root), 3, 7), vectors[3:7])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"kind": "ivf", "precision": "int8"}, "the lists of ivf have eight bits already"),
        ({"kind": "ivf", "shards": 2}, "the parts of a catalogue are searched exactly"),
        ({"precision": "int4"}, "index.precision"),
    ],
)
def test_an_index_that_does_not_exist_is_refused_with_its_key(tiny_run: TinyRun, index: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(tiny_run.config.model_dump(mode="json") | {"index": index})
