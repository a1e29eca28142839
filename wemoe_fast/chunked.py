"""The device-independent merged linear: merge a slab of output rows for a group of samples, multiply, go on.

For a slab of rows a:b the merged weights of a group are one skinny product,
``[1, w_b] [group, 1+T] @ stack[:, a:b] [1+T, (b-a) d]``, small enough to stay in cache until ``bmm`` has used
it. The stack is read where it lies: a slab of the flattened stack is an ordinary strided BLAS operand. Slabs
are the outer loop, so the stack is read once and its slab stays in cache for all groups.

Only slabs exist, never a sample's whole weights: not forward, and not backward, where the same slabs give

    dx_b   = sum over slabs of dy_b[:, a:b] W_b[a:b]
    dw_bt  = sum over slabs of <dy_b[:, a:b]^T x_b, tau_t[a:b]>
    dstack[:, a:b] = [1, w]^T (dy[:, a:b]^T x)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .activations import lookup
from .plan import WORKSPACE_BYTES, Plan
from .slabs import Gradients, coefficients, finish, spans, wide


def blocks(x: Tensor, width: int, plan: Plan) -> Iterator[tuple[slice, slice]]:
    """The (samples, tokens) of x [B, N, d] that are converted to the compute dtype at once.

    Everything where nothing is converted, else as much as a quarter of the workspace holds at ``width``
    numbers per token.
    """
    B, N = x.shape[:2]
    if x.dtype == plan.compute_dtype == wide(x.dtype):
        yield slice(0, B), slice(0, N)
        return
    tokens = max(1, WORKSPACE_BYTES // 4 // (width * wide(x.dtype).itemsize))
    groups = tokens // max(1, N * plan.group)
    for samples in spans(B, max(1, groups) * plan.group):
        for part in spans(N, N if groups else max(1, tokens // plan.group)):
            yield samples, part


class _Merger:
    """Merges slabs of one stack for groups of samples, into one reused buffer."""

    def __init__(self, stack: Tensor, coefficient: Tensor, plan: Plan) -> None:
        self.stack, self.dtype = stack.contiguous(), plan.compute_dtype
        self.merge_dtype = torch.promote_types(stack.dtype, plan.compute_dtype)
        self.coefficient = coefficient.to(self.merge_dtype)
        self.buffer = stack.new_empty(plan.group * plan.rows * stack.shape[2], dtype=self.merge_dtype)

    def slab(self, rows: slice) -> Tensor:
        """stack[:, rows] as [1+T, rows * d] in the merging dtype; a view where no conversion is needed."""
        d = self.stack.shape[2]
        flat = self.stack.view(self.stack.shape[0], -1)[:, rows.start * d : rows.stop * d]
        return flat.to(self.merge_dtype)

    def merge(self, slab: Tensor, group: slice) -> Tensor:
        """The merged weights [group, rows, d] of a slab."""
        coefficient = self.coefficient[group]
        merged = self.buffer[: coefficient.shape[0] * slab.shape[1]].view(coefficient.shape[0], -1)
        torch.mm(coefficient, slab, out=merged)
        return merged.view(coefficient.shape[0], -1, self.stack.shape[2]).to(self.dtype)


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    B, N, _ = x.shape
    h = stack.shape[1]
    y = x.new_empty(B, N, h)
    coefficient = coefficients(routing_weights, B, wide(x.dtype))
    merged_bias = None if bias is None else (coefficient @ bias.to(coefficient.dtype)).to(plan.compute_dtype)
    merger = _Merger(stack, coefficient, plan)
    act = lookup(activation)
    for samples, tokens in blocks(x, x.shape[2], plan):
        x_block = x[samples, tokens].to(plan.compute_dtype)
        for rows in spans(h, plan.rows):
            slab = merger.slab(rows)
            for local in spans(x_block.shape[0], plan.group):
                group = slice(samples.start + local.start, samples.start + local.stop)
                weight = merger.merge(slab, group).mT
                out = y[group, tokens, rows]
                direct = out if activation == "none" and y.dtype == plan.compute_dtype else None
                if merged_bias is None:
                    product = torch.bmm(x_block[local], weight, out=direct)
                else:
                    product = torch.baddbmm(merged_bias[group, None, rows], x_block[local], weight, out=direct)
                if direct is None:
                    out.copy_(act(product))
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
    B, _, d = x.shape
    h = stack.shape[1]
    total = wide(x.dtype)
    coefficient = coefficients(routing_weights, B, total)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    d_coefficient = coefficient.new_zeros(coefficient.shape) if need_weights else None
    d_stack = stack.new_zeros(stack.shape, dtype=wide(stack.dtype)) if need_stack else None
    merger = _Merger(stack, coefficient, plan)
    for samples, tokens in blocks(x, 2 * d + h, plan):
        x_block, dy_block = (
            x[samples, tokens].to(plan.compute_dtype),
            dy[samples, tokens].to(plan.compute_dtype),
        )
        if dx is not None:
            dx_out = dx[samples, tokens]
            dx_sum = dx_out if dx.dtype == total else torch.zeros_like(dx_out, dtype=total)
        for rows in spans(h, plan.rows):
            slab = merger.slab(rows)
            for local in spans(x_block.shape[0], plan.group):
                group = slice(samples.start + local.start, samples.start + local.stop)
                dy_slab = dy_block[local, :, rows]
                if dx is not None:
                    weight = merger.merge(slab, group)
                    if total == plan.compute_dtype:
                        dx_sum[local].baddbmm_(dy_slab, weight)
                    else:
                        dx_sum[local] += torch.bmm(dy_slab, weight)
                if d_coefficient is None and d_stack is None:
                    continue
                outer = torch.bmm(dy_slab.mT, x_block[local]).flatten(1).to(merger.merge_dtype)
                if d_coefficient is not None:
                    d_coefficient[group] += torch.mm(outer, slab.mT)
                if d_stack is not None:
                    d_slab = torch.mm(merger.coefficient[group].mT, outer)
                    d_stack[:, rows] += d_slab.view(-1, rows.stop - rows.start, d)
        if dx is not None and dx.dtype != total:
            dx_out.copy_(dx_sum)
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)
