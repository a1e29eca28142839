"""The router: token mean, last layer and normalisation; of all tokens only a [B, m] mean leaves the first kernel.

    depth 1:  w_b = norm(W2 mean_n(h_bn) + c2)
    depth 2:  w_b = norm(W2 mean_n(relu(W1 h_bn + c1)) + c2)

The mean commutes with the last layer, so neither [B, N, m] nor [B, N, T] is ever written. Samples are cut into a fixed
number of *parts* along their tokens, whose sums are added up in a fixed order: no atomics, the same result every time.
"""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .functions import normalize, sample_span
from .launch import Batch, Routing, on_device, readable, router_problem
from .tuning import Tile

FEATURES = 128
"""Features a program of ``token_sums_kernel``, and one step of ``head_kernel``, works on."""
PROGRAMS = 512
"""Samples are cut into parts until there is work for about so many programs."""


@triton.jit
def token_sums_kernel(
    hidden,  # [B, N, K], or [total, K] if RAGGED
    token_mask,  # [B, N], or [total] if RAGGED; uint8, if MASKED
    sums,  # [B, parts, K], float32
    counts,  # [B, parts], float32
    cu_seqlens,  # [B + 1] if RAGGED
    N, K, total,
    hidden_sample, hidden_token, hidden_k, mask_sample, mask_token,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Depth 1: sums of the tokens themselves."""
    b = tl.program_id(0)
    part, parts = tl.program_id(2), tl.num_programs(2)
    ks = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    first, length = sample_span(cu_seqlens, b, N, total, RAGGED)
    hidden_at = hidden + b.to(tl.int64) * hidden_sample + first * hidden_token
    mask_at = token_mask + b.to(tl.int64) * mask_sample + first * mask_token
    features = ks.to(tl.int64)[None, :] * hidden_k
    total_sum = tl.zeros((FEATURES,), dtype=tl.float32)
    count = tl.zeros((TOKENS,), dtype=tl.float32)
    for n0 in range(part * TOKENS, length, parts * TOKENS):
        tokens = n0 + tl.arange(0, TOKENS)
        counted = tokens < length
        if MASKED:
            counted = counted & (tl.load(mask_at + tokens.to(tl.int64) * mask_token, mask=counted, other=0) != 0)
        at = hidden_at + tokens.to(tl.int64)[:, None] * hidden_token + features
        values = tl.load(at, mask=counted[:, None] & (ks < K)[None, :], other=0.0)
        total_sum += tl.sum(values.to(tl.float32), axis=0)
        count += counted.to(tl.float32)
    row = b.to(tl.int64) * parts + part
    tl.store(sums + row * K + ks, total_sum, mask=ks < K)
    tl.store(counts + row, tl.sum(count, axis=0))


@triton.jit
def hidden_sums_kernel(
    hidden,  # [B, N, K], or [total, K] if RAGGED
    weight,  # [M, K]
    bias,  # [M]
    token_mask,  # [B, N], or [total] if RAGGED; uint8, if MASKED
    sums,  # [B, parts, M], float32
    counts,  # [B, parts], float32
    cu_seqlens,  # [B + 1] if RAGGED
    B, N, K, M, total,
    hidden_sample, hidden_token, hidden_k, weight_row, weight_k, mask_sample, mask_token,
    MASKED: tl.constexpr, RAGGED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Depth 2: sums over tokens of relu(W1 h + c1), for a tile of W1's rows and a group of samples."""
    b0 = tl.program_id(0) * GROUP
    row0 = tl.program_id(1) * ROWS
    part, parts = tl.program_id(2), tl.num_programs(2)
    rows = row0 + tl.arange(0, ROWS)
    ks = tl.arange(0, DEPTH)
    rows_in = rows < M
    shift = tl.load(bias + rows, mask=rows_in, other=0.0).to(tl.float32)
    hidden_at = ()
    mask_at = ()
    lengths = ()
    sums_of = ()
    counts_of = ()
    longest = tl.full((), 0, tl.int32)
    for g in tl.static_range(GROUP):
        b = tl.minimum(b0 + g, B - 1)
        first, length = sample_span(cu_seqlens, b, N, total, RAGGED)
        hidden_at = hidden_at + (hidden + b.to(tl.int64) * hidden_sample + first * hidden_token,)
        mask_at = mask_at + (token_mask + b.to(tl.int64) * mask_sample + first * mask_token,)
        lengths = lengths + (length,)
        longest = tl.maximum(longest, length)
        sums_of = sums_of + (tl.zeros((ROWS,), dtype=tl.float32),)
        counts_of = counts_of + (tl.zeros((TOKENS,), dtype=tl.float32),)
    # Rows outside are read at a place inside, and not stored.
    weight_offsets = tl.minimum(rows, M - 1).to(tl.int64)[:, None] * weight_row + ks.to(tl.int64)[None, :] * weight_k
    for n0 in range(part * TOKENS, longest, parts * TOKENS):
        tokens = n0 + tl.arange(0, TOKENS)
        products = ()
        offsets = ()
        for g in tl.static_range(GROUP):
            products = products + (tl.zeros((ROWS, TOKENS), dtype=tl.float32),)
            near = tl.minimum(tokens, tl.maximum(lengths[g] - 1, 0)).to(tl.int64)
            offsets = offsets + (near[None, :] * hidden_token + ks.to(tl.int64)[:, None] * hidden_k,)
        along = tl.full((), 0, tl.int64)
        for _ in range(0, K, DEPTH):
            inside = ks < K - along
            at = weight + along * weight_k + weight_offsets
            if EVEN_K:
                tile = tl.load(at)
            else:
                tile = tl.load(at, mask=inside[None, :], other=0.0)
            added = ()
            for g in tl.static_range(GROUP):
                at = hidden_at[g] + along * hidden_k + offsets[g]
                if EVEN_K:
                    column = tl.load(at)
                else:
                    column = tl.load(at, mask=inside[:, None], other=0.0)
                added = added + (tl.dot(tile, column, products[g], input_precision=PRECISION),)
            products = added
            along += DEPTH
        summed = ()
        counting = ()
        for g in tl.static_range(GROUP):
            counted = tokens < lengths[g]
            if MASKED:
                mask = tl.load(mask_at[g] + tokens.to(tl.int64) * mask_token, mask=counted, other=0)
                counted = counted & (mask != 0)
            active = products[g] + shift[:, None]
            active = tl.where(counted[None, :] & ~(active < 0.0), active, 0.0)
            summed = summed + (sums_of[g] + tl.sum(active, axis=1),)
            counting = counting + (counts_of[g] + counted.to(tl.float32),)
        sums_of = summed
        counts_of = counting
    for g in tl.static_range(GROUP):
        row = (b0 + g).to(tl.int64) * parts + part
        tl.store(sums + row * M + rows, sums_of[g], mask=rows < tl.where(b0 + g < B, M, 0))
        tl.store(counts + row, tl.sum(counts_of[g], axis=0), mask=b0 + g < B)


@triton.jit
def mean_kernel(
    sums,  # [B, parts, M], float32
    counts,  # [B, parts], float32
    mean,  # [B, M], float32
    parts, M,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """The mean over tokens, parts added up in order."""
    b = tl.program_id(0).to(tl.int64)
    features = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    value = tl.zeros((FEATURES,), dtype=tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for part in range(0, parts):
        value += tl.load(sums + (b * parts + part) * M + features, mask=features < M, other=0.0)
        count += tl.load(counts + b * parts + part)
    tl.store(mean + b * M + features, value / tl.maximum(count, 1.0), mask=features < M)


@triton.jit
def head_kernel(
    sums,  # [B, parts, M], float32
    counts,  # [B, parts], float32
    weight,  # [T, M]
    bias,  # [T]
    routing_weights,  # [B, T], float32
    parts, M, temperature, weight_row, weight_m,
    T: tl.constexpr, TP: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """The last layer of the mean and its normalisation, for one sample."""
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, TP)
    products = tl.zeros((TP, FEATURES), dtype=tl.float32)
    count = tl.full((), 0.0, tl.float32)
    for part in range(0, parts):
        count += tl.load(counts + b * parts + part)
    for m0 in range(0, M, FEATURES):
        features = m0 + tl.arange(0, FEATURES)
        value = tl.zeros((FEATURES,), dtype=tl.float32)
        for part in range(0, parts):
            value += tl.load(sums + (b * parts + part) * M + features, mask=features < M, other=0.0)
        at = weight + t.to(tl.int64)[:, None] * weight_row + features.to(tl.int64)[None, :] * weight_m
        tile = tl.load(at, mask=(t < T)[:, None] & (features < M)[None, :], other=0.0).to(tl.float32)
        products += tile * (value / tl.maximum(count, 1.0))[None, :]
    logits = tl.sum(products, axis=1) + tl.load(bias + t, mask=t < T, other=0.0).to(tl.float32)
    tl.store(routing_weights + b * T + t, normalize(logits, temperature, T, KIND, TOP_K), mask=t < T)


def token_mean(
    hidden: Tensor,
    token_mask: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    batch: Batch | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Mean over (unmasked) tokens of hidden, or with ``weight`` [m, d] and ``bias`` [m] of relu(hidden W1^T + c1).

    hidden [B, N, d] (or packed, see ``Batch``), token_mask [B, N] (packed: [total]), bool -> [B, m] in float32. A
    sample without tokens has mean 0.
    """
    batch = batch or Batch.of(hidden)
    sums, counts = _sums(hidden, token_mask, weight, bias, batch, tile)
    M = sums.shape[2]
    mean = sums.new_empty(batch.samples, M)
    if mean.numel():
        with on_device(hidden):
            mean_kernel[(batch.samples, triton.cdiv(M, FEATURES))](
                sums, counts, mean, sums.shape[1], M, FEATURES=FEATURES
            )
    return mean


def route(
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    hidden_weight: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    *,
    kind: str = "identity",
    temperature: float = 1.0,
    top_k: int | None = None,
    batch: Batch | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Routing weights [B, T], float32, of hidden [B, N, d] (or packed, see ``Batch``): all of the router."""
    batch = batch or Batch.of(hidden)
    sums, counts = _sums(hidden, token_mask, hidden_weight, hidden_bias, batch, tile)
    T, M = output_weight.shape
    output_weight, output_bias = readable(output_weight), readable(output_bias)
    weights = sums.new_empty(batch.samples, T)
    routing = Routing(weights, kind, temperature, top_k)
    if weights.numel():
        with on_device(hidden):
            head_kernel[(batch.samples,)](
                sums, counts, output_weight, output_bias, weights,
                sums.shape[1], M, temperature, *output_weight.stride(),
                **routing.constants(), FEATURES=FEATURES,
            )  # fmt: skip
    return weights


def _sums(
    hidden: Tensor,
    token_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    batch: Batch,
    tile: Tile | None,
) -> tuple[Tensor, Tensor]:
    """([B, parts, m], [B, parts]): sums over the tokens of every part, and how many tokens there were."""
    K = hidden.shape[-1]
    M = K if weight is None else weight.shape[0]
    hidden, weight, bias = (readable(t) for t in (hidden, weight, bias))
    tile = tile or tuning.choose(router_problem(hidden, M, batch))
    columns = triton.cdiv(M, FEATURES if weight is None else tile.rows)
    samples = batch.samples if weight is None else triton.cdiv(batch.samples, tile.group)
    steps = triton.cdiv(batch.tokens, tile.tokens)
    parts = max(1, min(steps, PROGRAMS // max(1, samples * columns)))
    sums = hidden.new_empty(batch.samples, parts, M, dtype=torch.float32)
    counts = sums.new_empty(batch.samples, parts)
    if not sums.numel():
        return sums, counts
    mask = None if token_mask is None else token_mask.view(torch.uint8)
    mask_strides = (0, 0) if mask is None else (0, *mask.stride()) if batch.packed else mask.stride()
    flags = {"MASKED": mask is not None, "RAGGED": batch.packed}
    mask = hidden if mask is None else mask  # a pointer nobody reads
    with on_device(hidden):
        if weight is None:
            token_sums_kernel[(batch.samples, columns, parts)](
                hidden, mask, sums, counts, batch.cu_seqlens, batch.tokens, K, batch.total,
                *batch.strides(hidden), *mask_strides, **flags, TOKENS=tile.tokens, FEATURES=FEATURES,
            )  # fmt: skip
        else:
            hidden_sums_kernel[(samples, columns, parts)](
                hidden, weight, bias, mask, sums, counts, batch.cu_seqlens,
                batch.samples, batch.tokens, K, M, batch.total,
                *batch.strides(hidden), *weight.stride(), *mask_strides,
                **flags, EVEN_K=K % tile.depth == 0, PRECISION=tuning.float32_precision(hidden.dtype),
                **tile.constants(),
            )  # fmt: skip
    return sums, counts
