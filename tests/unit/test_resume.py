"""A killed run goes on to the weights of the uninterrupted one, and what cannot go on stops and says where."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from mtrec_ray import storage
from mtrec_ray.config import ConfigError, RunConfig
from mtrec_ray.training import checkpoint, feed, loop, stream, worker
from mtrec_ray.training.checkpoint import CheckpointError, Checkpoints
from mtrec_ray.training.guard import TrainingStopped
from mtrec_ray.training.worker import run_worker
from tests import ranks, tiny
from tests.conftest import TinyRun
from tests.net import free_port

EVERY = 2


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

    kill: ("step", epoch, step) after that update; ("update", n) after the n-th one; ("writing", n) in the middle of the
    n-th checkpoint's file; ("written", n) when it is there but the older ones are not yet deleted; ("evaluating", n).
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
        step = args[2][0].step
        if what == "step" and step == where[0] * kill_steps() + where[1]:
            die()
        if nth("update"):
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
    original_step, original_collate = loop.train_step, feed.collate
    waiting: list[list[str]] = []

    def collate(cache: Any, index: Any, *args: Any, **kw: Any) -> Any:
        batch = original_collate(cache, index, *args, **kw)
        batch.names = [f"{cache.user_ids[i]}/{cache.columns['window'][i]}" for i in index.tolist()]
        return batch

    def noting(original: Any) -> Any:
        def epoch(self: Any, *args: Any) -> Any:
            for micro in original(self, *args):
                waiting.append([n for b in micro for n in b.names])
                yield micro

        return epoch

    def train_step(losses: Any, optimizer: Any, micro: Any, *args: Any) -> Any:
        with open(path / f"windows-{rank}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"attempt": attempt, "step": micro[0].step, "windows": waiting.pop(0)}) + "\n")
        return original_step(losses, optimizer, micro, *args)

    feed.collate = stream.collate = collate  # type: ignore[assignment]
    loop.train_step = train_step
    for kind in (feed.CachedFeed, stream.StreamFeed):
        kind.epoch = noting(kind.epoch)  # type: ignore[method-assign]


def names_of(prefix: str) -> list[str]:
    cache = windows_of(prefix)
    return sorted(f"{user}/{number}" for user, number in zip(cache.user_ids.to_pylist(), cache.columns["window"], strict=True))


def trained_windows(out: Path) -> dict[int, list[str]]:
    """Global step -> the windows that it trained when it was done last: what is in the weights."""
    trained: dict[int, dict[int, list[str]]] = {}
    for path in out.glob("windows-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            trained.setdefault(line["step"], {}).setdefault(line["attempt"], []).extend(line["windows"])
    return {step: attempts[max(attempts)] for step, attempts in trained.items()}


def poison(window: int) -> None:
    """An infinite rating in a window of the training data."""
    original = feed.WindowCache.open

    def opened(folder: Any, *texts: Any) -> feed.WindowCache:
        cache = original(folder, *texts)
        labels = np.array(cache.columns["label_rating"])
        labels[cache.offsets["target"][window]] = np.inf
        return feed.WindowCache({**cache.columns, "label_rating": labels}, cache.offsets, cache.user_ids)

    feed.WindowCache.open = opened  # type: ignore[method-assign, assignment]


def _process(rank: int, world: int, port: int, config: str, prefix: str, out: str, kill: Any, steps: int, attempt: int) -> None:
    torch.set_num_threads(1)
    os.environ["STEPS_PER_EPOCH"] = str(steps)
    torch.rand(attempt * 7 + 3)  # the state of the generator at the start must not matter
    if world > 1:
        ranks.join(rank, world, port)
    note_windows(Path(out), rank, attempt)
    if kill and kill[0] == "poison":
        poison(kill[1])
    elif rank == world - 1 or (kill and kill[0] in ("writing", "written")):
        plant(kill)

    def report(epoch: int, scalars: dict[str, float]) -> None:
        if rank == 0:
            kept = {k: v for k, v in scalars.items() if k != "train/seconds"} | {"epoch": epoch}
            with open(Path(out) / "reports.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(kept) + "\n")

    try:
        run_worker(RunConfig.model_validate_json(config), prefix, None, report, Checkpoints(Path(out) / "checkpoints"))
    except TrainingStopped as error:
        (Path(out) / f"stopped-{rank}.txt").write_text(str(error))
        return
    if world > 1:
        dist.destroy_process_group()


def attempt(world: int, config: RunConfig, prefix: str, out: Path, kill: Any = None, steps: int = 0, number: int = 0) -> bool:
    """Run some ranks; when one dies, kill the others as a launcher does. -> whether all ended well."""
    out.mkdir(exist_ok=True)
    settings = (world, free_port(), config.model_dump_json(), prefix, str(out), kill, steps, number)
    processes = [ranks.SERVER.Process(target=_process, args=(rank, *settings)) for rank in range(world)]
    for process in processes:
        process.start()
    while any(p.is_alive() for p in processes) and all(p.exitcode in (None, 0) for p in processes):
        time.sleep(0.02)
    codes = [p.exitcode for p in processes]
    for process in processes:
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
    trained = trained_windows(tmp_path / "elastic")
    for epoch in range(3):
        found = [w for step in range(epoch * steps, (epoch + 1) * steps) for w in trained[step]]
        assert sorted(found) == names_of(prefix)
    last, whole = final(tmp_path / "elastic"), final(tmp_path / "whole")
    assert last["progress"]["rows_trained"] == last["progress"]["rows_read"] == 3 * n
    assert last["progress"]["events"] == whole["progress"]["events"]
    for name, value in whole["losses"].items():
        torch.testing.assert_close(last["losses"][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, k=name: f"{k}: {m}")
    for epoch, line in reports(tmp_path / "whole").items():
        again = reports(tmp_path / "elastic")[epoch]
        assert again["train/windows"] == n and again["train/retrieval/loss"] == pytest.approx(
            line["train/retrieval/loss"], rel=1e-4
        )


def test_workers_are_a_number_or_a_range(tiny_folder: Path) -> None:
    def workers(value: Any) -> tuple[int, int]:
        train = tiny.make_config(tiny_folder, lambda raw: raw["train"].update(workers=value)).train
        return train.min_workers, train.max_workers

    assert [workers(v) for v in (0, 3, [1, 2], [2, 2])] == [(0, 0), (3, 3), (1, 2), (2, 2)]
    for wrong in (True, -1, 1.5, [0, 2], [2, 1], [1], [1, 2, 3], "two", None):
        with pytest.raises(ConfigError, match=r"train\.workers: Input should be a number of workers such as 2, or \[min, max\]"):
            workers(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("change", [lambda raw: None, everything])
def test_no_draw_depends_on_the_generators_state(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch, change: Callable[[dict[str, Any]], None]
) -> None:
    config = tiny.make_config(tiny_run.folder, lambda raw: (change(raw), raw["train"].update(epochs=1)))  # type: ignore[func-returns-value]
    original, states = feed.collate, []
    for number in (1, 2):

        def collate(*args: Any, number: int = number, **kw: Any) -> Any:
            torch.rand(number)  # somebody else draws between the steps
            return original(*args, **kw)

        monkeypatch.setattr(feed, "collate", collate)
        states.append(run_worker(config, tiny_run.data.prefix, None, lambda *_: None).best_state)
    same(states[0], states[1])


# --------------------------------------------------------------------------- the stream feed


def streaming(raw: dict[str, Any]) -> None:
    everything(raw)
    raw["train"] |= {"feed": "stream", "stream_buffer": 30}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_stream_trains_every_window_once_whatever_the_ranks_get(tiny_run: TinyRun, tmp_path: Path, world: int) -> None:
    """Three files: with two ranks one has twice as much, with four one has nothing at all."""
    config, prefix = tiny.make_config(tiny_run.folder, streaming), tiny_run.data.prefix
    n = len(windows_of(prefix))
    assert attempt(world, config, prefix, tmp_path / "run")
    progress = final(tmp_path / "run")["progress"]
    assert progress["rows_read"] == progress["rows_trained"] == 3 * n
    trained = [w for windows in trained_windows(tmp_path / "run").values() for w in windows]
    assert Counter(trained) == Counter({name: 3 for name in names_of(prefix)})
    assert all(line["train/windows"] == n and line["train/windows_dropped"] == 0 for line in reports(tmp_path / "run").values())


@pytest.mark.slow
def test_a_killed_stream_goes_on_at_the_start_of_the_epoch(tiny_run: TinyRun, tmp_path: Path) -> None:
    """The same files in the same order: then even the weights are those of the uninterrupted run."""
    config, prefix = tiny.make_config(tiny_run.folder, streaming), tiny_run.data.prefix
    assert attempt(2, config, prefix, tmp_path / "whole")
    steps = int(reports(tmp_path / "whole")[0]["train/steps"])
    assert not attempt(2, config, prefix, tmp_path / "killed", ("update", steps + 3))
    assert final(tmp_path / "killed")["progress"]["epoch"] == 1 and final(tmp_path / "killed")["progress"]["step"] == 0
    assert attempt(2, config, prefix, tmp_path / "killed", number=1)
    same(final(tmp_path / "killed"), final(tmp_path / "whole"))


# --------------------------------------------------------------------------- what stops a run


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_an_infinite_loss_stops_at_its_step_on_every_rank_and_keeps_the_last_good_checkpoint(
    tiny_run: TinyRun, tmp_path: Path, world: int
) -> None:
    config, prefix = tiny.make_config(tiny_run.folder, everything), tiny_run.data.prefix
    cache, steps = windows_of(prefix), steps_of(config, prefix)
    order = np.random.default_rng((config.seed, 0)).permutation(len(cache))
    bad_step = EVERY + 1  # the checkpoint of its end would be the second one
    window = int(order[bad_step * config.train.batch_windows])
    for number in range(2):  # going on meets it again
        assert attempt(world, config, prefix, tmp_path / "run", ("poison", window), steps, number)
        for rank in range(world):
            message = (tmp_path / "run" / f"stopped-{rank}.txt").read_text()
            (tmp_path / "run" / f"stopped-{rank}.txt").unlink()
            assert message.startswith(f"epoch 0, step {bad_step}: the loss of ['rating'] is not finite")
            user, first = cache.user_ids[window].as_py(), cache.columns["target_row"][cache.offsets["target"][window]]
            assert f"user '{user}' window {cache.columns['window'][window]} (targets from log row {first})" in message
            assert message.count("window ") == config.train.batch_windows
            assert f"00000-{EVERY:09d}-" in message
    kept = final(tmp_path / "run")
    assert kept["progress"]["step"] == EVERY
    assert all(bool(torch.isfinite(v).all()) for v in kept["losses"].values())


def stopped(config: RunConfig, prefix: str, out: Path) -> str:
    with pytest.raises(TrainingStopped) as caught:
        run_worker(config, prefix, None, lambda *_: None, Checkpoints(out))
    return str(caught.value)


@pytest.mark.parametrize("feed_name", ["cached", "stream"])
def test_memory_that_does_not_suffice_stops_with_the_batch_and_what_to_lower(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feed_name: str
) -> None:
    def change(raw: dict[str, Any]) -> None:
        everything(raw)
        raw["train"]["feed"] = feed_name

    original = loop.train_step

    def greedy(*args: Any) -> Any:
        if args[2][0].step == 3:
            torch.empty(2**55)  # a real refusal of the allocator
        return original(*args)

    monkeypatch.setattr(loop, "train_step", greedy)
    message = stopped(tiny.make_config(tiny_run.folder, change), tiny_run.data.prefix, tmp_path)
    assert message.startswith("epoch 0, step 3: out of memory (")
    assert "Raise train.accumulate, or lower train.batch_windows" in message and message.count("targets from log row") == 8


def test_an_update_that_breaks_the_weights_is_never_kept(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step

    def breaks(losses: Any, *args: Any) -> Any:
        found = original(losses, *args)
        if args[1][0].step == 2 * EVERY - 1:
            next(losses.parameters()).data[0] = float("nan")
        return found

    monkeypatch.setattr(loop, "train_step", breaks)
    message = stopped(tiny.make_config(tiny_run.folder, everything), tiny_run.data.prefix, tmp_path)
    assert message.startswith(f"epoch 0, step {2 * EVERY - 1}: the losses are finite, but the update left weights that are not")
    found = Checkpoints(tmp_path).load()
    assert found is not None and found["progress"]["step"] == EVERY


def test_an_update_that_breaks_the_weights_between_checkpoints_is_named_at_the_next_step(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.train_step

    def breaks(losses: Any, *args: Any) -> Any:
        found = original(losses, *args)
        if args[1][0].step == EVERY:
            for parameter in losses.parameters():
                parameter.data.fill_(float("nan"))
        return found

    monkeypatch.setattr(loop, "train_step", breaks)
    message = stopped(tiny.make_config(tiny_run.folder, everything), tiny_run.data.prefix, tmp_path)
    assert message.startswith(f"epoch 0, step {EVERY + 1}: the loss of ")
    assert f"All tasks at once: the update of step {EVERY} may have broken the weights." in message


def test_windows_that_go_missing_stop_the_run(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = stream.file_tables

    def loses_one(*args: Any) -> stream.Tables:
        return lambda epoch: (t.slice(1) if i == 1 else t for i, t in enumerate(original(*args)(epoch)))

    monkeypatch.setattr(worker, "file_tables", loses_one)
    n = len(windows_of(tiny_run.data.prefix))
    message = stopped(tiny.make_config(tiny_run.folder, streaming), tiny_run.data.prefix, tmp_path)
    assert f"epoch 0: the feed has {n} windows, but {n - 1} were trained" in message


# --------------------------------------------------------------------------- the files


def state(epoch: int, step: int = 0) -> dict[str, Any]:
    return {"progress": {"epoch": epoch, "step": step}, "weights": torch.arange(1000.0) + epoch}


def test_a_damaged_checkpoint_costs_some_steps_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = Checkpoints(tmp_path)
    names = [kept.save(state(epoch)) for epoch in range(4)]
    assert kept.names() == names[:1:-1]  # the last two, the newest first
    damaged = bytearray((tmp_path / names[3]).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (tmp_path / names[3]).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        found = Checkpoints(tmp_path).load()
    assert found is not None and found["progress"]["epoch"] == 2
    assert names[3] in caplog.text and "damaged" in caplog.text
    kept.save(state(2, 5))
    assert [n[:15] for n in kept.names()] == ["00002-000000005", "00002-000000000"]  # the damaged one is out of the count


@pytest.mark.parametrize("left", [0, 10])
def test_when_every_checkpoint_is_torn_the_error_names_them_and_the_cure(tmp_path: Path, left: int) -> None:
    kept = Checkpoints(tmp_path)
    for name in [kept.save(state(0)), kept.save(state(1))]:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*00001-000000000.*delete the folder to start anew"):
        kept.load()


def test_an_empty_or_missing_folder_is_a_start_anew(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).load() is None and Checkpoints(tmp_path / "missing").load() is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, "one").save(state(0))
    assert Checkpoints(tmp_path, "one").load() is not None
    with pytest.raises(CheckpointError, match="another configuration or other data"):
        Checkpoints(tmp_path, "two").load()


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path)
    name = kept.save(state(0))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=rf"cannot be written \(.*No space left.*goes on from .*{name}"):
        kept.save(state(1))
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_checkpoints_live_on_any_filesystem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an object store: an upload appears as a whole, one that broke off is noticed by its digest."""
    kept = Checkpoints(tmp_path / "far", "id")
    kept._local = False
    names = [kept.save(state(epoch)) for epoch in range(3)]
    assert kept.names() == names[:0:-1]
    (tmp_path / "far" / names[2]).write_bytes(b"")
    found = kept.load()
    assert found is not None and found["progress"]["epoch"] == 1 and torch.equal(found["weights"], state(1)["weights"])


def test_a_run_may_go_on_with_another_number_of_workers_but_not_with_another_config(tiny_run: TinyRun) -> None:
    one = tiny.make_config(tiny_run.folder, everything)
    other = tiny.make_config(tiny_run.folder, lambda raw: (everything(raw), raw["train"].update(learning_rate=0.5)))  # type: ignore[func-returns-value]
    fewer = tiny.make_config(tiny_run.folder, lambda raw: (everything(raw), raw["train"].update(workers=1, checkpoint_every=9)))  # type: ignore[func-returns-value]
    assert worker.run_identity(one, tiny_run.data, None) == worker.run_identity(fewer, tiny_run.data, None)
    assert worker.run_identity(one, tiny_run.data, None) != worker.run_identity(other, tiny_run.data, None)
    turned = tiny.make_config(
        tiny_run.folder, lambda raw: (everything(raw), raw.update(tasks=dict(reversed(raw["tasks"].items()))))
    )  # type: ignore[func-returns-value]
    assert worker.run_identity(one, tiny_run.data, None) != worker.run_identity(turned, tiny_run.data, None)
    assert worker.training_fingerprint(one, tiny_run.data, None) != worker.training_fingerprint(fewer, tiny_run.data, None)
