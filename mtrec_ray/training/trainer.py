"""The Ray Train adapter: the plain loop as DDP workers, checkpoints and TensorBoard."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import asdict
from typing import Any

import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save as save_tensors

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.training import checkpoint, distributed
from mtrec_ray.training.worker import run_worker

log = logging.getLogger(__name__)


def training_fingerprint(config: RunConfig, data: storage.Directory, text: storage.Directory | None) -> str:
    """Fingerprint of everything that the trained weights depend on."""
    folds = {"profile_folds_test", "profile_fold_valid"}  # all of `evaluation` that training looks at
    parts = config.model_dump(mode="json", include={"seed", "model", "tasks", "balancing", "train"})
    parts["evaluation"] = config.evaluation.model_dump(mode="json", include=folds)
    return storage.fingerprint({
        "config": parts,
        "data": data.manifest["inputs"],
        "text": None if text is None else text.manifest["inputs"],
    })  # fmt: skip


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("mtrec_ray").setLevel(logging.INFO)
    config = RunConfig.model_validate_json(settings["config"])
    previous = ray.train.get_checkpoint()
    resume = None
    if previous is not None:
        with previous.as_directory() as folder:
            resume = checkpoint.load(folder)
    writer = _tensorboard(settings["tensorboard"]) if distributed.rank() == 0 else None

    def report(epoch: int, scalars: dict[str, float], state: dict[str, Any] | None) -> None:
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, epoch + 1)
            writer.flush()
        with tempfile.TemporaryDirectory() as folder:
            if state is not None:
                checkpoint.save(folder, state)
            ray.train.report(
                scalars | {"epoch": epoch + 1}, checkpoint=None if state is None else Checkpoint.from_directory(folder)
            )

    fitted = run_worker(config, settings["data"], settings["text"], report, resume)
    if distributed.rank() == 0:
        storage.write_bytes(storage.join(settings["prefix"], "weights.safetensors"), save_tensors(fitted.best_state))
        facts = asdict(fitted)
        facts.pop("best_state")
        facts |= {"workers": distributed.world_size(), "rows_dropped": fitted.rows_read - fitted.rows_trained}
        storage.write_json(storage.join(settings["prefix"], "training.json"), facts)


def _tensorboard(folder: str) -> Any:
    if not storage.is_local(folder):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)


def train(config: RunConfig, data: storage.Directory, text: storage.Directory | None, root: str) -> storage.Directory:
    """Train -> published directory with weights.safetensors (the best on valid) and training.json.

    An interrupted run with the same inputs goes on from its last checkpoint.
    """
    directory = storage.Directory(root)
    inputs = training_fingerprint(config, data, text)
    if directory.is_published(inputs):
        log.info("train: reused %s", directory.root)
        return directory
    prefix = directory.begin(inputs)
    ray_storage = storage.join(storage.absolute(root), "_ray")
    settings = {
        "config": config.model_dump_json(),
        "data": data.prefix,
        "text": None if text is None else text.prefix,
        "prefix": prefix,
        "tensorboard": storage.join(storage.absolute(root), "tensorboard", inputs[:16]),
    }
    gpus = config.train.use_gpu
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=config.train.workers, use_gpu=gpus),
        run_config=RayRunConfig(
            name=inputs[:16],
            storage_path=ray_storage,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
    )
    trainer.fit()
    facts = storage.read_json(storage.join(prefix, "training.json"))
    assert facts["rows_dropped"] == 0, facts
    directory.publish(inputs, kind="train", training=facts)
    storage.delete(ray_storage)
    return directory
