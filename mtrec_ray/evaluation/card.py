"""The model card of a bundle: what it is, from what, how good, for whom not (Mitchell et al. 2019, arXiv 1810.03993)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtrec_ray.config import RunConfig
from mtrec_ray.storage import shown

SHOWN = ("ndcg@10", "hr@10", "recall@20", "rmse", "auc", "accuracy", "macro_f1")
"""Metrics of the first table; metrics.json has all."""


def model_card(config: RunConfig, metrics: Mapping[str, Any], data: Mapping[str, Any], training: Mapping[str, Any]) -> str:
    """Markdown. metrics: of evaluation; data: the manifest of the prepared data; training: facts of the training stage."""
    rows = data.get("rows", {})
    encoder = "none: items are known by their ids" if config.encoder is None else f"`{config.encoder.model}`"
    lines = [
        f"# {config.name}", "",
        f"Bundle `{metrics['bundle'][:12]}`, of prepared data `{metrics['data'][:12]}`. Written by evaluation.", "",
        "## What it does", "",
        *(f"- `{n}` ({t.kind}), λ = {t.weight:g}" for n, t in config.tasks.items()), "",
        f"One user state of a history of {config.data.window - 1} events at most feeds all of them ({config.model.trunk}, width "
        f"{config.model.width}). Item texts are read by: {encoder}.", "",
        "## What it was made from", "",
        f"{rows.get('events', 0):,} events of {rows.get('users', 0):,} users; {rows.get('train_targets', 0):,} targets trained, "
        f"{rows.get('test_targets', 0):,} tested, {rows.get('quarantined', 0):,} rows of the log were refused. Protocol "
        f"`{config.data.protocol}`"
        + (", which shows the model later events of other users: not a forecast." if config.data.protocol != "time" else "."),
        "", *_training(config, training),
        "## How good it is", "",
        "| task | metric | model | 95 % interval | n |", "|---|---|---|---|---|",
        *_measured(metrics), "",
        *_beside(metrics), *_slices(metrics),
        "## What it is not for", "",
        "- Users and items unlike those above: look at the slices of metrics.json first.",
        "- Decisions about people. Profiles are guesses about groups." + _sensitive(config),
        "- Metrics are of logged choices among what was shown then; only an experiment says what a change of lists does.", "",
    ]  # fmt: skip
    if metrics.get("unmeasured"):
        lines += ["Not measured: " + "; ".join(f"{t}: {why}" for t, why in sorted(metrics["unmeasured"].items())) + ".", ""]
    return "\n".join(lines)


def _sensitive(config: RunConfig) -> str:
    names = sorted(config.data.sensitive_names)
    return f" Sensitive here, and shown to nobody: {', '.join(names)}." if names else ""


def _training(config: RunConfig, training: Mapping[str, Any]) -> list[str]:
    if "best_epoch" not in training:
        return []
    warm = f" It began with the weights of `{shown(config.train.warm_start)}`." if config.train.warm_start else ""
    return [
        f"Trained for {training.get('seconds', 0):.0f} s on {training.get('workers', 1)} worker(s); the best of at most "
        f"{config.train.epochs} epochs, by {config.train.monitor} on valid, was number {training['best_epoch']}.{warm}",
        "",
    ]


def _measured(metrics: Mapping[str, Any]) -> list[str]:
    rows = []
    for task, found in metrics["model"].items():
        for name in SHOWN:
            if name in found:
                low, high = metrics["intervals"].get(task, {}).get(name) or (None, None)
                ends = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
                n = found.get("n", found.get("users", ""))
                rows.append(f"| {task} | {name} | {found[name]:.4f} | {ends} | {n if n == '' else int(n)} |")
    return rows


def _beside(metrics: Mapping[str, Any]) -> list[str]:
    found = metrics.get("comparison")
    if not found or found.get("difference") is None:
        return []
    ends = "" if found.get("low") is None else f" [{found['low']:+.4f}, {found['high']:+.4f}]"
    return [f"Best baseline: {found['baseline']}; the model minus it, {found['metric']}: {found['difference']:+.4f}{ends}.", ""]


def _slices(metrics: Mapping[str, Any]) -> list[str]:
    parts = {
        s: found[task]["ndcg@10"] for s, found in metrics.get("slices", {}).items()
        for task in found if isinstance(found[task], Mapping) and "ndcg@10" in found[task]
    }  # fmt: skip
    if not parts:
        return []
    return ["| slice | ndcg@10 |", "|---|---|", *(f"| {s} | {v:.4f} |" for s, v in sorted(parts.items())), ""]
