"""The router's part that touches every token, a group of samples at a time.

The mean over tokens commutes with the router's last layer, so a router needs only a [B, m] mean:
of the tokens (depth 1), or of relu(W1 h + c1) (depth 2). Backward recomputes what forward did not keep.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .plan import WORKSPACE_BYTES, choose, compute_dtype
from .slabs import spans, wide


def _group(hidden: Tensor, width: int) -> int:
    """Samples whose tokens, ``width`` numbers each, fill at most an eighth of the workspace."""
    return max(1, WORKSPACE_BYTES // 8 // max(1, hidden.shape[1] * width * wide(hidden.dtype).itemsize))


def _counts(hidden: Tensor, token_mask: Tensor | None) -> Tensor:
    """Tokens per sample [B, 1], at least 1."""
    total = wide(hidden.dtype)
    if token_mask is None:
        return hidden.new_full((hidden.shape[0], 1), max(1, hidden.shape[1]), dtype=total)
    return token_mask.sum(dim=1, keepdim=True).clamp(min=1).to(total)


def forward(hidden: Tensor, token_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Mean over (unmasked) tokens: hidden [B, N, d] -> [B, m], in float32 or the wider dtype of hidden.

    With ``weight`` [m, d] and ``bias`` [m] the mean of relu(hidden weight^T + bias), else of hidden itself.
    A sample without tokens has mean 0.
    """
    width = hidden.shape[2] if weight is None else weight.shape[0]
    if weight is not None and bias is not None and hidden.numel():
        plan = choose(hidden, weight.unsqueeze(0), hidden.new_empty(1, 0))
        if plan.strategy == "native":
            return native.token_sums(hidden, token_mask, weight, bias, plan) / _counts(hidden, token_mask)
    sums = hidden.new_empty(hidden.shape[0], width, dtype=wide(hidden.dtype))
    dtype = compute_dtype(hidden)
    for group in spans(hidden.shape[0], _group(hidden, hidden.shape[2] + width)):
        tokens = hidden[group]
        if weight is not None and bias is not None:
            tokens = F.linear(tokens.to(dtype), weight.to(dtype), bias.to(dtype)).relu_()
        if token_mask is not None:
            tokens = tokens.masked_fill(~token_mask[group].unsqueeze(2), 0)
        torch.sum(tokens, dim=1, dtype=sums.dtype, out=sums[group])
    return sums / _counts(hidden, token_mask)


def backward(
    grad: Tensor,
    hidden: Tensor,
    token_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients (hidden, weight, bias) of ``forward``; weight and bias together, None where not needed."""
    per_token = grad / _counts(hidden, token_mask)
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_hidden else None
    if weight is None or bias is None:
        if d_hidden is not None:
            d_hidden.copy_(per_token.unsqueeze(1).expand_as(hidden))
            if token_mask is not None:
                d_hidden.masked_fill_(~token_mask.unsqueeze(2), 0)
        return d_hidden, None, None
    dtype, total = compute_dtype(hidden), wide(hidden.dtype)
    d_weight = weight.new_zeros(weight.shape, dtype=total) if need_weight else None
    d_bias = bias.new_zeros(bias.shape, dtype=total) if need_weight else None
    for group in spans(hidden.shape[0], _group(hidden, hidden.shape[2] + 2 * weight.shape[0])):
        tokens = hidden[group].to(dtype)
        dead = F.linear(tokens, weight.to(dtype), bias.to(dtype)) <= 0
        if token_mask is not None:
            dead |= ~token_mask[group].unsqueeze(2)
        dz = per_token[group].to(dtype).unsqueeze(1).masked_fill(dead, 0)
        if d_hidden is not None:
            d_hidden[group] = (dz @ weight.to(dtype)).to(hidden.dtype)
        if d_weight is not None and d_bias is not None:
            if token_mask is not None:
                # 0 x NaN is NaN: what stands at masked tokens must not matter.
                tokens = tokens.masked_fill(~token_mask[group].unsqueeze(2), 0)
            d_weight += dz.flatten(0, 1).mT @ tokens.flatten(0, 1)
            d_bias += dz.sum(dim=(0, 1), dtype=total)
    if d_weight is None or d_bias is None:
        return d_hidden, None, None
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
