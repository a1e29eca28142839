"""What the routers of several models did: one JSON file, and a heat map for each."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from .report import routing_heatmap, write_json

Routing = Mapping[str, Mapping[str, Sequence[float]]]


def write_routing(routing: Mapping[str, Routing], experts: Mapping[str, Sequence[str]], out: Path) -> dict[str, Path]:
    """Write routing.json and a PNG for each model.

    Args:
        routing: mean routing weights [T] by model, task and layer.
        experts: the T names by model.
        out: the directory.

    Returns:
        the files: ``routing`` and ``routing <model>``; none for no routing. Without matplotlib there are no pictures,
        and a warning.
    """
    if not routing:
        return {}
    files = {"routing": out / "routing.json"}
    content = {name: {"experts": list(experts[name]), "tasks": tasks} for name, tasks in routing.items()}
    write_json(files["routing"], content)
    if find_spec("matplotlib") is None:
        warnings.warn('no heat maps without matplotlib: pip install "wemoe-fast[plot]"', RuntimeWarning, stacklevel=3)
        return files
    for name, tasks in routing.items():
        path = out / f"routing-{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.png"
        routing_heatmap(tasks, experts[name], path, title=f"Mean routing weight: {name}")
        files[f"routing {name}"] = path
    return files
