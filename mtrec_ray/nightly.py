"""The nightly loop: append, retrain warm, gate, score, roll out, keep the last nights. Every step is skipped when it is done.

    ROOT/data, text           prepared data and text vectors, which all nights share
    ROOT/nights/NIGHT/        a run: train, bundle, evaluation, scores; comparison.json; incumbent/ is the bundle that served
                              before, carried to this night's catalogue and judged on this night's test part
    ROOT/train, bundle, ...   what serves: a run like any other (`jobs.serve ROOT`)
    ROOT/nightly.json         what became of every night

A night is named by its day and its data, and by a number where that is taken; one that was stopped goes on under its name, as long
as no new data have come.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from mtrec_ray import bundle, lock, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.evaluation.compare import broken_limits, compare, load
from mtrec_ray.evaluation.reduce import WHOLE
from mtrec_ray.pipeline import Run
from mtrec_ray.predictor import Predictor
from mtrec_ray.serving.rollout import RolloutError
from mtrec_ray.training import warm
from mtrec_ray.training.worker import build_model, load_schema, tell_items

log = logging.getLogger(__name__)

HELD_BACK = 3
"""Exit code of a night whose bundle may be worse than the one that serves; that of jobs.compare too."""


@dataclass(frozen=True)
class Settings:
    """How nights are run."""

    noninferior: float = 0.02
    """How much worse the new bundle may be, as a share of the value of the one that serves."""
    gates: tuple[str, ...] = ()
    """What that holds for, as `TASK/METRIC`; default: ndcg@10 of the retrieval task."""
    keep: int = 7
    """Nights that stay, those that serve or served last not counted."""
    anew: bool = False
    """Prepare the whole log anew: after a change of the section `data`."""
    from_scratch: bool = False
    """Train without the weights of the bundle that serves."""
    again: bool = False
    """Another night of the same data, though nothing is new: after a change of the configuration."""


@dataclass
class Night:
    """What became of a night."""

    name: str
    data: str
    bundle: str = ""
    before: str = ""
    """Name of the night whose bundle served then; empty: none."""
    verdict: str = "begun"
    """begun, held back, rolling out, live, or rolled back."""
    limits: list[str] = field(default_factory=list)
    """Limits that were broken."""
    ended: str = ""

    @property
    def over(self) -> bool:
        """Nothing more becomes of it by itself."""
        return self.verdict in ("live", "rolled back")


class Nights:
    """ROOT and what is known of it."""

    def __init__(self, root: str) -> None:
        self.root = storage.absolute(root)
        self.uri = storage.join(self.root, "nightly.json")
        found: dict[str, Any] = storage.read_json(self.uri) if storage.exists(self.uri) else {"nights": [], "serving": ""}
        self.nights, self.serving = [Night(**n) for n in found["nights"]], str(found["serving"])

    def write(self) -> None:
        storage.write_json(self.uri, {"nights": [asdict(n) for n in self.nights], "serving": self.serving})

    def path(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def folder(self, name: str) -> str:
        return self.path("nights", name)

    def of(self, data: str, again: bool = False) -> Night:
        """The night of these data, a new one where there is none (again: where that is over). One that is not over begins with, and
        is compared with, what serves now."""
        if not self.nights or self.nights[-1].data != data or (again and self.nights[-1].over):
            names = {n.name for n in self.nights}
            day = f"{time.strftime('%Y-%m-%d', time.gmtime())}-{data[:8]}"
            name = next(n for n in itertools.chain([day], (f"{day}-{i}" for i in itertools.count(2))) if n not in names)
            self.nights.append(Night(name, data, before=self.serving))
            self.write()
        night = self.nights[-1]
        if not night.over and night.before != self.serving:
            night.before = self.serving
            self.write()
        return night


def run_night(
    config: RunConfig, root: str, settings: Settings, roll_out: Callable[[str, str], None] | None = None, score: bool = True
) -> Night:
    """One night, from new files of the log to a bundle that serves.

    roll_out: is told the new bundle and its fingerprint, and raises where it does not serve; then everything stays as it was.
    score: write every user's list before. Raises what the stages raise, CompareError where the two bundles cannot be compared.
    """
    runtime.connect()
    runtime.preflight(config, root)
    with lock.only_writer(storage.absolute(root)) as still:
        nights = Nights(root)
        append = not settings.anew and storage.exists(nights.path("data", "manifest.json"))
        shared = Run(config, nights.root, append=append)
        shared.stage("prepare")
        if config.encoder is not None:
            shared.stage("encode")
        night = nights.of(shared.data.manifest["inputs"], settings.again)
        if night.over:
            log.info("nightly: no new events since %s (%s); --again trains on the same ones", night.name, night.verdict)
            return night
        _check_gates(config, nights, night, settings)
        run = Run(_begun(config, nights, night, settings), nights.folder(night.name), shared=nights.root)
        for stage in ("train", "index", "evaluate"):
            run.stage(stage)
        night.bundle = bundle.fingerprint_of(run.bundle.root)
        night.limits = _gate(config, nights, night, settings)
        if night.limits:
            still()
            _ended(nights, night, "held back")
            _forget_old(nights, settings.keep)
            return night
        if score and config.retrieval_task is not None:
            run.stage("score")
        still()
        if roll_out is not None:
            _ended(nights, night, "rolling out")  # whoever is stopped here may have left the new bundle serving
            try:
                roll_out(run.bundle.root, night.bundle)
            except RolloutError:  # and the old one is back
                _ended(nights, night, "begun")
                raise
        _promote(nights, run)
        nights.serving = night.name
        _ended(nights, night, "live")
        _forget_old(nights, settings.keep)
    return night


def roll_back(config: RunConfig, root: str, roll_out: Callable[[str, str], None] | None = None) -> Night:
    """The bundle that served before serves again -> its night. After a rollout that was stopped half-way: the one that served
    when it began. Raises ValueError where there is none."""
    with lock.only_writer(storage.absolute(root)) as still:
        nights = Nights(root)
        current = next((n for n in nights.nights if n.name == nights.serving), None)
        if nights.nights and nights.nights[-1].verdict == "rolling out":
            current = nights.nights[-1]
        before = next((n for n in nights.nights if current is not None and n.name == current.before), None)
        if current is None or before is None or not storage.exists(storage.join(nights.folder(before.name), "bundle")):
            raise ValueError(f"--rollback: no bundle served before {nights.serving or 'the first night'}")
        run = Run(config, nights.folder(before.name), shared=nights.root)
        still()
        if roll_out is not None:
            roll_out(run.bundle.root, before.bundle)
        _promote(nights, run)
        nights.serving = before.name
        _ended(nights, current, "rolled back")
    return before


def _begun(config: RunConfig, nights: Nights, night: Night, settings: Settings) -> RunConfig:
    """The configuration with the weights that it begins with."""
    if settings.from_scratch or not night.before or (config.encoder is not None and config.encoder.tuning is not None):
        return config
    train = config.train.model_copy(update={"warm_start": nights.folder(night.before)})
    return config.model_copy(update={"train": train})


def _check_gates(config: RunConfig, nights: Nights, night: Night, settings: Settings) -> None:
    """What the gate would say after hours of training. Raises ValueError."""
    for gate in settings.gates:
        task = gate.rpartition("|")[2].partition("/")[0]
        if task not in config.tasks:
            raise ValueError(f"--gate {gate}: there is no task {task!r}; known are {sorted(config.tasks)}, as in click/auc")
    if night.before and any(f.kind == "text" for f in config.data.context.values()):
        old = bundle.load(storage.join(nights.folder(night.before), "bundle"), verify=False)
        if not _same_encoder(old, storage.Directory(nights.path("text"))):
            raise ValueError(
                "encoder: the bundle that serves reads the texts of events with another encoder, and cannot be judged on what this "
                "one has read; name another --out, whose first night is compared with nothing"
            )


def _gate(config: RunConfig, nights: Nights, night: Night, settings: Settings) -> list[str]:
    """Limits that the new bundle breaks against the one that serves, both judged on today's test part."""
    if not night.before:
        log.info("nightly: the first night, there is nothing to compare with")
        return []
    here, incumbent = nights.folder(night.name), carried(config, nights, night)
    rows = compare([load(incumbent.out)], [load(here)])
    gates = list(settings.gates) or ([f"{config.retrieval_task}/ndcg@10"] if config.retrieval_task else [])
    if not gates:
        raise ValueError("--gate: there is no task of kind retrieval; name what the limit holds for, such as click/auc")
    broken = broken_limits(rows, gates, settings.noninferior)
    storage.write_json(storage.join(here, "comparison.json"), {"rows": [asdict(r) for r in rows], "broken": broken, "gates": gates})
    for row in rows:
        if row.slice == WHOLE and row.name in gates:
            log.info("nightly: %s: %.4f serves, %.4f is new", row.name, row.a, row.b)
    return broken


