"""Test-time adaptation: train the routers, and nothing else, on unlabelled samples.

As published: for each step, a batch from every task; the loss is the sum over tasks of the mean entropy of
softmax(logits); Adam. Entropy is no stopping rule, since it goes on falling while accuracy collapses. What
tells is the routing: `routing_drift` is, at each step, the largest over layers of

    mean |routing weight| / max(its value at step 1, 1/T)

(1/T is what choosing exactly one expert gives), and above DRIFT_LIMIT a warning is given, once.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .errors import InputError, WEMoEError
from .evaluate import check_tasks, eval_mode
from .mlp import FastWEMoEMLP
from .routing import record_routing
from .tasks import Task
from .upscale import wemoe_layers

# measured on the demo's tuning texts: a run that gained 3 points ended at 2.6, one that ended below its start at 7.4
DRIFT_LIMIT = 4.0
ROUTINGS = ("per_sample", "batch_reduce")


@dataclass
class Adaptation:
    """What happened, step by step."""

    steps: int
    lr: float
    batch_size: int
    seed: int
    routing: str
    entropy: dict[str, list[float]] = field(default_factory=dict)
    routing_drift: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def adapt(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    routing: str = "per_sample",
    progress: bool = True,
) -> Adaptation:
    """Train the routers of `model` in place by entropy minimisation; labels are never read.

    Every step draws `batch_size` samples of each task's unlabelled data (its data, where there is none),
    without replacement until all were drawn. What is drawn depends on `seed`, the task's name and the step
    alone. With `routing="batch_reduce"` all samples of a batch share one routing while adapting. The model
    runs in eval mode; flags, requires_grad and gradients are afterwards as they were before.

    Raises InputError for arguments that do not fit, and WEMoEError when a loss or gradient is not finite; the
    routers then hold the last values that gave finite losses.
    """
    layers = _checked(model, tasks, steps, lr, batch_size, seed, routing)
    result = Adaptation(steps, lr, batch_size, seed, routing, {task.name: [] for task in tasks})
    if steps == 0:
        return result
    routers = _router_parameters(layers)
    draws = {task.name: Draw(len(task.adaptation_data), batch_size, seed, task.name) for task in tasks}
    optimizer = torch.optim.Adam(routers, lr=lr)
    experts = {name: layer.num_experts for name, layer in layers.items()}
    kept: list[Tensor] | None = None  # the routers that gave the last finite losses
    first: dict[str, float] = {}
    start = time.perf_counter()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        eval_mode(model),
        _only_trainable(model, routers),
        _batch_reduce(layers, routing == "batch_reduce"),
        record_routing(model) as record,
        tqdm(total=steps, desc="adapt", unit=" steps", file=sys.stderr, disable=not progress) as bar,
    ):
        for step in range(1, steps + 1):
            record.reset()
            gradients: list[Tensor | None] = [None] * len(routers)
            losses: list[Tensor] = []
            sound: list[Tensor] = []
            for task in tasks:
                inputs, _ = task.adaptation_data.batch(draws[task.name].indices(step))
                loss = entropy(task.logits(model, inputs)).mean()
                if not loss.requires_grad:
                    raise InputError(f"task {task.name!r}: its logits do not depend on any router")
                parts = torch.autograd.grad(loss, routers, allow_unused=True)
                sound.append(torch.stack([p.isfinite().all() for p in parts if p is not None]).all())
                losses.append(loss.detach())
                gradients = [_sum(total, part) for total, part in zip(gradients, parts, strict=True)]
            values = [float(loss) for loss in losses]
            finite = [math.isfinite(v) and bool(s) for v, s in zip(values, sound, strict=True)]
            if not all(finite):
                if kept is not None and not all(map(math.isfinite, values)):
                    _restore(routers, kept)
                raise WEMoEError(_not_finite(step, tasks, values, finite))
            kept = [router.detach().clone() for router in routers]
            _step(optimizer, routers, gradients)

            for task, value in zip(tasks, values, strict=True):
                result.entropy[task.name].append(value)
            magnitudes = record.magnitudes()
            first = magnitudes | first
            drift = {name: m / max(first[name], 1 / experts[name]) for name, m in magnitudes.items()}
            _warn_of_drift(step, drift, magnitudes, result.routing_drift)
            result.routing_drift.append(max(drift.values(), default=0.0))
            bar.set_postfix({task.name: f"{v:.3f}" for task, v in zip(tasks, values, strict=True)})
            bar.update()
    result.seconds = time.perf_counter() - start
    return result


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: [B, C] -> [B]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class Draw:
    """Batches of indices below n: permutation after permutation, each a function of seed, name and number."""

    def __init__(self, n: int, batch_size: int, seed: int, name: str) -> None:
        self._n, self._batch_size, self._seed, self._name = n, batch_size, seed, name
        self._permutations: dict[int, list[int]] = {}

    def indices(self, step: int) -> list[int]:
        """The batch of a step, counted from 1."""
        begin = (step - 1) * self._batch_size
        return [self._permutation(i // self._n)[i % self._n] for i in range(begin, begin + self._batch_size)]

    def _permutation(self, number: int) -> list[int]:
        if number not in self._permutations:
            digest = hashlib.blake2b(f"{self._seed}/{number}/{self._name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
            self._permutations = {number: torch.randperm(self._n, generator=generator).tolist()}
        return self._permutations[number]


def _checked(
    model: nn.Module,
    tasks: Sequence[Task],
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
    routing: str,
) -> dict[str, FastWEMoEMLP]:
    problems = []
    for name, value, low in (("steps", steps, 0), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            problems.append(f"{name}: expected an integer of at least {low}, found {value!r}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (0 < lr < math.inf):
        problems.append(f"lr: expected a finite number above 0, found {lr!r}")
    if routing not in ROUTINGS:
        problems.append(f"routing: expected one of {', '.join(ROUTINGS)}, found {routing!r}")
    layers = wemoe_layers(model)
    if not layers:
        problems.append(f"model: expected WEMoE layers, found none in {type(model).__name__}; upscale it first")
    invariant = [name for name, layer in layers.items() if layer.batch_invariant]
    if routing == "batch_reduce" and invariant:
        problems.append(
            f"routing: batch_reduce is not for batch-invariant layers ({', '.join(invariant)});"
            " set their batch_invariant to False"
        )
    try:
        check_tasks("tasks", tasks)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError.of("adapt", problems)
    return layers


def _router_parameters(layers: dict[str, FastWEMoEMLP]) -> list[nn.Parameter]:
    """Each once, also where layers share a router."""
    parameters = (p for layer in layers.values() for p in layer.router.parameters())
    return list({id(parameter): parameter for parameter in parameters}.values())


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None else total if part is None else total + part


def _step(optimizer: torch.optim.Optimizer, routers: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    """One update; the gradients a caller may hold in .grad are left alone."""
    held = [router.grad for router in routers]
    try:
        for router, gradient in zip(routers, gradients, strict=True):
            router.grad = gradient
        optimizer.step()
    finally:
        for router, gradient in zip(routers, held, strict=True):
            router.grad = gradient


@torch.no_grad()
def _restore(routers: list[nn.Parameter], values: list[Tensor]) -> None:
    for router, value in zip(routers, values, strict=True):
        router.copy_(value)


def _not_finite(step: int, tasks: Sequence[Task], values: list[float], finite: list[bool]) -> str:
    found = []
    for task, value, good in zip(tasks, values, finite, strict=True):
        if not good:
            what = "a gradient that is not finite" if math.isfinite(value) else f"loss {value}"
            found.append(f"task {task.name!r} has {what}")
    return (
        f"adapt: step {step}: {', '.join(found)}; the routers hold the last values that gave finite losses;"
        " try a smaller lr or another dtype"
    )


def _warn_of_drift(step: int, drift: dict[str, float], magnitudes: dict[str, float], before: list[float]) -> None:
    if not drift or any(value > DRIFT_LIMIT for value in before):
        return
    layer = max(drift, key=drift.__getitem__)
    if drift[layer] > DRIFT_LIMIT:
        warnings.warn(
            f"adapt: step {step}: mean |routing weight| of layer {layer!r} has grown to {magnitudes[layer]:.2f},"
            f" {drift[layer]:.1f} times its reference; accuracy may fall from here on while entropy goes on"
            " falling: use fewer steps or a smaller lr, and check with labelled samples",
            stacklevel=3,
        )


@contextmanager
def _only_trainable(model: nn.Module, routers: list[nn.Parameter]) -> Iterator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(router) for router in routers}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _batch_reduce(layers: dict[str, FastWEMoEMLP], value: bool) -> Iterator[None]:
    before = {name: layer.batch_reduce for name, layer in layers.items()}
    for layer in layers.values():
        layer.batch_reduce = value
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.batch_reduce = before[name]
