"""Compare two runs, or two groups of runs over seeds, on the same users: paired differences with intervals.

Both evaluations kept the values of every metric in every resample of users. The same seed draws the same users, so
the difference of two rows is the paired bootstrap. Where a side has several runs, every resample also draws runs of
that side with replacement: seeds are the second level (Davison & Hinkley 1997, §3.8).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtrec_ray import storage
from mtrec_ray.evaluation.evaluate import difference
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER
from mtrec_ray.evaluation.reduce import COUNTS, WHOLE
from mtrec_ray.evaluation.statistics import MIN_USERS, FloatArray


class CompareError(ValueError):
    """Runs that cannot be compared, or a limit that cannot be judged."""


@dataclass(frozen=True)
class Judged:
    """One run's evaluation: `slice|task|metric` -> (R,) values."""

    run: str
    facts: dict[str, Any]
    values: dict[str, FloatArray]


def load(run: str) -> Judged:
    """Read a run directory's evaluation. Raises CompareError when it has none."""
    directory = storage.Directory(storage.join(run, "evaluation"))
    try:
        facts = directory.manifest
    except storage.StorageError as error:
        raise CompareError(f"{run}: no evaluation: {error}; python -m jobs.evaluate makes one") from None
    with np.load(io.BytesIO(storage.read_bytes(directory.path("resamples.npz")))) as arrays:
        return Judged(run, facts, {n: arrays[n].astype(np.float64) for n in arrays.files})


SAME = {
    "data": "other prepared data (data fingerprint)",
    "protocol": "another protocol",
    "seed": "another evaluation.seed, so other users were drawn",
    "resamples": "another evaluation.bootstrap",
    "profile_folds": "other evaluation.profile_folds_test, so profiles were judged on other users",
}


def check_same(runs: Sequence[Judged]) -> None:
    """Raises CompareError when runs do not judge the same users in the same resamples."""
    first = runs[0]
    for other in runs[1:]:
        for key, what in SAME.items():
            theirs, mine = other.facts.get(key), first.facts.get(key)
            if theirs != mine:
                raise CompareError(
                    f"{other.run} has {what}: {str(theirs)[:16]}, {first.run} has {str(mine)[:16]}; a difference would mean nothing"
                )
        known, tasks = first.facts.get("tasks", {}), other.facts.get("tasks", {})
        changed = sorted(n for n in set(known) & set(tasks) if known[n] != tasks[n])
        if changed:
            raise CompareError(
                f"{other.run}: task(s) {changed} mean something else than in {first.run}; compare tasks of one meaning"
            )


def over_seeds(runs: Sequence[Judged], stream: int) -> dict[str, FloatArray]:
    """Mean over the runs of a side; resample b averages runs drawn with replacement. Metrics that all runs have."""
    keys = [k for k in runs[0].values if all(k in r.values for r in runs)]
    if len(runs) == 1:
        return runs[0].values
    R = 1 + int(runs[0].facts["resamples"])
    drawn = np.random.default_rng((int(runs[0].facts["seed"]), stream)).integers(0, len(runs), (R, len(runs)))
    drawn[0] = np.arange(len(runs))
    out = {}
    for key in keys:
        length = min(len(r.values[key]) for r in runs)
        table = np.stack([r.values[key][:length] for r in runs])
        centre = table.mean(0)
        drawn_mean = table[drawn[:length].T, np.arange(length)].mean(0)
        # n of n draws understate the variance between runs by (n - 1) / n
        out[key] = centre + (drawn_mean - centre) * np.sqrt(len(runs) / (len(runs) - 1))
    return out


@dataclass(frozen=True)
class Row:
    """One metric on one slice: B - A."""

    slice: str
    task: str
    metric: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None

    @property
    def name(self) -> str:
        return f"{self.task}/{self.metric}"

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves no doubt."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return ""
        return "better" if (self.low > 0) != (self.metric in LOWER_IS_BETTER) else "worse"


def compare(side_a: Sequence[Judged], side_b: Sequence[Judged]) -> list[Row]:
    """Every metric that both sides have, the whole split first.

    Raises CompareError: other data, protocol, seed or resamples; too few users for any interval.
    """
    check_same([*side_a, *side_b])
    a, b = over_seeds(side_a, 0), over_seeds(side_b, 1)
    rows = []
    for key in a:
        part, task, metric = key.rsplit("|", 2)
        if key not in b or metric in COUNTS:
            continue
        found = difference(b[key], a[key])
        gap, low, high = found["difference"], found["low"], found["high"]
        assert gap is not None
        rows.append(Row(part, task, metric, float(a[key][0]), float(b[key][0]), gap, low, high))
    if not rows:
        raise CompareError("the two sides have no metric in common")
    if all(len(a[k]) == 1 for k in a):
        few = f"there are fewer than {MIN_USERS} test users"
        why = "evaluation.bootstrap is 0" if side_a[0].facts["resamples"] == 0 else few
        raise CompareError(f"{why}: no interval can be given, so nothing can be said about the difference")
    return sorted(rows, key=lambda r: r.slice != WHOLE)


def broken_limits(rows: Sequence[Row], gates: Sequence[str], margin: float) -> list[str]:
    """Sentences about the gated metrics (`task/metric` or `slice|task/metric`) of which B may be worse than A by more
    than the relative margin, by the interval's unfavourable end.

    Raises CompareError when a gated metric or its interval is missing: a limit that cannot be judged is not kept.
    """
    known = {(r.slice, r.name): r for r in rows}
    out = []
    for gate in gates:
        part, _, name = gate.rpartition("|")
        row = known.get((part or WHOLE, name))
        if row is None:
            names = sorted({r.name for r in rows if r.slice == (part or WHOLE)})
            raise CompareError(f"gate {gate!r}: both runs must have measured it; they have {names}")
        if row.low is None or row.high is None:
            raise CompareError(f"gate {gate!r}: no interval, so the limit cannot be judged")
        lost = row.high if row.metric in LOWER_IS_BETTER else -row.low
        allowed = margin * abs(row.a)
        if lost > allowed:
            out.append(
                f"{gate}: B may be worse than A by {lost:.4f}, more than {margin:.1%} of {row.a:.4f} ({allowed:.4f}); "
                f"difference {row.difference:+.4f} [{row.low:+.4f}, {row.high:+.4f}]"
            )
    return out
