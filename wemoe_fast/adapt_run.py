"""The driver's second verb: a directory of a WEMoE model in, one with adapted routers out."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .adapt import SETTINGS, Adaptation, adapt
from .adapt_state import Checkpoints, fingerprint, short
from .atomic import check_output, remove_leftovers, replaced_directory
from .checkpoint import load, save
from .curves import adaptation_curves
from .distributed import World
from .errors import CheckpointError, InputError
from .report import write_json
from .tasks import load_tasks

RESULT_FILE, CURVES_FILE = "adaptation.json", "adaptation.png"


def checkpoints_of(out: Path) -> Path:
    """Where a run that writes to ``out`` keeps its checkpoints: beside it, since it is replaced as a whole."""
    return out.resolve().with_name(f"{out.resolve().name}.checkpoints")


def adapt_directory(
    source: str | Path,
    tasks: str | Path,
    out: str | Path,
    *,
    steps: int,
    settings: Mapping[str, Any],
    checkpoint_every: int | None = None,
    restart: bool = False,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    world: World | None = None,
    progress: bool = True,
) -> Adaptation:
    """Adapt a model and save it with ``adaptation.json`` and, where matplotlib is installed, ``adaptation.png``.

    With checkpoints the same call goes on with a run that was stopped, goes on for more ``steps``, and leaves a
    finished output as it is. The output appears as a whole, written by the first process.

    Args:
        source: directory of a WEMoE model.
        tasks: tasks.yaml.
        out: the new directory.
        settings: the arguments of ``adapt`` that ``SETTINGS`` names.
        checkpoint_every: steps between two checkpoints in :func:`checkpoints_of` ``out``; None keeps none.
        restart: begin anew, whatever checkpoints there are.
        overwrite: replace an output directory that is not empty.

    Raises:
        as ``adapt``; CheckpointError where ``out`` holds something else; InputError for ``restart`` without
        checkpoints.
    """
    source, out, world = Path(source), Path(out), world or World()
    store = None
    if restart and checkpoint_every is None:
        raise InputError("restart: expected checkpoint_every with it (--checkpoint-every), which keeps checkpoints")
    if checkpoint_every is not None:
        if source.resolve() == out.resolve():
            raise CheckpointError(
                f"{out}: a run with checkpoints goes on from the model that it began with; name another output"
            )
        store = Checkpoints(checkpoints_of(out), every=checkpoint_every, restart=restart)
    found = world.on_first(lambda: _found(out, overwrite=overwrite, resumes=store is not None and not restart))
    model = load(source).to(device=world.device, dtype=dtype)
    loaded = load_tasks(tasks, source)
    if found is not None:
        finished = _finished(found, short(fingerprint(model, loaded, settings)), steps)
        if finished is not None:
            if world.first:
                remove_leftovers(out.resolve())
            return finished
        check_output(out, overwrite=overwrite)
    result = adapt(model, loaded, steps=steps, checkpoints=store, world=world, progress=progress, **settings)
    if world.first:
        noted = {name: getattr(result, name) for name in ("steps", *SETTINGS)} | {"tasks": list(result.entropy)}
        with replaced_directory(out, overwrite=overwrite) as target:
            save(model, target, files_from=source, settings={"adaptation": noted})
            write_json(target / RESULT_FILE, result.to_json())
            if result.steps and importlib.util.find_spec("matplotlib"):
                adaptation_curves(result, target / CURVES_FILE)
    world.wait()
    return result


def _found(out: Path, *, overwrite: bool, resumes: bool) -> dict[str, Any] | None:
    """What an output that is there says of its run, where that may be this one; refused where it cannot be."""
    try:
        check_output(out, overwrite=overwrite)
    except CheckpointError:
        try:
            content = json.loads((out / RESULT_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            content = None
        if not (resumes and isinstance(content, dict) and content.get("fingerprint")):
            raise
        return content
    return None


def _finished(content: dict[str, Any], identity: str, steps: int) -> Adaptation | None:
    """The result that a run of this identity and number of steps wrote, None where another run wrote it."""
    try:
        result = Adaptation(**content)
    except TypeError:  # of another version
        return None
    result.resumed = result.steps
    done = result.steps == steps or (result.stopped_early and result.steps < steps)
    return result if done and result.fingerprint == identity else None
