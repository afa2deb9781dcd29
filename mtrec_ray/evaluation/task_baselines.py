"""Baselines of the tasks beside ranking: means, gradient boosting, majority, a linear model on the bag of items."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from mtrec_ray.evaluation.baselines import Fitted, ItemVectors
from mtrec_ray.evaluation.measure import Moments
from mtrec_ray.evaluation.system import System, Together
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import Judge, judges_of
from mtrec_ray.training.feed import WindowCache

if TYPE_CHECKING:  # scikit-learn takes seconds to import, and every job would wait for it
    from sklearn.linear_model import LogisticRegression

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

LEAVES = (7, 15, 31)
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
"""Grids: leaves of a boosted tree, inverse regularisation of the linear model; the first is chosen by squared error,
the second by log loss, on valid."""
MAX_ROWS = 200_000
"""Training targets that gradient boosting sees, spread evenly."""


Table = tuple[dict[str, float] | FloatArray, float]
"""Mean of each user, or of each item; the overall mean."""


class Means(System):
    """The mean training label of the item, or of the user; the overall mean for those without one.

    tables: task -> (its judge, one table per column of the label).
    """

    def __init__(self, tables: dict[str, tuple[Judge, list[Table]]]) -> None:
        self.tables = tables

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        return {
            task: judge.assemble(np.column_stack([self._column(moments, *table) for table in columns]))
            for task, (judge, columns) in self.tables.items()
        }

    def _column(self, moments: Moments, table: dict[str, float] | FloatArray, overall: float) -> FloatArray:
        if not isinstance(table, dict):
            return table[moments.item_T]
        return np.array([table.get(u, overall) for u in moments.user_ids], dtype=np.float64)[moments.row]


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

    def __init__(self, schema: LogSchema, models: dict[str, tuple[Judge, list[tuple[ItemMeans, object]]]]) -> None:
        self.schema, self.models = schema, models

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        cache, out = moments.cache, {}
        user = _user_features(cache, self.schema, moments.target, cache.offsets["history"][moments.index][moments.row])
        for task, (judge, columns) in self.models.items():
            tables = [(np.column_stack([items.features(moments.item_T), user]), model) for items, model in columns]
            out[task] = judge.assemble(np.column_stack([_predict(model, table) for table, model in tables]))
        return out


def _predict(model: object, table: FloatArray) -> FloatArray:
    if hasattr(model, "predict_proba"):
        return model.predict_proba(table)[:, 1]  # type: ignore[no-any-return]
    return model.predict(table)  # type: ignore[attr-defined, no-any-return]


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
    judges = judges_of(predictor.config.tasks)
    out: dict[str, Fitted] = {}
    targets = _Targets(train)
    columns = _columns(judges, targets, predictor.schema)
    if columns:
        encoded = train.user_ids.dictionary_encode()
        user, ids = encoded.indices.to_numpy()[targets.window], encoded.dictionary.to_pylist()
        items = {n: [ItemMeans(targets.item, c, predictor.schema.n_items) for c in columns[n].T] for n in columns}
        by_item: dict[str, tuple[Judge, list[Table]]] = {}
        by_user: dict[str, tuple[Judge, list[Table]]] = {}
        for name, tables in items.items():
            by_item[name] = (judges[name], [(t.means(), t.overall) for t in tables])
            users = [ItemMeans(user, c, len(ids)).means().tolist() for c in columns[name].T]
            both = zip(users, tables, strict=True)
            by_user[name] = (judges[name], [(dict(zip(ids, means, strict=True)), t.overall) for means, t in both])
        out["item_mean"] = Fitted(Means(by_item), {})
        out["user_mean"] = Fitted(Means(by_user), {})
        progress("fitting gradient_boosting")
        out["gradient_boosting"] = _fit_boosting(predictor, judges, items, columns, targets, _Targets(valid))
    last = Moments.of(predictor.schema, valid, _last_moments(valid))
    own: dict[str, list[Fitted]] = {}
    for judge in judges.values():
        for name, fitted in judge.fit_baselines(predictor, train, last).items():
            own.setdefault(name, []).append(fitted)
    attributes = {n: judge.attribute for n, judge in judges.items() if judge.attribute is not None}
    if attributes:
        progress("fitting item_bag")
        for name, fitted in _fit_profiles(predictor, attributes, train, valid).items():
            own.setdefault(name, []).insert(0, fitted)
    for name, found in own.items():
        chosen = {k: v for f in found for k, v in f.chosen.items()}
        system = found[0].system if len(found) == 1 else Together([f.system for f in found])
        out[name] = Fitted(system, chosen, max(f.tries for f in found))
    if predictor.retrieval_name is not None or predictor.model.similarity is not None:
        out["item_vectors"] = Fitted(ItemVectors(predictor.item_vec_ND), {})
    return out


class _Targets:
    """All targets of a split, in the order of its windows."""

    def __init__(self, cache: WindowCache) -> None:
        self.cache = cache
        self.place, length = cache.gather("target", np.arange(len(cache)))
        self.window = np.repeat(np.arange(len(cache)), length)
        self.item = self.column("target_item").astype(np.int64)

    def column(self, name: str) -> NDArray[Any]:
        return self.cache.columns[name][self.place]

    def user_features(self, schema: LogSchema) -> FloatArray:
        return _user_features(self.cache, schema, self.place, self.cache.offsets["history"][self.window])


def _last_moments(cache: WindowCache) -> IntArray:
    """The last moment of every user; a user's moments stand together."""
    first = cache.first_of_user
    return np.flatnonzero(np.append(first[1:] != first[:-1], True)) if len(cache) else np.zeros(0, np.int64)


