"""Torch work of a replica: one thread, and calls that came while it was busy are done together. It knows no Ray.

Nobody waits for a batch to fill: the thread takes what is there. Work whose deadline has passed is not done.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
MAX_BATCH = 32


class DeadlineError(TimeoutError):
    """The answer would come too late."""


class Worker:
    """A thread for the work of one event loop."""

    def __init__(self, name: str = "torch", max_batch: int = MAX_BATCH, told: Callable[[int, float], None] | None = None) -> None:
        """told: is told of every batch's size and seconds."""
        self._pool, self.max_batch, self._told = ThreadPoolExecutor(1, thread_name_prefix=name), max_batch, told
        self._waiting: OrderedDict[Hashable, list[tuple[Any, float | None, asyncio.Future[Any]]]] = OrderedDict()
        self._busy = False
        self._work: dict[Hashable, Callable[[list[Any]], Sequence[Any]]] = {}

    async def run(self, function: Callable[..., T], *args: Any, until: float | None = None) -> T:
        """A call of its own. Raises DeadlineError (until: seconds of time.time())."""
        return await self.batched(object(), lambda _: [function(*args)], None, until)

    async def batched(self, key: Hashable, work: Callable[[list[Any]], Sequence[T]], one: Any, until: float | None = None) -> T:
        """One of the results of `work` on all that waits under a key. Raises DeadlineError, and what work raises."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, []).append((one, until, future))
        self._work.setdefault(key, work)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        """Key by key, the longest waiting first, until nothing waits."""
        loop = asyncio.get_running_loop()
        try:
            while self._waiting:
                key = next(iter(self._waiting))
                waiting = self._waiting.pop(key)
                part, rest = waiting[: self.max_batch], waiting[self.max_batch :]
                work = self._work[key]
                if rest:
                    self._waiting[key] = rest
                else:
                    del self._work[key]
                now, alive = time.time(), []
                for one, until, future in part:
                    if future.done():  # nobody waits for it any more
                        continue
                    if until is not None and now > until:
                        future.set_exception(DeadlineError("the deadline passed before the work began"))
                    else:
                        alive.append((one, future))
                if not alive:
                    continue
                started = time.perf_counter()
                try:
                    results = await loop.run_in_executor(self._pool, work, [one for one, _ in alive])
                except BaseException as error:
                    for _, future in alive:
                        if not future.done():
                            future.set_exception(error)
                    if not isinstance(error, Exception):
                        raise
                    continue
                if self._told is not None:
                    self._told(len(alive), time.perf_counter() - started)
                for (_, future), result in zip(alive, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        finally:
            self._busy = False
