"""The routing weights that prompts fix for a generation: one object per layer, filled by the first forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .errors import InputError
from .sequences import Budget, SequenceMLP

ROUTINGS = ("prompt", "step")
"""How a layer routes while a model generates: by the prompt, or every forward by the tokens it is given."""


def check_routing(value: str) -> str:
    """``value``, or InputError where it is none of ROUTINGS."""
    if value not in ROUTINGS:
        raise InputError(f"decode_routing: expected one of {', '.join(ROUTINGS)}, found {value!r}")
    return value


class PromptWeights:
    """Routing weights of the prompts at one layer, for all forwards of a generation. A copy of the layer has none.

    Args:
        tokens: how many tokens of the first forward are the prompt; all unless given.
        mask: [b, n], true or nonzero at the tokens of a prompt that count, for forwards whose own mask does not
            reach the layer; a row stands for as many sequences as the first forward has of it.
        budget: for keeping merged weights; None once it has been asked, or for none.

    Attributes:
        weights: [B, T], or [1, T] shared by the batch; None before the first forward.
        mlp: the MLPs of these weights, merged, where they are kept.
        thread: the thread that generates.
    """

    def __init__(self, tokens: int | None = None, mask: Tensor | None = None, budget: Budget | None = None) -> None:
        self.tokens, self.mask, self.budget = tokens, mask, budget
        self.mlp: SequenceMLP | None = None
        self.weights: Tensor | None = None
        self.thread = 0

    def of(self, x: Tensor, mask: Tensor | None, route: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        """The weights for x [B, N, d]: those of the first call, which are ``route(prompt, its mask)``."""
        if self.weights is None:
            tokens = x.shape[1] if self.tokens is None else self.tokens
            if x.shape[1] < tokens:
                raise InputError(
                    f"generation: expected the prompts, {tokens} tokens, in one forward, found {x.shape[1]}; "
                    "prompts in chunks need decode_routing = 'step'"
                )
            if mask is None and self.mask is not None:
                mask = self.mask.repeat_interleave(x.shape[0] // max(1, self.mask.shape[0]), dim=0).to(x.device)
            weights = route(x[:, :tokens], None if mask is None else mask[:, :tokens])
            # Beams and samples of one prompt: one weight for all of them.
            comparable = len(weights) > 1 and not (torch.is_grad_enabled() or torch.compiler.is_compiling())
            alike = comparable and bool((weights == weights[:1]).all())
            self.weights = weights[:1] if alike else weights
        elif self.weights.shape[0] not in (1, x.shape[0]):
            raise InputError(
                f"generation: expected the {self.weights.shape[0]} sequences whose prompts fixed the routing weights, "
                f"found {x.shape[0]}; decode all of them, or set decode_routing = 'step'"
            )
        return self.weights

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()
