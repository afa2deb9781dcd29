"""Pictures of the report, as SVG text. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

ACCENT, SOFT, LINE = "#1f5fd0", "#8b95a3", "#e2e6ec"
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": SOFT, "axes.labelcolor": "#5b6675", "xtick.color": "#5b6675", "ytick.color": "#1c2430", "axes.grid": True,
    "grid.color": LINE, "axes.axisbelow": True, "svg.hashsalt": "mtrec_ray",
}  # fmt: skip

Dot = tuple[str, float, tuple[float, float] | None, bool]
"""(label, value, interval, own)"""


def svg(figure: Figure) -> str:
    """The figure as an SVG element."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def dots(rows: Sequence[Dot], label: str, width: float = 9.0) -> str:
    """Values with intervals, one a line, the first on top."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(width, 0.5 + 0.27 * len(rows)))
        for y, (_, value, ends, own) in enumerate(reversed(rows)):
            colour = ACCENT if own else SOFT
            if ends is not None:
                axes.plot(ends, (y, y), color=colour, linewidth=2.2, alpha=0.55, solid_capstyle="round")
            axes.plot(value, y, "o", color=colour, markersize=7)
            axes.annotate(f"{value:.3f}", (value, y), (0, 6), textcoords="offset points", ha="center", fontsize=8, color=colour)
        axes.set_yticks(range(len(rows)), [r[0] for r in reversed(rows)])
        axes.set_ylim(-0.7, len(rows) - 0.2)
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(label)
        return svg(figure)


def calibration(curves: dict[str, NDArray[np.float64]]) -> str:
    """Reliability curves: task -> (bins, 3) counts, labels, predictions."""
    with plt.rc_context(STYLE):
        figure, all_axes = plt.subplots(1, len(curves), figsize=(4.4 * len(curves), 3.4), squeeze=False)
        for axes, (task, curve) in zip(all_axes[0], curves.items(), strict=True):
            count = curve[:, 0]
            there = count > 0
            axes.bar((np.arange(len(count)) + 0.5) / len(count), count / count.sum(), 0.9 / len(count), color=LINE)
            axes.plot((0, 1), (0, 1), "--", color=SOFT, linewidth=1)
            axes.plot(curve[there, 2] / count[there], curve[there, 1] / count[there], "o-", color=ACCENT)
            axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted", ylabel="happened", title=task)
        figure.tight_layout()
        return svg(figure)


def confusion(tables: Mapping[str, tuple[NDArray[np.float64], Sequence[str]]]) -> str:
    """Profile task -> (counts label × guess, names of the classes)."""
    with plt.rc_context(STYLE | {"axes.grid": False}):
        widths = [1.6 + 0.32 * len(names) for _, names in tables.values()]
        figure, all_axes = plt.subplots(
            1, len(tables), figsize=(sum(widths) + 0.8, max(widths) * 0.92), squeeze=False, gridspec_kw={"width_ratios": widths}
        )
        for axes, (task, (counts, names)) in zip(all_axes[0], tables.items(), strict=True):
            share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
            small = len(names) > 8
            if not small:
                for i, j in np.ndindex(*share.shape):
                    axes.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", fontsize=8,
                              color="white" if share[i, j] > 0.55 else "#1c2430")  # fmt: skip
            size = 7 if small else 9
            axes.set_xticks(range(len(names)), names, rotation=90 if small else 0, fontsize=size)
            axes.set_yticks(range(len(names)), names, fontsize=size)
            axes.set(title=task, xlabel="guessed", ylabel="is")
        figure.tight_layout()
        return svg(figure)


def activity(day: NDArray[np.int64], counts: dict[str, NDArray[np.int64]]) -> str:
    """Events per day, stacked by split. day: days since 1970."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 2.7))
        dates = day.astype("datetime64[D]")
        below = np.zeros(len(day))
        for (name, count), colour in zip(counts.items(), (SOFT, "#7ea6ea", ACCENT), strict=False):
            axes.fill_between(dates, below, below + count, step="mid", color=colour, label=name, linewidth=0)
            below = below + count
        axes.legend(frameon=False, fontsize=8)
        axes.set_ylabel("events a day")
        axes.tick_params(axis="x", rotation=30, labelsize=8)
        return svg(figure)


def popularity(count: NDArray[np.float64]) -> str:
    """Share of training events by the most popular share of the items."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(4.4, 2.7))
        ordered = np.sort(count)[::-1]
        share = np.cumsum(ordered) / max(ordered.sum(), 1)
        axes.plot(np.arange(1, len(share) + 1) / len(share), share, color=ACCENT, linewidth=2)
        axes.plot((0, 1), (0, 1), "--", color=SOFT, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="share of the items, most popular first", ylabel="share of events")
        return svg(figure)


def training(losses: Mapping[str, Sequence[float]], monitor: str, monitored: tuple[Sequence[float], Sequence[float]]) -> str:
    """Losses per epoch as shares of their first value, and the monitored metric (epochs, values)."""
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, height_ratios=(3, 2))
        for task, values in losses.items():
            epochs = np.arange(1, len(values) + 1)
            top.plot(epochs, np.asarray(values) / values[0], label=task, linewidth=1.6)
        top.legend(frameon=False, fontsize=8, ncols=4)
        top.set_ylabel("loss ÷ first loss")
        bottom.plot(*monitored, color=ACCENT, linewidth=2)
        bottom.set(xlabel="epoch", ylabel=f"valid {monitor}")
        return svg(figure)


def html_table(header: Sequence[str], rows: Sequence[Sequence[Any]], own: int | None = None) -> str:
    """A table; cells that are numbers or end like numbers stand right. own: the row to set off."""
    from html import escape

    def cell(value: Any, tag: str, right: bool) -> str:
        return f"<{tag}{' class=n' if right else ''}>{escape(str(value))}</{tag}>"

    right = [i > 0 and all(not str(r[i]) or str(r[i])[0] in "0123456789+-–.[" for r in rows) for i in range(len(header))]
    out = ["<table><tr>" + "".join(cell(h, "th", r) for h, r in zip(header, right, strict=True)) + "</tr>"]
    for number, row in enumerate(rows):
        mark = " class=own" if number == own else ""
        out.append(f"<tr{mark}>" + "".join(cell(v, "td", r) for v, r in zip(row, right, strict=True)) + "</tr>")
    return "".join(out) + "</table>"
