"""Draws docs/pictures/protocols.svg: `python docs/pictures/protocols.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

TRAIN, VALID, TARGET, UNUSED = "#8b95a3", "#7ea6ea", "#d1495b", "white"
# one letter per event of a user, in time: t train, v valid, x test target; capitals are visible to the ringed target
PANELS = {
    "time": (["tttvx", "TTTVX", " ttv xx", "  t  xx"], "global cuts; every target sees all earlier events of its user"),
    "leave_one_out": (
        ["tttvx", "TTTTVX", "ttvx", "tttttvx"],
        "last positive of every user; others' later events train: time leaks",
    ),
    "user_holdout": (["ttttt", "XXXXX", "tttttt", "vvvv"], "whole users; each event sees the user's earlier ones"),
    "item_holdout": (["ttxtvt", "TTXTvt", "tvtxt", "ttttx"], "whole items; a target sees earlier events on trained items"),
    "random": (
        ["ttxtvt", "TTXTvT", "tvtxt", "xtttt"],
        "events at random; a target sees all training events, later ones too: time leaks",
    ),
}
RINGED = {"time": 4, "leave_one_out": 5, "user_holdout": 3, "item_holdout": 2, "random": 2}
"""Column of the ringed target, in the second row."""

plt.rcParams |= {"svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "svg.hashsalt": "protocols"}
figure, all_axes = plt.subplots(len(PANELS), 1, figsize=(8.6, 8.2))
for axes, (name, (rows, words)) in zip(all_axes, PANELS.items(), strict=True):
    for y, row in enumerate(rows):
        axes.plot((-0.3, 6.6), (-y, -y), color="#e2e6ec", zorder=0)
        for x, event in enumerate(row):
            if event == " ":
                continue
            colour = {"t": TRAIN, "v": VALID, "x": TARGET}[event.lower()]
            seen = y == 1 and event.isupper() and (x < RINGED[name] or (name == "random" and event in "TV"))
            axes.plot(x, -y, "o", markersize=11, color=colour, markeredgecolor="#1c2430" if seen else colour, markeredgewidth=2)
            if y == 1 and x == RINGED[name]:
                axes.plot(x, -y, "o", markersize=18, color="none", markeredgecolor=TARGET, markeredgewidth=1.5)
    if name == "time":
        for cut in (2.5, 3.5):
            axes.axvline(cut, color="#5b6675", linestyle="--", linewidth=1)
    axes.set(xlim=(-0.5, 10.5), ylim=(-3.7, 0.8), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.text(7.0, -0.9, name, fontsize=12, fontweight="bold")
    axes.text(7.0, -1.5, words.replace("; ", ";\n").replace(": ", ":\n"), va="top", color="#5b6675")
handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=n) for n, c in
           (("trained on", TRAIN), ("valid", VALID), ("test target", TARGET))]  # fmt: skip
handles.append(plt.Line2D([], [], marker="o", linestyle="", color=TRAIN, markeredgecolor="#1c2430", markeredgewidth=2,
                          label="visible to the ringed target"))  # fmt: skip
figure.legend(handles=handles, loc="upper center", ncols=4, frameon=False)
figure.text(0.06, 0.02, "each line is a user, time runs to the right", color="#5b6675")
figure.savefig(Path(__file__).with_name("protocols.svg"), bbox_inches="tight", metadata={"Date": None})