def _columns(judges: dict[str, Judge], targets: _Targets, schema: LogSchema) -> dict[str, FloatArray]:
    """Task -> its labels at the targets as columns, (T, C); tasks without any label are left out."""
    out = {}
    for name, judge in judges.items():
        label = judge.label(targets.column)
        columns = None if label is None else judge.columns(label, schema)
        if columns is not None and (~np.isnan(columns)).any():
            out[name] = columns
    return out


def _fit_boosting(
    predictor: Predictor,
    judges: dict[str, Judge],
    items: dict[str, list[ItemMeans]],
    columns: dict[str, FloatArray],
    train: _Targets,
    valid: _Targets,
) -> Fitted:
    """A model per task and column of its label; one number of leaves per task."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    schema = predictor.schema
    time, row = (train.column(c).astype(np.int64) for c in ("target_time", "target_row"))
    user, v_user = train.user_features(schema), valid.user_features(schema)
    models: dict[str, tuple[Judge, list[tuple[ItemMeans, object]]]] = {}
    chosen: dict[str, float] = {}
    for name, label_TC in columns.items():
        rows_C = [np.flatnonzero(~np.isnan(c)) for c in label_TC.T]
        rows_C = [rows[:: max(1, -(-len(rows) // MAX_ROWS))] for rows in rows_C]
        classify = judges[name].proportions
        if any(not len(r) or (classify and len(np.unique(c[r])) < 2) for r, c in zip(rows_C, label_TC.T, strict=True)):
            continue
        found = judges[name].label(valid.column)
        v_label = None if found is None else judges[name].columns(found, schema)
        assert v_label is not None  # it gave training columns
        make = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
        tried = []
        for leaves in LEAVES:
            fitted, error = [], 0.0
            for c, (means, rows) in enumerate(zip(items[name], rows_C, strict=True)):
                keep = ~np.isnan(v_label[:, c])
                table = np.column_stack([means.earlier(train.item, label_TC[:, c], time, row)[rows], user[rows]])
                model = make(max_leaf_nodes=leaves, max_iter=100, learning_rate=0.05, random_state=predictor.config.seed)
                model.fit(table, label_TC[rows, c])
                if keep.any():
                    v_table = np.column_stack([means.features(valid.item[keep]), v_user[keep]])
                    error += float(np.mean((_predict(model, v_table) - v_label[keep, c]) ** 2))
                fitted.append((means, model))
            tried.append((error, leaves, fitted))
        best = min(tried, key=lambda t: t[:2])
        models[name], chosen[f"{name}_leaves"] = (judges[name], best[2]), best[1]
    return Fitted(Boosting(schema, models), chosen, len(LEAVES) if len(valid.cache) else 0)


def _fit_profiles(predictor: Predictor, attributes: dict[str, str], train: WindowCache, valid: WindowCache) -> dict[str, Fitted]:
    """Majority and the linear model on users outside the test and valid folds, as they stand at the end of training.

    attributes: task -> attribute.
    """
    from sklearn.linear_model import LogisticRegression

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
    for name, attribute in attributes.items():
        label = train.columns[f"profile_{attribute}"][first].astype(np.int64)
        rows = np.flatnonzero((label >= 0) & ~masked[first])
        classes = len(next(a.classes for a in predictor.schema.attributes if a.name == attribute))
        shares[name] = (np.bincount(label[rows], minlength=classes) + 1e-9) / np.float64(len(rows) + classes * 1e-9)
        if len(np.unique(label[rows])) < 2:
            continue
        v_label = valid.columns[f"profile_{attribute}"][on_valid.index].astype(np.int64)
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
