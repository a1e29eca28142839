"""What the launchers would launch, noted without a GPU: they run on tensors without data ("meta")."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from wemoe_fast.kernels import merge, merged_linear, merged_linear_dw, router, tuning
from wemoe_fast.kernels.launch import Batch, Routing
from wemoe_fast.kernels.tuning import Problem, Tile

from .targets import TARGETS, Work

MODULES = {
    "merged_linear_kernel": merged_linear,
    "merged_linear_dw_kernel": merged_linear_dw,
    "reduce_kernel": merged_linear_dw,
    "token_sums_kernel": router,
    "hidden_sums_kernel": router,
    "mean_kernel": router,
    "head_kernel": router,
    "merge_kernel": merge,
}
"""Where launchers find the kernels."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
WIDTH, HIDDEN = 768, 3072


@dataclass(frozen=True)
class Case:
    """A launch to compile: which, for which target and problem, and with which tile (the default unless given)."""

    target: str
    variant: str
    dtype: str
    tokens: int
    experts: int
    samples: int = 64
    top_k: int | None = None
    tile: Tile | None = None


@dataclass(frozen=True)
class Launch:
    """What a launcher asked for: a kernel, its arguments by name and options; the problem if it chose a tile."""

    kernel: str
    arguments: dict[str, Any]
    options: dict[str, int]
    problem: Problem | None

    @property
    def tile(self) -> Tile | None:
        sizes = [self.arguments.get(name) for name in ("ROWS", "TOKENS", "DEPTH", "GROUP")]
        return None if None in sizes else Tile(*sizes, self.options["num_stages"], self.options["num_warps"])


def launch(case: Case) -> None:
    """Run the launcher of a case on tensors without data."""
    dtype = DTYPES[case.dtype]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, N, T = case.samples, case.tokens, case.experts
    x, dy = empty(B, N, WIDTH), empty(B, N, HIDDEN)
    stack, bias = empty(1 + T, HIDDEN, WIDTH), empty(1 + T, HIDDEN)
    routing = Routing(empty(B, T, dtype=torch.float32), "softmax", 1.0, case.top_k)
    if case.variant == "forward" or case.variant == "topk":
        merged_linear.merged_linear(x, stack, routing, bias, "gelu")
    elif case.variant == "dx":
        merged_linear.merged_linear(dy, stack.mT, routing)
    elif case.variant == "gated":
        merged_linear.merged_linear(x, stack, routing, None, "silu", gate_stack=stack)
    elif case.variant == "ragged":
        batch = Batch.of(x.flatten(0, 1), empty(B + 1, dtype=torch.int32), N)
        merged_linear.merged_linear(x.flatten(0, 1), stack, routing, bias, "gelu", batch=batch)
    elif case.variant == "dw":
        merged_linear_dw.merged_linear_dw(dy, x, stack, routing, bias)
    elif case.variant == "router":
        router.route(x, empty(T, WIDTH), empty(T), empty(WIDTH, WIDTH), empty(WIDTH), kind="softmax")
    elif case.variant == "mean":
        router.token_mean(x)
    else:
        merge.merge(empty(B, 1 + T, dtype=torch.float32), stack.flatten(1), empty(B, HIDDEN * WIDTH))


VARIANTS = ("forward", "dx", "gated", "ragged", "topk", "dw", "router", "mean", "merge")


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, note: Callable[[str, dict[str, Any], dict[str, int]], None]) -> None:
        self.kernel = kernel
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options: dict[str, int] = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
            names = self.kernel.arg_names[: len(args)]
            self.note(self.kernel.__name__, {**dict(zip(names, args, strict=True)), **kwargs}, options)

        return launch


def launches(case: Case) -> list[Launch]:
    """What the launcher of a case would launch on its target."""
    noted: list[Launch] = []
    problems: list[Problem | None] = [None]

    def note(kernel: str, arguments: dict[str, Any], options: dict[str, int]) -> None:
        noted.append(Launch(kernel, arguments, options, problems[-1]))

    def choose(problem: Problem) -> Tile:
        on_target = replace(problem, device=TARGETS[case.target].device)
        problems.append(on_target)
        return case.tile or tuning.default(on_target)

    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
        stack.enter_context(patch.object(tuning, "choose", choose))
        for name, module in MODULES.items():
            stack.enter_context(patch.object(module, name, Recorder(getattr(module, name), note)))
        launch(case)
    return noted


def work(launch: Launch) -> Work | None:
    """None for kernels without a product."""
    tile, problem = launch.tile, launch.problem
    if tile is None or problem is None:
        return None
    G, size = tile.group, problem.element_size
    stacks = 2 if problem.gated else 1
    products = 2.0 * stacks * G * tile.rows * tile.tokens * tile.depth
    if launch.kernel == "merged_linear_kernel":
        slots = problem.slots(G)
        # About what the threads hold between them: warps along the tokens merge the same tile once more.
        merged = tuning.merged_registers(tile, problem) * 32 * tile.warps
        weights = stacks * (1 + slots) * tile.rows * tile.depth
        return Work(products, 2.0 * stacks * slots * merged, size * (weights + G * tile.tokens * tile.depth))
    if launch.kernel == "merged_linear_dw_kernel":
        # Once a program, here spread over its steps.
        task_vectors = problem.kept * tile.rows * tile.depth / -(-problem.tokens // tile.tokens)
        samples = G * tile.tokens * (tile.rows + tile.depth)
        return Work(products, 2 * G * task_vectors, size * (task_vectors + samples))
    return Work(products, 0, size * tile.depth * (tile.rows + G * tile.tokens))
