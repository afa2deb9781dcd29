"""The approximate index: as complete as the exact one, nearly as right, and refused when it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import parse_config
from mtrec_ray.histories import History
from mtrec_ray.pipeline import Run, StageError
from mtrec_ray.retrieval.exact import NONE, ExactIndex
from mtrec_ray.retrieval.ivf import IvfIndex, RecallError, build_ivf, list_count, recall_of
from tests.conftest import TinyRun

NOTHING = np.zeros(0, np.int64)


def clustered(items: int, queries: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Items around 60 centres, and queries near them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((60, 16))
    vectors = centres[rng.integers(0, 60, items + queries)] + 0.3 * rng.standard_normal((items + queries, 16))
    found = torch.from_numpy(vectors.astype(np.float32))
    return found[:items], found[items:]


@pytest.fixture(scope="module")
def built() -> tuple[IvfIndex, torch.Tensor, torch.Tensor]:
    items, queries = clustered(12_000, 200)
    return build_ivf(items, queries, 50), items, queries


def test_it_looks_into_few_lists_and_finds_what_was_asked_of_it(built: tuple[IvfIndex, torch.Tensor, torch.Tensor]) -> None:
    index, items, queries = built
    assert index.facts["lists"] == list_count(12_000, None) == 300 and index.probes < 100
    assert index.facts["recall"] > 0.95 and index.facts["recall_at"] == 50 and index.facts["queries"] == 100
    truth = ExactIndex(items).search(queries, 50, [NOTHING] * 200)[0].numpy()
    assert recall_of(index, queries, truth, 300) == 1.0  # all lists are the whole catalogue
    assert recall_of(index, queries, truth, 1) < 0.95
    item, score = index.search(queries, 50, [NOTHING] * 200)
    torch.testing.assert_close(score, (queries[:, None] * items[item]).sum(-1), atol=1e-4, rtol=1e-4)
    assert (score[:, 1:] <= score[:, :-1]).all()


def test_k_stays_filled_whatever_is_excluded(built: tuple[IvfIndex, torch.Tensor, torch.Tensor]) -> None:
    index, items, queries = built
    best = (queries[:4] @ items.T).argsort(1, descending=True).numpy()
    exclude = [np.sort(best[0, :500]), NOTHING, np.sort(best[2, :11_990]), np.arange(12_000)]
    item, score = index.search(queries[:4], 20, exclude)
    for row in range(4):
        assert not np.isin(item[row].numpy(), exclude[row]).any()
    assert (item[:2] != NONE).all() and item[2].tolist() == [*best[2, 11_990:], *[NONE] * 10]
    assert item[3].tolist() == [NONE] * 20 and score[3].isneginf().all()
    assert len(np.intersect1d(item[0].numpy(), best[0, 500:520])) >= 18  # recall holds behind a filter too


def test_the_same_after_it_was_written_and_memory_mapped(
    built: tuple[IvfIndex, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    index, items, queries = built
    (tmp_path / "lists").write_bytes(index.save())
    expected = index.search(queries, 30, [NOTHING] * 200)
    for content in (index.save(), tmp_path / "lists"):
        found = IvfIndex.load(content, items, index.facts).search(queries, 30, [NOTHING] * 200)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_one_query_is_searched_like_many(built: tuple[IvfIndex, torch.Tensor, torch.Tensor]) -> None:
    index, _, queries = built
    many = index.search(queries, 10, [NOTHING] * 200)[1]
    one = torch.cat([index.search(q[None], 10, [NOTHING])[1] for q in queries])
    torch.testing.assert_close(one, many, atol=1e-5, rtol=1e-5)


def test_an_index_that_finds_too_little_is_refused_with_its_figure() -> None:
    items, queries = clustered(4000, 60)
    with pytest.raises(RecallError, match=r"0\.\d+ of the exact 50 candidates .* less than min_recall 1\.0"):
        build_ivf(items, queries, 50, recall=0.3, min_recall=1.0)
    with pytest.raises(RecallError, match="1 users to tune it on"):
        build_ivf(items, queries[:1], 50)


def test_a_small_catalogue_is_one_list_and_a_broken_one_is_an_error() -> None:
    items, queries = clustered(30, 20)
    index = build_ivf(items, queries, 200)
    assert index.facts["lists"] == 1 and index.facts["recall"] == 1.0
    found, expected = (i.search(queries, 5, [NOTHING] * 20) for i in (index, ExactIndex(items)))
    assert torch.equal(found[0], expected[0])
    items[3, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        build_ivf(items, queries, 5)


# ------------------------------------------------------------------ in a run


def indexed(run: TinyRun, folder: Path, **index: object) -> str:
    """The index stage on the tiny run's own training -> prefix of the bundle."""
    config = parse_config(run.config.model_dump(mode="json") | {"index": {"kind": "ivf", "queries": 40} | index})
    made = Run(config, str(folder))
    made.data = run.data
    trained = storage.Directory(str(folder / "train"))
    prefix = trained.begin("1" * 64)
    source = Path(storage.Directory(str(run.bundle_root)).prefix)
    storage.write_bytes(storage.join(prefix, "weights.safetensors"), (source / "weights.safetensors").read_bytes())
    trained.publish("1" * 64, kind="train")
    made.stage("index")
    return storage.join(made.bundle.root, made._bundle_inputs()[:16])


def test_a_bundle_holds_its_index_with_the_measured_recall(tiny_run: TinyRun, tmp_path: Path) -> None:
    prefix = indexed(tiny_run, tmp_path)
    facts = storage.read_json(storage.join(prefix, "index.json"))
    assert facts["kind"] == "ivf" and facts["recall"] == 1.0 and facts["queries"] > 5
    predictor = bundle.load(prefix)
    assert isinstance(predictor.index, IvfIndex)
    history = History(["i1", "i2"], [0, 1000], {"click": [1, 1]})
    found, expected = (p.recommend([history, History()], 5) for p in (predictor, tiny_run.predictor))
    for a, b in zip(found, expected, strict=True):
        assert [i["item_id"] for i in a["items"]] == [i["item_id"] for i in b["items"]]
        assert [i["score"] for i in a["items"]] == pytest.approx([i["score"] for i in b["items"]], rel=1e-5, abs=1e-5)
    (Path(prefix) / "index.faiss").write_bytes(b"damaged")
    with pytest.raises(bundle.BundleError, match="damaged"):
        bundle.load(prefix)


def test_no_bundle_is_made_of_an_index_that_finds_too_little(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtrec_ray.retrieval.ivf.recall_of", lambda *_: 0.5)
    with pytest.raises(StageError, match=r"0\.500 of the exact .* min_recall 0\.95"):
        indexed(tiny_run, tmp_path)
    assert not list((tmp_path / "bundle").rglob("fingerprint.json"))
