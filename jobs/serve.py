"""Serve a run over HTTP until Ctrl-C: `python -m jobs.serve runs/ml100k --port 8000` (that is `make serve`).

On a cluster use `serve deploy serve_apps/recommend.yaml` instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import yaml
from ray import serve

from jobs.command import USER_ERRORS, plain
from mtrec_ray import runtime, storage

YAML = Path(__file__).parent.parent / "serve_apps" / "recommend.yaml"


def start(run: str, port: int, fused: bool = False) -> Callable[[], None]:
    """Deploy serve_apps/recommend.yaml for one run on this Ray -> a function that stops it. fused: all stages in the ingress.

    Raises RuntimeError when the port is taken, StorageError when the run has no bundle.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise RuntimeError(f"port {port} is taken; choose another with PORT=… or --port") from None
    for name in ("bundle", "data"):
        storage.Directory(f"{run}/{name}").manifest  # noqa: B018
    runtime.connect()
    settings = yaml.safe_load(YAML.read_text())
    from serve_apps.recommend import Args, build

    serve.start(proxy_location=settings["proxy_location"], http_options={**settings["http_options"], "port": port})
    application = settings["applications"][0]
    options = {d["name"]: {k: v for k, v in d.items() if k != "name"} for d in application["deployments"]}
    graph = build(Args(run=storage.absolute(run), options=options, fused=fused))
    serve.run(
        graph, name=application["name"], route_prefix=application["route_prefix"], logging_config=application["logging_config"]
    )

    def stop() -> None:
        serve.shutdown()
        ray.shutdown()

    return stop


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m jobs.serve", description="Serve a run over HTTP until Ctrl-C.")
    parser.add_argument("run", help="run directory, such as runs/ml100k")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--fused", action="store_true", help="all stages in one process: for small installations")
    args = parser.parse_args()
    try:
        stop = start(args.run, args.port, args.fused)
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    print(f"serving {args.run} at http://127.0.0.1:{args.port} (OpenAPI at /docs); Ctrl-C stops it", flush=True)
    done = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: done.set())
    done.wait()
    stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
