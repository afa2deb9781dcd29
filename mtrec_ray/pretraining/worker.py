"""One pre-training worker: prepared data and a checkpoint -> a Hugging Face directory. It knows no Ray."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtrec_ray import storage
from mtrec_ray.config import EncoderConfig, RunConfig
from mtrec_ray.encoders.loading import EncoderError, check_tokens, load_tokenizer, plain_weights, resolve_model, save_model, source
from mtrec_ray.encoders.text import TextEncoder
from mtrec_ray.pretraining.blocks import Special
from mtrec_ray.pretraining.corpus import build_corpus
from mtrec_ray.pretraining.loop import Report, fit
from mtrec_ray.pretraining.objectives import Contrastive, Distillation, LanguageModelling, Objective, Padded, shortened
from mtrec_ray.pretraining.pairs import build_pairs
from mtrec_ray.training import distributed
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.worker import device_of

log = logging.getLogger(__name__)

HEADS = ("cls.", "lm_head", "vocab_", "generator_lm_head", "predictions", "decoder")
"""Prefixes of a language model's head: a checkpoint may lack it."""


def start_of(config: RunConfig) -> str:
    """The checkpoint that pre-training begins with. Raises EncoderError when none is named."""
    name = config.pretrain.model or (None if config.encoder is None else config.encoder.model)
    if name is None:
        raise EncoderError("pretrain.model: no checkpoint is named, here or as encoder.model; name one, such as a local directory")
    return name


def load(config: RunConfig) -> tuple[nn.Module, Any, bool]:
    """-> (model with a language-modelling head, tokenizer, whether it is masked). Raises EncoderError with the cure."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    settings, name = config.pretrain, start_of(config)
    path = resolve_model(name)
    tokenizer = load_tokenizer(name, path, "pretrain.model")
    try:
        given = source(name, path, "pretrain.model")
        architecture = AutoConfig.from_pretrained(**given)
        mlm = settings.objective == "mlm" or (settings.objective == "auto" and type(architecture) in MODEL_FOR_MASKED_LM_MAPPING)
        known = MODEL_FOR_MASKED_LM_MAPPING if mlm else MODEL_FOR_CAUSAL_LM_MAPPING
        if type(architecture) not in known:
            raise EncoderError(f"{architecture.model_type} has no {'masked' if mlm else 'causal'} language model; take another one")
        if not mlm and type(architecture) in MODEL_FOR_MASKED_LM_MAPPING:
            architecture.is_decoder = True  # a BERT reads to the left alone then
        kind = AutoModelForMaskedLM if mlm else AutoModelForCausalLM
        torch.manual_seed(config.seed)
        if settings.fresh:
            model, missing = kind.from_config(architecture), []
        else:
            model, info = kind.from_pretrained(**given, config=architecture, dtype=torch.float32, output_loading_info=True)
            model, missing = plain_weights(model), sorted(info["missing_keys"])
    except Exception as error:  # transformers, tokenizers and safetensors each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EncoderError(f"pretrain.model {name!r} cannot be used: {reason}") from None
    body = [k for k in missing if not k.startswith(HEADS)]
    if body:
        raise EncoderError(f"pretrain.model {name!r}: the weights lack {body[:3]} ({len(body)} in all)")
    if missing:
        log.info("pretrain: the checkpoint has no language-modelling head; %d of its tensors begin at random", len(missing))
    if mlm and tokenizer.mask_token_id is None:
        raise EncoderError(f"pretrain.objective: the tokenizer of {name!r} has no mask token; take clm")
    longest = getattr(architecture, "max_position_embeddings", None)
    if longest is not None and settings.block > longest:
        raise EncoderError(f"pretrain.block: {settings.block} tokens, but {name!r} has {longest} positions; lower it")
    check_tokens(name, len(tokenizer), architecture.vocab_size, "pretrain.model")
    return model, tokenizer, mlm


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Numbers of the texts' tokens, without the tokenizer's own ones; a text without a token is left out."""
    if not texts:
        return []
    found = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return [t for t in found if t]


