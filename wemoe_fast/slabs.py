"""What the strategies share: coefficients, slabs, and the gradients every strategy ends with."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Linear = tuple[Tensor, Tensor | None]
"""Stack [1+T, h, d] and bias [1+T, h] of a merged linear."""


def coefficients(routing_weights: Tensor, samples: int, dtype: torch.dtype) -> Tensor:
    """[samples, 1+T]: routing weights with the base model's constant 1 in front."""
    ones = routing_weights.new_ones(routing_weights.shape[0], 1)
    return torch.cat([ones, routing_weights], dim=1).to(dtype).expand(samples, -1)


def spans(total: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``range(total)``."""
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def blocks(B: int, N: int, tokens: int, group: int = 1) -> Iterator[tuple[slice, slice]]:
    """(samples, tokens) of [B, N, ...] in blocks of at most ``tokens`` tokens.

    Whole samples, and whole groups of them, where they fit.
    """
    samples = tokens // max(1, N)
    if samples == 0:
        for b in range(B):
            for part in spans(N, tokens):
                yield slice(b, b + 1), part
        return
    for part in spans(B, samples if samples >= B or samples < group else samples // group * group):
        yield part, slice(0, N)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` numbers are kept."""
    return torch.promote_types(dtype, torch.float32)


def finish(
    dy: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    coefficient: Tensor,
    need_bias: bool,
    dx: Tensor | None,
    d_stack: Tensor | None,
    d_coefficient: Tensor | None,
) -> Gradients:
    """The gradients (x, stack, routing_weights, bias): adds the bias terms, restores shapes and dtypes.

    One row of routing weights shared by the batch collects the gradient of every sample.
    """
    d_weights = d_bias = None
    if bias is not None and (need_bias or d_coefficient is not None):
        d_merged_bias = dy.sum(dim=1, dtype=coefficient.dtype)
        if d_coefficient is not None:
            d_coefficient = d_coefficient + d_merged_bias @ bias.to(coefficient.dtype).mT
        if need_bias:
            d_bias = (coefficient.mT @ d_merged_bias).to(bias.dtype)
    if d_coefficient is not None:
        d_weights = d_coefficient[:, 1:].to(routing_weights.dtype)
        if routing_weights.shape[0] != d_weights.shape[0]:
            d_weights = d_coefficient[:, 1:].sum(dim=0, keepdim=True).to(routing_weights.dtype)
    return dx, None if d_stack is None else d_stack.to(stack.dtype), d_weights, d_bias
