"""Accuracy of a model on tasks, sample by sample routed, and what its routers did."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError
from .routing import record_routing
from .tasks import Samples, Task


@dataclass
class Evaluation:
    """Results by task name. Accuracies are fractions; `mean` is their unweighted mean over tasks.

    `seconds` covers reading the data, the model and the head. `routing` holds mean routing weights by task,
    layer and expert; it is empty for a model without WEMoE layers. `predictions` are class indices in the
    order of the samples.
    """

    accuracy: dict[str, float] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    task_seconds: dict[str, float] = field(default_factory=dict)
    routing: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    predictions: dict[str, list[int]] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def seconds(self) -> float:
        return sum(self.task_seconds.values())

    @property
    def samples_per_second(self) -> float:
        return sum(self.n.values()) / max(self.seconds, 1e-9)

    def to_json(self, *, predictions: bool = False) -> dict[str, Any]:
        """Plain types for JSON; predictions only when asked for."""
        content = asdict(self)
        if not predictions:
            del content["predictions"]
        totals = {"mean": self.mean, "seconds": self.seconds, "samples_per_second": self.samples_per_second}
        return totals | content


def evaluate(model: nn.Module, tasks: Sequence[Task], *, progress: bool = True) -> Evaluation:
    """Classify every labelled sample of every task.

    The model runs in eval mode and without autograd; its training flags are restored. Data sets with
    `lengths` are batched by length, and no result depends on that order. Raises InputError if a task has no
    labels, no samples, or labels outside its head's classes.
    """
    check_tasks("evaluate", tasks)
    result = Evaluation()
    with torch.inference_mode(), eval_mode(model):
        _check_labels(tasks)
        for task in tasks:
            _evaluate_task(model, task, result, progress)
    return result


def _evaluate_task(model: nn.Module, task: Task, result: Evaluation, progress: bool) -> None:
    n = len(task.data)
    predictions = torch.empty(n, dtype=torch.long)
    labels = torch.empty(n, dtype=torch.long)
    start = time.perf_counter()
    order = _order(task.data)
    with (
        record_routing(model) as routing,
        tqdm(total=n, desc=task.name, unit=" samples", file=sys.stderr, disable=not progress) as bar,
    ):
        for first in range(0, n, task.batch_size):
            indices = order[first : first + task.batch_size]
            inputs, batch_labels = task.data.batch(indices)
            labels[indices] = _checked(task, batch_labels, indices)
            predictions[indices] = task.logits(model, inputs).argmax(-1).cpu()
            bar.update(len(indices))
    result.task_seconds[task.name] = time.perf_counter() - start
    result.accuracy[task.name] = (predictions == labels).double().mean().item()
    result.n[task.name] = n
    result.predictions[task.name] = predictions.tolist()
    means = routing.means()
    if means:
        result.routing[task.name] = means


def _order(samples: Samples) -> list[int]:
    """Longest first, so that running out of memory shows at once; as they come where lengths are unknown."""
    lengths = getattr(samples, "lengths", None)
    if lengths is None:
        return list(range(len(samples)))
    return sorted(range(len(samples)), key=lambda i: (-lengths[i], i))


def _checked(task: Task, labels: Tensor | None, indices: Sequence[int]) -> Tensor:
    classes = len(task.head.classes)
    if labels is None:
        raise InputError(f"task {task.name!r}: its data has no labels; evaluation needs them")
    if labels.shape != (len(indices),) or labels.is_floating_point():
        raise InputError(
            f"task {task.name!r}: expected {len(indices)} integer labels, found {labels.dtype} {list(labels.shape)}"
        )
    labels = labels.cpu().long()
    for index, label in zip(indices, labels.tolist(), strict=True):
        if not 0 <= label < classes:
            raise InputError(
                f"task {task.name!r}: label {label} of sample {index} is outside the head's {classes} classes"
                f" ({', '.join(task.head.classes)})"
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
