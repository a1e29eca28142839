"""From router logits to routing weights."""

from __future__ import annotations

from dataclasses import dataclass
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

    def __call__(self, logits: Tensor) -> Tensor:
        """Routing weights of logits [..., T]; T must be at least ``top_k``."""
        kept = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            chosen = logits.topk(self.top_k, dim=-1).indices
            kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, chosen, True)
        if self.kind == "softmax":
            scaled = logits / self.temperature
            if kept is not None:
                scaled = scaled.masked_fill(~kept, float("-inf"))
            return scaled.softmax(dim=-1)
        weights = logits.sigmoid() if self.kind == "sigmoid" else logits
        return weights if kept is None else weights.masked_fill(~kept, 0.0)

    def to_dict(self) -> dict[str, Any]:
        return {"normalization": self.kind, "temperature": self.temperature, "top_k": self.top_k}
