"""Answers -> mergeable statistics -> metrics, for the whole split and for every slice of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation.measure import Answers, Facts, item_shares
from mtrec_ray.evaluation.statistics import FloatArray, HashArray, Resampler, Statistics, class_sums, user_hash
from mtrec_ray.predictor import Predictor
from mtrec_ray.tasks import judges_of

Summary = dict[str, dict[str, FloatArray]]
"""Task -> metric -> (R,) values: the data as they are, then every resample."""

WHOLE = "all"
HISTORY = (0, 1, 5, 20, 100)
"""Lower edges of the slices by number of visible events."""
COUNTS = ("n", "moments")
MAX_CLASSES = 50
"""An attribute with more values gives no slices."""


@dataclass(frozen=True)
class Slice:
    """Which moments, relevant pairs and targets belong to a slice. A slice by item has no lists and no profiles."""

    moment: NDArray[np.bool_]
    pair: NDArray[np.bool_]
    point: NDArray[np.bool_]
    by_item: bool = False


def whole(facts: Facts) -> Slice:
    return Slice(np.ones(len(facts), bool), np.ones(len(facts.pair_item), bool), np.ones(len(facts.point_item), bool))


def slices_of(predictor: Predictor, facts: Facts, known_users: set[str]) -> dict[str, Slice]:
    """The whole and its slices: users with and without training events, history length, popularity of the item by
    deciles of the training catalogue (1 is the most popular), items without training events, declared attributes."""
    out = {WHOLE: whole(facts)}

    def by_moment(name: str, mask: NDArray[np.bool_]) -> None:
        out[name] = Slice(mask, mask[facts.pair_moment], mask[facts.point_moment])

    def by_item(name: str, mask_N: NDArray[np.bool_]) -> None:
        pair = mask_N[facts.pair_item]
        moment = np.zeros(len(facts), bool)
        moment[facts.pair_moment[pair]] = True
        out[name] = Slice(moment, pair, mask_N[facts.point_item], by_item=True)

    warm = np.array([u in known_users for u in facts.user], dtype=bool)
    by_moment("cold_user", ~warm)
    by_moment("warm_user", warm)
    for low, high in zip(HISTORY, (*HISTORY[1:], np.inf), strict=True):
        name = f"{low}" if high == low + 1 else f"{low}+" if high == np.inf else f"{low}-{int(high) - 1}"
        by_moment(f"history={name}", (facts.visible >= low) & (facts.visible < high))
    trained = predictor.schema.n_train_items
    share_N = predictor.popularity_N.numpy()
    decile_N = np.zeros(len(share_N), np.int64)
    order = np.argsort(-share_N[:trained], kind="stable")
    decile_N[order] = 1 + np.arange(trained) * 10 // max(trained, 1)
    by_item("cold_item", decile_N == 0)
    for decile in range(1, 11):
        by_item(f"popularity_decile={decile}", decile_N == decile)
    for spec in predictor.schema.attributes:
        if len(spec.classes) > MAX_CLASSES or spec.name in predictor.schema.sensitive:
            continue
        for code, value in enumerate(spec.classes):
            by_moment(f"{spec.name}={value}", facts.attributes[spec.name] == code)
    return out


class Reducer:
    """Reduces one system's answers on whole users to statistics."""

    def __init__(self, predictor: Predictor, resampler: Resampler, folds: tuple[int, ...]) -> None:
        """folds: the folds whose users judge profiles."""
        self.predictor, self.resampler, self.folds = predictor, resampler, folds
        self.share_N = item_shares(predictor)
        self.judges = judges_of(predictor.config.tasks)
        self.unit_ND = torch.nn.functional.normalize(predictor.item_vec_ND, dim=-1)

    def __call__(self, facts: Facts, answers: Answers, parts: dict[str, Slice]) -> dict[str, Statistics]:
        ids, user = np.unique(facts.user, return_inverse=True)
        hashes = user_hash(ids) if len(ids) else np.zeros(0, np.uint64)
        weight_UR = self.resampler.weights(hashes).astype(np.float64)
        lists = {} if answers.top is None else m.list_metrics(answers.top, self.unit_ND, self.share_N, facts.history_share)
        return {
            name: Reduction(self, facts, answers, part, user, hashes, weight_UR, lists, name == WHOLE).run()
            for name, part in parts.items()
            if part.moment.any() or part.point.any()
        }


@dataclass
class Reduction:
    """One slice of one system, and what judges add to it."""

    over: Reducer
    facts: Facts
    answers: Answers
    part: Slice
    user: NDArray[np.int64]
    """(B,) place of each moment's user among U."""
    hashes: HashArray
    """(U,)"""
    weight_UR: FloatArray
    lists: dict[str, FloatArray]
    """Property of the top lists -> (B,)."""
    is_whole: bool
    out: Statistics = field(default_factory=Statistics)
    table: dict[str, tuple[FloatArray, FloatArray]] = field(default_factory=dict)

    def run(self) -> Statistics:
        for judge in self.over.judges.values():
            judge.reduce(self)
        self.out.add_means(self.weight_UR, self.table)
        return self.out

    def users(self, name: str, value_U: FloatArray) -> None:
        """A mean over users; NaN is left out."""
        self.table[name] = (np.nan_to_num(value_U), (~np.isnan(value_U)).astype(np.float64))

    def per_user(self, name: str, value_B: FloatArray) -> None:
        """A mean over users of their means over moments."""
        self.users(name, m.per_user(self.user, np.where(self.part.moment, value_B, np.nan), len(self.hashes)))

    def per_event(self, name: str, user_T: NDArray[np.int64], value_T: FloatArray) -> None:
        """A mean over events."""
        U = len(self.hashes)
        total = np.bincount(user_T, weights=value_T, minlength=U).astype(np.float64)
        self.table[name] = (total, np.bincount(user_T, minlength=U).astype(np.float64))

    def points(self, task: str) -> tuple[NDArray[np.int64], FloatArray, FloatArray] | None:
        """The slice's targets that have a label -> (user, label, prediction) of each; None where the system answers none."""
        if task not in self.answers.predictions:
            return None
        label = self.facts.labels[task]
        missing = np.isnan(label)
        keep = self.part.point & ~(missing if label.ndim == 1 else missing.all(1))
        return self.user[self.facts.point_moment[keep]], label[keep], self.answers.predictions[task][keep]

    def classes(
        self, task: str, label: NDArray[np.int64], guess: NDArray[np.int64], n_classes: int, user: NDArray[np.int64]
    ) -> None:
        """One class guessed of each judged thing, whose users are given; see `class_sums`."""
        self.out.sums |= class_sums(task, label, guess, n_classes, user, self.weight_UR)


def summarise(statistics: Statistics, tasks: dict[str, Any], resampler: Resampler) -> Summary:
    """Merged statistics -> metrics. `n` is what was counted: users, events, or judged users for profiles.

    A task without anything to judge has no metric at all. Metrics of fewer than MIN_USERS users have no resamples.
    """
    found = {name: judge.summarise(statistics, resampler) for name, judge in judges_of(tasks).items()}
    return {name: {metric: v for metric, v in values.items() if not np.isnan(v[0])} for name, values in found.items()}


def points_of(summary: Summary) -> dict[str, dict[str, float]]:
    """The values of the data as they are."""
    return {task: {name: float(values[0]) for name, values in found.items()} for task, found in summary.items()}
