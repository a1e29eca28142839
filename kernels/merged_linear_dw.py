"""The gradient of the routing weights, and through their normalisation of the router's logits.

    dw_bt = <dy_b^T x_b, tau_t> + <sum_n dy_bn, gamma_t>

dy_b^T x_b [H, K], as large as a sample's weights, exists only tile by tile: a program multiplies out one tile of it
for a group of samples, in float32 registers, then loads the task vectors' tiles once and adds up the products for each
sample. A second kernel adds up the tiles in a fixed order and applies the normalisation's Jacobian, so the result is
the same bit for bit in every run.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .functions import kept_experts, normalize_backward, sample_span
from .launch import Batch, Routing, on_device, problem, readable
from .tuning import Tile

TILES_AT_ONCE = 64
"""Tiles of partial sums that ``reduce_kernel`` adds up in one step."""


@triton.jit
def merged_linear_dw_kernel(
    dy,  # [B, N, H], or [total, H] if RAGGED
    x,  # [B, N, K], or [total, K] if RAGGED
    stack,  # [1+T, H, K]
    bias,  # [1+T, H] if BIAS
    routing,  # [B, T] logits, float32; read only where experts may be skipped
    partial,  # [B, tiles, T], float32
    cu_seqlens,  # [B + 1] if RAGGED
    B, N, K, H, total, tiles, temperature,
    dy_sample, dy_token, dy_row,
    x_sample, x_token, x_k,
    stack_expert, stack_row, stack_k,
    bias_expert, routing_sample,
    T: tl.constexpr, TP: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr,
    BIAS: tl.constexpr, RAGGED: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    k_tiles = tl.cdiv(K, DEPTH)
    # Neighbouring programs share a tile, so the task vectors they read meet in L2.
    groups = tl.cdiv(B, GROUP)
    tile = tl.program_id(0) // groups
    b0 = (tl.program_id(0) % groups) * GROUP
    row0 = (tile // k_tiles) * ROWS
    k0 = (tile % k_tiles) * DEPTH
    rows = row0 + tl.arange(0, ROWS)
    ks = k0 + tl.arange(0, DEPTH)
    t = tl.arange(0, TP)
    rows_in = rows < H
    ks_in = ks < K

    wide = tl.full((), 1, tl.int64)
    outer = ()
    column_sums = ()
    dy_at = ()
    x_at = ()
    lengths = ()
    longest = tl.full((), 0, tl.int32)
    for g in tl.static_range(GROUP):
        b = tl.minimum(b0 + g, B - 1)
        first, length = sample_span(cu_seqlens, b, N, total, RAGGED)
        dy_at = dy_at + (dy + b.to(tl.int64) * dy_sample + first * dy_token,)
        x_at = x_at + (x + b.to(tl.int64) * x_sample + first * x_token,)
        lengths = lengths + (length,)
        longest = tl.maximum(longest, length)
        outer = outer + (tl.zeros((ROWS, DEPTH), dtype=tl.float32),)
        column_sums = column_sums + (tl.zeros((ROWS,), dtype=tl.float32),)
    dy_features = rows.to(tl.int64)[:, None] * dy_row
    x_features = ks.to(tl.int64)[None, :] * x_k
    for n0 in range(0, longest, TOKENS):
        tokens = n0 + tl.arange(0, TOKENS)
        added = ()
        summed = ()
        for g in tl.static_range(GROUP):
            inside = tokens < lengths[g]
            at = tokens.to(tl.int64)
            left = tl.load(
                dy_at[g] + at[None, :] * dy_token + dy_features, mask=rows_in[:, None] & inside[None, :], other=0.0
            )
            right = tl.load(
                x_at[g] + at[:, None] * x_token + x_features, mask=inside[:, None] & ks_in[None, :], other=0.0
            )
            added = added + (tl.dot(left, right, outer[g], input_precision=PRECISION),)
            if BIAS:
                summed = summed + (column_sums[g] + tl.sum(left.to(tl.float32), axis=1),)
        outer = added
        if BIAS:
            column_sums = summed

    # Inner products with the task vectors, expert by expert: rows of [ROWS, TP] until the last step.
    products = ()
    kept = t >= 0
    if TOP_K < T:
        kept = t < 0
        for g in tl.static_range(GROUP):
            logits = tl.load(
                routing + tl.minimum(b0 + g, B - 1).to(tl.int64) * routing_sample + t, mask=t < T, other=0.0
            )
            kept = kept | kept_experts(logits, T, TOP_K)
    for _ in tl.static_range(GROUP):
        products = products + (tl.zeros((ROWS, TP), dtype=tl.float32),)
    tau = stack + row0.to(tl.int64) * stack_row + k0.to(tl.int64) * stack_k
    tau_offsets = (rows - row0).to(tl.int64)[:, None] * stack_row + (ks - k0).to(tl.int64)[None, :] * stack_k
    for e in tl.static_range(T):
        used = H
        if TOP_K < T:
            used = tl.where(tl.sum((kept & (t == e)).to(tl.int32), axis=0) > 0, H, 0)
        tau_in = (rows < used)[:, None] & ks_in[None, :]
        delta = tl.load(tau + (e + 1) * wide * stack_expert + tau_offsets, mask=tau_in, other=0.0).to(tl.float32)
        gamma = tl.zeros((ROWS,), dtype=tl.float32)
        if BIAS:
            gamma_at = bias + (e + 1) * wide * bias_expert + rows
            gamma = tl.load(gamma_at, mask=rows < tl.where(k0 == 0, used, 0), other=0.0).to(tl.float32)
        added = ()
        for g in tl.static_range(GROUP):
            product = tl.sum(outer[g] * delta, axis=1)
            if BIAS:
                product += column_sums[g] * gamma
            added = added + (products[g] + tl.where((t == e)[None, :], product[:, None], 0.0),)
        products = added
    for g in tl.static_range(GROUP):
        at = partial + ((b0 + g).to(tl.int64) * tiles + tile) * T + t
        tl.store(at, tl.sum(products[g], axis=0), mask=t < tl.where(b0 + g < B, T, 0))


@triton.jit
def reduce_kernel(
    partial,  # [B, tiles, T], float32
    routing,  # [B, T] logits, float32
    d_logits,  # [B, T], float32
    tiles, temperature, routing_sample,
    T: tl.constexpr, TP: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TP)
    d_weights = tl.zeros((TP,), dtype=tl.float32)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        at = partial + (b * tiles + tile[:, None]) * T + t[None, :]
        d_weights += tl.sum(tl.load(at, mask=(tile < tiles)[:, None] & (t < T)[None, :], other=0.0), axis=0)
    logits = tl.load(routing + b * routing_sample + t, mask=t < T, other=0.0)
    result = normalize_backward(d_weights, logits, temperature, T, KIND, TOP_K)
    tl.store(d_logits + b * T + t, result, mask=t < T)


def merged_linear_dw(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    *,
    batch: Batch | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Gradient [B, T], float32, of the routing logits of ``merged_linear`` without activation.

    dy [B, N, H] and x [B, N, K] (or packed, see ``Batch``), stack [1+T, H, K], bias [1+T, H]; any strides but for
    the rows of bias. One row of logits shared by the batch still gets one gradient per sample: add them up.
    """
    batch = batch or Batch.of(x)
    H, K = stack.shape[1], stack.shape[2]
    T = routing.experts
    d_logits = routing.logits.new_zeros(batch.samples, T)
    if not x.numel() or not dy.numel():
        return d_logits
    tile = tile or tuning.choose(problem("merged_linear_dw", x, stack, batch, routing))
    dy, x, stack, bias = (readable(t) for t in (dy, x, stack, bias))
    tiles = triton.cdiv(H, tile.rows) * triton.cdiv(K, tile.depth)
    partial = d_logits.new_empty(batch.samples, tiles, T)
    bias_stride = 0 if bias is None else bias.stride(0)
    with on_device(x):
        merged_linear_dw_kernel[(triton.cdiv(batch.samples, tile.group) * tiles,)](
            dy, x, stack, bias, routing.logits, partial, batch.cu_seqlens,
            batch.samples, batch.tokens, K, H, batch.total, tiles, routing.temperature,
            *batch.strides(dy), *batch.strides(x), *stack.stride(), bias_stride, routing.stride,
            **routing.constants(),
            BIAS=bias is not None, RAGGED=batch.packed, PRECISION=tuning.float32_precision(x.dtype),
            **tile.constants(),
        )  # fmt: skip
        reduce_kernel[(batch.samples,)](
            partial, routing.logits, d_logits, tiles, routing.temperature, routing.stride,
            **routing.constants(), TILES=TILES_AT_ONCE,
        )  # fmt: skip
    return d_logits