def carried(config: RunConfig, nights: Nights, night: Night) -> Run:
    """The bundle that serves, as it would serve today's catalogue, evaluated on today's data -> its run.

    It has its own model and tasks; items that are new to it are known by their texts, as through PUT /items.
    """
    old = bundle.load(storage.join(nights.folder(night.before), "bundle"))
    judged = {"evaluation": config.evaluation.model_copy(update={"baselines": ()}), "data": config.data, "train": config.train}
    run = Run(old.config.model_copy(update=judged), storage.join(nights.folder(night.name), "incumbent"), shared=nights.root)
    text = None if run.config.encoder is None else run.text
    inputs = {"carried": old.fingerprint, "data": run.data.manifest["inputs"], "text": text and text.manifest["inputs"]}
    fingerprint = storage.fingerprint(inputs)
    if not run.trained.is_published(fingerprint):
        prefix = run.trained.begin(fingerprint)
        catalogue = storage.read_table(run.data.path("catalogue.parquet"))
        own = old.text_encoder is not None and (text is None or not _same_encoder(old, text))
        text_NE = _texts_read_by(old, catalogue) if own else None if text is None else load_text_vectors(text.prefix, catalogue)
        model = build_model(run.config, load_schema(run.data.prefix), text_NE)
        tell_items(model, catalogue)
        told = warm.carry(model, catalogue["item_id"].to_pylist(), old.model.state_dict(), old.model, old.item_ids)
        log.info("nightly: the bundle that serves, for today's catalogue: %s", told.text())
        storage.write_bytes(storage.join(prefix, "weights.safetensors"), save_tensors(model.state_dict()))
        read = {"data": run.data.manifest["inputs"], "text": text and text.manifest["inputs"]}
        facts = storage.Directory(storage.join(nights.folder(night.before), "train")).manifest["training"]
        if own and text_NE is not None:
            storage.write_bytes(storage.join(prefix, "text.safetensors"), save_tensors({"text_NE": text_NE}))
        reads = {"text_encoder": old.text_encoder} if own else {}
        run.trained.publish(fingerprint, kind="train", training=facts | {"carried": old.fingerprint}, read=read, **reads)
    for stage in ("index", "evaluate"):
        run.stage(stage)
    return run


