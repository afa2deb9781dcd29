"""The Ray Train adapter: the plain loop as DDP workers, with restarts, Ray Data's stream and TensorBoard.

Checkpoints are the loop's own files below ROOT/_checkpoints and not Ray Train's: they are written whole or not at all and
the last two are kept, so that a worker's or the driver's death at any moment is survived; Ray Train's list of checkpoints is
a file rewritten in place, and each report waits for the controller's poll (2 s). Ray Train gets the metrics of every epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
import ray.data
import ray.train
from ray.train import DataConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchTrainer
from safetensors.torch import save as save_tensors

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.training import distributed
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.guard import TrainingStopped
from mtrec_ray.training.loop import Report
from mtrec_ray.training.stream import Tables
from mtrec_ray.training.worker import check_machine, export_encoder, run_identity, run_worker, training_fingerprint

log = logging.getLogger(__name__)

STOPPED = "stopped.json"
"""Beside the checkpoints: why the run stopped for good, so that a restart by Ray Train stops at once too."""

BLOCK_BYTES = 8 << 20
"""Of Ray Data's blocks, which ranks get as a whole: small, so that no rank waits long for another one's last block."""


def _worker(settings: dict[str, Any]) -> None:
    """What every Ray Train worker runs."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("mtrec_ray").setLevel(logging.INFO)
    config = RunConfig.model_validate_json(settings["config"])
    stopped = storage.join(settings["checkpoints"], STOPPED)
    if storage.exists(stopped):
        raise TrainingStopped(storage.read_json(stopped)["why"])
    tables = _stream() if config.train.feed == "stream" else None
    checkpoints = Checkpoints(settings["checkpoints"], settings["identity"])
    try:
        fitted = run_worker(config, settings["data"], settings["text"], reporter(settings["tensorboard"]), checkpoints, tables)
    except TrainingStopped as error:
        storage.write_json(stopped, {"why": str(error)})
        raise
    if distributed.rank() == 0:
        storage.write_bytes(storage.join(settings["prefix"], "weights.safetensors"), save_tensors(fitted.best_state))
        if fitted.text_NE is not None:
            export_encoder(config, fitted, storage.join(settings["prefix"], "encoder"))
            storage.write_bytes(storage.join(settings["prefix"], "text.safetensors"), save_tensors({"text_NE": fitted.text_NE}))
        facts = asdict(replace(fitted, best_state={}, encoder_state=None, text_NE=None))
        for tensors in ("best_state", "encoder_state", "text_NE"):
            facts.pop(tensors)
        facts |= {"workers": distributed.world_size(), "rows_dropped": fitted.rows_read - fitted.rows_trained}
        storage.write_json(storage.join(settings["prefix"], "training.json"), facts)


def _stream() -> Tables:
    """This rank's split of the windows, once more for every epoch."""
    shard = ray.train.get_dataset_shard("train")

    def tables(epoch: int) -> Iterator[pa.Table]:
        return iter(shard.iter_batches(batch_size=None, batch_format="pyarrow"))

    return tables


class _WholeSplit(DataConfig):
    """Ray Train's own split makes equal parts by dropping rows; this one drops none, and keeps the files' order."""

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **_: Any
    ) -> list[dict[str, Any]]:
        shards: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, dataset in datasets.items():
            dataset = dataset.copy(dataset)
            dataset.context.execution_options = self._resolve_execution_options(name)
            dataset.context.execution_options.preserve_order = True
            dataset.context.target_max_block_size = BLOCK_BYTES
            dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
            for shard, split in zip(
                shards, dataset.streaming_split(world_size, equal=False, locality_hints=worker_node_ids), strict=True
            ):
                shard[name] = split
        return shards


def reporter(tensorboard: str) -> Report:
    """Numbers of an epoch to Ray Train, and from rank 0 into a local TensorBoard folder."""
    writer: Any = None
    if distributed.rank() == 0 and storage.is_local(tensorboard):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(tensorboard)

    def report(epoch: int, scalars: dict[str, float]) -> None:
        if writer is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, epoch + 1)
            writer.flush()
        ray.train.report(scalars | {"epoch": epoch + 1})  # every rank, equally often

    return report


def train(config: RunConfig, data: storage.Directory, text: storage.Directory | None, root: str) -> storage.Directory:
    """Train -> published directory with weights.safetensors (the best on valid) and training.json.

    An interrupted run goes on from its last checkpoint, with this number of workers. Raises TrainingStopped with the
    batch's coordinates when the loss is not finite or memory does not suffice.
    """
    directory = storage.Directory(root)
    inputs, identity = training_fingerprint(config, data, text), run_identity(config, data, text)
    if directory.is_published(inputs):
        log.info("train: reused %s", directory.root)
        return directory
    check_machine(config)
    prefix = directory.begin(inputs)
    root = storage.absolute(root)
    ray_storage, kept = storage.join(root, "_ray"), storage.join(root, "_checkpoints")
    settings: dict[str, Any] = {
        "config": config.model_dump_json(),
        "data": data.prefix,
        "text": None if text is None else text.prefix,
        "prefix": prefix,
        "checkpoints": storage.join(kept, identity[:16]),
        "identity": identity,
        "tensorboard": storage.join(root, "tensorboard", inputs[:16]),
    }
    storage.delete(storage.join(settings["checkpoints"], STOPPED))  # whoever starts again wants another try
    storage.delete(ray_storage)  # it holds no checkpoint
    windows, seed = data.path("windows", "train"), config.seed
    stream = {"train": lambda: _dataset(windows, seed)} if config.train.feed == "stream" else None
    trainer = TorchTrainer(
        _worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=config.train.workers, use_gpu=config.train.use_gpu, label_selector=config.placement.train or None
        ),
        run_config=RayRunConfig(
            name=inputs[:16],
            storage_path=ray_storage,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
        ),
        datasets=stream,
        dataset_config=None if stream is None else _WholeSplit(),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        stopped = storage.join(settings["checkpoints"], STOPPED)
        if storage.exists(stopped):
            raise TrainingStopped(storage.read_json(stopped)["why"]) from error
        raise
    facts = storage.read_json(storage.join(prefix, "training.json"))
    assert facts["rows_dropped"] == 0, facts
    read = {"data": data.manifest["inputs"], "text": None if text is None else text.manifest["inputs"]}
    directory.publish(inputs, kind="train", training=facts, read=read)
    storage.delete(ray_storage)
    storage.delete(kept)
    return directory


def _dataset(windows: str, seed: int) -> Any:
    """The windows' files, in another order for every execution."""
    filesystem, path = storage.resolve(windows)
    return ray.data.read_parquet(path, filesystem=filesystem, partitioning=None, shuffle=ray.data.FileShuffleConfig(seed=seed))
