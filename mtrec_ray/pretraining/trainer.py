"""The Ray Train adapter of pre-training: DDP workers, restarts, TensorBoard, a published Hugging Face directory."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.encoders.loading import resolve_model
from mtrec_ray.pretraining.worker import check, check_texts, run_worker, start_of
from mtrec_ray.training import distributed
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.trainer import reporter

log = logging.getLogger(__name__)

SAME = {"workers", "threads", "use_gpu", "checkpoint_every", "max_failures"}
"""Settings that a run may change while it goes on."""


def identity_of(config: RunConfig, data: storage.Directory) -> str:
    """Fingerprint of everything that the result depends on, but for the number of workers."""
    path = resolve_model(start_of(config))
    read_as = (
        None if config.encoder is None else config.encoder.model_dump(mode="json", include={"pooling", "max_tokens", "instruction"})
    )
    return storage.fingerprint({
        "encoder": read_as if config.pretrain.objective in ("contrastive", "distil") else None,
        "pretrain": config.pretrain.model_dump(mode="json", exclude=SAME), "seed": config.seed, "data": data.manifest["inputs"],
        "start": storage.file_fingerprint(path) if Path(path).is_dir() else path,
    })  # fmt: skip


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("mtrec_ray").setLevel(logging.INFO if distributed.rank() == 0 else logging.WARNING)
    config = RunConfig.model_validate_json(settings["config"])
    checkpoints = Checkpoints(settings["checkpoints"], settings["identity"])
    facts = run_worker(config, settings["data"], settings["prefix"], reporter(settings["tensorboard"]), checkpoints)
    if distributed.rank() == 0:
        storage.write_json(storage.join(settings["prefix"], "pretraining.json"), facts)


def pretrain(config: RunConfig, data: storage.Directory, root: str) -> storage.Directory:
    """Pre-train -> published directory with model/ (a Hugging Face directory) and pretraining.json.

    An interrupted run goes on from its last checkpoint. Raises EncoderError and CorpusError before any worker starts,
    PretrainStopped when the loss is not finite.
    """
    directory, settings = storage.Directory(root), config.pretrain
    identity = identity_of(config, data)
    if directory.is_published(identity):
        log.info("pretrain: reused %s", directory.root)
        return directory
    check(config)  # what is wrong with model or texts is said here
    check_texts(config, data.prefix)
    prefix = directory.begin(identity)
    kept = storage.join(storage.absolute(root), "_checkpoints")
    ray_storage = storage.join(storage.absolute(root), "_ray")
    storage.delete(ray_storage)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "config": config.model_dump_json(), "data": data.prefix, "prefix": prefix, "identity": identity,
            "checkpoints": storage.join(kept, identity[:16]),
            "tensorboard": storage.join(storage.absolute(root), "tensorboard", identity[:16]),
        },
        scaling_config=ScalingConfig(
            num_workers=settings.workers, use_gpu=settings.use_gpu, label_selector=config.placement.train or None
        ),
        run_config=RayRunConfig(
            name=identity[:16], storage_path=ray_storage, failure_config=FailureConfig(max_failures=settings.max_failures)
        ),
    )  # fmt: skip
    trainer.fit()
    facts = storage.read_json(storage.join(prefix, "pretraining.json"))
    directory.publish(identity, kind="pretrain", pretraining=facts)
    storage.delete(ray_storage)
    storage.delete(kept)
    return directory
