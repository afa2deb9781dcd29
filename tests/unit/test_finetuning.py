"""Fine-tuning the TextEncoder inside the recommender: what is encoded, where gradients go, the same on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, EncoderConfig, RunConfig
from mtrec_ray.encoders import tuning
from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.encoders.tuning import TunedTexts, check_tuning
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.feed import WindowCache
from mtrec_ray.training.loop import Fitted, Training
from mtrec_ray.training.step import build_losses, build_optimizer, build_scheduler, distribute, train_step
from mtrec_ray.training.worker import build_feed, build_model, export_encoder, load_schema, run_worker, tell_items, tune_texts
from tests import tiny
from tests.conftest import TinyRun
from tests.ranks import run_ranks

STEPS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_encoder(tmp_path_factory.mktemp("encoder"))


def config_of(run: TinyRun, folder: Path, negatives: int | None = None, ema: float = 0.0, **settings: Any) -> RunConfig:
    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(folder), "tuning": {"learning_rate": 0.001} | settings}
        raw["train"] |= {"batch_windows": 6, "epochs": 2, "ema": ema}
        if negatives is not None:
            raw["tasks"]["retrieval"] |= {"loss": "sampled_softmax", "negatives": negatives}
            raw["tasks"]["similar"] |= {"negatives": negatives}

    return tiny.make_config(run.folder, change)


def catalogue_of(prefix: str) -> Any:
    return storage.read_table(storage.join(prefix, "catalogue.parquet"))


def with_texts(config: RunConfig, prefix: str) -> Recommender:
    """A fresh model in training whose cache holds the vectors of the encoder as it starts."""
    assert config.encoder is not None
    catalogue = catalogue_of(prefix)
    vectors = TextEncoder(config.encoder).encode([t or "" for t in catalogue["text"].to_pylist()])
    model = build_model(config, load_schema(prefix), torch.from_numpy(vectors))
    tell_items(model, catalogue)
    tune_texts(model, config, catalogue)
    return model.train()


def batches(config: RunConfig, prefix: str, rank: int = 0, world: int = 1) -> Any:
    cache = WindowCache.from_table(storage.read_table(storage.join(prefix, "windows", "train")))
    return build_feed(config, load_schema(prefix), cache, rank, world).epoch(0)


def updated(config: RunConfig, prefix: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights and cache after a few steps of SGD."""
    torch.set_num_threads(1)
    model = with_texts(config, prefix)
    losses: Any = build_losses(config, model)
    optimizer = torch.optim.SGD([p for p in losses.parameters() if p.requires_grad], lr=0.1)
    wrapped = distribute(losses)
    for step, micro in enumerate(batches(config, prefix, rank, world)):
        if step == STEPS:
            break
        train_step(wrapped, optimizer, micro)
    assert model.text_NE is not None
    return {k: v.detach().clone() for k, v in losses.state_dict().items()} | {"cache": model.text_NE.clone()}


def _rank(rank: int, world: int, configs: list[str], prefix: str, out: str) -> None:
    states = [updated(RunConfig.model_validate_json(c), prefix, rank, world) for c in configs]
    torch.save(states, f"{out}/{world}-{rank}.pt")


CASES: list[dict[str, Any]] = [
    {},
    {"negatives": 4},
    {"negatives": 4, "items_per_step": 5},
    {"items_per_step": 2, "checkpointing": True},  # with three ranks one has no text to encode
    {"kind": "lora", "negatives": 4},
]


