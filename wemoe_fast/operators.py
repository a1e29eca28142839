"""The operations as registered with torch.library under ``wemoe_fast::``: bodies, fakes, gradients.

Only tensors and plain values cross: a ``Normalization`` is its ``code``, samples of different lengths are
``cu_seqlens`` and ``max_seqlen``. What the strategies cannot do themselves, a packed batch or router logits instead of
weights, is done here for all of them.
"""

# torch.library reads the annotations of the registered functions, so they are not postponed here.
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, List, Tuple  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, factored, fused, native, packed
from . import token_mean as tokens_of
from .normalization import Normalization
from .plan import Plan, choose

_STRATEGIES: dict[str, Any] = {"shared": chunked, "chunked": chunked, "native": native, "factored": factored}


def _as_given(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an operator in the dtypes of its arguments: autocast ends where it begins."""

    @wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return operator(*args, **kwargs)

    return run


@torch.library.custom_op("wemoe_fast::merged_linear", mutates_args=())
@_as_given
def merged_linear(
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    activation: str,
    strategy: str,
    normalization: str,
    nonzero: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    """See ``ops.merged_linear``."""
    return _merged(x, stack, routing, bias, activation, strategy, normalization, nonzero, cu_seqlens, max_seqlen)


@torch.library.custom_op("wemoe_fast::merged_gated_linear", mutates_args=())
@_as_given
def merged_gated_linear(
    x: Tensor,
    gate_stack: Tensor,
    up_stack: Tensor,
    routing: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    strategy: str,
    normalization: str,
    nonzero: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    """See ``ops.merged_gated_linear``; without gradients of its own."""
    return _merged(
        x, up_stack, routing, up_bias, activation, strategy, normalization, nonzero, cu_seqlens, max_seqlen,
        gate_stack, gate_bias,
    )  # fmt: skip


@torch.library.custom_op("wemoe_fast::merged_mlp", mutates_args=())
@_as_given
def merged_mlp(
    x: Tensor,
    up_stack: Tensor,
    down_stack: Tensor,
    routing: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    gate_stack: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    strategy: str,
    nonzero: int | None,
) -> Tensor:
    """See ``ops.merged_mlp``; without gradients of its own."""
    if x.numel() and up_stack.numel() and down_stack.numel():
        plan = choose(x, up_stack, routing, strategy, kept=nonzero)
        if plan.strategy == "native":
            gate = None if gate_stack is None else (gate_stack, gate_bias)
            tokens = _as_one_sample(x) if _one_weight(routing, plan) else x
            y = native.mlp(tokens, (up_stack, up_bias), gate, (down_stack, down_bias), routing, activation, plan)
            return y.view(*x.shape[:2], down_stack.shape[1])
    settings = (strategy, Normalization().code, nonzero, None, 0)
    hidden = _merged(x, up_stack, routing, up_bias, activation, *settings, gate_stack, gate_bias)
    return _merged(hidden, down_stack, routing, down_bias, "none", *settings)


def _merged(
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    activation: str,
    strategy: str,
    normalization: str,
    nonzero: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    gate_stack: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> Tensor:
    """act(x_b W_b^T + c_b), or with a gate act(x_b G_b^T + e_b) * (x_b W_b^T + c_b)."""
    if x.numel() == 0 or stack.numel() == 0:
        return x.new_zeros(*x.shape[:-1], stack.shape[1])
    norm = Normalization.parse(normalization)
    plan = _plan(x, stack, routing, strategy, norm.top_k or nonzero, cu_seqlens, max_seqlen)
    if plan.strategy == "fused":
        return fused.forward(
            x, stack, routing, bias, activation, norm, nonzero, cu_seqlens, max_seqlen, gate_stack, gate_bias
        )
    tokens, weights = x if cu_seqlens is None else packed.pad(x, cu_seqlens, max_seqlen), norm(routing)
    if gate_stack is None:
        y = _forward(tokens, stack, weights, bias, activation, plan)
    else:
        y = _forward(tokens, gate_stack, weights, gate_bias, activation, plan)
        y.mul_(_forward(tokens, stack, weights, bias, "none", plan))
    return y if cu_seqlens is None else packed.unpad(y, cu_seqlens, x.shape[0])


@torch.library.custom_op("wemoe_fast::merged_linear_backward", mutates_args=())
@_as_given
def merged_linear_backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    bias: Tensor | None,
    strategy: str,
    normalization: str,
    nonzero: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    needs: List[bool],  # noqa: UP006
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    """Gradients of x, stack, routing and bias, empty where not needed."""
    inputs = (x, stack, routing, bias)
    if x.numel() == 0 or stack.numel() == 0:
        return _unwrap(
            tuple(torch.zeros_like(t) if t is not None and n else None for t, n in zip(inputs, needs, strict=True)), x
        )
    norm = Normalization.parse(normalization)
    plan = _plan(x, stack, routing, strategy, norm.top_k or nonzero, cu_seqlens, max_seqlen, backward=True)
    need = (needs[0], needs[1], needs[2], needs[3])
    dx = d_routing = None
    if plan.strategy == "fused":
        dx, d_routing = fused.backward(
            dy, x, stack, routing, bias, norm, need[0], need[2], nonzero, cu_seqlens, max_seqlen
        )
        if not (need[1] or need[3]):
            return _unwrap((dx, None, d_routing, None), x)
        # The stack is frozen where WEMoE is used as published; its gradient is left to the device-independent strategy.
        need = (False, need[1], False, need[3])
        plan = _plan(x, stack, routing, "chunked", norm.top_k or nonzero, cu_seqlens, max_seqlen, backward=True)
    total, tokens = x.shape[0], x
    if cu_seqlens is not None:
        tokens, dy = packed.pad(x, cu_seqlens, max_seqlen), packed.pad(dy, cu_seqlens, max_seqlen)
    padded_dx, d_stack, d_weights, d_bias = _backward(dy, tokens, stack, norm(routing), bias, need, plan)
    if padded_dx is not None:
        dx = padded_dx if cu_seqlens is None else packed.unpad(padded_dx, cu_seqlens, total)
    if d_weights is not None:
        d_routing = norm.backward(routing, d_weights)
    return _unwrap((dx, d_stack, d_routing, d_bias), x)


def _plan(
    x: Tensor,
    stack: Tensor,
    routing: Tensor,
    strategy: str,
    kept: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    backward: bool = False,
) -> Plan:
    batch = None if cu_seqlens is None else (cu_seqlens.shape[0] - 1, max_seqlen)
    return choose(x, stack, routing, strategy, backward, batch=batch, kept=kept)


def _forward(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, plan: Plan
) -> Tensor:
    tokens = _as_one_sample(x) if _one_weight(routing_weights, plan) else x
    y: Tensor = _STRATEGIES[plan.strategy].forward(tokens, stack, routing_weights, bias, activation, plan)
    return y.view(x.shape[0], x.shape[1], stack.shape[1])


def _backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    need: tuple[bool, bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    tokens = (_as_one_sample(dy), _as_one_sample(x)) if _one_weight(routing_weights, plan) else (dy, x)
    dx, *others = _STRATEGIES[plan.strategy].backward(*tokens, stack, routing_weights, bias, need, plan)
    return None if dx is None else dx.view(x.shape), *others


@merged_linear.register_fake
def _(x: Any, stack: Any, *_arguments: Any) -> Any:
    return x.new_empty(*x.shape[:-1], stack.shape[1])


@merged_gated_linear.register_fake
def _(x: Any, gate_stack: Any, *_arguments: Any) -> Any:
    return x.new_empty(*x.shape[:-1], gate_stack.shape[1])


@merged_mlp.register_fake
def _(x: Any, up_stack: Any, down_stack: Any, *_arguments: Any) -> Any:
    return x.new_empty(*x.shape[:-1], down_stack.shape[1])


@merged_linear_backward.register_fake
def _(dy: Any, x: Any, stack: Any, routing: Any, bias: Any, *arguments: Any) -> Any:
    inputs, needs = (x, stack, routing, bias), arguments[-1]
    return tuple(
        t.new_empty(t.shape if n and t is not None else 0) if t is not None else x.new_empty(0)
        for t, n in zip(inputs, needs, strict=True)
    )


def _save_merged_linear(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:  # noqa: UP006
    x, stack, routing, bias, activation, *settings, cu_seqlens, max_seqlen = inputs
    ctx.save_for_backward(x, stack, routing, bias, cu_seqlens)
    ctx.activation, ctx.settings, ctx.max_seqlen = activation, settings, max_seqlen


def _differentiate_merged_linear(ctx: Any, dy: Tensor) -> Any:
    if ctx.activation != "none":
        raise RuntimeError("wemoe_fast::merged_linear is differentiated without its activation; use ops.merged_linear")
    x, stack, routing, bias, cu_seqlens = ctx.saved_tensors
    needs = [bool(n) for n in ctx.needs_input_grad[:4]]
    gradients = merged_linear_backward(
        dy, x, stack, routing, bias, *ctx.settings, cu_seqlens, ctx.max_seqlen, needs
    )  # fmt: skip
    return (*(g if n else None for g, n in zip(gradients, needs, strict=True)), *[None] * 6)


merged_linear.register_autograd(_differentiate_merged_linear, setup_context=_save_merged_linear)


@torch.library.custom_op("wemoe_fast::route", mutates_args=())
@_as_given
def route(
    hidden: Tensor,
    token_mask: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    output_weight: Tensor,
    output_bias: Tensor,
    normalization: str,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    """The whole router at once, without gradients of its own; see ``ops.route``."""
    norm = Normalization.parse(normalization)
    if fused.available(hidden):
        return fused.route(
            hidden, output_weight, output_bias, hidden_weight, hidden_bias, token_mask, norm,
            cu_seqlens, max_seqlen,
        )  # fmt: skip
    if cu_seqlens is not None:
        hidden, token_mask = pad_with_mask(hidden, token_mask, cu_seqlens, max_seqlen)
    mean = tokens_of.forward(hidden, token_mask, hidden_weight, hidden_bias)
    return last_layer(mean, output_weight, output_bias, norm)


@route.register_fake
def _(hidden: Any, token_mask: Any, w1: Any, b1: Any, output_weight: Any, *arguments: Any) -> Any:
    cu_seqlens = arguments[-2]
    B = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return hidden.new_empty(B, output_weight.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def last_layer(mean: Tensor, output_weight: Tensor, output_bias: Tensor, normalization: Normalization) -> Tensor:
    """norm(W mean + c) in the dtype of mean [B, m]."""
    return normalization(F.linear(mean, output_weight.to(mean.dtype), output_bias.to(mean.dtype)))


def pad_with_mask(
    hidden: Tensor, token_mask: Tensor | None, cu_seqlens: Tensor, max_seqlen: int
) -> tuple[Tensor, Tensor]:
    """Packed hidden states [total, d] and mask [total] as [B, N, d] and a mask [B, N] of their tokens."""
    mask = hidden.new_ones(hidden.shape[0], dtype=torch.bool) if token_mask is None else token_mask
    return packed.pad(hidden, cu_seqlens, max_seqlen), packed.pad(mask, cu_seqlens, max_seqlen)


@torch.library.custom_op("wemoe_fast::token_mean", mutates_args=())
@_as_given
def token_mean(hidden: Tensor, token_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """See ``token_mean.forward``."""
    if fused.available(hidden):
        return fused.token_mean(hidden, token_mask, weight, bias)
    return tokens_of.forward(hidden, token_mask, weight, bias)


@torch.library.custom_op("wemoe_fast::token_mean_backward", mutates_args=())
@_as_given
def token_mean_backward(
    grad: Tensor,
    hidden: Tensor,
    token_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: List[bool],  # noqa: UP006
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    """Gradients of hidden, weight and bias, empty where not needed."""
    gradients = tokens_of.backward(grad, hidden, token_mask, weight, bias, needs[0], needs[1])
    return _unwrap(gradients, hidden)


@token_mean.register_fake
def _(hidden: Any, token_mask: Any, weight: Any, bias: Any) -> Any:
    width = hidden.shape[2] if weight is None else weight.shape[0]
    return hidden.new_empty(hidden.shape[0], width, dtype=torch.promote_types(hidden.dtype, torch.float32))


@token_mean_backward.register_fake
def _(grad: Any, hidden: Any, token_mask: Any, weight: Any, bias: Any, needs: Any) -> Any:
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs[0] else hidden.new_empty(0)
    if weight is None or not needs[1]:
        return d_hidden, hidden.new_empty(0), hidden.new_empty(0)
    return d_hidden, weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save_token_mean(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:  # noqa: UP006
    ctx.save_for_backward(*inputs)


def _differentiate_token_mean(ctx: Any, grad: Tensor) -> Any:
    hidden, token_mask, weight, bias = ctx.saved_tensors
    need_hidden, _, need_weight, need_bias = ctx.needs_input_grad
    needs = [bool(need_hidden), bool(need_weight or need_bias)]
    d_hidden, d_weight, d_bias = token_mean_backward(grad, hidden, token_mask, weight, bias, needs)
    return (
        d_hidden if need_hidden else None,
        None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
    )


token_mean.register_autograd(_differentiate_token_mean, setup_context=_save_token_mean)


def _one_weight(routing_weights: Tensor, plan: Plan) -> bool:
    """Whether all tokens of the batch are done as one sample's, with the one weight they share."""
    return plan.strategy == "shared" or (plan.strategy == "native" and routing_weights.shape[0] == 1)


def _as_one_sample(x: Tensor) -> Tensor:
    """[B, N, d] as [1, B * N, d]."""
    return x.reshape(1, -1, x.shape[2])


def _unwrap(gradients: Sequence[Tensor | None], like: Tensor) -> Any:
    """A registered operator returns tensors only: an empty one stands for a gradient nobody needs."""
    tensors = (like.new_empty(0) if g is None else g for g in gradients)
    return tuple(
        t if t.is_contiguous() and t.storage_offset() == 0 else t.clone(memory_format=torch.contiguous_format)
        for t in tensors
    )
