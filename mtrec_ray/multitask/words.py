"""What a study found, in sentences: for the page and for the terminal."""

from __future__ import annotations

from typing import Any


def sentences(study: dict[str, Any]) -> list[str]:
    """What was found, in words."""
    joint, grouping, grid = study["joint"], study["grouping"], study["grid"]
    better = [t for t, g in joint["tasks"].items() if g["low"] is not None and g["low"] > 0]
    worse = [t for t, g in joint["tasks"].items() if g["high"] is not None and g["high"] < 0]
    unsure = [t for t in joint["tasks"] if t not in (*better, *worse)]
    runs = f"{len(study['seeds'])} seeds" if len(study["seeds"]) > 1 else "one seed"
    out = [
        f"Against single-task models under the same budget ({study['settings']['epochs']} epochs, {runs}), the joint model is "
        f"better at {_listed(better)}, worse at {_listed(worse)}, and not clearly different at {_listed(unsure)}."
    ]
    if joint["mean"]["gain"] is not None:
        out.append(f"Mean over tasks: {_gain(joint['mean'])}.")
    harmful = [
        f"{left} to {task}" for left, found in study["leave_one_out"].items() for task, g in found["tasks"].items()
        if g["high"] is not None and g["high"] < 0
    ]  # fmt: skip
    helpful = [
        f"{left} to {task}" for left, found in study["leave_one_out"].items() for task, g in found["tasks"].items()
        if g["low"] is not None and g["low"] > 0
    ]  # fmt: skip
    out.append(f"Leaving one task out (one seed): clear help of {_listed(helpful)}; clear harm of {_listed(harmful)}.")
    models = grouping["recommended"]
    words = " | ".join(" + ".join(g) for g in models)
    out.append("Recommended: one model for all tasks." if len(models) == 1 else f"Recommended: {len(models)} models: {words}.")
    over = grouping["over_together"]
    if over and over["mean"]["gain"] is not None:
        sure = over["mean"]["low"] is not None and over["mean"]["low"] > 0
        out.append(f"On test they gain {_gain(over['mean'])} over one model" + ("." if sure else ": the test does not confirm it."))
    if grid.get("best"):
        chosen = " with ".join(grid["recommended"])
        if grid["recommended"] == grid["plain"]:
            out.append(f"Of sharing × balancing, the plain sum ({chosen}) is recommended: nothing is clearly better on valid.")
        else:
            over = _gain(grid["over_plain"]["mean"])
            out.append(f"Of sharing × balancing, {chosen} is recommended; on test it gains {over} over the plain sum.")
    return out


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def _gain(g: dict[str, Any]) -> str:
    if g["gain"] is None:
        return "no number"
    ends = "no interval" if g["low"] is None else f"95 % interval {g['low']:+.1%} to {g['high']:+.1%}"
    return f"{g['gain']:+.1%} ({ends})"


def table(found: dict[str, Any]) -> str:
    """The end of a study on a terminal."""
    lines = [f"{'task':20} {'metric':12} {'alone':>9} {'together':>9} {'gain':>8}  95 % interval"]
    for task, g in found["joint"]["tasks"].items():
        gain = "" if g["gain"] is None else f"{g['gain']:+.2%}"
        ends = "no interval" if g["low"] is None else f"[{g['low']:+.2%}, {g['high']:+.2%}]"
        metric = found["tasks"][task]["metric"]
        lines.append(f"{task:20} {metric:12} {g['reference']:9.4f} {g['value']:9.4f} {gain:>8}  {ends}")
    return "\n".join([*lines, *sentences(found)])
