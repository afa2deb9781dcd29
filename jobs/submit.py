"""Run a job on a cluster: `python -m jobs.submit JOB --address http://HEAD:8265 ...`, with the job's own arguments after it.

python -m jobs.submit pipeline --address http://127.0.0.1:8265 --config jobs/configs/ml100k.yaml --out s3://bucket/runs/ml100k
python -m jobs.submit score --address http://127.0.0.1:8265 --labels role=batch --verify s3://bucket/runs/ml100k

The code and the YAML files that the arguments name travel, data do not: every path is absolute on the cluster, or a URI. The
configuration is checked here first. The job's log is shown as it comes; the exit code is the job's; Ctrl-C stops the job (130).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray.job_submission import JobInfo, JobStatus, JobSubmissionClient

import jobs
import mtrec_ray
import serve_apps
from jobs.command import USER_ERRORS, plain
from mtrec_ray.config import load_config

JOBS = (
    "pipeline", "prepare", "encode", "pretrain", "train", "index", "evaluate", "score", "tasks", "tune", "compare", "report",
    "forget", "export_events", "load_histories", "nightly",
)  # fmt: skip
STOPPED = 130
PATHS = ("--out", "--run", "--verify", "--export", "--to", "--lists", "--log", "--store")
"""Options of the jobs that name a place."""


class SubmitError(ValueError):
    """A job that cannot be submitted, with the cure."""


def connected(address: str | None) -> JobSubmissionClient:
    """A client of a cluster of this Ray version. Raises SubmitError."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise SubmitError(
            "--address: which cluster? Give its dashboard, such as http://127.0.0.1:8265, or set RAY_API_SERVER_ADDRESS"
        )
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"--address {address}: expected the dashboard's address, such as http://127.0.0.1:8265")
    try:
        client = JobSubmissionClient(address)
        there = client._do_request("GET", "/api/version").json()["ray_version"]
    except (ConnectionError, OSError, RuntimeError, KeyError, ValueError) as error:
        if "token" in str(error).lower() or "401" in str(error):
            raise SubmitError(
                f"--address {address}: the cluster wants its token. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it "
                "(docs/cluster.md)"
            ) from None
        raise SubmitError(
            f"--address {address}: no Ray cluster answers there ({plain(error).splitlines()[0][:200]}). It is the address of the "
            "dashboard, port 8265 of the head node; from outside: ray dashboard cluster.yaml"
        ) from None
    if there != ray.__version__:
        raise SubmitError(
            f"the cluster runs Ray {there}, here is Ray {ray.__version__}: install the same, pip install "
            f"'ray=={there}', or start the cluster from constraints.txt"
        )
    return client


def check(arguments: Sequence[str]) -> None:
    """What would be found too late, on the cluster. Raises SubmitError, ConfigError."""
    values = dict(itertools.pairwise(arguments))
    places = {o: values[o] for o in PATHS if o in values}
    if "--config" in values and not {"--out", "--run"} & set(values):
        raise SubmitError("--out: name a URI, or an absolute path that all nodes mount; the job's own folder is gone when it ends")
    if "--config" in values:
        config = load_config(values["--config"], [a for a in arguments if "=" in a and not a.startswith("-")])
        tables = {"interactions": config.data.interactions, "items": config.data.items, "users": config.data.users}
        places |= {f"data.{n}.path": t.path for n, t in tables.items() if t is not None}
        scoring = {"users": config.scoring.users, "pairs": config.scoring.pairs, "histories": config.scoring.histories}
        places |= {f"scoring.{n}": v for n, v in scoring.items() if v is not None}
    for name, value in places.items():
        if "://" not in value and not value.startswith("/"):
            raise SubmitError(
                f"{name}: {value} is relative to this folder, which the cluster does not have; name a URI or an absolute path"
            )


@contextmanager
def packed(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """A folder with the code and the YAML files that the arguments name -> it, and the arguments as they read in it."""
    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), []
        for package in (mtrec_ray, jobs, serve_apps):
            source = Path(str(package.__path__[0]))
            shutil.copytree(source, folder / source.name, ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "configs").mkdir()
        for n, argument in enumerate(arguments):
            if argument.endswith((".yaml", ".yml")) and Path(argument).is_file():
                inside = f"configs/{n}_{Path(argument).name}"
                shutil.copy(argument, folder / inside)
                argument = inside
            out.append(argument)
        yield str(folder), out


