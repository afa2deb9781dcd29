"""Pictures of the conflict report, as SVG text. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

from mtrec_ray.evaluation.figures import ACCENT, LINE, SOFT, STYLE, svg

GOOD, BAD = "#1f7a4d", "#b3372f"
DIVERGING = "RdBu"


def _heat(axes: Any, value: NDArray[np.float64], limit: float, form: str, marked: NDArray[np.bool_] | None = None) -> None:
    """A heat map with its numbers written in; NaN stays empty. marked: numbers in bold."""
    axes.imshow(np.ma.masked_invalid(value), cmap=DIVERGING, vmin=-limit, vmax=limit)
    for i, j in np.ndindex(*value.shape):
        if np.isfinite(value[i, j]):
            bold = marked is not None and bool(marked[i, j])
            dark = abs(value[i, j]) > 0.6 * limit
            axes.text(j, i, format(value[i, j], form), ha="center", va="center", fontsize=9, color="white" if dark else "#1c2430",
                      fontweight="bold" if bold else "normal")  # fmt: skip


def _ticks(axes: Any, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)


def matrix(
    rows: Sequence[str], columns: Sequence[str], value: NDArray[np.float64], labels: tuple[str, str], form: str = "+.1%",
    marked: NDArray[np.bool_] | None = None,
) -> str:  # fmt: skip
    """A heat map around 0. labels: what columns and rows are."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(2.2 + 0.85 * len(columns), 1.3 + 0.5 * len(rows)))
        limit = float(np.nanmax(np.abs(value))) if np.isfinite(value).any() else 1.0
        _heat(axes, value, max(limit, 1e-3), form, marked)
        _ticks(axes, rows, columns)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.set_aspect("auto")
        return svg(figure)


def cosines(tasks: Sequence[str], mean: Mapping[str, float | None], curves: Mapping[str, Sequence[float | None]]) -> str:
    """Task × task: above the diagonal the mean cosine of the gradients, below it the cosine over training (-1 to 1).

    mean and curves by `a|b`.
    """
    with plt.rc_context(STYLE | {"axes.grid": False}):
        T = len(tasks)
        figure, axes = plt.subplots(figsize=(2.2 + 0.95 * T, 1.3 + 0.7 * T))
        value = np.full((T, T), np.nan)
        for name, cosine in mean.items():
            i, j = sorted(tasks.index(t) for t in name.split("|"))
            if cosine is not None:
                value[i, j] = cosine
        _heat(axes, value, 1.0, "+.2f")
        for name, curve in curves.items():
            i, j = sorted(tasks.index(t) for t in name.split("|"))
            y = np.array([np.nan if c is None else c for c in curve])
            x = i - 0.42 + 0.84 * (np.arange(len(y)) / max(1, len(y) - 1))
            axes.plot((i - 0.42, i + 0.42), (j, j), color=LINE, linewidth=1)
            axes.plot(x, j - 0.42 * y, color=ACCENT, linewidth=1.3, marker="." if len(y) < 3 else None)
        _ticks(axes, tasks, tasks)
        axes.set(xlim=(-0.5, T - 0.5), ylim=(T - 0.5, -0.5))
        axes.set_aspect("auto")
        return svg(figure)


def norms(curves: Mapping[str, Sequence[float | None]]) -> str:
    """Gradient norms per epoch, on a logarithmic axis."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 2.9))
        for task, curve in curves.items():
            y = np.array([np.nan if c is None or c <= 0 else c for c in curve])
            axes.plot(np.arange(1, len(y) + 1), y, label=task, linewidth=1.6, marker="." if len(y) < 3 else None)
        axes.set_yscale("log")
        axes.set(xlabel="epoch", ylabel="norm of the gradient")
        axes.legend(frameon=False, fontsize=8, ncols=4)
        return svg(figure)


def gains(rows: Sequence[tuple[str, Mapping[str, Any]]], label: str, limit: float | None = None) -> str:
    """Relative gains with intervals around 0, one a line. limit: the loss that the gate allows."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 0.8 + 0.36 * len(rows)))
        axes.axvline(0, color=SOFT, linewidth=1)
        if limit is not None:
            axes.axvline(-100 * limit, color=BAD, linewidth=1, linestyle="--")
        for y, (_, g) in enumerate(reversed(rows)):
            if g["gain"] is None:
                axes.annotate("no number", (0, y), (4, -3), textcoords="offset points", fontsize=8, color=SOFT)
                continue
            sure = g["low"] is not None and not g["low"] <= 0 <= g["high"]
            colour = SOFT if not sure else GOOD if g["gain"] > 0 else BAD
            if g["low"] is not None:
                axes.plot((100 * g["low"], 100 * g["high"]), (y, y), color=colour, linewidth=2.2, alpha=0.55)
            axes.plot(100 * g["gain"], y, "o", color=colour, markersize=7)
            axes.annotate(
                f"{g['gain']:+.1%}", (100 * g["gain"], y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=colour
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.2)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        return svg(figure)
