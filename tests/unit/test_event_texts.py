"""Free texts of events: from the log into the history, the same by hash in windows and by text online, and out again."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mtrec_ray import bundle, storage
from mtrec_ray.config import ConfigError
from mtrec_ray.data.forget import forget
from mtrec_ray.encoders.event_texts import EventTexts, TextMemory
from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.evaluation.measure import Model, Moments
from mtrec_ray.features import MAX_TEXT, FeatureError, TextSpec, hash_texts
from mtrec_ray.histories import History
from mtrec_ray.models.features import FeatureEmbedding
from mtrec_ray.predictor import Predictor
from mtrec_ray.serving import api
from mtrec_ray.serving.deployments import StateEncoder
from mtrec_ray.serving.history import PreparedHistories
from mtrec_ray.serving.stages import Stamp
from mtrec_ray.training.feed import WindowCache
from tests import tiny
from tests.conftest import TinyRun

SPEC = TextSpec(name="review")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    folder = tmp_path_factory.mktemp("texts")
    tiny.write_log(folder)
    tiny.write_features(folder)
    tiny.write_encoder(folder / "encoder")

    def change(raw: dict[str, Any]) -> None:
        tiny.with_reviews(folder)(raw)
        raw["data"]["protocol"] = "leave_one_out"  # the store is what the test moments see

    config = tiny.make_config(folder, change)
    data = tiny.prepare_locally(config, folder / "run" / "data")
    text = tiny.encode_locally(config, data, folder / "run" / "text")
    predictor = tiny.write_bundle(config, data, tiny.train_locally(config, data, text), folder / "bundle", text)
    return TinyRun(folder, config, data, predictor)


def texts_of(run: TinyRun) -> EventTexts:
    found = EventTexts.open(storage.Directory(str(run.folder / "run" / "text")).prefix)
    assert found is not None
    return found


def state(predictor: Predictor, history: History) -> torch.Tensor:
    return predictor.encode_state(predictor.encode_histories([history]).batch)[0]


# ------------------------------------------------------------------ the feature


def test_a_text_is_known_by_its_hash_without_white_space_around_it() -> None:
    one, same, other, empty, none = SPEC.encode(["good", " good\n", "bad", "  ", None]).tolist()
    assert one == same and len({one, other, 0}) == 3 and empty == none == 0
    assert SPEC.encode(["喜欢 ❤", "喜欢"]).tolist() == hash_texts(pa.array(["喜欢 ❤", "喜欢"])).tolist()


def test_what_is_no_text_or_too_long_is_refused() -> None:
    assert len(SPEC.column(["x" * MAX_TEXT])) == 1
    for wrong, why in ((["x" * (MAX_TEXT + 1)], f"at most {MAX_TEXT} characters"), ([["a", "list"]], "expected text")):
        with pytest.raises(FeatureError, match=f"review: .*{why}"):
            SPEC.column(wrong)


def test_a_missing_text_adds_nothing_to_an_event() -> None:
    embed = FeatureEmbedding(SPEC, 8, 0.02, 4)
    value = torch.tensor([[[0.0] * 4, [float("nan")] * 4, [0.5] * 4]])
    found = embed(value)
    assert found.shape == (1, 3, 8) and not found[0, :2].any() and found[0, 2].any()


def test_vectors_are_found_by_hash_and_one_that_was_never_encoded_is_an_error() -> None:
    hashes = np.array([-5, 3, 9], np.int64)
    texts = EventTexts(hashes, np.eye(3, dtype=np.float32))
    assert texts(np.array([9, 0, -5])).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    with pytest.raises(storage.StorageError, match=r"jobs\.encode"):
        texts(np.array([4]))
    nothing = EventTexts(np.zeros(0, np.int64), np.zeros((0, 3), np.float32))
    assert nothing(np.array([0])).tolist() == [[0, 0, 0]]


def test_a_text_is_encoded_once_while_it_is_remembered() -> None:
    asked: list[list[str]] = []

    def encode(texts: Any) -> np.ndarray:
        asked.append(list(texts))
        return np.array([[len(t)] for t in texts], np.float32)

    known = EventTexts(hash_texts(pa.array(["known"])), np.array([[7]], np.float32))
    memory = TextMemory(encode, 1, known, keep=2)
    assert memory(pa.array(["a", "known", None, "a", "bb"]))[:, 0].tolist() == [1, 7, 0, 1, 2]
    assert memory(pa.array(["bb", "a"]))[:, 0].tolist() == [2, 1]
    assert asked == [["a", "bb"]]
    assert memory(pa.array(["c", "d", "e"]))[:, 0].tolist() == [1, 1, 1]  # more than it keeps
    memory(pa.array(["a"]))
    assert asked == [["a", "bb"], ["c", "d", "e"], ["a"]]


# ------------------------------------------------------------------ a run with reviews


def test_windows_hold_hashes_the_store_holds_texts_and_the_bundle_neither(run: TinyRun) -> None:
    train = WindowCache.from_table(storage.read_table(run.data.path("windows", "train")))
    column = train.columns["history_context_review"]
    log = pq.read_table(run.folder / "features")["review"].to_pylist()
    assert set(column.tolist()) - {0} <= set(hash_texts(pa.array(sorted({t for t in log if t and t.strip()}))).tolist())
    assert (column == 0).any() and (column != 0).any() and not any(n.startswith("target_context_review") for n in train.columns)
    store = PreparedHistories(run.data.root)
    said = {t for u in store.user_ids() for t in (store.get(u) or History()).context["review"]}
    assert None in said and "Thing 3 even" in said and "" not in said and "  " not in said
    written = b"".join(p.read_bytes() for p in (run.folder / "bundle").rglob("*") if p.is_file() and "catalogue" not in p.name)
    assert b"Thing 3 even" not in written
    directory = storage.Directory(str(run.folder / "run" / "text"))
    assert not any(b"Thing 3 even" in p.read_bytes() for p in Path(directory.prefix).iterdir())


def test_a_history_by_text_has_the_state_of_the_window_by_hash(run: TinyRun) -> None:
    table = storage.read_table(run.data.path("windows", "test"))
    cache = WindowCache.from_table(table, texts_of(run))
    first = np.unique(cache.first_of_user)  # the store ends there
    by_hash = Model(run.predictor).states(Moments.of(run.predictor.schema, cache, first))
    store = PreparedHistories(run.data.root)
    histories = [store.get(u) for u in table["user_id"].take(pa.array(first)).to_pylist()]
    by_text = torch.stack([state(run.predictor, h) for h in histories if h is not None])
    torch.testing.assert_close(by_text, by_hash, atol=1e-5, rtol=1e-5)
    assert len(by_text) > 10


def test_another_text_is_another_state_and_its_weights_were_trained(run: TinyRun) -> None:
    store = PreparedHistories(run.data.root)
    history = next(h for u in store.user_ids() if (h := store.get(u)) and len(h.item_ids) > 2)
    n = len(history.item_ids)

    def with_texts(texts: list[str | None]) -> torch.Tensor:
        return state(run.predictor, replace(history, context={"review": texts}))

    never = with_texts([*[None] * (n - 1), "odd odd 7"])  # no event of the log says so
    assert not torch.allclose(never, with_texts([None] * n), atol=1e-6)
    assert torch.equal(with_texts([None] * n), state(run.predictor, replace(history, context={})))
    weight = run.predictor.model.tokens.context["review"].linear.weight  # type: ignore[union-attr]
    assert weight.shape == (16, 16) and weight.abs().mean() > 0.02


def test_the_state_encoder_reads_texts_that_the_log_never_had(run: TinyRun) -> None:
    stage = StateEncoder.func_or_class(str(run.folder / "bundle"))
    history = History(["i1", "i2"], [0, 1000], {"click": [1, 1]}, {"review": ["odd odd 7", None]})
    found = asyncio.run(stage.encode(Stamp(run.predictor.fingerprint), history))
    torch.testing.assert_close(torch.from_numpy(found.state_D), state(run.predictor, history))


def test_http_takes_a_text_of_an_event_and_refuses_it_of_a_request(run: TinyRun) -> None:
    event = {"item_id": "i1", "timestamp": 5, "context": {"review": "even"}}
    schema = run.predictor.schema
    request = api.RecommendRequest.model_validate({"history": [event], "k": 3})
    assert request.history is not None
    assert api.inline_history(request.history, schema).context["review"] == ["even"]
    event["context"] = {"review": "x" * (MAX_TEXT + 1)}
    request = api.RecommendRequest.model_validate({"history": [event], "k": 3})
    assert request.history is not None
    with pytest.raises(api.BadRequestError, match=r"history\[0\]: context.review: expected at most"):
        api.inline_history(request.history, schema)
    with pytest.raises(api.BadRequestError, match="unknown column 'review'"):
        api.check_context({"review": "even"}, {c.name: c for c in schema.request_features})


def test_a_second_encoding_knows_every_text_and_new_ones_are_added(run: TinyRun, tmp_path: Path) -> None:
    root = tmp_path / "text"
    first = tiny.encode_locally(run.config, run.data, root).manifest
    assert first["event_texts"] == first["event_texts_encoded"] == len(texts_of(run).hash_K) > 5
    prefix = storage.Directory(str(root)).prefix
    fewer = texts_of(run)
    np.save(Path(prefix) / "event_hashes.npy", fewer.hash_K[1:])  # as if one text had come since
    np.save(Path(prefix) / "event_vectors.npy", fewer.vec_KE[1:])
    storage.Directory(str(root)).amend(inputs="0" * 64)
    again = tiny.encode_locally(run.config, run.data, root)
    assert again.manifest["event_texts_encoded"] == 1 and again.manifest["encoded"] == 0
    found = EventTexts.open(again.prefix)
    assert found is not None and np.allclose(found.vec_KE, fewer.vec_KE, atol=1e-6)


@pytest.mark.slow
def test_a_forgotten_users_own_texts_leave_the_vectors(run: TinyRun, tmp_path: Path) -> None:
    log = pq.read_table(run.folder / "features").to_pandas()
    log.loc[(log.user == "u3") & (log.click == 1), "review"] = "Thing 29 odd"  # nobody else says so
    (tmp_path / "features").mkdir()
    log.to_parquet(tmp_path / "features" / "part0.parquet")
    shutil.copytree(run.folder / "encoder", tmp_path / "encoder")
    for name in ("items.csv", "users.csv"):
        shutil.copy(run.folder / name, tmp_path / name)
    config = tiny.make_config(tmp_path, tiny.with_reviews(tmp_path))
    data = tiny.prepare_locally(config, tmp_path / "run" / "data")
    tiny.encode_locally(config, data, tmp_path / "run" / "text")
    own = hash_texts(pa.array(["Thing 29 odd"]))[0]

    def hashes() -> list[int]:
        found = EventTexts.open(storage.Directory(str(tmp_path / "run" / "text")).prefix)
        assert found is not None
        return list(found.hash_K.tolist())

    before = hashes()
    found = forget(str(tmp_path / "run"), ["u3"])
    assert own in before and hashes() == [h for h in before if h != own] and found.rows["text"] == 1
    storage.Directory(str(tmp_path / "run" / "text")).verify()
    assert "text" not in forget(str(tmp_path / "run"), ["u3"]).rows
    again = tiny.encode_locally(config, storage.Directory(data.root), tmp_path / "run" / "text")
    assert again.manifest["event_texts_encoded"] == 0 and hashes() == [h for h in before if h != own]


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("encoder"), "review.*no encoder"),
        (lambda raw: raw["encoder"].update(tuning={"kind": "full"}), "encoder.tuning.*review"),
        (lambda raw: raw["data"]["context"]["review"].update(use="both"), "review"),
    ],
)
def test_a_configuration_that_cannot_read_texts_is_refused(run: TinyRun, change: Any, message: str) -> None:
    def both(raw: dict[str, Any]) -> None:
        tiny.with_reviews(run.folder)(raw)
        change(raw)

    with pytest.raises(ConfigError, match=message):
        tiny.make_config(run.folder, both)


def test_a_text_that_is_too_long_is_quarantined_with_its_reason(run: TinyRun, tmp_path: Path) -> None:
    log = pq.read_table(run.folder / "features").to_pandas()
    log.loc[0, "review"] = "y" * (MAX_TEXT + 1)
    (tmp_path / "features").mkdir()
    log.to_parquet(tmp_path / "features" / "part0.parquet")
    for name in ("items.csv", "users.csv"):
        shutil.copy(run.folder / name, tmp_path / name)
    data = tiny.prepare_locally(tiny.make_config(tmp_path, tiny.with_reviews(tmp_path)), tmp_path / "data")
    assert data.manifest["rows"]["reasons"] == {f"review has more than {MAX_TEXT} characters": 1}


def test_another_encoder_in_the_place_of_the_bundles_is_refused(run: TinyRun, tmp_path: Path) -> None:
    kept = run.folder / "encoder"
    moved = tmp_path / "kept"
    shutil.copytree(kept, moved)
    try:
        (kept / "config.json").write_text((kept / "config.json").read_text() + " ")
        predictor = bundle.load(str(run.folder / "bundle"))
        with pytest.raises(EncoderError, match="not those that the bundle was trained with"):
            _ = predictor.event_texts
        with pytest.raises(EncoderError, match="not those that the bundle was trained with"):  # said when a replica starts
            asyncio.run(StateEncoder.func_or_class(str(run.folder / "bundle")).reconfigure({}))
    finally:
        shutil.rmtree(kept)
        shutil.copytree(moved, kept)
