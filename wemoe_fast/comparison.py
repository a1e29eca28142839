"""Several models on the same tasks: rows of one table, and the files that keep it."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import check_output
from .evaluate import Evaluation, evaluate
from .report import accuracy_table, routing_heatmap, write_json
from .tasks import Task
from .upscale import expert_names


def compare(
    models: Iterable[tuple[str, nn.Module]],
    tasks: Sequence[Task],
    *,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> tuple[dict[str, Evaluation], dict[str, tuple[str, ...]]]:
    """Evaluate models one after the other; only one is held at a time if ``models`` is lazy.

    Returns:
        the evaluations by row name, and the expert names of the rows that route.
    """
    rows: dict[str, Evaluation] = {}
    experts: dict[str, tuple[str, ...]] = {}
    for name, model in models:
        if progress:
            sys.stderr.write(f"{name}\n")
        model = model.to(device=device, dtype=dtype)
        rows[name] = evaluate(model, tasks, progress=progress)
        if rows[name].routing:
            experts[name] = expert_names(model)
    return rows, experts


def write_comparison(
    rows: Mapping[str, Evaluation],
    experts: Mapping[str, tuple[str, ...]],
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write metrics.json, predictions.json, table.md and, for rows that route, a heat map each.

    Returns:
        the files by what they are: ``metrics``, ``predictions``, ``table``, and ``routing <row>``.
    """
    out = Path(out)
    check_output(out, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    files = {"metrics": out / "metrics.json", "predictions": out / "predictions.json", "table": out / "table.md"}
    content = {
        "environment": environment(),
        "settings": dict(settings or {}),
        "rows": {name: row.to_json() | {"experts": list(experts.get(name, ()))} for name, row in rows.items()},
    }
    write_json(files["metrics"], content)
    write_json(files["predictions"], {name: row.predictions for name, row in rows.items()})
    files["table"].write_text(table(rows, markdown=True) + "\n", encoding="utf-8")
    for name, row in rows.items():
        if row.routing:
            path = out / f"routing-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.png"
            routing_heatmap(row.routing, experts[name], path, title=f"Mean routing weight: {name}")
            files[f"routing {name}"] = path
    return files


def table(rows: Mapping[str, Evaluation], *, markdown: bool = False) -> str:
    """Models down, tasks across, accuracies in percent."""
    return accuracy_table({name: row.accuracy for name, row in rows.items()}, markdown=markdown)


def environment() -> dict[str, Any]:
    """What a figure was measured on."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
