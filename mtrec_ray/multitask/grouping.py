"""Which tasks to train together: affinities from measured groups, and the best partition of the tasks by them.

A model of a group of tasks gives every task of the group a gain over its single-task model. Some groups were measured
(all tasks; all but one; pairs, where wanted). The gain of task t in any other group G is predicted as the sum of
affinities Σ a[s, t] over the other tasks s of G, fitted by least squares to all measured groups that hold t: a linear
surrogate as in Li, Nguyen & Zhang 2023 (arXiv 2303.14582); its empty sum is the single-task model itself. Standley et al.
2020 (arXiv 1905.07553) predict larger groups by the mean over trained pairs, Fifty et al. 2021 (TAG, arXiv 2109.04617) get
affinities from one run by looking one step ahead. As in both, the partition is then found exactly; here by dynamic
programming over subsets, for every number of groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_TASKS = 12
"""More would take minutes: the search looks at 3^T pairs of subsets."""
TOLERANCE = 0.005
"""Mean relative gain that a further model must bring to be worth its trunk pass."""

Group = frozenset[str]
Splits = dict[int, tuple[float, tuple[int, ...]]]
"""Subset of the tasks, as bits -> (sum of gains, its groups)."""
Measured = Mapping[Group, Mapping[str, float]]
"""Group -> task -> relative gain over the single-task model."""


def affinities(tasks: Sequence[str], measured: Measured) -> NDArray[np.float64]:
    """affinity_TT: row s, column t is what s brings to t; the diagonal is 0.

    Where the measured groups leave a choice, the smallest affinities are taken (minimum norm).
    """
    T = len(tasks)
    out = np.zeros((T, T))
    for column, task in enumerate(tasks):
        others = [i for i in range(T) if i != column]
        rows = [(g, m[task]) for g, m in measured.items() if task in m and len(g) > 1]
        if not rows or not others:
            continue
        member = np.array([[float(tasks[i] in g) for i in others] for g, _ in rows])
        out[others, column] = np.linalg.lstsq(member, np.array([gain for _, gain in rows]), rcond=None)[0]
    return out


@dataclass(frozen=True)
class Partition:
    """Tasks in groups, each a model of its own."""

    groups: tuple[tuple[str, ...], ...]
    mean_gain: float
    """Over tasks, relative to single-task models, as far as it is known or predicted."""
    measured: bool
    """Whether every group was trained, so that nothing is predicted."""

    def words(self) -> str:
        return " | ".join(" + ".join(g) for g in self.groups)

    def facts(self) -> dict[str, Any]:
        return {"groups": [list(g) for g in self.groups], "mean_gain": self.mean_gain, "measured": self.measured}


def best_partitions(tasks: Sequence[str], affinity_TT: NDArray[np.float64], measured: Measured) -> list[Partition]:
    """The best partition into 1, 2, ... T groups.

    Raises ValueError for more than MAX_TASKS tasks.
    """
    T = len(tasks)
    if T > MAX_TASKS:
        raise ValueError(f"{T} tasks: the search for groups takes at most {MAX_TASKS}; leave some out")

    def members(mask: int) -> list[int]:
        return [i for i in range(T) if mask >> i & 1]

    def known(mask: int) -> bool:
        names = [tasks[i] for i in members(mask)]
        return len(names) == 1 or all(n in measured.get(frozenset(names), {}) for n in names)

    score = np.zeros(1 << T)
    for mask in range(1, 1 << T):
        inside = members(mask)
        trained = measured.get(frozenset(tasks[i] for i in inside), {})
        if len(inside) > 1:
            score[mask] = sum(trained.get(tasks[i], affinity_TT[inside, i].sum()) for i in inside)
    full = (1 << T) - 1
    best: Splits = {mask: (float(score[mask]), (mask,)) for mask in range(1, full + 1)}  # with one group
    out = []
    for count in range(1, T + 1):
        total, groups = best[full]
        names = tuple(tuple(tasks[i] for i in members(g)) for g in groups)
        out.append(Partition(names, total / T, all(known(g) for g in groups)))
        if count < T:
            best = _one_group_more(best, score, full)
    return out


def _one_group_more(best: Splits, score: NDArray[np.float64], full: int) -> Splits:
    """Best split of every subset into one group more: its group with the subset's first task, and the best rest."""
    out: Splits = {}
    for mask in range(1, full + 1):
        first = mask & -mask
        rest = mask ^ first
        other = rest
        while other:  # every non-empty part of the rest that does not share the first task's group
            if other in best:
                total, groups = best[other]
                group = mask ^ other
                value = float(score[group]) + total
                if mask not in out or value > out[mask][0]:
                    out[mask] = (value, (group, *groups))
            other = (other - 1) & rest
    return out


def recommend(partitions: Sequence[Partition], tolerance: float = TOLERANCE) -> Partition:
    """The fewest groups that come within the tolerance of the best partition."""
    top = max(p.mean_gain for p in partitions)
    return next(p for p in partitions if p.mean_gain >= top - tolerance)
