"""The merged linear by linearity: multiply by the base and by every task vector, then combine by weight.

    y_b = x_b W_0^T + sum_t w_bt (x_b tau_t^T)

(1+T) times the products, but the stack is read once for the whole batch and nothing is merged: best for very
few tokens per sample, such as decoding. A slab of output rows, a group of tokens and one expert at a time. Where
products are summed in their own dtype, the tokens are weighted and not the results: then they add up in place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import lookup
from .plan import Plan
from .slabs import Gradients, blocks, coefficients, finish, spans, wide
from .workers import for_each


def _tokens(x: Tensor, samples: slice, tokens: slice, dtype: torch.dtype) -> Tensor:
    """A block of x [B, N, width] as [tokens, width]."""
    return x[samples, tokens].flatten(0, 1).to(dtype)


def _per_token(coefficient: Tensor, count: int) -> Tensor:
    """Coefficients [b, 1+T] of samples with ``count`` tokens each as [1+T, b * count, 1]."""
    return coefficient.mT.unsqueeze(2).expand(-1, -1, count).flatten(1).unsqueeze(2)


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    B, N, _ = x.shape
    h, dtype, total = stack.shape[1], plan.compute_dtype, wide(x.dtype)
    y = x.new_empty(B, N, h)
    coefficient = coefficients(routing_weights, B, total)
    act = lookup(activation)

    def fill(rows: slice) -> None:
        for samples, part in blocks(B, N, plan.group):
            tokens = _tokens(x, samples, part, dtype)
            weights = _per_token(coefficient[samples], part.stop - part.start)
            combined = tokens.new_zeros(tokens.shape[0], rows.stop - rows.start, dtype=total)
            for t, weight in enumerate(weights):
                slab = stack[t, rows].to(dtype).mT
                if dtype == total:
                    combined.addmm_(tokens * weight, slab)
                else:
                    combined.addcmul_((tokens @ slab).to(total), weight)
            if bias is not None:
                combined += weights.squeeze(2).mT @ bias[:, rows].to(total)
            y[samples, part, rows] = act(combined).view(-1, part.stop - part.start, combined.shape[1])

    for_each(fill, list(spans(h, plan.rows)), plan.workers)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    plan: Plan,
) -> Gradients:
    """Gradients (x, stack, routing_weights, bias) of ``forward`` without activation, None where not needed."""
    need_x, need_stack, need_weights, need_bias = needs
    B, N, d = x.shape
    h, dtype, total = stack.shape[1], plan.compute_dtype, wide(x.dtype)
    coefficient = coefficients(routing_weights, B, total)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    d_coefficient = coefficient.new_zeros(coefficient.shape) if need_weights else None
    d_stack = stack.new_zeros(stack.shape, dtype=wide(stack.dtype)) if need_stack else None
    for samples, part in blocks(B, N, plan.group):
        count = part.stop - part.start
        tokens = _tokens(x, samples, part, dtype)
        weights = _per_token(coefficient[samples], count)
        dx_sum = tokens.new_zeros(tokens.shape, dtype=total)
        for rows in spans(h, plan.rows):
            dy_slab = dy[samples, part, rows].flatten(0, 1)
            for t, weight in enumerate(weights):
                slab = stack[t, rows].to(dtype)
                weighted = (dy_slab * weight).to(dtype)
                if dx is not None and dtype == total:
                    dx_sum.addmm_(weighted, slab)
                elif dx is not None:
                    dx_sum += weighted @ slab
                if d_coefficient is not None:
                    inner = torch.linalg.vecdot((tokens @ slab.mT).to(total), dy_slab.to(total))
                    d_coefficient[samples, t] += inner.view(-1, count).sum(dim=1)
                if d_stack is not None:
                    d_stack[t, rows] += weighted.mT @ tokens
        if dx is not None:
            dx[samples, part] = dx_sum.view(-1, count, d).to(dx.dtype)
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)
