"""Pictures of the throughput harness's results: a line for every contender."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wemoe_fast.errors import InputError

from . import peers
from .contenders import STRATEGIES
from .tables import ORDER, label

MOST_PANELS = 3
FLOOR = "arithmetic floor"
MARKERS = "os^vD"
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Figure:
    """One picture: ``value`` of (result, contender) over a field of the result; a panel for equal ``fixed`` fields."""

    name: str
    over: str
    axis: str
    fixed: tuple[str, ...]
    title: str
    unit: str
    value: Callable[[Result, str], float | None]
    floor: bool = False


def _ratio(result: Result, name: str) -> float | None:
    return None if name == peers.STATIC else result["ratio_to_static"].get(name)


def _throughput(result: Result, name: str) -> float | None:
    value: float | None = result["samples_per_second"].get(name)
    return value


def _memory(result: Result, name: str) -> float | None:
    peak = result["peak_extra_bytes"].get(name)
    return None if not peak else peak / 2**20


COMMON = ("level", "step", "dtype", "gated")
FIGURES = (
    Figure(
        "ratio-by-tokens", "N", "tokens per sample", (*COMMON, "B", "T"), "Time by number of tokens",
        "times the static model", _ratio, floor=True,
    ),
    Figure(
        "ratio-by-experts", "T", "experts", (*COMMON, "shape", "B"), "Time by number of experts",
        "times the static model", _ratio, floor=True,
    ),
    Figure(
        "throughput-by-batch", "B", "samples in a batch", (*COMMON, "shape", "T"), "Throughput by batch size",
        "samples per second", _throughput,
    ),
    Figure(
        "memory-by-batch", "B", "samples in a batch", (*COMMON, "shape", "T"), "Memory of one call by batch size",
        "peak MiB beyond weights and inputs", _memory,
    ),
)  # fmt: skip


def write_plots(results: Sequence[Result], stem: Path) -> dict[str, Path]:
    """A PNG for every figure for which there are two points at least: "<stem>-<figure>.png".

    Raises InputError without matplotlib.
    """
    written = {}
    for figure in FIGURES:
        panels = panels_of(results, figure)
        if panels:
            path = stem.with_name(f"{stem.name}-{figure.name}.png")
            _draw(figure, panels, path)
            written[figure.name] = path
    return written


def panels_of(results: Sequence[Result], figure: Figure) -> list[list[Result]]:
    """Results that differ in ``over`` alone, at least two each; those with most points first."""
    groups: dict[tuple[Any, ...], dict[Any, Result]] = defaultdict(dict)
    for result in results:
        if any(figure.value(result, name) is not None for name in ORDER):
            groups[tuple(result[name] for name in figure.fixed)].setdefault(result[figure.over], result)
    found = [[points[x] for x in sorted(points)] for points in groups.values() if len(points) > 1]
    return sorted(found, key=len, reverse=True)[:MOST_PANELS]


def _draw(figure: Figure, panels: Sequence[Sequence[Result]], path: Path) -> None:
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise InputError('plots need the package matplotlib: pip install "wemoe-fast[plot]"') from error
    colours = [colormaps["tab20"](i) for i in range(0, 20, 2)] + [colormaps["tab20"](i) for i in range(1, 20, 2)]
    canvas = Canvas(figsize=(5.2 * len(panels) + 2.6, 4.6), layout="constrained", dpi=130)
    FigureCanvasAgg(canvas)
    lines: dict[str, Any] = {}
    for ax, points in zip(canvas.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for i, name in enumerate(ORDER):
            values = [(point[figure.over], figure.value(point, name)) for point in points]
            drawn = [(x, y) for x, y in values if y is not None]
            if drawn:
                ours = name in STRATEGIES
                style: dict[str, Any] = {"color": colours[i], "marker": MARKERS[i % len(MARKERS)], "markersize": 5}
                style |= {"linewidth": 2.6 if name == "auto" else 1.5, "linestyle": "-" if ours else "--"}
                lines[label(name)] = ax.plot(*zip(*drawn, strict=True), **style)[0]
        if figure.floor and all(point["floor"] for point in points):
            xs, floors = [point[figure.over] for point in points], [point["floor"] for point in points]
            lines[FLOOR] = ax.plot(xs, floors, color="0.35", linestyle=":", linewidth=2)[0]
        _decorate(ax, figure, points)
    canvas.suptitle(figure.title)
    canvas.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, format="png")


def _decorate(ax: Any, figure: Figure, points: Sequence[Result]) -> None:
    """Logarithmic scales with the numbers written out, and what all points of the panel share."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs = [point[figure.over] for point in points]
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xticks(xs, [str(x) for x in xs])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.minorticks_off()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_xlabel(figure.axis)
    ax.set_ylabel(figure.unit)
    ax.grid(True, color="0.9")
    first = points[0]
    size = {"B": f"B={first['B']}", "T": f"T={first['T']}", "shape": first["shape"]}
    shared = [text for name, text in size.items() if name in figure.fixed]
    level = "whole tower" if first["level"] == "tower" else "one MLP"
    step = "adaptation step" if first["step"] == "adapt" else "forward"
    ax.set_title(", ".join([level, step, *shared, first["dtype"]]), fontsize=9)
