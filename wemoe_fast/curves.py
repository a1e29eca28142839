"""A picture of an adaptation: the entropy of every task and the routing drift over steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from .adapt import DRIFT_LIMIT, Adaptation
from .errors import InputError
from .report import plain

MOST_NAMED = 12
"""Tasks named at the end of their line; more get a legend."""


def adaptation_curves(result: Adaptation, path: str | Path) -> None:
    """Draw a PNG. Above, the entropy in nats of each task's batches, thin, and its moving mean, thick; below, the
    drift with the limit above which accuracy is at risk.

    Raises InputError for a run without steps, and without matplotlib.
    """
    if not result.routing_drift:
        raise InputError("adaptation curves: expected at least one step, found none")
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise InputError('plots need the package matplotlib: pip install "wemoe-fast[plot]"') from error
    figure = Figure(figsize=(8.2, 6.0), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
    steps = range(1, len(result.routing_drift) + 1)
    window = 1 + 2 * min(12, len(steps) // 16)
    palette = colormaps["tab10" if len(result.entropy) <= 10 else "tab20"]
    marker: dict[str, Any] = {"marker": "o", "markersize": 4} if len(steps) <= 10 else {}
    ends = []
    for number, (name, values) in enumerate(result.entropy.items()):
        colour = palette(number % palette.N)
        smooth = moving_mean(values, window)
        if window > 1:
            above.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        above.plot(steps, smooth, color=colour, linewidth=2.2, label=plain(name), **marker)
        ends.append((smooth[-1], plain(name), colour))
    above.set_ylim(bottom=0)
    above.set_ylabel("entropy (nats)" + (f", mean of {window} steps" if window > 1 else ""))
    if len(ends) <= MOST_NAMED:
        _name_ends(above, ends, len(steps))
    else:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    below.plot(steps, result.routing_drift, color="0.2", linewidth=1.8, **marker)
    below.axhline(DRIFT_LIMIT, color="firebrick", linestyle="--", linewidth=1.2)
    below.text(
        0.01, DRIFT_LIMIT, "accuracy at risk above", color="firebrick", fontsize=8, va="bottom",
        transform=below.get_yaxis_transform(),
    )  # fmt: skip
    below.set_ylim(0, 1.15 * max(DRIFT_LIMIT, *result.routing_drift))
    below.set_ylabel("routing drift")
    below.set_xlabel("step")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_xlim(1 if len(steps) > 1 else 0, max(len(steps), 2))
    for ax in (above, below):
        ax.grid(True, color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    note = ", stopped on a plateau" if result.stopped_early else ""
    figure.suptitle(f"Adaptation: lr {result.lr:g}, {result.batch_size} samples per task and step{note}", fontsize=11)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and its neighbours, window // 2 on either side where there are as many."""
    sums = [0.0, *accumulate(values)]
    ends = [(max(0, i - window // 2), min(len(values), i + window // 2 + 1)) for i in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in ends]


def _name_ends(ax: Any, ends: Sequence[tuple[float, str, Any]], step: int) -> None:
    """Each line's name at its right end; names that would cover each other are spread around their middle."""
    height = 0.055 * ax.get_ylim()[1]
    groups: list[list[tuple[float, str, Any]]] = []
    for end in sorted(ends, key=lambda end: end[0]):
        groups.append([end])
        while len(groups) > 1 and _heights(groups[-1], height)[0] < _heights(groups[-2], height)[-1] + height:
            groups[-2:] = [groups[-2] + groups[-1]]
    for group in groups:
        for y, (_, name, colour) in zip(_heights(group, height), group, strict=True):
            ax.annotate(
                name, (step, y), xytext=(6, 0), textcoords="offset points", color=colour, fontsize=9, va="center",
                annotation_clip=False,
            )  # fmt: skip


def _heights(group: Sequence[tuple[float, str, Any]], height: float) -> list[float]:
    """Where a group's names stand, the lowest first."""
    lowest = max(0.0, sum(value for value, _, _ in group) / len(group) - (len(group) - 1) / 2 * height)
    return [lowest + place * height for place in range(len(group))]
