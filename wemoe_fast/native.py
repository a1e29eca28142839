"""The strategy ``native``: the CPU kernels behind the same interface as the other strategies.

As in ``chunked`` the weights of a sample exist a tile at a time, but a tile stays in the cache of the core that made
it, and 16-bit numbers are widened there. A token's products depend neither on the batch nor on the other tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import chunked
from .activations import lookup
from .kernels import native as kernel
from .plan import WORKSPACE_BYTES, Plan, choose, tokens_in_a_quarter
from .slabs import Gradients, coefficients, finish, spans, wide

ACTIVATED_BYTES = WORKSPACE_BYTES // 16
"""What of a result is computed before it is activated: it is in cache then, and may need three temporaries as large."""


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    B, N, _ = x.shape
    h = stack.shape[1]
    y = x.new_empty(B, N, h)
    x, stack = _side_by_side(x), stack.contiguous()
    coefficient = coefficients(routing_weights, B, plan.compute_dtype).contiguous()
    if bias is not None:
        bias = bias.to(coefficient.dtype).contiguous()
    act = lookup(activation)

    def multiply(columns: slice) -> None:
        kernel.merged_product(x, stack, coefficient, bias, y, columns, most=plan.rows, threads=plan.workers)

    if activation == "none" or y.nbytes <= ACTIVATED_BYTES:
        multiply(slice(0, h))
        return act(y)
    parts = plan.rows * plan.workers
    width = parts * max(1, ACTIVATED_BYTES * h // (y.nbytes * parts))
    for columns in spans(h, width):
        multiply(columns)
        for tokens in spans(N, tokens_in_a_quarter(4 * B * width, wide(x.dtype))):
            y[:, tokens, columns] = act(y[:, tokens, columns])
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
    """Gradients (x, stack, routing_weights, bias) of ``forward`` without activation, None where not needed.

    The gradient of the stack, frozen where WEMoE is used as published, is left to ``chunked``.
    """
    need_x, need_stack, need_weights, need_bias = needs
    B, _, d = x.shape
    h = stack.shape[1]
    stack, dy = stack.contiguous(), _side_by_side(dy)
    coefficient = coefficients(routing_weights, B, plan.compute_dtype).contiguous()
    dx = d_coefficient = d_stack = None
    if need_x:
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        kernel.merged_product(dy, stack, coefficient, None, dx, slice(0, d), lies=True, threads=plan.workers)
    if need_weights:
        sums = kernel.merged_product_dw(
            dy, _side_by_side(x), stack, plan.compute_dtype, slice(0, h), most=plan.rows, threads=plan.workers
        )
        d_coefficient = sums.to(coefficient.dtype)
    if need_stack:
        slabs = choose(x, stack, routing_weights, "chunked", backward=True)
        d_stack = chunked.backward(dy, x, stack, routing_weights, None, (False, True, False, False), slabs)[1]
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)


def _side_by_side(x: Tensor) -> Tensor:
    """x [B, N, d] with the numbers of a token next to each other."""
    return x if x.stride(2) == 1 else x.contiguous()
