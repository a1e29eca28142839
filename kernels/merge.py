"""The weighted sum of task vectors by itself: merged weights of a slab, or of a whole tensor.

    out[b] = base + sum_t w_bt tau_t        stack [1+T, columns] -> [B, columns]

For ``chunked``, which merges a slab small enough to stay in L2 and multiplies with it there, and for ``shared``, which
merges everything once. A program reads its columns of the stack once and merges them for many samples, in float32.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel_dtype, on_device, readable

REGISTERS = 1 << 14
"""Numbers of the stack a program holds in registers."""
PROGRAMS = 1024
"""Samples are shared out until there is work for about so many programs."""


@triton.jit
def merge_kernel(
    coefficients,  # [B, 1+T], float32
    stack,  # [1+T, columns]
    out,  # [B, columns]
    B, columns, coefficients_sample, coefficients_expert, stack_expert, out_sample,
    EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside = column < columns
    wide = tl.full((), 1, tl.int64)
    tiles = ()
    for e in tl.static_range(EXPERTS):
        tile = tl.load(stack + e * wide * stack_expert + column, mask=inside, other=0.0)
        tiles = tiles + (tile.to(tl.float32),)
    for b in range(tl.program_id(1), B, tl.num_programs(1)):
        row = wide * b
        weight = coefficients + row * coefficients_sample
        merged = tiles[0] * tl.load(weight)
        for e in tl.static_range(1, EXPERTS):
            merged = tl.fma(tiles[e], tl.load(weight + e * coefficients_expert), merged)
        tl.store(out + row * out_sample + column, merged.to(out.dtype.element_ty), mask=inside)


def merge(coefficients: Tensor, stack: Tensor, out: Tensor) -> Tensor:
    """out [B, columns] = coefficients [B, 1+T] (float32) times stack [1+T, columns], rows of both contiguous."""
    B, experts = coefficients.shape
    columns = stack.shape[1]
    if not out.numel():
        return out
    stack = readable(stack)
    target = out if kernel_dtype(out) == out.dtype else out.new_empty(out.shape, dtype=torch.float32)
    width = min(1024, triton.next_power_of_2(max(128, REGISTERS // experts // 2)))
    blocks = triton.cdiv(columns, width)
    with on_device(out):
        merge_kernel[(blocks, max(1, min(B, PROGRAMS // blocks)))](
            coefficients, stack, target, B, columns, *coefficients.stride(),
            stack.stride(0), target.stride(0), EXPERTS=experts, WIDTH=width,
        )  # fmt: skip
    return out if target is out else out.copy_(target)
