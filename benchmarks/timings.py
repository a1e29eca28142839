"""What is timed: groups of one shape and dtype, every contender in it in turn, only what agrees with the oracle.

A group is measured by one call of ``measure`` in a process of its own. Times are medians in milliseconds: on a GPU of
device events with the L2 cache cleared before each call (``triton.testing.do_bench``), elsewhere of wall-clock time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_fast import cost, ops, plan
from wemoe_fast.kernels.tuning import Problem
from wemoe_fast.task_vectors import MergedLinear
from wemoe_fast.throughput import synchronize, wall_seconds

from . import checks, peers
from .checks import NEEDS, NEEDS_BACKWARD, STRATEGIES, Case
from .judging import DTYPES, float32_products, judge_all, wrong_outputs
from .memory import free_bytes, peak_extra_bytes

SLOW = (peers.LOOP, peers.FUSION_BENCH)


@dataclass(frozen=True)
class Group:
    """``kind``: forward, backward (forward and backward), memory, linears (one by one) or host (overhead)."""

    kind: str
    B: int
    N: int
    d: int
    h: int
    T: int
    dtype: str
    gated: bool = False

    @property
    def name(self) -> str:
        gated = " gated" if self.gated else ""
        return f"{self.kind} B{self.B} N{self.N} d{self.d} h{self.h} T{self.T} {self.dtype}{gated}"


@dataclass(frozen=True)
class Settings:
    """How long to measure; ``rounds`` times A B C, each for ``milliseconds`` after ``warmup``."""

    device: str
    rounds: int = 2
    warmup: float = 25.0
    milliseconds: float = 100.0


def groups(suite: str) -> list[Group]:
    """In order of importance."""
    if suite == "dry":
        found = [
            Group(kind, 3, 7, 40, 56, 3, "bfloat16") for kind in ("forward", "backward", "memory", "linears", "host")
        ]
        return [*found, Group("forward", 2, 5, 40, 56, 2, "float32", gated=True)]
    vision, decoding = ((197, 768, 3072), (50, 768, 3072), (257, 1024, 4096), (577, 1024, 4096)), ((1, 1024, 4096),)
    return [
        *_groups("forward", (64,), vision),
        *_groups("backward", (64,), vision[:3]),
        *_groups("forward", (256,), vision[:2]),
        *_groups("linears", (64,), vision),
        *_groups("memory", (64, 256), vision[:1]),
        *_groups("host", (1,), vision[1:2]),
        Group("forward", 64, 128, 1024, 2816, 8, "bfloat16", gated=True),
        *_groups("forward", (1,), (*decoding, *vision[:3])),
        *_groups("forward", (8,), vision[:3]),
        *_groups("forward", (64,), vision[:2], (2, 20)),
        *_groups("forward", (64,), vision[:2], dtypes=("float16", "float32")),
        *_groups("forward", (64, 8), decoding),
        *_groups("linears", (1, 8), vision[:2]),
        *_groups("forward", (256,), vision[2:]),
        *_groups("forward", (1, 8), vision[3:]),
        *_groups("backward", (256, 8), vision[:1]),
        *_groups("forward", (64,), vision[:2], dtypes=("tf32",)),
        *_groups("forward", (64,), vision[2:3], (2, 20), ("bfloat16", "float16")),
    ]


def _groups(
    kind: str,
    samples: Collection[int],
    shapes: Collection[tuple[int, int, int]],
    experts: Collection[int] = (8,),
    dtypes: Collection[str] = ("bfloat16",),
) -> list[Group]:
    """All combinations; shapes are (N, d, h)."""
    return [
        Group(kind, B, N, d, h, T, dtype)
        for B, T, dtype, (N, d, h) in itertools.product(samples, experts, dtypes, shapes)
    ]


def cases_of(found: Collection[Group]) -> list[Case]:
    """The modules that will be timed as cases to check, which also compiles their kernels."""
    cases: dict[Case, None] = {}
    for group in found:
        backward = "/gradients" if group.kind in ("backward", "memory") else ""
        sizes: dict[str, Any] = {name: getattr(group, name) for name in ("dtype", "N", "T", "d", "h", "gated")}
        for strategy in STRATEGIES:
            few = {**sizes, "B": min(group.B, 64), "strategy": strategy}
            cases.setdefault(Case(f"mlp/{strategy}", **few))
            if backward:
                cases.setdefault(Case(f"mlp/{strategy}/gradients", **few))
        if group.kind == "forward":
            cases.setdefault(Case("peer/compiled", **sizes, B=group.B))
    return list(cases)


def measure(group: Group, settings: Settings, failed: Collection[tuple[str, str]]) -> dict[str, Any]:
    """Figures of a group, and what was left out and why. ``failed``: (subject, dtype) of failed checks."""
    device = torch.device(settings.device)
    with float32_products("high" if group.dtype == "tf32" else "highest"):
        torch.manual_seed(0)
        result = KINDS[group.kind](group, settings, device, failed)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {"name": group.name, **asdict(group), **result}


def excluded(group: Group, failed: Collection[tuple[str, str]]) -> dict[str, str]:
    """Strategies that a failed check keeps from being timed."""
    needs = NEEDS_BACKWARD if group.kind in ("backward", "memory") else NEEDS
    dtypes = {group.dtype, "float32"} if group.dtype == "tf32" else {group.dtype}
    reasons = {}
    for strategy in STRATEGIES:
        broken = [
            f"{subject} {dtype}" for subject, dtype in sorted(failed) if subject in needs[strategy] and dtype in dtypes
        ]
        if broken:
            reasons[strategy] = f"failed its check: {', '.join(broken)}"
    return reasons


class Contenders:
    """Everything to be timed on one input, and what is left out."""

    def __init__(self, group: Group, device: torch.device, failed: Collection[tuple[str, str]]) -> None:
        self.group, self.device = group, device
        self.left_out = excluded(group, failed)
        base, experts, self.fast = peers.modules(group, device)
        self.backward = group.kind == "backward"
        self.x = torch.randn(group.B, group.N, group.d, device=device, dtype=DTYPES[group.dtype])
        modules: dict[str, Callable[[Tensor], Tensor]] = {
            strategy: peers.with_strategy(self.fast, strategy)
            for strategy in STRATEGIES
            if strategy not in self.left_out
        }
        plain = peers.Materialised(self.fast)
        needed = plain.merged_bytes(group.B) * (4 if group.kind in ("backward", "memory") else 2)
        if needed < free_bytes(device):
            modules[peers.MATERIALISED] = plain
            modules[peers.COMPILED] = peers.compiled(plain, peers.dry_backend(device))
        else:
            for name in (peers.MATERIALISED, peers.COMPILED):
                self.left_out[name] = f"does not fit: needs about {needed >> 20} MiB"
        modules[peers.LOOP] = peers.LoopOverSamples(self.fast, base, experts)
        if group.kind in ("forward", "backward"):
            theirs = peers.fusion_bench(self.fast, base, experts)
            if theirs is None:
                self.left_out[peers.FUSION_BENCH] = "the package fusion-bench is not installed"
            else:
                modules[peers.FUSION_BENCH] = theirs
        static: nn.Module = base.requires_grad_(False)
        self.modules: dict[str, Callable[[Tensor], Tensor]] = {peers.STATIC: static, **modules}

    def verify(self) -> dict[str, Any]:
        """Errors of everyone at this very shape; who is wrong is taken out."""
        verified: dict[str, Any] = {}
        for name, module in list(self.modules.items()):
            if name == peers.STATIC:
                continue
            torch.manual_seed(1)
            trial = checks.mlp_trial(module, self.fast, self.x, self.backward and name not in SLOW)
            try:
                actual, plain, expected = trial.actual(), trial.plain(), trial.expected()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if "CUDA error" in str(error):
                    raise
                self._remove(name, f"{type(error).__name__}: {str(error)[:300]}")
                continue
            dtype = self.group.dtype
            verified[name] = judge_all(actual, plain, expected, dtype, trial.chain, trial.independent)
            wrong = wrong_outputs(verified[name], dtype, ours=name in STRATEGIES)
            if wrong:
                self._remove(name, f"wrong at this shape: {', '.join(wrong)}")
        return verified

    def _remove(self, name: str, reason: str) -> None:
        del self.modules[name]
        self.left_out[name] = reason

    def runs(self, backward: bool) -> dict[str, Callable[[], object]]:
        """One call of each: a forward, or a forward and the gradients of the input and of the router."""
        if not backward:
            return {name: partial(_forward, module, self.x) for name, module in self.modules.items()}
        dy = torch.randn_like(self.x)
        router = list(self.fast.router.parameters())
        return {
            name: partial(
                _backward, module, self.x, dy, [] if name == peers.STATIC else peers.router_parameters(module, router)
            )
            for name, module in self.modules.items()
        }


def _forward(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return module(x)


def _backward(module: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: list[nn.Parameter]) -> object:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(module(x), [x, *parameters], dy)


def time_in_turn(runs: Mapping[str, Callable[[], object]], settings: Settings) -> dict[str, Any]:
    """Medians of every round A B C A B C; the figure is the least of a contender's medians.

    ``spread`` is the 20 % and 80 % quantile over all rounds. Slow contenders get two calls in all.
    """
    rounds: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    for number in range(settings.rounds):
        for name, run in runs.items():
            if name not in SLOW:
                rounds[name].append(_quantiles(run, settings))
            elif number == 0:
                values = sorted(1e3 * wall_seconds(run) for _ in range(2))
                rounds[name].append((statistics.median(values), values[0], values[-1]))
    return {
        "milliseconds": {name: min(median for median, _, _ in values) for name, values in rounds.items()},
        "rounds": {name: [median for median, _, _ in values] for name, values in rounds.items()},
        "spread": {name: [min(v[1] for v in values), max(v[2] for v in values)] for name, values in rounds.items()},
    }


def _quantiles(run: Callable[[], object], settings: Settings) -> tuple[float, float, float]:
    """(median, 20 %, 80 %)"""
    if settings.device == "cuda":
        from triton.testing import do_bench

        median, low, high = do_bench(
            run, warmup=settings.warmup, rep=settings.milliseconds, quantiles=[0.5, 0.2, 0.8]
        )  # fmt: skip
        return float(median), float(low), float(high)
    values = sorted(1e3 * wall_seconds(run) for _ in range(2))
    return statistics.median(values), values[0], values[-1]


def static_flops(group: Group) -> int:
    """Of the static MLP's products."""
    return (6 if group.gated else 4) * group.B * group.N * group.d * group.h


