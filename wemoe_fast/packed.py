"""Packed batches: samples of different lengths one after the other in [total, d], with ``cu_seqlens``.

``cu_seqlens`` [B + 1] counts up from 0 to total: sample b has the rows from cu_seqlens[b] to cu_seqlens[b + 1].
"""

from __future__ import annotations

import torch
from torch import Tensor


def problems(x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> list[str]:
    """Everything about ``cu_seqlens`` that can be said without looking at its numbers."""
    found = []
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        found.append(f"cu_seqlens: expected [B + 1], found shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        found.append(f"cu_seqlens: expected int32 or int64, found {cu_seqlens.dtype}")
    if cu_seqlens.device != x.device:
        found.append(f"cu_seqlens: expected device {x.device} as x, found {cu_seqlens.device}")
    if max_seqlen is not None and max_seqlen < 0:
        found.append(f"max_seqlen: expected the length of the longest sample, found {max_seqlen}")
    return found


def check_lengths(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """Refuse numbers that do not fit, on a GPU without waiting for it (as a device-side assertion)."""
    lengths = cu_seqlens.diff()
    fine = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total) & ((lengths >= 0) & (lengths <= max_seqlen)).all()
    torch._assert_async(
        fine,
        f"cu_seqlens: expected numbers from 0 to {total} (the rows of x), never falling, with steps of at most "
        f"max_seqlen = {max_seqlen}",
    )


def longest(cu_seqlens: Tensor) -> int:
    """Length of the longest sample; waits for the GPU."""
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def positions(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """(sample, place in it) of every row [total]."""
    samples = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    sample = torch.repeat_interleave(samples, cu_seqlens.diff(), output_size=total)
    return sample, torch.arange(total, device=cu_seqlens.device) - cu_seqlens[sample]


def pad(x: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """[total, d] as [B, max_seqlen, d] with zeros behind each sample."""
    padded = x.new_zeros(cu_seqlens.shape[0] - 1, max_seqlen, *x.shape[1:])
    return padded.index_put(positions(cu_seqlens, x.shape[0]), x)


def unpad(padded: Tensor, cu_seqlens: Tensor, total: int) -> Tensor:
    """[B, max_seqlen, d] as [total, d]."""
    return padded[positions(cu_seqlens, total)]
