"""What happens when something dies: `make chaos`, or `python -m benchmarks.chaos --run runs/demo`; writes docs/reliability.md.

Each case breaks one thing in mid-work, on MovieLens-100K: kill -9 of a Ray Train worker, the train controller, a raylet, the
driver; a damaged checkpoint; kill -9 of a Ray Data actor; a disk that is full; an object store that is full; kill -9 of Serve's
proxy and of its controller under load. Said of each: what the user sees, what is lost, what it cost until all was normal. Training
counts as whole when its weights are those of an undisturbed run, bit for bit; scoring and preparation when their output is.
Replicas, rollouts and the store are the cases of `benchmarks.serve_faults`; twenty kills of batch scoring those of
`benchmarks.batch_kill`: their results are told on the same page.

Value: cases in which something that was acknowledged was lost, or that did not become whole again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow as pa

from benchmarks.report import RESULTS, finish
from benchmarks.served import Callers, Deployed, free_port, started
from mtrec_ray import storage
from mtrec_ray.serving.history import PreparedHistories

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
CONFIG = "jobs/configs/ml100k.yaml"
TRAIN = ["train.epochs=3", "train.checkpoint_every=20", "train.workers=2"]
WAIT = 400.0
"""Seconds after which a job counts as hung."""


@dataclass
class Case:
    """One thing that broke."""

    what: str
    seen: str
    lost: str
    seconds: float
    """Until all was normal; of a job, beyond what it takes undisturbed."""
    whole: bool


class Job:
    """One of the jobs, in a process of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.began = time.monotonic()
        self.noise = tempfile.TemporaryFile()
        settings = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        settings |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "HF_HUB_OFFLINE": "1"} | environment
        self.process = subprocess.Popen([sys.executable, "-m", *arguments], env=settings, stdout=self.noise, stderr=self.noise)
        self.pids: set[int] = set()

    def below(self, name: str) -> list[int]:
        """Processes that this job started whose title begins so."""
        found = []
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    self.pids.add(child.pid)
                    if (child.cmdline() or [""])[0].startswith(name) or child.name() == name:
                        found.append(child.pid)
        return found

    def wait_until(self, ready: Callable[[], Any]) -> None:
        """Raises RuntimeError where the job ends before."""
        until = time.monotonic() + WAIT
        while not ready():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the job ended too early, or hung:\n{self.text()[-2000:]}")
            time.sleep(0.02)
        self.below("")

    def end(self) -> int | None:
        """Its exit code; None: it hung and was killed."""
        try:
            return self.process.wait(WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return None
        finally:
            for pid in self.pids:  # of a driver that was killed
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def text(self) -> str:
        self.noise.seek(0)
        return self.noise.read().decode(errors="replace")

    def said(self) -> str:
        """What a person reads last."""
        lines = [line for line in self.text().splitlines() if line.startswith("error: ")]
        return lines[-1].removeprefix("error: ")[:200] if lines else ""


def _kill(pids: list[int]) -> None:
    """Raises RuntimeError where there is nobody to kill: a case that kills nothing would always be whole."""
    if not pids:
        raise RuntimeError("the process that was to be killed is not there")
    os.kill(pids[0], signal.SIGKILL)


def linked(source: str, target: Path, *names: str) -> str:
    """Some folders of a run at another place, without copying -> the run."""
    for name in names:
        shutil.copytree(Path(source, name), target / name, copy_function=os.link)
    return str(target)


# ------------------------------------------------------------------ training


class Training:
    """Training that is broken in mid-epoch, beside one that is not."""

    def __init__(self, run: str, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.expected, self.seconds = self._undisturbed()

    def job(self, out: str) -> Job:
        return Job("jobs.train", "--config", CONFIG, "--out", out, *TRAIN)

    def _undisturbed(self) -> tuple[bytes, float]:
        """The second of two runs: the first one finds nothing in the machine's caches."""
        for name in ("first", "whole"):
            out = linked(self.run, self.folder / name, "data", "text")
            job = self.job(out)
            assert job.end() == 0, job.text()[-3000:]
        return self.weights(out), time.monotonic() - job.began

    def weights(self, out: str) -> bytes:
        return storage.read_bytes(storage.Directory(f"{out}/train").path("weights.safetensors"))

    def case(self, what: str, break_it: Callable[[Job], None], between: Callable[[Path], None] | None = None) -> Case:
        out = linked(self.run, self.folder / what.replace(" ", "-"), "data", "text")
        checkpoints = Path(out, "train", "_checkpoints")
        job = self.job(out)
        job.wait_until(lambda: len(list(checkpoints.rglob("*.pt"))) > (0 if between is None else 1))
        break_it(job)
        code, said, again = job.end(), job.said(), 0
        if between is not None:
            between(checkpoints)
        while code != 0 and again < 2:
            again += 1
            second = self.job(out)
            code = second.end()
            said = said or second.said()
        took = time.monotonic() - job.began
        seen = "the job goes on by itself" if again == 0 else f"the job ends{f': {said}' if said else ''}; the same command goes on"
        whole = code == 0 and self.weights(out) == self.expected
        return Case(what, seen, "nothing: weights equal to the bit" if whole else "the run", took - self.seconds, whole)


def damaged(checkpoints: Path) -> None:
    """The newest checkpoint loses its second half."""
    newest = max(checkpoints.rglob("*.pt"), key=lambda p: p.stat().st_mtime)
    with open(newest, "r+b") as file:
        file.truncate(newest.stat().st_size // 2)


def training_cases(run: str, folder: Path) -> list[Case]:
    training, cases = Training(run, folder), []

    def add(what: str, break_it: Callable[[Job], None], between: Callable[[Path], None] | None = None) -> None:
        cases.append(training.case(what, break_it, between))
        print(json.dumps(asdict(cases[-1])), file=sys.stderr, flush=True)

    add("kill -9 of a Ray Train worker in mid-epoch", lambda job: _kill(job.below("ray::RayTrainWorker")))
    add("kill -9 of the Ray Train controller", lambda job: _kill(job.below("ray::TrainController")))
    add("kill -9 of the raylet under a training", lambda job: _kill(job.below("raylet")))
    add("kill -9 of the driver of a training", lambda job: job.process.kill())
    add("a damaged checkpoint after a kill", lambda job: job.process.kill(), damaged)
    return cases


# ------------------------------------------------------------------ data


def lists(out: str) -> pa.Table:
    return storage.read_table(f"{out}/scores").sort_by([("user_id", "ascending"), ("rank", "ascending")])


def data_actor(run: str, folder: Path) -> Case:
    """A Ray Data actor of batch scoring."""
    took, found = [], []
    for name in ("scored", "scored-killed"):
        out = linked(run, folder / name, "data", "text", "train", "bundle", "evaluation")
        job = Job("jobs.score", "--config", CONFIG, "--out", out, "scoring.batch_users=2")
        if name == "scored-killed":
            job.wait_until(partial(job.below, "ray::MapWorker"))
            time.sleep(1.5)
            _kill(job.below("ray::MapWorker"))
        code = job.end()
        took.append(time.monotonic() - job.began)
        found.append(lists(out) if code == 0 else None)
    whole = found[1] is not None and found[1].equals(found[0])
    seen = "the job goes on by itself" if whole else f"the job ends: {job.said()}"
    lost = "nothing: lists equal" if whole else "lists"
    return Case("kill -9 of a Ray Data actor of batch scoring", seen, lost, took[1] - took[0], whole)


def full_disk(folder: Path) -> Case | None:
    """Preparation into a file system of three MiB; None where this user may not mount one."""
    place = folder / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        return None
    try:
        job = Job("jobs.prepare", "--config", CONFIG, "--out", str(place / "run"))
        code, published = job.end(), (place / "run" / "data" / "manifest.json").exists()
        began = time.monotonic()
        subprocess.run(["mount", "-o", "remount,size=500m", str(place)], check=True)
        second = Job("jobs.prepare", "--config", CONFIG, "--out", str(place / "run"))
        whole = code == 2 and not published and second.end() == 0
        storage.Directory(str(place / "run" / "data")).verify()
        said = job.said().replace(str(place), "DISK")
        return Case("a disk that is full in preparation", f"the job ends: {said}; with room the same command succeeds",
                    "nothing: what was published stays, a half is never seen", time.monotonic() - began, whole)  # fmt: skip
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


FULL_STORE = """
import sys, time
import numpy as np, ray
ray.init(num_cpus=4, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
held = [ray.put(np.zeros(10 << 20, np.uint8)) for _ in range(7)]
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def full_object_store(folder: Path) -> Case:
    """Preparation on a cluster whose object store of 80 MiB has 70 held by somebody else."""
    command = [sys.executable, "-c", FULL_STORE]
    took = []
    alone = os.environ | {"RAY_AUTH_MODE": "disabled"}  # another process connects to it
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone) as cluster:
        assert cluster.stdin is not None and cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        job = Job("jobs.prepare", "--config", CONFIG, "--out", str(folder / "store"), RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
        code = job.end()
        took.append(time.monotonic() - job.began)
        cluster.stdin.close()
    plain = Job("jobs.prepare", "--config", CONFIG, "--out", str(folder / "plain"))
    plain.end()
    took.append(time.monotonic() - plain.began)
    expected, found = (storage.Directory(str(folder / n / "data")) for n in ("plain", "store"))
    whole = code == 0 and found.manifest["files"] == expected.manifest["files"]
    seen = "the job goes on: preparation goes through files, and the store spills" if whole else f"the job ends: {job.said()}"
    return Case(
        "an object store that is full", seen, "nothing: files equal" if whole else "the preparation", took[0] - took[1], whole
    )


# ------------------------------------------------------------------ serving


class Load(Callers):
    """Callers that recommend and send events."""

    def __init__(self, url: str, users: list[str]) -> None:
        super().__init__(3)
        self.url, self.users = url, users
        self.answers: list[tuple[float, int]] = []
        self.acknowledged: set[tuple[str, str]] = set()

    def run(self, number: int) -> None:
        rng, count = random.Random(number), 0
        while not self.stop.wait(0.2):
            count += 1
            user, name, began = rng.choice(self.users), f"{number}-{count}", time.time()
            event = {"user_id": user, "event_id": name, "item_id": "50", "timestamp": int(began * 1000), "actions": {"rating": 4.0}}
            path, body = ("/recommend", {"user_id": user}) if count % 2 else ("/events", {"events": [event]})
            try:
                status = httpx.post(self.url + path, json=body, timeout=60).status_code
            except httpx.TransportError:
                status = 0
            with self.lock:
                self.answers.append((began, status))
                if status == 200 and path == "/events":
                    self.acknowledged.add((user, name))


def serving_cases(run: str, folder: Path) -> list[Case]:
    """Serve's proxy and controller, with one replica of everything and SQLite."""
    port, cases = free_port(), []
    store = {"kind": "sqlite", "path": str(folder / "live.sqlite")}
    options = {"num_replicas": 1, "max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}}
    deployed = Deployed(folder, run, port, {"store": store, "deadline_ms": 20_000}, options)
    users = list(PreparedHistories(f"{run}/data").user_ids())
    with started(deployed.command, port, {}) as service:

        def processes(title: str) -> list[int]:
            found = []
            for child in service.children(recursive=True):
                with suppress(psutil.Error):
                    if (child.cmdline() or [""])[0].startswith(title):
                        found.append(child.pid)
            return found

        with Load(f"http://127.0.0.1:{port}", users) as load:
            for what, title in (("Serve's proxy", "ray::ProxyActor"), ("Serve's controller", "ray::ServeController")):
                time.sleep(10)
                before, moment = set(processes(title)), time.time()
                _kill(sorted(before))
                until = time.monotonic() + 120
                while time.monotonic() < until and not set(processes(title)) - before:
                    time.sleep(0.2)
                time.sleep(20)
                bad = [began for began, status in load.answers if began > moment and (status == 0 or status >= 500)]
                seconds = max(bad, default=moment) - moment
                whole = bool(set(processes(title)) - before) and (not bad or load.answers[-1][1] == 200)
                seen = (
                    f"{len(bad)} of {sum(t > moment for t, _ in load.answers)} requests fail"
                    if bad
                    else "nothing: no request fails"
                )
                cases.append(Case(f"kill -9 of {what}", seen, "", seconds, whole))
    kept = _kept(Path(store["path"]))
    lost = len(load.acknowledged - kept)
    for case in cases:
        case.lost = "nothing" if not lost else f"{lost} acknowledged events"
        case.whole = case.whole and not lost
        print(json.dumps(asdict(case)), file=sys.stderr, flush=True)
    return cases


def _kept(store: Path) -> set[tuple[str, str]]:
    import sqlite3

    with sqlite3.connect(store) as database:
        return {(str(u), str(e)) for u, e in database.execute("SELECT user_id, event_id FROM log")}


# ------------------------------------------------------------------ the page


def rows(cases: list[Case]) -> list[str]:
    return [f"| {c.what} | {c.seen} | {c.lost} | {max(0.0, c.seconds):.0f} |" for c in cases]


def page(cases: list[Case]) -> str:
    """docs/reliability.md."""
    serving = json.loads((RESULTS / "serve_faults.json").read_text(encoding="utf-8"))["detail"]
    batch = json.loads((RESULTS / "batch_kill.json").read_text(encoding="utf-8"))
    near = ", ".join(f"{n} of status {s}" for s, n in serving["statuses_within_two_seconds"].items())
    equal = "that of an undisturbed run" if batch["detail"]["equal"] else "**not** that of an undisturbed run"
    faults = [(f["fault"].replace("kill", "kill -9 of a replica of"), f["seconds_until_whole"]) for f in serving["faults"]]
    lines = [
        "# What happens when something dies", "",
        "Written by `make chaos`: `python -m benchmarks.chaos`, beside `python -m benchmarks.serve_faults` and",
        "`python -m benchmarks.batch_kill`; two cores, MovieLens-100K, raw results under `benchmarks/results/`. Seconds are",
        "those until all is normal again; of a job, those beyond what it takes undisturbed.", "",
        "| what broke | what the user sees | what is lost | seconds |", "|---|---|---|---|", *rows(cases), "",
        "## The service with two replicas of everything, under load", "",
        "| what broke | seconds until all runs again |", "|---|---|", *(f"| {what} | {took:.0f} |" for what, took in faults), "",
        f"Of {serving['calm_requests']:,} requests that started later than two seconds after a fault {len(serving['calm_errors'])}",
        f"failed; within those two seconds: {near}. {len(serving['mixed'])} answers mixed two bundles;",
        f"{serving['lost']} of {serving['acknowledged']:,} acknowledged events were lost.", "",
        "## Batch scoring, again and again", "",
        f"{len(batch['detail']['kills'])} kills of driver, actors and raylets in turn: {100 * batch['value']:.1f} % of the",
        f"shards were begun again, and the output was {equal}.", "",
        "## What holds it up", "",
        "- What is published appears with its manifest, which is written last ([design.md](design.md)).",
        "- A checkpoint is written whole or not at all, and the last two are kept ([training.md](training.md)).",
        "- A shard of scoring or encoding counts when its entry is there ([scoring.md](scoring.md)).",
        "- An event is in SQLite (`synchronous=FULL`) or Redis (`appendfsync always`) before it is acknowledged",
        "  ([serving.md](serving.md)).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def data_cases(run: str, folder: Path) -> list[Case]:
    works: list[Callable[[], Case | None]] = [
        partial(data_actor, run, folder), partial(full_disk, folder), partial(full_object_store, folder)
    ]  # fmt: skip
    cases = []
    for work in works:
        found = work()
        if found is None:
            print("not tried: a disk that is full, since this user may not mount a small file system", file=sys.stderr)
            continue
        cases.append(found)
        print(json.dumps(asdict(found)), file=sys.stderr, flush=True)
    return cases


GROUPS: dict[str, Callable[[str, Path], list[Case]]] = {
    "training": training_cases, "data": data_cases, "serving": serving_cases
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="What happens when something dies.")
    parser.add_argument("--run", default="runs/demo", help="a run of ML-100K, such as make demo leaves")
    parser.add_argument("--only", choices=list(GROUPS), help="run these cases again, and keep the results of the others")
    args = parser.parse_args()
    run, kept = storage.absolute(args.run), RESULTS / "chaos.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["detail"] if args.only and kept.exists() else {}
    folder = Path(tempfile.mkdtemp(dir=Path(run).parent))
    try:
        for group in [args.only] if args.only else GROUPS:
            found[group] = [asdict(c) for c in GROUPS[group](run, folder)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    cases = [Case(**c) for group in GROUPS for c in found.get(group, [])]
    bad = [c.what for c in cases if not c.whole]
    code = finish("chaos", len(bad), "cases with a loss", "0", not bad, found)
    PAGE.write_text(page(cases), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
