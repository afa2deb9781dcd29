"""The main job: prepare → encode → train → index → evaluate → score, each stage reused when its inputs are unchanged.

Every stage is also a job of its own (`python -m jobs.STAGE`). Where things lie below `runs/NAME`:

    data/ text/ train/    published directories of the first three stages
    bundle/               the bundle; evaluation publishes it
    metrics.json          what evaluation measured, with rows, timing and memory of every stage
    report.html           the same as a page for people
    evaluation/           resamples, slices and curves behind it (jobs.compare, the report)
    scores/*.parquet      top lists of every user
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mtrec_ray import bundle, lock, runtime, storage
from mtrec_ray.config import RunConfig
from mtrec_ray.data.prepare import prepare
from mtrec_ray.encoders.bulk import encode
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.evaluation.card import model_card
from mtrec_ray.evaluation.runner import evaluate
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.retrieval.exact import RecallError
from mtrec_ray.retrieval.ivf import IvfIndex, build_ivf
from mtrec_ray.retrieval.reduced import ReducedIndex, build_reduced
from mtrec_ray.schema import LogSchema
from mtrec_ray.scoring.batch import check_output, score
from mtrec_ray.scoring.tables import FOLDERS
from mtrec_ray.tracking import track
from mtrec_ray.training.feed import collate
from mtrec_ray.training.trainer import train
from mtrec_ray.training.worker import build_model, load_schema, mapped_windows
from mtrec_ray.watch import Watch

log = logging.getLogger(__name__)

STAGES = ("prepare", "encode", "train", "index", "evaluate", "score")


class StageError(RuntimeError):
    """A stage that was asked for before the one it needs."""


class Run:
    """One run directory and the stages that fill it."""

    def __init__(self, config: RunConfig, out: str, append: bool = False, shared: str | None = None) -> None:
        """shared: the run whose data and text vectors are read, where they are not this one's."""
        self.config, self.out, self.append = config, storage.absolute(out), append
        common = self.out if shared is None else storage.absolute(shared)
        self.data = storage.Directory(storage.join(common, "data"))
        self.text = storage.Directory(storage.join(common, "text"))
        self.trained = storage.Directory(self.path("train"))
        self.bundle = storage.Directory(self.path("bundle"))
        self.evaluation = storage.Directory(self.path("evaluation"))

    def path(self, *parts: str) -> str:
        return storage.join(self.out, *parts)

    def stage(self, name: str) -> None:
        """Run one stage, with its time and memory noted in stages.json. Raises StageError when an earlier one is
        missing."""
        work: Callable[[], Any] = getattr(self, f"_{name}")
        log.info("%s: start", name)
        with Watch() as watch:
            reused = work() is False
        notes = self.notes()
        if not reused or name not in notes:
            notes[name] = {"seconds": round(watch.seconds, 3), "peak_rss_mib": round(watch.peak_mib, 1)}
            storage.write_json(self.path("stages.json"), notes)
        if name in ("evaluate", "score") or not reused:
            self._write_metrics()
        if name == "evaluate" and not reused:
            track(self.config, self.out)
        if name == "evaluate" and (not reused or not storage.exists(self.path("report.html"))):
            self._write_report()
        log.info("%s: %s in %.1f s, largest process %.0f MiB", name, "reused" if reused else "done", watch.seconds, watch.peak_mib)

    def notes(self) -> dict[str, dict[str, float]]:
        uri = self.path("stages.json")
        return dict(storage.read_json(uri)) if storage.exists(uri) else {}

    # -- stages; each returns False when there was nothing to do

    def _prepare(self) -> bool:
        return _changed(self.data, lambda: prepare(self.config, self.data.root, self.append))

    def _encode(self) -> bool:
        self._need(self.data, "prepare")
        return _changed(self.text, lambda: encode(self.config, self.data, self.text.root))

    def _text(self) -> storage.Directory | None:
        if self.config.encoder is None:
            return None
        self._need(self.text, "encode")
        return self.text

    def _text_prefix(self) -> str | None:
        """Where the vectors of the events' texts are; None for a model that reads none."""
        texts = any(feature.kind == "text" for feature in self.config.data.context.values())
        text = self._text() if texts else None
        return None if text is None else text.prefix

    def _train(self) -> bool:
        self._need(self.data, "prepare")
        text = self._text()
        return _changed(self.trained, lambda: train(self.config, self.data, text, self.trained.root))

    def _bundle_inputs(self) -> str:
        self._need(self.trained, "train")
        # how the run is scored afterwards is no part of what is served
        config = self.config.model_dump(mode="json", exclude={"scoring", "pretrain", "placement", "tracking"})
        return storage.fingerprint({"train": self.trained.manifest["inputs"], "config": config})

    def _check_training(self) -> None:
        """Raises StageError when the training read other data or other text vectors than are here now: they fit neither its
        weights nor, perhaps, their width."""
        text = self._text()
        now = {"data": self.data.manifest["inputs"], "text": None if text is None else text.manifest["inputs"]}
        for name, wanted in self.trained.manifest.get("read", now).items():
            if wanted != now[name]:
                what = "prepared data" if name == "data" else "text vectors: encoder or texts are not those of the training"
                raise StageError(f"{self.trained.root}: it was trained on other {what}; run jobs.train again")

    def _index(self) -> bool:
        inputs = self._bundle_inputs()
        self._check_training()
        prefix = storage.join(self.bundle.root, inputs[:16])
        if storage.exists(storage.join(prefix, "fingerprint.json")):
            stated = storage.read_json(storage.join(prefix, "fingerprint.json"))["fingerprint"]
            if bundle.compute_fingerprint(prefix) == stated:
                return False
        from safetensors.torch import load as load_tensors

        prefix = self.bundle.begin(inputs)
        schema, text = load_schema(self.data.prefix), self._text()
        catalogue = storage.read_table(self.data.path("catalogue.parquet"))
        text_NE = None if text is None else load_text_vectors(text.prefix, catalogue)
        encoder = None if text is None else text.manifest["encoder"]
        if storage.exists(self.trained.path("text.safetensors")):  # the encoder was trained too
            text_NE = load_tensors(storage.read_bytes(self.trained.path("text.safetensors")))["text_NE"]
            trained = {**(encoder or {}), "model": self.trained.path("encoder"), "content": self.trained.manifest["inputs"]}
            encoder = self.trained.manifest.get("text_encoder", trained)  # of a bundle that was carried
        model = build_model(self.config, schema, text_NE)
        model.load_state_dict(load_tensors(storage.read_bytes(self.trained.path("weights.safetensors"))))
        index = None
        if not self.config.index.is_plain and self.config.retrieval_task is not None:
            index = self._measured(model.eval(), schema)
        bundle.write(prefix, self.config, schema, catalogue, model, encoder, index)
        return True

    def _measured(self, model: Recommender, schema: LogSchema) -> IvfIndex | ReducedIndex:
        """An index that may miss items, tuned and measured on the states of users of the valid part. Raises StageError."""
        settings, text = self.config.index, self._text_prefix()
        cache = mapped_windows(self.data.prefix, "valid", None if text is None else EventTexts.open(text))
        if not len(cache):
            raise StageError("index: it is measured on users of the valid part, and this protocol left none; take exact, float32")
        drawn = np.random.default_rng(self.config.seed).permutation(len(cache))[: settings.queries]
        with torch.no_grad():
            item_vec_ND = model.item_vectors()
            states = [
                model.encode(item_vec_ND, collate(cache, np.sort(part), schema).history)
                for part in np.array_split(drawn, -(-len(drawn) // 256))
            ]
            query_QD = model.retrieval.query(torch.cat(states))
        k = self.config.ranking.candidates
        found: IvfIndex | ReducedIndex
        try:
            if settings.precision != "float32":
                found = build_reduced(item_vec_ND, query_QD, k, settings.precision, settings.min_recall)
            else:
                found = build_ivf(
                    item_vec_ND, query_QD, k,
                    lists=settings.lists, recall=settings.recall, min_recall=settings.min_recall, seed=self.config.seed,
                )  # fmt: skip
        except RecallError as error:
            raise StageError(str(error)) from None
        log.info("index: %s", found.facts)
        return found

    def _evaluate(self) -> bool:
        inputs = self._bundle_inputs()
        prefix = storage.join(self.bundle.root, inputs[:16])
        if not storage.exists(storage.join(prefix, "fingerprint.json")):
            raise StageError(f"{self.bundle.root}: no indexed bundle of this config; run jobs.index first")
        if self.bundle.is_published(inputs) and self.evaluation.is_published(inputs):
            return False
        fingerprint = storage.read_json(storage.join(prefix, "fingerprint.json"))["fingerprint"]
        found = evaluate(self.config, self.data, prefix, self._text_prefix())
        storage.write_json(storage.join(prefix, "metrics.json"), found.metrics)
        card = model_card(self.config, found.metrics, self.data.manifest, self.trained.manifest["training"])
        storage.write_bytes(storage.join(prefix, bundle.CARD), card.encode())
        self.bundle.publish(inputs, kind="bundle", fingerprint=fingerprint, data=self.data.manifest["inputs"])
        kept = self.evaluation.begin(inputs)
        storage.write_json(storage.join(kept, "metrics.json"), found.metrics)
        storage.write_json(storage.join(kept, "slices.json"), found.slices)
        storage.write_bytes(storage.join(kept, "resamples.npz"), found.resamples)
        storage.write_bytes(storage.join(kept, "curves.npz"), found.curves)
        settings, meaning = self.config.evaluation, {"kind", "label", "attribute", "positive"}
        self.evaluation.publish(
            inputs, kind="evaluation", bundle=fingerprint, data=self.data.manifest["inputs"], protocol=self.config.data.protocol,
            resamples=settings.bootstrap, seed=settings.seed, profile_folds=sorted(settings.profile_folds_test),
            retrieval=self.config.retrieval_task,
            tasks={n: t.model_dump(mode="json", include=meaning) for n, t in self.config.tasks.items()},
        )  # fmt: skip
        return True

    def _score(self) -> bool:
        self._need(self.bundle, "evaluate")
        before = self._score_identity()
        score(self.config, self.data, self.bundle.root, self.path("scores"), self._text_prefix())
        return before != self._score_identity()

    def output(self, what: str) -> dict[str, Any]:
        """One of the outputs of batch scoring (scoring/tables.py) -> its counts."""
        check_output(self.config, what)
        self._need(self.bundle, "evaluate")
        return score(self.config, self.data, self.bundle.root, self.path(FOLDERS[what]), self._text_prefix(), what)

    def _score_identity(self) -> Any:
        uri = self.path("scores", "_manifest.json")
        return storage.read_json(uri)["identity"] if storage.exists(uri) else None

    def _write_metrics(self) -> None:
        """metrics.json: the published bundle's metrics with rows, timing and memory."""
        if not storage.exists(storage.join(self.bundle.root, "manifest.json")):
            return
        metrics = storage.read_json(self.bundle.path("metrics.json"))
        notes = self.notes()
        metrics["rows"] = {"data": self.data.manifest["rows"], "training": self.trained.manifest["training"]}
        metrics["timing"] = {name: note["seconds"] for name, note in notes.items()}
        metrics["peak_rss_mib"] = {name: note["peak_rss_mib"] for name, note in notes.items()}
        storage.write_json(self.path("metrics.json"), metrics)

    def _write_report(self) -> None:
        """report.html, where what it needs is installed."""
        try:
            from mtrec_ray.evaluation.report import write_report

            log.info("evaluate: wrote %s", write_report(self.out, self.data.root))
        except ModuleNotFoundError as error:
            log.info("evaluate: no report, %s is missing: pip install 'mtrec_ray[report]'", error.name)
        except Exception:  # a picture that cannot be drawn must not cost the run its scores
            log.exception("evaluate: no report; python -m jobs.report %s --data %s tries again", self.out, self.data.root)

    def _need(self, directory: storage.Directory, stage: str) -> None:
        if not storage.exists(storage.join(directory.root, "manifest.json")):
            raise StageError(f"{directory.root}: nothing published yet; run jobs.{stage} first")


def _changed(directory: storage.Directory, work: Callable[[], Any]) -> bool:
    def inputs() -> Any:
        try:
            return directory.manifest["inputs"]
        except storage.StorageError:  # none, or one of another version
            return None

    before = inputs()
    work()
    return bool(before != inputs())


def run_stages(config: RunConfig, out: str, stages: tuple[str, ...], append: bool = False) -> Run:
    """Connect, check, and run some stages in order. append: new files of the log join the prepared data."""
    if "score" in stages:  # said before hours of training
        config.require_retrieval("the score stage (jobs.pipeline; the stages up to evaluate run alone as jobs.STAGE)")
    runtime.connect()
    runtime.preflight(config, out)
    run = Run(config, out, append)
    with lock.only_writer(run.out):
        for name in stages:
            run.stage(name)
    return run
