"""Pass 2 of prepare: where time is cut, and everything that is fitted on the training part.

Tasks work on one settled partition and return sums; the driver adds them in the order of the partitions, so that no
figure depends on which task was done first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray import feature_fit, storage
from mtrec_ray.config import DataConfig, RunConfig
from mtrec_ray.config.long import shown_column
from mtrec_ray.data import windows
from mtrec_ray.data.events import ROW, Job, read_events, users_of
from mtrec_ray.data.ids import distinct_items, sample, sorted_dictionary
from mtrec_ray.data.lineage import DataError
from mtrec_ray.data.maturity import mask_immature
from mtrec_ray.data.validate import ITEM, TIME, USER
from mtrec_ray.expressions import Expression
from mtrec_ray.features import FeatureError, FeatureSpec
from mtrec_ray.schema import AttributeSpec, LabelStats, LogSchema, bin_names, fit_action

DAY_S = 86_400
IntArray = NDArray[np.int64]


def to_events(config: RunConfig, table: pa.Table, log_end: int = 0) -> windows.Events:
    """A sorted events table -> arrays. log_end: time of the log's newest row (ms), by which labels mature.

    Whether an event is history, and what the history says of it, goes by the labels as the history shows them; targets,
    positives of the retrieval among them, go by those that are mature.
    """
    data = config.data
    encoded = table[USER].combine_chunks()
    users, user = sorted_dictionary(encoded)
    time = table[TIME].to_numpy()
    known = {n: table[n].to_numpy() for n in data.labels}
    shown64 = known if data.long is None else {n: table[shown_column(n)].to_numpy() for n in data.labels}
    labels64 = mask_immature(known, time, data, log_end)
    history = Expression(data.history_expression)(shown64)
    positive, shown_positive = (Expression(config.positive_expression)(v) for v in (labels64, shown64))
    return windows.Events(
        user_ids=users,
        user=user,
        time=time,
        row=table[ROW].to_numpy(),
        item_ids=table[ITEM].combine_chunks(),
        is_history=np.nan_to_num(history) != 0,
        is_positive=np.nan_to_num(positive) != 0,
        labels={n: v.astype(np.float32) for n, v in labels64.items()},
        shown={n: v.astype(np.float32) for n, v in shown64.items() if v is not labels64[n]},
        shown_positive=np.nan_to_num(shown_positive) != 0,
        context={n: table[n].combine_chunks() for n in data.context},
    )


def split_events(data: DataConfig, events: windows.Events, cuts: tuple[int, int]) -> NDArray[np.int8]:
    match data.protocol:
        case "time":
            return windows.split_by_time(events, *cuts)
        case "leave_one_out":
            return windows.split_leave_one_out(events)
        case "user_holdout":
            return windows.split_by_user(events, *data.holdout, data.fold / data.folds)
        case "item_holdout":
            return windows.split_by_item(events, *data.holdout, data.fold / data.folds)
        case "random":
            return windows.split_at_random(events, data.folds, data.fold)


# --------------------------------------------------------------------------- where time is cut


class Counts:
    """How many events each whole number has (a day, a second)."""

    def __init__(self) -> None:
        self.values, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, values: IntArray, counts: IntArray) -> None:
        self.values, inverse = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        self.counts = np.bincount(inverse, weights=np.concatenate([self.counts, counts])).astype(np.int64)


def count_days(job: Job, number: int) -> tuple[IntArray, IntArray]:
    """Days (since 1970) of a partition's events, and how many events each has."""
    times = storage.read_table(job.part("events", number), [TIME])[TIME].to_numpy()
    return np.unique(times // (1000 * DAY_S), return_counts=True)


def count_seconds(jobs: tuple[Job, list[int]], number: int) -> tuple[IntArray, IntArray]:
    """Seconds of a partition's events in the given days, and how many events each has."""
    job, days = jobs
    seconds = storage.read_table(job.part("events", number), [TIME])[TIME].to_numpy() // 1000
    return np.unique(seconds[np.isin(seconds // DAY_S, days)], return_counts=True)


def days_of_cuts(days: Counts, shares: tuple[float, float]) -> list[int]:
    """Days that can hold the first second before which the given shares of events have passed: the last day that
    begins before the share has passed, and the one after it."""
    passed = np.concatenate([[0], np.cumsum(days.counts)])[:-1] / days.counts.sum()
    last = np.searchsorted(passed, np.array(shares)) - 1
    places = np.unique(np.clip(np.concatenate([last, last + 1]), 0, len(passed) - 1))
    return [int(d) for d in days.values[places]]


def cuts_of(days: Counts, seconds: Counts, shares: tuple[float, float]) -> tuple[int, int]:
    """The first seconds (as ms) before which the given shares of events have passed, exactly; `seconds` holds those of
    `days_of_cuts`. Raises DataError when the log cannot be cut there."""
    total = int(days.counts.sum())
    before_day = dict(zip(days.values.tolist(), np.concatenate([[0], np.cumsum(days.counts)])[:-1].tolist(), strict=True))
    day = seconds.values // DAY_S
    within = np.cumsum(seconds.counts) - seconds.counts
    first = np.searchsorted(day, day)
    passed = (np.array([before_day[d] for d in day.tolist()]) + within - within[first]) / total
    place = np.minimum(np.searchsorted(passed, np.array(shares)), len(passed) - 1)
    one, two = (int(s) * 1000 for s in seconds.values[place])
    begin = int(seconds.values[0]) if day[0] == days.values[0] else int(days.values[0]) * DAY_S
    if not begin * 1000 < one < two:
        raise DataError(
            f"protocol time: the log's times cannot be cut at shares {list(shares)} "
            f"({len(days.values)} distinct day(s)); use protocol leave_one_out or other shares"
        )
    return one, two


# --------------------------------------------------------------------------- sums over training events


@dataclass(frozen=True)
class Fitted:
    """What one partition says about the training part."""

    items: int
    sample: list[str]
    positives: int
    last_shown: int
    labels: dict[str, NDArray[np.float64]]
    """Label -> count, sum, sum of squares."""
    features: dict[str, pa.Table]
    """What training events say about each feature (feature_fit.py)."""
    attributes: dict[str, list[str]] = field(default_factory=dict)
    """Values of attributes that have no bins."""
    unattributed: int = 0
    """Users that the users table lacks."""


def fit_partition(jobs: tuple[Job, tuple[int, int]], number: int) -> Fitted:
    """Sums over a partition's training events; its distinct items with their counts go to a file."""
    job, cuts = jobs
    events = to_events(job.config, read_events(job, number), job.log_end)
    train = split_events(job.data, events, cuts) == windows.TRAIN
    shown = train & events.is_history
    item_ids, codes = sorted_dictionary(events.item_ids)
    storage.write_table(
        job.work("distinct", f"part-{number:05d}.parquet"), distinct_items(item_ids, codes, train, events.is_history)
    )
    labels = {}
    for name, values in events.labels.items():
        v = values[train & ~np.isnan(values)].astype(np.float64)
        labels[name] = np.array([len(v), v.sum(), (v**2).sum()])
    users, unattributed, attributes = users_of(job, number), 0, {}
    if users is not None:
        known = pc.is_in(events.user_ids, value_set=users["user_id"].combine_chunks())
        unattributed = pc.sum(pc.invert(known)).as_py() or 0
        for name, attribute in job.data.attributes.items():
            if attribute.bins is None:
                attributes[name] = pc.unique(users[attribute.column].drop_null()).to_pylist()
    return Fitted(
        items=len(item_ids),
        sample=sample(item_ids) if len(item_ids) else [],
        positives=int((train & events.is_positive).sum()),
        last_shown=int(events.time[shown].max(initial=0)),
        labels=labels,
        features=_count_features(job.data, events, train),
        attributes=attributes,
        unattributed=unattributed,
    )


def _count_features(data: DataConfig, events: windows.Events, train: NDArray[np.bool_]) -> dict[str, pa.Table]:
    rows, mask, out = events.row[train], pa.array(train), {}
    for name, feature in data.context.items():
        try:
            out[name] = feature_fit.count(feature, events.context[name].filter(mask), rows)
        except FeatureError as error:
            raise DataError(f"data.context.{name}: the column {error}") from None
    return out


def merge(data: DataConfig, parts: list[Fitted]) -> Fitted:
    """What all partitions say together."""

    def together(lists: Iterable[dict[str, list[str]]]) -> dict[str, list[str]]:
        out: dict[str, set[str]] = {}
        for found in lists:
            for name, values in found.items():
                out.setdefault(name, set()).update(values)
        return {name: sorted(values) for name, values in out.items()}

    return Fitted(
        items=sum(p.items for p in parts),
        sample=[],
        positives=sum(p.positives for p in parts),
        last_shown=max((p.last_shown for p in parts), default=0),
        labels={n: np.sum([p.labels[n] for p in parts], axis=0) for n in (parts[0].labels if parts else {})},
        features={n: feature_fit.merge(f, [p.features[n] for p in parts]) for n, f in data.context.items()},
        attributes=together(p.attributes for p in parts),
        unattributed=sum(p.unattributed for p in parts),
    )


def fit_schema(config: RunConfig, fitted: Fitted, n_items: int, n_train_items: int, pseudonym_key: str | None = None) -> LogSchema:
    """Sums -> the fitted transforms. Raises DataError when a task has no training label."""
    data = config.data
    labels = {}
    for name, (n, total, squares) in fitted.labels.items():
        mean = float(total / n) if n else 0.0
        variance = max(float(squares / n) - mean**2, 0.0) if n else 0.0
        labels[name] = LabelStats(count=int(n), mean=mean, std=float(np.sqrt(variance)), values=data.labels[name].values)
    check_labels(config, labels)
    attributes = []
    for name, attribute in data.attributes.items():
        classes = tuple(fitted.attributes.get(name, ())) if attribute.bins is None else bin_names(attribute.bins)
        attributes.append(AttributeSpec(name=name, classes=classes))
    return LogSchema(
        window=data.window,
        same_time=data.same_time,
        exclude_seen=data.exclude_seen,
        protocol=data.protocol,
        actions=tuple(fit_action(n, data.labels[n].values, data.labels[n].kind, labels[n]) for n in data.action_names),
        labels=labels,
        context=_fit_features(data, fitted),
        session_gap_minutes=data.session_gap_minutes,
        attributes=tuple(attributes),
        sensitive=tuple(sorted(data.sensitive_names)),
        pseudonym_key=pseudonym_key,
        n_items=n_items,
        n_train_items=n_train_items,
    )


def check_labels(config: RunConfig, labels: Mapping[str, LabelStats]) -> None:
    """Raises DataError for a label that no training event has, with the tasks that read it."""
    for label, stats in labels.items():
        readers = [f"tasks.{n}" for n, task in config.tasks.items() if label in task.labels_read]
        if readers and not stats.count:
            raise DataError(
                f"{', '.join(readers)}: no training event has the label {label!r}; take the task out, or look at "
                f"data.labels.{label} and the log's column"
            )


def _fit_features(data: DataConfig, fitted: Fitted) -> tuple[FeatureSpec, ...]:
    specs = []
    for name, feature in data.context.items():
        try:
            specs.append(feature_fit.fit(name, feature, fitted.features[name]))
        except FeatureError as error:
            raise DataError(f"data.context.{name}.{error}") from None
    return tuple(specs)


def profile_codes(job: Job, schema: LogSchema, users: pa.Table | None, user_ids: pa.Array) -> dict[str, NDArray[Any]]:
    """Class of every user for every attribute; -1 is missing."""
    out = {}
    for spec in schema.attributes:
        attribute = job.data.attributes[spec.name]
        assert users is not None
        place = pc.index_in(user_ids, value_set=users["user_id"].combine_chunks())
        values = users[attribute.column].combine_chunks().take(place)
        if attribute.bins is None:
            codes = pc.index_in(values, value_set=pa.array(spec.classes, pa.string())).fill_null(-1).to_numpy()
        else:
            numbers = pd.to_numeric(values.to_pandas(), errors="coerce").to_numpy(dtype=np.float64)
            codes = np.where(np.isnan(numbers), -1, np.digitize(numbers, attribute.bins))
        out[spec.name] = codes.astype(np.int32)
    return out
