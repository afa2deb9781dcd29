"""Seconds and peak memory of a stage: the largest process of this process's tree, sampled; and memory given back."""

from __future__ import annotations

import ctypes
import threading
import time
from types import TracebackType

import psutil
import pyarrow as pa


def give_back_memory() -> None:
    """What was freed goes back to the system (glibc keeps it, and grows by fragments in long work)."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Watch:
    """`with Watch() as w: ...` -> w.seconds, w.peak_mib (resident memory of the largest single process).

    Resident memory counts shared pages (such as Ray's object store) too, so it overstates.
    """

    def __init__(self, interval: float = 0.25) -> None:
        self.interval, self.seconds, self.peak_mib = interval, 0.0, 0.0
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.seconds = time.perf_counter() - self._started
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            for process in [me, *me.children(recursive=True)]:
                try:
                    self.peak_mib = max(self.peak_mib, process.memory_info().rss / 2**20)
                except psutil.Error:
                    continue
            if self._stop.wait(self.interval):
                return
