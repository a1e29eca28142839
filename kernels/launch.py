"""What every launcher needs: where samples lie, how they are routed, and in which dtype a kernel computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
import triton
from torch import Tensor

from .tuning import Problem, device_of, float32_precision

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True where kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1`` before the first import)."""


@dataclass(frozen=True)
class Batch:
    """Where the samples of a batch lie: padded [B, N, .], or packed one after the other in [total, .].

    ``tokens`` is N, or for packed samples the length of the longest. ``cu_seqlens`` [B + 1], packed only: sample
    b has the rows from cu_seqlens[b] to cu_seqlens[b + 1].
    """

    samples: int
    tokens: int
    cu_seqlens: Tensor | None = None
    total: int = 0

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> Batch:
        """Of x [B, N, .], or of x [total, .] with ``cu_seqlens``."""
        if cu_seqlens is None:
            return cls(x.shape[0], x.shape[1])
        return cls(cu_seqlens.shape[0] - 1, max_seqlen, cu_seqlens, x.shape[0])

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    def strides(self, x: Tensor) -> tuple[int, ...]:
        """(sample, token, feature) of x [B, N, .] or [total, .]."""
        return (0, *x.stride()) if self.packed else x.stride()


@dataclass(frozen=True)
class Routing:
    """Router logits [B, T] or [1, T] (shared by the batch), float32, and their normalisation (see ``Normalization``).

    ``nonzero``: a promise that of the weights themselves (``identity``) no sample has more than so many that are not
    zero. Where it is broken the merged linear is NaN.
    """

    logits: Tensor
    kind: str = "identity"
    temperature: float = 1.0
    top_k: int | None = None
    nonzero: int | None = None

    @property
    def experts(self) -> int:
        """T."""
        return self.logits.shape[1]

    @property
    def kept(self) -> int:
        """How many experts a sample has weights for, at most T."""
        return min(self.top_k or self.experts, self.nonzero or self.experts, self.experts)

    @property
    def stride(self) -> int:
        """From sample to sample; 0 where they share one row."""
        return 0 if self.logits.shape[0] == 1 else self.logits.stride(0)

    def slots(self, group: int) -> int:
        """How many different experts a group of samples may need."""
        return min(self.experts, group * self.kept)

    def constants(self) -> dict[str, Any]:
        """As a kernel takes them."""
        T = self.experts
        return {"T": T, "TP": triton.next_power_of_2(T), "KIND": self.kind, "TOP_K": min(self.top_k or T, T)}


def kernel_dtype(x: Tensor) -> torch.dtype:
    """That of x; float32 for bfloat16 in the interpreter, whose bfloat16 arithmetic is wrong."""
    return torch.float32 if INTERPRETED and x.dtype == torch.bfloat16 else x.dtype


@overload
def readable(tensor: Tensor) -> Tensor: ...
@overload
def readable(tensor: Tensor | None) -> Tensor | None: ...
def readable(tensor: Tensor | None) -> Tensor | None:
    """The tensor, or a float32 copy where the interpreter could not compute with it."""
    return tensor if tensor is None else tensor.to(kernel_dtype(tensor))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: make it that of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def problem(kernel: str, x: Tensor, stack: Tensor, batch: Batch, routing: Routing, gated: bool = False) -> Problem:
    """What the choice of a tile depends on, for x [B, N, K] and stack [1+T, H, K]."""
    return Problem.of(kernel, x, stack, batch.samples, batch.tokens, routing.kept, gated)


def router_problem(hidden: Tensor, width: int, batch: Batch) -> Problem:
    """The same for a router's hidden layer of this width."""
    return Problem(
        "router",
        device_of(hidden.device),
        hidden.dtype,
        samples=batch.samples,
        tokens=batch.tokens,
        rows=width,
        depth=hidden.shape[-1],
        element_size=hidden.element_size(),
        precision=float32_precision(hidden.dtype),
    )