@pytest.mark.slow
def test_one_two_and_three_workers_make_the_same_update(tiny_run: TinyRun, folder: Path, tmp_path: Path) -> None:
    configs, prefix = [config_of(tiny_run, folder, **case) for case in CASES], tiny_run.data.prefix
    alone = [updated(c, prefix, 0, 1) for c in configs]
    for config, state in zip(configs, alone, strict=True):
        fresh = build_losses(config, with_texts(config, prefix)).state_dict()
        assert any("tuned" in k and not torch.equal(state[k], v) for k, v in fresh.items()), "the encoder did not learn"
    for world in (2, 3):
        run_ranks(world, _rank, [c.model_dump_json() for c in configs], prefix, str(tmp_path))
        for rank in range(world):
            states = torch.load(tmp_path / f"{world}-{rank}.pt", weights_only=True)
            for case, wanted, state in zip(CASES, alone, states, strict=True):
                for name, value in wanted.items():
                    torch.testing.assert_close(
                        state[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name, w=world, c=case: f"{c}, {w} ranks, {n}: {m}"
                    )


def watched(model: Recommender, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts every call of the encoder had."""
    seen: list[int] = []
    real = model.tuned.encoder.vectors

    def vectors(pieces: list[list[int]]) -> torch.Tensor:
        seen.append(len(pieces))
        return real(pieces)  # type: ignore[no-any-return]

    monkeypatch.setattr(model.tuned.encoder, "vectors", vectors)
    return seen


def test_only_the_distinct_items_of_the_batch_and_its_negatives_are_encoded(
    tiny_run: TinyRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_run, folder, negatives=2).model_copy()
    model = with_texts(config, tiny_run.data.prefix)
    seen = watched(model, monkeypatch)
    batch = next(iter(batches(config, tiny_run.data.prefix)))[0]
    item_U = model.items_of(batch)
    assert item_U is not None
    some = item_U[: len(item_U) // 2]
    assert model.text_NE is not None
    found = model.tuned(model.text_NE, some, model.schema.n_train_items, 0)
    assert sum(seen) == len(some) < model.schema.n_train_items and found.shape == (len(some), 16) and found.requires_grad
    seen.clear()
    model(batch)
    assert sum(seen) == len(item_U)


def test_items_with_one_text_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = EncoderConfig(model=str(folder), tuning={"kind": "full"})  # type: ignore[arg-type]
    texts = TunedTexts(encoder, ["Thing 1, odd", "Thing 2, even", "Thing 1, odd", None, ""], 0)
    seen: list[int] = []
    real = texts.encoder.vectors
    monkeypatch.setattr(texts.encoder, "vectors", lambda pieces: seen.append(len(pieces)) or real(pieces))
    cache = torch.zeros(5, 16)
    found = texts(cache, None, 5, 0)
    assert seen == [2]
    torch.testing.assert_close(found[0], found[2])
    assert found[3:].abs().sum() == 0, "an item without a text has the zero vector"
    torch.testing.assert_close(cache, found.detach())
    texts.refresh(cache)
    torch.testing.assert_close(cache, found.detach())


def test_the_gradient_is_that_of_encoding_the_batch_directly(tiny_run: TinyRun, folder: Path) -> None:
    config = config_of(tiny_run, folder)
    model = with_texts(config, tiny_run.data.prefix)
    encoder, texts = model.tuned.encoder, catalogue_of(tiny_run.data.prefix)["text"].to_pylist()
    assert model.text_NE is not None
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    items = torch.tensor([1, 3, 4, 9])
    (model.tuned(model.text_NE, items, model.schema.n_train_items, 0) * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in encoder.model.named_parameters() if p.grad is not None}
    encoder.model.zero_grad()
    pieces, _ = encoder.tokens([texts[i] for i in items])
    (torch.stack([encoder.vectors([p])[0] for p in pieces]) * weight).sum().backward()
    assert found
    for name, parameter in encoder.model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_with_a_limit_the_others_come_from_the_cache_which_is_renewed(
    tiny_run: TinyRun, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_run, folder, items_per_step=3)
    model = with_texts(config, tiny_run.data.prefix)
    assert model.text_NE is not None
    model.text_NE.zero_()
    seen = watched(model, monkeypatch)
    first = model.tuned(model.text_NE, None, model.schema.n_train_items, 0)
    assert sum(seen) == 3 and int((model.text_NE.norm(dim=1) > 0.5).sum()) == 3
    torch.testing.assert_close(first.detach(), model.text_NE[: model.schema.n_train_items])
    for step in range(1, 40):
        model.tuned(model.text_NE, None, model.schema.n_train_items, step)
    assert bool((model.text_NE[: model.schema.n_train_items].norm(dim=1) > 0.99).all()), "every item has its turn"


def fitted(config: RunConfig, run: TinyRun, folder: Path, out: Path, stop_after: int | None = None) -> tuple[Fitted, list[Any]]:
    """run_worker with the encoder's first vectors as the encode stage writes them."""
    assert config.encoder is not None
    texts = sorted({t for t in catalogue_of(run.data.prefix)["text"].to_pylist() if t})
    out.mkdir(exist_ok=True)
    np.save(out / "vectors.npy", TextEncoder(config.encoder).encode(texts))
    import pyarrow as pa

    storage.write_table(out / "texts.parquet", pa.table({"text": texts}))
    reported: list[Any] = []

    def report(epoch: int, scalars: dict[str, float]) -> None:
        reported.append(scalars)
        if epoch == stop_after:
            raise KeyboardInterrupt

    return run_worker(config, run.data.prefix, str(out), report, Checkpoints(out / "checkpoints")), reported


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_what_is_exported_gives_the_vectors_that_were_evaluated(tiny_run: TinyRun, folder: Path, tmp_path: Path, kind: str) -> None:
    config = config_of(tiny_run, folder, kind=kind, ema=0.5, learning_rate=0.01)
    found, _ = fitted(config, tiny_run, folder, tmp_path)
    assert found.text_NE is not None and not any(n.startswith("tuned") for n in found.best_state)
    export_encoder(config, found, str(tmp_path / "model"))
    texts = [t or "" for t in catalogue_of(tiny_run.data.prefix)["text"].to_pylist()]
    again = TextEncoder(EncoderConfig(model=str(tmp_path / "model"))).encode(texts)
    np.testing.assert_allclose(again, found.text_NE, atol=1e-5)
    before = TextEncoder(EncoderConfig(model=str(folder))).encode(texts)
    assert np.abs(again - before).max() > 1e-3, "the encoder learnt something"
    build_model(config, load_schema(tiny_run.data.prefix), found.text_NE).load_state_dict(found.best_state)
    counts = found.parameters
    assert 0 < counts["trained"] < counts["all"]  # of `full` the pooler is not trained


def test_adapters_leave_the_weights_they_adapt_alone(tiny_run: TinyRun, folder: Path) -> None:
    config = config_of(tiny_run, folder, kind="lora", rank=2)
    after = updated(config, tiny_run.data.prefix, 0, 1)
    before = build_losses(config, with_texts(config, tiny_run.data.prefix)).state_dict()
    inner = [n for n in before if "tuned" in n]
    moved = {n for n in inner if not torch.equal(before[n], after[n])}
    assert moved and all("lora_" in n for n in moved)
    trained = [p.numel() for p in with_texts(config, tiny_run.data.prefix).tuned.model.parameters() if p.requires_grad]
    assert sum(trained) == 2 * 2 * (16 + 16)  # rank 2 of query and value: 16 to 16, in one layer


@pytest.mark.slow
@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tiny_run: TinyRun, folder: Path, tmp_path: Path, ema: float) -> None:
    config = config_of(tiny_run, folder, items_per_step=4, ema=ema)
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 2})})
    whole, numbers = fitted(config, tiny_run, folder, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fitted(config, tiny_run, folder, tmp_path / "killed", stop_after=0)
    resumed, rest = fitted(config, tiny_run, folder, tmp_path / "killed")
    assert rest[-1]["train/retrieval/loss"] == numbers[-1]["train/retrieval/loss"]
    assert resumed.encoder_state is not None and whole.encoder_state is not None
    for name, value in whole.encoder_state.items():
        torch.testing.assert_close(resumed.encoder_state[name], value, rtol=0, atol=0)


def test_the_encoder_has_a_learning_rate_and_a_schedule_of_its_own(tiny_run: TinyRun, folder: Path) -> None:
    config = config_of(tiny_run, folder, learning_rate=3e-5, warmup_share=0.5, weight_decay=0.5)
    assert config.encoder is not None and config.encoder.tuning is not None
    losses = build_losses(config, with_texts(config, tiny_run.data.prefix))
    optimizer = build_optimizer(losses, config.train, config.encoder.tuning)
    inner = {id(p) for p in losses.model.tuned.model.parameters() if p.requires_grad}
    assert {id(p) for g in optimizer.param_groups[2:] for p in g["params"]} == inner
    assert not {id(p) for g in optimizer.param_groups[:2] for p in g["params"]} & inner
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0, 0.5, 0.0]
    scheduler = build_scheduler(optimizer, 10, 0, cosine=False, tuning=config.encoder.tuning)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[1:3])
        optimizer.step()
        scheduler.step()
    assert {r[0] for r in rates} == {0.01}
    assert [r[1] for r in rates[:5]] == pytest.approx([3e-5 * share for share in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert rates[9][1] < 1e-5


def test_the_moving_average_has_an_encoder_and_vectors_of_its_own(tiny_run: TinyRun, folder: Path) -> None:
    config = config_of(tiny_run, folder, ema=0.5)
    model = with_texts(config, tiny_run.data.prefix)
    run = Training(config, model, 1, torch.device("cpu"))
    assert run.kept.text_NE is not model.text_NE and run.kept.tuned.model is not model.tuned.model
    assert (
        run.kept.tuned.encoder.model is run.kept.tuned.model and run.kept.tuned.encoder.tokenizer is model.tuned.encoder.tokenizer
    )
    with torch.no_grad():
        for parameter in run.kept.tuned.model.parameters():
            parameter.mul_(0.5)
    run.kept.refresh_texts()
    assert model.text_NE is not None and run.kept.text_NE is not None
    assert (model.text_NE - run.kept.text_NE).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("settings", "cure"), [({"precision": "int8"}, "have no gradients"), ({"long_texts": "chunks"}, "take cut")]
)
def test_what_cannot_be_trained_is_refused_at_load(tiny_run: TinyRun, folder: Path, settings: dict[str, str], cure: str) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(folder), "tuning": {"kind": "full"}} | settings

    with pytest.raises(ConfigError, match=cure):
        tiny.make_config(tiny_run.folder, change)


