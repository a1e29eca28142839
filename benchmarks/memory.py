"""Memory that is free, and the memory a call takes at its peak: resident on the CPU, allocated on a GPU."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from wemoe_fast.kernels import native

PROCESS = Path("/proc/self")


def available_bytes(device: torch.device) -> int:
    """What a GPU has free, or this machine available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return _field(Path("/proc/meminfo"), "MemAvailable")
    except OSError:
        return 8 << 30


def free_bytes(device: torch.device) -> int:
    """What a contender may take: four fifths of a free GPU, half of what the machine has available."""
    return int((0.8 if device.type == "cuda" else 0.5) * available_bytes(device))


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak of one call beyond what was there before; None where the system cannot tell (the CPU, but for Linux).

    What the CPU kernels keep from call to call counts as the call's.
    """
    gc.collect(1)  # what calls before left in cycles; the old generation takes long
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    native.release()
    before_call = _reset_peak()
    run()
    return None if before_call is None else _field(PROCESS / "status", "VmHWM") - before_call


def _reset_peak() -> int | None:
    """Give freed memory back, forget the peak so far; what is resident now."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        (PROCESS / "clear_refs").write_text("5")
        return _field(PROCESS / "status", "VmHWM")
    except (OSError, AttributeError, TypeError):
        return None


def _field(path: Path, name: str) -> int:
    """A line such as "VmHWM:   1024 kB", in bytes."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{path}: no field {name}")
