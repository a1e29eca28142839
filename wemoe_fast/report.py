"""Results as JSON, tables and pictures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import InputError

_HEADING = "model"
_MEAN = "mean"
_MOST_WRITTEN = 200  # cells of a panel that get their value written in


def write_json(path: str | Path, obj: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of one."""
    path = Path(path)
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be written as JSON: {error}") from error
    write_lines(path, [text])


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Write lines as they come, so that a reader finds the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def accuracy_table(
    rows: Mapping[str, Mapping[str, float]],
    columns: Sequence[str] | None = None,
    *,
    markdown: bool = False,
) -> str:
    """Accuracies (fractions) by model and task -> a table of percentages with one decimal and their mean.

    `columns` fixes the tasks and their order; by default all tasks, as first met. A model that lacks a task
    shows "-" there and has no mean.
    """
    if columns is None:
        columns = list(dict.fromkeys(task for row in rows.values() for task in row))
    if not rows or not columns:
        raise InputError("accuracy table: expected at least one model and one task, found none")
    lines = [[_HEADING, *columns, _MEAN]]
    for name, row in rows.items():
        values = [row.get(task, math.nan) for task in columns]
        lines.append([name, *(_percent(value) for value in (*values, sum(values) / len(values)))])
    if not markdown:
        return aligned(lines)
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    padded, widths = _padded(lines)
    rule = ["-" * widths[0], *("-" * (max(width, 2) - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """The first line as heading; the first column to the left, numbers to the right."""
    head, *rows = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "| --- |" + " ---: |" * (len(lines[0]) - 1), *rows])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table for the terminal: a heading and rows of cells, the first column to the left, the others to the right."""
    padded, widths = _padded(lines)
    rule = ["-" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in (padded[0], rule, *padded[1:]))


def _padded(lines: Sequence[Sequence[str]]) -> tuple[list[list[str]], list[int]]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = [
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return padded, widths


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "-"


def routing_heatmap(
    routing: Mapping[str, Mapping[str, Sequence[float]]],
    experts: Sequence[str],
    path: str | Path,
    *,
    title: str = "Mean routing weight",
) -> None:
    """Draw mean routing weights {task: {layer: [T]}} as a PNG: a panel per task, layers down, experts across.

    White is zero, red above, blue below, on one scale for all panels; the column of the expert that has the
    panel's own name is framed. Raises InputError for routing that does not fit, and without matplotlib.
    """
    _check_routing(routing, experts)
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('plots need the package matplotlib: pip install "wemoe-fast[plot]"') from error

    layers = list(next(iter(routing.values())))
    labels, pattern = short_names(layers)
    values = [weight for panel in routing.values() for row in panel.values() for weight in row]
    bound = max(map(abs, values)) or 1.0
    norm, colours = Normalize(-bound, bound), colormaps["RdBu_r"]

    across = min(len(routing), 4)
    down = -(-len(routing) // across)
    width = across * (0.46 * len(experts) + 0.35) + 2.4
    height = down * (0.29 * len(layers) + 1.35) + 0.9
    figure = Figure(figsize=(max(width, 5.0), max(height, 2.8)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(down, across, squeeze=False, sharey=True).flatten())
    image: Any = None
    for ax, (task, panel) in zip(axes, routing.items(), strict=False):
        grid = [list(panel[layer]) for layer in layers]
        image = ax.imshow(grid, norm=norm, cmap=colours, aspect="auto")
        ax.set_title(plain(f"task {task}"), fontsize=10)
        ax.set_xticks(
            range(len(experts)), map(plain, experts), rotation=40, ha="right", rotation_mode="anchor", fontsize=8
        )
        ax.set_yticks(range(len(layers)), map(plain, labels), fontsize=8)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_edgecolor("0.8")
        if len(experts) * len(layers) <= _MOST_WRITTEN:
            _write_values(ax, grid, bound)
        if task in experts:
            _frame_column(ax, list(experts).index(task), len(layers))
    for ax in axes[len(routing) :]:
        ax.set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("expert", fontsize=9)
    figure.supylabel(plain(f"layer ({pattern})") if pattern else "layer", fontsize=9)
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=30)
    bar.ax.set_ylim(min(*values, 0.0), max(*values, 0.0) or bound)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_edgecolor("0.8")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _write_values(ax: Any, grid: list[list[float]], bound: float) -> None:
    for y, row in enumerate(grid):
        for x, weight in enumerate(row):
            colour = "white" if abs(weight) > 0.6 * bound else "black"
            text = f"{round(weight, 2) + 0.0:.2f}"  # + 0.0: no "-0.00"
            ax.text(x, y, text, ha="center", va="center", fontsize=7, color=colour)


def plain(text: str) -> str:
    """Without mathematics between dollar signs."""
    return text.replace("$", r"\$")


def _frame_column(ax: Any, column: int, rows: int) -> None:
    from matplotlib.patches import Rectangle

    frame = Rectangle((column - 0.5, -0.5), 1, rows, fill=False, edgecolor="black", linewidth=1.6)
    frame.set_clip_on(False)
    frame.set_zorder(3)
    ax.add_patch(frame)


def short_names(names: Sequence[str]) -> tuple[list[str], str]:
    """Dotted names without the parts they all begin and end with, and the pattern that was taken away.

    ["encoder.layer.0.mlp", "encoder.layer.1.mlp"] -> (["0", "1"], "encoder.layer.*.mlp")
    """
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names), ""
    shortest = min(len(part) for part in parts)
    begin = 0
    while begin < shortest and len({part[begin] for part in parts}) == 1:
        begin += 1
    end = 0
    while end < shortest - begin and len({part[-1 - end] for part in parts}) == 1:
        end += 1
    stop = -end or None
    short = [".".join(part[begin:stop]) or "-" for part in parts]
    pattern = ".".join([*parts[0][:begin], "*", *(parts[0][-end:] if end else [])])
    return short, pattern


def _check_routing(routing: Mapping[str, Mapping[str, Sequence[float]]], experts: Sequence[str]) -> None:
    problems = []
    if not routing or not all(routing.values()):
        problems.append("expected at least one task and one layer, found none")
    layers = set(next(iter(routing.values()), {}))
    for task, panel in routing.items():
        if set(panel) != layers:
            problems.append(f"task {task!r}: expected the layers of the first task, found {', '.join(panel)}")
        for layer, row in panel.items():
            if len(row) != len(experts):
                problems.append(f"task {task!r}, layer {layer!r}: expected {len(experts)} weights, found {len(row)}")
            elif not all(math.isfinite(weight) for weight in row):
                problems.append(f"task {task!r}, layer {layer!r}: weights that are not finite")
    if problems:
        raise InputError.of("routing heat map", problems)
