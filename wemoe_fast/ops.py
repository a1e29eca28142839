"""The two operations of WEMoE: ``route`` and ``merged_linear``; checks, strategies, autograd, registration.

Both are registered with torch.library under ``wemoe_fast::``, with fake implementations, so they work under
``torch.compile(fullgraph=True)``, ``torch.export``, autocast, ``inference_mode`` and activation checkpointing.
No per-sample weight is ever materialised, forward or backward; backward keeps the inputs alone.
"""

# torch.library reads the annotations of the registered functions, so they are not postponed here.
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, List, Sequence, Tuple  # noqa: UP035

import torch
import torch.nn.functional as F
from torch import Tensor

from . import chunked, factored, reference, token_mean
from .activations import ACTIVATIONS, lookup
from .errors import InputError
from .normalization import Normalization
from .plan import STRATEGIES, choose


@dataclass(frozen=True)
class RouterParameters:
    """The tensors of a router; which are there decides its depth (paper, section 3.2).

    ``output_bias`` [T] alone: depth 0. With ``output_weight`` [T, m]: depth 1 (m = d). With ``hidden_weight``
    [m, d] and ``hidden_bias`` [m] too: depth 2.
    """

    output_bias: Tensor
    output_weight: Tensor | None = None
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None

    def to_dict(self) -> "dict[str, Tensor]":
        return {name: value for name, value in vars(self).items() if value is not None}


def route(
    hidden: Tensor,
    parameters: RouterParameters,
    normalization: Normalization = Normalization(),  # noqa: B008 (frozen)
    token_mask: Tensor | None = None,
) -> Tensor:
    """Routing weights [B, T] of hidden states [B, N, d]; [1, T], shared by the batch, for depth 0.

    The mean over tokens of the router's output, normalised: ``w_b = norm(mean_n r(h_bn))`` (paper, eq. 5).
    Only tokens where ``token_mask`` [B, N] is true (or nonzero) count. Result and last layer are in float32
    (float64 where hidden is), whatever the dtype of hidden. Raises ``InputError`` for shapes that do not fit.
    """
    _check_route(hidden, parameters, normalization, token_mask)
    total = torch.promote_types(hidden.dtype, torch.float32)
    output_bias = parameters.output_bias.to(total)
    if parameters.output_weight is None:
        logits = output_bias.unsqueeze(0)
    else:
        mask = None if token_mask is None else token_mask.bool()
        mean = _token_mean(_autocast(hidden), mask, parameters.hidden_weight, parameters.hidden_bias)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(mean, parameters.output_weight.to(mean.dtype), output_bias.to(mean.dtype))
    return normalization(logits)


def merged_linear(
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
) -> Tensor:
    """y_b = act(x_b (W_0 + sum_t w_bt tau_t)^T + c_0 + sum_t w_bt gamma_t) (paper, eq. 6 and 7).

    Args:
        x: [B, N, d], any strides; B or N may be 0.
        stack: [1+T, h, d], the base weight first, then T task vectors, in the dtype of ``x`` (under autocast
            any floating dtype: slabs are converted as they are merged).
        routing_weights: [B, T], or [1, T] shared by the whole batch; kept in float32 or wider.
        bias: [1+T, h], base first, or None.
        activation: a name in ``wemoe_fast.activations.ACTIVATIONS``, or None.
        strategy: ``auto`` (see ``wemoe_fast.plan``), ``shared``, ``chunked``, ``factored``, or ``reference``,
            the paper's loop over samples. All give the same result to rounding.

    Returns:
        [B, N, h] in the dtype of ``x``. Differentiable in x, stack, routing_weights and bias.

    Raises:
        InputError: all shapes, dtypes, devices and names that do not fit, at once.
    """
    x = _autocast(x)
    _check_merged_linear(x, stack, routing_weights, bias, activation, strategy)
    activation = activation or "none"
    if strategy == "reference":
        if x.shape[0] and not torch.is_autocast_enabled(x.device.type):
            return reference.merged_linear(x, stack, routing_weights, bias, activation)
        with torch.autocast(x.device.type, enabled=False):
            stack, bias = stack.to(x.dtype), None if bias is None else bias.to(x.dtype)
            return reference.merged_linear(x, stack, routing_weights, bias, activation)
    inputs = (x, stack, routing_weights) if bias is None else (x, stack, routing_weights, bias)
    if activation != "none" and torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        # The activation's own backward needs the product, so it is left to autograd.
        return lookup(activation)(_merged_linear(x, stack, routing_weights, bias, "none", strategy))
    return _merged_linear(x, stack, routing_weights, bias, activation, strategy)


