"""Baselines of the tasks beside ranking: means, gradient boosting, majority, a linear model on the bag of items."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.linear_model import LogisticRegression

from mtrec_ray.config import BinaryTask, RegressionTask
from mtrec_ray.evaluation.baselines import Fitted, ItemVectors
from mtrec_ray.evaluation.measure import Moments, System, profile_tasks
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LogSchema
from mtrec_ray.training.feed import WindowCache

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

LEAVES = (7, 15, 31)
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Grids: leaves of a boosted tree, inverse regularisation of the linear model; the first is chosen by squared error,
the second by log loss, on valid."""
MAX_ROWS = 200_000
"""Training targets that gradient boosting sees, spread evenly."""


class Means(System):
    """The mean training label of the item, or of the user; the overall mean for those without one."""

    def __init__(self, by: str, tables: dict[str, tuple[dict[str, float] | FloatArray, float]]) -> None:
        self.by, self.tables = by, tables

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        out = {}
        for task, (table, overall) in self.tables.items():
            if isinstance(table, dict):
                per_moment = np.array([table.get(u, overall) for u in moments.user_ids], dtype=np.float64)
                out[task] = per_moment[moments.row]
            else:
                out[task] = table[moments.item_T]
        return out


class Majority(System):
    """The shares of the classes among training users."""

    def __init__(self, shares: dict[str, FloatArray]) -> None:
        self.shares = shares

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        return {task: np.tile(share, (len(moments), 1)) for task, share in self.shares.items()}


class ItemBag(System):
    """Logistic regression on the bag of visible items, each row of unit length."""

    def __init__(self, models: dict[str, tuple[LogisticRegression, int]]) -> None:
        self.models = models

    def profiles(self, moments: Moments) -> dict[str, FloatArray]:
        bag = _unit_rows(moments.visible())
        out = {}
        for task, (model, classes) in self.models.items():
            out[task] = np.zeros((len(moments), classes))
            out[task][:, model.classes_] = model.predict_proba(bag)
        return out


class Boosting(System):
    """Histogram gradient boosting on what is known before the event: mean and count of the item's earlier training
    labels, the number of visible events and the mean of each action among those that the window shows."""

    def __init__(self, schema: LogSchema, items: dict[str, ItemMeans], models: dict[str, object]) -> None:
        self.schema, self.items, self.models = schema, items, models

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        cache, out = moments.cache, {}
        user = _user_features(cache, self.schema, moments.target, cache.offsets["history"][moments.index][moments.row])
        for task, model in self.models.items():
            table = np.column_stack([self.items[task].features(moments.item_T), user])
            kind = hasattr(model, "predict_proba")
            out[task] = model.predict_proba(table)[:, 1] if kind else model.predict(table)  # type: ignore[attr-defined]
        return out


class ItemMeans:
    """Sum and count of a label per item over training targets."""

    def __init__(self, item: IntArray, label: FloatArray, n_items: int) -> None:
        valid = ~np.isnan(label)
        self.total: FloatArray = np.bincount(item[valid], weights=label[valid], minlength=n_items).astype(np.float64)
        self.count = np.bincount(item[valid], minlength=n_items).astype(np.float64)
        self.overall = float(label[valid].mean()) if valid.any() else 0.0

    def means(self) -> FloatArray:
        return np.where(self.count > 0, self.total / np.maximum(self.count, 1), self.overall)

    def features(self, item: IntArray) -> FloatArray:
        """(mean, log count) of items after training, shrunk by one overall mean."""
        return self._features(self.total[item], self.count[item])

    def earlier(self, item: IntArray, label: FloatArray, time: IntArray, row: IntArray) -> FloatArray:
        """The same for training rows from their items' earlier labels alone (ties in time by row).

        A row's own label, or what is left when it is taken out of the whole, would tell the label.
        """
        order = np.lexsort((row, time, item))
        value = np.nan_to_num(label[order])
        there = ~np.isnan(label[order])
        first = np.searchsorted(item[order], item[order], side="left")
        total = np.concatenate([[0.0], np.cumsum(np.where(there, value, 0.0))])
        count = np.concatenate([[0.0], np.cumsum(there)])
        out = np.empty((len(item), 2))
        out[order] = self._features(total[:-1] - total[first], count[:-1] - count[first])
        return out

    def _features(self, total: FloatArray, count: FloatArray) -> FloatArray:
        return np.column_stack([(total + self.overall) / (count + 1), np.log1p(count)])


