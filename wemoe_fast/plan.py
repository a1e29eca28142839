"""Which strategy runs a merged linear, with which group and slab sizes, and why.

On a GPU where the kernels run: the cheapest by ``cost``, unless a table measured on that device says otherwise.
Elsewhere the model counts per sample, in units of a large product's time for one token:

- ``chunked``:  ``TOKEN_COST`` N for the product, ``MERGE_COST`` (1+T) for merging, which is a skinny product (K = 1+T),
  and ``WRITE_COST`` for writing the merged weights and reading them again;
- ``native``:   merged and multiplied in cache, where there is a C compiler: cheaper than any other, but for many single
  tokens, ``NATIVE_SINGLES``;
- ``factored``: (1+T) N, all in large products;
- ``shared``:   N; the one merged weight is spread over the whole batch.

So ``factored`` pays for few tokens: up to 31 with one task vector, 15 with two, 4 with eight, 2 with twenty. The
constants are measured; see benchmarks/NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import cost, kernels
from .errors import InputError
from .kernels import native, tuning
from .kernels.tuning import Problem
from .slabs import wide
from .workers import worker_count

STRATEGIES = ("auto", "reference", "shared", "chunked", "native", "fused", "factored")

TOKEN_COST, MERGE_COST, WRITE_COST = 1.15, 1.7, 23.0
NATIVE_SINGLES = 80
"""From so many single tokens times 1+T on ``factored`` is cheaper than ``native``."""
NATIVE_ROWS = 384
"""The CPU kernels are given parts of so many rows at least, where the gradient of the routing weights is computed."""
GROUP = 8
MANY_TOKENS = 128
"""From so many tokens on merging weighs less than packing x again for every slab: half a group, slabs twice as high."""
SHARED_SLAB_BYTES = 3 << 19
"""On the CPU, a worker's slab of the one weight that serves a whole batch: it stays in cache until it is multiplied."""
WORTH_SHARING = 1 << 24
"""Multiply-adds of a merged linear below which handing slabs to workers takes longer than it saves."""
GPU_ROWS = 64
"""On a GPU as many samples share a slab as leaves it at least so many rows: the stack is then read once."""
WORKSPACE_BYTES = 48 << 20
"""Upper bound of the temporary memory of one merged linear, forward or backward, whatever B, N and T are.

Merged weights, the outer products of the backward pass, a slab of the stack in another dtype, and activations that
are converted or on their way through the activation function take at most a quarter each (forward on a GPU merged
weights half, where no slab is converted). (A slab has at least 8 rows: the bound holds while 8 rows of 1+T experts fit
in a quarter. ``native`` takes 32 MiB and 1 for every thread.) Not counted: the results (a gradient of a 16-bit stack
is summed in float32), and copies of strided inputs: of the stack, and of x where one weight is shared by the batch.
"""


@dataclass(frozen=True)
class Plan:
    """One decision: ``group`` samples share a slab of ``rows`` output rows; products run in ``compute_dtype``.

    With ``factored`` the group is of tokens. On the CPU ``workers`` slabs or groups are under way at once.
    """

    strategy: str
    group: int
    rows: int
    compute_dtype: torch.dtype
    reason: str
    workers: int = 1


@lru_cache
def cpu_has_fast_low_precision() -> bool:
    """True where this CPU multiplies 16-bit numbers natively (AVX-512 BF16, AMX or SVE BF16)."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "sve_bf16", "bf16"))
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: that of ``x``, or float32 on a CPU that only emulates 16-bit products."""
    low = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if low and x.device.type == "cpu" and not cpu_has_fast_low_precision() else x.dtype


def choose(
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    strategy: str = "auto",
    backward: bool = False,
    *,
    batch: tuple[int, int] | None = None,
    kept: int | None = None,
) -> Plan:
    """The plan for x [B, N, d], stack [1+T, h, d], routing_weights [B, T] or [1, T] (shared by the batch).

    For packed x [total, d] ``batch`` is (B, length of the longest sample). ``kept``: how many experts have a weight
    that is not zero, T unless given.
    """
    B, N = batch or (x.shape[0], x.shape[1])
    T = stack.shape[0] - 1
    if strategy == "shared" and routing_weights.shape[0] != 1 and B != 1:
        raise InputError(
            "strategy 'shared': expected routing_weights with one row for the whole batch, "
            f"found {tuple(routing_weights.shape)} for {B} samples; use 'chunked' or 'auto'"
        )
    if strategy != "auto":
        reason = _obstacle(strategy, x, stack)
        if reason is not None:
            raise InputError(f"strategy {strategy!r}: {reason}; use 'auto'")
        return _sized(strategy, "asked for", x, stack, B, N, backward)
    one_weight = routing_weights.shape[0] == 1
    if not one_weight and x.device.type == "cuda" and _obstacle("fused", x, stack) is None:
        return _cheapest(x, stack, B, N, kept or T, backward)
    # The CPU kernels compute in float32 or wider: they are not for CPUs that multiply 16-bit numbers.
    in_cache = compute_dtype(x).itemsize > 2 and _obstacle("native", x, stack) is None
    if one_weight:
        strategy = "native" if in_cache else "shared"
        return _sized(strategy, "one merged weight serves the whole batch", x, stack, B, N, backward)
    if in_cache:
        few = N == 1 and B * (1 + T) >= NATIVE_SINGLES
    else:
        few = TOKEN_COST * N + MERGE_COST * (1 + T) + WRITE_COST > (1 + T) * N
    if few:
        reason = f"{N} tokens: multiplying by every task vector beats merging them"
        return _sized("factored", reason, x, stack, B, N, backward)
    if in_cache:
        return _sized("native", f"{N} tokens: merged and multiplied in cache", x, stack, B, N, backward)
    return _sized("chunked", f"{N} tokens: merging costs less than {T} more products", x, stack, B, N, backward)