def counted_bytes(group: Group) -> int:
    """Device memory as ``wemoe_fast.cost`` counts it: per linear the stack once, its input and its result."""
    size = DTYPES[group.dtype].itemsize
    linears = 3 if group.gated else 2
    return linears * size * ((1 + group.T) * group.d * group.h + group.B * group.N * (group.d + group.h))


def _timed(
    group: Group, settings: Settings, device: torch.device, failed: Collection[tuple[str, str]]
) -> dict[str, Any]:
    contenders = Contenders(group, device, failed)
    verified = contenders.verify()
    times = time_in_turn(contenders.runs(contenders.backward), settings)
    middle = times["milliseconds"]
    result = {**times, "left_out": contenders.left_out, "errors": verified}
    result["ratio_to_static"] = {name: value / middle[peers.STATIC] for name, value in middle.items()}
    if not contenders.backward:
        result["teraflops"] = {name: static_flops(group) / value / 1e9 for name, value in middle.items()}
        result["gigabytes_per_second"] = {
            name: counted_bytes(group) / middle[name] / 1e6 for name in STRATEGIES if name in middle
        }
    return result


def _memory(
    group: Group, settings: Settings, device: torch.device, failed: Collection[tuple[str, str]]
) -> dict[str, Any]:
    """Peak bytes beyond what was there."""
    contenders = Contenders(group, device, failed)
    contenders.modules.pop(peers.COMPILED, None)
    found: dict[str, dict[str, int | None]] = {}
    for kind in ("forward", "backward"):
        found[kind] = {}
        for name, run in contenders.runs(kind == "backward").items():
            try:
                run()
                found[kind][name] = peak_extra_bytes(run, device)
            except torch.OutOfMemoryError:
                contenders.left_out[f"{name}, {kind}"] = "out of memory"
    return {"peak_extra_bytes": found, "left_out": contenders.left_out}


