"""Domain pre-training: the texts, packing, masks, the loop alone and on two ranks, killed and gone on with. No Ray."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, RunConfig
from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.pretraining import loop, worker
from mtrec_ray.pretraining.blocks import IGNORED, Special, following, masked, pack
from mtrec_ray.pretraining.corpus import CorpusError, build_corpus, is_held, sequences
from mtrec_ray.pretraining.objectives import (
    Examples,
    LanguageModelling,
    Padded,
    PairLosses,
    Pairs,
    TokenLosses,
    Vectors,
    shortened,
    spread,
)
from mtrec_ray.pretraining.pairs import build_pairs
from mtrec_ray.training.checkpoint import Checkpoints
from tests import tiny
from tests.conftest import TinyRun
from tests.ranks import run_ranks

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Thing", "even", "odd", "new", ",", ";", *map(str, range(30))]
SPECIAL = Special(begin=(2,), between=(3,), pad=0, mask=4, never=(0, 1, 2, 3, 4), vocabulary=len(WORDS))


def write_checkpoint(folder: Path, kind: str = "bert", layers: int = 1, spread: float = 0.02) -> Path:
    """A tiny BERT or GPT-2 with random weights and a word tokenizer. It understands nothing before it is trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names: dict[str, str] = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    names |= {"eos_token": "[SEP]"} if kind == "gpt" else {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    if kind == "gpt":
        GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_embd=16, n_layer=layers, n_head=2, n_positions=64)).save_pretrained(
            folder
        )
    else:
        size = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
        BertForMaskedLM(
            BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=spread, **size)
        ).save_pretrained(folder)
    return folder


def config_of(run: TinyRun, model: Path, **settings: Any) -> RunConfig:
    wanted = {"model": str(model), "block": 16, "epochs": 8, "batch_blocks": 4, "learning_rate": 0.01, "held_out": 0.2}
    return tiny.make_config(run.folder, lambda raw: raw.update(pretrain=wanted | {"history_items": 4} | settings))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("gpt"), "gpt")


# -- texts


def test_the_texts_are_those_of_training_items_and_training_events_alone(tiny_run: TinyRun) -> None:
    """Every positive training target is told once, in order, and nothing of valid and test."""
    settings = PretrainConfig(history_items=3, held_out=0.3)
    corpus = build_corpus(settings, tiny_run.data.prefix)
    catalogue = storage.read_table(tiny_run.data.path("catalogue.parquet"))
    schema = worker_schema(tiny_run)
    items = {t for t in catalogue["text"].to_pylist()[: schema.n_train_items] if t}
    told = [t for t in corpus.train if t in items]
    assert sorted(told + corpus.held["items"]) == sorted(items) and told and corpus.held["items"]
    titles = catalogue["title"].to_pylist()
    windows = storage.read_table(tiny_run.data.path("windows", "train")).to_pylist()
    by_user: dict[str, list[tuple[int, str]]] = {}
    for w in windows:
        rows = zip(w["target_time"], w["target_item"], w["target_positive"], strict=True)
        by_user.setdefault(w["user_id"], []).extend((t, titles[i]) for t, i, positive in rows if positive)
    expected = []
    for events in by_user.values():
        named = [name for _, name in sorted(events, key=lambda e: e[0])]
        expected += ["; ".join(named[i : i + 3]) for i in range(0, len(named), 3) if len(named[i : i + 3]) > 1]
    histories = [t for t in corpus.train if t not in items] + corpus.held["histories"]
    assert sorted(histories) == sorted(expected)


def worker_schema(run: TinyRun) -> Any:
    from mtrec_ray.training.worker import load_schema

    return load_schema(run.data.prefix)


def test_a_user_is_held_out_as_a_whole(tiny_run: TinyRun) -> None:
    few = build_corpus(PretrainConfig(history_items=2, held_out=0.3, texts=("histories",)), tiny_run.data.prefix)
    more = build_corpus(PretrainConfig(history_items=2, held_out=0.6, texts=("histories",)), tiny_run.data.prefix)
    assert set(few.held["histories"]) <= set(more.held["histories"]) and len(few.held["histories"]) < len(more.held["histories"])
    assert set(few.held) == {"histories"}
    fewer = build_corpus(PretrainConfig(history_items=2, max_users=5, texts=("histories",)), tiny_run.data.prefix)
    assert 0 < len(fewer.train) + len(fewer.held.get("histories", [])) < len(few.train) + len(few.held["histories"])


