"""profile with `interest`: over which categories of items a user's later events will spread."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray import item_features
from mtrec_ray.config import ModelConfig, ProfileTask
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.evaluation.system import Fitted, System
from mtrec_ray.models.batch import Batch
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks.base import Forward, UserTask
from mtrec_ray.tasks.judge import FloatArray, Judge
from mtrec_ray.tasks.wide import Bags

if TYPE_CHECKING:
    from mtrec_ray.evaluation.measure import Moments
    from mtrec_ray.evaluation.reduce import Reduction
    from mtrec_ray.predictor import Predictor
    from mtrec_ray.training.feed import WindowCache

PRIORS = (1.0, 3.0, 10.0, 30.0)
"""Events that the overall shares count for beside a user's own: the grid of the baseline `history_shares`."""
PRIOR = 3.0


class Interest(UserTask):
    """Softmax over categories: logits are a learned multiple of the log of the shares so far, and a deep term on the state.

    A training event spreads 1 equally over its item's categories. At every position of a window at which a target stands,
    the state is trained, by cross-entropy, to tell the mean over the window's positive targets from there on; all of these
    are training events that the state has not seen. Positions of a window weigh the same, windows as in `profile`.
    """

    share_NC: Tensor
    overall_C: Tensor

    def __init__(self, name: str, column: str, classes: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.name, self.key, self.classes = name, column, classes
        self.project = nn.Linear(width, width)
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        self.multiple = nn.Parameter(torch.ones(1))
        self.register_buffer("share_NC", torch.zeros(0, len(classes)), persistent=False)
        self.register_buffer("overall_C", torch.full((len(classes),), 1 / max(1, len(classes))), persistent=False)

    @classmethod
    def build(cls, name: str, config: ProfileTask, schema: LogSchema, model: ModelConfig) -> Interest:
        assert config.interest is not None
        return cls(name, config.interest, item_features.spec_of(schema, config.interest).values, model.width)

    def read_catalogue(self, catalogue: pa.Table, schema: LogSchema, held_folds: tuple[int, ...]) -> None:
        share_NC = item_features.shares(item_features.codes(catalogue, self.key), len(self.classes))
        self.share_NC = torch.from_numpy(share_NC.astype(np.float32)).to(self.share_NC.device)
        overall_C = overall_shares(share_NC, catalogue["count"].to_numpy())
        self.overall_C.copy_(torch.from_numpy(overall_C.astype(np.float32)))

    def logits(self, state_BD: Tensor, bags: Bags) -> Tensor:
        total_BC = state_BD.new_zeros(bags.n, len(self.classes)).index_add(0, bags.row_E, self.share_NC[bags.item_E])
        return self._logits(state_BD, total_BC)

    def _logits(self, state_BD: Tensor, total_BC: Tensor) -> Tensor:
        prior_BC = (total_BC + PRIOR * self.overall_C) / (total_BC.sum(1, keepdim=True) + PRIOR)
        return self.multiple * prior_BC.clamp(min=1e-6).log() + self.head(F.gelu(self.project(state_BD)))  # type: ignore[no-any-return]

    def _trained(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """-> place_R (window · L + position), what the window's positive targets are from there on target_RC, weight_R."""
        if not len(self.share_NC):
            raise RuntimeError(f"tasks.{self.name}: the model was not given the items' {self.key}; call read_catalogue first")
        targets, B, L = batch.targets, len(batch.history), batch.history.item_BS.shape[1] + 1
        share_MC = self.share_NC[targets.item_M] * targets.positive_M[:, None]
        usable = share_MC.sum(1) > 0
        place_M = (targets.window_M * L + targets.pos_M)[usable]
        at_BLC = share_MC.new_zeros(B * L, share_MC.shape[1]).index_add(0, place_M, share_MC[usable]).view(B, L, -1)
        later_BLC = at_BLC.flip(1).cumsum(1).flip(1)
        place_R = torch.unique(place_M)
        window_R = place_R // max(L, 1)
        target_RC = later_BLC.flatten(0, 1)[place_R]
        places_B = torch.bincount(window_R, minlength=B).clamp(min=1)
        return place_R, target_RC / target_RC.sum(1, keepdim=True), (batch.profile_weight_B / places_B)[window_R]

    def count(self, batch: Batch) -> Tensor:
        return self._trained(batch)[2].sum()

    def loss_sum(self, forward: Forward, batch: Batch) -> Tensor:
        place_R, target_RC, weight_R = self._trained(batch)
        history = batch.history
        shown_BS = torch.arange(history.item_BS.shape[1], device=place_R.device) < history.length_B[:, None]
        share_BSC = self.share_NC[history.item_BS] * shown_BS[..., None]
        before_BLC = F.pad(share_BSC.cumsum(1), (0, 0, 1, 0))
        logits_RC = self._logits(forward.state_BLD.flatten(0, 1)[place_R], before_BLC.flatten(0, 1)[place_R])
        return -((target_RC * F.log_softmax(logits_RC, 1)).sum(1) * weight_R).sum()


def overall_shares(share_NC: FloatArray, count_N: FloatArray) -> FloatArray:
    """Shares of the categories among the training events, one event added to each."""
    total_C = count_N @ share_NC + 1.0
    return np.asarray(total_C / total_C.sum())


class InterestJudge(Judge):
    """At every test moment against the categories of its positive targets, averaged per user first: cross-entropy, the
    divergence from them (cross-entropy less the targets' own entropy), and whether the likeliest category is one of them."""

    main = "hit@1"
    nothing = "no positive target with a category"

    def truth(self, predictor: Predictor, moments: Moments) -> FloatArray | None:
        n_values = len(item_features.spec_of(predictor.schema, self.config.interest).values)
        positive = moments.column("target_positive").astype(bool)
        share_PC = item_features.shares(predictor.item_codes[self.config.interest][moments.item_T[positive]], n_values)
        total_BC = np.zeros((len(moments), n_values))
        np.add.at(total_BC, moments.row[positive], share_PC)
        with np.errstate(invalid="ignore"):
            return np.asarray(total_BC / total_BC.sum(1, keepdims=True))  # 0 / 0: nothing to judge

    def reduce(self, r: Reduction) -> None:
        if r.part.by_item or self.name not in r.answers.profiles:
            return
        truth_BC, p_BC = r.facts.truths[self.name], r.answers.profiles[self.name]
        missing = np.isnan(truth_BC).any(1)
        truth_BC = np.nan_to_num(truth_BC)

        def value(value_B: FloatArray) -> FloatArray:
            return np.where(missing, np.nan, value_B)

        cross_B = -(truth_BC * np.log(np.clip(p_BC, 1e-12, 1))).sum(1)
        own_B = -(truth_BC * np.log(np.maximum(truth_BC, 1e-12))).sum(1)
        r.per_user(f"{self.name}/logloss", value(cross_B))
        r.per_user(f"{self.name}/kl", value(cross_B - own_B))
        r.per_user(f"{self.name}/hit@1", value((truth_BC[np.arange(len(p_BC)), p_BC.argmax(1)] > 0).astype(np.float64)))

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        if not statistics.counted(f"{self.name}/logloss"):
            return {}
        found = {n: statistics.mean(f"{self.name}/{n}") for n in ("hit@1", "logloss", "kl")}
        return found | {"n": statistics.sums[f"{self.name}/logloss"][:1, 1]}

    def fit_baselines(self, predictor: Predictor, train: WindowCache, valid: Moments) -> dict[str, Fitted]:
        """`majority`: the overall shares; `history_shares`: those of the user's visible items, drawn towards the overall
        ones by a prior that is tuned on valid."""
        n_values = len(item_features.spec_of(predictor.schema, self.config.interest).values)
        share_NC = item_features.shares(predictor.item_codes[self.config.interest], n_values)
        overall_C = overall_shares(share_NC, predictor.popularity_N.double().numpy() * predictor.trained_events)
        truth_BC = self.truth(predictor, valid)
        assert truth_BC is not None
        judged = ~np.isnan(truth_BC).any(1)

        def loss(system: HistoryShares) -> float:
            p_BC = system.profiles(valid)[self.name][judged]
            return float(-(truth_BC[judged] * np.log(p_BC)).sum(1).mean()) if judged.any() else 0.0

        systems = {prior: HistoryShares(self.name, share_NC, overall_C, prior) for prior in PRIORS}
        best = min(PRIORS, key=lambda prior: loss(systems[prior]))
        return {
            "majority": Fitted(HistoryShares(self.name, share_NC, overall_C, np.inf), {}),
            "history_shares": Fitted(systems[best], {f"{self.name}_prior": best}, len(PRIORS) if judged.any() else 0),
        }


class HistoryShares(System):
    """Shares of the categories among the visible items, with `prior` events spread as the training events are."""

    def __init__(self, task: str, share_NC: FloatArray, overall_C: FloatArray, prior: float) -> None:
        self.task, self.share_NC, self.overall_C, self.prior = task, share_NC, overall_C, prior

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        if np.isinf(self.prior):
            return {self.task: np.tile(self.overall_C, (len(moments), 1))}
        total_BC = np.asarray(moments.visible() @ self.share_NC)
        p_BC = total_BC + self.prior * self.overall_C
        return {self.task: p_BC / p_BC.sum(1, keepdims=True)}