def _linears(
    group: Group, settings: Settings, device: torch.device, failed: Collection[tuple[str, str]]
) -> dict[str, Any]:
    """Each linear by itself, forward: what ``auto`` chose and why, predicted and measured microseconds."""
    left_out = excluded(group, failed)
    _, _, fast = peers.modules(group, device)
    x = torch.randn(group.B, group.N, group.d, device=device, dtype=DTYPES[group.dtype])
    found = {}
    with torch.inference_mode():
        weights = fast.router(x)
        hidden = fast.up(x, weights, fast.activation)
        for role, linear, given, activation in (
            ("up", fast.up, x, fast.activation),
            ("down", fast.down, hidden, None),
        ):
            runs = {
                strategy: partial(_linear, linear, given, weights, activation, strategy)
                for strategy in STRATEGIES
                if strategy not in left_out
            }
            times = time_in_turn(runs, settings)["milliseconds"]
            chosen = plan.choose(given, linear.stack, weights)
            found[role] = {
                "chosen": chosen.strategy,
                "reason": chosen.reason,
                "predicted_microseconds": _predicted(given, linear, weights),
                "measured_microseconds": {name: 1e3 * value for name, value in times.items()},
            }
    return {"linears": found, "left_out": left_out}


def _linear(linear: MergedLinear, x: Tensor, weights: Tensor, activation: str | None, strategy: str) -> Tensor:
    with torch.inference_mode():
        return ops.merged_linear(x, linear.stack, weights, linear.bias, activation, strategy)


