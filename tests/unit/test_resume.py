"""A killed run goes on to the weights of the uninterrupted one, and what cannot go on stops and says where."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtrec_ray import storage
from mtrec_ray.config import RunConfig
from mtrec_ray.training import checkpoint, feed, loop, worker
from mtrec_ray.training.checkpoint import Checkpoints
from mtrec_ray.training.worker import run_worker
from tests import tiny
from tests.conftest import TinyRun

EVERY = 2
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.unit.test_resume"])


def everything(raw: dict[str, Any]) -> None:
    """A run with all that has a state: dropout, moving average, learned weights, schedule, accumulation."""
    raw["model"]["dropout"] = 0.2
    raw["balancing"] = {"kind": "uncertainty"}
    raw["train"] |= {
        "epochs": 3, "batch_windows": 8, "accumulate": 2, "schedule": "cosine", "warmup_steps": 3, "ema": 0.8, "clip_norm": 1.0,
        "checkpoint_every": EVERY,
    }  # fmt: skip


# --------------------------------------------------------------------------- processes that kill themselves


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(kill: tuple[Any, ...] | None) -> None:
    """Arrange the death of this process.

    kill: ("step", epoch, step) after that update; ("writing", n) in the middle of the n-th checkpoint's file;
    ("written", n) when it is there but the older ones are not yet deleted; ("evaluating", n).
    """
    if kill is None:
        return
    what, *where = kill
    calls: Counter[str] = Counter()

    def nth(name: str) -> bool:
        calls[name] += 1
        return what == name and calls[name] == where[0]

    original_step, original_save = loop.train_step, torch.save
    original_forget, original_evaluator = Checkpoints._forget, worker.valid_evaluator

    def train_step(*args: Any, **kw: Any) -> Any:
        found = original_step(*args, **kw)
        step = args[3][0].step
        if what == "step" and step == where[0] * kill_steps() + where[1]:
            die()
        return found

    def save(state: Any, file: Any) -> None:
        if nth("writing"):
            file.write(b"half a checkpoint" * 1000)
            file.flush()
            die()
        original_save(state, file)

    def forget(self: Checkpoints, name: str) -> None:
        if nth("written"):
            die()
        original_forget(self, name)

    def evaluator(*args: Any) -> Any:
        evaluate = original_evaluator(*args)

        def dies(model: Any) -> Any:
            if nth("evaluating"):
                die()
            return evaluate(model)

        return dies

    loop.train_step, torch.save, Checkpoints._forget = train_step, save, forget  # type: ignore[assignment, method-assign]
    worker.valid_evaluator = evaluator


def kill_steps() -> int:
    return int(os.environ["STEPS_PER_EPOCH"])


def note_windows(path: Path, rank: int, attempt: int) -> None:
    """Write down which windows each rank trains in which step."""
    original = loop.train_step
    indices: list[list[int]] = []
    original_collate = feed.collate

    def collate(cache: Any, index: Any, *args: Any, **kw: Any) -> Any:
        batch = original_collate(cache, index, *args, **kw)
        batch.marked = np.asarray(index).tolist()
        return batch

    def train_step(losses: Any, model: Any, optimizer: Any, micro: Any, *args: Any) -> Any:
        with open(path / f"windows-{rank}.jsonl", "a", encoding="utf-8") as file:
            found = [w for batch in indices.pop(0) for w in batch]
            file.write(json.dumps({"attempt": attempt, "step": micro[0].step, "windows": found}) + "\n")
        return original(losses, model, optimizer, micro, *args)

    run_epoch = feed.CachedFeed.epoch

    def epoch(self: Any, *args: Any) -> Any:
        for micro in run_epoch(self, *args):
            indices.append([b.marked for b in micro])  # type: ignore[attr-defined]
            yield micro

    feed.collate, loop.train_step, feed.CachedFeed.epoch = collate, train_step, epoch  # type: ignore[assignment, method-assign]


def _process(rank: int, world: int, port: int, config: str, prefix: str, out: str, kill: Any, steps: int, attempt: int) -> None:
    torch.set_num_threads(1)
    os.environ["STEPS_PER_EPOCH"] = str(steps)
    torch.rand(attempt * 7 + 3)  # the state of the generator at the start must not matter
    if world > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=world)
    note_windows(Path(out), rank, attempt)
    plant(kill if rank == world - 1 or (kill and kill[0] in ("writing", "written")) else None)

    def report(epoch: int, scalars: dict[str, float]) -> None:
        if rank == 0:
            kept = {k: v for k, v in scalars.items() if k != "train/seconds"} | {"epoch": epoch}
            with open(Path(out) / "reports.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")

    run_worker(RunConfig.model_validate_json(config), prefix, None, report, Checkpoints(Path(out) / "checkpoints"))
    if world > 1:
        dist.destroy_process_group()


def attempt(world: int, config: RunConfig, prefix: str, out: Path, kill: Any = None, steps: int = 0, number: int = 0) -> bool:
    """Run some ranks; when one dies, kill the others as a launcher does. -> whether all ended well."""
    out.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (world, port, config.model_dump_json(), prefix, str(out), kill, steps, number)
    ranks = [_server.Process(target=_process, args=(rank, *settings)) for rank in range(world)]
    for process in ranks:
        process.start()
    while any(p.is_alive() for p in ranks) and all(p.exitcode in (None, 0) for p in ranks):
        time.sleep(0.02)
    codes = [p.exitcode for p in ranks]
    for process in ranks:
        process.kill()
        process.join()
    assert codes == [0] * world or -signal.SIGKILL in codes, codes  # the others may have noticed
    return codes == [0] * world


def same(a: Any, b: Any, path: str = "") -> None:
    """Everything equal bit for bit, but for times."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if "seconds" not in str(key):
                same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def final(out: Path) -> dict[str, Any]:
    found = Checkpoints(out / "checkpoints").load()
    assert found is not None
    return found


