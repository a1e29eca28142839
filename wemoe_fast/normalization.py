"""From router logits to routing weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError

KINDS = ("identity", "softmax", "sigmoid")


@dataclass(frozen=True)
class Normalization:
    """How router logits [B, T] become routing weights [B, T].

    ``identity`` is WEMoE as published (the logits are the weights, of any sign and sum); ``softmax`` divides
    the logits by ``temperature`` first; ``sigmoid`` weighs every expert on its own. With ``top_k`` the k
    experts with the largest logits keep a weight (softmax is taken over those k), all others get exactly 0.
    """

    kind: str = "identity"
    temperature: float = 1.0
    top_k: int | None = None
    code: str = field(init=False, repr=False, compare=False)
    """The three in one word, for operators that take plain values; ``parse`` reads it."""

    def __post_init__(self) -> None:
        problems = []
        if self.kind not in KINDS:
            problems.append(f"kind: expected one of {', '.join(KINDS)}, found {self.kind!r}")
        if not self.temperature > 0:
            problems.append(f"temperature: expected a number above 0, found {self.temperature}")
        if self.temperature != 1.0 and self.kind != "softmax":
            problems.append(f"temperature: only softmax has one, found {self.temperature} with {self.kind!r}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k: expected at least 1, found {self.top_k}")
        if problems:
            raise InputError.of("router normalisation", problems)
        object.__setattr__(self, "code", f"{self.kind}:{float(self.temperature)!r}:{self.top_k or 0}")

    @classmethod
    def parse(cls, code: str) -> Normalization:
        """The normalisation with this ``code``."""
        kind, temperature, top_k = code.split(":")
        return cls(kind, float(temperature), int(top_k) or None)

    def __call__(self, logits: Tensor) -> Tensor:
        """Routing weights of logits [..., T]; T must be at least ``top_k``."""
        kept = self.kept(logits)
        if self.kind == "softmax":
            scaled = logits / self.temperature
            if kept is not None:
                scaled = scaled.masked_fill(~kept, float("-inf"))
            return scaled.softmax(dim=-1)
        weights = logits.sigmoid() if self.kind == "sigmoid" else logits
        return weights if kept is None else weights.masked_fill(~kept, 0.0)

    def backward(self, logits: Tensor, d_weights: Tensor) -> Tensor:
        """Gradient of the logits from that of the routing weights, both [..., T]."""
        weights = self(logits)
        if self.kind == "softmax":
            return weights * (d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)) / self.temperature
        if self.kind == "sigmoid":
            return weights * (1 - weights) * d_weights
        kept = self.kept(logits)
        return d_weights if kept is None else d_weights.masked_fill(~kept, 0.0)

    def kept(self, logits: Tensor) -> Tensor | None:
        """Which experts keep a weight [..., T], None for all: among equal logits those with the lower index."""
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return None
        chosen = logits.argsort(dim=-1, descending=True, stable=True)[..., : self.top_k]
        return torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)

    def to_dict(self) -> dict[str, Any]:
        return {"normalization": self.kind, "temperature": self.temperature, "top_k": self.top_k}
