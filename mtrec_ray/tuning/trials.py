"""Trials: what each one measured on valid, kept as a JSON file; which is best; tables. No Ray."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any, Literal

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER

State = Literal["waiting", "unfinished", "stopped", "done", "failed", "refused"]
"""`stopped`: by ASHA; its best value so far counts. `done`: all epochs or out of patience. `unfinished`: goes on when the
job is started again; its best value so far counts too. `refused`: a point that the run configuration does not accept."""
TELLING = ("ndcg@10", "rmse", "auc", "hit@10", "macro_f1", "accuracy")
"""The metric that stands for a task in a table: the first of these that it has."""
OVER = ("stopped", "done", "failed", "refused")


@dataclass
class Epoch:
    """One epoch of a trial."""

    epoch: int
    """Counted from 1."""
    seconds: float
    valid: dict[str, float]
    """`task/metric` -> value on valid; empty in an epoch without evaluation."""


@dataclass
class Trial:
    """One configuration trained with one seed."""

    number: int
    values: dict[str, Any]
    """Key path -> value."""
    monitor: str
    seed: int | None = None
    """Set for finalists: another seed than the configuration's."""
    state: State = "waiting"
    history: list[Epoch] = field(default_factory=list)
    message: str = ""

    @property
    def name(self) -> str:
        return f"{self.number:04d}" + ("" if self.seed is None else f"-seed{self.seed}")

    def add(self, epoch: Epoch) -> None:
        """Note an epoch; one that is trained again after a kill replaces what was noted."""
        self.history = [*(e for e in self.history if e.epoch < epoch.epoch), epoch]

    @property
    def epochs(self) -> int:
        return self.history[-1].epoch if self.history else 0

    @property
    def seconds(self) -> float:
        return sum(e.seconds for e in self.history)

    @property
    def best(self) -> Epoch | None:
        """The epoch whose weights a run would keep; None before the first evaluation."""
        measured = [e for e in self.history if self.monitor in e.valid]
        return max(measured, key=lambda e: signed(e.valid[self.monitor], self.monitor), default=None)

    @property
    def value(self) -> float | None:
        """The best monitored value."""
        return None if self.best is None else self.best.valid[self.monitor]

    @property
    def score(self) -> float:
        """The best monitored value, negated where lower is better; minus infinity before there is one."""
        return -math.inf if self.value is None else signed(self.value, self.monitor)

    @property
    def succeeded(self) -> bool:
        return self.state not in ("failed", "refused") and self.value is not None


def signed(value: float, monitor: str) -> float:
    """Higher is better."""
    return -value if monitor.rpartition("/")[2] in LOWER_IS_BETTER else value


def save(folder: str, trial: Trial) -> None:
    storage.write_json(storage.join(folder, f"{trial.name}.json"), asdict(trial))


def load(folder: str, trial: Trial) -> Trial:
    """The trial as it was kept, or as given when it was not."""
    uri = storage.join(folder, f"{trial.name}.json")
    if not storage.exists(uri):
        return trial
    kept = storage.read_json(uri)
    return Trial(**kept | {"values": trial.values, "history": [Epoch(**e) for e in kept["history"]]})


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Those that succeeded, best first; ties go by number."""
    return sorted((t for t in trials if t.succeeded), key=lambda t: (-t.score, t.number))


@dataclass(frozen=True)
class Finalist:
    """A point retrained with other seeds."""

    number: int
    values: dict[str, Any]
    runs: tuple[Trial, ...]

    @property
    def complete(self) -> bool:
        return all(t.state == "done" for t in self.runs)

    @property
    def mean(self) -> float:
        return mean(t.value for t in self.runs if t.value is not None)

    @property
    def stdev(self) -> float:
        """Over the seeds; 0 for one."""
        values = [t.value for t in self.runs if t.value is not None]
        return stdev(values) if len(values) > 1 else 0.0

    def metrics(self) -> dict[str, float]:
        """Means of all valid metrics, at each run's best epoch."""
        found = [t.best.valid for t in self.runs if t.best is not None]
        return {n: mean(f[n] for f in found) for n in (found[0] if found else {}) if all(n in f for f in found)}


