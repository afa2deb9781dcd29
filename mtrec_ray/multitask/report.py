"""tasks.html: the study on one self-contained page. Needs the extra `report` (matplotlib, jinja2)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mtrec_ray.evaluation.figures import html_table
from mtrec_ray.multitask import figures as f
from mtrec_ray.multitask.grouping import TOLERANCE
from mtrec_ray.multitask.words import sentences

TEMPLATE = Path(__file__).with_name("tasks.html.jinja")
DECIDED = {"together": "one model for all tasks", "groups": "the groups of the screen", "alone": "one model per task"}


def render(study: dict[str, Any]) -> str:
    """The content of tasks.json -> HTML."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape
    from markupsafe import Markup

    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=select_autoescape(["jinja"]))
    tasks = list(study["tasks"])
    pictures = {
        "cosines": _cosines(study, tasks), "norms": _norms(study),
        "joint": f.gains(_gain_rows(study["joint"], study), "relative gain over one model per task, %", study["seesaw"]["allowed"]),
        "leave_one_out": _leave_one_out(study, tasks),
        "affinity": _affinity(study, tasks),
        "grid": _grid(study), "grid_tasks": _grid_tasks(study, tasks),
        "over_together": _over(study["grouping"]["over_together"], study, "relative gain of the groups over one model, %"),
        "over_plain": _over(study["grid"].get("over_plain"), study, "relative gain over the plain sum, %"),
    }  # fmt: skip
    tables = {
        "joint": html_table(["task", "metric", "alone", "together", "gain", "95 % interval"], _joint_rows(study)),
        "partitions": html_table(["models", "groups", "mean gain on valid", ""], _partition_rows(study)),
        "candidates": html_table(["", "groups", "models", "mean gain on valid"], _candidate_rows(study)),
        "cells": html_table(["cell", "best epoch", "seconds", "mean gain on valid", "test"], _cell_rows(study)),
    }  # fmt: skip
    return environment.get_template(TEMPLATE.name).render(
        study=study,
        settings=study["settings"],
        figures={n: Markup(v) for n, v in pictures.items()},
        tables={n: Markup(v) for n, v in tables.items()},
        sentences=sentences(study),
        tolerance=f"{TOLERANCE:.1%}",
    )


def _gain_rows(found: dict[str, Any], study: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    rows = [(f"{t} {study['tasks'][t]['metric']}", g) for t, g in found["tasks"].items()]
    return [*rows, ("mean over tasks", found["mean"])]


def _over(found: dict[str, Any] | None, study: dict[str, Any], label: str) -> str:
    return f.gains(_gain_rows(found, study), label) if found else ""


def _cosines(study: dict[str, Any], tasks: list[str]) -> str:
    found = study["gradients"]
    return f.cosines(tasks, found["mean_cosine"], found["cosine"]) if found else ""


def _norms(study: dict[str, Any]) -> str:
    found = study["gradients"]
    return f.norms({t: found["norm"][t] for t in study["tasks"] if t in found["norm"]}) if found else ""


def _leave_one_out(study: dict[str, Any], tasks: list[str]) -> str:
    """Row: the task that is added; column: what it does to whom."""
    value = np.full((len(tasks), len(tasks)), np.nan)
    sure = np.zeros(value.shape, bool)
    for left, found in study["leave_one_out"].items():
        for task, g in found["tasks"].items():
            if g["gain"] is not None:
                value[tasks.index(left), tasks.index(task)] = g["gain"]
                sure[tasks.index(left), tasks.index(task)] = g["low"] is not None and not g["low"] <= 0 <= g["high"]
    return f.matrix(tasks, tasks, value, ("changes", "adding"), marked=sure)


def _affinity(study: dict[str, Any], tasks: list[str]) -> str:
    found = study["grouping"]["affinity"]
    value = np.array([[np.nan if a == b else found[a][b] for b in tasks] for a in tasks])
    return f.matrix(tasks, tasks, value, ("to", "from"))


def _axes(study: dict[str, Any]) -> tuple[list[str], list[str]]:
    rows = study["grid"].get("rows", [])
    return list(dict.fromkeys(r["sharing"] for r in rows)), list(dict.fromkeys(r["balancing"] for r in rows))


def _grid(study: dict[str, Any]) -> str:
    sharing, balancing = _axes(study)
    if not sharing:
        return ""
    value = np.full((len(sharing), len(balancing)), np.nan)
    for r in study["grid"]["rows"]:
        if r["valid_mean_gain"] is not None:
            value[sharing.index(r["sharing"]), balancing.index(r["balancing"])] = r["valid_mean_gain"]
    return f.matrix(sharing, balancing, value, ("balancing", "sharing"))


def _grid_tasks(study: dict[str, Any], tasks: list[str]) -> str:
    """Variant × task: test gains over the single-task models."""
    rows = [r for r in study["grid"].get("rows", []) if r["test"]]
    if not rows:
        return ""
    found = [[r["test"]["tasks"].get(t, {"gain": None})["gain"] for t in tasks] for r in rows]
    value = np.array([[np.nan if v is None else v for v in row] for row in found], dtype=np.float64)
    return f.matrix([f"{r['sharing']}, {r['balancing']}" for r in rows], tasks, value, ("task", ""))


def _joint_rows(study: dict[str, Any]) -> list[list[str]]:
    out = []
    for task, g in study["joint"]["tasks"].items():
        ends = "" if g["low"] is None else f"[{g['low']:+.1%}, {g['high']:+.1%}]"
        gain = "–" if g["gain"] is None else f"{g['gain']:+.1%}"
        out.append([task, study["tasks"][task]["metric"], f"{g['reference']:.4f}", f"{g['value']:.4f}", gain, ends])
    return out


def _partition_rows(study: dict[str, Any]) -> list[list[str]]:
    return [
        [str(len(p["groups"])), " | ".join(" + ".join(g) for g in p["groups"]), f"{p['mean_gain']:+.2%}",
         "trained" if p["measured"] else "predicted"]
        for p in study["grouping"]["partitions"]
    ]  # fmt: skip


def _candidate_rows(study: dict[str, Any]) -> list[list[str]]:
    return [
        [DECIDED[c["name"]], " | ".join(" + ".join(g) for g in c["groups"]), str(c["models"]),
         "–" if c["valid_mean_gain"] is None else f"{c['valid_mean_gain']:+.2%}"]
        for c in study["grouping"]["candidates"]
    ]  # fmt: skip


def _cell_rows(study: dict[str, Any]) -> list[list[str]]:
    out = []
    for c in study["cells"]:
        if "error" in c:
            out.append([c["cell"]["name"], "–", f"{c['seconds']:.0f}", "–", f"failed: {c['error']}"])
            continue
        metric = {t: study["tasks"][t]["metric"] for t in c["cell"]["tasks"]}
        test = ", ".join(f"{t} {c['test'][t][m]:.4f}" for t, m in metric.items() if m in c["test"].get(t, {}))
        gain = "–" if c["valid_mean_gain"] is None else f"{c['valid_mean_gain']:+.2%}"
        out.append([c["cell"]["name"], str(c["best_epoch"] + 1), f"{c['seconds']:.0f}", gain, test])
    return out
