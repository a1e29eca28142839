"""Everyone who is timed on one input, and what they are held against before that."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from wemoe_fast.errors import InputError
from wemoe_fast.mlp import FastWEMoEMLP
from wemoe_fast.upscale import wemoe_layers

from . import peers
from .judging import DTYPES, Tensors, judge_all, outer_rows, results, wrong_outputs
from .memory import free_bytes
from .workloads import Workload

STRATEGIES = ("auto", "shared", "chunked", "native", "fused", "factored", "reference")
OWN_LOOPS = ("reference", peers.LOOP, peers.FUSION_BENCH)
"""One sample after the other: checked on two samples, and slow on many."""
REFERENCES = (peers.STATIC, peers.PREALLOCATED)
"""One merged model: they compute something else and are not checked."""
NOT_SHARED = "for one sample, or one routing weight for the whole batch"
NO_FUSION_BENCH = "the package fusion-bench is not installed"


@dataclass
class Contender:
    """A way to compute the workload; ``parameters`` are those of its routers."""

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter] = field(default_factory=list)


@dataclass
class Contest:
    """The input, who competes on it, and who was left out and why.

    ``model``: ours, the oracle once it runs in float64 by the strategy ``reference``; ``plain`` gives the bar.
    ``compiler`` makes the contender whose making takes long, where that is possible. ``errors``: the largest relative
    RMS error of a result; ``seconds``: of the first call, on the outer samples alone for ``OWN_LOOPS``.
    """

    workload: Workload
    x: Tensor
    dy: Tensor
    model: nn.Module
    ours: Contender
    plain: Contender
    contenders: dict[str, Contender]
    left_out: dict[str, str]
    compiler: Callable[[], Contender] | None = None
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    expected: Tensors = field(default_factory=dict)
    bar: Tensors = field(default_factory=dict)
    static: Tensors = field(default_factory=dict)

    @property
    def backward(self) -> bool:
        return self.workload.step == "adapt"

    def verify(self) -> None:
        """Hold everyone against the float64 oracle; who is wrong, or cannot run, is taken out."""
        few, given = self.x[self.rows], self.dy[self.rows] if self.backward else None
        with in_float64(self.model):
            self.expected = results(self.ours.run, few.double(), given, self.ours.parameters)
        with by_strategy(self.model, "reference"):
            self.bar = results(self.plain.run, few, given, self.plain.parameters)
        for name in list(self.contenders):
            self.check(name)

    def check(self, name: str) -> None:
        """One contender; its first call. A static model is held against the static MLP."""
        try:
            start = time.perf_counter()
            actual = self._results(name)
            self.seconds[name] = time.perf_counter() - start
            if name == peers.STATIC:
                self.static = actual
                return
            bar, expected = (self.static, self.static) if name in REFERENCES else (self.bar, self.expected)
            found = judge_all(actual, bar, expected, self.workload.dtype, self._chain, self._independent)
        except (InputError, torch.OutOfMemoryError) as reason:
            self.leave_out(name, str(reason).splitlines()[0])
        except Exception as error:
            if "CUDA error" in str(error) or "device-side assert" in str(error):
                raise
            self._fail(name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
        else:
            self.errors[name] = max(
                float("inf") if figures["rms"] is None else figures["rms"] for figures in found.values()
            )
            wrong = wrong_outputs(found, self.workload.dtype, ours=name in STRATEGIES)
            if wrong:
                self._fail(name, f"wrong, so not timed: {', '.join(wrong)}")

    def _results(self, name: str) -> Tensors:
        """Of the outer samples: own loops are given those alone, everyone else the whole batch."""
        contender, rows = self.contenders[name], self.rows
        if name in OWN_LOOPS:
            return results(contender.run, self.x[rows], self.dy[rows] if self.backward else None, contender.parameters)
        dy = torch.zeros_like(self.dy) if self.backward else None
        if dy is not None:
            dy[rows] = self.dy[rows]
        return results(contender.run, self.x, dy, contender.parameters, rows)

    @property
    def rows(self) -> list[int]:
        return outer_rows(self.x)

    @property
    def _chain(self) -> int:
        return (self.workload.d + self.workload.h + self.workload.N) * len(wemoe_layers(self.model))

    @property
    def _independent(self) -> int:
        return len(self.rows) * self.workload.T

    def leave_out(self, name: str, reason: str) -> None:
        self.contenders.pop(name, None)
        self.left_out[name] = reason

    def _fail(self, name: str, reason: str) -> None:
        self.leave_out(name, reason)
        self.failed[name] = reason

    def call(self, name: str) -> Callable[[], object]:
        """What is timed: a forward; or forward, backward and Adam's step on the parameters of the routers."""
        contender = self.contenders[name]
        if not self.backward:
            return partial(_forward, contender.run, self.x)
        optimizer = torch.optim.Adam(contender.parameters, lr=1e-6) if contender.parameters else None
        return partial(_adapt, contender.run, self.x, self.dy, optimizer)


