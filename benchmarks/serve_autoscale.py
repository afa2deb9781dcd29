"""A step of load, and how the service grows and shrinks: `python -m benchmarks.serve_autoscale`.

The graph in throughput mode, each deployment from one to three replicas, up after 2 s, down after 10 s (targets of 0.15 ongoing
requests for the ingress and 0.05 for the stages: the load must leave a new replica processor to start with), ML-100K, states not
remembered. wrk: one request per second, then about fourteen, then one again. The number of replicas of every deployment is read
from Serve each quarter of a second; a second replica counts from its first answer, which is read from Serve's own counters
(requests by replica, on Ray's Prometheus endpoint). A replica that starts spends about seven seconds of processor on importing Ray,
torch and FastAPI; loading this bundle and asking it the golden requests takes a tenth of a second.

Value: seconds from the step to the first answer of a second replica of the slowest deployment on the way of a request.
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
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import RESULTS, finish
from benchmarks.serve_latency import LUA
from benchmarks.served import THROUGHPUT, Callers, Deployed, free_port, started
from mtrec_ray import storage
from mtrec_ray.serving.history import PreparedHistories

BEFORE, STEP, AFTER, TARGET = 15.0, 75.0, 75.0, 60.0
CLIENTS, PAUSE_MS = 14, 950
ON_THE_WAY = ("Ingress", "StateEncoder", "Retrieval", "Heads")
COUNTER = re.compile(r"^ray_serve_deployment_request_counter_total\{(.*)\} ([\d.e+]+)$", re.MULTILINE)


def answered(port: int) -> dict[str, set[str]]:
    """Deployment -> replicas that have answered."""
    out: dict[str, set[str]] = {}
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=20).text
    for labels, value in COUNTER.findall(text):
        said = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if float(value) and "replica" in said:
            out.setdefault(said["deployment"].split("_")[-1].split("#")[-1], set()).add(said["replica"])
    return out


class Watch(Callers):
    """Replicas over time, and when a second one of each deployment answered."""

    def __init__(self, deployed: Deployed, metrics: int) -> None:
        super().__init__(2)
        self.deployed, self.metrics, self.began = deployed, metrics, time.monotonic()
        self.replicas: list[tuple[float, dict[str, int]]] = []
        self.second: dict[str, float] = {}

    def run(self, number: int) -> None:
        (self._count, self._ask)[number]()

    def now(self) -> float:
        return time.monotonic() - self.began

    def _count(self) -> None:
        while not self.stop.wait(0.25):
            found = self.deployed.running()
            if not self.replicas or self.replicas[-1][1] != found:
                self.replicas.append((self.now(), found))

    def _ask(self) -> None:
        before = answered(self.metrics)
        while not self.stop.wait(0.5):
            for deployment, replicas in answered(self.metrics).items():
                if replicas - before.get(deployment, set()):
                    self.second.setdefault(deployment, self.now())


def plot(watch: Watch, step: float, end: float, whole: float, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(ON_THE_WAY), 1, sharex=True, figsize=(8, 6))
    for axis, name in zip(axes, ON_THE_WAY, strict=True):
        times = [t for t, _ in watch.replicas] + [whole]
        counts = [r.get(name, 0) for _, r in watch.replicas]
        axis.step(times, [*counts, counts[-1]], where="post", color="#0b5cad")
        axis.axvspan(step, end, color="#d5dce3", zorder=0)
        axis.set_ylabel(name, rotation=0, ha="right")
        axis.set_ylim(0, 3.5)
    axes[-1].set_xlabel("seconds; grey: 14 requests per second, else 1")
    figure.suptitle("Replicas under a step of load")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="A step of load, and how the service grows and shrinks.")
    parser.add_argument("--run", default="runs/demo", help="a run of ML-100K, such as make demo leaves")
    args = parser.parse_args()
    if shutil.which("wrk") is None:
        print("error: wrk is not here; apt-get install wrk", file=sys.stderr)
        return 2
    run, folder, port, metrics = storage.absolute(args.run), Path(tempfile.mkdtemp()), free_port(), free_port()
    users = list(PreparedHistories(f"{run}/data").user_ids())
    script = LUA % ",".join(json.dumps(u) for u in users) + f"function delay() return {PAUSE_MS} end\n"
    (folder / "all").write_text(script, encoding="utf-8")
    scaling = {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 0.05, "upscale_delay_s": 2, "downscale_delay_s": 10,
               "look_back_period_s": 3, "metrics_interval_s": 1}  # fmt: skip
    options: dict[str, Any] = {"autoscaling_config": scaling, "max_ongoing_requests": 64, "ray_actor_options": {"num_cpus": 0.1}}
    serving = {"store": {"kind": "sqlite", "path": str(folder / "live.sqlite")}, "deadline_ms": 60_000, "cached_states": 0}
    deployed = Deployed(folder, run, port, serving, options, _metrics_export_port=metrics)
    deployed.application["deployments"][0]["autoscaling_config"] = {**scaling, "target_ongoing_requests": 0.15}
    deployed.deploy()

    def load(clients: int, seconds: float) -> str:
        command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds:g}s", "--timeout", "60s", "--latency", "-s", str(folder / "all")]
        return subprocess.run([*command, f"http://127.0.0.1:{port}"], capture_output=True, text=True, check=True).stdout

    with started(deployed.command, port, {"RAY_metrics_report_interval_ms": "1000", **THROUGHPUT}) as _:
        load(1, 10)
        with Watch(deployed, metrics) as watch:
            texts = [load(1, BEFORE)]
            step = watch.now()
            texts.append(load(CLIENTS, STEP))
            end = watch.now()
            texts.append(load(1, AFTER))
            whole = watch.now()
    errors = [line for text in texts for line in text.splitlines() if "Non-2xx" in line or "Socket errors" in line]
    most = {n: max(r.get(n, 0) for _, r in watch.replicas) for n in ON_THE_WAY}
    last = {n: watch.replicas[-1][1].get(n, 0) for n in ON_THE_WAY}
    up = {n: next((t - step for t, r in watch.replicas if r.get(n, 0) > 1 and t > step), None) for n in ON_THE_WAY}
    second = {n: watch.second[n] - step if n in watch.second else None for n in ON_THE_WAY}
    plot(watch, step, end, whole, RESULTS / "serve_autoscale.png")
    shutil.rmtree(folder)
    found = [t for t in second.values() if t is not None]
    value = max(found) if len(found) == len(ON_THE_WAY) else float("inf")
    detail = {
        "most_replicas": most, "replicas_at_the_end": last, "second_runs_after_s": up, "second_answers_after_s": second,
        "errors": errors, "replicas": [[round(t, 2), r] for t, r in watch.replicas], "step_s": step, "end_s": end,
    }  # fmt: skip
    ok = all(n > 1 for n in most.values()) and all(n == 1 for n in last.values()) and value < TARGET and not errors
    target = f"< {TARGET:g}, all grow, all shrink to 1, no error"
    return finish("serve_autoscale", value, "seconds from the step to the second replica's first answer", target, ok, detail)


if __name__ == "__main__":
    sys.exit(main())
