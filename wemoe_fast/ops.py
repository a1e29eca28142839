"""The operations of WEMoE: ``route``, ``merged_linear`` and its gated form.

They work under ``torch.compile(fullgraph=True)``, ``torch.export``, autocast, ``inference_mode``, activation
checkpointing and CUDA graphs (see ``operators`` for how they are registered). No per-sample weight is ever
materialised, forward or backward; backward keeps the inputs alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import operators, packed, reference
from .activations import lookup
from .checks import check_merged_linear, check_route
from .normalization import Normalization
from .slabs import Linear

IDENTITY = Normalization()


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

    def to_dict(self) -> dict[str, Tensor]:
        names = ("output_bias", "output_weight", "hidden_weight", "hidden_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def route(
    hidden: Tensor,
    parameters: RouterParameters,
    normalization: Normalization = IDENTITY,
    token_mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Routing weights [B, T] of hidden states [B, N, d]; [1, T], shared by the batch, for depth 0.

    The mean over tokens of the router's output, normalised: ``w_b = norm(mean_n r(h_bn))`` (paper, eq. 5).
    Only tokens where ``token_mask`` [B, N] is true (or nonzero) count. Samples of different lengths may be packed:
    hidden [total, d], token_mask [total], ``cu_seqlens`` and ``max_seqlen`` as in ``merged_linear``. Result and last
    layer are in float32 (float64 where hidden is), whatever the dtype of hidden. Raises ``InputError`` for what does
    not fit.
    """
    check_route(hidden, parameters, normalization, token_mask, cu_seqlens, max_seqlen)
    total = torch.promote_types(hidden.dtype, torch.float32)
    if parameters.output_weight is None:
        return normalization(parameters.output_bias.to(total).unsqueeze(0))
    max_seqlen = _packed(hidden, cu_seqlens, max_seqlen)
    hidden, mask = _autocast(hidden), None if token_mask is None else token_mask.bool()
    if not _learning(hidden, *parameters.to_dict().values()):
        return operators.route(
            hidden,
            mask,
            parameters.hidden_weight,
            parameters.hidden_bias,
            parameters.output_weight,
            parameters.output_bias,
            normalization.code,
            cu_seqlens,
            max_seqlen,
        )
    if cu_seqlens is not None:
        hidden, mask = operators.pad_with_mask(hidden, mask, cu_seqlens, max_seqlen)
    mean = operators.token_mean(hidden, mask, parameters.hidden_weight, parameters.hidden_bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return operators.last_layer(mean, parameters.output_weight, parameters.output_bias, normalization)


def merged_linear(
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
    *,
    normalization: Normalization = IDENTITY,
    nonzero: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """y_b = act(x_b (W_0 + sum_t w_bt tau_t)^T + c_0 + sum_t w_bt gamma_t) (paper, eq. 6 and 7).

    Args:
        x: [B, N, d], any strides; B or N may be 0. With ``cu_seqlens`` [total, d].
        stack: [1+T, h, d], the base weight first, then T task vectors, in the dtype of ``x`` (under autocast
            any floating dtype: slabs are converted as they are merged).
        routing_weights: [B, T], or [1, T] shared by the whole batch; kept in float32 or wider. Not finite: the
            results of that sample are not finite either.
        bias: [1+T, h], base first, or None.
        activation: a name in ``wemoe_fast.activations.ACTIVATIONS``, or None.
        strategy: ``auto`` (see ``wemoe_fast.plan``), ``shared``, ``chunked``, ``fused`` (Triton, on a GPU), ``native``
            (compiled C, on a CPU), ``factored``, or ``reference``, the paper's loop over samples. All give the same
            result to rounding.
        normalization: ``routing_weights`` are router logits, normalised like this on the way.
        nonzero: a promise that no sample has more than so many routing weights that are not zero: the rest is
            skipped on a GPU. NaN where the promise is broken and was relied on. ``normalization.top_k`` implies it.
        cu_seqlens: [B + 1], int32 or int64: samples of different lengths, packed one after the other; sample b has
            the rows from cu_seqlens[b] to cu_seqlens[b + 1] of x.
        max_seqlen: length of the longest packed sample; where it is not given a GPU has to be waited for.

    Returns:
        [B, N, h], or [total, h], in the dtype of ``x``. Differentiable in x, stack, routing_weights and bias.

    Raises:
        InputError: all shapes, dtypes, devices and names that do not fit, at once.
        RuntimeError: numbers in ``cu_seqlens`` that do not fit (on a GPU as a device-side assertion).
    """
    x = _autocast(x)
    check_merged_linear(
        x, {"stack": stack}, routing_weights, {"bias": bias}, activation, strategy, normalization, nonzero,
        cu_seqlens, max_seqlen,
    )  # fmt: skip
    max_seqlen = _packed(x, cu_seqlens, max_seqlen)
    activation = activation or "none"
    if strategy == "reference":
        return _reference(x, stack, normalization(routing_weights), bias, activation, cu_seqlens, max_seqlen)
    # The activation's own backward needs the product, so it is left to autograd.
    inside = "none" if _learning(x, stack, routing_weights, bias) else activation
    y = operators.merged_linear(
        x, stack, routing_weights, bias, inside, strategy, normalization.code, nonzero, cu_seqlens, max_seqlen
    )
    return y if inside == activation else lookup(activation)(y)


def merged_gated_linear(
    x: Tensor,
    gate_stack: Tensor,
    up_stack: Tensor,
    routing_weights: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str | None = None,
    strategy: str = "auto",
    *,
    normalization: Normalization = IDENTITY,
    nonzero: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """act(x_b G_b^T + e_b) * (x_b U_b^T + c_b): two merged linears of one shape, in one pass where nothing is learnt.

    Arguments, result and errors as in ``merged_linear``; both biases or none.
    """
    learning = _learning(x, gate_stack, up_stack, routing_weights, gate_bias, up_bias)
    x = _autocast(x)
    check_merged_linear(
        x, {"gate_stack": gate_stack, "up_stack": up_stack}, routing_weights,
        {"gate_bias": gate_bias, "up_bias": up_bias}, activation, strategy, normalization, nonzero,
        cu_seqlens, max_seqlen, subject="merged_gated_linear",
    )  # fmt: skip
    max_seqlen = _packed(x, cu_seqlens, max_seqlen)
    if learning or strategy == "reference" or (gate_bias is None) != (up_bias is None):

        def linear(stack: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
            return merged_linear(
                x, stack, routing_weights, bias, activation, strategy, normalization=normalization, nonzero=nonzero,
                cu_seqlens=cu_seqlens, max_seqlen=None if cu_seqlens is None else max_seqlen,
            )  # fmt: skip

        return linear(gate_stack, gate_bias, activation) * linear(up_stack, up_bias, None)
    return operators.merged_gated_linear(
        x, gate_stack, up_stack, routing_weights, gate_bias, up_bias, activation or "none", strategy,
        normalization.code, nonzero, cu_seqlens, max_seqlen,
    )  # fmt: skip


def merged_mlp(
    x: Tensor,
    up: Linear,
    down: Linear,
    routing_weights: Tensor,
    gate: Linear | None = None,
    activation: str | None = None,
    strategy: str = "auto",
    *,
    nonzero: int | None = None,
) -> Tensor:
    """down(act(up(x))), with a gate down(act(gate(x)) * up(x)), every linear merged with the same routing weights.

    The same as one ``merged_linear`` (``merged_gated_linear``) after the other. Where nothing is learnt and the CPU
    kernels run, no more of the hidden states exists at a time than fits a constant workspace.

    Args:
        x: [B, N, d].
        up, gate: stack [1+T, h, d] and bias [1+T, h] or None.
        down: stack [1+T, d', h] and bias [1+T, d'] or None.
        routing_weights, activation, strategy, nonzero: as in ``merged_linear``.

    Returns:
        [B, N, d'] in the dtype of x.

    Raises:
        InputError: all shapes, dtypes, devices and names of up and gate, or of down, that do not fit, at once.
    """
    tensors = (x, routing_weights, *up, *down, *(gate or ()))
    whole = strategy in ("auto", "native") and x.device.type == "cpu" and not _learning(*tensors)
    if not whole:
        if gate is None:
            hidden = merged_linear(x, up[0], routing_weights, up[1], activation, strategy, nonzero=nonzero)
        else:
            hidden = merged_gated_linear(
                x, gate[0], up[0], routing_weights, gate[1], up[1], activation, strategy, nonzero=nonzero
            )
        return merged_linear(hidden, down[0], routing_weights, down[1], None, strategy, nonzero=nonzero)
    x = _autocast(x)
    first = {"up": up} if gate is None else {"gate": gate, "up": up}
    hidden = x.new_empty(()).expand(*x.shape[:-1], up[0].shape[-2])
    for tokens, linears in ((x, first), (hidden, {"down": down})):
        stacks = {f"{name} stack": stack for name, (stack, _) in linears.items()}
        biases = {f"{name} bias": bias for name, (_, bias) in linears.items()}
        check_merged_linear(
            tokens, stacks, routing_weights, biases, activation, strategy, IDENTITY, nonzero, None, None, "merged_mlp"
        )
    gate_stack, gate_bias = gate or (None, None)
    return operators.merged_mlp(
        x, up[0], down[0], routing_weights, up[1], down[1], gate_stack, gate_bias, activation or "none", strategy,
        nonzero,
    )  # fmt: skip


def _learning(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of them."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _packed(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """Length of the longest packed sample, checked; 0 where the batch is padded."""
    if cu_seqlens is None:
        return 0
    if max_seqlen is None:
        max_seqlen = packed.longest(cu_seqlens)
    packed.check_lengths(cu_seqlens, x.shape[0], max_seqlen)
    return max_seqlen


def _reference(
    x: Tensor,
    stack: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    activation: str,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> Tensor:
    tokens = x if cu_seqlens is None else packed.pad(x, cu_seqlens, max_seqlen)
    if not tokens.shape[0]:
        y = F.linear(x, stack[0].to(x.dtype))
    elif not torch.is_autocast_enabled(x.device.type):
        y = reference.merged_linear(tokens, stack, weights, bias, activation)
    else:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if bias is None else bias.to(x.dtype)
            y = reference.merged_linear(tokens, stack.to(x.dtype), weights, bias, activation)
    return y if cu_seqlens is None else packed.unpad(y, cu_seqlens, x.shape[0])


def _autocast(x: Tensor) -> Tensor:
    """x as autocast wants it, in the region's dtype; unchanged outside of such a region."""
    kind = x.device.type
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
