"""Jobs in processes of their own: one that crashes, corrupts its GPU context or hangs costs no other job."""

from __future__ import annotations

import multiprocessing
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

J = TypeVar("J")
R = TypeVar("R")
GRACE = 45.0
"""Seconds a job begun before the deadline may go on after it."""


class JobError(Exception):
    """A job raised, crashed or did not end in time; the text says which."""


def _serve(connection: Connection) -> None:
    """Run what arrives until the other end closes."""
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(*arguments)))
        except Exception as error:
            connection.send((False, "".join(traceback.format_exception(error))[-3000:]))


class Worker:
    """A process that runs one function call at a time; started when needed, again after it was lost."""

    def __init__(self) -> None:
        self._process: SpawnProcess | None = None
        self._connection: Connection | None = None

    def run(self, function: Callable[..., R], *arguments: Any, seconds: float) -> R:
        """The result of function(*arguments), which must be picklable. Raises ``JobError``."""
        if self._process is None or not self._process.is_alive():
            self._start()
        assert self._connection is not None
        assert self._process is not None
        try:
            self._connection.send((function, arguments))
            if not self._connection.poll(seconds):
                self.stop(patience=0.0)
                raise JobError(f"not done after {seconds:.0f} s; the process was ended")
            done, result = self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(5)
            code = self._process.exitcode
            self.stop()
            raise JobError(f"the process ended, exit code {code}") from error
        if not done:
            if "CUDA error" in result or "device-side assert" in result:
                self.stop(patience=0.0)  # a process with a corrupt context is of no more use
            raise JobError(result)
        value: R = result
        return value

    def stop(self, patience: float = 5.0) -> None:
        if self._connection is not None:
            self._connection.close()  # which ends a process that waits for a job
        if self._process is not None:
            self._process.join(patience)
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,))
        self._process.start()
        theirs.close()


class Pool(Generic[J, R]):
    """Several workers on one list of jobs."""

    def __init__(self, workers: int) -> None:
        self.workers = [Worker() for _ in range(workers)]

    def map(
        self,
        function: Callable[[J], R],
        jobs: Sequence[J],
        on_result: Callable[[J, R | JobError], None],
        *,
        deadline: float,
        seconds: float,
    ) -> list[J]:
        """Call ``on_result`` for each job as it ends; the jobs not begun by the deadline (``time.monotonic``)."""
        waiting = list(reversed(jobs))
        lock = threading.Lock()

        def work(worker: Worker) -> None:
            while True:
                with lock:
                    left = deadline - time.monotonic()
                    if not waiting or left <= 0:
                        return
                    job = waiting.pop()
                result: R | JobError
                try:
                    result = worker.run(function, job, seconds=min(seconds, left + GRACE))
                except JobError as error:
                    result = error
                with lock:
                    on_result(job, result)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return list(reversed(waiting))

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
