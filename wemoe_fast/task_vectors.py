"""The stack of one linear: base weights and task vectors, [1+T, h, d], base first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from . import ops
from .errors import InputError
from .linears import bias_of, weight_of
from .slabs import Linear


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> Tensor:
    """[1+T, ...]: base, then tau_t = theta_t - theta_0, subtracted in float32 or wider, kept in base's dtype."""
    wide = torch.promote_types(base.dtype, torch.float32)
    reference = base.detach().to(wide)
    return torch.stack([base.detach(), *((e.detach().to(wide) - reference).to(base.dtype) for e in experts)])


def expert_problems(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Every tensor of an expert that does not fit the base, or is not finite."""
    problems = []
    for name, tensor in base.items():
        problems += _nonfinite("base", name, tensor)
    for expert, tensors in experts.items():
        problems += [f"expert {expert!r}: {name} is missing" for name in base if name not in tensors]
        problems += [f"expert {expert!r}: {name} is not in the base" for name in tensors if name not in base]
        for name in base.keys() & tensors.keys():
            ours, theirs = base[name], tensors[name]
            if ours.shape != theirs.shape:
                problems.append(
                    f"expert {expert!r}: {name}: expected shape {tuple(ours.shape)} as in the base, "
                    f"found {tuple(theirs.shape)}"
                )
            elif ours.dtype != theirs.dtype and not (ours.is_floating_point() and theirs.is_floating_point()):
                problems.append(
                    f"expert {expert!r}: {name}: expected a dtype like {ours.dtype} of the base, found "
                    f"{theirs.dtype} (quantised?)"
                )
            elif ours.device != theirs.device:
                problems.append(f"expert {expert!r}: {name}: expected device {ours.device}, found {theirs.device}")
            else:
                problems += _nonfinite(f"expert {expert!r}", name, theirs)
    return problems


def check_experts(base: Mapping[str, Tensor], experts: Mapping[str, Mapping[str, Tensor]], subject: str) -> None:
    """Raise ``InputError`` with all of :func:`expert_problems`."""
    problems = expert_problems(base, experts) if experts else ["expected at least one expert, found none"]
    if problems:
        raise InputError.of(subject, problems)


def _nonfinite(owner: str, name: str, tensor: Tensor) -> list[str]:
    if not tensor.is_floating_point():
        return []
    count = int((~torch.isfinite(tensor)).sum())
    return [f"{owner}: {name}: expected finite numbers, found {count} NaN or infinite"] if count else []


class MergedLinear(nn.Module):
    """A linear layer that merges base and task vectors per sample; frozen.

    ``stack`` [1+T, h, d] and ``bias`` [1+T, h] (or None), base first, are parameters without gradient.
    """

    def __init__(self, stack: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.stack = nn.Parameter(stack, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @classmethod
    def from_linears(cls, base: nn.Module, experts: Sequence[nn.Module]) -> MergedLinear:
        """Stack one base linear and the same linear of T experts; shapes are the caller's to check."""
        biases = [bias for bias in map(bias_of, (base, *experts)) if bias is not None]
        bias = task_vectors(biases[0], biases[1:]) if biases else None
        return cls(task_vectors(weight_of(base), [weight_of(e) for e in experts]), bias)

    @classmethod
    def empty(cls, experts: int, out_features: int, in_features: int, bias: bool) -> MergedLinear:
        """The right shapes, uninitialised: to be filled from a checkpoint."""
        return cls(
            torch.empty(1 + experts, out_features, in_features),
            torch.empty(1 + experts, out_features) if bias else None,
        )

    @property
    def weight(self) -> Tensor:
        """The base's weight [h, d], for models that read dtype, device or shape of their linears."""
        return self.stack[0]

    @property
    def tensors(self) -> Linear:
        """(stack, bias), as ``ops.merged_mlp`` takes them."""
        return self.stack, self.bias

    def forward(
        self,
        x: Tensor,
        routing_weights: Tensor,
        activation: str | None = None,
        strategy: str = "auto",
        nonzero: int | None = None,
    ) -> Tensor:
        """x [B, N, d], routing_weights [B, T] or [1, T] -> [B, N, h]; see ``ops.merged_linear``."""
        return ops.merged_linear(x, self.stack, routing_weights, self.bias, activation, strategy, nonzero=nonzero)

    def extra_repr(self) -> str:
        experts, h, d = self.stack.shape
        return f"in_features={d}, out_features={h}, bias={self.bias is not None}, experts={experts - 1}"
