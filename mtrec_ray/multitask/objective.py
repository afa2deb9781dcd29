"""What a task is judged by: one metric for each kind, its direction, and gains relative to a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtrec_ray.config import BaseTask, ItemAttributeTask, ProfileTask, RunConfig
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER, RANKING
from mtrec_ray.schema import LogSchema
from mtrec_ray.tasks import KINDS

METRICS: dict[str, tuple[str, ...]] = {
    "retrieval": ("ndcg@10", *(n for n in RANKING if n != "ndcg@10"), "final_ndcg@10", "final_hr@10", "final_mrr"),
    "regression": ("rmse", "mae"),
    "binary": ("auc", "user_auc", "logloss", "normalised_entropy"),
    "similarity": ("hit@10",),
    "profile": ("macro_f1", "accuracy", "auc"),
    "multiclass": ("macro_f1", "accuracy", "logloss"),
    "multilabel": ("macro_auc", "micro_auc", "logloss"),
}
"""Kind of a task -> metrics that it can be judged by; the first is the default. Other kinds: what the report shows of them."""
INTEREST = ("hit@1", "logloss", "kl")
"""Those of a profile that tells an interest."""
ITEM_ATTRIBUTE = {"categorical": ("accuracy", "macro_f1"), "multihot": ("macro_auc", "micro_auc")}
"""Those of an item_attribute, by the kind of its column."""


class MetricError(ValueError):
    """A metric that a task cannot be judged by; the message names the flag and what there is."""


def check_choices(config: RunConfig, chosen: Sequence[str]) -> dict[str, str]:
    """`TASK=METRIC`, ... -> task: metric. Raises MetricError for an unknown task or metric."""
    out = {}
    for choice in chosen:
        task, mark, metric = choice.partition("=")
        if not mark or task not in config.tasks:
            raise MetricError(f"--metric {choice!r}: expected TASK=METRIC with a task of {list(config.tasks)}")
        known = _known(task, config)
        if metric not in known:
            raise MetricError(f"--metric {choice!r}: {task} is of kind {config.tasks[task].kind}, which has {list(known)}")
        out[task] = metric
    return out


def choose_metrics(config: RunConfig, schema: LogSchema, chosen: Sequence[str] = ()) -> dict[str, str]:
    """Task -> metric: the defaults of the kinds, and what `--metric TASK=METRIC` says.

    Raises MetricError for an unknown task or metric.
    """
    out = {name: _default(name, config, schema) for name in config.tasks} | check_choices(config, chosen)
    for name, metric in out.items():
        classes = _classes(config.tasks[name], schema)
        if metric == "auc" and classes > 2:
            raise MetricError(
                f"--metric '{name}=auc': {name} tells {classes} classes, and auc needs two; take macro_f1 or accuracy"
            )
    return out


def _default(name: str, config: RunConfig, schema: LogSchema) -> str:
    task = config.tasks[name]
    if _classes(task, schema) == 2:
        return "auc"
    return _known(name, config)[0]


def _classes(task: BaseTask, schema: LogSchema) -> int:
    """Of the user's attribute that a profile tells; 0 for all other tasks."""
    if not isinstance(task, ProfileTask) or task.attribute is None:
        return 0
    return len(next(a.classes for a in schema.attributes if a.name == task.attribute))


def _known(name: str, config: RunConfig) -> tuple[str, ...]:
    task = config.tasks[name]
    if isinstance(task, ProfileTask) and task.interest is not None:
        return INTEREST
    if isinstance(task, ItemAttributeTask):
        return ITEM_ATTRIBUTE[config.data.item_features[task.column].kind]
    return METRICS.get(task.kind) or (KINDS[task.kind].judge(name, task).main,)


def relative_gain(value: NDArray[np.float64], reference: NDArray[np.float64], metric: str) -> NDArray[np.float64]:
    """How much better than the reference, as a share of the reference; below 0 is worse. NaN where the reference is 0."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    value, reference = np.broadcast_arrays(np.asarray(value, np.float64), np.asarray(reference, np.float64))
    out = np.full(value.shape, np.nan)
    return np.divide(sign * (value - reference), np.abs(reference), out=out, where=reference != 0)


def gains(values: Mapping[str, float], reference: Mapping[str, float], metrics: Mapping[str, str]) -> dict[str, float]:
    """Task -> relative gain, for the tasks that both have and whose reference is not 0."""
    found = {t: float(relative_gain(np.array(values[t]), np.array(reference[t]), metrics[t])) for t in values if t in reference}
    return {t: g for t, g in found.items() if np.isfinite(g)}


def mean_gain(values: Mapping[str, float], reference: Mapping[str, float], metrics: Mapping[str, str]) -> float | None:
    """Mean of the relative gains over tasks (Δ of Maninis et al. 2019, arXiv 1904.08918); None without any."""
    found = gains(values, reference, metrics)
    return float(np.mean(list(found.values()))) if found else None
