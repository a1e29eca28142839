"""Times alternatives side by side: in turn, medians, and only if they compute the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def wall_seconds(function: Callable[[], object]) -> float:
    """One call, from an idle device until it is idle again."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int | Mapping[str, int] = 7,
    warmup: int = 1,
    clock: Callable[[Callable[[], object]], float] = wall_seconds,
) -> dict[str, list[float]]:
    """Seconds of every call, A B C A B C ..., after ``warmup`` rounds that do not count.

    With ``repeats`` by name, who has had its share drops out of the later rounds.
    """
    wanted = dict.fromkeys(functions, repeats) if isinstance(repeats, int) else repeats
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warmup + max((wanted[name] for name in functions), default=0)):
        for name, function in functions.items():
            if round_number < warmup:
                function()
            elif round_number < warmup + wanted[name]:
                seconds[name].append(clock(function))
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error over that of ``expected``."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-300))


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
