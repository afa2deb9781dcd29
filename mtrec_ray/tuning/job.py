"""`jobs.tune` as one function: prepare and encode once, search, retrain the finalists, write what was found."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

from mtrec_ray import lock, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.pipeline import run_stages
from mtrec_ray.training.worker import check_machine, run_identity
from mtrec_ray.tuning.board import Board
from mtrec_ray.tuning.search import AshaRungs, run_trials, usable_cpus
from mtrec_ray.tuning.space import Point, Space, draw, start_of, with_values
from mtrec_ray.tuning.trials import Finalist, Trial, csv_text, load, ranked, ranked_finalists, summary, yaml_text

log = logging.getLogger(__name__)

TRIAL = {"train.workers": 0, "train.threads": 1, "train.feed": "cached", "train.checkpoint_every": None}
"""How every trial is trained: in one process, on one core."""


class TuneError(RuntimeError):
    """A search that cannot go on or found nothing, with the cure."""


@dataclass(frozen=True)
class Plan:
    """What a search is asked for."""

    trials: int = 32
    """Accepted points, the start among them."""
    minutes: float | None = None
    """Budget of the search; finalists are trained after it."""
    parallel: int | None = None
    finalists: int = 0
    """Best points that are retrained with other seeds, the start beside them."""
    seeds: int = 3
    command: str = ""


@dataclass
class Outcome:
    """What a search found."""

    monitor: str
    trials: list[Trial]
    finalists: list[Finalist] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The first of the finalists; without any, the trial with the best value."""
        order = ranked_finalists(self.finalists)
        if order:
            return next(t for t in self.trials if t.number == order[0].number)
        return next(iter(ranked(self.trials)), None)


def tune(config: RunConfig, space: Space, out: str, plan: Plan) -> Outcome:
    """Search, selecting on valid only, and write OUT/tune.json, trials.csv, best.yaml, tune.html.

    A killed search goes on when it is started again. Raises TuneError when OUT holds another search, or when no trial has a
    value; the messages of the trials are in the files by then. Raises RuntimeError for what a trial needs and this machine
    lacks, before the first one is started.
    """
    start, out = start_of(space, config), storage.absolute(out)
    stages = ("prepare",) if config.encoder is None else ("prepare", "encode")
    run = run_stages(with_values(start, TRIAL), out, stages)
    text = None if config.encoder is None else run.text
    parallel = plan.parallel or usable_cpus()
    folder = storage.join(out, "trials")
    with lock.only_writer(folder):
        _claim(folder, space, start, run.data, text)
        points = draw(space, config, plan.trials)
        trials = [load(folder, _trial(p, start)) for p in points]
        configs = {t.name: _config(p.config) for t, p in zip(trials, points, strict=True) if p.config is not None}
        for tried in configs.values():
            check_machine(tried)
        accepted = sum(p.config is not None for p in points)
        if accepted < plan.trials:
            log.info("the space has no more than %d points: %d trials instead of %d", accepted, accepted, plan.trials)
        epochs = start.train.epochs
        board = Board(
            folder, trials, dict.fromkeys(configs, epochs), AshaRungs(epochs, space.asha.first_rung, space.asha.reduction)
        )
        log.info("%d trials (%s), %d at a time, at most %d epochs", len(trials), summary(trials), parallel, epochs)
        outcome = Outcome(start.train.monitor, trials)
        run_trials(board, configs, run.data, text, folder, parallel, plan.minutes)
        write(out, outcome, start, space, plan)
        _need_a_value(trials, folder)
        if plan.finalists:
            _retrain(outcome, points, plan, run.data, text, folder, parallel)
            write(out, outcome, start, space, plan)
    return outcome


def _claim(folder: str, space: Space, start: RunConfig, data: storage.Directory, text: storage.Directory | None) -> None:
    """A folder belongs to one search."""
    kept = space.model_dump(mode="json")
    identity = storage.fingerprint({"space": kept, "start": run_identity(start, data, text)})
    uri = storage.join(folder, "search.json")
    if not storage.exists(uri):
        storage.write_json(uri, {"identity": identity, "space": kept})
    elif storage.read_json(uri)["identity"] != identity:
        raise TuneError(
            f"{folder}: holds the trials of another space, configuration or data. Give another --out, or delete the folder to "
            "start anew"
        )


def _trial(point: Point, start: RunConfig) -> Trial:
    state = "refused" if point.config is None else "waiting"
    return Trial(point.number, point.values, start.train.monitor, state=state, message=point.refused)  # type: ignore[arg-type]


def _config(config: RunConfig, seed: int | None = None) -> RunConfig:
    return with_values(config, TRIAL | ({} if seed is None else {"seed": seed}))


