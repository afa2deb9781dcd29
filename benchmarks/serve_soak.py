"""The service for a long time: `python -m benchmarks.serve_soak --minutes 30`.

The graph of five deployments, one replica each, SQLite, ML-100K; a mixed load at a given rate from this process: recommendations (a
tenth of them with an explanation, a filter or several users), events, scores, similar items, profiles, searches, items that join
and leave, and requests that are wrong. Every answer must have the status that it should have; every event that was acknowledged
must be in the store's log at the end. Memory is that of all processes of the service (proportional set sizes), the median of the
last tenth of the time against that of the tenth after a warm-up of one tenth.

Value: answers of status 5xx or none at all, plus acknowledged events that were not found.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.report import finish
from benchmarks.served import Callers, free_port, pss_bytes, serve_command, started
from mtrec_ray import storage
from mtrec_ray.serving.history import PreparedHistories

GROWTH, THREADS = 0.05, 6


class Load(Callers):
    """Requests of all kinds, from several threads, at a rate."""

    def __init__(self, url: str, users: list[str], items: list[str], per_second: float) -> None:
        super().__init__(THREADS)
        self.url, self.users, self.items, self.pause = url, users, items, THREADS / per_second
        self.statuses: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.acknowledged: set[tuple[str, str]] = set()

    def run(self, number: int) -> None:
        rng, count = random.Random(number), 0
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.stop.wait(self.pause * rng.uniform(0.5, 1.5)):
                count += 1
                method, path, body, expected, event = self._one(rng, f"{number}-{count}")
                try:
                    answer = client.request(method, path, json=body)
                    status = answer.status_code
                except httpx.TransportError as error:
                    status = 0
                    answer = error  # type: ignore[assignment]
                with self.lock:
                    self.statuses[f"{method} {path.split('/')[1]} {status}"] += 1
                    if status != expected and len(self.wrong) < 50:
                        self.wrong.append(
                            f"{method} {path}: {status}, expected {expected}: {getattr(answer, 'text', answer)!s:.300}"
                        )
                    if status == 200 and event is not None:
                        self.acknowledged.add(event)

    def _one(self, rng: random.Random, name: str) -> tuple[str, str, Any, int, tuple[str, str] | None]:
        """-> method, path, body, the status that is right, (user, event id)."""
        user, item, kind = rng.choice(self.users), rng.choice(self.items), rng.random()
        if kind < 0.50:
            return "POST", "/recommend", {"user_id": user, "k": rng.randint(1, 50)}, 200, None
        if kind < 0.53:
            return "POST", "/recommend", {"user_id": user, "explain": True}, 200, None
        if kind < 0.56:
            return "POST", "/recommend", {"user_id": user, "diversity": 0.4, "exclude": [item]}, 200, None
        if kind < 0.58:
            return "POST", "/recommend/many", {"requests": [{"user_id": rng.choice(self.users)} for _ in range(5)]}, 200, None
        if kind < 0.74:
            event = {"user_id": user, "event_id": name, "item_id": item, "timestamp": time.time_ns() // 1_000_000,
                     "actions": {"rating": float(rng.randint(1, 5))}}  # fmt: skip
            return "POST", "/events", {"events": [event]}, 200, (user, name)
        if kind < 0.80:
            return "POST", "/score", {"user_id": user, "item_ids": rng.sample(self.items, 20)}, 200, None
        if kind < 0.85:
            return "POST", "/similar", {"item_id": item}, 200, None
        if kind < 0.89:
            return "POST", "/profile", {"user_id": user}, 200, None
        if kind < 0.92:
            return (
                "POST",
                "/search",
                {"text": f"a film of the {rng.choice(['30', '50', '90'])}s about {rng.choice(['war', 'love', 'toys'])}"},
                200,
                None,
            )
        if kind < 0.94:
            columns = {"title": f"A New Film {rng.randint(0, 20)}", "year": "1998", "genres": "Comedy Drama"}
            return "PUT", f"/items/new-{rng.randint(0, 20)}", {"columns": columns}, 200, None
        if kind < 0.95:
            return "PATCH", f"/items/{item}", {"available": rng.random() < 0.8}, 200, None
        if kind < 0.96:
            return "POST", "/history", {"user_id": user}, 200, None
        if kind < 0.98:
            return "POST", "/recommend", {"user_id": user, "k": -1}, 422, None
        return "POST", "/similar", {"item_id": "nobody has this"}, 404, None


def main() -> int:
    parser = argparse.ArgumentParser(description="The service under a mixed load for a long time.")
    parser.add_argument("--run", default="runs/demo", help="a run of ML-100K, such as make demo leaves")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=12, help="requests per second")
    args = parser.parse_args()
    run, folder, port = storage.absolute(args.run), Path(tempfile.mkdtemp()), free_port()
    users = list(PreparedHistories(f"{run}/data").user_ids())
    items = storage.read_table(storage.Directory(f"{run}/bundle").path("catalogue.parquet"), ["item_id"])["item_id"].to_pylist()
    database, memory = folder / "live.sqlite", list[tuple[float, int]]()
    serving = {"store": {"kind": "sqlite", "path": str(database)}, "impressions": 0.2, "deadline_ms": 30_000}
    with started(serve_command(run, port, serving), port, {}) as service:
        began = time.monotonic()
        with Load(f"http://127.0.0.1:{port}", users, items, args.rate) as load:
            while time.monotonic() - began < 60 * args.minutes:
                time.sleep(min(15.0, args.minutes))
                memory.append((time.monotonic() - began, pss_bytes(service)))
                print(f"{memory[-1][0]:.0f} s: {memory[-1][1] >> 20} MiB, {sum(load.statuses.values())} requests, "
                      f"{len(load.wrong)} wrong", file=sys.stderr, flush=True)  # fmt: skip
        seconds = time.monotonic() - began
    with sqlite3.connect(database) as db:
        found = {(u, e) for u, e in db.execute("SELECT user_id, event_id FROM log")}
    shutil.rmtree(folder)
    lost = len(load.acknowledged - found)
    failed = sum(n for name, n in load.statuses.items() if name.endswith(" 0") or name.split()[-1].startswith("5"))
    whole = memory[-1][0]
    first = float(np.median([m for t, m in memory if 0.1 * whole <= t <= 0.2 * whole]))
    last = float(np.median([m for t, m in memory if t >= 0.9 * whole]))
    detail = {
        "minutes": seconds / 60, "requests": dict(sorted(load.statuses.items())), "acknowledged": len(load.acknowledged),
        "lost": lost, "failed": failed, "wrong": load.wrong, "first_mib": first / 2**20, "last_mib": last / 2**20,
        "growth": last / first - 1, "memory_mib": [[round(t), m >> 20] for t, m in memory],
    }  # fmt: skip
    ok = failed + lost == 0 and not load.wrong and last / first - 1 < GROWTH
    return finish("serve_soak", failed + lost, "5xx plus lost events", f"0, memory growth < {GROWTH}", ok, detail)


if __name__ == "__main__":
    sys.exit(main())
