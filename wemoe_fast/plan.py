"""Which strategy runs a merged linear, with which group and slab sizes, and why.

The cost model counts multiply-adds per sample of ``x_b W_b^T`` with T task vectors:

- ``chunked``:  N h d for the product and (1+T) h d for merging, in a skinny product (K = 1+T) that runs
  ``MERGE_COST`` times slower per operation than a large one;
- ``factored``: (1+T) N h d, all in large products;
- ``shared``:   N h d; the one merged weight is spread over the whole batch.

So ``factored`` pays while ``(1+T) N < N + MERGE_COST (1+T)``, that is for very few tokens. The constants
are measured; see benchmarks/NOTES.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .errors import InputError
from .workers import worker_count

STRATEGIES = ("auto", "reference", "shared", "chunked", "factored")

MERGE_COST = 3.0
GROUP = 8
WORKSPACE_BYTES = 48 << 20
"""Upper bound of the temporary memory of one merged linear, forward or backward, whatever B, N and T are.

Merged weights, the outer products of the backward pass, a slab of the stack in another dtype, and activations that
are converted or on their way through the activation function take at most a quarter each. (A slab has at least 8
rows: the bound holds while 8 rows of 1+T experts fit in a quarter.) Not counted: the results (a gradient of a 16-bit
stack is summed in float32), and copies of strided inputs: of the stack, and of x where one weight is shared by the
batch.
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


def choose(x: Tensor, stack: Tensor, routing_weights: Tensor, strategy: str = "auto", backward: bool = False) -> Plan:
    """The plan for x [B, N, d], stack [1+T, h, d], routing_weights [B, T] or [1, T] (shared by the batch)."""
    B, N, d = x.shape
    T, h = stack.shape[0] - 1, stack.shape[1]
    dtype = compute_dtype(x)
    reason = "asked for"
    if strategy == "auto":
        if routing_weights.shape[0] == 1:
            strategy, reason = "shared", "one merged weight serves the whole batch"
        elif (1 + T) * N < N + MERGE_COST * (1 + T):
            strategy, reason = "factored", f"{N} tokens: multiplying by every task vector beats merging them"
        else:
            strategy, reason = "chunked", f"{N} tokens: merging costs less than {T} more products"
    if strategy == "shared" and routing_weights.shape[0] != 1 and B != 1:
        raise InputError(
            "strategy 'shared': expected routing_weights with one row for the whole batch, "
            f"found {tuple(routing_weights.shape)} for {B} samples; use 'chunked' or 'auto'"
        )
    quarter = WORKSPACE_BYTES // 4
    size = max(dtype.itemsize, stack.dtype.itemsize)
    if strategy == "factored":
        # A slab of one expert at a time; per token at most 2 d + 6 rows numbers are under way.
        rows = _fit(h, quarter, d * size)
        numbers = (2 * d + 6 * rows) * torch.promote_types(dtype, torch.float32).itemsize
        return Plan(strategy, max(1, min(B * N, quarter // numbers)), rows, dtype, reason)
    # Forward the workers share the slabs, backward, where slabs add up, the groups.
    workers = worker_count(x.device)
    group = 1 if strategy == "shared" else max(1, min(GROUP, -(-B // workers) if backward else B))
    converted = 1 + T if stack.dtype != dtype else 0
    rows = _fit(h, quarter // workers, max(group, converted) * d * size)
    if not backward:
        rows = min(rows, -(-h // (8 * workers)) * 8)
    return Plan(strategy, group, rows, dtype, reason, workers)


def tokens_in_a_quarter(numbers_per_token: int, dtype: torch.dtype, workers: int = 1) -> int:
    """How many tokens of so many numbers a worker's share of a quarter of the workspace holds, at least 1."""
    return max(1, WORKSPACE_BYTES // 4 // workers // max(1, numbers_per_token * dtype.itemsize))


def _fit(wanted: int, budget: int, unit: int) -> int:
    """As many of ``wanted`` as a budget holds, at least 1 (8 for long ranges), a multiple of 8 where possible."""
    count = min(wanted, budget // max(unit, 1))
    if count >= wanted:
        return max(wanted, 1)
    return max(min(8, wanted), count // 8 * 8) if wanted >= 8 else max(1, count)
