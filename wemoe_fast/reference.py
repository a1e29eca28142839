"""WEMoE exactly as published: a loop over samples, each with weights of its own. The oracle of every test.

Tang et al., "Merging Multi-Task Models via Weight-Ensembling Mixture of Experts", ICML 2024,
arXiv 2402.00433, section 3. Works in any floating dtype, float64 included; slow on purpose.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import lookup
from .normalization import Normalization


def router_logits(hidden: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """r(h) for every token: [..., d] -> [..., T].

    ``parameters`` holds ``output_bias`` [T] alone (depth 0), with ``output_weight`` [T, m] (depth 1), and with
    ``hidden_weight`` [m, d] and ``hidden_bias`` [m] (depth 2).
    """
    if "output_weight" not in parameters:
        return parameters["output_bias"].expand(*hidden.shape[:-1], -1)
    if "hidden_weight" in parameters:
        hidden = F.relu(F.linear(hidden, parameters["hidden_weight"], parameters["hidden_bias"]))
    return F.linear(hidden, parameters["output_weight"], parameters["output_bias"])


def route(
    hidden: Tensor,
    parameters: dict[str, Tensor],
    normalization: Normalization = Normalization(),  # noqa: B008 (frozen)
    token_mask: Tensor | None = None,
) -> Tensor:
    """Routing weights [B, T]: per sample the mean over its (unmasked) tokens of r(h), normalised.

    ``hidden`` [B, N, d]; ``token_mask`` [B, N], true or nonzero where a token counts.
    """
    rows = []
    for b in range(hidden.shape[0]):
        tokens = hidden[b]
        if token_mask is not None:
            tokens = tokens[token_mask[b].bool()]
        if len(tokens) == 0:
            tokens = hidden.new_zeros(0, hidden.shape[-1])
            features = parameters.get("hidden_weight", hidden.new_zeros(hidden.shape[-1], 1)).shape[0]
            weight = parameters.get("output_weight")
            mean = parameters["output_bias"]
            if weight is not None:
                mean = F.linear(hidden.new_zeros(features), weight, parameters["output_bias"])
        else:
            mean = router_logits(tokens, parameters).mean(dim=0)
        rows.append(normalization(mean))
    return torch.stack(rows) if rows else hidden.new_zeros(0, len(parameters["output_bias"]))


def merge_weights(stack: Tensor, routing_weights: Tensor) -> Tensor:
    """W_b = W_0 + sum_t w_bt tau_t of one sample: stack [1+T, ...], routing_weights [T] -> [...]."""
    merged = stack[0]
    for weight, task_vector in zip(routing_weights, stack[1:], strict=True):
        merged = merged + weight * task_vector
    return merged


def merged_linear(
    x: Tensor,
    stack: Tensor,
    routing_weights: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y_b = act(x_b W_b^T + c_b), one sample after the other.

    x [B, N, d], stack [1+T, h, d], routing_weights [B, T] or [1, T], bias [1+T, h] -> [B, N, h].
    """
    routing_weights = routing_weights.to(x.dtype).expand(x.shape[0], -1)
    outputs = []
    for sample, weights in zip(x, routing_weights, strict=True):
        merged_bias = None if bias is None else merge_weights(bias, weights)
        outputs.append(F.linear(sample, merge_weights(stack, weights), merged_bias))
    y = torch.stack(outputs) if outputs else F.linear(x, stack[0])
    return lookup(activation or "none")(y)
