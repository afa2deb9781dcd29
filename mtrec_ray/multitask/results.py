"""Finished cells -> gains with paired intervals over users and seeds, and what the seesaw gate says.

Every cell kept its test metrics in the same resamples of users, so gains are paired. Where there are several seeds, a
resample draws them too (`evaluation.compare.over_seeds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrec_ray.config import RunConfig
from mtrec_ray.evaluation.compare import Judged, over_seeds
from mtrec_ray.evaluation.statistics import interval
from mtrec_ray.multitask.objective import gains, relative_gain

Found = dict[str, Any]
"""The content of a finished cell."""


def test_values(cells: Sequence[Found], config: RunConfig, stream: int) -> dict[str, NDArray[np.float64]]:
    """Task -> (R,) test metric, mean over the cells' seeds; row 0 is the data as they are."""
    facts = {"resamples": config.evaluation.bootstrap, "seed": config.evaluation.seed}
    values = [{t: np.array(v, np.float64) for t, v in c["resamples"].items()} for c in cells]
    return over_seeds([Judged(c["cell"]["name"], facts, v) for c, v in zip(cells, values, strict=True)], stream) if cells else {}


def gain_resamples(
    new: Mapping[str, NDArray[np.float64]], old: Mapping[str, NDArray[np.float64]], metrics: Mapping[str, str]
) -> dict[str, NDArray[np.float64]]:
    """Task -> (R,) relative gain of new over old, for the tasks that both have."""
    out = {}
    for task in metrics:  # in the declared order
        if task in new and task in old:
            n = min(len(new[task]), len(old[task]))
            out[task] = relative_gain(new[task][:n], old[task][:n], metrics[task])
    return out


def row(gain_R: NDArray[np.float64], **more: Any) -> dict[str, Any]:
    """gain with its 95 % interval; None where there is no number."""
    ends = interval(gain_R)
    value = float(gain_R[0]) if len(gain_R) and np.isfinite(gain_R[0]) else None
    return {"gain": value, "low": ends and ends[0], "high": ends and ends[1], **more}


def compare_cells(new: Sequence[Found], old: Sequence[Found], config: RunConfig, metrics: Mapping[str, str]) -> dict[str, Any]:
    """Relative test gains of some cells (seeds of one model) over others, per task, and their mean over tasks."""
    a, b = test_values(old, config, 0), test_values(new, config, 1)
    return summarise_gains(gain_resamples(b, a, metrics), a, b)


def summarise_gains(
    found: Mapping[str, NDArray[np.float64]], a: Mapping[str, NDArray[np.float64]], b: Mapping[str, NDArray[np.float64]]
) -> dict[str, Any]:
    tasks = {t: row(g, reference=float(a[t][0]), value=float(b[t][0])) for t, g in found.items()}
    usable = {t: g for t, g in found.items() if np.isfinite(g[0])}
    usable = {t: g for t, g in usable.items() if len(g) > 1} or usable  # one task without resamples must not take them all
    shortest = min((len(g) for g in usable.values()), default=0)
    mean_R = np.mean([g[:shortest] for g in usable.values()], axis=0) if usable else np.full(1, np.nan)
    return {"tasks": tasks, "mean": row(mean_R, tasks=list(usable))}


def valid_gains(new: Found | None, reference: Mapping[str, float], metrics: Mapping[str, str]) -> dict[str, float]:
    """Task -> relative gain on valid; empty for a cell that failed."""
    return {} if new is None else gains(new["valid"], reference, metrics)


def gradients(cell: Found | None) -> dict[str, Any]:
    """Norms and cosines of the tasks' gradients per epoch, and their means over training; empty without a record."""
    records = [] if cell is None else [r for r in cell["gradients"] if r]
    if not records:
        return {}
    names = sorted({n for r in records for n in r})

    def over_training(kind: str) -> dict[str, list[float | None]]:
        return {n.removesuffix(f"/{kind}"): [r.get(n) for r in records] for n in names if n.endswith(f"/{kind}")}

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return float(np.mean(known)) if known else None

    norm, cosine = over_training("norm"), over_training("cosine")
    return {
        "epochs": len(records), "norm": norm, "cosine": cosine,
        "mean_norm": {n: mean(v) for n, v in norm.items()}, "mean_cosine": {n: mean(v) for n, v in cosine.items()},
    }  # fmt: skip


def seesaw(joint: Mapping[str, Any], allowed: float) -> tuple[list[str], list[str]]:
    """(sentences about tasks that the joint model may lose more than the allowed share on, those that cannot be judged).

    Judged by the interval's unfavourable end, as in jobs.compare.
    """
    broken, unknown = [], []
    for task, g in joint["tasks"].items():
        if g["gain"] is None or g["low"] is None:
            unknown.append(f"{task}: no interval (fewer than ten test users, no resamples, or a reference of 0)")
        elif g["low"] < -allowed:
            broken.append(
                f"{task}: the joint model may be worse than the single-task model by {-g['low']:.1%}, more than {allowed:.1%}; "
                f"gain {g['gain']:+.1%} [{g['low']:+.1%}, {g['high']:+.1%}]"
            )
    return broken, unknown
