"""Several models on the same tasks: rows of one table, and the files that keep it."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .atomic import check_output
from .distributed import World
from .errors import CheckpointError
from .evaluate import Evaluation, evaluate
from .report import accuracy_table, aligned, write_json, write_lines
from .routing_report import write_routing
from .tasks import Task
from .upscale import expert_names

METRICS = "metrics.json"
RECORDS = "records"
_OURS = re.compile(r"(records|(metrics|routing|timing)\.json|predictions\.jsonl|table\.md|routing-.*\.png)|\..*\.tmp")


def compare(
    models: Iterable[tuple[str, nn.Module]],
    tasks: Sequence[Task],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    records: str | Path | None = None,
    batch_tokens: int | None = None,
    batch_invariant: bool = False,
    world: World | None = None,
    progress: bool = True,
) -> tuple[dict[str, Evaluation], dict[str, tuple[str, ...]]]:
    """Evaluate models one after the other; only one is held at a time if ``models`` is lazy.

    ``records``, ``batch_tokens``, ``batch_invariant`` and ``world`` are those of ``evaluate``.

    Returns:
        the evaluations by row name, and the expert names of the rows that route.
    """
    rows: dict[str, Evaluation] = {}
    experts: dict[str, tuple[str, ...]] = {}
    for name, model in models:
        if progress and (world is None or world.first):
            sys.stderr.write(f"{name}\n")
        model = model.to(device=device, dtype=dtype)
        rows[name] = evaluate(
            model,
            tasks,
            records=records,
            batch_tokens=batch_tokens,
            batch_invariant=batch_invariant,
            world=world,
            progress=progress,
        )
        if rows[name].routing:
            experts[name] = expert_names(model)
    return rows, experts


def check_resumable(out: str | Path, *, overwrite: bool = False) -> Path:
    """Where the records of an evaluation that writes to ``out`` are kept.

    Raises CheckpointError if ``out`` holds anything but an evaluation that is not complete, unless it may be replaced.
    """
    out = Path(out)
    records = out / RECORDS
    complete = (out / METRICS).exists()
    ours = records.is_dir() and all(_OURS.fullmatch(path.name) for path in out.iterdir())
    if complete and ours and not overwrite:
        raise CheckpointError(
            f"{out}: this evaluation is complete; name another directory, or pass overwrite (--overwrite) to write it"
            " again: what is recorded of the same models, tasks and settings is not computed again"
        )
    if complete or not ours:
        check_output(out, overwrite=overwrite)
    return records


def write_comparison(
    rows: Mapping[str, Evaluation],
    experts: Mapping[str, tuple[str, ...]],
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> dict[str, Path]:
    """Write what came out, last of all metrics.json: where it is, the rest is.

        metrics.json         accuracies and numbers of samples, by row and task
        predictions.jsonl    a line for every sample: row, task, index, label, prediction
        table.md             the table of accuracies
        routing.json         mean routing weights by row, task, layer and expert, and a heat map for each row
        timing.json          seconds, and what they were measured on

    Nothing but timing.json depends on how the run went.

    Returns:
        the files by what they are: ``metrics``, ``predictions``, ``table``, ``timing``, ``routing`` and
        ``routing <row>``.
    """
    out = Path(out)
    check_resumable(out, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)
    files = {"metrics": out / METRICS, "predictions": out / "predictions.jsonl", "table": out / "table.md"}
    files["timing"] = out / "timing.json"
    files["metrics"].unlink(missing_ok=True)
    write_lines(files["predictions"], (line for name, row in rows.items() for line in _predictions(name, row)))
    files["table"].write_text(table(rows, markdown=True) + "\n", encoding="utf-8")
    routing = {name: row.routing for name, row in rows.items() if row.routing}
    files |= write_routing(routing, experts, out)
    times = {name: row.times() for name, row in rows.items()}
    write_json(files["timing"], {"environment": environment(), "rows": times})
    content = {name: row.to_json() | {"experts": list(experts.get(name, ()))} for name, row in rows.items()}
    write_json(files["metrics"], {"settings": dict(settings or {}), "rows": content})
    return files


def _predictions(name: str, row: Evaluation) -> Iterator[str]:
    for task, predictions in row.predictions.items():
        classes = [json.dumps(text, ensure_ascii=False) for text in row.classes[task]]
        start = json.dumps({"row": name, "task": task}, ensure_ascii=False)[:-1]
        for index, (label, prediction) in enumerate(zip(row.labels[task], predictions, strict=True)):
            yield f'{start}, "index": {index}, "label": {classes[label]}, "prediction": {classes[prediction]}}}'


def table(rows: Mapping[str, Evaluation], *, markdown: bool = False) -> str:
    """Models down, tasks across, accuracies in percent."""
    return accuracy_table({name: row.accuracy for name, row in rows.items()}, markdown=markdown)


def speeds(rows: Mapping[str, Evaluation]) -> str:
    """Models down: samples, those recorded before, seconds, samples per second."""
    heading = ["model", "samples", "recorded before", "seconds", "samples per second"]
    lines = [heading]
    for name, row in rows.items():
        n, computed = sum(row.n.values()), sum(row.computed.values())
        speed = f"{row.samples_per_second:,.1f}" if computed else "-"
        lines.append([name, f"{n:,}", f"{n - computed:,}", f"{row.seconds:.1f}", speed])
    return aligned(lines)


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