def ranked_finalists(finalists: Sequence[Finalist]) -> list[Finalist]:
    """Best mean first; one with a seed that failed or is unfinished is left out."""
    return sorted((f for f in finalists if f.complete), key=lambda f: (-signed(f.mean, f.runs[0].monitor), f.number))


def summary(trials: Sequence[Trial]) -> str:
    """Such as `12 done, 20 stopped early, 1 failed`."""
    words = {"done": "done", "stopped": "stopped early", "unfinished": "unfinished", "waiting": "not begun", "failed": "failed",
             "refused": "refused"}  # fmt: skip
    counts = {word: sum(t.state == state for t in trials) for state, word in words.items()}
    return ", ".join(f"{n} {word}" for word, n in counts.items() if n)


def csv_text(trials: Sequence[Trial]) -> str:
    """Every trial as a row: values, and all valid metrics at its best epoch."""
    keys = list(dict.fromkeys(k for t in trials for k in t.values))
    metrics = sorted({m for t in trials if t.best is not None for m in t.best.valid})
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["trial", "state", "value", "best_epoch", "epochs", "seconds", *keys, *metrics, "message"])
    for t in trials:
        valid = {} if t.best is None else t.best.valid
        best = "" if t.best is None else t.best.epoch
        row = [t.name, t.state, "" if t.value is None else t.value, best, t.epochs, round(t.seconds, 1)]
        writer.writerow([*row, *[shown(t.values.get(k, "")) for k in keys], *[valid.get(m, "") for m in metrics], t.message])
    return out.getvalue()


def shown(value: Any) -> Any:
    """A value in a table: sections as JSON, numbers short."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str | int) and not isinstance(value, bool) else json.dumps(value)


def table(trials: Sequence[Trial], best: int = 10, values: bool = False) -> list[list[str]]:
    """Header and rows for people: the start, then the best ones, with a metric of every task at the best epoch.

    values: the searched values too, which makes a wide table.
    """
    monitor = trials[0].monitor
    keys = list(dict.fromkeys(k for t in trials for k in t.values)) if values else []
    start = [t for t in trials if t.number == 0]
    rows = start + [t for t in ranked(trials) if t.number != 0][:best]
    measured = [t.best.valid for t in rows if t.best is not None]
    metrics = [m for m in (_telling(measured[0]) if measured else []) if m != monitor]
    out = [["trial", f"valid {monitor}", *metrics, "epochs", "state", *keys]]
    for t in rows:
        valid = {} if t.best is None else t.best.valid
        numbers = [f"{valid[m]:.4f}" if m in valid else "" for m in (monitor, *metrics)]
        cells = [str(t.epochs), t.state, *[str(shown(t.values.get(k, ""))) for k in keys]]
        out.append(["start" if t.number == 0 else str(t.number), *numbers, *cells])
    return out


def _telling(valid: dict[str, float]) -> list[str]:
    """The first of TELLING that each task has."""
    tasks = sorted({name.partition("/")[0] for name in valid if "/" in name})
    return [next(f"{t}/{m}" for m in TELLING if f"{t}/{m}" in valid) for t in tasks if any(f"{t}/{m}" in valid for m in TELLING)]


def changes(start: Trial, best: Trial) -> list[list[str]]:
    """Header and rows for people: every searched key, as it was and as it is best."""
    return [["", "start", "best"], *[[k, str(shown(start.values.get(k, ""))), str(shown(v))] for k, v in best.values.items()]]


def finalist_table(finalists: Sequence[Finalist]) -> list[list[str]]:
    """Header and rows for people, best mean first."""
    order = [*ranked_finalists(finalists), *(f for f in finalists if not f.complete)]
    out = [["finalist", "mean", "stdev", "seeds"]]
    for f in order:
        name = "start" if f.number == 0 else str(f.number)
        numbers = [f"{f.mean:.4f}", f"{f.stdev:.4f}"] if f.complete else ["", ""]
        out.append([name, *numbers, " ".join(t.state if t.value is None else f"{t.value:.4f}" for t in f.runs)])
    return out


def lines(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)


def yaml_text(config: RunConfig, header: Sequence[str]) -> str:
    """The configuration as YAML that `load_config` reads back to the same one."""
    import yaml

    raw = config.model_dump(mode="json", exclude_unset=True)
    body = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True, width=120)
    return "".join(f"# {line}\n" for line in header) + body
