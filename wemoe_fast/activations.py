"""The activations an MLP may have, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from wemoe_fast.errors import InputError


def _none(x: Tensor) -> Tensor:
    return x


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _none,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "mish": F.mish,
}
"""Elementwise, any shape, floating dtype kept. "gelu" is the exact one (erf)."""


def lookup(name: str) -> Callable[[Tensor], Tensor]:
    """The activation of this name; InputError lists the known names."""
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise InputError(f"activation: expected one of {', '.join(ACTIVATIONS)}; found {name!r}") from None
