"""Two runs of the throughput harness: what moved beyond the noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wemoe_fast.errors import InputError

from . import peers
from .tables import label

LEAST = 0.03
"""A change smaller than this is none, however sharp the figures are."""
SAME_MACHINE = ("cpu", "gpu", "threads", "torch")


def load(path: Path) -> dict[str, Any]:
    """A JSON file that the harness wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not (isinstance(found, dict) and {"environment", "results"} <= set(found)):
        raise InputError(f"{path}: expected a file written by wemoe-fast bench")
    return found


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """A line for every figure whose ranges, from the lowest to the highest, do not overlap.

    The static model by its time; everyone else by the ratio to the static model of the same run, so that a
    machine that is slower as a whole moves one line. Contenders and workloads of one run alone are not mentioned.
    """
    for name in SAME_MACHINE:
        before, now = old["environment"].get(name), new["environment"].get(name)
        if before != now:
            yield f"{name} differs: {before} -> {now}"
    earlier = {result["name"]: result for result in old["results"]}
    for result in new["results"]:
        if result["name"] in earlier:
            yield from _moved(earlier[result["name"]], result)


def _moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for name in new["milliseconds"]:
        if name not in old["milliseconds"]:
            continue
        (before, was), (now, is_) = _figure(old, name), _figure(new, name)
        apart = was[1] < is_[0] or is_[1] < was[0]
        if apart and abs(now / before - 1) > LEAST:
            unit = " ms" if name == peers.STATIC else "x static"
            change = "slower" if now > before else "faster"
            factor = max(now / before, before / now)
            yield f"{new['name']}: {label(name)}: {before:.2f} -> {now:.2f}{unit}, {factor:.2f} times {change}"


def _figure(result: Mapping[str, Any], name: str) -> tuple[float, Sequence[float]]:
    """The median and its range."""
    unit = 1.0 if name == peers.STATIC else result["milliseconds"][peers.STATIC]
    return result["milliseconds"][name] / unit, [value / unit for value in result["spread"][name]]