def test_eight_bits_on_a_gpu_are_refused_at_load(tiny_run: TinyRun, folder: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        raw["encoder"] = {"model": str(folder), "precision": "int8", "use_gpu": True}

    with pytest.raises(ConfigError, match="int8 is for CPUs"):
        tiny.make_config(tiny_run.folder, change)


def test_adapters_without_peft_name_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match=r"pip install 'mtrec_ray\[adapters\]'"):
        check_tuning(EncoderConfig(model=str(folder), tuning={"kind": "lora"}))  # type: ignore[arg-type]


def test_a_batch_without_a_text_trains_nothing_of_the_encoder_but_has_its_gradients(folder: Path) -> None:
    texts = TunedTexts(EncoderConfig(model=str(folder), tuning={"kind": "full"}), ["Thing 1", None, None], 0)  # type: ignore[arg-type]
    cache = torch.zeros(3, 16)
    found = texts(cache, torch.tensor([1, 2]), 3, 0)
    assert not found.any() and found.requires_grad
    found.sum().backward()
    for name, parameter in texts.model.named_parameters():
        assert "pooler" in name or (parameter.grad is not None and not parameter.grad.any()), name


def test_a_catalogue_without_any_text_is_refused() -> None:
    with pytest.raises(EncoderError, match="no item has a text"):
        tuning.check_texts([None, "", None])
