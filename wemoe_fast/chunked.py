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

from . import fused
from .activations import lookup
from .plan import Plan, tokens_in_a_quarter
from .slabs import Gradients, blocks, coefficients, finish, spans, wide
from .workers import for_each


class _Merger:
    """Merges slabs of one stack for groups of samples."""

    def __init__(self, stack: Tensor, coefficient: Tensor, plan: Plan) -> None:
        self.stack, self.dtype = stack.contiguous(), plan.compute_dtype
        self.merge_dtype = torch.promote_types(stack.dtype, plan.compute_dtype)
        self.on_gpu = fused.available(stack)
        self.coefficient = coefficient if self.on_gpu else coefficient.to(self.merge_dtype)

    def slab(self, rows: slice) -> Tensor:
        """stack[:, rows] as [1+T, rows * d] in the merging dtype; a view where no conversion is needed."""
        d = self.stack.shape[2]
        flat = self.stack.view(self.stack.shape[0], -1)[:, rows.start * d : rows.stop * d]
        return flat if self.on_gpu else flat.to(self.merge_dtype)

    def buffer(self, slab: Tensor, group: int) -> Tensor:
        """Room for the merged weights of a slab, for groups one after the other."""
        dtype = self.dtype if self.on_gpu else slab.dtype
        return slab.new_empty(min(group, self.coefficient.shape[0]), slab.shape[1], dtype=dtype)

    def merge(self, slab: Tensor, group: slice, buffer: Tensor | None = None) -> Tensor:
        """The merged weights [group, rows, d] of a slab."""
        coefficient = self.coefficient[group]
        if buffer is None:
            buffer = self.buffer(slab, coefficient.shape[0])
        merge = fused.merge if self.on_gpu else _multiply_slab
        merged = merge(coefficient, slab, buffer[: coefficient.shape[0]])
        return merged.view(merged.shape[0], -1, self.stack.shape[2]).to(self.dtype)


def _multiply_slab(coefficient: Tensor, slab: Tensor, out: Tensor) -> Tensor:
    return torch.mm(coefficient, slab, out=out)


def _converted(x: Tensor, width: int, plan: Plan, sums: int = 0) -> Iterator[tuple[slice, slice]]:
    """The (samples, tokens) of x converted to the compute dtype at once; everything where nothing is converted.

    ``width``: numbers per token to convert; ``sums``: numbers per token that are summed up in a wider dtype.
    """
    B, N = x.shape[:2]
    numbers = (width if x.dtype != plan.compute_dtype else 0) + (sums if x.dtype != wide(x.dtype) else 0)
    return blocks(B, N, tokens_in_a_quarter(numbers, wide(x.dtype)) if numbers else max(1, B * N), plan.group)


def _multiply(x: Tensor, weight: Tensor, shift: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x [b, n, d] times weight [b, d, rows], plus shift [b, 1, rows]."""
    if shift is None:
        return torch.bmm(x, weight, out=out)
    return torch.baddbmm(shift, x, weight, out=out)


def _add_product(total: Tensor, x: Tensor, weight: Tensor, plan: Plan) -> None:
    """total [b, n, d] += x [b, n, rows] times weight [b, rows, d]."""
    if total.dtype == weight.dtype:
        total.baddbmm_(x, weight)
        return
    for part in spans(total.shape[1], tokens_in_a_quarter(plan.group * total.shape[2], total.dtype, plan.workers)):
        total[:, part] += torch.bmm(x[:, part], weight)


def forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    """act(x_b W_b^T + c_b): x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h] in the dtype of x."""
    B, N, d = x.shape
    h = stack.shape[1]
    y = x.new_empty(B, N, h)
    coefficient = coefficients(routing_weights, B, wide(x.dtype))
    merged_bias = None if bias is None else (coefficient @ bias.to(coefficient.dtype)).to(plan.compute_dtype)
    merger = _Merger(stack, coefficient, plan)
    act = lookup(activation)
    # The activation needs the product and at most three temporaries of its size beside the result.
    step = tokens_in_a_quarter(4 * plan.group * plan.rows, wide(x.dtype), plan.workers)
    for samples, tokens in _converted(x, d, plan):
        x_block = x[samples, tokens].to(plan.compute_dtype)
        y_block = y[samples, tokens]

        def fill(rows: slice, first: int = samples.start, x_block: Tensor = x_block, y_block: Tensor = y_block) -> None:
            slab = merger.slab(rows)
            buffer = merger.buffer(slab, plan.group)
            for local in spans(x_block.shape[0], plan.group):
                group = slice(first + local.start, first + local.stop)
                weight = merger.merge(slab, group, buffer).mT
                out = y_block[local, :, rows]
                shift = None if merged_bias is None else merged_bias[group, None, rows]
                if activation == "none" and y.dtype == plan.compute_dtype:
                    _multiply(x_block[local], weight, shift, out)
                    continue
                for part in spans(out.shape[1], step):
                    out[:, part] = act(_multiply(x_block[local, part], weight, shift))

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
    B, _, d = x.shape
    h = stack.shape[1]
    total = wide(x.dtype)
    coefficient = coefficients(routing_weights, B, total)
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    d_coefficient = coefficient.new_zeros(coefficient.shape) if need_weights else None
    d_stack = stack.new_zeros(stack.shape, dtype=wide(stack.dtype)) if need_stack else None
    merger = _Merger(stack, coefficient, plan)
    for samples, tokens in _converted(x, d + h, plan, sums=d if need_x else 0):
        x_block, dy_block = (
            x[samples, tokens].to(plan.compute_dtype),
            dy[samples, tokens].to(plan.compute_dtype),
        )
        dx_out = None if dx is None else dx[samples, tokens]
        dx_sum = dx_out if dx_out is None or dx_out.dtype == total else torch.zeros_like(dx_out, dtype=total)
        for rows in spans(h, plan.rows):
            slab = merger.slab(rows)
            dy_slab = dy_block[:, :, rows]

            def add(
                local: slice,
                rows: slice = rows,
                first: int = samples.start,
                slab: Tensor = slab,
                x_block: Tensor = x_block,
                dy_slab: Tensor = dy_slab,
                dx_sum: Tensor | None = dx_sum,
            ) -> None:
                group = slice(first + local.start, first + local.stop)
                if dx_sum is not None:
                    _add_product(dx_sum[local], dy_slab[local], merger.merge(slab, group), plan)
                if d_coefficient is None and d_stack is None:
                    return
                outer = torch.bmm(dy_slab[local].mT, x_block[local]).flatten(1).to(merger.merge_dtype)
                if d_coefficient is not None:
                    d_coefficient[group] += torch.mm(slab.to(outer.dtype), outer.mT).mT
                if d_stack is not None:
                    for t, weights in enumerate(merger.coefficient[group].to(outer.dtype).unbind(dim=1)):
                        d_stack[t, rows] += (weights @ outer).view(-1, d)

            # Groups share the gradient of the stack, so it is added up by one worker.
            for_each(add, list(spans(x_block.shape[0], plan.group)), plan.workers if d_stack is None else 1)
        if dx_out is not None and dx_sum is not None and dx_sum is not dx_out:
            dx_out.copy_(dx_sum)
    return finish(dy, stack, routing_weights, bias, coefficient, need_bias, dx, d_stack, d_coefficient)
