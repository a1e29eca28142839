"""What the operations refuse: every argument that does not fit, all at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import packed
from .activations import ACTIVATIONS
from .errors import InputError
from .normalization import Normalization
from .plan import STRATEGIES

if TYPE_CHECKING:
    from .ops import RouterParameters


def check_route(
    hidden: Tensor,
    parameters: RouterParameters,
    normalization: Normalization,
    token_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Arguments of ``ops.route``."""
    layout, dim = ("[B, N, d]", 3) if cu_seqlens is None else ("[total, d]", 2)
    if hidden.dim() != dim:
        raise InputError(f"route: hidden: expected {layout}, found shape {tuple(hidden.shape)}")
    d = hidden.shape[-1]
    problems = [] if cu_seqlens is None else packed.problems(hidden, cu_seqlens, max_seqlen)
    T = parameters.output_bias.shape[0]
    width = d if parameters.hidden_weight is None else parameters.hidden_weight.shape[0]
    expected = {"output_weight": (T, width), "hidden_weight": (width, d), "hidden_bias": (width,)}
    for name, shape in expected.items():
        tensor = getattr(parameters, name)
        if tensor is not None and tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected shape {shape}, found {tuple(tensor.shape)}")
    for name, tensor in parameters.to_dict().items():
        if tensor.device != hidden.device:
            problems.append(f"{name}: expected device {hidden.device} as hidden, found {tensor.device}")
    if not hidden.is_floating_point():
        problems.append(f"hidden: expected a floating dtype, found {hidden.dtype}")
    if parameters.hidden_weight is not None and parameters.output_weight is None:
        problems.append("output_weight: expected one behind the hidden layer, found none")
    if (parameters.hidden_weight is None) != (parameters.hidden_bias is None):
        problems.append("hidden_weight and hidden_bias: expected both or neither")
    if token_mask is not None and token_mask.shape != hidden.shape[:-1]:
        names = "[B, N]" if cu_seqlens is None else "[total]"
        problems.append(f"token_mask: expected {names} = {tuple(hidden.shape[:-1])}, found {tuple(token_mask.shape)}")
    if token_mask is not None and token_mask.device != hidden.device:
        problems.append(f"token_mask: expected device {hidden.device} as hidden, found {token_mask.device}")
    if normalization.top_k is not None and normalization.top_k > T:
        problems.append(f"top_k: expected at most T = {T}, found {normalization.top_k}")
    if problems:
        raise InputError.of("route", problems)


def check_merged_linear(
    x: Tensor,
    stacks: dict[str, Tensor],
    routing_weights: Tensor,
    biases: dict[str, Tensor | None],
    activation: str | None,
    strategy: str,
    normalization: Normalization,
    nonzero: int | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    subject: str = "merged_linear",
) -> None:
    """Arguments of ``ops.merged_linear``, or of ``ops.merged_gated_linear`` with its two stacks and biases."""
    problems = []
    if strategy not in STRATEGIES:
        problems.append(f"strategy: expected one of {', '.join(STRATEGIES)}, found {strategy!r}")
    if activation is not None and activation not in ACTIVATIONS:
        problems.append(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {activation!r}")
    layout, dim = ("[B, N, d]", 3) if cu_seqlens is None else ("[total, d]", 2)
    expected = [("x", x, dim, layout), *((name, stack, 3, "[1+T, h, d]") for name, stack in stacks.items())]
    for name, tensor, dims, shape in [*expected, ("routing_weights", routing_weights, 2, "[B, T]")]:
        if tensor.dim() != dims:
            problems.append(f"{name}: expected {shape}, found shape {tuple(tensor.shape)}")
    if cu_seqlens is not None:
        problems += packed.problems(x, cu_seqlens, max_seqlen)
    elif max_seqlen is not None:
        problems.append("max_seqlen: expected only with cu_seqlens")
    if problems:
        raise InputError.of(subject, problems)
    B = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    d = x.shape[-1]
    first = next(iter(stacks.values()))
    T, h = first.shape[0] - 1, first.shape[1]
    for name, stack in stacks.items():
        if stack.shape[2] != d:
            problems.append(f"{name}: expected [1+T, h, d] with d = {d} as in x, found {tuple(stack.shape)}")
        elif stack.shape != first.shape:
            problems.append(
                f"{name}: expected the shape of the other, {tuple(first.shape)}, found {tuple(stack.shape)}"
            )
    if d < 1:
        problems.append(f"x: expected at least one feature, found {tuple(x.shape)}")
    if T < 1:
        problems.append(f"stack: expected the base and at least one task vector, found {tuple(first.shape)}")
    if routing_weights.shape[1] != T or routing_weights.shape[0] not in (B, 1):
        problems.append(f"routing_weights: expected [{B}, {T}] or [1, {T}], found {tuple(routing_weights.shape)}")
    if strategy == "shared" and B > 1 and routing_weights.shape[0] != 1:
        problems.append(
            f"routing_weights: strategy 'shared' expects one row for the whole batch, [1, {T}], found "
            f"{tuple(routing_weights.shape)}; use 'chunked' or 'auto'"
        )
    for name, count in (("top_k", normalization.top_k), ("nonzero", nonzero)):
        if count is not None and not 1 <= count <= max(1, T):
            problems.append(f"{name}: expected 1 to T = {T}, found {count}")
    for name, bias in biases.items():
        if bias is not None and tuple(bias.shape) != (1 + T, h):
            problems.append(f"{name}: expected [{1 + T}, {h}], found {tuple(bias.shape)}")
    named = {**stacks, **biases}
    for name, other in {**named, "routing_weights": routing_weights}.items():
        if other is not None and other.device != x.device:
            problems.append(f"{name}: expected device {x.device} as x, found {other.device}")
    if not x.is_floating_point():
        problems.append(f"x: expected a floating dtype, found {x.dtype}")
    if not routing_weights.is_floating_point():
        problems.append(f"routing_weights: expected a floating dtype, found {routing_weights.dtype}")
    if not torch.is_autocast_enabled(x.device.type):
        for name, other in named.items():
            if other is not None and other.dtype != x.dtype:
                problems.append(f"{name}: expected dtype {x.dtype} as x, found {other.dtype}")
    if problems:
        raise InputError.of(subject, problems)
