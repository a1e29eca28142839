"""Tensors of experts as their models would hold them: stored values, and what a low-rank adapter adds to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .headers import TensorEntry, read_columns, read_tensor

BLOCK = 1 << 16
"""Elements of a product that are summed up at once, so that they stay in a core's cache."""


@dataclass(frozen=True)
class LowRank:
    """``scaling * B A``, added to a tensor W that is seen as a matrix [out, in], or stored [in, out].

    Attributes:
        a: A, [r, in]; None stands for a single 1, where a bias is added to a bias.
        b: B, [out, r].
        scaling: alpha / r, or what the adapter has instead.
        transposed: W is stored [in, out].
    """

    a: TensorEntry | None
    b: TensorEntry
    scaling: float
    transposed: bool = False

    @property
    def result(self) -> TensorEntry:
        """Stands for what W becomes where a number in it is not finite."""
        return replace(self.b, name=f"base + scaling * B A, with B {self.b.name}")

    @property
    def workspace_bytes(self) -> int:
        """What reading and widening A and B takes, at most."""
        numbers = self.b.numel + (1 if self.a is None else self.a.numel)
        return 3 * 8 * numbers

    def rows(self, first: int, count: int, dtype: torch.dtype, *, transposed: bool = False) -> Tensor:
        """Rows [first, first + count) of what is added to W, or to W^T: [count, columns], computed in ``dtype``.

        The sum over the rank has one order, so that the bits depend neither on the rows asked for nor on a BLAS.
        """
        if self.transposed == transposed:  # rows of B A
            rank = self.b.shape[1]
            left = read_tensor(self.b, first * rank, count * rank).view(count, rank)
            right = torch.ones(1, 1) if self.a is None else read_tensor(self.a)
        else:  # rows of its transpose
            assert self.a is not None
            left, right = read_columns(self.a, first, count).t(), read_tensor(self.b).t()
        return _product(left.to(dtype), right.to(dtype).contiguous()).mul_(self.scaling)

    def elements(self, first: int, count: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Elements [first, first + count), row-major, of what is added to W, whose rows have ``columns``: [count]."""
        start, end = first // columns, -(-(first + count) // columns)
        found = self.rows(start, end - start, dtype).view(-1)
        return found[first - start * columns :][:count]


@dataclass(frozen=True)
class Operand:
    """A tensor of an expert: what is stored, in the dtype in which the expert's model holds it, and what is added."""

    entry: TensorEntry
    dtype: torch.dtype
    update: LowRank | None = None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left [n, r] times right [r, m]: [n, m], multiplied and added one after the other, as no BLAS promises."""
    total = left.new_zeros(left.shape[0], right.shape[1])
    step = max(1, BLOCK // max(1, right.shape[1]))
    for start in range(0, len(total), step):
        block = total[start : start + step]
        term = torch.empty_like(block)
        for k in range(left.shape[1]):
            torch.mul(left[start : start + step, k : k + 1], right[k], out=term)
            block += term
    return total
