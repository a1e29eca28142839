"""Times alternatives side by side: in turn, medians, and only if they compute the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def interleaved_seconds(
    functions: Mapping[str, Callable[[], object]], *, repeats: int = 7, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, A B C A B C ..., after ``warmup`` rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(warmup + repeats):
        for name, function in functions.items():
            _synchronize()
            start = time.perf_counter()
            function()
            _synchronize()
            if round_number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def relative_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the error over that of ``expected``."""
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-300))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
