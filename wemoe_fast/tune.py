"""Measures tiles and strategies on one GPU and writes the table that ``auto`` and the kernels read.

For every shape: the candidates that fit the device (``kernels.tuning.fits``), the most promising first by the cost
model; each is checked against the float64 oracle before it is timed. Then the strategies, forward and backward. Nothing
calls this but ``wemoe-fast tune``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import cost, kernels, reference
from .errors import InputError
from .kernels import tuning
from .kernels.tuning import Problem, Tile
from .ops import merged_linear
from .report import write_json
from .throughput import relative_rms, wall_seconds

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STRATEGIES = ("chunked", "fused", "factored")


@dataclass(frozen=True)
class Shape:
    """A merged linear to tune for: B samples of N tokens, d features in, h out, T experts."""

    B: int
    N: int
    d: int
    h: int
    T: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """ "64,50,768,3072,8": B, N, d, h, T."""
        try:
            numbers = [int(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if len(numbers) != 5 or min(numbers) < 1:
            raise InputError(f"shape: expected five numbers B,N,d,h,T such as 64,50,768,3072,8, found {text!r}")
        return cls(*numbers)


SHAPES = tuple(
    Shape(B, N, *size, T)
    for T in (8, 2, 20)
    for B, N, (d, h) in (
        (64, 50, (768, 3072)),
        (64, 197, (768, 3072)),
        (64, 257, (1024, 4096)),
        (8, 50, (768, 3072)),
        (64, 1, (768, 3072)),
    )
    for size in ((d, h), (h, d))
)
"""CLIP ViT-B/32, B/16 and L/14, a small batch and single tokens; both linears."""


@dataclass(frozen=True)
class Trial:
    """One measured candidate; ``seconds`` is None where it did not compile or was not right."""

    tile: Tile
    seconds: float | None
    error: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Goal:
    """What a kernel should give, and the relative RMS error it may have."""

    expected: Tensor
    bar: float


def tune(
    shapes: Sequence[Shape] = SHAPES,
    dtypes: Sequence[str] = ("bfloat16",),
    *,
    device: str = "cuda",
    out: Path | None = None,
    tries: int = 12,
    budget: float = 1800.0,
    progress: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Tune for these shapes and dtypes; returns the file written (``out``, or the device's user table) and the table.

    Args:
        shapes, dtypes: what to tune for, the most important first.
        tries: candidates measured for a kernel and shape.
        budget: seconds; what does not fit any more is left to the defaults, and listed as ``not_measured``.

    Raises:
        InputError: the kernels cannot run there, or an unknown dtype.
    """
    place = torch.device(device)
    if place.type == "cuda" and torch.cuda.is_available() and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    unknown = [name for name in dtypes if name not in DTYPES]
    if unknown:
        raise InputError(f"dtype: expected of {', '.join(DTYPES)}, found {', '.join(unknown)}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError("tune: a GPU is needed, found none")
    obstacle = kernels.why_not(place, DTYPES[dtypes[0]])
    if obstacle:
        raise InputError(f"tune: {obstacle}")
    limits = tuning.device_of(place)
    table: dict[str, Any] = {
        "device": limits.name,
        "torch": torch.__version__,
        "triton": version("triton"),
        "tiles": [],
        "strategies": [],
        "not_measured": [],
    }
    end = time.perf_counter() + budget
    work = [(shape, dtype) for dtype in dtypes for shape in shapes]
    for shape, dtype in tqdm(work, desc="tune", disable=not progress):
        if time.perf_counter() > end:
            table["not_measured"].append({**asdict(shape), "dtype": dtype})
            continue
        inputs = _inputs(shape, DTYPES[dtype], place)
        goals = _goals(inputs)
        _tune_tiles(shape, inputs, goals, tries, table)
        _tune_strategies(shape, inputs, goals["merged_linear"], table)
    path = out or tuning.user_table(limits.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, table)
    tuning.forget_tables()
    return path, table


def summary(table: dict[str, Any]) -> str:
    """What was chosen and why, as text for a terminal."""
    lines = [f"{table['device']}, torch {table['torch']}, triton {table['triton']}", ""]
    header = f"{'kernel':<17}{'B x N x d x h x T':<26}{'dtype':<10}{'tile':<38}{'us':>9}{'default':>9}{'tried':>7}"
    lines.append(header)
    for entry in table["tiles"]:
        tile = entry["tile"]
        chosen = f"{tile['rows']}x{tile['tokens']}x{tile['depth']} g{tile['group']} s{tile['stages']} w{tile['warps']}"
        lines.append(
            f"{entry['kernel']:<17}{entry['shape']:<26}{entry['dtype']:<10}{chosen:<38}{entry['microseconds']:>9.1f}"
            f"{entry['default_microseconds'] or float('nan'):>9.1f}{entry['tried']:>7}"
        )
    lines += ["", f"{'strategy':<17}{'B x N x d x h x T':<26}{'dtype':<10}{'direction':<12}microseconds"]
    for entry in table["strategies"]:
        times = ", ".join(f"{name} {value:.1f}" for name, value in sorted(entry["microseconds"].items(), key=_second))
        direction = "backward" if entry["backward"] else "forward"
        lines.append(f"{entry['strategy']:<17}{entry['shape']:<26}{entry['dtype']:<10}{direction:<12}{times}")
    if table["not_measured"]:
        lines += ["", f"not measured for want of time: {len(table['not_measured'])} shapes keep their defaults"]
    return "\n".join(lines)


def _tune_tiles(
    shape: Shape, inputs: dict[str, Tensor], goals: dict[str, Goal], tries: int, table: dict[str, Any]
) -> None:
    from .kernels.launch import Batch, Routing, problem
    from .kernels.merged_linear import merged_linear as forward
    from .kernels.merged_linear_dw import merged_linear_dw

    x, stack, weights, bias, dy = inputs.values()
    routing, batch = Routing(weights), Batch.of(x)
    runs: dict[str, Callable[[Tile], Tensor]] = {
        "merged_linear": lambda tile: forward(x, stack, routing, bias, tile=tile),
        "merged_linear_dw": lambda tile: merged_linear_dw(dy, x, stack, routing, bias, tile=tile),
    }
    for kernel, run in runs.items():
        asked = problem(kernel, x, stack, batch, routing)
        trials = [
            _try(tile, run, goals[kernel].expected, goals[kernel].bar)
            for tile in _promising(asked, tries, cost.ceilings(x.device))
        ]
        fine = [trial for trial in trials if trial.seconds is not None]
        if not fine:
            continue
        best = min(fine, key=lambda trial: trial.seconds or 0.0)
        default = trials[0].seconds
        table["tiles"].append(
            {
                **tuning.entry(asked, best.tile),
                "shape": _name(shape),
                "microseconds": 1e6 * (best.seconds or 0.0),
                "default_microseconds": None if default is None else 1e6 * default,
                "relative_rms_error": best.error,
                "tried": len(trials),
                "refused": [{"tile": asdict(t.tile), "problem": t.problem} for t in trials if t.seconds is None],
            }
        )


def _promising(asked: Problem, tries: int, limits: cost.Ceilings) -> Iterable[Tile]:
    """The default, then the candidates the cost model likes best."""
    first, *others = tuning.candidates(asked)
    if asked.kernel == "merged_linear":
        others.sort(key=lambda tile: (cost.seconds("fused", asked, limits, tile=tile), -tile.stages))
    else:
        others.sort(key=lambda tile: (-tile.group * tile.rows * tile.depth, -tile.stages))
    return [first, *islice(others, tries - 1)]


def _try(tile: Tile, run: Callable[[Tile], Tensor], expected: Tensor, bar: float) -> Trial:
    try:
        error = relative_rms(run(tile), expected)
    except Exception as failure:  # what a compiler refuses comes in many types
        return Trial(tile, None, problem=f"{type(failure).__name__}: {str(failure)[:200]}")
    if not error <= bar:
        return Trial(tile, None, error, f"relative RMS error {error:.2e}, expected at most {bar:.2e}")
    return Trial(tile, seconds_of(lambda: run(tile), expected.device), error)


def _tune_strategies(shape: Shape, inputs: dict[str, Tensor], goal: Goal, table: dict[str, Any]) -> None:
    from .kernels.launch import Batch, Routing, problem

    x, stack, weights, bias, dy = inputs.values()
    asked = problem("merged_linear", x, stack, Batch.of(x), Routing(weights))
    x, weights = x.requires_grad_(), weights.requires_grad_()
    forward: dict[str, float] = {}
    backward: dict[str, float] = {}
    for strategy in STRATEGIES:
        y = merged_linear(x, stack, weights, bias, strategy=strategy)
        if not relative_rms(y.detach(), goal.expected) <= goal.bar:
            continue

        def differentiate(y: Tensor = y) -> object:
            return torch.autograd.grad(y, (x, weights), dy, retain_graph=True)

        def run(strategy: str = strategy) -> object:
            with torch.no_grad():
                return merged_linear(x, stack, weights, bias, strategy=strategy)

        forward[strategy] = seconds_of(run, x.device)
        backward[strategy] = seconds_of(differentiate, x.device)
    x.requires_grad_(False)
    weights.requires_grad_(False)
    for times, is_backward in ((forward, False), (backward, True)):
        if times:
            table["strategies"].append(
                {
                    **tuning.strategy_key(asked, is_backward),
                    "strategy": min(times, key=lambda name: times[name]),
                    "shape": _name(shape),
                    "microseconds": {name: 1e6 * value for name, value in times.items()},
                }
            )


def seconds_of(function: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Median seconds of a call: on a GPU of its kernels alone, with a cold cache."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=25, return_mode="median")) * 1e-3
    return statistics.median(wall_seconds(function) for _ in range(repeats))


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random numbers of the size real ones have: task vectors a tenth of the base."""
    B, N, d, h, T = shape.B, shape.N, shape.d, shape.h, shape.T
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    stack = normal(1 + T, h, d) / d**0.5
    stack[1:] *= 0.1
    return {
        "x": normal(B, N, d).to(dtype),
        "stack": stack.to(dtype),
        "routing_weights": 0.3 + 0.1 * normal(B, T),
        "bias": (0.1 * normal(1 + T, h)).to(dtype),
        "dy": normal(B, N, h).to(dtype),
    }


def _goals(inputs: dict[str, Tensor]) -> dict[str, Goal]:
    """By kernel: y and the routing weights' gradient in float64, and the error of the paper's loop in their dtype."""
    dtype = inputs["x"].dtype
    exact, plain = _reference(inputs, torch.float64), _reference(inputs, dtype)
    return {
        name: Goal(value, 1.05 * relative_rms(plain[name], value) + torch.finfo(dtype).eps)
        for name, value in exact.items()
    }


def _reference(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The paper's loop, sample after sample, so that one sample's weights exist at a time."""
    x, stack, weights, bias, dy = (value.detach() for value in inputs.values())
    x, stack, bias, dy = x.to(dtype), stack.to(dtype), bias.to(dtype), dy.to(dtype)
    weights = weights.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    ys, gradients = [], []
    for b in range(x.shape[0]):
        y = reference.merged_linear(x[b : b + 1], stack, weights[b : b + 1], bias)
        gradients.append(torch.autograd.grad(y, weights, dy[b : b + 1])[0][b])
        ys.append(y.detach())
    return {"merged_linear": torch.cat(ys), "merged_linear_dw": torch.stack(gradients)}


def _name(shape: Shape) -> str:
    return f"{shape.B} x {shape.N} x {shape.d} x {shape.h} x {shape.T}"


def _second(item: tuple[str, float]) -> float:
    return item[1]
