"""tune.html: learning curves, value against every searched key, tables. Needs the extra `report` (matplotlib)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt

from mtrec_ray.evaluation import figures as f
from mtrec_ray.tuning.trials import Finalist, Trial, finalist_table, ranked, shown, summary, table

CSS = """
body {font: 15px/1.5 sans-serif; color: #1c2430; max-width: 70rem; margin: 2rem auto; padding: 0 1rem}
table {border-collapse: collapse; font-size: 13px; margin: 1rem 0; display: block; overflow-x: auto}
td, th {padding: .2rem .6rem; border-bottom: 1px solid #e2e6ec; text-align: left; white-space: nowrap}
.n {text-align: right} .own {background: #eef4ff} svg {max-width: 100%; height: auto} p {color: #5b6675}
"""


def page(name: str, trials: Sequence[Trial], finalists: Sequence[Finalist]) -> str:
    """One self-contained page; at least one trial has succeeded."""
    best, monitor = ranked(trials)[0], trials[0].monitor
    start = trials[0]
    parts = [
        f"<h1>Tuning {escape(name)}</h1>",
        f"<p>{len(trials)} trials: {summary(trials)}. All numbers are on valid; the test split was not looked at. Blue: the best "
        f"trial ({best.number}). Black: the start, the configuration as it was"
        + (f" ({start.value:.4f})" if start.value is not None else "")
        + ".</p>",
        f"<h2>{escape(monitor)} by epoch</h2>{curves(trials, best)}",
        "<p>A line that ends early was stopped, since two thirds or so of the trials were better at that epoch.</p>",
        f"<h2>Best value against each key</h2>{scatters(trials, best)}",
        "<p>Full dots were trained to the end, open ones were stopped early.</p>",
    ]
    if finalists:
        rows = finalist_table(finalists)
        parts.append(f"<h2>Finalists, retrained with other seeds</h2>{f.html_table(rows[0], rows[1:])}")
    rows = table(trials, len(trials), values=True)
    parts.append(f"<h2>Trials</h2>{f.html_table(rows[0], rows[1:])}")
    failed = [[t.name, t.state, t.message] for t in trials if t.message]
    if failed:
        parts.append(f"<h2>Failed and refused</h2>{f.html_table(['trial', 'state', 'why'], failed)}")
    return f"<!doctype html><meta charset=utf-8><title>Tuning {escape(name)}</title><style>{CSS}</style>{''.join(parts)}"


def _look(trial: Trial, best: Trial) -> tuple[str, float, int]:
    """Colour, width, layer."""
    if trial is best:
        return f.ACCENT, 2.4, 4
    return ("#1c2430", 1.8, 3) if trial.number == 0 else (f.SOFT, 0.9, 2)


def curves(trials: Sequence[Trial], best: Trial) -> str:
    """The monitored value of every trial by epoch."""
    with plt.rc_context(f.STYLE):
        figure, axes = plt.subplots(figsize=(9, 3.6))
        for trial in trials:
            points = [(e.epoch, e.valid[trial.monitor]) for e in trial.history if trial.monitor in e.valid]
            if points:
                colour, width, layer = _look(trial, best)
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=width, zorder=layer)
        axes.set(xlabel="epoch", ylabel=f"valid {best.monitor}")
        return f.svg(figure)


def scatters(trials: Sequence[Trial], best: Trial) -> str:
    """Best value against each searched key; numbers that span a decade on a logarithmic axis."""
    keys, there = list(best.values), [t for t in trials if t.succeeded]
    columns = min(3, len(keys))
    with plt.rc_context(f.STYLE):
        count = math.ceil(len(keys) / columns)
        figure, all_axes = plt.subplots(count, columns, figsize=(3.4 * columns, 2.5 * count), squeeze=False, sharey=True)
        for axes, key in zip(all_axes.flat, keys, strict=False):
            values = [t.values[key] for t in there]
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            names = sorted({str(shown(v)) for v in values})
            for trial, value in zip(there, values, strict=True):
                colour, width, layer = _look(trial, best)
                face = "none" if trial.state == "stopped" else colour
                x = value if numbers else names.index(str(shown(value)))
                axes.plot(x, trial.value, "o", color=colour, markerfacecolor=face, markersize=3.5 + width, zorder=layer)
            if not numbers:
                axes.set_xticks(range(len(names)), names, fontsize=8)
            elif min(values) > 0 and max(values) / min(values) >= 10:
                axes.set_xscale("log")
            axes.set_xlabel(key)
        for axes in list(all_axes.flat)[len(keys) :]:
            axes.set_visible(False)
        figure.tight_layout()
        return f.svg(figure)
