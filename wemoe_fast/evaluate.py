"""Accuracy of a model on tasks, sample by sample routed, and what its routers did; resumed where it was left off.

A batch (`batching`) is computed as a whole, by one process, and recorded (`records`) when it is done. Which samples
share a batch depends on the data and the settings alone, and everything that is reported is computed from all
batches in one order, so it is the same to the last bit however often a run was ended, resumed and shared out anew.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .batching import Batches
from .distributed import World
from .errors import InputError
from .fingerprint import Digest, batch_digest, head_digest, model_digest, numerics
from .forward import NOT_A_NUMBER, Forward
from .prefetch import Prefetched
from .records import Record, RecordLog
from .routing import record_routing
from .tasks import Task
from .upscale import wemoe_layers


@dataclass
class Evaluation:
    """Results by task name. Accuracies are fractions; `mean` is their unweighted mean over tasks.

    `routing` holds mean routing weights by task, layer and expert; it is empty for a model without WEMoE layers.
    `labels` and `predictions` are class indices in the order of the samples, `classes` their names. `task_seconds`
    covers reading the data, the model and the head; `computed` counts the samples that were computed in that time,
    the others had been recorded before.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    task_seconds: dict[str, float] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)
    routing: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    predictions: dict[str, list[int]] = field(default_factory=dict)
    labels: dict[str, list[int]] = field(default_factory=dict)
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def seconds(self) -> float:
        return sum(self.task_seconds.values())

    @property
    def samples_per_second(self) -> float:
        return sum(self.computed.values()) / max(self.seconds, 1e-9)

    def add(self, other: Evaluation) -> None:
        """Take in the results of other tasks."""
        for item in fields(self):
            getattr(self, item.name).update(getattr(other, item.name))

    def to_json(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain types for JSON, without times; predictions and labels only when asked for."""
        content = {"mean": self.mean, "accuracy": self.accuracy, "n": self.n, "routing": self.routing}
        return content | ({"predictions": self.predictions, "labels": self.labels} if predictions else {})

    def times(self) -> dict[str, Any]:
        """Plain types for JSON: seconds and samples computed by task, samples per second over all."""
        return {
            "seconds": self.seconds,
            "samples_per_second": self.samples_per_second,
            "task_seconds": self.task_seconds,
            "computed": self.computed,
        }


def evaluate(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    records: str | Path | None = None,
    batch_tokens: int | None = None,
    batch_invariant: bool = False,
    world: World | None = None,
    progress: bool = True,
) -> Evaluation:
    """Classify every labelled sample of every task.

    The model runs in eval mode and without autograd; its training flags are restored. Data sets with `lengths` are
    batched by length (see `batching.Batches`).

    Args:
        model: on the device to compute on.
        tasks: of different names, with labelled samples.
        records: a directory where batches are recorded as they are done; what it holds of this model, these tasks
            and these settings is not computed again.
        batch_tokens: the budget of a batch; by default a task's batch_size times its longest sample.
        batch_invariant: run every sample by itself: its result is the same bit for bit whatever the batches, at the
            price of a batch of one.
        world: the processes that share the work; every one of them returns the whole result.
        progress: a bar on stderr.

    Raises:
        InputError: a task has no labels, no samples, or labels outside its head's classes; outputs that are no numbers.
        WEMoEError: a single sample does not fit into memory; another process ended.
        CheckpointError: records cannot be read or written.
    """
    check_tasks("evaluate", tasks)
    result = Evaluation()
    with torch.inference_mode(), eval_mode(model):
        _check_labels(tasks)
        digest = "" if records is None else model_digest(model)
        for task in tasks:
            run = _TaskRun(model, task, batch_tokens, batch_invariant, world or World(), progress)
            result.add(run.evaluate(None if records is None else Path(records), digest))
    return result


class _TaskRun:
    """One model on one task: arrays of what is known so far, and what fills them."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batch_tokens: int | None,
        batch_invariant: bool,
        world: World,
        progress: bool,
    ) -> None:
        self._start = time.perf_counter()
        self._model, self._task, self._world, self._progress = model, task, world, progress
        self._settings = [task.batch_size, batch_tokens, batch_invariant]
        self._alone = batch_invariant
        try:
            self._batches = Batches.of(task.data, task.batch_size, batch_tokens)
        except InputError as error:
            raise InputError(f"task {task.name!r}: {error}") from error
        self._device = next(iter(model.parameters()), torch.empty(0)).device
        self._fingerprint: str | None = getattr(task.data, "fingerprint", lambda: None)()
        n, batches = len(task.data), len(self._batches)
        self._labels, self._predictions = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self._done = np.zeros(batches, bool)
        self._routing = {
            name: np.zeros((batches, layer.num_experts + 1)) for name, layer in wemoe_layers(model).items()
        }
        self._digests: dict[int, str] = {}

    def evaluate(self, records: Path | None, model: str) -> Evaluation:
        """The results; `model` is its digest, where there are records."""
        if records is None:
            computed = self._compute(self._world.share(range(len(self._batches))), None)
        else:
            with self._log(records, model) as log:
                for record in log.read():
                    if self._fits(record):
                        self._take(record)
                computed = self._compute(self._missing(), log)
        return self._result(self._sum(computed), time.perf_counter() - self._start)

    def _log(self, records: Path, model: str) -> RecordLog:
        name = self._task.name if self._fingerprint is None else None  # tasks that nothing else tells apart
        task = Digest().plain([head_digest(self._task.head), self._fingerprint, name, len(self._task.data)])
        settings = {"batches": self._settings, **numerics(self._device)}
        key = Digest().plain([model, task.hex(), settings]).hex()
        found = self._world.gather([key, settings])
        if any(other[0] != key for other in found):
            differing = [f"process {rank}: {settings}" for rank, (_, settings) in enumerate(found)]
            raise InputError.of(
                f"task {self._task.name!r}: the processes of a run need the same model, data and settings", differing
            )
        return RecordLog(records / f"{model[:12]}-{task.hex()[:12]}-{key[:12]}", key, self._world.rank)

    def _fits(self, record: Record) -> bool:
        """Whether a record is of one of our batches; one that is not was written by a program that counts otherwise."""
        if not 0 <= record.batch < len(self._batches) or record.samples != self._batches[record.batch]:
            return False
        classes = range(len(self._task.head.classes))
        widths = {layer: sums.shape[1] for layer, sums in self._routing.items()}
        return (
            all(value in classes for value in (*record.labels, *record.predictions))
            and all(len(sums) == widths.get(layer) for layer, sums in record.routing.items())
            and (record.data is None) == (self._fingerprint is not None)
        )

    def _take(self, record: Record) -> None:
        self._labels[record.samples] = record.labels
        self._predictions[record.samples] = record.predictions
        for layer, sums in record.routing.items():
            self._routing[layer][record.batch] = sums
        self._done[record.batch] = True
        if record.data is not None:
            self._digests[record.batch] = record.data

    def _missing(self) -> list[int]:
        """The batches this process is to compute.

        A batch that several processes find recorded (or one alone, without shared storage) belongs to the first of
        them; the others forget it, so that it is counted once.
        """
        found = [np.unpackbits(bits, count=len(self._done)) for bits in self._world.gather(np.packbits(self._done))]
        owner = np.where(np.any(found, axis=0), np.argmax(found, axis=0), -1)
        for number in np.flatnonzero(self._done & (owner != self._world.rank)).tolist():
            self._forget(number)
        changed = self._changed(np.flatnonzero(owner == self._world.rank).tolist())
        return [*changed, *self._world.share(np.flatnonzero(owner == -1).tolist())]

    def _changed(self, numbers: list[int]) -> list[int]:
        """Recorded batches whose data is not what it was; read again only where nothing else tells."""
        if self._fingerprint is not None:
            return []
        with Prefetched(self._read(numbers)) as pieces:
            changed = [number for number, read in pieces if self._digests[number] != _digest(read)]
        for number in changed:
            self._forget(number)
        return changed

    def _forget(self, number: int) -> None:
        samples = self._batches[number]
        self._labels[samples] = self._predictions[samples] = 0
        for sums in self._routing.values():
            sums[number] = 0
        self._done[number] = False

    def _read(self, numbers: Sequence[int]) -> Iterator[tuple[int, list[tuple[dict[str, Tensor], Tensor]]]]:
        """Batches by number, in pieces: one, or one for each sample."""
        with torch.inference_mode():
            for number in numbers:
                samples = self._batches[number]
                read = []
                for piece in [[index] for index in samples] if self._alone else [samples]:
                    inputs, labels = self._task.data.batch(piece)
                    if self._device.type == "cuda":
                        inputs = {name: v.pin_memory() if v.device.type == "cpu" else v for name, v in inputs.items()}
                    read.append((inputs, _checked(self._task, labels, piece)))
                yield number, read

    def _compute(self, numbers: Sequence[int], log: RecordLog | None) -> int:
        """Compute batches, record each when it is done; returns the number of samples."""
        ahead = 1 if self._device.type == "cuda" else 0  # while the GPU computes one batch, the next is launched
        launched: deque[tuple[int, list[Any], list[Any]]] = deque()
        computed = 0
        with (
            record_routing(self._model) as routing,
            self._bar(numbers) as bar,
            Prefetched(self._read(numbers)) as batches,
        ):
            forward = Forward(self._model, self._task, routing)
            for number, read in batches:
                launched.append((number, read, [forward(inputs) for inputs, _ in read]))
                while len(launched) > ahead:
                    computed += self._finish(*launched.popleft(), log, bar)
            while launched:
                computed += self._finish(*launched.popleft(), log, bar)
        return computed

    def _finish(self, number: int, read: list[Any], outputs: list[Any], log: RecordLog | None, bar: tqdm[Any]) -> int:
        routing: dict[str, list[float]] = {}
        for _, sums in outputs:
            for layer, values in sums.items():
                before = routing.get(layer, [0.0] * len(values))
                routing[layer] = [a + b for a, b in zip(before, values.tolist(), strict=True)]
        record = Record(
            batch=number,
            samples=self._batches[number],
            labels=torch.cat([labels for _, labels in read]).tolist(),
            predictions=torch.cat([predictions for predictions, _ in outputs]).tolist(),
            routing=routing,
            data=_digest(read) if log is not None and self._fingerprint is None else None,
        )
        if NOT_A_NUMBER in record.predictions:
            sample = record.samples[record.predictions.index(NOT_A_NUMBER)]
            raise InputError(
                f"task {self._task.name!r}: the model's output for sample {sample} is not a number; look for values"
                " that are not finite in its weights or the data, or run it in another dtype (--dtype)"
            )
        if log is not None:
            log.append(record)
        self._take(record)
        bar.update(len(record.samples))
        return len(record.samples)

    def _bar(self, numbers: Sequence[int]) -> tqdm[Any]:
        """Progress over this process's samples; what was recorded before counts, but not for the speed."""
        left = sum(len(self._batches[number]) for number in numbers)
        done = sum(len(self._batches[number]) for number in np.flatnonzero(self._done).tolist())
        name = self._task.name if self._world.size == 1 else f"{self._task.name} (process 1 of {self._world.size})"
        shown = self._progress and self._world.first
        return tqdm(total=done + left, initial=done, desc=name, unit=" samples", file=sys.stderr, disable=not shown)

    def _sum(self, computed: int) -> int:
        """Every process's results in each; returns the samples computed by all."""
        if self._world.size > 1:
            arrays: list[np.ndarray] = [self._labels, self._predictions, *self._routing.values()]
            for array in arrays:
                array[:] = self._world.add(torch.from_numpy(array).to(self._world.device)).cpu().numpy()
        return sum(self._world.gather(computed))

    def _result(self, computed: int, seconds: float) -> Evaluation:
        name, n = self._task.name, len(self._task.data)
        routing = {layer: _means(sums) for layer, sums in self._routing.items() if sums[:, -1].any()}
        return Evaluation(
            accuracy={name: int((self._predictions == self._labels).sum()) / n},
            n={name: n},
            task_seconds={name: seconds},
            computed={name: computed},
            routing={name: routing} if routing else {},
            predictions={name: self._predictions.tolist()},
            labels={name: self._labels.tolist()},
            classes={name: self._task.head.classes},
        )


