"""One training worker: prepared data and text vectors -> a fitted model. It knows no Ray."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from mtrec_ray import bundle, storage
from mtrec_ray.balancing import build_balancer
from mtrec_ray.config import RunConfig, SimilarityTask, load_config
from mtrec_ray.data.partition import hash_ids
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.encoders.event_texts import EventTexts
from mtrec_ray.encoders.tuning import TunedTexts, check_texts, check_tuning
from mtrec_ray.evaluation.evaluate import quick_metrics, quick_statistics
from mtrec_ray.evaluation.statistics import Statistics
from mtrec_ray.models.recommender import Recommender
from mtrec_ray.predictor import Predictor
from mtrec_ray.schema import LogSchema
from mtrec_ray.training import distributed, warm
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.feed import CachedFeed, Feed, PairSampler, WindowCache
from mtrec_ray.training.loop import Fitted, Metrics, Report, fit
from mtrec_ray.training.stream import StreamFeed, Tables, count_windows, file_tables

log = logging.getLogger(__name__)


def load_schema(data_prefix: str) -> LogSchema:
    return LogSchema.model_validate_json(storage.read_bytes(storage.join(data_prefix, "schema.json")))


def window_cache(data_prefix: str, split: str) -> Path:
    """Where this machine keeps the memory-mapped windows of prepared data."""
    uri = storage.join(data_prefix, "windows", split)
    key = storage.sha256(f"{storage.SCHEMA_VERSION} {uri}")[:16]
    return Path(tempfile.gettempdir()) / f"mtrec_ray-{os.getuid()}" / key


def mapped_windows(data_prefix: str, split: str, texts: EventTexts | None = None) -> WindowCache:
    """The windows of a split, memory-mapped on this machine. texts: vectors of the events' texts, where the model reads them."""
    folder = WindowCache.build(storage.join(data_prefix, "windows", split), window_cache(data_prefix, split))
    return WindowCache.open(folder, texts)


def check_machine(config: RunConfig) -> None:
    """Raises RuntimeError for what the configuration needs and this machine lacks, before anything starts."""
    build_balancer(config.balancing, [t.weight for t in config.tasks.values()])
    if config.encoder is not None:
        check_tuning(config.encoder)
    if config.train.compile and not config.train.use_gpu and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        raise RuntimeError("train.compile: there is no C++ compiler here (g++, clang++); install one, or set it to false")


def device_of(use_gpu: bool, key: str = "train.use_gpu") -> torch.device:
    """Where this process trains. Raises RuntimeError for a GPU that it does not see."""
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(f"{key}: this process sees no GPU; give the worker one, or set it to false")
    return torch.device("cuda", torch.cuda.current_device())


def build_model(config: RunConfig, schema: LogSchema, text_NE: torch.Tensor | None) -> Recommender:
    """The model with weights that depend on the seed alone."""
    torch.manual_seed(config.seed)
    return Recommender(config, schema, text_NE)


def tell_items(model: Recommender, catalogue: pa.Table) -> None:
    """What a fresh model must know of the items before it is trained."""
    model.read_catalogue(catalogue)
    known = catalogue.slice(0, model.schema.n_train_items)
    model.fit_items(hash_ids(known["item_id"]), torch.from_numpy(known["count"].to_numpy().astype(np.float64)))


def warm_start(model: Recommender, config: RunConfig, catalogue: pa.Table) -> None:
    """The weights of train.warm_start, where there is one. Raises BundleError, WarmStartError."""
    if config.train.warm_start is None:
        return
    old = bundle.load(bundle.find(config.train.warm_start))
    ids = catalogue["item_id"].to_pylist()
    told = warm.carry(model, ids, old.model.state_dict(), old.model, old.item_ids)
    if distributed.rank() == 0:
        log.info("train: warm from bundle %s: %s", old.fingerprint[:12], told.text())


def tune_texts(model: Recommender, config: RunConfig, catalogue: pa.Table) -> None:
    """Put the TextEncoder into the model where it is trained too. Raises EncoderError."""
    if config.encoder is not None and config.encoder.tuning is not None:
        texts = catalogue["text"].to_pylist()
        check_texts(texts[: model.schema.n_train_items])
        model.tuned = TunedTexts(config.encoder, texts, config.seed)


def export_encoder(config: RunConfig, fitted: Fitted, folder: str) -> None:
    """Write the trained TextEncoder as a Hugging Face directory, local or on an object store."""
    assert config.encoder is not None and fitted.encoder_state is not None
    tuned = TunedTexts(config.encoder, [], config.seed)
    tuned.load_state_dict(fitted.encoder_state)
    tuned.export(folder)


def training_fingerprint(config: RunConfig, data: storage.Directory, text: storage.Directory | None) -> str:
    """Fingerprint of everything that a published training depends on."""
    return _fingerprint(config, data, text, {"checkpoint_every", "max_failures"})


def run_identity(config: RunConfig, data: storage.Directory, text: storage.Directory | None) -> str:
    """Fingerprint of a run that may go on with another number of workers or threads, or on another device."""
    return _fingerprint(config, data, text, {"checkpoint_every", "max_failures", "workers", "threads", "use_gpu"})


