"""The strategy ``fused``: the Triton kernels behind the same interface as the other strategies.

Triton is imported here and not before: where it is missing, nothing else notices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import kernels
from .activations import lookup
from .normalization import Normalization


def available(tensor: Tensor) -> bool:
    """Whether kernels run where this tensor is, on a GPU."""
    return tensor.device.type == "cuda" and kernels.why_not(tensor.device, tensor.dtype) is None


def forward(
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    activation: str,
    normalization: Normalization,
    nonzero: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    gate_stack: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """act(x_b W_b^T + c_b), or act(gate) * (...): x [B, N, d] or packed [total, d] -> [B, N, h] or [total, h]."""
    from .kernels.launch import Batch
    from .kernels.merged_linear import merged_linear

    inside = activation if activation in kernels.ACTIVATIONS else "none"
    batch, given = Batch.of(x, cu_seqlens, max_seqlen), _routing(routing, normalization, nonzero)
    bias, gate_bias = _contiguous_rows(bias), _contiguous_rows(gate_bias)
    if inside == activation or gate_stack is None:
        y = merged_linear(
            x, stack, given, bias, inside, gate_stack=gate_stack, gate_bias=gate_bias, batch=batch
        )  # fmt: skip
        return y if inside == activation else lookup(activation)(y)
    gate = merged_linear(x, gate_stack, given, gate_bias, batch=batch)
    return lookup(activation)(gate).mul_(merged_linear(x, stack, given, bias, batch=batch))


def backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    normalization: Normalization,
    need_x: bool,
    need_routing: bool,
    nonzero: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and of the router logits, None where not needed."""
    from .kernels.launch import Batch
    from .kernels.merged_linear import merged_linear
    from .kernels.merged_linear_dw import merged_linear_dw

    batch = Batch.of(x, cu_seqlens, max_seqlen)
    dx = merged_linear(dy, stack.mT, _routing(routing, normalization, nonzero), batch=batch) if need_x else None
    if not need_routing:
        return dx, None
    d_logits = merged_linear_dw(dy, x, stack, _routing(routing, normalization), _contiguous_rows(bias), batch=batch)
    if routing.shape[0] != batch.samples:
        d_logits = d_logits.sum(dim=0, keepdim=True)
    return dx, d_logits.to(routing.dtype)


def merge(coefficient: Tensor, stack: Tensor, out: Tensor) -> Tensor:
    """out [B, columns] = coefficient [B, 1+T] times stack [1+T, columns], summed in float32."""
    from .kernels import merge

    return merge.merge(coefficient.to(torch.float32), stack, out)


def token_mean(hidden: Tensor, token_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """See ``token_mean.forward``."""
    from .kernels import router

    if weight is not None and bias is not None:
        weight, bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    return router.token_mean(hidden, token_mask, weight, bias)


def route(
    hidden: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    token_mask: Tensor | None,
    normalization: Normalization,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
) -> Tensor:
    """Routing weights [B, T] of hidden states, all of the router in two kernels."""
    from .kernels import router
    from .kernels.launch import Batch

    if hidden_weight is not None and hidden_bias is not None:
        hidden_weight, hidden_bias = hidden_weight.to(hidden.dtype), hidden_bias.to(hidden.dtype)
    return router.route(
        hidden,
        output_weight,
        output_bias,
        hidden_weight,
        hidden_bias,
        token_mask,
        kind=normalization.kind,
        temperature=normalization.temperature,
        top_k=normalization.top_k,
        batch=Batch.of(hidden, cu_seqlens, max_seqlen),
    )


def _routing(logits: Tensor, normalization: Normalization, nonzero: int | None = None) -> object:
    from .kernels.launch import Routing

    logits = logits.to(torch.float32).contiguous()
    return Routing(logits, normalization.kind, normalization.temperature, normalization.top_k, nonzero)


def _contiguous_rows(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.stride(1) == 1 else bias.contiguous()
