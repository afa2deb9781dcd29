"""How Ray is started here and on a cluster, and checks that refuse what would hang."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
import ray.data

from mtrec_ray import storage
from mtrec_ray.config import RunConfig

log = logging.getLogger(__name__)

Shared = TypeVar("Shared")
Item = TypeVar("Item")
Result = TypeVar("Result")

# A busy small machine needs more than Serve's five seconds to start a proxy; set before Ray starts.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class PreflightError(RuntimeError):
    """Something that would hang or fail later, with the cure."""


def connect(num_cpus: int | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS (a submitted job has one), or start Ray on this machine.

    On one machine Ray gets at least 4 logical CPUs, so that two workers and Ray Data fit a small laptop.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check_answers(address)
        try:
            ray.init(address="auto", log_to_driver=True)
        except ConnectionError as error:  # the cause says more: another version, a token that is missing
            raise PreflightError(f"RAY_ADDRESS is {address}: {error}. {error.__cause__ or ''}".rstrip()) from None
        return
    ray.init(
        address="local",
        num_cpus=num_cpus or max(4, os.cpu_count() or 1),
        object_store_memory=512 << 20,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        log_to_driver=True,
        logging_level=logging.WARNING,
    )


def _check_answers(address: str) -> None:
    """Raises PreflightError where nothing listens: Ray itself would end the process, without a message of its own."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:  # auto, ray://: Ray says what is wrong
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise PreflightError(
            f"RAY_ADDRESS is {address}, and no Ray cluster answers there ({error.strerror or error}). Correct it, or unset it "
            "to run on this machine"
        ) from None


@dataclass
class Progress:
    """Rates of what rows count in a column."""

    column: str
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self._before = self.done

    def add(self, row: dict[str, Any]) -> None:
        self.done += int(row[self.column])

    def text(self, seconds: float) -> str:
        """`, 1200 of 5000 users, 300 per second, 13 s left`."""
        rate = (self.done - self._before) / max(seconds, 1e-9)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        return f", {self.done} of {self.total} {self.column}, {rate:.0f} per second{left}"


def collect(dataset: Any, what: str, total: int) -> list[dict[str, Any]]:
    """All rows of a small Ray Data result."""
    return list(rows_of(dataset, what, total))


def rows_of(dataset: Any, what: str, total: int, every: float = 5.0, progress: Progress | None = None) -> Iterator[dict[str, Any]]:
    """Rows of a Ray Data result as they come, with a progress line at most every so many seconds.

    On a terminal Ray Data's own bars show the operators too.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    if not context.enable_progress_bars:  # one line of ours instead of several of Ray Data's per pass
        for name in ("ray.data", "ray.data._internal.execution.streaming_executor"):
            logging.getLogger(name).setLevel(logging.ERROR)
    started = told = time.perf_counter()
    for n, row in enumerate(dataset.iter_rows(), 1):
        now = time.perf_counter()
        if progress is not None:
            progress.add(row)
        if now - told >= every or n == total:
            told = now
            more = "" if progress is None else progress.text(now - started)
            log.info("%s: %d of %d, %.0f s%s", what, n, total, now - started, more)
        yield row


def for_each(
    function: Callable[[Shared, Item], Result],
    shared: Shared,
    items: Sequence[Item],
    what: str,
    options: Mapping[str, Any] | None = None,
) -> Iterator[tuple[int, Result]]:
    """function(shared, item) for every item, as Ray Data tasks -> (place of the item, result), as they are done.

    shared is sent to every worker once; results are small, large ones are written to files by the function. A ValueError or
    StorageError of a task is raised here as it is, and the other tasks end.
    options: of Ray Data's `map`, such as `num_cpus`.
    """
    if not items:
        return
    ref = ray.put((function, shared, list(items)))

    def run(row: dict[str, Any]) -> dict[str, Any]:
        work, common, all_items = ray.get(ref)
        try:
            return {"place": row["place"], "out": pickle.dumps(work(common, all_items[int(row["place"])])), "error": b""}
        except (
            ValueError,
            storage.StorageError,
        ) as error:  # a user's mistake: said once, by the driver, without Ray Data's wrapping
            return {"place": row["place"], "out": b"", "error": pickle.dumps(error)}

    rows = [{"place": i} for i in range(len(items))]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(run, **(options or {}))
    for row in rows_of(dataset, what, len(items)):
        if row["error"]:
            raise pickle.loads(row["error"])
        yield int(row["place"]), pickle.loads(row["out"])


def capacity() -> dict[str, float]:
    """Resources of the cluster's nodes; where an autoscaler may add nodes, of the most that it may have."""
    there = {n: float(v) for n, v in ray.cluster_resources().items()}
    for name, most in (ray._private.state.state.get_max_resources_from_cluster_config() or {}).items():
        there[name] = max(there.get(name, 0.0), float(most))
    return there


