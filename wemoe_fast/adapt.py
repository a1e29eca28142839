"""Test-time adaptation: train the routers, and nothing else, on unlabelled samples.

As published: for each step, a batch from every task; the loss is the sum over tasks of the mean entropy of
softmax(logits); Adam. Entropy is no stopping rule, since it goes on falling while accuracy collapses. What
tells is the routing: `routing_drift` is, at each step, the largest over layers of

    mean |routing weight| / max(its value at step 1, 1/T)

(1/T is what choosing exactly one expert gives), and above DRIFT_LIMIT a warning is given, once. A `drift_penalty`
adds to each task's loss that many times the mean squared difference between the samples' routing weights and those
that the routers of step 0 give for the same hidden states (`DriftPenalty`): it holds the routers near their start.

With checkpoints a run that was stopped, by anything, goes on where it was: on the CPU, with the same number of
threads and processes, to the same bits. With several processes (`distributed.world`) each takes its share of every
task's batch, and the gradients are those of the whole batch, to rounding.
"""

from __future__ import annotations

import copy
import hashlib
import math
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .adapt_state import Checkpoints, Fingerprint, State, fingerprint, generators, set_generators, short
from .distributed import World
from .drift import DriftPenalty
from .errors import InputError, WEMoEError
from .evaluate import check_tasks, eval_mode
from .mlp import FastWEMoEMLP
from .routing import RoutingRecord, record_routing
from .tasks import Task
from .upscale import wemoe_layers

# measured on the demo's tuning texts: a run that gained 3 points ended at 2.6, one that ended below its start at 7.4
DRIFT_LIMIT = 4.0
ROUTINGS = ("per_sample", "batch_reduce")
SETTINGS = ("lr", "batch_size", "seed", "routing", "patience", "min_delta", "drift_penalty")
"""What, beside the model and the tasks, decides what a step does and when a run ends."""


