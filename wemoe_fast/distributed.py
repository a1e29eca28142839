"""One run on several processes, as ``torchrun`` starts them: who does what, and how they agree.

Without ``torchrun`` there is one process, and everything here does nothing. Results must not depend on how many
processes there are: work is shared out by index, and every process is given the same sums.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError, WEMoEError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run: this is number ``rank`` of ``size`` and computes on ``device``."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process speaks for all of them: progress, tables, files that exist once."""
        return self.rank == 0

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every ``size``-th item, from number ``rank`` on."""
        return items[self.rank :: self.size]

    def add(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor of the same shape in each."""
        if self.size == 1:
            return tensor
        with _clear_word():
            total = tensor.detach().clone().contiguous()
            dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """What every process passed, in the order of the processes, in each of them. For small plain values."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with _clear_word():
            dist.all_gather_object(found, value)
        return found

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function()`` returns in the first process, in each of them; a WEMoEError it raises, likewise."""
        if self.size == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = function()
            except WEMoEError as error:
                outcome[1] = error
        with _clear_word():
            dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.gather(None)


@contextmanager
def world(device: str | torch.device = "cpu") -> Iterator[World]:
    """The processes that ``torchrun`` started (gloo on the CPU, NCCL on GPUs: one each), or this one alone.

    ``device`` "cuda" means the GPU with the number of the process on its machine. Raises InputError where there are
    more processes than GPUs or the environment is not what ``torchrun`` makes it, WEMoEError where another process
    ended too soon.
    """
    device = torch.device(device)
    if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
        yield World(device=device)
        return
    if device.type == "cuda" and device.index is None:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise InputError(
                f"device: expected a GPU for process {local} of this machine, found {torch.cuda.device_count()};"
                " start fewer processes with torchrun --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    try:
        with _clear_word():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except WEMoEError:
        raise
    except ValueError as error:
        raise InputError(f"RANK and WORLD_SIZE are set, but {error}; start the processes with torchrun") from error
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        with suppress(RuntimeError):  # nothing to leave where the others are gone
            dist.destroy_process_group()


@contextmanager
def _clear_word() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        # the first sentence, without the place in PyTorch's sources
        said = re.sub(r"^\[\S*:\d+\] ", "", str(error).strip()).splitlines() or [type(error).__name__]
        reason = said[0].split(". ")[0]
        raise WEMoEError(
            f"another process of this run ended or cannot be reached ({reason}); what is done is kept:"
            " start the same command again to go on"
        ) from error