def reports(out: Path) -> dict[int, dict[str, float]]:
    """The last report of every epoch."""
    lines = [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]
    return {line["epoch"]: line for line in lines}


def steps_of(config: RunConfig, prefix: str) -> int:
    return -(-len(windows_of(prefix)) // config.train.batch_windows)


def windows_of(prefix: str) -> feed.WindowCache:
    return feed.WindowCache.from_table(storage.read_table(storage.join(prefix, "windows", "train")))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_run_killed_anywhere_goes_on_to_the_weights_of_the_uninterrupted_run(
    tiny_run: TinyRun, tmp_path: Path, world: int
) -> None:
    config, prefix = tiny.make_config(tiny_run.folder, everything), tiny_run.data.prefix
    steps = steps_of(config, prefix)
    assert steps >= 6
    assert attempt(world, config, prefix, tmp_path / "whole")
    kills = [
        ("step", 0, 0),  # before there is any checkpoint
        ("step", 0, 3),  # a step after one
        ("writing", 1),
        ("written", 1),
        ("step", 0, steps - 1),
        ("evaluating", 1),
        ("step", 1, 0),  # with the epoch's own checkpoint the last one
        ("step", 1, EVERY - 1),  # just before one
        ("step", 1, EVERY),
        ("writing", 3),
        ("step", 2, steps - 2),
    ]
    for number, kill in enumerate(kills):
        assert not attempt(world, config, prefix, tmp_path / "killed", kill, steps, number), kill
    assert attempt(world, config, prefix, tmp_path / "killed", number=len(kills))
    same(final(tmp_path / "killed"), final(tmp_path / "whole"))
    assert reports(tmp_path / "killed") == reports(tmp_path / "whole")
    assert len(reports(tmp_path / "whole")) == 3
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == checkpoint.KEPT


@pytest.mark.slow
def test_with_another_number_of_workers_every_window_of_every_epoch_is_trained_once(tiny_run: TinyRun, tmp_path: Path) -> None:
    def change(raw: dict[str, Any]) -> None:
        everything(raw)
        raw["model"]["dropout"] = 0.0  # its noise is a rank's own
        raw["train"]["learning_rate"] = 1e-4  # Adam divides by tiny gradients, so rounding grows with every step

    config, prefix = tiny.make_config(tiny_run.folder, change), tiny_run.data.prefix
    steps, n = steps_of(config, prefix), len(windows_of(prefix))
    assert attempt(1, config, prefix, tmp_path / "whole")
    for number, (world, kill) in enumerate([(2, ("step", 0, 3)), (1, ("step", 1, 4)), (3, ("step", 2, 1)), (2, None)]):
        assert attempt(world, config, prefix, tmp_path / "elastic", kill, steps, number) == (kill is None)
    trained: dict[int, dict[int, list[int]]] = {}
    for path in (tmp_path / "elastic").glob("windows-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            trained.setdefault(line["step"], {}).setdefault(line["attempt"], []).extend(line["windows"])
    assert len({max(attempts) for attempts in trained.values()}) == 4  # each of the four trained something that counts
    for epoch in range(3):
        last = [trained[s][max(trained[s])] for s in range(epoch * steps, (epoch + 1) * steps)]
        assert sorted(w for windows in last for w in windows) == list(range(n))
    found, whole = final(tmp_path / "elastic"), final(tmp_path / "whole")
    assert found["progress"]["rows_trained"] == found["progress"]["rows_read"] == 3 * n
    assert found["progress"]["events"] == whole["progress"]["events"]
    for name, value in whole["losses"].items():
        torch.testing.assert_close(found["losses"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=name: f"{k}: {m}")
    for epoch, line in reports(tmp_path / "whole").items():
        again = reports(tmp_path / "elastic")[epoch]
        assert again["train/windows"] == n and again["train/retrieval/loss"] == pytest.approx(
            line["train/retrieval/loss"], rel=1e-4
        )