def _means(sums: np.ndarray) -> list[float]:
    """[batches, T + 1] -> [T]: summed exactly and rounded once, so in whatever order."""
    rows = math.fsum(sums[:, -1])
    return [math.fsum(column) / rows for column in sums[:, :-1].T]


def _digest(read: Sequence[tuple[dict[str, Tensor], Tensor]]) -> str:
    return Digest().plain([batch_digest(inputs, labels) for inputs, labels in read]).hex()


def _checked(task: Task, labels: Tensor | None, indices: Sequence[int]) -> Tensor:
    classes = len(task.head.classes)
    if labels is None:
        raise InputError(f"task {task.name!r}: its data has no labels; evaluation needs them")
    if labels.shape != (len(indices),) or labels.is_floating_point():
        raise InputError(
            f"task {task.name!r}: expected {len(indices)} integer labels, found {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.cpu().long()
    outside = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if outside:
        raise InputError(
            f"task {task.name!r}: label {int(labels[outside[0]])} of sample {indices[outside[0]]} is outside the"
            f" head's {classes} classes ({', '.join(task.head.classes)})"
        )
    return labels


def _check_labels(tasks: Sequence[Task]) -> None:
    """Look at one sample of each task, so that a task without labels does not show after hours."""
    bare = [task.name for task in tasks if task.data.batch([0])[1] is None]
    if bare:
        raise InputError.of(
            "evaluate", [f"task {name!r}: its data has no labels; evaluation needs them" for name in bare]
        )


def check_tasks(subject: str, tasks: Sequence[Task]) -> None:
    """Raise InputError unless there are tasks, of different names, all with samples."""
    names = [task.name for task in tasks]
    problems = [] if names else ["expected at least one task, found none"]
    problems += [f"task name {name!r} is used twice" for name in sorted(set(names)) if names.count(name) > 1]
    for task in tasks:
        if len(task.data) == 0:
            problems.append(f"task {task.name!r}: its data is empty")
        if task.unlabelled is not None and len(task.unlabelled) == 0:
            problems.append(f"task {task.name!r}: its unlabelled data is empty")
    if problems:
        raise InputError.of(subject, problems)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """model.eval(), then every module's own training flag back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in flags.items():
            module.training = training