def _as_given(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The body of an operator in the dtypes of its arguments: autocast ends where it begins."""

    @wraps(operator)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return operator(*args, **kwargs)

    return run


@torch.library.custom_op("wemoe_fast::merged_linear", mutates_args=())
@_as_given
def _merged_linear(
    x: Tensor, stack: Tensor, routing_weights: Tensor, bias: Tensor | None, activation: str, strategy: str
) -> Tensor:
    if x.numel() == 0 or stack.numel() == 0:
        y = x.new_zeros(x.shape[0], x.shape[1], stack.shape[1])
        return y
    plan = choose(x, stack, routing_weights, strategy)
    if plan.strategy == "factored":
        return factored.forward(x, stack, routing_weights, bias, activation, plan)
    tokens = _as_one_sample(x) if plan.strategy == "shared" else x
    y = chunked.forward(tokens, stack, routing_weights, bias, activation, plan)
    return y.view(x.shape[0], x.shape[1], stack.shape[1])


@torch.library.custom_op("wemoe_fast::merged_linear_backward", mutates_args=())
@_as_given
def _merged_linear_backward(
    dy: Tensor,
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    strategy: str,
    needs: List[bool],  # noqa: UP006
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:  # noqa: UP006
    inputs = (x, stack, routing_weights, bias)
    if x.numel() == 0 or stack.numel() == 0:
        return _unwrap(
            tuple(torch.zeros_like(t) if t is not None and n else None for t, n in zip(inputs, needs, strict=True)), x
        )
    plan = choose(x, stack, routing_weights, strategy, backward=True)
    need = (needs[0], needs[1], needs[2], needs[3])
    if plan.strategy == "factored":
        return _unwrap(factored.backward(dy, x, stack, routing_weights, bias, need, plan), x)
    if plan.strategy == "shared":
        gradients = chunked.backward(_as_one_sample(dy), _as_one_sample(x), stack, routing_weights, bias, need, plan)
        dx = None if gradients[0] is None else gradients[0].view(x.shape)
        return _unwrap((dx, *gradients[1:]), x)
    return _unwrap(chunked.backward(dy, x, stack, routing_weights, bias, need, plan), x)


@_merged_linear.register_fake
def _(x: Any, stack: Any, routing_weights: Any, bias: Any, activation: str, strategy: str) -> Any:
    return x.new_empty(x.shape[0], x.shape[1], stack.shape[1])


@_merged_linear_backward.register_fake
def _(dy: Any, x: Any, stack: Any, routing_weights: Any, bias: Any, strategy: str, needs: Any) -> Any:
    inputs = (x, stack, routing_weights, bias)
    return tuple(
        t.new_empty(t.shape if n and t is not None else 0) if t is not None else x.new_empty(0)
        for t, n in zip(inputs, needs, strict=True)
    )


def _save_merged_linear(ctx: Any, inputs: Tuple[Any, ...], output: Any) -> None:  # noqa: UP006
    x, stack, routing_weights, bias, activation, strategy = inputs
    ctx.save_for_backward(x, stack, routing_weights, bias)
    ctx.activation, ctx.strategy = activation, strategy


def _differentiate_merged_linear(ctx: Any, dy: Tensor) -> Any:
    if ctx.activation != "none":
        raise RuntimeError("wemoe_fast::merged_linear is differentiated without its activation; use ops.merged_linear")
    x, stack, routing_weights, bias = ctx.saved_tensors
    needs = [bool(n) for n in ctx.needs_input_grad[:4]]
    gradients = _merged_linear_backward(dy, x, stack, routing_weights, bias, ctx.strategy, needs)
    return (*(g if n else None for g, n in zip(gradients, needs, strict=True)), None, None)


_merged_linear.register_autograd(_differentiate_merged_linear, setup_context=_save_merged_linear)


@torch.library.custom_op("wemoe_fast::token_mean", mutates_args=())
@_as_given
def _token_mean(hidden: Tensor, token_mask: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return token_mean.forward(hidden, token_mask, weight, bias)


@torch.library.custom_op("wemoe_fast::token_mean_backward", mutates_args=())
@_as_given
def _token_mean_backward(
    grad: Tensor,
    hidden: Tensor,
    token_mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    needs: List[bool],  # noqa: UP006
) -> Tuple[Tensor, Tensor, Tensor]:  # noqa: UP006
    gradients = token_mean.backward(grad, hidden, token_mask, weight, bias, needs[0], needs[1])
    return _unwrap(gradients, hidden)


@_token_mean.register_fake
def _(hidden: Any, token_mask: Any, weight: Any, bias: Any) -> Any:
    width = hidden.shape[2] if weight is None else weight.shape[0]
    return hidden.new_empty(hidden.shape[0], width, dtype=torch.promote_types(hidden.dtype, torch.float32))


@_token_mean_backward.register_fake
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
    d_hidden, d_weight, d_bias = _token_mean_backward(grad, hidden, token_mask, weight, bias, needs)
    return (
        d_hidden if need_hidden else None,
        None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
    )


_token_mean.register_autograd(_differentiate_token_mean, setup_context=_save_token_mean)


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


def _autocast(x: Tensor) -> Tensor:
    """x as autocast wants it, in the region's dtype; unchanged outside of such a region."""
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def _check_route(
    hidden: Tensor, parameters: RouterParameters, normalization: Normalization, token_mask: Tensor | None
) -> None:
    if hidden.dim() != 3:
        raise InputError(f"route: hidden: expected [B, N, d], found shape {tuple(hidden.shape)}")
    d, problems = hidden.shape[2], []
    T = parameters.output_bias.shape[0]
    width = d if parameters.hidden_weight is None else parameters.hidden_weight.shape[0]
    expected = {"output_weight": (T, width), "hidden_weight": (width, d), "hidden_bias": (width,)}
    for name, shape in expected.items():
        tensor = getattr(parameters, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    if not hidden.is_floating_point():
        problems.append(f"hidden: expected a floating dtype, found {hidden.dtype}")
    if parameters.hidden_weight is not None and parameters.output_weight is None:
        problems.append("output_weight: expected one behind the hidden layer, found none")
    if (parameters.hidden_weight is None) != (parameters.hidden_bias is None):
        problems.append("hidden_weight and hidden_bias: expected both or neither")
    if token_mask is not None and token_mask.shape != hidden.shape[:2]:
        problems.append(f"token_mask: expected [B, N] = {tuple(hidden.shape[:2])}, found {tuple(token_mask.shape)}")
    if normalization.top_k is not None and normalization.top_k > T:
        problems.append(f"top_k: expected at most T = {T}, found {normalization.top_k}")
    if problems:
        raise InputError.of("route", problems)


def _check_merged_linear(
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None,
    activation: str | None,
    strategy: str,
) -> None:
    problems = []
    if strategy not in STRATEGIES:
        problems.append(f"strategy: expected one of {', '.join(STRATEGIES)}, found {strategy!r}")
    if activation is not None and activation not in ACTIVATIONS:
        problems.append(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    dims = (
        ("x", x, 3, "[B, N, d]"),
        ("stack", stack, 3, "[1+T, h, d]"),
        ("routing_weights", routing_weights, 2, "[B, T]"),
    )
    for name, tensor, dim, expected in dims:
        if tensor.dim() != dim:
            problems.append(f"{name}: expected {expected}, found shape {tuple(tensor.shape)}")
    if problems:
        raise InputError.of("merged_linear", problems)
    B, _, d = x.shape
    T, h = stack.shape[0] - 1, stack.shape[1]
    if stack.shape[2] != d:
        problems.append(f"stack: expected [1+T, h, d] with d = {d} as in x, found {tuple(stack.shape)}")
    if d < 1:
        problems.append(f"x: expected at least one feature, found {tuple(x.shape)}")
    if T < 1:
        problems.append(f"stack: expected the base and at least one task vector, found {tuple(stack.shape)}")
    if routing_weights.shape[1] != T or routing_weights.shape[0] not in (B, 1):
        problems.append(f"routing_weights: expected [{B}, {T}] or [1, {T}], found {tuple(routing_weights.shape)}")
    if strategy == "shared" and B > 1 and routing_weights.shape[0] != 1:
        problems.append(
            f"routing_weights: strategy 'shared' expects one row for the whole batch, [1, {T}], found "
            f"{tuple(routing_weights.shape)}; use 'chunked' or 'auto'"
        )
    if bias is not None and tuple(bias.shape) != (1 + T, h):
        problems.append(f"bias: expected [{1 + T}, {h}], found {tuple(bias.shape)}")
    named = {"stack": stack, "bias": bias, "routing_weights": routing_weights}
    for name, other in named.items():
        if other is not None and other.device != x.device:
            problems.append(f"{name}: expected device {x.device} as x, found {other.device}")
    if not x.is_floating_point():
        problems.append(f"x: expected a floating dtype, found {x.dtype}")
    if not torch.is_autocast_enabled(x.device.type):
        for name, other in (("stack", stack), ("bias", bias)):
            if other is not None and other.dtype != x.dtype:
                problems.append(f"{name}: expected dtype {x.dtype} as x, found {other.dtype}")
    if problems:
        raise InputError.of("merged_linear", problems)
