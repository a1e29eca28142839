"""What a merged linear costs on a GPU, by strategy: counted work over the device's ceilings.

A pass over the weights takes the largest of four terms, because they overlap: products on the tensor cores, merging on
the CUDA cores, bytes through L2, bytes through device memory. Launches do not overlap. With G samples in a group, tiles
of M x N, K the inner dimension, S experts with a weight and s bytes per number:

- ``fused``:    products, padded to tiles; S multiply-adds per merged weight; (1+S) K M s bytes of L2 for every tile and
                group, and K N s for every tile and sample. Backward: the same for dx, and dw, which reads T tiles for
                every tile of dy^T x and group;
- ``chunked``:  merged weights written to L2 and read again, 2 h d s bytes per sample, and the stack once. Backward: a
                second product, and dy^T x written and read as well;
- ``factored``: 1+T times the products, and results of every expert in float32. Backward twice that;
- ``shared``:   the stack once, and a plain product; backward two.

L2 is what bounds WEMoE on a GPU: at N=50 the merged weights of a sample are read for 50 tokens only.

The ceilings are published peaks times the share that good kernels reach, not measurements of ours; tables written by
``wemoe-fast tune`` come before this model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .kernels import tuning
from .kernels.tuning import Problem, Tile


@dataclass(frozen=True)
class Ceilings:
    """Per second: products on tensor cores (16 bits; float32), multiply-adds count as two; bytes. Seconds a launch."""

    name: str
    products: float
    products_float32: float
    arithmetic: float
    l2_bytes: float
    memory_bytes: float
    launch: float = 2e-6


# NVIDIA data sheets (H100 SXM, A100 SXM): dense 16-bit and float32 peaks and memory bandwidth, times 0.65, 0.85 and
# 0.9. L2: about 5.5 and 4 TB/s in published microbenchmarks.
H100 = Ceilings("H100", 0.65 * 989e12, 0.85 * 67e12, 0.85 * 67e12, 5.5e12, 0.9 * 3.35e12)
A100 = Ceilings("A100", 0.65 * 312e12, 0.85 * 19.5e12, 0.85 * 19.5e12, 4e12, 0.9 * 2.0e12)
MULTIPROCESSORS = {"H100": 132, "A100": 108}


@lru_cache(maxsize=16)
def ceilings(device: torch.device) -> Ceilings:
    """Those of the next of kin among the known devices, by the number of multiprocessors."""
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    known = H100 if properties.major >= 9 else A100
    share = properties.multi_processor_count / MULTIPROCESSORS[known.name]
    return Ceilings(
        properties.name,
        known.products * share,
        known.products_float32 * share,
        known.arithmetic * share,
        known.l2_bytes * share,
        known.memory_bytes * share,
    )


def seconds(
    strategy: str,
    problem: Problem,
    limits: Ceilings,
    group: int = 1,
    rows: int = 1,
    tile: Tile | None = None,
    backward: bool = False,
) -> float:
    """Estimated time of one forward, or of one backward (dx and dw).

    ``group`` and ``rows`` are those of the plan (``chunked``); ``tile`` that of ``fused``, the chosen one unless given.
    """
    if strategy == "fused":
        if not backward:
            return _fused(problem, limits, tile or tuning.choose(problem))
        dx = replace(problem, rows=problem.depth, depth=problem.rows)
        return _fused(dx, limits, tile or tuning.choose(dx)) + _fused_dw(problem, limits)
    B, N, h, d, T = problem.samples, problem.tokens, problem.rows, problem.depth, problem.experts
    s, passes = problem.element_size, 2 if backward else 1
    rate = limits.products if problem.on_tensor_cores else limits.products_float32
    activations = B * N * (d + h) * s
    stack = (1 + T) * h * d * s
    if strategy == "factored":
        products = passes * 2 * (1 + T) * B * N * h * d
        combining = passes * 3 * (1 + T) * B * N * h * 4
        launches = passes * 3 * (1 + T) * _parts(h, rows)
        memory = passes * (stack + activations)
        return _overlapped(limits, rate, products, 0, combining, memory) + launches * limits.launch
    weights = h * d if strategy == "shared" else B * h * d
    groups = 1 if strategy == "shared" else _parts(B, group)
    products, merging = passes * 2 * B * N * h * d, 2 * (1 + T) * weights
    merge = _overlapped(limits, rate, 0, merging, weights * s, stack * groups)
    # Backward dy^T x is written too, and read by the product with the task vectors.
    written = 0 if not backward else 2 * weights * s
    multiply = _overlapped(limits, rate, products, 0, weights * s + written + passes * activations, activations)
    launches = passes * 2 * _parts(h, rows) * groups
    return merge + multiply + launches * limits.launch


def _fused(problem: Problem, limits: Ceilings, tile: Tile) -> float:
    B, N, h, d, T = problem.samples, problem.tokens, problem.rows, problem.depth, problem.experts
    s, slots = problem.element_size, problem.slots(tile.group)
    rate = limits.products if problem.on_tensor_cores else limits.products_float32
    groups, tiles = _parts(B, tile.group), _parts(N, tile.tokens) * _parts(h, tile.rows)
    weights = groups * tiles * tile.rows * d
    products = 2 * weights * tile.group * tile.tokens
    # A second warpgroup along the tokens merges its own copy.
    copies = max(1, tile.warps // max(4, tile.rows // 16))
    merging = 2 * slots * weights * tile.group * copies
    l2 = weights * (1 + slots) * s + groups * tiles * tile.group * tile.tokens * d * s
    memory = (1 + T) * h * d * s + B * N * (d + h) * s
    return _overlapped(limits, rate, products, merging, l2, memory) + limits.launch


def _fused_dw(problem: Problem, limits: Ceilings) -> float:
    asked = replace(problem, kernel="merged_linear_dw")
    tile = tuning.choose(asked)
    B, N, h, d, T = problem.samples, problem.tokens, problem.rows, problem.depth, problem.experts
    s = problem.element_size
    rate = limits.products if problem.on_tensor_cores else limits.products_float32
    tokens = _parts(N, tile.tokens) * tile.tokens
    programs = _parts(B, tile.group) * _parts(h, tile.rows) * _parts(d, tile.depth)
    weights = programs * tile.rows * tile.depth
    products, inner = 2 * weights * tile.group * tokens, 2 * T * weights * tile.group
    l2 = weights * T * s + programs * tile.group * tokens * (tile.rows + tile.depth) * s
    memory = T * h * d * s + B * N * (d + h) * s
    return _overlapped(limits, rate, products, inner, l2, memory) + 2 * limits.launch


def _overlapped(
    limits: Ceilings, rate: float, products: float, arithmetic: float, l2_bytes: float, memory_bytes: float
) -> float:
    return max(
        products / rate,
        arithmetic / limits.arithmetic,
        l2_bytes / limits.l2_bytes,
        memory_bytes / limits.memory_bytes,
    )


def _parts(total: int, step: int) -> int:
    return -(-total // max(1, step))
