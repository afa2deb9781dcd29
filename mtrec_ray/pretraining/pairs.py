"""Pairs of texts whose items one user took one after the other, of the train part alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray import storage
from mtrec_ray.config.pretrain import PretrainConfig
from mtrec_ray.pretraining.corpus import CorpusError, is_held, sequences

HELD_PAIRS = 1024
"""Held-out pairs that are measured, at most."""


@dataclass
class PairCorpus:
    texts: list[str]
    """Distinct texts of items."""
    train: Tensor
    """(P, 2) of their numbers; a pair is there as often as it was seen."""
    held: Tensor
    """The same, of held-out users."""


def build_pairs(config: PretrainConfig, seed: int, data_prefix: str) -> PairCorpus:
    """Two positive training targets of a user at most `pair_distance` apart, with different texts. Raises CorpusError."""
    texts_of_items = storage.read_table(storage.join(data_prefix, "catalogue.parquet"), ["text"])["text"].to_pylist()
    texts = sorted({t for t in texts_of_items if t})
    number = {t: i for i, t in enumerate(texts)}
    text_N = np.array([number.get(t, -1) if t else -1 for t in texts_of_items], dtype=np.int64)
    sides: dict[bool, list[NDArray[np.int64]]] = {False: [], True: []}
    for user, item in sequences(config, data_prefix):
        text = text_N[item]
        for distance in range(1, config.pair_distance + 1):
            pair = np.stack([text[:-distance], text[distance:]], 1)
            kept = pair[(pair >= 0).all(1) & (pair[:, 0] != pair[:, 1])]
            sides[bool(is_held(np.array([user]), config.held_out)[0])].append(kept)
    train, held = (np.concatenate([np.zeros((0, 2), np.int64), *sides[side]]) for side in (False, True))
    if not len(train):
        raise CorpusError(
            "pretrain.objective: contrastive found no user with two positives of different texts; declare data.text, or take mlm"
        )
    held = held[np.random.default_rng(seed).permutation(len(held))[:HELD_PAIRS]]
    return PairCorpus(texts, torch.from_numpy(train), torch.from_numpy(held))
