"""The merged linear by linearity: multiply by the base and by every task vector, then combine by weight.

    y_b = x_b W_0^T + sum_t w_bt (x_b tau_t^T)

(1+T) times the products, but the stack is read once for the whole batch and nothing is merged: best for very
few tokens per sample, such as decoding. A slab of output rows and a group of samples at a time, so that the
partial products stay within the workspace.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .activations import lookup
from .plan import Plan
from .slabs import Gradients, coefficients, finish, spans, wide


def _slab(stack: Tensor, rows: slice, dtype: torch.dtype) -> Tensor:
    """stack[:, rows] as one matrix [(1+T) rows, d]."""
    return stack[:, rows].reshape(-1, stack.shape[2]).to(dtype)


def _products(x: Tensor, slab: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """x [B, N, d] times every expert's rows: [B * N, 1+T, rows]."""
    return (x.reshape(-1, x.shape[2]).to(dtype) @ slab.mT).unflatten(1, (experts, -1))


def _per_token(coefficient: Tensor, N: int) -> Tensor:
    """[B, 1+T] -> [B * N, 1+T]."""
    return coefficient.unsqueeze(1).expand(-1, N, -1).flatten(0, 1)


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    B, N, _ = x.shape
    h, dtype = stack.shape[1], plan.compute_dtype
    y = x.new_empty(B, N, h)
    coefficient = coefficients(routing_weights, B, wide(x.dtype))
    merged_bias = None if bias is None else coefficient @ bias.to(coefficient.dtype)
    act = lookup(activation)
    for rows in spans(h, plan.rows):
        slab = _slab(stack, rows, dtype)
        for group in spans(B, plan.group):
            products = _products(x[group], slab, stack.shape[0], dtype)
            weights = _per_token(coefficient[group].to(dtype), N).unsqueeze(1)
            combined = torch.bmm(weights, products).view(-1, N, products.shape[2])
            if merged_bias is not None:
                combined += merged_bias[group, None, rows].to(dtype)
            y[group, :, rows] = act(combined)
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
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    d_coefficient = coefficient.new_zeros(coefficient.shape) if need_weights else None
    d_stack = stack.new_zeros(stack.shape, dtype=wide(stack.dtype)) if need_stack else None
    for group in spans(B, plan.group):
        dx_sum = None if dx is None else dx[group].new_zeros(dx[group].shape, dtype=total)
        for rows in spans(h, plan.rows):
            slab = _slab(stack, rows, dtype)
            dy_slab = dy[group, :, rows].to(dtype).flatten(0, 1)
            weighted = _per_token(coefficient[group].to(dtype), N).unsqueeze(2) * dy_slab.unsqueeze(1)
            if dx_sum is not None:
                dx_sum += (weighted.flatten(1) @ slab).view(dx_sum.shape)
            if d_coefficient is not None:
                products = _products(x[group], slab, stack.shape[0], dtype)
                inner = torch.bmm(products, dy_slab.unsqueeze(2)).view(-1, N, stack.shape[0])
                d_coefficient[group] += inner.sum(dim=1, dtype=total)
            if d_stack is not None:
                d_slab = weighted.flatten(1).mT @ x[group].reshape(-1, d).to(dtype)
                d_stack[:, rows] += d_slab.view(stack.shape[0], -1, d)
        if dx is not None and dx_sum is not None:
            dx[group] = dx_sum.to(dx.dtype)
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)
