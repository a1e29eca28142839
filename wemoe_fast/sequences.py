"""An MLP merged once per sequence: for decoding, whose forwards use the same routing weights again and again.

Everywhere else no sample's weights are materialised. A decoding step reads a weight once and multiplies it with one
token: reading B merged weights costs less than base and T task vectors as long as there are few sequences.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import lookup
from .plan import compute_dtype
from .task_vectors import MergedLinear

MERGED_BYTES = 1 << 30
"""Upper bound of the weights that one generation keeps merged, all its layers together; layers that do not fit do
without."""
CPU_SEQUENCES = 2.0
"""So many sequences for each of base and task vectors, merged weights are faster on a CPU; see benchmarks/NOTES.md."""


class Budget:
    """Bytes that the layers of a generation share, first come first served."""

    def __init__(self, available: int) -> None:
        self.left = available

    def take(self, count: int) -> bool:
        """Whether there were so many bytes; they are gone then."""
        if count > self.left:
            return False
        self.left -= count
        return True


class SequenceMLP:
    """The MLPs of B sequences, or the one that they share: weights [B, h, d], merged once.

    Args:
        linears: "up", "down" and perhaps "gate".
        activation: see ``wemoe_fast.activations``.
        weights: routing weights [B, T] or [1, T].
        dtype: of the merged weights and the products.
    """

    def __init__(
        self, linears: Mapping[str, MergedLinear], activation: str, weights: Tensor, dtype: torch.dtype
    ) -> None:
        self.activation, self.dtype = lookup(activation), dtype
        self.stacks = {role: _merge(linear.stack, weights, dtype) for role, linear in linears.items()}
        self.biases = {
            role: None if linear.bias is None else _merge(linear.bias, weights, dtype)
            for role, linear in linears.items()
        }

    @classmethod
    def build(
        cls, linears: Mapping[str, MergedLinear], activation: str, weights: Tensor, x: Tensor, budget: Budget
    ) -> SequenceMLP | None:
        """For hidden states like x; None where it does not pay or the budget does not hold it."""
        dtype, (rows, experts) = compute_dtype(x), weights.shape
        if rows > (CPU_SEQUENCES if x.device.type == "cpu" else 1.0) * (1 + experts):
            return None
        numbers = sum(linear.stack[0].numel() for linear in linears.values())
        return cls(linears, activation, weights, dtype) if budget.take(rows * numbers * dtype.itemsize) else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, N, d] -> [B, N, out], in the dtype of x."""
        given = x.to(self.dtype)
        if "gate" in self.stacks:
            hidden = self.activation(self._linear("gate", given)) * self._linear("up", given)
        else:
            hidden = self.activation(self._linear("up", given))
        return self._linear("down", hidden).to(x.dtype)

    def _linear(self, role: str, x: Tensor) -> Tensor:
        stack, bias = self.stacks[role], self.biases[role]
        if stack.shape[0] == 1:
            return F.linear(x, stack[0], None if bias is None else bias[0])
        return torch.bmm(x, stack.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, stack.mT)


def _merge(stack: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Merged [B, ...] of stack [1+T, ...], summed in float32 or wider."""
    wide = torch.promote_types(torch.promote_types(stack.dtype, dtype), torch.float32)
    ones = [1] * (stack.dim() - 1)
    merged = stack[0].to(wide).repeat(weights.shape[0], *ones).view(-1, *stack.shape[1:])
    for weight, task_vector in zip(weights.to(wide).unbind(dim=1), stack[1:], strict=True):
        merged.addcmul_(weight.view(-1, *ones), task_vector.to(wide).unsqueeze(0))
    return merged.to(dtype)