def _user_features(cache: WindowCache, schema: LogSchema, target: IntArray, history_start: IntArray) -> FloatArray:
    """Per target: log of the number of visible events of its window, mean of each action among them."""
    pos = cache.columns["target_pos"][target].astype(np.int64)
    columns = [np.log1p(pos.astype(np.float64))]
    for action in schema.actions:
        value = np.asarray(cache.columns[f"history_action_{action.name}"], dtype=np.float64)
        there = ~np.isnan(value)
        total = np.concatenate([[0.0], np.cumsum(np.where(there, value, 0.0))])
        count = np.concatenate([[0], np.cumsum(there)])
        seen = count[history_start + pos] - count[history_start]
        mean = (total[history_start + pos] - total[history_start]) / np.maximum(seen, 1)
        columns.append(np.where(seen > 0, mean, np.nan))
    return np.column_stack(columns)


def _unit_rows(bag: sp.csr_matrix) -> sp.csr_matrix:
    norm = np.sqrt(np.asarray(bag.sum(1)).ravel())
    return sp.csr_matrix(sp.diags(1 / np.maximum(norm, 1)) @ bag)


def fit_task_baselines(
    predictor: Predictor, train: WindowCache, valid: WindowCache, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Fitted]:
    """item_mean, user_mean, gradient_boosting, majority, item_bag, item_vectors: those that the tasks ask for."""
    tasks = {n: t for n, t in predictor.config.tasks.items() if isinstance(t, RegressionTask | BinaryTask)}
    out: dict[str, Fitted] = {}
    target, length = train.gather("target", np.arange(len(train)))
    window = np.repeat(np.arange(len(train)), length)
    item = train.columns["target_item"][target].astype(np.int64)
    labels = {n: train.columns[f"label_{t.label}"][target].astype(np.float64) for n, t in tasks.items()}
    tasks = {n: t for n, t in tasks.items() if (~np.isnan(labels[n])).any()}
    if tasks:
        items = {n: ItemMeans(item, labels[n], predictor.schema.n_items) for n in tasks}
        encoded = train.user_ids.dictionary_encode()
        user = encoded.indices.to_numpy()[window]
        by_user = {}
        for n in tasks:
            means = ItemMeans(user, labels[n], len(encoded.dictionary)).means()
            by_user[n] = (dict(zip(encoded.dictionary.to_pylist(), means.tolist(), strict=True)), items[n].overall)
        out["item_mean"] = Fitted(Means("item", {n: (t.means(), t.overall) for n, t in items.items()}), {})
        out["user_mean"] = Fitted(Means("user", dict(by_user)), {})
        progress("fitting gradient_boosting")
        out["gradient_boosting"] = _fit_boosting(predictor, tasks, items, labels, train, valid, target, window)
    if profile_tasks(predictor):
        progress("fitting item_bag")
        out |= _fit_profiles(predictor, train, valid)
    out["item_vectors"] = Fitted(ItemVectors(predictor.item_vec_ND), {})
    return out


