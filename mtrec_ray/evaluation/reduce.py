"""Answers -> mergeable statistics -> metrics, for the whole split and for every slice of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mtrec_ray.config import BinaryTask, ProfileTask, RegressionTask
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.evaluation import statistics as st
from mtrec_ray.evaluation.measure import Answers, Facts, item_shares
from mtrec_ray.evaluation.statistics import FloatArray, HashArray, Resampler, Scores, Statistics, user_hash
from mtrec_ray.predictor import Predictor

Summary = dict[str, dict[str, FloatArray]]
"""Task -> metric -> (R,) values: the data as they are, then every resample."""

WHOLE = "all"
FINAL = ("ndcg@10", "hr@10", "mrr")
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
        self.unit_ND = torch.nn.functional.normalize(predictor.item_vec_ND, dim=-1)

    def __call__(self, facts: Facts, answers: Answers, parts: dict[str, Slice]) -> dict[str, Statistics]:
        ids, user = np.unique(facts.user, return_inverse=True)
        hashes = user_hash(ids) if len(ids) else np.zeros(0, np.uint64)
        weight_UR = self.resampler.weights(hashes).astype(np.float64)
        lists = {} if answers.top is None else m.list_metrics(answers.top, self.unit_ND, self.share_N, facts.history_share)
        return {
            name: _Reduction(self, facts, answers, part, user, hashes, weight_UR).run(lists, name == WHOLE)
            for name, part in parts.items()
            if part.moment.any() or part.point.any()
        }


@dataclass
class _Reduction:
    """One slice of one system."""

    over: Reducer
    facts: Facts
    answers: Answers
    part: Slice
    user: NDArray[np.int64]
    hashes: HashArray
    weight_UR: FloatArray

    def run(self, lists: dict[str, FloatArray], is_whole: bool) -> Statistics:
        self.out = Statistics()
        self.table: dict[str, tuple[FloatArray, FloatArray]] = {}
        predictor, answers = self.over.predictor, self.answers
        retrieval = predictor.retrieval_name
        if answers.rank is not None:
            self.ranking(retrieval, answers.rank, m.RANKING, "")
            self.ranking(retrieval, answers.rank if answers.final_rank is None else answers.final_rank, FINAL, "final_")
        if not self.part.by_item:
            for name, value_B in lists.items():
                self.per_user(f"{retrieval}/{name}", value_B)
            for name, task in predictor.config.tasks.items():
                if isinstance(task, ProfileTask) and name in answers.profiles:
                    self.profile(name, task)
        if answers.top is not None and is_whole:
            top = answers.top[answers.top >= 0]
            self.out.sums[f"{retrieval}/exposure"] = np.bincount(top, minlength=len(predictor.popularity_N)).astype(np.float64)
        if answers.hit is not None:
            similarity = next((n for n, t in predictor.config.tasks.items() if t.kind == "similarity"), None)
            if similarity is not None:
                self.per_user(f"{similarity}/hit@10", answers.hit)
        for name, task in predictor.config.tasks.items():
            if isinstance(task, RegressionTask | BinaryTask) and name in answers.predictions:
                self.points(name, task)
        self.out.add_means(self.weight_UR, self.table)
        return self.out

    def per_user(self, name: str, value_B: FloatArray) -> None:
        """A mean over users of their means over moments."""
        mean_U = m.per_user(self.user, np.where(self.part.moment, value_B, np.nan), len(self.hashes))
        self.table[name] = (np.nan_to_num(mean_U), (~np.isnan(mean_U)).astype(np.float64))

    def per_event(self, name: str, user_T: NDArray[np.int64], value_T: FloatArray) -> None:
        """A mean over events."""
        U = len(self.hashes)
        total = np.bincount(user_T, weights=value_T, minlength=U).astype(np.float64)
        self.table[name] = (total, np.bincount(user_T, minlength=U).astype(np.float64))

    def ranking(self, task: str, rank_P: NDArray[np.int64], names: tuple[str, ...], prefix: str) -> None:
        pair = self.part.pair
        found = m.ranking_metrics(self.facts.pair_moment[pair], rank_P[pair], len(self.facts))
        for name in names:
            self.per_user(f"{task}/{prefix}{name}", found[name])
        if not prefix:
            self.out.sums[f"{task}/moments"] = np.array([float((~np.isnan(found["mrr"])).sum())])

    def points(self, name: str, task: RegressionTask | BinaryTask) -> None:
        label = self.facts.labels[name]
        keep = self.part.point & ~np.isnan(label)
        label, prediction = label[keep], self.answers.predictions[name][keep]
        user_T = self.user[self.facts.point_moment[keep]]
        if isinstance(task, RegressionTask):
            self.per_event(f"{name}/rmse", user_T, (prediction - label) ** 2)
            self.per_event(f"{name}/mae", user_T, np.abs(prediction - label))
            return
        p = np.clip(prediction, 1e-7, 1 - 1e-7)
        self.per_event(f"{name}/logloss", user_T, -(label * np.log(p) + (1 - label) * np.log1p(-p)))
        self.per_event(f"{name}/label", user_T, label)
        positive = label > 0.5
        auc_U = m.user_auc(user_T, positive, prediction, len(self.hashes))
        self.table[f"{name}/user_auc"] = (np.nan_to_num(auc_U), (~np.isnan(auc_U)).astype(np.float64))
        self.out.scores[f"{name}/auc"] = Scores(positive, prediction, self.hashes[user_T])
        bin_T = np.minimum((p * m.BINS).astype(np.int64), m.BINS - 1)
        table_U = np.zeros((len(self.hashes), m.BINS, 3))
        np.add.at(table_U, (user_T, bin_T), np.stack([np.ones(len(p)), label, p], axis=1))
        self.out.sums[f"{name}/calibration"] = np.tensordot(self.weight_UR, table_U, (0, 0))

    def profile(self, name: str, task: ProfileTask) -> None:
        """Every judged user once: at the last moment with a label."""
        label = self.facts.attributes[task.attribute]
        judged = np.flatnonzero(self.part.moment & (label >= 0) & np.isin(self.facts.fold, self.over.folds))
        if not len(judged):
            return
        _, back = np.unique(self.user[judged][::-1], return_index=True)
        pick = judged[::-1][back]
        probability = self.answers.profiles[name][pick]
        C, guess, weight_JR = probability.shape[1], probability.argmax(1), self.weight_UR[self.user[pick]]
        confusion = np.zeros((C, C))
        np.add.at(confusion, (label[pick], guess), 1)
        self.out.sums[f"{name}/confusion"] = confusion
        margins_3CR = np.zeros((3, C, weight_JR.shape[1]))  # right, labelled, guessed per class: all that F1 needs
        right = label[pick] == guess
        np.add.at(margins_3CR[0], guess[right], weight_JR[right])
        np.add.at(margins_3CR[1], label[pick], weight_JR)
        np.add.at(margins_3CR[2], guess, weight_JR)
        self.out.sums[f"{name}/classes"] = np.moveaxis(margins_3CR, 2, 0)
        if C == 2:
            self.out.scores[f"{name}/auc"] = Scores(label[pick] == 1, probability[:, 1], self.hashes[self.user[pick]])


def summarise(statistics: Statistics, tasks: dict[str, Any], resampler: Resampler) -> Summary:
    """Merged statistics -> metrics. `n` is what was counted: users, events, or judged users for profiles.

    A task without anything to judge has no metric at all. Metrics of fewer than MIN_USERS users have no resamples.
    """
    out: Summary = {}
    for name, task in tasks.items():
        found: dict[str, FloatArray] = {}

        def counted(metric: str, name: str = name) -> bool:
            key = f"{name}/{metric}"
            return key in statistics.sums and bool(statistics.sums[key][0, 1] > 0)

        if task.kind == "retrieval" and counted("mrr"):
            prefixed = [f"final_{n}" for n in FINAL]
            found = {n: statistics.mean(f"{name}/{n}") for n in (*m.RANKING, *prefixed, *m.LISTS) if counted(n)}
            found |= {"n": statistics.sums[f"{name}/mrr"][:1, 1], "moments": statistics.sums[f"{name}/moments"]}
            exposure = statistics.sums.get(f"{name}/exposure")
            if exposure is not None and exposure.any():
                found |= {"coverage@10": np.array([(exposure > 0).mean()]), "gini@10": np.array([m.gini(exposure)])}
        elif task.kind == "similarity" and counted("hit@10"):
            found = {"hit@10": statistics.mean(f"{name}/hit@10"), "n": statistics.sums[f"{name}/hit@10"][:1, 1]}
        elif task.kind == "regression" and counted("rmse"):
            found = {"rmse": np.sqrt(statistics.mean(f"{name}/rmse")), "mae": statistics.mean(f"{name}/mae")}
            found["n"] = statistics.sums[f"{name}/rmse"][:1, 1]
        elif task.kind == "binary" and counted("logloss"):
            found = _binary(statistics, name, resampler)
            if counted("user_auc"):
                found["user_auc"] = statistics.mean(f"{name}/user_auc")
        elif task.kind == "profile" and f"{name}/confusion" in statistics.sums:
            found = _classes(statistics.sums[f"{name}/classes"])
            if f"{name}/auc" in statistics.scores:
                found["auc"] = statistics.scores[f"{name}/auc"].auc(resampler)
        out[name] = {metric: values for metric, values in found.items() if not np.isnan(values[0])}
    return out


def _binary(statistics: Statistics, name: str, resampler: Resampler) -> dict[str, FloatArray]:
    """Normalised entropy: log loss over the entropy of the base rate (He et al. 2014). Expected calibration error:
    mean distance of prediction and label over equal-width bins (Naeini et al. 2015)."""
    logloss, rate = statistics.mean(f"{name}/logloss"), statistics.mean(f"{name}/label")
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    curve = statistics.sums[f"{name}/calibration"][: len(logloss)]
    total = curve[:, :, 0].sum(1)
    gap = np.abs(curve[:, :, 1] - curve[:, :, 2]).sum(1)
    return {
        "logloss": logloss,
        "auc": statistics.scores[f"{name}/auc"].auc(resampler),
        "normalised_entropy": np.divide(logloss, entropy, out=np.full_like(logloss, np.nan), where=entropy > 0),
        "ece": np.divide(gap, total, out=np.full_like(gap, np.nan), where=total > 0),
        "n": statistics.sums[f"{name}/logloss"][:1, 1],
    }


def _classes(margins_R3C: FloatArray) -> dict[str, FloatArray]:
    """Accuracy, and F1 averaged over the classes that occur as label or guess."""
    if margins_R3C[0, 1].sum() < st.MIN_USERS:
        margins_R3C = margins_R3C[:1]
    right, both, total = margins_R3C[:, 0], margins_R3C[:, 1:].sum(1), margins_R3C[:, 1].sum(1)
    f1 = np.divide(2 * right, both, out=np.zeros_like(both), where=both > 0)
    occurring = (both > 0).sum(1)
    nan = np.full(len(total), np.nan)
    return {
        "accuracy": np.divide(right.sum(1), total, out=nan.copy(), where=total > 0),
        "macro_f1": np.divide(f1.sum(1), occurring, out=nan.copy(), where=occurring > 0),
        "n": total[:1],
    }


def points_of(summary: Summary) -> dict[str, dict[str, float]]:
    """The values of the data as they are."""
    return {task: {name: float(values[0]) for name, values in found.items()} for task, found in summary.items()}
