"""Device functions the kernels share: normalisation of router logits, activations, sample spans."""

# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def kept_experts(logits, T: tl.constexpr, TOP_K: tl.constexpr):
    """Which of the experts [TP] keep a weight: the ``TOP_K`` with the largest logits.

    Among equal logits the lower index comes first; NaN ranks highest, as in ``torch.topk``.
    """
    t = tl.arange(0, logits.shape[0])
    kept = t < T
    if TOP_K < T:
        rank = tl.where(logits != logits, float("inf"), logits)
        ahead = (rank[None, :] > rank[:, None]) | ((rank[None, :] == rank[:, None]) & (t[None, :] < t[:, None]))
        kept = kept & (tl.sum((ahead & (t < T)[None, :]).to(tl.int32), axis=1) < TOP_K)
    return kept


@triton.jit
def normalize(logits, temperature, T: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr):
    """Router logits [TP] of one sample -> routing weights [TP]; TP is T rounded up to a power of 2, the rest get 0."""
    kept = kept_experts(logits, T, TOP_K)
    if KIND == "softmax":
        scaled = tl.where(kept, logits / temperature, float("-inf"))
        exponential = tl.exp(scaled - tl.max(scaled, axis=0))
        return tl.where(kept, exponential / tl.sum(exponential, axis=0), 0.0)
    if KIND == "sigmoid":
        return tl.where(kept, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    return tl.where(kept, logits, 0.0)


@triton.jit
def normalize_backward(d_weights, logits, temperature, T: tl.constexpr, KIND: tl.constexpr, TOP_K: tl.constexpr):
    """Gradient of the logits [TP] from that of the routing weights [TP]."""
    weights = normalize(logits, temperature, T, KIND, TOP_K)
    if KIND == "softmax":
        return weights * (d_weights - tl.sum(weights * d_weights, axis=0)) / temperature
    if KIND == "sigmoid":
        return weights * (1.0 - weights) * d_weights
    return tl.where(kept_experts(logits, T, TOP_K), d_weights, 0.0)


@triton.jit
def tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activations of ``wemoe_fast.activations`` that a kernel applies, in float32."""
    if ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    if ACTIVATION == "quick_gelu":
        return x / (1.0 + tl.exp(-1.702 * x))
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    return x


@triton.jit
def sample_span(cu_seqlens, b, N, total, RAGGED: tl.constexpr):
    """(first row, number of tokens) of sample b. Packed samples lie in one [total, .]; padded ones count from 0.

    Clamped to what there is: wrong ``cu_seqlens`` cannot lead outside of the tensor.
    """
    if RAGGED:
        first = tl.minimum(tl.maximum(tl.load(cu_seqlens + b).to(tl.int64), 0), total)
        end = tl.minimum(tl.maximum(tl.load(cu_seqlens + b + 1).to(tl.int64), first), total)
        return tl.minimum(first, total - 1), tl.minimum((end - first).to(tl.int32), N)
    else:
        return tl.full((), 0, tl.int64), N + b * 0
