"""What the service adds to the predictor: `python -m benchmarks.serve_latency --run runs/demo`.

`POST /recommend`, k = 10, stored histories, users at random, from wrk in a process of its own (Debian's package), for 1, 8 and 32
clients. Variants: the graph (five deployments) and the fused service (one), each as Serve starts by default and in throughput mode
(RAY_SERVE_ENABLE_HA_PROXY=1, RAY_SERVE_THROUGHPUT_OPTIMIZED=1), one replica of everything; beside them a bare FastAPI + uvicorn
process around the same predictor, the predictor called in process, and an empty graph: an ingress that calls three deployments, one
after the other, which do nothing (what Serve itself takes). User states are not remembered (cached_states: 0), except in the
variants that say so, and in the measurement of what a repeated request costs: CPU seconds of all processes of the service per
request, less what they take while nobody asks, the same user again and again, against the same without remembering. The requests
per second over the bare process are told for both: every answer computed, and as deployed (states remembered, users at random of
all), which is what the bar is held to. Last, what a service with a queue of two says to 32 clients at once: 429 with Retry-After,
and no other error.

Value: milliseconds that the graph in throughput mode adds at one client to the predictor's own p50.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.report import finish
from benchmarks.served import THROUGHPUT, cpu_seconds, free_port, serve_command, started

CLIENTS, SECONDS, WARM = (1, 8, 32), 8, 2
ADDED, ADDED_THROUGHPUT, OF_BARE, REPEATED = 12.0, 5.0, 0.8, 0.5
LUA = """
local users = {%s}
local n = 0
wrk.method, wrk.headers["content-type"] = "POST", "application/json"
function init(args) math.randomseed(7) end
request = function()
  return wrk.format(nil, "/recommend", nil, '{"user_id":"' .. users[math.random(#users)] .. '","k":10}')
end
"""
BARE = """
import sys
import torch
from fastapi import FastAPI
from mtrec_ray import bundle
from mtrec_ray.histories import History
from mtrec_ray.serving import api
from mtrec_ray.serving.history import PreparedHistories

torch.set_num_threads(1)
predictor, store = bundle.load(sys.argv[1] + "/bundle"), PreparedHistories(sys.argv[1] + "/data")
app = FastAPI()

@app.post("/recommend", response_model=api.RecommendAnswer)
async def recommend(request: api.RecommendRequest):
    history = store.get(request.user_id) or History()
    answer = predictor.recommend([history], request.k)[0]
    return {"user_id": request.user_id, "bundle": predictor.fingerprint, **answer}

import uvicorn
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
"""
EMPTY = """
import sys, time
import ray
from fastapi import FastAPI
from ray import serve
app = FastAPI()
ray.init(num_cpus=8, object_store_memory=200 << 20, include_dashboard=False, log_to_driver=False)
small = {"max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}}

@serve.deployment(**small)
class Nothing:
    async def answer(self, x):
        return x

@serve.deployment(**small)
@serve.ingress(app)
class Ingress:
    def __init__(self, *stages):
        self.stages = stages

    @app.post("/recommend")
    async def recommend(self, body: dict):
        for stage in self.stages:
            await stage.answer.remote(b"x" * 2000)
        return {}

serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
stages = [Nothing.options(name=n).bind() for n in "abc"]
serve.run(Ingress.bind(*stages), name="empty", route_prefix="/", logging_config={"enable_access_log": False})
time.sleep(100_000)
"""


def load(port: int, clients: int, seconds: float, script: Path) -> dict[str, float]:
    """wrk for some seconds -> requests per second, p50 and p99 in ms. Raises RuntimeError for an answer other than 200."""
    command = [
        "wrk",
        "-t1",
        f"-c{clients}",
        f"-d{seconds:g}s",
        "--latency",
        "--timeout",
        "20s",
        "-s",
        str(script),
        f"http://127.0.0.1:{port}",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)

    def ms(name: str) -> float:
        value, unit = re.search(rf"{name}%\s+([\d.]+)(us|ms|s)", text).groups()  # type: ignore[union-attr]
        return float(value) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[unit]

    rate = float(re.search(r"Requests/sec:\s+([\d.]+)", text).group(1))  # type: ignore[union-attr]
    return {"requests_per_second": rate, "p50_ms": ms("50"), "p99_ms": ms("99")}


def measured(port: int, script: Path, seconds: float) -> dict[str, dict[str, float]]:
    load(port, 8, WARM, script)
    return {str(c): load(port, c, seconds, script) for c in CLIENTS}


def in_process(run: str, users: list[str]) -> float:
    """p50 of the predictor alone, milliseconds."""
    import torch

    from mtrec_ray import bundle
    from mtrec_ray.histories import History
    from mtrec_ray.serving.history import PreparedHistories

    torch.set_num_threads(1)
    predictor, store = bundle.load(f"{run}/bundle"), PreparedHistories(f"{run}/data")
    took = []
    for user in (users * 2)[:600]:
        began = time.perf_counter()
        predictor.recommend([store.get(user) or History()], 10)
        took.append(1e3 * (time.perf_counter() - began))
    return float(np.median(took[100:]))


def repeated(port: int, service: psutil.Process, script: Path, seconds: float) -> float:
    """CPU milliseconds of the whole service for a request of one user, over and over."""
    load(port, 1, WARM, script)
    before = cpu_seconds(service)
    time.sleep(seconds)
    idle = cpu_seconds(service) - before
    before = cpu_seconds(service)
    found = load(port, 1, seconds, script)
    return 1e3 * (cpu_seconds(service) - before - idle) / (found["requests_per_second"] * seconds)


def overloaded(run: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """32 clients at a service that takes two requests and lets two wait -> how many of which status, and what 429 says."""
    port = free_port()
    options = {"num_replicas": 1, "max_ongoing_requests": 2, "max_queued_requests": 2, "ray_actor_options": {"num_cpus": 0.1},
               "backpressure_config": {"status_code": 429, "retry_after_s": 1}}  # fmt: skip
    serving = {"store": {"kind": "sqlite", "path": str(folder / f"overload{port}.sqlite")}}
    statuses, retry = Counter[int](), set[str | None]()

    def ask(_: int) -> None:
        with httpx.Client(timeout=60) as client:
            for _ in range(10):
                answer = client.post(f"http://127.0.0.1:{port}/recommend", json={"user_id": "1"})
                statuses[answer.status_code] += 1
                if answer.status_code == 429:
                    retry.add(answer.headers.get("retry-after"))

    with started(serve_command(run, port, serving, True, options), port, environment), ThreadPoolExecutor(32) as pool:
        list(pool.map(ask, range(32)))
    return {"statuses": {str(k): v for k, v in sorted(statuses.items())}, "retry_after": sorted(map(str, retry))}


def main() -> int:
    parser = argparse.ArgumentParser(description="What the service adds to the predictor.")
    parser.add_argument("--run", default="runs/demo", help="a run of ML-100K, such as make demo leaves")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        print("error: wrk is not here; apt-get install wrk", file=sys.stderr)
        return 2
    from mtrec_ray import storage
    from mtrec_ray.serving.history import PreparedHistories

    run = storage.absolute(args.run)
    users = list(PreparedHistories(f"{run}/data").user_ids())
    folder = Path(tempfile.mkdtemp())
    scripts = {"all": users, "one": users[:1]}
    for name, chosen in scripts.items():
        (folder / name).write_text(LUA % ",".join(json.dumps(u) for u in chosen), encoding="utf-8")

    def serve(kind: str, port: int, cached: int) -> list[str]:
        store = {"kind": "sqlite", "path": str(folder / f"{kind}{port}.sqlite")}
        return serve_command(run, port, {"store": store, "cached_states": cached}, kind == "fused")

    def variant(command: Callable[[int], list[str]], environment: dict[str, str]) -> dict[str, dict[str, float]]:
        port = free_port()
        with started(command(port), port, environment):
            found = measured(port, folder / "all", args.seconds)
        print(json.dumps(found), file=sys.stderr, flush=True)
        return found

    rounds: dict[str, Any] = {"predictor_p50_ms": in_process(run, users)}
    rounds["bare"] = variant(lambda port: [sys.executable, "-c", BARE, run, str(port)], {})
    for mode, environment in (("default", {}), ("throughput", THROUGHPUT)):
        for kind in ("graph", "fused"):
            rounds[f"{kind}_{mode}"] = variant(lambda port, k=kind: serve(k, port, 0), environment)  # type: ignore[misc]
        rounds[f"empty_{mode}"] = variant(lambda port: [sys.executable, "-c", EMPTY, str(port)], environment)
    for kind in ("graph", "fused"):
        rounds[f"{kind}_throughput_cached"] = variant(lambda port, k=kind: serve(k, port, 4096), THROUGHPUT)  # type: ignore[misc]
    rounds["bare_again"] = variant(lambda port: [sys.executable, "-c", BARE, run, str(port)], {})
    rounds["predictor_p50_ms_again"] = in_process(run, users)
    cost = {}
    for kind in ("fused", "graph"):
        for cached in (0, 4096):
            port = free_port()
            with started(serve(kind, port, cached), port, THROUGHPUT) as service:
                cost[kind, cached] = repeated(port, service, folder / "one", args.seconds)
    overload = {m: overloaded(run, folder, e) for m, e in (("default", {}), ("throughput", THROUGHPUT))}
    shutil.rmtree(folder)
    base = min(rounds["predictor_p50_ms"], rounds["predictor_p50_ms_again"])
    added = {n: v["1"]["p50_ms"] - base for n, v in rounds.items() if n.startswith(("graph", "fused"))}
    bare = max(rounds[n][str(c)]["requests_per_second"] for n in ("bare", "bare_again") for c in CLIENTS)
    fused = {
        name: max(rounds[variant][str(c)]["requests_per_second"] for c in CLIENTS) / bare
        for name, variant in (("computed", "fused_throughput"), ("as deployed", "fused_throughput_cached"))
    }
    empty = {m: rounds[f"empty_{m}"]["1"]["p50_ms"] for m in ("default", "throughput")}
    detail = {"variants": rounds, "added_ms": added, "empty_graph_ms": empty, "fused_over_bare": fused}
    detail["overload"] = overload
    kinds = {k: {"first": cost[k, 0], "repeated": cost[k, 4096]} for k in ("fused", "graph")}
    detail |= {"cpu_ms": kinds, "repeated_over_first": {k: v["repeated"] / v["first"] for k, v in kinds.items()}}
    print(json.dumps(detail["added_ms"]), file=sys.stderr)
    ok = added["graph_default"] <= ADDED and added["graph_throughput"] <= ADDED_THROUGHPUT
    ok = ok and all(set(o["statuses"]) <= {"200", "429"} and "429" in o["statuses"] for o in overload.values())
    ok = ok and fused["as deployed"] >= OF_BARE and max(detail["repeated_over_first"].values()) <= REPEATED
    target = f"<= {ADDED_THROUGHPUT} (default <= {ADDED}), fused >= {OF_BARE} x bare, repeated <= {REPEATED} x first"
    return finish("serve_latency", added["graph_throughput"], "ms added at one client in throughput mode", target, ok, detail)


if __name__ == "__main__":
    sys.exit(main())