def environment(wanted: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME for the value that it has here. Raises SubmitError."""
    found = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONUNBUFFERED": "1"}
    for text in wanted:
        name, given, value = text.partition("=")
        if not given and name not in os.environ:
            raise SubmitError(f"--env {name}: it is not set here; write {name}=VALUE")
        found[name] = value if given else os.environ[name]
    return found


def labels(wanted: Sequence[str]) -> dict[str, str] | None:
    found = dict(w.split("=", 1) for w in wanted if "=" in w)
    if len(found) != len(wanted):
        raise SubmitError(f"--labels {' '.join(wanted)}: expected KEY=VALUE, such as role=batch")
    return found or None


def _submitted(client: JobSubmissionClient, **job: Any) -> str:
    """The job's id. A cluster that has just begun has no agent to run it yet, and is asked again for a minute."""
    until = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(2)


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        print(text, end="", flush=True)


def _ended(client: JobSubmissionClient, job: str, seconds: float) -> Any:
    """What became of a job, once it has ended; JobDetails."""
    until = time.monotonic() + seconds
    while True:
        found = client.get_job_info(job)
        if found.status.is_terminal() or time.monotonic() > until:
            return found
        time.sleep(0.3)


def run(client: JobSubmissionClient, job: str, address: str) -> int:
    """Follow a job until it ends -> its exit code. Ctrl-C stops it, also where the shell that started this ignores it."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.default_int_handler)
    try:
        while not client.get_job_info(job).status.is_terminal():
            try:
                asyncio.run(_follow(client, job))
            except RuntimeError as error:  # the connection closed, and not the job
                print(f"log: {plain(error)}; asking again", file=sys.stderr)
                time.sleep(1)
    except KeyboardInterrupt:
        print(f"stopping {job}", file=sys.stderr, flush=True)
        client.stop_job(job)
        found = _ended(client, job, 60)
        print(f"{job}: {found.status.value.lower()}", file=sys.stderr)
        return STOPPED
    except (ConnectionError, OSError) as error:
        print(
            f"error: the cluster does not answer any more ({plain(error)[:200]}). The job may go on: ray job logs --follow "
            f"--address {address} {job}", file=sys.stderr,
        )  # fmt: skip
        return 1
    found = _ended(client, job, 10)
    return _code(job, found)


def _code(job: str, found: JobInfo | Any) -> int:
    if found.status == JobStatus.SUCCEEDED:
        print(f"{job}: succeeded", file=sys.stderr)
        return 0
    code = STOPPED if found.status == JobStatus.STOPPED else (found.driver_exit_code or 1)
    print(f"error: {job}: {found.status.value.lower()} with exit code {code}; {found.message or ''}".rstrip("; "), file=sys.stderr)
    return int(code)


def main(argv: list[str] | None = None) -> int:
    """Exit code: the job's; 2 where it cannot be submitted; 130 where it was stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.submit",
        description="Run a job on a Ray cluster; the job's own arguments come after it.",
        allow_abbrev=False,
    )
    parser.add_argument("job", choices=JOBS, metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--address", help="of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS)")
    parser.add_argument(
        "--labels",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the node that the job's driver runs on; may be repeated",
    )
    parser.add_argument("--cpus", type=float, default=0, help="that the driver itself holds (default 0)")
    parser.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="for the job; alone: as it is here")
    parser.add_argument("--python", default="python", help="the interpreter on the cluster (default python)")
    parser.add_argument("--no-wait", action="store_true", help="print the job's id and leave it alone")
    args, given = parser.parse_known_args(argv)
    arguments = [part for a in given for part in (a.split("=", 1) if a.startswith("--") else [a])]  # --out=URI is --out URI
    try:
        check(arguments)
        wanted, variables = labels(args.labels), environment(args.env)
        client = connected(args.address)
        with packed(arguments) as (folder, inside):
            job = _submitted(
                client,
                entrypoint=shlex.join([args.python, "-m", f"jobs.{args.job}", *inside]),
                runtime_env={"working_dir": folder, "env_vars": variables},
                entrypoint_num_cpus=args.cpus or None,
                entrypoint_label_selector=wanted,
            )
    except USER_ERRORS as error:
        print(f"error: {plain(error)}", file=sys.stderr)
        return 2
    print(f"{job}: submitted to {client.get_address()}", file=sys.stderr, flush=True)
    if args.no_wait:
        print(job)
        return 0
    return run(client, job, client.get_address())


if __name__ == "__main__":
    sys.exit(main())
