"""Slabs side by side on the CPU: one worker each, instead of every small product spread over all threads.

A merged slab is written by one product and read by the next. When both are spread over all cores, each core reads
what another wrote and waits for it twice per slab; when a worker does both, neither happens. Measured: 1.3 to 1.9
times faster on two cores (benchmarks/NOTES.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

MAX_WORKERS = 4
Item = TypeVar("Item")


def worker_count(device: torch.device) -> int:
    """How many slabs are worked on at once: PyTorch's threads, at most ``MAX_WORKERS``; 1 on a GPU."""
    return min(MAX_WORKERS, torch.get_num_threads()) if device.type == "cpu" else 1


def for_each(function: Callable[[Item], None], items: Sequence[Item], workers: int) -> None:
    """Call ``function`` on every item, ``workers`` at a time; they must write to different memory."""
    if workers <= 1 or len(items) <= 1:
        for item in items:
            function(item)
        return
    inference = torch.is_inference_mode_enabled()

    def without_autograd(item: Item) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            function(item)

    for _ in _pool(workers, torch.get_num_threads(), os.getpid()).map(without_autograd, items):
        pass


@lru_cache(maxsize=1)
def _pool(workers: int, threads: int, process: int) -> ThreadPoolExecutor:
    """Workers that share the threads; a new pool for another number of threads and in a forked process.

    Setting a thread's own number of threads also sets the default of threads to come, so the caller's is put
    back when all workers have started.
    """
    started = Barrier(workers + 1)
    pool = ThreadPoolExecutor(workers, "wemoe-fast", initializer=_start, initargs=(max(1, threads // workers),))
    for _ in range(workers):
        pool.submit(started.wait)
    started.wait()
    torch.set_num_threads(threads)
    return pool


def _start(threads: int) -> None:
    """A worker's own number of threads. Asking for it afterwards makes PyTorch settle it for this thread."""
    torch.set_num_threads(threads)
    torch.get_num_threads()