def _need_a_value(trials: Sequence[Trial], folder: str) -> None:
    if ranked(trials):
        return
    failed = [t for t in trials if t.state == "failed"]
    if failed:
        why = "; ".join(dict.fromkeys(t.message for t in failed[:3]))
        raise TuneError(f"no trial has a value: {summary(trials)}. {why}. To try a failed one again delete its file in {folder}")
    raise TuneError(f"no trial has a value yet: {summary(trials)}. Start the same command again to go on")


def _retrain(
    outcome: Outcome, points: list[Point], plan: Plan, data: storage.Directory, text: storage.Directory | None, folder: str,
    parallel: int,
) -> None:  # fmt: skip
    """The best points and the start, with other seeds and all epochs: what was lucky falls back."""
    best = [t.number for t in ranked(outcome.trials)[: plan.finalists]]
    chosen = [points[n] for n in dict.fromkeys([*best, 0])]
    finalists, configs = [], {}
    for point in chosen:
        assert point.config is not None
        runs = []
        for seed in range(point.config.seed + 1, point.config.seed + 1 + plan.seeds):
            trial = load(folder, Trial(point.number, point.values, outcome.monitor, seed))
            configs[trial.name] = _config(point.config, seed)
            runs.append(trial)
        finalists.append(Finalist(point.number, point.values, tuple(runs)))
    outcome.finalists = finalists
    runs = [t for f in finalists for t in f.runs]
    log.info("%d finalists with %d seeds each (%s)", len(finalists), plan.seeds, summary(runs))
    board = Board(folder, runs, {n: c.train.epochs for n, c in configs.items()}, None)
    run_trials(board, configs, data, text, folder, parallel)


def write(out: str, outcome: Outcome, start: RunConfig, space: Space, plan: Plan) -> None:
    """tune.json, trials.csv, best.yaml and, where matplotlib is installed, tune.html."""
    everything = [*outcome.trials, *(t for f in outcome.finalists for t in f.runs)]
    storage.write_bytes(storage.join(out, "trials.csv"), csv_text(everything).encode())
    storage.write_json(storage.join(out, "tune.json"), facts(outcome, space, plan))
    best = outcome.best
    if best is None:
        return
    text = yaml_text(with_values(start, best.values), header(outcome, plan))
    storage.write_bytes(storage.join(out, "best.yaml"), text.encode())
    try:
        from mtrec_ray.tuning.page import page
    except ModuleNotFoundError as error:
        log.info("no tune.html, %s is missing: pip install 'mtrec_ray[report]'", error.name)
        return
    try:
        storage.write_bytes(storage.join(out, "tune.html"), page(start.name, outcome.trials, outcome.finalists).encode())
    except Exception:  # a picture that cannot be drawn must not cost the search its results
        log.exception("no tune.html")


def facts(outcome: Outcome, space: Space, plan: Plan) -> dict[str, object]:
    """What tune.json holds."""
    best = outcome.best
    return {
        "command": plan.command,
        "monitor": outcome.monitor,
        "space": space.model_dump(mode="json", exclude_none=True),
        "summary": summary(outcome.trials),
        "best": None if best is None else {"trial": best.number, "value": best.value, "values": best.values,
                                           "valid": None if best.best is None else best.best.valid},
        "start": outcome.trials[0].value,
        "finalists": [
            {"trial": f.number, "values": f.values, "complete": f.complete, "mean": f.mean if f.complete else None,
             "stdev": f.stdev if f.complete else None, "valid": f.metrics(), "seeds": {str(t.seed): t.value for t in f.runs}}
            for f in outcome.finalists
        ],
        "trials": [asdict(t) | {"value": t.value} for t in outcome.trials],
    }  # fmt: skip


def header(outcome: Outcome, plan: Plan) -> list[str]:
    """Comment lines above the best configuration."""
    best, start = outcome.best, outcome.trials[0]
    assert best is not None and best.value is not None
    first = "not measured" if start.value is None else f"{start.value:.4f}"
    out = [
        f"Found by jobs.tune on valid alone, {datetime.now(UTC).date().isoformat()}; the test split was not looked at.",
        *([plan.command] if plan.command else []),
        f"Trial {best.number} of {len(outcome.trials)} ({summary(outcome.trials)}): "
        f"valid {outcome.monitor} {best.value:.4f}; the start: {first}.",
    ]
    for finalist in ranked_finalists(outcome.finalists):
        if finalist.number in (best.number, 0):
            name = "the start" if finalist.number == 0 else f"trial {finalist.number}"
            out.append(f"Mean of {len(finalist.runs)} other seeds, {name}: {finalist.mean:.4f} (stdev {finalist.stdev:.4f}).")
    return out