def load_encoder(config: RunConfig) -> TextEncoder:
    """The checkpoint as the text encoder of `contrastive` and `distil`, read as encoder.* says. Raises EncoderError."""
    name = start_of(config)
    settings = config.encoder.model_dump() if config.encoder is not None else {}
    torch.manual_seed(config.seed)  # of a pooler that the checkpoint lacks
    settings |= {"model": name, "precision": "float32", "compile": False, "long_texts": "cut", "tuning": None}
    encoder = TextEncoder(EncoderConfig(**settings))
    for parameter_name, parameter in encoder.model.named_parameters():
        if "pooler" in parameter_name:  # not used: DDP would wait for its gradients
            parameter.requires_grad_(False)
    return encoder


def check(config: RunConfig) -> None:
    """Raises EncoderError for what the objective needs and the checkpoint lacks."""
    if config.pretrain.objective == "contrastive":
        load_encoder(config)
    elif config.pretrain.objective == "distil":
        _student(config)
    else:
        load(config)


def check_texts(config: RunConfig, data_prefix: str) -> None:
    """Raises CorpusError when there is nothing to learn from."""
    if config.pretrain.objective == "contrastive":
        build_pairs(config.pretrain, config.seed, data_prefix)
    else:
        build_corpus(config.pretrain, data_prefix)


def build_objective(config: RunConfig, data_prefix: str) -> tuple[Objective, Any, Any]:
    """-> (objective, the Hugging Face model in it, tokenizer). Raises EncoderError and CorpusError."""
    settings = config.pretrain
    if settings.objective == "contrastive":
        encoder = load_encoder(config)
        corpus = build_pairs(settings, config.seed, data_prefix)
        pad = encoder.tokenizer.pad_token_id
        texts = Padded(encoder.tokens(corpus.texts)[0], pad)
        return (
            Contrastive(settings, encoder.model, encoder.config.pooling, texts, corpus.train, corpus.held),
            encoder.model,
            encoder.tokenizer,
        )
    corpus_of_texts = build_corpus(settings, data_prefix)
    if settings.objective == "distil":
        teacher, student = load_encoder(config), _student(config)

        def taught(texts: list[str]) -> tuple[Padded, torch.Tensor]:
            texts = sorted(set(texts))
            return Padded(student.tokens(texts)[0], student.tokenizer.pad_token_id), torch.from_numpy(teacher.encode(texts))

        held = {k: taught(v) for k, v in corpus_of_texts.held.items()}
        return (
            Distillation(student.model, student.config.pooling, taught(corpus_of_texts.train), held),
            student.model,
            student.tokenizer,
        )
    model, tokenizer, mlm = load(config)
    tokens = {k: tokens_of(tokenizer, v) for k, v in corpus_of_texts.held.items()}
    train, held_tokens = tokens_of(tokenizer, corpus_of_texts.train), {k: v for k, v in tokens.items() if v}
    return LanguageModelling(settings, model, train, held_tokens, Special.of(tokenizer), mlm), model, tokenizer


def _student(config: RunConfig) -> TextEncoder:
    encoder = load_encoder(config)
    try:
        shortened(encoder.model, config.pretrain.layers)
    except ValueError as error:
        raise EncoderError(f"pretrain.layers: {error}; lower it, or take another checkpoint") from None
    return encoder


def run_worker(
    config: RunConfig, data_prefix: str, out: str, report: Report, checkpoints: Checkpoints | None = None
) -> dict[str, Any]:
    """Pre-train as this rank of an (optional) process group; rank 0 writes OUT/model -> what was measured."""
    settings = config.pretrain
    torch.set_num_threads(settings.threads)
    objective, model, tokenizer = build_objective(config, data_prefix)
    device = device_of(settings.use_gpu, "pretrain.use_gpu")
    facts = fit(settings, config.seed, objective, report, checkpoints, device)
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "workers": distributed.world_size(),
              "started_from": start_of(config), "fresh": settings.fresh}  # fmt: skip
    if distributed.rank() == 0:
        if getattr(model.config, "is_decoder", False):
            model.config.is_decoder = False  # as an encoder it reads both sides again
        save_model(model, tokenizer, storage.join(out, "model"))
    return facts