def _same_encoder(old: Predictor, text: storage.Directory) -> bool:
    """Whether a bundle reads texts as they were encoded today, wherever the encoder lies."""
    one, other = ({k: v for k, v in (e or {}).items() if k != "model"} for e in (old.text_encoder, text.manifest["encoder"]))
    return one == other


def _texts_read_by(old: Predictor, catalogue: pa.Table) -> Tensor:
    """text_NE of a catalogue by a bundle's own TextEncoder: today's configuration names another, or it was trained with the bundle.
    Raises EncoderError where it is no more."""
    texts = catalogue["text"].to_pylist()
    distinct = sorted({t for t in texts if t})
    place = {t: i for i, t in enumerate(distinct)}
    encoder = old.open_text_encoder()
    out = np.zeros((len(texts), encoder.width), np.float32)
    there = [n for n, t in enumerate(texts) if t]
    if there:
        out[there] = encoder.encode(distinct)[[place[texts[n]] for n in there]]
    return torch.from_numpy(out)


def _promote(nights: Nights, run: Run) -> None:
    """The night's training, evaluation and bundle become ROOT's; the bundle last."""
    for file in ("metrics.json", "stages.json"):
        storage.copy(run.path(file), nights.path(file))
    for name in ("train", "evaluation", "bundle"):
        source, target = storage.Directory(run.path(name)), storage.Directory(nights.path(name))
        manifest = source.manifest
        if target.is_published(manifest["inputs"]):
            continue
        prefix = storage.join(target.root, manifest["inputs"][:16])
        for file in manifest["files"]:
            storage.copy(storage.join(source.prefix, file), storage.join(prefix, file))
        facts = {k: v for k, v in manifest.items() if k not in ("schema_version", "inputs", "prefix", "files")}
        target.publish(manifest["inputs"], **facts)


def _ended(nights: Nights, night: Night, verdict: str) -> Night:
    night.verdict, night.ended = verdict, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    nights.write()
    return night


def _forget_old(nights: Nights, keep: int) -> None:
    """Delete what no night needs: never the bundle that serves, nor the one before it (a rollback)."""
    before = {n.before for n in nights.nights if n.name == nights.serving}
    needed = {nights.serving, *before, *(n.name for n in nights.nights[-keep:])}
    for old in nights.nights:
        if old.name not in needed and storage.exists(nights.folder(old.name)):
            storage.delete(nights.folder(old.name))
            log.info("nightly: %s is older than the %d nights that are kept, and was deleted", old.name, keep)