def _fit_boosting(
    predictor: Predictor,
    tasks: dict[str, RegressionTask | BinaryTask],
    items: dict[str, ItemMeans],
    labels: dict[str, FloatArray],
    train: WindowCache,
    valid: WindowCache,
    target: IntArray,
    window: IntArray,
) -> Fitted:
    schema = predictor.schema
    item = train.columns["target_item"][target].astype(np.int64)
    time, row = (train.columns[c][target].astype(np.int64) for c in ("target_time", "target_row"))
    user = _user_features(train, schema, target, train.offsets["history"][window])
    v, v_length = valid.gather("target", np.arange(len(valid)))
    v_user = _user_features(valid, schema, v, np.repeat(valid.offsets["history"][:-1], v_length))
    v_item = valid.columns["target_item"][v].astype(np.int64)
    models: dict[str, object] = {}
    chosen: dict[str, float] = {}
    for name, task in tasks.items():
        rows = np.flatnonzero(~np.isnan(labels[name]))
        rows = rows[:: max(1, -(-len(rows) // MAX_ROWS))]
        table = np.column_stack([items[name].earlier(item, labels[name], time, row)[rows], user[rows]])
        v_label = valid.columns[f"label_{task.label}"][v].astype(np.float64)
        keep = ~np.isnan(v_label)
        v_table = np.column_stack([items[name].features(v_item[keep]), v_user[keep]])
        binary = isinstance(task, BinaryTask)
        if binary and len(np.unique(labels[name][rows])) < 2:
            continue
        make = HistGradientBoostingClassifier if binary else HistGradientBoostingRegressor
        tried = []
        for leaves in LEAVES:
            model = make(max_leaf_nodes=leaves, max_iter=100, learning_rate=0.05, random_state=predictor.config.seed)
            model.fit(table, labels[name][rows])
            guess = model.predict_proba(v_table)[:, 1] if binary and keep.any() else model.predict(v_table) if keep.any() else []
            error = float(np.mean((np.asarray(guess) - v_label[keep]) ** 2)) if keep.any() else 0.0
            tried.append((error, leaves, model))
        best = min(tried, key=lambda t: t[:2])
        models[name], chosen[f"{name}_leaves"] = best[2], best[1]
    return Fitted(Boosting(schema, items, models), chosen, len(LEAVES) if len(v) else 0)


def _fit_profiles(predictor: Predictor, train: WindowCache, valid: WindowCache) -> dict[str, Fitted]:
    """Majority and the linear model on users outside the test and valid folds, as they stand at the end of training."""
    evaluation = predictor.config.evaluation
    masked = np.isin(train.columns["fold"], (*evaluation.profile_folds_test, evaluation.profile_fold_valid))
    ids = np.array(train.user_ids.to_pylist(), dtype=object)
    # the last window shows the user's last events; earlier windows add the older ones to the bag
    names, user = np.unique(ids, return_inverse=True)
    h, h_length = train.gather("history", np.arange(len(train)))
    bag = sp.csr_matrix(
        (np.ones(len(h), np.float32), (np.repeat(user, h_length), train.columns["history_item"][h])),
        shape=(len(names), predictor.schema.n_items),
    )
    bag.data[:] = 1
    bag = _unit_rows(bag)
    _, first = np.unique(user, return_index=True)
    on_valid = Moments.of(predictor.schema, valid, np.flatnonzero(valid.columns["fold"] == evaluation.profile_fold_valid))
    v_bag = _unit_rows(on_valid.visible())
    shares: dict[str, FloatArray] = {}
    models: dict[str, tuple[LogisticRegression, int]] = {}
    chosen: dict[str, float] = {}
    for name, task in profile_tasks(predictor).items():
        label = train.columns[f"profile_{task.attribute}"][first].astype(np.int64)
        rows = np.flatnonzero((label >= 0) & ~masked[first])
        classes = len(next(a.classes for a in predictor.schema.attributes if a.name == task.attribute))
        shares[name] = (np.bincount(label[rows], minlength=classes) + 1e-9) / np.float64(len(rows) + classes * 1e-9)
        if len(np.unique(label[rows])) < 2:
            continue
        v_label = valid.columns[f"profile_{task.attribute}"][on_valid.index].astype(np.int64)
        tried = []
        for strength in STRENGTHS:
            model = LogisticRegression(C=strength, max_iter=300).fit(bag[rows], label[rows])
            keep = np.isin(v_label, model.classes_)
            error = 0.0
            if keep.any():
                probability = model.predict_proba(v_bag[keep])
                place = np.searchsorted(model.classes_, v_label[keep])
                error = float(-np.log(np.maximum(probability[np.arange(len(place)), place], 1e-12)).mean())
            tried.append((error, strength, model))
        best = min(tried, key=lambda t: t[:2])
        models[name], chosen[f"{name}_c"] = (best[2], classes), best[1]
    out = {"majority": Fitted(Majority(shares), {})}
    if models:
        out["item_bag"] = Fitted(ItemBag(models), chosen, len(STRENGTHS) if len(on_valid) else 0)
    return out
