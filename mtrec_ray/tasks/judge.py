"""How a kind of task is judged: its labels at a split's moments, its statistics and its metrics.

A judge knows its task's name and configuration, no weights: what it is shown are answers, whoever gave them. Shapes: B
moments, T targets, U users, R = 1 + resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtrec_ray.config import BaseTask
from mtrec_ray.evaluation.statistics import Resampler, Statistics
from mtrec_ray.evaluation.system import Fitted
from mtrec_ray.schema import LogSchema

if TYPE_CHECKING:  # what evaluates stands above the tasks
    from mtrec_ray.evaluation.measure import Moments
    from mtrec_ray.evaluation.reduce import Reduction
    from mtrec_ray.predictor import Predictor
    from mtrec_ray.tasks.base import Task
    from mtrec_ray.training.feed import WindowCache

FloatArray = NDArray[np.float64]
Column = Callable[[str], NDArray[Any]]
"""Name of a column -> its values."""


class Judge:
    """One task of a kind. A kind says here what differs from "not measured"."""

    main: str = "n"
    """The metric that the report shows."""
    nothing: str = "no target with the label"
    """Why a split may give no metric."""
    proportions: bool = False
    """Whether the columns of a label are 0 or 1, and predictions shares."""
    attribute: str | None = None
    """The user's attribute that is told, where it is one: majority and a linear model on the items are its baselines."""

    def __init__(self, name: str, config: Any) -> None:
        self.name, self.config = name, config

    def label(self, column: Column) -> FloatArray | None:
        """What is true of each target, from the targets' columns -> (T,) or (T, C), NaN is missing; None: the kind judges
        no targets."""
        return None

    def truth(self, predictor: Predictor, moments: Moments) -> FloatArray | None:
        """What is true of each moment -> (B, C), a row of NaN is missing; None: the kind needs nothing of the sort."""
        return None

    def columns(self, label: FloatArray, schema: LogSchema) -> FloatArray | None:
        """Labels as numbers that means and gradient boosting can be fitted to -> (T, C); None: they are no baselines."""
        return None

    def assemble(self, column_TC: FloatArray) -> FloatArray:
        """Predictions of such columns -> predictions in the kind's own form."""
        return column_TC[:, 0]

    def fit_baselines(self, predictor: Predictor, train: WindowCache, valid: Moments) -> dict[str, Fitted]:
        """Baselines of the kind's own, by name; valid: the last moment of every user of the valid split."""
        return {}

    def reduce(self, r: Reduction) -> None:
        """Add statistics of one slice of one system to `r`, under names that begin with `self.name/`."""

    def reduce_items(
        self, predictor: Predictor, answers: dict[str, FloatArray], folds: tuple[int, ...], resampler: Resampler
    ) -> Statistics:
        """The same of what is told of items: answers are one system's, task -> (N, C); folds: those that judge."""
        return Statistics()

    def summarise(self, statistics: Statistics, resampler: Resampler) -> dict[str, FloatArray]:
        """Merged statistics -> metric: (R,) values, or (1,) for what is not resampled; empty without anything to judge.

        `n` is what was counted.
        """
        raise NotImplementedError


class LabelJudge(Judge):
    """Of a kind that has one label per target."""

    def label(self, column: Column) -> FloatArray | None:
        return column(f"label_{self.config.label}").astype(np.float64)

    def columns(self, label: FloatArray, schema: LogSchema) -> FloatArray | None:
        return label[:, None]


@dataclass(frozen=True)
class Kind:
    """A kind of task: what it is called, its configuration, its model and its judge."""

    name: str
    config: type[BaseTask]
    task: type[Task]
    judge: Callable[[str, Any], Judge]
    """(name, configuration) -> judge; a class, or a function that chooses one."""