def _forward(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.inference_mode():
        return run(x)


def _adapt(run: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, optimizer: torch.optim.Optimizer | None) -> None:
    """The gradient of the input is computed as well, as in a layer that has others before it."""
    y = run(x.detach().requires_grad_())
    y.backward(dy.to(y.dtype))
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextmanager
def by_strategy(model: nn.Module, strategy: str) -> Iterator[None]:
    """All WEMoE layers of the model by this strategy."""
    layers = list(wemoe_layers(model).values())
    before = [layer.strategy for layer in layers]
    for layer in layers:
        layer.strategy = strategy
    try:
        yield
    finally:
        for layer, strategy in zip(layers, before, strict=True):
            layer.strategy = strategy


@contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """The oracle: the paper's loop in float64 over the same numbers, converted in place and back without loss."""
    dtype = next(model.parameters()).dtype
    with by_strategy(model, "reference"):
        model.double()
        try:
            yield
        finally:
            model.to(dtype)


@dataclass(frozen=True)
class _Sizes:
    T: int
    d: int
    h: int
    dtype: str
    gated: bool


@lru_cache(maxsize=1)
def _modules(sizes: _Sizes, device: torch.device) -> tuple[nn.Module, list[nn.Module], FastWEMoEMLP]:
    """Kept for the next workload, which often differs in the batch alone."""
    return peers.modules(sizes, device)


def mlp_contest(workload: Workload, device: torch.device) -> Contest:
    """One MLP and everything a user could run in its place."""
    base, experts, fast = _modules(_Sizes(workload.T, workload.d, workload.h, workload.dtype, workload.gated), device)
    router = list(fast.router.parameters())
    plain = peers.Materialised(fast)
    static = base.requires_grad_(False)
    contenders = {peers.STATIC: Contender(static)}
    left_out = {}
    if workload.step == "forward":
        contenders[peers.PREALLOCATED] = Contender(peers.Preallocated(base))
    else:
        left_out[peers.PREALLOCATED] = "results in preallocated memory have no gradient"
    contenders |= {name: Contender(peers.with_strategy(fast, name), router) for name in STRATEGIES}
    if workload.B > 1:
        del contenders["shared"]
        left_out["shared"] = NOT_SHARED
    theirs = peers.fusion_bench(fast, base, experts)
    if theirs is None:
        left_out[peers.FUSION_BENCH] = NO_FUSION_BENCH
    else:
        contenders[peers.FUSION_BENCH] = Contender(theirs, peers.router_parameters(theirs, router))
    contenders[peers.LOOP] = Contender(peers.LoopOverSamples(fast, base, experts), router)
    compiler = None
    needed = plain.merged_bytes(workload.B) * (4 if workload.step == "adapt" else 2)
    if needed < free_bytes(device):
        contenders[peers.VMAP] = Contender(peers.VmapOverSamples(fast, base, experts), router)
        contenders[peers.MATERIALISED] = Contender(plain, router)
        obstacle = peers.why_not_compiled(device)
        if obstacle is not None:
            left_out[peers.COMPILED] = obstacle
        else:
            compiler = lambda: Contender(peers.compiled(plain), router)  # noqa: E731
    else:
        for name in (peers.VMAP, peers.MATERIALISED, peers.COMPILED):
            left_out[name] = f"does not fit: needs about {needed >> 20} MiB"
    x = torch.randn(workload.B, workload.N, workload.d, device=device, dtype=DTYPES[workload.dtype])
    ours = Contender(fast, router)
    return Contest(
        workload, x, torch.randn_like(x), fast, ours, Contender(plain, router), contenders, left_out, compiler
    )
