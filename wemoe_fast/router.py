"""The router: routing weights of every sample from its hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .normalization import Normalization


class Router(nn.Module):
    """WEMoE's router (paper, section 3.2): depth 0 (a constant), 1 (``W h + c``) or 2 (``W2 relu(W1 h + c1) + c2``).

    Published initialisation: weights N(0, 0.01), hidden bias 0, last bias ``init_lambda``: a fresh router is
    close to task arithmetic with that coefficient.

    Args:
        in_features: d of the hidden states.
        num_experts: T.
        depth: 0, 1 or 2.
        init_lambda: initial routing weight (before normalisation).
        normalization, temperature, top_k: see ``Normalization``.
        batch_reduce: average the routing weights over the batch, so that all its samples share them.
        hidden_features: width of the hidden layer (depth 2); ``in_features`` unless given.
    """

    prefix: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        depth: int = 2,
        init_lambda: float = 0.3,
        normalization: str = "identity",
        temperature: float = 1.0,
        top_k: int | None = None,
        batch_reduce: bool = False,
        hidden_features: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        problems = []
        if depth not in (0, 1, 2):
            problems.append(f"depth: expected 0, 1 or 2, found {depth}")
        if num_experts < 1:
            problems.append(f"num_experts: expected at least 1, found {num_experts}")
        if top_k is not None and top_k > num_experts:
            problems.append(f"top_k: expected at most {num_experts} (the experts), found {top_k}")
        if problems:
            raise InputError.of("router", problems)
        self.in_features, self.num_experts, self.depth = in_features, num_experts, depth
        self.normalization = Normalization(normalization, temperature, top_k)
        self.batch_reduce = batch_reduce
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        width = (hidden_features or in_features) if depth == 2 else in_features
        self.hidden = nn.Linear(in_features, width, **options) if depth == 2 else None
        self.output = nn.Linear(width, num_experts, **options) if depth > 0 else None
        self.constant = nn.Parameter(torch.empty(num_experts, **options)) if depth == 0 else None
        self.register_buffer("prefix", None)
        self.reset_parameters(init_lambda)

    @classmethod
    def around(
        cls,
        *,
        hidden: nn.Linear | None = None,
        output: nn.Linear | None = None,
        constant: nn.Parameter | None = None,
        prefix: Tensor | None = None,
        in_features: int | None = None,
        batch_reduce: bool = False,
    ) -> Router:
        """A router over layers that exist already, shared and not copied: whoever trains one trains the other.

        ``prefix`` is a constant vector that stands before every token's features in the input of the first
        layer, such as the encoding of the layer's index where one router serves all layers. ``in_features``
        is for depth 0, which has no layer to tell.
        """
        first = hidden or output
        depth = 0 if output is None else 1 if hidden is None else 2
        experts = constant if constant is not None else output.bias if output is not None else None
        assert experts is not None
        if in_features is None:
            in_features = 0 if first is None else first.in_features - (0 if prefix is None else prefix.numel())
        router = cls(in_features, experts.numel(), depth=depth, batch_reduce=batch_reduce, device="meta")
        router.hidden, router.output, router.constant = hidden, output, constant
        router.register_buffer("prefix", None if prefix is None or first is None else prefix.to(first.weight.device))
        return router

    def reset_parameters(self, init_lambda: float) -> None:
        """The published initialisation."""
        with torch.no_grad():
            if self.constant is not None:
                self.constant.fill_(init_lambda)
            if self.hidden is not None:
                nn.init.normal_(self.hidden.weight, std=0.01)
                nn.init.zeros_(self.hidden.bias)
            if self.output is not None:
                nn.init.normal_(self.output.weight, std=0.01)
                nn.init.constant_(self.output.bias, init_lambda)

    def parameters_for_routing(self) -> ops.RouterParameters:
        """The tensors ``ops.route`` takes. A constant ``prefix`` of the input is folded into the first bias."""
        if self.constant is not None:
            return ops.RouterParameters(self.constant)
        assert self.output is not None
        first = self.output if self.hidden is None else self.hidden
        weight: Tensor = first.weight
        bias: Tensor = first.bias
        if self.prefix is not None:
            known = self.prefix.numel()
            bias = bias + weight[:, :known] @ self.prefix.to(weight.dtype)
            weight = weight[:, known:]
        if self.hidden is None:
            return ops.RouterParameters(bias, weight)
        return ops.RouterParameters(self.output.bias, self.output.weight, weight, bias)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Routing weights [B, T] of hidden_states [B, N, d], or [1, T] where the whole batch shares them.

        Only tokens where ``token_mask`` [B, N] is true count. In float32 (float64 for float64 inputs).
        """
        weights = ops.route(hidden_states, self.parameters_for_routing(), self.normalization, token_mask)
        return weights.mean(dim=0, keepdim=True) if self.batch_reduce else weights

    def extra_repr(self) -> str:
        norm = self.normalization
        parts = [f"depth={self.depth}", f"in_features={self.in_features}", f"num_experts={self.num_experts}"]
        parts.append(f"normalization={norm.kind!r}")
        if norm.temperature != 1.0:
            parts.append(f"temperature={norm.temperature}")
        if norm.top_k is not None:
            parts.append(f"top_k={norm.top_k}")
        if self.batch_reduce:
            parts.append("batch_reduce=True")
        return ", ".join(parts)
