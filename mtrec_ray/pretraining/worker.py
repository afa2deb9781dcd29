"""One pre-training worker: prepared data and a checkpoint -> a Hugging Face directory. It knows no Ray."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.loading import EncoderError, check_tokens, load_tokenizer, resolve_model, source
from mtrec_ray.pretraining.blocks import Special
from mtrec_ray.pretraining.corpus import build_corpus
from mtrec_ray.pretraining.loop import Report, Texts, fit
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
            missing = sorted(info["missing_keys"])
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


def run_worker(
    config: RunConfig, data_prefix: str, out: str, report: Report, checkpoints: Checkpoints | None = None
) -> dict[str, Any]:
    """Pre-train as this rank of an (optional) process group; rank 0 writes OUT/model -> what was measured."""
    settings = config.pretrain
    torch.set_num_threads(settings.threads)
    model, tokenizer, mlm = load(config)
    corpus = build_corpus(settings, data_prefix)
    texts = Texts(tokens_of(tokenizer, corpus.train), {k: tokens_of(tokenizer, v) for k, v in corpus.held.items()})
    texts.held = {k: v for k, v in texts.held.items() if v}
    device = device_of(settings.use_gpu, "pretrain.use_gpu")
    facts = fit(settings, config.seed, model, texts, Special.of(tokenizer), mlm, report, checkpoints, device)
    facts |= {"objective": "mlm" if mlm else "clm", "parameters": sum(p.numel() for p in model.parameters()),
              "workers": distributed.world_size(), "started_from": start_of(config), "fresh": settings.fresh}  # fmt: skip
    if distributed.rank() == 0:
        _save(model, tokenizer, storage.join(out, "model"))
    return facts


def _save(model: Any, tokenizer: Any, folder: str) -> None:
    """A Hugging Face directory, local or on an object store."""
    with tempfile.TemporaryDirectory() as draft:
        if getattr(model.config, "is_decoder", False):
            model.config.is_decoder = False  # as an encoder it reads both sides again
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        for file in sorted(Path(draft).iterdir()):
            storage.write_bytes(storage.join(folder, file.name), file.read_bytes())