def _fingerprint(config: RunConfig, data: storage.Directory, text: storage.Directory | None, left_out: set[str]) -> str:
    folds = {"profile_folds_test", "profile_fold_valid"}  # all of `evaluation` that training looks at
    parts = config.model_dump(mode="json", include={"seed", "model", "tasks", "balancing", "train"})
    parts["train"] = {k: v for k, v in parts["train"].items() if k not in left_out}
    if config.train.warm_start is None:
        del parts["train"]["warm_start"]
    else:  # what it is, not where
        parts["train"]["warm_start"] = bundle.fingerprint_of(bundle.find(config.train.warm_start))
    if config.encoder is not None and config.encoder.tuning is not None:
        parts["tuning"] = config.encoder.model_dump(mode="json", exclude={"workers", "compile", "use_gpu"})
    parts["order"] = list(config.tasks)  # draws and the optimiser's parameters go by it
    parts["evaluation"] = config.evaluation.model_dump(mode="json", include=folds)
    return storage.fingerprint({
        "config": parts,
        "data": data.manifest["inputs"],
        "text": None if text is None else text.manifest["inputs"],
    })  # fmt: skip


def build_feed(config: RunConfig, schema: LogSchema, cache: WindowCache, rank: int, world: int) -> CachedFeed:
    return CachedFeed(cache, schema, **_feed_settings(config, rank, world))


def build_stream(
    config: RunConfig, schema: LogSchema, windows_uri: str, tables: Tables, rank: int, world: int, texts: EventTexts | None = None
) -> StreamFeed:
    windows, empty = count_windows(windows_uri)
    settings = _feed_settings(config, rank, world) | {"buffer": config.train.stream_buffer, "texts": texts}
    return StreamFeed(tables, windows, empty, schema, **settings)


def _feed_settings(config: RunConfig, rank: int, world: int) -> dict[str, Any]:
    task = next((t for t in config.tasks.values() if isinstance(t, SimilarityTask)), None)
    pairs = None if task is None else PairSampler(task.within_positions, task.within_hours, task.share, config.seed)
    folds = (*config.evaluation.profile_folds_test, config.evaluation.profile_fold_valid)
    return {
        "batch_windows": config.train.batch_windows, "accumulate": config.train.accumulate, "seed": config.seed,
        "rank": rank, "world": world, "masked_folds": folds, "pairs": pairs,
    }  # fmt: skip


def valid_evaluator(config: RunConfig, schema: LogSchema, catalogue: pa.Table, cache: WindowCache) -> Any:
    """model -> metrics on valid: each rank measures its share of the users, all ranks see the whole."""
    codes = cache.user_ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    share = codes * distributed.world_size() // (codes.max(initial=0) + 1)
    mine = np.flatnonzero(share == distributed.rank())
    folds = (config.evaluation.profile_fold_valid,)

    def evaluate(model: Recommender) -> Metrics:
        with torch.no_grad():
            item_vec_ND = model.item_vectors()
        predictor = Predictor(config, schema, catalogue, model, item_vec_ND, fingerprint="training")
        statistics = quick_statistics(predictor, cache, mine, folds)
        return quick_metrics(predictor, Statistics.merge(distributed.gather_objects(statistics)), folds)

    return evaluate


def run_worker(
    config: RunConfig,
    data_prefix: str,
    text_prefix: str | None,
    report: Report,
    checkpoints: Checkpoints | None = None,
    tables: Tables | None = None,
) -> Fitted:
    """Train as this rank of an (optional) process group; every rank returns the same best weights.

    tables: this rank's windows for the `stream` feed; without it the rank reads its share of the files.
    """
    torch.set_num_threads(config.train.threads)
    rank, world = distributed.rank(), distributed.world_size()
    schema = load_schema(data_prefix)
    catalogue = storage.read_table(storage.join(data_prefix, "catalogue.parquet"))
    train_uri = storage.join(data_prefix, "windows", "train")
    texts = None if text_prefix is None else EventTexts.open(text_prefix)
    feed: Feed
    if config.train.feed == "stream":
        tables = tables or file_tables(train_uri, config.seed, rank, world)
        feed = build_stream(config, schema, train_uri, tables, rank, world, texts)
    else:
        feed = build_feed(config, schema, mapped_windows(data_prefix, "train", texts), rank, world)
    valid = mapped_windows(data_prefix, "valid", texts)
    text_NE = None if text_prefix is None else load_text_vectors(text_prefix, catalogue)
    model = build_model(config, schema, text_NE)
    tell_items(model, catalogue)
    warm_start(model, config, catalogue)
    tune_texts(model, config, catalogue)
    device = device_of(config.train.use_gpu)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # tensor cores for what stays float32
    return fit(config, model, feed, valid_evaluator(config, schema, catalogue, valid), report, checkpoints, device)


def main() -> None:
    """Command line of `python -m mtrec_ray.training.loop` and `torchrun -m mtrec_ray.training.loop`."""
    parser = argparse.ArgumentParser(description="Train on prepared data with plain torch, without Ray.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--data", required=True, help="published data directory (runs/NAME/data)")
    parser.add_argument("--text", help="published text vectors (runs/NAME/text)")
    parser.add_argument("--out", required=True, help="folder for the checkpoints; a run goes on from what is there")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = load_config(args.config, args.overrides)
    check_machine(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if config.train.use_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if config.train.use_gpu else "gloo")

    data, text = storage.Directory(args.data), None if args.text is None else storage.Directory(args.text)
    checkpoints = Checkpoints(args.out, run_identity(config, data, text))
    run_worker(config, data.prefix, None if text is None else text.prefix, lambda *_: None, checkpoints)
    if dist.is_initialized():
        dist.barrier()  # nobody leaves while another still writes
        dist.destroy_process_group()
        # threads of gloo or Arrow can outlive the interpreter and abort a process that has ended well (seen once in some
        # thirty runs: "terminate called without an active exception"); everything is written by now
        logging.shutdown()
        os._exit(0)
