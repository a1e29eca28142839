"""What counts as a linear layer: ``nn.Linear``, and GPT-2's Conv1D, which stores its weight transposed."""

from __future__ import annotations

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """True for layers that compute x W^T + b from parameters ``weight`` and ``bias`` alone."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """True for transformers' Conv1D, known by what it holds: ``weight`` [in, out], ``bias`` [out], ``nf`` = out."""
    if isinstance(module, nn.Linear) or not isinstance(getattr(module, "nf", None), int) or module._modules:
        return False
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        len(module._parameters) == 2
        and weight is not None
        and bias is not None
        and weight.dim() == 2
        and (module.nf,) == tuple(bias.shape) == tuple(weight.shape[1:])
    )


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as [out, in], the layer's own memory."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(linear) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias [out], the layer's own, or None."""
    return linear._parameters.get("bias")


def sizes(linear: nn.Module) -> tuple[int, int]:
    """Numbers of features: in, out."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    rows, columns = weight_of(linear).shape
    return columns, rows