def grows() -> bool:
    """Whether an autoscaler may add nodes."""
    return bool(ray._private.state.state.get_max_resources_from_cluster_config())


def place(config: RunConfig) -> None:
    """Send what Ray Data does to the nodes that the configuration names. Raises PreflightError where no node is of that kind."""
    nodes = [n for n in ray.nodes() if n["Alive"]]
    for key, wanted in (("train", config.placement.train), ("batch", config.placement.batch)):
        if not wanted or grows() or any(wanted.items() <= n.get("Labels", {}).items() for n in nodes):
            continue
        there = sorted({f"{k}={v}" for n in nodes for k, v in n.get("Labels", {}).items() if not k.startswith("ray.io/")})
        raise PreflightError(
            f"placement.{key} asks for nodes labelled {', '.join(f'{k}={v}' for k, v in wanted.items())}, and the cluster has none "
            f"(labels there: {', '.join(there) or 'none'}): work would wait for ever. Start nodes with `ray start --labels`, or "
            f"leave placement.{key} out"
        )
    ray.data.DataContext.get_current().execution_options.label_selector = dict(config.placement.batch) or None


def preflight(config: RunConfig, out: str) -> None:
    """Refuse a run that this cluster cannot carry. Needs a connection.

    Raises PreflightError: too few CPUs or GPUs for the training workers, or none beside them for the
    `stream` feed; labels that no node has; local paths on several nodes.
    """
    place(config)
    resources = capacity()
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    train = config.train
    if train.min_workers > cpus:
        raise PreflightError(
            f"train.workers is {train.min_workers}, but the cluster has {cpus:g} CPUs: training would wait for ever. "
            "Lower train.workers or add nodes"
        )
    free = ray.available_resources().get("CPU", 0)
    if train.min_workers > free and not grows():
        log.warning("train.workers is %d and %g CPUs are free now: training waits until others end", train.min_workers, free)
    if train.use_gpu and train.min_workers > gpus:
        raise PreflightError(f"train.use_gpu with {train.min_workers} workers, but the cluster has {gpus:g} GPUs")
    if config.encoder is not None and config.encoder.use_gpu and config.encoder.workers > gpus:
        raise PreflightError(
            f"encoder.use_gpu with {config.encoder.workers} workers, but the cluster has {gpus:g} GPUs: encoding would wait. "
            "Lower encoder.workers, or set it to false"
        )
    if train.feed == "stream" and not train.use_gpu and train.max_workers >= cpus:
        raise PreflightError(
            f"train.feed is stream and train.workers may take {train.max_workers} of the cluster's {cpus:g} CPUs: Ray Data would "
            f"have none left to read with, and training would hang. Set train.workers to at most {max(0, int(cpus) - 1)}, add "
            "CPUs, or set train.feed to cached"
        )
    if {"ials", "bpr"} & set(config.evaluation.baselines) and importlib.util.find_spec("implicit") is None:
        raise PreflightError("evaluation.baselines: ials and bpr need the package implicit: pip install 'mtrec_ray[baselines]'")
    nodes = [n for n in ray.nodes() if n["Alive"]]
    tables = (config.data.interactions, config.data.items, config.data.users)
    paths = [out, *[t.path for t in tables if t is not None]]
    if len(nodes) > 1 and os.environ.get("MTREC_SHARED_FILESYSTEM") != "1":
        local = [p for p in paths if storage.is_local(p)]
        if local:
            raise PreflightError(
                f"the cluster has {len(nodes)} nodes and these paths are local to one: {local}. Use an object store URI, "
                "or set MTREC_SHARED_FILESYSTEM=1 when every node mounts them"
            )