def _predicted(x: Tensor, linear: MergedLinear, weights: Tensor) -> dict[str, float]:
    problem = Problem.of("merged_linear", x, linear.stack, x.shape[0], x.shape[1], weights.shape[1])
    plans = {name: plan.choose(x, linear.stack, weights, name) for name in ("chunked", "fused", "factored")}
    limits = cost.ceilings(x.device)
    return {name: 1e6 * cost.seconds(name, problem, limits, p.group, p.rows) for name, p in plans.items()}


def _host(
    group: Group, settings: Settings, device: torch.device, failed: Collection[tuple[str, str]]
) -> dict[str, Any]:
    """Milliseconds of a whole call: until it returns, until it is done, and replayed from a CUDA graph (GPU only)."""
    contenders = Contenders(group, device, failed)
    for name in (peers.COMPILED, *SLOW):
        contenders.modules.pop(name, None)
    repeats = 50 if device.type == "cuda" else 2
    found: dict[str, dict[str, float | None]] = {}
    for name, run in contenders.runs(False).items():
        run()
        returned, done = [], []
        for _ in range(repeats):
            synchronize()
            start = time.perf_counter()
            run()
            returned.append(time.perf_counter() - start)
            synchronize()
            done.append(time.perf_counter() - start)
        found[name] = {
            "returned": 1e3 * statistics.median(returned),
            "done": 1e3 * statistics.median(done),
            "graph": _graph_milliseconds(run, settings) if device.type == "cuda" else None,
        }
    return {"host": found, "left_out": contenders.left_out}


def _graph_milliseconds(run: Callable[[], object], settings: Settings) -> float:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return _quantiles(graph.replay, settings)[0]


KINDS: dict[str, Callable[[Group, Settings, torch.device, Collection[tuple[str, str]]], dict[str, Any]]] = {
    "forward": _timed,
    "backward": _timed,
    "memory": _memory,
    "linears": _linears,
    "host": _host,
}


@dataclass(frozen=True)
class Target:
    """A promise about one figure of a group."""

    what: str
    group: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def targets(results: Collection[Mapping[str, Any]], least_samples: int = 64, experts: int = 8) -> Iterator[Target]:
    """The promises that these results can be held against: bfloat16, 8 experts, large batches, plain MLPs."""
    for result in results:
        times = result.get("milliseconds", {})
        usual = result["dtype"] == "bfloat16" and result["T"] == experts and not result["gated"]
        if not usual or result["B"] < least_samples or "auto" not in times:
            continue
        name, auto, N = result["name"], times["auto"], result["N"]
        if result["kind"] == "forward":
            yield Target("times the static MLP", name, auto / times[peers.STATIC], 1.75 if N >= 197 else 2.5)
            for peer, limit in ((peers.COMPILED, 2.0), (peers.LOOP, 50.0)):
                if peer in times:
                    yield Target(f"faster than {peer}", name, times[peer] / auto, limit, at_most=False)
        elif N >= 197 or least_samples == 1:
            yield Target("forward and backward, times the static MLP", name, auto / times[peers.STATIC], 2.0)
