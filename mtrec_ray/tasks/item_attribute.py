"""item_attribute: categories of an item from its vector, judged on items whose categories training did not see."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray import item_features
from mtrec_ray.config import ItemAttributeTask, ModelConfig
from mtrec_ray.evaluation import statistics as st
from mtrec_ray.evaluation.statistics import Resampler, Scores, Statistics, user_hash
from mtrec_ray.evaluation.system import Fitted, System
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, ItemTask
from mtrec_ray.tasks.judge import FloatArray, Judge, Kind

if TYPE_CHECKING:
    from mtrec_ray.evaluation.measure import Moments
    from mtrec_ray.predictor import Predictor
    from mtrec_ray.training.feed import WindowCache

ITEMS_AT_ONCE = 4096
"""Items of a larger catalogue that a step trains, drawn from the step alone: the same on every rank and for every such task."""


class ItemAttribute(ItemTask):
    """Softmax (`categorical`) or a sigmoid per value (`multihot`) over the vocabulary. An item counts once; one without a
    known value, and one of the held-out folds, is masked."""

    label_NC: Tensor
    trained_K: Tensor

    def __init__(self, name: str, column: str, classes: tuple[str, ...], several: bool, width: int) -> None:
        super().__init__()
        self.name, self.column, self.classes, self.several = name, column, classes, several
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, len(classes))
        self.register_buffer("label_NC", torch.zeros(0, len(classes)), persistent=False)
        self.register_buffer("trained_K", torch.zeros(0, dtype=torch.int64), persistent=False)

    @classmethod
    def build(cls, name: str, config: ItemAttributeTask, schema: LogSchema, model: ModelConfig) -> ItemAttribute:
        spec = item_features.spec_of(schema, config.column)
        return cls(name, config.column, spec.values, spec.kind == "multihot", model.width)

    def read_catalogue(self, catalogue: pa.Table, schema: LogSchema, held_folds: tuple[int, ...]) -> None:
        catalogue = catalogue.slice(0, schema.n_train_items)
        label_NC = item_features.multi_hot(item_features.codes(catalogue, self.column), len(self.classes))
        held = np.isin(item_features.item_fold(catalogue["item_id"].combine_chunks()), held_folds)
        device = self.label_NC.device
        self.label_NC = torch.from_numpy(label_NC.astype(np.float32)).to(device)
        self.trained_K = torch.from_numpy(np.flatnonzero(label_NC.any(1) & ~held)).to(device)

    def logits(self, item_vec: Tensor) -> Tensor:
        return self.head(F.gelu(self.project(item_vec)))  # type: ignore[no-any-return]

    def item_probabilities(self, item_vec_ND: Tensor) -> Tensor:
        logits = self.logits(item_vec_ND)
        return torch.sigmoid(logits) if self.several else torch.softmax(logits, dim=-1)

    def _items(self, batch: Batch) -> Tensor:
        if not len(self.label_NC):
            raise RuntimeError(f"tasks.{self.name}: the model was not given the items' {self.column}; call read_catalogue first")
        if len(self.trained_K) <= ITEMS_AT_ONCE:
            return self.trained_K
        generator = torch.Generator().manual_seed(batch.step)
        return self.trained_K[torch.randint(len(self.trained_K), (ITEMS_AT_ONCE,), generator=generator).to(self.trained_K.device)]

    def reads_items(self, batch: Batch) -> Tensor | None:
        return self._items(batch)

    def count(self, batch: Batch) -> Tensor:
        """Of every rank's batch: the global count and the global sum are so many times the catalogue's."""
        return torch.tensor(len(self._items(batch)), device=self.trained_K.device)

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        items = self._items(batch)
        logits, label = self.logits(forward.items[items]), self.label_NC[items]
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, label, reduction="none").mean(1).sum()
        return F.cross_entropy(logits, label.argmax(1), reduction="sum")


class ItemAttributeJudge(Judge):
    """Every item of the judged folds with a known value once; the bootstrap draws items."""

    nothing = "no item of the test folds with a known value"

    def __init__(self, name: str, config: ItemAttributeTask) -> None:
        super().__init__(name, config)
        self.main = "accuracy"

    def reduce_items(
        self, predictor: Predictor, answers: dict[str, FloatArray], folds: tuple[int, ...], resampler: Resampler
    ) -> Statistics:
        out = Statistics()
        if self.name not in answers:
            return out
        spec = item_features.spec_of(predictor.schema, self.config.column)
        label_NC = item_features.multi_hot(predictor.item_codes[self.config.column], len(spec.values))
        fold_N = item_features.item_fold(pa.array(predictor.item_ids, pa.string()))
        item_J = np.flatnonzero(label_NC.any(1) & np.isin(fold_N, folds))
        label_JC, p_JC = label_NC[item_J], answers[self.name][item_J]
        hash_J = user_hash(np.array(predictor.item_ids, dtype=object)[item_J])
        if spec.kind == "multihot":
            out.sums[f"{self.name}/judged"] = np.array([float(len(item_J))])
            for c, value in enumerate(spec.values):
                out.scores[f"{self.name}/auc:{value}"] = Scores(label_JC[:, c] > 0.5, p_JC[:, c], hash_J)
        elif len(item_J):
            weight_JR = resampler.weights(hash_J).astype(np.float64)
            unit = np.arange(len(item_J))
            out.sums |= st.class_sums(self.name, label_JC.argmax(1), p_JC.argmax(1), p_JC.shape[1], unit, weight_JR)
        return out

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if f"{self.name}/classes" in statistics.sums:
            return st.class_metrics(statistics, self.name)
        judged = statistics.sums.get(f"{self.name}/judged", np.zeros(1))
        if not judged[0]:
            return {}
        scores = {n: s for n, s in statistics.scores.items() if n.startswith(f"{self.name}/auc:")}
        per_value = [v for v in (s.auc(resampler) for s in scores.values()) if not np.isnan(v[0])]
        found = {"micro_auc": Scores.join(list(scores.values())).auc(resampler), "n": judged}
        if per_value:
            length = min(map(len, per_value))
            found["macro_auc"] = np.nanmean([v[:length] for v in per_value], axis=0)  # a resample may lack a value
        return found

    def fit_baselines(self, predictor: Predictor, train: WindowCache, valid: Moments) -> dict[str, Fitted]:
        """`majority`: the shares of the values among the items that are trained."""
        spec = item_features.spec_of(predictor.schema, self.config.column)
        label_NC = item_features.multi_hot(predictor.item_codes[self.config.column], len(spec.values))
        evaluation = predictor.config.evaluation
        held = np.isin(
            item_features.item_fold(pa.array(predictor.item_ids, pa.string())),
            (*evaluation.profile_folds_test, evaluation.profile_fold_valid),
        )
        held[predictor.schema.n_train_items :] = True
        used = label_NC[label_NC.any(1) & ~held]
        share_C = (used.sum(0) + 1e-9) / (len(used) + 1e-9 * label_NC.shape[1])
        return {"majority": Fitted(ItemMajority(self.name, np.tile(share_C, (len(label_NC), 1))), {})}


class ItemMajority(System):
    """The same shares for every item."""

    def __init__(self, task: str, share_NC: FloatArray) -> None:
        self.task, self.share_NC = task, share_NC

    def items(self) -> dict[str, FloatArray]:
        return {self.task: self.share_NC}


KIND = Kind("item_attribute", ItemAttributeTask, ItemAttribute, ItemAttributeJudge)
