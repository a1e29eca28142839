"""The processes of one run, with the environment that torchrun gives them, forked from a server that has imported
everything. The test's own process holds the meeting point, as torchrun's agent does: its port is bound before any
process looks for it."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from wemoe_fast.benchmarks.faults_adapt import PRELOADED

SECONDS = 60


class Processes:
    """Running processes, and what their function returns or raises in each."""

    def __init__(self, processes: list[BaseProcess], connections: list[Connection]) -> None:
        self.processes, self._connections = processes, connections

    def kill(self, rank: int) -> None:
        self.processes[rank].kill()
        self.processes[rank].join()

    def result(self, rank: int) -> Any:
        """What the function returned; what it raised is raised here."""
        assert self._connections[rank].poll(SECONDS), f"process {rank} says nothing"
        kind, value = self._connections[rank].recv()
        if kind == "raised":
            raise value
        return value

    def results(self) -> list[Any]:
        return [self.result(rank) for rank in range(len(self.processes))]


@contextmanager
def running(size: int, function: Callable[..., Any], *arguments: Any) -> Iterator[Processes]:
    """``function(*arguments)`` in ``size`` processes; it is to return plain values and to stand in a module."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[BaseProcess] = []
    connections: list[Connection] = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(theirs, rank, size, store.port, function, arguments))
        process.start()
        theirs.close()
        started.append(process)
        connections.append(ours)
    try:
        yield Processes(started, connections)
    finally:
        for process in started:
            process.join(0.5)
            process.kill()
            process.join()


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _serve(
    connection: Connection, rank: int, size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(environment(rank, size, port))
    torch.set_num_threads(1)
    try:
        connection.send(("returned", function(*arguments)))
    except Exception as error:
        connection.send(("raised", error))
