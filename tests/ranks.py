"""A world of gloo ranks on this machine, forked from a server that has imported what every rank needs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.net import free_port

SERVER = multiprocessing.get_context("forkserver")
# the first optimiser of a process imports torch._dynamo, which takes longer than training these tiny models
NEEDED = ("torch._dynamo", "transformers.models.bert.modeling_bert", "mtrec_ray.training.stream", "mtrec_ray.training.worker")
SERVER.set_forkserver_preload([*NEEDED, "tests.conftest"])


def join(rank: int, world: int, port: int) -> None:
    """Make this process one of the world's ranks."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world)


def run_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """work(rank, world, *arguments) in every rank. Raises what torch.multiprocessing makes of a rank's error."""
    mp.start_processes(_rank, (world, free_port(), work, arguments), nprocs=world, start_method="forkserver")


def _rank(rank: int, world: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    join(rank, world, port)
    work(rank, world, *arguments)
    dist.destroy_process_group()
