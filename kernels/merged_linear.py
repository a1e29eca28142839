"""The merged linear in one kernel: normalise, merge in registers, multiply, add the bias, activate.

    y_b = act(x_b W_b^T + c_b),   [1, w_b] = [1, norm(logits_b)],   W_b = W_0 + sum_t w_bt tau_t

A program owns a tile of output rows and of tokens for a *group* of samples. Per step along the inner dimension it
loads the tiles of the base and of the task vectors once, merges them for each sample of the group in registers, in
float32, and feeds the result to the tensor core as the left operand: y^T = W_b x^T, because Hopper's wgmma takes
only its left operand from registers. W_b never exists outside of registers.

With ``top_k`` a group has at most ``group * top_k`` experts that are not zero: only those have *slots*, and only slots
are loaded and multiplied. dx = dy W_b is the same kernel: pass dy for x and the stack with rows and columns
exchanged.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .functions import activate, normalize, sample_span
from .launch import Batch, Routing, on_device, problem, readable
from .tuning import Tile


@triton.jit
def _choose_slots(per_sample, T: tl.constexpr, TP: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """Tuples: which expert each slot holds, whether it holds one, and the weights by slot and sample."""
    t = tl.arange(0, TP)
    position = t
    wanted = t < T
    if SLOTS < T:
        wanted = t < 0
        for g in tl.static_range(GROUP):
            wanted = wanted | (per_sample[g] != 0.0)
        position = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        # More experts than slots: a promise was broken, and the result must not look right.
        broken = tl.sum(wanted.to(tl.int32), axis=0) > SLOTS
    experts = ()
    filled = ()
    weights = ()
    for s in tl.static_range(SLOTS):
        here = wanted & (position == s)
        if SLOTS < T:
            experts = experts + (tl.sum(tl.where(here, t, 0), axis=0),)
            filled = filled + (tl.sum(here.to(tl.int32), axis=0),)
        else:
            experts = experts + (s,)
            filled = filled + (1,)
        for g in tl.static_range(GROUP):
            weight = tl.sum(tl.where(here, per_sample[g], 0.0), axis=0)
            if SLOTS < T:
                weight = tl.where(broken, float("nan"), weight)
            weights = weights + (weight,)
    return experts, filled, weights


@triton.jit
def _merge(
    stack, offsets, inside, stride_expert, experts, filled, weights,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ALWAYS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """The merged tile of every sample of the group, float32: base + sum over slots."""
    if ALWAYS:
        base = tl.load(stack + offsets).to(tl.float32)
    else:
        base = tl.load(stack + offsets, mask=inside, other=0.0).to(tl.float32)
    merged = ()
    for _ in tl.static_range(GROUP):
        merged = merged + (base,)
    for s in tl.static_range(SLOTS):
        tau = stack + (experts[s] + 1) * stride_expert
        if DENSE and ALWAYS:
            delta = tl.load(tau + offsets).to(tl.float32)
        elif DENSE:
            delta = tl.load(tau + offsets, mask=inside, other=0.0).to(tl.float32)
        else:
            delta = tl.load(tau + offsets, mask=(inside.to(tl.int32) * filled[s]) != 0, other=0.0).to(tl.float32)
        added = ()
        for g in tl.static_range(GROUP):
            added = added + (tl.fma(delta, weights[s * GROUP + g], merged[g]),)
        merged = added
    return merged


@triton.jit
def _store(
    y, value, gate, n0, length, row0, H, stride_token, stride_row, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):
    """Activate and store a tile [rows, tokens] a few columns at a time: fewer numbers under way, no spills."""
    ROWS: tl.constexpr = value.shape[0]
    TOKENS: tl.constexpr = value.shape[1]
    if TOKENS > 16:
        HALF: tl.constexpr = TOKENS // 2
        left, right = tl.split(tl.permute(tl.reshape(value, (ROWS, 2, HALF)), (0, 2, 1)))
        gate_left, gate_right = left, right
        if GATED:
            gate_left, gate_right = tl.split(tl.permute(tl.reshape(gate, (ROWS, 2, HALF)), (0, 2, 1)))
        _store(y, left, gate_left, n0, length, row0, H, stride_token, stride_row, ACTIVATION, GATED)
        _store(y, right, gate_right, n0 + HALF, length, row0, H, stride_token, stride_row, ACTIVATION, GATED)
    else:
        rows = row0 + tl.arange(0, ROWS)
        tokens = n0 + tl.arange(0, TOKENS)
        result = activate(gate, ACTIVATION) * value if GATED else activate(value, ACTIVATION)
        at = y + tokens[None, :].to(tl.int64) * stride_token + rows[:, None].to(tl.int64) * stride_row
        tl.store(at, result.to(y.dtype.element_ty), mask=(rows < H)[:, None] & (tokens < length)[None, :])


@triton.jit
def merged_linear_kernel(
    x,  # [B, N, K], or [total, K] if RAGGED
    stack,  # [1+T, H, K]
    bias,  # [1+T, H] if BIAS
    gate_stack,  # [1+T, H, K] if GATED
    gate_bias,  # [1+T, H] if BIAS and GATED
    routing,  # [B, T] logits, float32
    y,  # [B, N, H], or [total, H] if RAGGED
    cu_seqlens,  # [B + 1] if RAGGED
    B, N, K, H, total, temperature,
    x_sample, x_token, x_k,
    stack_expert, stack_row, stack_k,
    bias_expert, routing_sample,
    y_sample, y_token, y_row,
    T: tl.constexpr, TP: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr, SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RAGGED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    DENSE: tl.constexpr = SLOTS == T
    token_tiles = tl.cdiv(N, TOKENS)
    # Neighbouring programs share a tile of rows, so the weights they read meet in L2.
    b0 = (tl.program_id(0) // token_tiles) * GROUP
    n0 = (tl.program_id(0) % token_tiles) * TOKENS
    row0 = tl.program_id(1) * ROWS
    rows = row0 + tl.arange(0, ROWS)
    tokens = n0 + tl.arange(0, TOKENS)
    ks = tl.arange(0, DEPTH)
    t = tl.arange(0, TP)

    per_sample = ()
    accumulators = ()
    gates = ()
    x_at = ()
    x_offsets = ()
    longest = tl.full((), 0, tl.int32)
    for g in tl.static_range(GROUP):
        # The last group repeats the last sample; only its own results are stored.
        b = tl.minimum(b0 + g, B - 1)
        logits = tl.load(routing + b.to(tl.int64) * routing_sample + t, mask=t < T, other=0.0).to(tl.float32)
        per_sample = per_sample + (normalize(logits, temperature, T, KIND, TOP_K),)
        first, length = sample_span(cu_seqlens, b, N, total, RAGGED)
        x_at = x_at + (x + b.to(tl.int64) * x_sample + first * x_token,)
        # Tokens outside are read at a place inside and not stored, so the loop needs no mask for them.
        near = tl.minimum(tokens, tl.maximum(length - 1, 0))
        x_offsets = x_offsets + (near[None, :].to(tl.int64) * x_token + ks[:, None].to(tl.int64) * x_k,)
        longest = tl.maximum(longest, length)
        accumulators = accumulators + (tl.zeros((ROWS, TOKENS), dtype=tl.float32),)
        if GATED:
            gates = gates + (tl.zeros((ROWS, TOKENS), dtype=tl.float32),)
    if RAGGED:
        if longest <= n0:
            return
    experts, filled, weights = _choose_slots(per_sample, T, TP, SLOTS, GROUP)

    stack_offsets = (rows - row0)[:, None].to(tl.int64) * stack_row + ks[None, :].to(tl.int64) * stack_k
    first_row = row0.to(tl.int64) * stack_row
    stride_expert = tl.full((), 1, tl.int64) * stack_expert
    along = tl.full((), 0, tl.int64)
    for _ in range(0, K, DEPTH):
        inside = ks < K - along
        stack_inside = inside[None, :] & (rows < H)[:, None]
        at = first_row + along * stack_k
        merged = _merge(
            stack + at, stack_offsets, stack_inside, stride_expert, experts, filled, weights,
            SLOTS, GROUP, EVEN, DENSE,
        )  # fmt: skip
        columns = ()
        sums = ()
        for g in tl.static_range(GROUP):
            column_at = x_at[g] + along * x_k + x_offsets[g]
            if EVEN:
                column = tl.load(column_at)
            else:
                column = tl.load(column_at, mask=inside[:, None], other=0.0)
            columns = columns + (column,)
            sums = sums + (
                tl.dot(merged[g].to(x.dtype.element_ty), column, accumulators[g], input_precision=PRECISION),
            )
        accumulators = sums
        if GATED:
            merged = _merge(
                gate_stack + at, stack_offsets, stack_inside, stride_expert, experts, filled, weights,
                SLOTS, GROUP, EVEN, DENSE,
            )  # fmt: skip
            sums = ()
            for g in tl.static_range(GROUP):
                sums = sums + (
                    tl.dot(merged[g].to(x.dtype.element_ty), columns[g], gates[g], input_precision=PRECISION),
                )
            gates = sums
        along += DEPTH

    if BIAS:
        inside = rows < H
        shifts = _merge(
            bias, rows, inside, bias_expert, experts, filled, weights, SLOTS, GROUP, False, DENSE
        )  # fmt: skip
        sums = ()
        for g in tl.static_range(GROUP):
            sums = sums + (accumulators[g] + shifts[g][:, None],)
        accumulators = sums
        if GATED:
            shifts = _merge(gate_bias, rows, inside, bias_expert, experts, filled, weights, SLOTS, GROUP, False, DENSE)
            sums = ()
            for g in tl.static_range(GROUP):
                sums = sums + (gates[g] + shifts[g][:, None],)
            gates = sums
    for g in tl.static_range(GROUP):
        # Found again and not kept: registers are what the loop is short of.
        first, length = sample_span(cu_seqlens, tl.minimum(b0 + g, B - 1), N, total, RAGGED)
        to = y + (b0 + g).to(tl.int64) * y_sample + first * y_token
        gate = gates[g] if GATED else accumulators[g]
        length = tl.where(b0 + g < B, length, 0)
        _store(to, accumulators[g], gate, n0, length, row0, H, y_token, y_row, ACTIVATION, GATED)


def merged_linear(
    x: Tensor,
    stack: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    activation: str = "none",
    *,
    gate_stack: Tensor | None = None,
    gate_bias: Tensor | None = None,
    batch: Batch | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """act(x_b W_b^T + c_b), or with a gate act(x_b G_b^T + e_b) * (x_b W_b^T + c_b), without materialising W_b.

    Args:
        x: [B, N, K], or [total, K] where ``batch`` is packed; float16, bfloat16 or float32, any strides.
        stack: [1+T, H, K], any strides (``stack.mT`` gives dx of dy), any of these dtypes.
        routing: logits [B, T] or [1, T], and how they become routing weights.
        bias: [1+T, H] with contiguous rows.
        activation: of ``ACTIVATIONS``.
        gate_stack, gate_bias: like stack and bias, of the gate.
        batch: where the samples lie; padded [B, N, K] unless given.
        tile: how the work is cut; from the device's table unless given.

    Returns:
        [B, N, H] or [total, H], contiguous, in the dtype of x.
    """
    batch = batch or Batch.of(x)
    H, K = stack.shape[1], stack.shape[2]
    dtype = x.dtype
    x, stack, bias, gate_stack, gate_bias = (readable(t) for t in (x, stack, bias, gate_stack, gate_bias))
    y = x.new_empty(*x.shape[:-1], H)
    if not y.numel():
        return y.to(dtype)
    if gate_stack is not None and gate_stack.stride() != stack.stride():
        stack, gate_stack = stack.contiguous(), gate_stack.contiguous()
    tile = tile or tuning.choose(problem("merged_linear", x, stack, batch, routing, gated=gate_stack is not None))
    grid = (triton.cdiv(batch.samples, tile.group) * triton.cdiv(batch.tokens, tile.tokens), triton.cdiv(H, tile.rows))
    bias_stride = 0 if bias is None else bias.stride(0)
    with on_device(x):
        merged_linear_kernel[grid](
            x, stack, bias, gate_stack, gate_bias, routing.logits, y, batch.cu_seqlens,
            batch.samples, batch.tokens, K, H, batch.total, routing.temperature,
            *batch.strides(x), *stack.stride(), bias_stride, routing.stride, *batch.strides(y),
            **routing.constants(), SLOTS=routing.slots(tile.group),
            ACTIVATION=activation, BIAS=bias is not None, GATED=gate_stack is not None, RAGGED=batch.packed,
            EVEN=K % tile.depth == 0 and H % tile.rows == 0, PRECISION=tuning.float32_precision(x.dtype),
            **tile.constants(),
        )  # fmt: skip
    return y.to(dtype)
