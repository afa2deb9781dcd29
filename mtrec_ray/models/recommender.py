"""The recommender: item tower, event tokens, trunk, sharing layers and heads in one module."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtrec_ray.config import RunConfig
from mtrec_ray.models.batch import Batch, HistoryBatch
from mtrec_ray.models.chains import Chains
from mtrec_ray.models.features import FeatureEmbedding
from mtrec_ray.models.item_tower import ItemLookup, ItemTower
from mtrec_ray.models.sharing import build_sharing
from mtrec_ray.models.tokens import EventTokens
from mtrec_ray.models.trunks import build_trunk
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import Forward, ItemTask, PointwiseTask, Retrieval, Similarity, Task, UserTask, build_task


class Recommender(nn.Module):
    """One trunk pass, every answer (DESIGN §1.4).

    text_NE: text vectors of the catalogue (unit length), or None for a model of ids alone. They are not part of the weights.
    tuned: what makes them anew in every step where the TextEncoder is trained too (encoders/tuning.py), or None.
    """

    text_NE: Tensor | None
    tuned: Any

    def __init__(self, config: RunConfig, schema: LogSchema, text_NE: Tensor | None) -> None:
        super().__init__()
        self.schema, self.seed = schema, config.seed
        self.held_folds = (*config.evaluation.profile_folds_test, config.evaluation.profile_fold_valid)
        text_width = 0 if text_NE is None else text_NE.shape[1]
        self.register_buffer("text_NE", text_NE, persistent=False)
        self.register_module("tuned", None)
        self.item_tower = ItemTower(config.model, schema.n_train_items, text_width, config.seed)
        self.tokens = EventTokens(config.model, schema, text_width)
        self.trunk = build_trunk(config.model, schema.window)
        context_width = 8
        tasks = {n: build_task(n, t, schema, config.model) for n, t in config.tasks.items()}
        pointwise = [n for n, t in tasks.items() if t.pointwise]
        features = schema.request_features if pointwise else []  # under DDP every parameter must be used
        self.request_context = nn.ModuleDict({c.name: FeatureEmbedding(c, context_width, 1.0) for c in features})
        self.sharing = build_sharing(config.model, pointwise, context_width * len(features))
        self.chains = Chains(config.tasks, config.model.sharing_width)
        self.tasks = nn.ModuleDict(tasks)
        self.reads_state = any(t.reads_state for t in tasks.values())
        if not self.reads_state:  # what no task reads is not trained: DDP would wait for its gradients
            self.tokens.requires_grad_(False)
            self.trunk.requires_grad_(False)

    # -- tasks by kind

    @property
    def task_list(self) -> list[Task]:
        return list(self.tasks.values())  # type: ignore[arg-type]

    @property
    def retrieval(self) -> Retrieval:
        return next(t for t in self.task_list if isinstance(t, Retrieval))

    @property
    def similarity(self) -> Similarity | None:
        return next((t for t in self.task_list if isinstance(t, Similarity)), None)

    @property
    def pointwise(self) -> dict[str, PointwiseTask]:
        return {t.name: t for t in self.task_list if isinstance(t, PointwiseTask)}

    @property
    def profiles(self) -> dict[str, UserTask]:
        return {t.name: t for t in self.task_list if isinstance(t, UserTask)}

    @property
    def item_tasks(self) -> dict[str, ItemTask]:
        return {t.name: t for t in self.task_list if isinstance(t, ItemTask)}

    def read_catalogue(self, catalogue: pa.Table) -> None:
        """Give the tasks what they know of items beside vectors; needed before training and before inference.

        catalogue: as prepare wrote it.
        """
        for task in self.task_list:
            task.read_catalogue(catalogue, self.schema, self.held_folds)

    # -- training

    def fit_items(self, hash_N: NDArray[np.uint64], count_N: Tensor) -> None:
        """hash_N, count_N: a hash of every training item's id and its training events; needed once, before training."""
        self.item_tower.residual.name_items(hash_N)
        for task in self.task_list:
            task.fit_items(count_N, self.seed)

    def counts(self, batch: Batch) -> Tensor:
        """count_T of this rank's batch."""
        return torch.stack([t.count(batch).float() for t in self.task_list])

    def items_of(self, batch: Batch) -> Tensor | None:
        """Training items that a step reads, item_U ascending; None when a task reads the whole catalogue."""
        read = [t.reads_items(batch) for t in self.task_list]
        some = [items for items in read if items is not None]
        if len(some) < len(read):
            return None
        return torch.unique(torch.cat([batch.history.item_BS.flatten(), batch.targets.item_M, *some]))

    def forward(self, batch: Batch) -> tuple[list[Tensor], Tensor]:
        """-> (sum of losses over this rank's batch of each task, state_BLD).

        The losses stay apart, so that one of them can be back-propagated without the others.
        """
        targets = batch.targets
        item_U = self.items_of(batch)
        items = self.item_tower.train_vectors(self._texts_of(item_U, batch.step), item_U, batch.step)
        if self.reads_state:
            state_BLD = self.states(items, batch.history)
        else:
            state_BLD = items.vec_UD.new_zeros(len(batch.history), batch.history.item_BS.shape[1] + 1, items.vec_UD.shape[1])
        shared: dict[str, Tensor] = {}
        if self.pointwise:
            state_MD = state_BLD[targets.window_M, targets.pos_M]
            shared = self.share(state_MD, items[targets.item_M], targets.context_M)
        forward = Forward(state_BLD, items, shared)
        return [t.loss_sum(forward, batch) for t in self.task_list], state_BLD

    def _texts_of(self, item_U: Tensor | None, step: int) -> Tensor | None:
        """Text vectors of some training items, None for all of them."""
        n_items = self.schema.n_train_items
        if self.text_NE is None:
            return None
        if self.tuned is not None:
            return self.tuned(self.text_NE, item_U, n_items, step)  # type: ignore[no-any-return]
        return self.text_NE[:n_items] if item_U is None else self.text_NE[item_U]

    def refresh_texts(self) -> None:
        """Text vectors of the encoder's weights of now; nothing to do where it is frozen."""
        if self.tuned is not None:
            self.tuned.refresh(self.text_NE)

    # -- inference

    def share(self, state: Tensor, item_vec: Tensor, context: dict[str, Tensor]) -> dict[str, Tensor]:
        """(state, item vector, request context) of targets, or of B requests with K items each -> what each head reads.

        M targets: state and item_vec (M, D), context encoded features of M -> task: (M, H).
        B requests: state (B, 1, D), item_vec (B, K, D), context encoded features of B -> task: (B, K, H).
        A task that depends on another gets H + 1 numbers (models/chains.py).
        """
        context_C = state.new_zeros(*state.shape[:-1], 0)
        if self.request_context:
            embedded = [embed(context[name]) for name, embed in self.request_context.items()]
            context_C = torch.cat(embedded, dim=-1)
            context_C = context_C if state.dim() == 2 else context_C[:, None, :]
        return self.chains(self.sharing(state, item_vec, context_C), self.pointwise)  # type: ignore[no-any-return]

    def predict(self, shared: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `share` gave -> predictions of every pointwise task in its label's units (...)."""
        return {name: task.predict(shared[name]) for name, task in self.pointwise.items()}

    def item_vectors(self) -> Tensor:
        """Vectors of the whole catalogue at inference -> item_vec_ND."""
        return self.item_tower(self.text_NE, self.schema.n_items)  # type: ignore[no-any-return]

    def states(self, item_vec_ND: ItemLookup, history: HistoryBatch) -> Tensor:
        """Histories -> state_BLD."""
        return self.trunk(self.tokens(item_vec_ND[history.item_BS], history), history.time_BS).float()  # type: ignore[no-any-return]

    def encode(self, item_vec_ND: ItemLookup, history: HistoryBatch) -> Tensor:
        """Histories -> the state after each one's last event, state_BD."""
        state_BLD = self.states(item_vec_ND, history)
        return state_BLD[torch.arange(len(history), device=state_BLD.device), history.length_B]  # type: ignore[no-any-return]
