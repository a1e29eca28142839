"""Checkpoints of an adaptation: all that a run needs to go on, bit for bit, as if it had never stopped.

    adapted.checkpoints/
        step-00000040/state.safetensors    the routers and Adam's moments after 40 steps
        step-00000040/state.json           step, losses, samplers, random number generators, fingerprint, digests
        step-00000060/...

A checkpoint appears under its name when it is complete and on disk, not before. The newest two are kept.
"""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .atomic import locked, replaced_directory
from .errors import CheckpointError
from .fingerprint import Digest, head_digest, model_digest
from .tasks import Samples, Task

FORMAT_VERSION = 1
KEPT = 2
TENSORS_FILE, JSON_FILE = "state.safetensors", "state.json"
_BLOCK = 256  # samples read at once for a digest

Fingerprint = dict[str, Any]


@dataclass(frozen=True)
class State:
    """A run after ``step`` steps: tensors by name (on the CPU), and the rest as plain values for JSON."""

    step: int
    tensors: dict[str, Tensor]
    content: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a directory of its own; made where there is none.

    Args:
        directory: holds nothing but checkpoints; beside the output, which is replaced as a whole.
        every: steps between two checkpoints; there is one at the end of a run in any case.
        restart: delete what an earlier run left, and begin anew.

    As a context manager it keeps other runs out, but on Windows. Raises CheckpointError where another one is in.
    """

    def __init__(self, directory: str | Path, *, every: int = 100, restart: bool = False) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise CheckpointError(f"every: expected a number of steps of at least 1, found {every!r}")
        self.directory = Path(directory).resolve()
        self.every, self.restart = every, restart
        self._damaged: set[Path] = set()
        self._lock: int | None = None
        self._depth = 0

    def __enter__(self) -> Checkpoints:
        if not self._depth:
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._lock = locked(self.directory)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.directory}: another run is writing its checkpoints here; wait for it, or name another"
                    " output"
                ) from None
            except OSError as error:
                raise CheckpointError(f"{self.directory}: no directory for checkpoints: {error}") from error
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth and self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def read(self, fingerprint: Fingerprint, most: int) -> State | None:
        """The newest complete checkpoint of at most ``most`` steps, None where there is none at all.

        A damaged one is passed over with a warning. Raises CheckpointError where all are damaged, all are beyond
        ``most``, or they are those of another run: everything that differs is named.
        """
        if self.restart:
            for path in self._steps():
                shutil.rmtree(path)
            self.restart = False
        beyond = []
        for path in self._steps():
            try:
                state = _read(path)
            except CheckpointError as error:
                self._damaged.add(path)
                warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
                continue
            _refuse_another_run(self.directory, state.content["fingerprint"], fingerprint)
            if state.step <= most:
                self._clear()
                return state
            beyond.append(state.step)
        if beyond:
            raise CheckpointError(
                f"{self.directory}: its checkpoints have {' and '.join(map(str, sorted(beyond)))} steps, more than the"
                f" {most} asked for; ask for more, or begin anew with restart (--restart)"
            )
        if self._damaged:
            raise CheckpointError(
                f"{self.directory}: no checkpoint in it is complete; begin anew with restart (--restart)"
            )
        self._clear()
        return None

    def write(self, state: State) -> None:
        """Put a checkpoint on disk and let go of all but the newest. Raises CheckpointError where it cannot."""
        path = self.directory / f"step-{state.step:08d}"
        try:
            with replaced_directory(path, overwrite=True) as target:
                _write(state, target)
            self._damaged.discard(path)
            self._clear()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be written: {error}; the one before it is kept") from error

    def _steps(self) -> list[Path]:
        """Newest first."""
        return sorted((path for path in self.directory.glob("step-*") if path.is_dir()), reverse=True)

    def _clear(self) -> None:
        """Delete what is neither among the newest nor of use."""
        sound = [path for path in self._steps() if path not in self._damaged]
        old = sound[KEPT:] + [path for path in self._damaged if sound]
        for path in [*old, *self.directory.glob(".step-*")]:  # what killed writers left: there is no other writer
            shutil.rmtree(path, ignore_errors=True)


def fingerprint(model: nn.Module, tasks: Sequence[Task], settings: Mapping[str, Any]) -> Fingerprint:
    """What must be the same for a run to go on: digests of every tensor of the model, of each task's head and
    adaptation data, and the settings.

    Data without a ``fingerprint()`` of its own is read once, in order.
    """
    return {
        "model": model_digest(model),
        "tasks": {task.name: _task_digest(task) for task in tasks},
        "settings": dict(settings),
    }


def short(fingerprint: Fingerprint) -> str:
    """One digest of a fingerprint."""
    return Digest().plain(fingerprint).hex()


def generators() -> dict[str, Any]:
    """The states of the global random number generators (PyTorch's, NumPy's, Python's) as plain values."""
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    numpy["state"] = {**numpy["state"], "key": numpy["state"]["key"].tolist()}
    found = {
        "torch": _encoded(torch.get_rng_state()),
        "cuda": [_encoded(state) for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else [],
        "numpy": numpy,
        "python": random.getstate(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def set_generators(states: Mapping[str, Any]) -> None:
    """Put the global random number generators into states that :func:`generators` found."""
    torch.set_rng_state(_decoded(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decoded(state) for state in states["cuda"]])
    numpy = states["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    version, state, gauss = states["python"]
    random.setstate((version, tuple(state), gauss))


def _refuse_another_run(directory: Path, theirs: Fingerprint, ours: Fingerprint) -> None:
    if theirs == ours and list(theirs["tasks"]) == list(ours["tasks"]):
        return
    problems = []
    if theirs["model"] != ours["model"]:
        problems.append(
            "model: other tensors, another structure or other versions of its packages than at the start of that run"
        )
    for name in dict.fromkeys([*theirs["tasks"], *ours["tasks"]]):
        if name not in ours["tasks"]:
            problems.append(f"task {name!r}: expected as in that run, found none")
        elif name not in theirs["tasks"]:
            problems.append(f"task {name!r}: not in that run")
        elif theirs["tasks"][name] != ours["tasks"][name]:
            problems.append(f"task {name!r}: another head or other samples than in that run")
    for name in dict.fromkeys([*theirs["settings"], *ours["settings"]]):
        expected, found = theirs["settings"].get(name), ours["settings"].get(name)
        if expected != found:
            problems.append(f"{name}: expected {expected!r} as in that run, found {found!r}")
    if not problems:
        problems.append(f"tasks: expected the order {', '.join(theirs['tasks'])}, found {', '.join(ours['tasks'])}")
    advice = "give what it was given to go on, or begin anew with restart (--restart), which deletes them"
    raise CheckpointError.of(f"{directory} has checkpoints of another run ({advice})", problems)


def _task_digest(task: Task) -> str:
    samples: Samples = task.adaptation_data
    digest = Digest().text(head_digest(task.head))
    if hasattr(samples, "fingerprint"):
        return digest.text(samples.fingerprint()).hex()
    for begin in range(0, len(samples), _BLOCK):
        inputs, _ = samples.batch(list(range(begin, min(begin + _BLOCK, len(samples)))))
        digest.tensors(inputs)
    return digest.hex()


def _encoded(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _write(state: State, directory: Path) -> None:
    tensors = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.tensors.items()})
    (directory / TENSORS_FILE).write_bytes(tensors)
    content = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        **state.content,
        "tensors": Digest().data(tensors).hex(),
    }
    content["digest"] = Digest().plain(content).hex()
    (directory / JSON_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read(path: Path) -> State:
    """Raises CheckpointError for anything but what was written."""
    try:
        content = json.loads((path / JSON_FILE).read_text(encoding="utf-8"))
        digest = content.pop("digest")
        if content["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: expected format_version {FORMAT_VERSION}, found {content['format_version']!r}"
            )
        stored = (path / TENSORS_FILE).read_bytes()
        sound = digest == Digest().plain(content).hex()
        sound = sound and content.pop("tensors") == Digest().data(stored).hex()
        if not sound:
            raise CheckpointError(f"{path}: damaged: its digests are not those of its content")
        tensors = safetensors.torch.load(stored)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: damaged: {type(error).__name__}: {error}") from error
    return State(content["step"], tensors, content)