@dataclass
class Adaptation:
    """What happened, step by step; `steps` is the number of steps done, by this call and before a checkpoint.

    `fingerprint` stands for the model, the data and the settings; None where nothing asked for it. `resumed` is the
    number of steps taken over from a checkpoint, `seconds` the time of this call: neither is part of the result.
    """

    steps: int
    lr: float
    batch_size: int
    seed: int
    routing: str
    patience: int | None = None
    min_delta: float = 0.0
    drift_penalty: float = 0.0
    stopped_early: bool = False
    entropy: dict[str, list[float]] = field(default_factory=dict)
    routing_drift: list[float] = field(default_factory=list)
    fingerprint: str | None = None
    resumed: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The result in plain types: the same for the same run, however often it was stopped."""
        content = asdict(self)
        del content["resumed"], content["seconds"]
        return content


def adapt(
    model: nn.Module,
    tasks: Sequence[Task],
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    batch_size: int = 16,
    seed: int = 0,
    routing: str = "per_sample",
    patience: int | None = None,
    min_delta: float = 0.0,
    drift_penalty: float = 0.0,
    checkpoints: Checkpoints | None = None,
    world: World | None = None,
    progress: bool = True,
) -> Adaptation:
    """Train the routers of `model` in place by entropy minimisation; labels are never read.

    Every step draws `batch_size` samples of each task's unlabelled data (its data, where there is none),
    without replacement until all were drawn. What is drawn depends on `seed`, the task's name and the step
    alone. With `routing="batch_reduce"` all samples of a batch share one routing while adapting. The model
    runs in eval mode; flags, requires_grad and gradients are afterwards as they were before.

    Args:
        model: with routers as they were before adaptation, also where a run goes on.
        steps: in all, those of earlier calls that checkpoints hold included.
        patience: stop where the entropy (mean over tasks and steps) of the last `patience` steps lies no more than
            `min_delta` nats below that of the `patience` steps before. Entropy is no accuracy: see above.
        drift_penalty: nats that a mean squared difference of 1 costs; about 1 to 100 where weights are near 1/T. The
            `entropy` of the result does not count it.
        checkpoints: where to keep the state of the run, and to go on from the newest; every sample is then read once
            at the start, to know the data again. Going on sets the global random number generators, too.
        world: the processes of this run. `routing="batch_reduce"` needs the mean over the whole batch at every
            layer and is refused where there are several.

    Raises InputError for arguments that do not fit, CheckpointError for checkpoints of another run, and WEMoEError
    when a loss or gradient is not finite; the routers then hold the last values that gave finite losses, and the
    newest checkpoint no later ones.
    """
    world = world or World()
    settings: dict[str, Any] = dict(
        zip(SETTINGS, (lr, batch_size, seed, routing, patience, min_delta, drift_penalty), strict=True)
    )
    layers = _checked(model, tasks, steps, settings, world)
    identity = None
    if checkpoints is not None or world.size > 1:
        identity = fingerprint(model, tasks, settings)
        _refuse_different_processes(world.gather(identity))
    result = Adaptation(steps, **settings)
    result.entropy = {task.name: [] for task in tasks}
    if checkpoints is not None and identity is not None:
        result.fingerprint = short(identity)
    if steps == 0:
        return result
    start = time.perf_counter()
    run = _Run(model, layers, tasks, result, world)
    with ExitStack() as stack:
        if checkpoints is not None:
            assert identity is not None
            run.resume(world.on_first(lambda: _newest(stack, checkpoints, identity, steps)))
        result.resumed = run.step
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(eval_mode(model))
        stack.enter_context(_only_trainable(model, run.routers))
        stack.enter_context(_batch_reduce(layers, routing == "batch_reduce"))
        record = stack.enter_context(record_routing(model))
        if run.penalty is not None:
            stack.enter_context(run.penalty.watch())
        hidden = not (progress and world.first)
        bar = tqdm(total=steps, initial=run.step, desc="adapt", unit=" steps", file=sys.stderr, disable=hidden)
        stack.enter_context(bar)
        while run.step < steps and not run.plateau():
            # A state is written when the next losses are known to be finite: the newest is one to go on from.
            due = checkpoints is not None and run.step % checkpoints.every == 0 and run.step > result.resumed
            state = run.state(identity) if due else None
            gradients, losses = run.gradients(record)
            if state is not None and checkpoints is not None:
                run.save(state, checkpoints)
            run.update(gradients, losses, record)
            bar.set_postfix({name: f"{values[-1]:.3f}" for name, values in result.entropy.items()})
            bar.update()
        result.stopped_early, result.steps = run.step < steps, run.step
        run.check_routers()
        if checkpoints is not None and run.step > result.resumed:
            run.save(run.state(identity), checkpoints)
        world.wait()
    result.seconds = time.perf_counter() - start
    return result


class _Run:
    """The state of a run: the routers, the optimiser, the samplers and what happened so far.

    `saved` is the number of steps of the newest checkpoint.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, FastWEMoEMLP],
        tasks: Sequence[Task],
        result: Adaptation,
        world: World,
    ) -> None:
        self.model, self.tasks, self.result, self.world = model, tasks, result, world
        self.step = 0
        self.saved: int | None = None
        self.routers = _router_parameters(layers)
        self.penalty = DriftPenalty(layers) if result.drift_penalty else None
        chosen = {id(router) for router in self.routers}
        self._names = {id(p): name for name, p in model.named_parameters() if id(p) in chosen}
        self._draws = {
            task.name: Draw(len(task.adaptation_data), result.batch_size, result.seed, task.name) for task in tasks
        }
        self._optimizer = torch.optim.Adam(self.routers, lr=result.lr)
        self._experts = {name: layer.num_experts for name, layer in layers.items()}
        self._first: dict[str, float] = {}  # each layer's mean |routing weight| at its first step
        self._kept: list[Tensor] | None = None  # the routers that gave the last finite losses

    def gradients(self, record: RoutingRecord) -> tuple[list[Tensor | None], list[float]]:
        """Of the next step, over all processes. Raises WEMoEError where a loss or gradient is not finite."""
        step = self.step + 1
        record.reset()
        gradients: list[Tensor | None] = [None] * len(self.routers)
        device = self.routers[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        losses = torch.zeros(len(self.tasks), dtype=wide, device=device)
        unsound = torch.zeros_like(losses)
        for number, task in enumerate(self.tasks):
            drawn = self._draws[task.name].indices(step)
            indices = self.world.share(drawn)
            if not indices:
                continue
            inputs, _ = task.adaptation_data.batch(indices)
            share = len(indices) / len(drawn)
            loss = entropy(task.logits(self.model, inputs)).mean() * share
            if not loss.requires_grad:
                raise InputError(f"task {task.name!r}: its logits do not depend on any router")
            losses[number] = loss.detach()
            if self.penalty is not None:
                loss = loss + self.result.drift_penalty * share * self.penalty.take()
            parts = torch.autograd.grad(loss, self.routers, allow_unused=True)
            unsound[number] = torch.stack([~p.isfinite().all() for p in parts if p is not None]).any()
            gradients = [_sum(total, part) for total, part in zip(gradients, parts, strict=True)]
        values, bad = self.world.add(torch.stack([losses, unsound])).tolist()
        finite = [math.isfinite(value) and not count for value, count in zip(values, bad, strict=True)]
        if not all(finite):
            if not all(map(math.isfinite, values)):
                self._restore()
            raise WEMoEError(_not_finite(step, self.tasks, values, finite) + self._advice())
        return _over_processes(self.world, self.routers, gradients), values

    def update(self, gradients: list[Tensor | None], losses: list[float], record: RoutingRecord) -> None:
        """Take the step whose gradients these are."""
        self._kept = [router.detach().clone() for router in self.routers]
        _step(self._optimizer, self.routers, gradients)
        self.step += 1
        for task, value in zip(self.tasks, losses, strict=True):
            self.result.entropy[task.name].append(value)
        magnitudes = self._magnitudes(record)
        self._first = magnitudes | self._first
        drift = {name: m / max(self._first[name], 1 / self._experts[name]) for name, m in magnitudes.items()}
        if self.world.first:
            _warn_of_drift(self.step, drift, magnitudes, self.result.routing_drift)
        self.result.routing_drift.append(max(drift.values(), default=0.0))

    def plateau(self) -> bool:
        """Whether to stop early."""
        if self.result.patience is None:
            return False
        means = [fmean(values) for values in zip(*self.result.entropy.values(), strict=True)]
        return on_plateau(means, self.result.patience, self.result.min_delta)

    def check_routers(self) -> None:
        """Raise WEMoEError, and put back the routers before, where the last step made them something not finite."""
        if not all(bool(router.isfinite().all()) for router in self.routers):
            self._restore()
            raise WEMoEError(
                f"adapt: step {self.step}: the routers are not finite after it; they hold the values before it"
                + self._advice()
            )

    def state(self, identity: Fingerprint | None) -> State:
        """All of it, on the CPU. Every process is to call this."""
        tensors = {f"router.{self._names[id(router)]}": router for router in self.routers}
        for router in self.routers:
            for key, value in self._optimizer.state[router].items():
                tensors[f"adam.{key}.{self._names[id(router)]}"] = value
        content = {
            "fingerprint": identity,
            "entropy": self.result.entropy,
            "routing_drift": self.result.routing_drift,
            "first_magnitudes": self._first,
            "samplers": self._samplers(),
            "generators": self.world.gather(generators()),
        }
        return State(self.step, {n: t.detach().cpu().clone() for n, t in tensors.items()}, copy.deepcopy(content))

    def save(self, state: State, checkpoints: Checkpoints) -> None:
        """Write a checkpoint, in the first process."""
        if self.world.first:
            checkpoints.write(state)
        self.saved = state.step

    def resume(self, state: State | None) -> None:
        """Go on from a state of the same run, where there is one."""
        if state is None:
            return
        self.step = self.saved = state.step
        if state.content["samplers"] != self._samplers():
            raise WEMoEError(
                f"adapt: the samples drawn after step {state.step} are not those that its checkpoint names: PyTorch is"
                " of another version; use that version, or begin anew with restart (--restart)"
            )
        moments: dict[int, dict[str, Tensor]] = {}
        with torch.no_grad():
            for number, router in enumerate(self.routers):
                name = self._names[id(router)]
                router.copy_(state.tensors[f"router.{name}"])
                found = {key: state.tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
                moments[number] = {key: value.clone() for key, value in found.items() if value is not None}
        settings = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": {n: m for n, m in moments.items() if m}, "param_groups": settings})
        self.result.entropy = state.content["entropy"]
        self.result.routing_drift = state.content["routing_drift"]
        self._first = state.content["first_magnitudes"]
        states = state.content["generators"]
        set_generators(states[self.world.rank % len(states)])

    def _samplers(self) -> dict[str, dict[str, Any]]:
        """By task, how many samples were drawn and which come next."""
        drawn = self.step * self.result.batch_size
        return {name: {"drawn": drawn, "next": draw.indices(self.step + 1)} for name, draw in self._draws.items()}

    def _magnitudes(self, record: RoutingRecord) -> dict[str, float]:
        """Mean |routing weight| by layer over the batches of all processes, for the layers that ran."""
        totals = record.totals()
        sums = self.world.add(
            torch.tensor(list(totals.values()), dtype=torch.float64).to(self.routers[0].device)
        ).tolist()
        return {name: total / rows for name, (total, rows) in zip(totals, sums, strict=True) if rows}

    def _advice(self) -> str:
        kept = "" if self.saved is None else f"; the checkpoint after {self.saved} steps is kept"
        return f"{kept}; try a smaller lr or another dtype"

    @torch.no_grad()
    def _restore(self) -> None:
        for router, value in zip(self.routers, self._kept or (), strict=self._kept is not None):
            router.copy_(value)


def on_plateau(values: Sequence[float], patience: int, min_delta: float) -> bool:
    """Whether the mean of the last `patience` values lies no more than `min_delta` below that of as many before."""
    if len(values) < 2 * patience:
        return False
    return fmean(values[-2 * patience : -patience]) - fmean(values[-patience:]) <= min_delta


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


def _newest(stack: ExitStack, checkpoints: Checkpoints, identity: Fingerprint, steps: int) -> State | None:
    return stack.enter_context(checkpoints).read(identity, steps)


def _refuse_different_processes(identities: list[Fingerprint]) -> None:
    different = [str(rank) for rank, identity in enumerate(identities) if identity != identities[0]]
    if different:
        raise InputError(
            f"adapt: process {', '.join(different)}: expected the model, tasks and settings of process 0, found others"
        )


def _over_processes(world: World, routers: list[nn.Parameter], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The sums of the processes' gradients, in one message; None stays where no process has one."""
    if world.size == 1:
        return gradients
    device = routers[0].device
    used = world.add(torch.tensor([gradient is not None for gradient in gradients], device=device).int()).tolist()
    wide = torch.float64 if any(router.dtype == torch.float64 for router in routers) else torch.float32
    parts = [torch.zeros_like(r) if g is None else g for r, g in zip(routers, gradients, strict=True)]
    total = world.add(torch.cat([part.reshape(-1).to(wide) for part in parts]))
    split = total.split([router.numel() for router in routers])
    return [p.view_as(r).to(r.dtype) if u else None for p, r, u in zip(split, routers, used, strict=True)]


def _checked(
    model: nn.Module, tasks: Sequence[Task], steps: int, settings: dict[str, Any], world: World
) -> dict[str, FastWEMoEMLP]:
    problems = []
    lr, routing, patience, min_delta = (settings[name] for name in ("lr", "routing", "patience", "min_delta"))
    counts = [("steps", steps, 0), ("batch_size", settings["batch_size"], 1), ("seed", settings["seed"], 0)]
    if patience is not None:
        counts.append(("patience", patience, 1))
    for name, value, low in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            problems.append(f"{name}: expected an integer of at least {low}, found {value!r}")
    if isinstance(min_delta, bool) or not isinstance(min_delta, (int, float)) or not math.isfinite(min_delta):
        problems.append(f"min_delta: expected a finite number of nats, found {min_delta!r}")
    elif min_delta and patience is None:
        problems.append(f"min_delta: expected a patience with it, found {min_delta!r} alone")
    penalty = settings["drift_penalty"]
    if isinstance(penalty, bool) or not isinstance(penalty, (int, float)) or not (0 <= penalty < math.inf):
        problems.append(f"drift_penalty: expected a finite number of at least 0, found {penalty!r}")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not (0 < lr < math.inf):
        problems.append(f"lr: expected a finite number above 0, found {lr!r}")
    if routing not in ROUTINGS:
        problems.append(f"routing: expected one of {', '.join(ROUTINGS)}, found {routing!r}")
    layers = wemoe_layers(model)
    if not layers:
        problems.append(f"model: expected WEMoE layers, found none in {type(model).__name__}; upscale it first")
    if routing == "batch_reduce" and world.size > 1:
        problems.append(
            f"routing: batch_reduce needs the mean over the whole batch, of which each of {world.size} processes sees a"
            " share; use per_sample, or one process"
        )
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


def _not_finite(step: int, tasks: Sequence[Task], values: list[float], finite: list[bool]) -> str:
    found = []
    for task, value, good in zip(tasks, values, finite, strict=True):
        if not good:
            what = "a gradient that is not finite" if math.isfinite(value) else f"loss {value}"
            found.append(f"task {task.name!r} has {what}")
    return f"adapt: step {step}: {', '.join(found)}; the routers hold the last values that gave finite losses"


def _warn_of_drift(step: int, drift: dict[str, float], magnitudes: dict[str, float], before: list[float]) -> None:
    if not drift or any(value > DRIFT_LIMIT for value in before):
        return
    layer = max(drift, key=drift.__getitem__)
    if drift[layer] > DRIFT_LIMIT:
        warnings.warn(
            f"adapt: step {step}: mean |routing weight| of layer {layer!r} has grown to {magnitudes[layer]:.2f},"
            f" {drift[layer]:.1f} times its reference; accuracy may fall from here on while entropy goes on"
            " falling: use fewer steps or a smaller lr, and check with labelled samples",
            stacklevel=4,
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
