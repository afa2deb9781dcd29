"""The contract of a task: what it counts, its loss, and (for pointwise tasks) its prediction. How it is judged: judge.py.

A kind of task is one file here and its name in `mtrec_ray/tasks/__init__.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from torch import Tensor, nn

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.batch import Batch
from mtrec_ray.models.item_tower import ItemVectors
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.wide import Bags


@dataclass
class Forward:
    """One trunk pass over a batch, as the tasks see it."""

    state_BLD: Tensor
    items: ItemVectors
    """Vectors of the training items that the tasks asked for."""
    shared: dict[str, Tensor]
    """What the head of each pointwise task reads: output of the sharing layers, (M, H), and for a task with `depends_on` one
    number more (models/chains.py)."""


class Task(nn.Module):
    """A task of the model.

    `count(batch)` is the number of valid labels (or sum of weights) in this rank's batch; `loss_sum` is the sum
    of losses over them. The loop divides by the global count, so that no result depends on the world size.
    """

    name: str
    reads_state = True
    """Whether it reads user states; a model of tasks that do not has an idle trunk."""
    pointwise = False
    """Whether the task reads the sharing layers and gives a number per (user, item)."""

    @classmethod
    def build(cls, name: str, config: Any, schema: LogSchema, model: ModelConfig) -> Task:
        """The module of a configured task; config: of the kind's own class."""
        raise NotImplementedError

    def read_catalogue(self, catalogue: pa.Table, schema: LogSchema, held_folds: tuple[int, ...]) -> None:
        """Take what the task knows of items beside their vectors; called once, before training and before inference.

        catalogue: rows of catalogue.parquet; held_folds: folds of items (and users) whose labels are masked in training.
        """

    def reads_items(self, batch: Batch) -> Tensor | None:
        """Training items whose vectors the loss reads beside those of histories and targets; None: the whole catalogue."""
        return batch.targets.item_M[:0]

    def count(self, batch: Batch) -> Tensor:
        raise NotImplementedError

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        raise NotImplementedError

    def fit_items(self, count_N: Tensor, seed: int) -> None:
        """Told once before training: training events of every training item, and the run's seed."""


class PointwiseTask(Task):
    """A task with a number per (user, item)."""

    pointwise = True
    several_numbers = False
    """Whether `distribution` says more than `predict`."""

    def predict(self, shared: Tensor) -> Tensor:
        """What the head reads (..., H) -> prediction in the label's units (...)."""
        raise NotImplementedError

    def final(self, prediction: Tensor) -> Tensor:
        """g of the final score Σ w·g, from the prediction."""
        raise NotImplementedError

    def distribution(self, shared: Tensor) -> Tensor:
        """All numbers of a task of several, (..., C): what its judge reads."""
        raise NotImplementedError


class UserTask(Task):
    """A task with a distribution over classes per user, answered by `Predictor.profile`."""

    key: str
    """Its name in the answer."""
    classes: tuple[str, ...]

    def logits(self, state_BD: Tensor, bags: Bags) -> Tensor:
        """States and visible items of B users -> (B, classes)."""
        raise NotImplementedError


class ItemTask(Task):
    """A task that says something about items from their vectors alone."""

    reads_state = False
    column: str
    classes: tuple[str, ...]

    def item_probabilities(self, item_vec_ND: Tensor) -> Tensor:
        """-> probability per class, (N, classes)."""
        raise NotImplementedError