def test_no_text_at_all_is_said(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtrec_ray.pretraining.corpus._items", lambda catalogue: ([], np.zeros(0, np.uint64)))
    with pytest.raises(CorpusError, match=r"there is no text; declare data\.text"):
        build_corpus(PretrainConfig(texts=("items",)), tiny_run.data.prefix)


# -- rows


def test_packing_loses_no_token_and_leaves_no_gap() -> None:
    texts = [[10, 11, 12], [13], [14, 15, 16, 17, 18, 19]]
    token, real = pack(texts, 5, SPECIAL)
    assert token.tolist() == [[2, 10, 11, 12, 3], [2, 13, 3, 14, 15], [2, 16, 17, 18, 19], [2, 3, 0, 0, 0]]
    assert real.tolist()[-1] == [True, True, False, False, False] and real[:-1].all()
    assert pack([], 5, SPECIAL)[0].shape == (0, 5)


def test_masks_follow_the_shares_and_spare_the_tokenizers_own_tokens() -> None:
    token = torch.randint(5, len(WORDS), (400, 50), generator=torch.Generator().manual_seed(0))
    token[:, 0], token[:, -1] = 2, 0
    real = torch.ones_like(token, dtype=torch.bool)
    real[:, -1] = False
    seen, label = masked(token, real, SPECIAL, 0.15, 7)
    chosen = label != IGNORED
    assert not chosen[:, 0].any() and not chosen[:, -1].any()
    assert float(chosen[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert torch.equal(label[chosen], token[chosen]) and torch.equal(seen[~chosen], token[~chosen])
    assert float((seen[chosen] == 4).float().mean()) == pytest.approx(0.8, abs=0.02)
    changed = chosen & (seen != 4) & (seen != token)
    assert float(changed.sum() / chosen.sum()) == pytest.approx(0.1 * (1 - 1 / (len(WORDS) - 5)), abs=0.02)
    assert (seen[changed] >= 5).all()
    assert torch.equal(masked(token, real, SPECIAL, 0.15, 7)[0], seen)
    assert not torch.equal(masked(token, real, SPECIAL, 0.15, 8)[0], seen)  # dynamic: anew at every step


def test_the_label_of_a_causal_model_is_the_next_real_token() -> None:
    token, real = torch.tensor([[7, 8, 9, 0]]), torch.tensor([[True, True, True, False]])
    assert following(token, real).tolist() == [[8, 9, IGNORED, IGNORED]]


# -- the loop


def trained(config: RunConfig, run: TinyRun, out: Path, checkpoints: Checkpoints | None = None) -> tuple[dict[str, Any], list[Any]]:
    reported: list[Any] = []
    facts = worker.run_worker(config, run.data.prefix, str(out), lambda e, s: reported.append((e, s)), checkpoints)
    return facts, reported


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlm", "clm"])
def test_held_out_perplexity_falls_and_the_directory_is_an_encoder(
    kind: str, tiny_run: TinyRun, bert: Path, gpt: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_run, bert if kind == "mlm" else gpt, epochs=20)
    facts, reported = trained(config, tiny_run, tmp_path)
    first, last = facts["perplexity"][0], facts["perplexity"][-1]
    assert facts["objective"] == kind and set(first) == {"items", "histories"}
    assert first["histories"] == pytest.approx(len(WORDS), rel=0.3)  # random weights know nothing
    assert last["histories"] < 0.5 * first["histories"]  # the few held-out items have numbers that were never seen
    assert [e for e, _ in reported] == list(range(-1, 20)) and reported[-1][1]["perplexity/items"] == last["items"]
    pooling = "mean" if kind == "mlm" else "last"
    encoder = TextEncoder(EncoderConfig(model=str(tmp_path / "model"), pooling=pooling))
    vectors = encoder.encode(["Thing 1, odd", "Thing 2, even"])
    assert vectors.shape == (2, 16) and np.isfinite(vectors).all() and not np.allclose(vectors[0], vectors[1])


def test_a_bert_trained_causally_is_an_encoder_again(tiny_run: TinyRun, bert: Path, tmp_path: Path) -> None:
    facts, _ = trained(config_of(tiny_run, bert, objective="clm", epochs=2), tiny_run, tmp_path)
    assert facts["objective"] == "clm"
    assert not TextEncoder(EncoderConfig(model=str(tmp_path / "model"))).model.config.is_decoder


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_weights(
    tiny_run: TinyRun, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny_run, bert, epochs=3, checkpoint_every=2)
    facts, _ = trained(config, tiny_run, tmp_path / "whole")
    step, done = loop._step, []

    def dies(*args: Any) -> Any:
        done.append(1)
        if len(done) == 1 + facts["steps"] // 3 + 3:  # in the second epoch, behind a checkpoint
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(loop, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        trained(config, tiny_run, tmp_path / "killed", Checkpoints(tmp_path / "checkpoints", "a"))
    again, reported = trained(config, tiny_run, tmp_path / "killed", Checkpoints(tmp_path / "checkpoints", "a"))
    assert [e for e, _ in reported] == [1, 2] and again["perplexity"] == facts["perplexity"]
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "killed")[name], value), name


def _rank(rank: int, world: int, config: str, prefix: str, out: str) -> None:
    facts = worker.run_worker(RunConfig.model_validate_json(config), prefix, out, lambda *_: None)
    torch.save(facts[NAMES[facts["objective"]]], f"{out}/{rank}.pt")


NAMES = {"mlm": "perplexity", "clm": "perplexity", "contrastive": "info_nce", "distil": "distance"}


def in_two(config: RunConfig, run: TinyRun, out: Path) -> None:
    run_ranks(2, _rank, config.model_dump_json(), run.data.prefix, str(out))


@pytest.mark.slow
def test_two_ranks_make_the_updates_of_one(tiny_run: TinyRun, tmp_path: Path) -> None:
    """Without dropout, in which ranks differ: the same weights and perplexities; the last batch leaves a rank without rows."""
    folder = write_checkpoint(tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    config = config_of(tiny_run, folder, epochs=2, learning_rate=0.001)
    (tmp_path / "two").mkdir()
    alone, _ = trained(config, tiny_run, tmp_path / "one")
    in_two(config, tiny_run, tmp_path / "two")
    for found, wanted in zip(torch.load(tmp_path / "two" / "1.pt"), alone["perplexity"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_no_number_stops_the_run(tiny_run: TinyRun, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(loop.PretrainStopped, match=r"epoch 0, step \d+: the loss is .*Lower pretrain.learning_rate"):
        trained(config_of(tiny_run, bert, learning_rate=1e30, warmup_share=0.0), tiny_run, tmp_path)
    assert not (tmp_path / "model").exists()


# -- checkpoints that cannot be used


def test_what_is_wrong_with_a_checkpoint_is_said_with_the_cure(tiny_run: TinyRun, bert: Path, gpt: Path, tmp_path: Path) -> None:
    def refused(model: Path | None, **settings: Any) -> str:
        config = config_of(tiny_run, model or bert, **settings)
        if model is None:
            config = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"model": None})})
        with pytest.raises(EncoderError) as error:
            worker.load(config)
        return str(error.value)

    assert "no checkpoint is named" in refused(None)
    assert "no masked language model" in refused(gpt, objective="mlm")
    assert "pretrain.block: 65 tokens" in refused(bert, block=65)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in bert.iterdir():
        if file.name != "model.safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert "cannot be used" in refused(bare)
    small = write_checkpoint(tmp_path / "small")
    settings = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(settings | {"vocab_size": 9}))
    assert "do not fit the model's 9" in refused(small, fresh=True)


def test_perplexity_is_the_exponential_of_the_mean(bert: Path) -> None:
    """A model that says every token with the same probability has as many as there are tokens."""

    class Uniform(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return type("Out", (), {"logits": torch.zeros(*input_ids.shape, len(WORDS))})()

    objective = LanguageModelling(PretrainConfig(block=8), Uniform(), [], {"items": [[10, 11, 12, 13]] * 20}, SPECIAL, True)
    found = loop.measured(objective, torch.device("cpu"))
    assert found["items"] == pytest.approx(len(WORDS), rel=1e-5) and math.isfinite(found["items"])


@pytest.mark.parametrize("kind", ["bert", "gpt"])
def test_the_head_reads_the_labelled_positions_alone_and_the_loss_is_that_of_all_logits(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    family = AutoModelForMaskedLM if kind == "bert" else AutoModelForCausalLM
    model = family.from_pretrained(write_checkpoint(tmp_path, kind, spread=0.3)).eval()
    token = torch.randint(5, len(WORDS), (3, 8), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(token, dtype=torch.bool)
    real[2, 5:] = False
    label = torch.where(torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.3, token, IGNORED)
    weight = torch.tensor([1.0, 0.0, 1.0])
    losses = TokenLosses(model)
    assert losses.head == ("cls" if kind == "bert" else "lm_head")
    found = losses(token, real, label, weight)
    kept = torch.where(weight[:, None] > 0, label, IGNORED)
    logits = model(input_ids=token, attention_mask=real.long()).logits
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits.flatten(0, 1), kept.flatten(), reduction="sum"))
    losses.head = None
    torch.testing.assert_close(losses(token, real, label, weight), found)
    nothing = TokenLosses(model)(token, real, torch.full_like(label, IGNORED), weight)
    nothing.backward()
    assert float(nothing) == 0 and all(p.grad is not None for p in model.parameters())  # DDP waits for all of them


# -- vectors


def test_pairs_are_neighbours_of_one_user_and_of_the_train_part_alone(tiny_run: TinyRun) -> None:
    settings = PretrainConfig(held_out=0.3, pair_distance=2)
    corpus = build_pairs(settings, 0, tiny_run.data.prefix)
    catalogue = storage.read_table(tiny_run.data.path("catalogue.parquet"))["text"].to_pylist()
    expected: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for user, item in sequences(settings, tiny_run.data.prefix):
        for i in range(len(item)):
            for j in range(i + 1, min(i + 3, len(item))):
                if catalogue[item[i]] != catalogue[item[j]]:
                    expected[bool(is_held(np.array([user]), 0.3)[0])].append((catalogue[item[i]], catalogue[item[j]]))
    for side, pairs in ((False, corpus.train), (True, corpus.held)):
        assert sorted(expected[side]) == sorted((corpus.texts[a], corpus.texts[b]) for a, b in pairs.tolist()) and expected[side]


def by_hand(module: PairLosses, pairs: list[tuple[int, int]], texts: Padded) -> float:
    """InfoNCE of pairs, item by item."""
    with torch.no_grad():
        vectors = module.vectors(*texts.rows(torch.arange(len(texts.length_N))))
    total = 0.0
    for side in (0, 1):
        for i, pair in enumerate(pairs):
            anchor, other = pair[side], pair[1 - side]
            candidates = [p[1 - side] for j, p in enumerate(pairs) if j == i or p[1 - side] not in (anchor, other)]
            score = torch.stack([vectors[anchor] @ vectors[c] for c in candidates]) / module.temperature
            total += float(torch.logsumexp(score, 0) - vectors[anchor] @ vectors[other] / module.temperature) / 2
    return total


def test_the_loss_of_pairs_by_hand(bert: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(bert)))
    texts = Padded(encoder.tokens(["Thing 1", "Thing 2 even", "odd", "new, odd 7"])[0], 0)
    pairs = [(0, 1), (1, 2), (2, 3), (0, 3), (3, 1)]  # texts come twice: no negatives of their own pairs
    module = PairLosses(Vectors(encoder.model, "mean"), 0.5)
    examples = Pairs(texts, torch.tensor(pairs)).batch(torch.arange(5), 0)
    assert float(module(*spread(examples, 0, 1))) == pytest.approx(by_hand(module, pairs, texts), rel=1e-4)


def test_rows_are_spread_evenly_and_padding_has_no_weight() -> None:
    examples = Examples((torch.arange(5), torch.arange(10, 15)), 5, 0)
    parts = [spread(examples, rank, 3) for rank in range(3)]
    assert [p[0].tolist() for p in parts] == [[0, 3], [1, 4], [2, 4]] and parts[0][1].tolist() == [10, 13]
    assert [p[-1].tolist() for p in parts] == [[1, 1], [1, 1], [1, 0]]
    one = Examples((torch.arange(1),), 1, 0)
    assert [spread(one, rank, 2)[-1].tolist() for rank in range(2)] == [[1], [0]]


@pytest.mark.slow
def test_contrastive_brings_texts_of_one_taste_together(tiny_run: TinyRun, bert: Path, tmp_path: Path) -> None:
    config = config_of(
        tiny_run, bert, objective="contrastive", epochs=8, batch_blocks=32, pairs=400, temperature=0.5, learning_rate=0.003
    )
    facts, reported = trained(config, tiny_run, tmp_path)
    assert reported[-1][1]["train/loss"] < reported[1][1]["train/loss"] and facts["rows"] == 400
    assert reported[-1][1]["info_nce/pairs"] == facts["info_nce"][-1]["pairs"]
    texts = [f"Thing {i}, {'even' if i % 2 == 0 else 'odd'}" for i in range(20)]

    def apart(folder: Path) -> float:
        vectors = TextEncoder(EncoderConfig(model=str(folder))).encode(texts)
        cosine = vectors @ vectors.T
        same = np.equal.outer(np.arange(20) % 2, np.arange(20) % 2)
        return float(cosine[same & ~np.eye(20, dtype=bool)].mean() - cosine[~same].mean())

    assert apart(tmp_path / "model") > apart(bert) + 0.3


@pytest.mark.slow
def test_a_student_has_fewer_layers_and_its_teachers_vectors(tiny_run: TinyRun, tmp_path: Path) -> None:
    teacher = write_checkpoint(tmp_path / "teacher", layers=3, spread=0.3)
    config = config_of(tiny_run, teacher, objective="distil", layers=2, epochs=30, learning_rate=0.003)
    facts, _ = trained(config, tiny_run, tmp_path)
    first, last = facts["distance"][0], facts["distance"][-1]
    assert set(last) == {"items", "histories"} and last["histories"] < 0.5 * first["histories"]
    student = TextEncoder(EncoderConfig(model=str(tmp_path / "model")))
    assert student.model.config.num_hidden_layers == 2 == len(student.model.encoder.layer)
    texts = ["Thing 1, odd", "Thing 2; Thing 3"]
    cosine = (student.encode(texts) * TextEncoder(EncoderConfig(model=str(teacher))).encode(texts)).sum(1)
    assert (cosine > 0.9).all()


def test_a_gpt_can_be_shortened_too(tmp_path: Path) -> None:
    encoder = TextEncoder(EncoderConfig(model=str(write_checkpoint(tmp_path, "gpt", layers=3, spread=0.3)), pooling="last"))
    before = encoder.encode(["Thing 1"])
    shortened(encoder.model, 1)
    assert len(encoder.model.h) == 1 and not np.allclose(encoder.encode(["Thing 1"]), before)
    with pytest.raises(ValueError, match="1 layers of 1: there is nothing to leave out"):
        shortened(encoder.model, 1)


def test_more_layers_than_there_are_is_said(tiny_run: TinyRun, bert: Path) -> None:
    with pytest.raises(EncoderError, match=r"pretrain\.layers: 2 layers of 1.*lower it"):
        worker.check(config_of(tiny_run, bert, objective="distil"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["contrastive", "distil"])
def test_two_ranks_make_the_vectors_of_one(objective: str, tiny_run: TinyRun, tmp_path: Path) -> None:
    """The negatives of a pair are all other pairs of the global batch; the last one leaves a rank without rows."""
    folder = write_checkpoint(tmp_path / "bert", layers=2)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))
    config = config_of(tiny_run, folder, objective=objective, epochs=2, learning_rate=0.001, pairs=33, layers=1)
    (tmp_path / "two").mkdir()
    alone, _ = trained(config, tiny_run, tmp_path / "one")
    in_two(config, tiny_run, tmp_path / "two")
    for found, wanted in zip(torch.load(tmp_path / "two" / "1.pt"), alone[NAMES[objective]], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-3, atol=1e-4)