def _obstacle(strategy: str, x: Tensor, stack: Tensor) -> str | None:
    """Why a strategy cannot run here; the CPU kernels are compiled where they are asked for."""
    if strategy == "fused":
        return kernels.why_not(x.device, x.dtype)
    if strategy != "native":
        return None
    return native.why_not(x.dtype, stack.dtype) if x.device.type == "cpu" else f"expected a CPU, found {x.device}"


def _cheapest(x: Tensor, stack: Tensor, B: int, N: int, kept: int, backward: bool) -> Plan:
    problem = Problem.of("merged_linear", x, stack, B, N, kept)
    measured = tuning.measured_strategy(problem, backward)
    if measured is not None:
        return _sized(measured, f"measured fastest on {problem.device.name}", x, stack, B, N, backward)
    limits = cost.ceilings(x.device)
    plans = {name: _sized(name, "", x, stack, B, N, backward) for name in ("chunked", "factored")}
    if tuning.fits(tuning.choose(problem), problem):
        plans["fused"] = _sized("fused", "", x, stack, B, N, backward)
    estimates = {
        name: cost.seconds(name, problem, limits, p.group, p.rows, backward=backward) for name, p in plans.items()
    }
    best = min(estimates, key=lambda name: estimates[name])
    listed = ", ".join(f"{name} {1e6 * value:.0f}" for name, value in sorted(estimates.items(), key=lambda e: e[1]))
    return replace(plans[best], reason=f"estimated cheapest, in microseconds: {listed}")


def _sized(strategy: str, reason: str, x: Tensor, stack: Tensor, B: int, N: int, backward: bool) -> Plan:
    """The plan of a strategy: how large its groups and slabs are."""
    T, h, d = stack.shape[0] - 1, stack.shape[1], stack.shape[2]
    dtype = compute_dtype(x)
    quarter = WORKSPACE_BYTES // 4
    size = max(dtype.itemsize, stack.dtype.itemsize)
    if strategy == "fused":
        return Plan(strategy, 1, h, dtype, reason)
    # Forward the workers share the slabs, backward, where slabs add up, the groups.
    workers = worker_count(x.device) if B * (N + 1 + T) * h * d >= WORTH_SHARING else 1
    if strategy == "native":
        # PyTorch's own threads. Several parts for each where gradients are computed, so that all end together, but none
        # that is lower: every part reads all of x.
        workers = torch.get_num_threads() if workers > 1 else 1
        parts = workers * max(1, h // (workers * NATIVE_ROWS))
        return Plan(strategy, 1, -(-h // (parts * 32)) * 32, wide(x.dtype), reason, workers)
    if strategy == "factored":
        # A slab of one expert at a time; per token at most 2 d + 6 rows numbers are under way.
        workers = 1 if backward else workers
        rows = min(_fit(h, quarter // workers, d * size), -(-h // (8 * workers)) * 8)
        numbers = (2 * d + 6 * rows) * torch.promote_types(dtype, torch.float32).itemsize
        return Plan(strategy, max(1, min(B * N, quarter // workers // numbers)), rows, dtype, reason, workers)
    slab = _slab_bytes(x.device, backward)
    if strategy == "shared" and x.device.type == "cpu":
        slab = min(slab, workers * SHARED_SLAB_BYTES)
    largest = GROUP if N < MANY_TOKENS else max(1, GROUP // 2)
    if x.device.type == "cuda":
        largest = max(GROUP, slab // max(1, GPU_ROWS * d * size))
    group = 1 if strategy == "shared" else max(1, min(largest, -(-B // workers) if backward else B))
    converted = 1 + T if stack.dtype != dtype else 0
    rows = _fit(h, slab // workers, max(group, converted) * d * size)
    if not backward:
        rows = min(rows, -(-h // (8 * workers)) * 8)
    return Plan(strategy, group, rows, dtype, reason, workers)


def _slab_bytes(device: torch.device, backward: bool) -> int:
    """What the merged weights of a slab may take: a quarter of the workspace.

    Forward on a GPU half of it, since merging needs no converted copy there. No more than half of the GPU's L2 cache,
    where a slab is to stay until it has been used.
    """
    share = WORKSPACE_BYTES // 4
    if device.type != "cuda":
        return share
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or WORKSPACE_BYTES
    return min(share if backward else 2 * share, max(cache // 2, 1 << 20))


def tokens_in_a_quarter(numbers_per_token: int, dtype: torch.dtype, workers: int = 1) -> int:
    """How many tokens of so many numbers a worker's share of a quarter of the workspace holds, at least 1."""
    return max(1, WORKSPACE_BYTES // 4 // workers // max(1, numbers_per_token * dtype.itemsize))


def _fit(wanted: int, budget: int, unit: int) -> int:
    """As many of ``wanted`` as a budget holds, at least 1 (8 for long ranges), a multiple of 8 where possible."""
    count = min(wanted, budget // max(unit, 1))
    if count >= wanted:
        return max(wanted, 1)
    return max(min(8, wanted), count // 8 * 8) if wanted >= 8 else max(1, count)
