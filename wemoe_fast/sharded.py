"""Safetensors written piece by piece: headers first, then every tensor at its place, never a whole file in memory.

The bytes are those of ``safetensors.torch.save_file``.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from .headers import DTYPES, INDEX_FILE, WEIGHTS_FILE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}

Piece = tuple[int, Tensor]
"""Where in a tensor, counted in elements, and contiguous elements to put there."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Shard:
    """One file: its header and, in the order of their places, its tensors."""

    file: str
    header: bytes
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Iterable[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Spread tensors, in their order, over files of at most ``max_shard_bytes`` of data (one tensor may exceed it)."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return [_shard(WEIGHTS_FILE, groups[0])]
    return [
        _shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group) for number, group in enumerate(groups, 1)
    ]


def write_shards(
    shards: Iterable[Shard], directory: Path, pieces: Callable[[TensorSpec], Iterator[Piece]]
) -> Iterator[int]:
    """Write the files and, for several, their index; yields the bytes written after every piece.

    ``pieces`` says what is in a tensor: pieces that cover it, in any order.
    """
    shards = list(shards)
    for shard in shards:
        with FileIO(directory / shard.file, "w") as file:
            _reserve(file, shard.nbytes)
            _write_at(file, shard.header, 0)
            start = len(shard.header)
            for spec in shard.specs:
                for first, piece in pieces(spec):
                    data = piece.contiguous().view(-1).view(torch.uint8).numpy().data if piece.numel() else b""
                    _write_at(file, data, start + first * spec.dtype.itemsize)
                    yield len(data)
                start += spec.nbytes
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.specs)
        weight_map = {spec.name: shard.file for shard in shards for spec in shard.specs}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shard(file: str, specs: list[TensorSpec]) -> Shard:
    """Wide dtypes first, so that every tensor is aligned, then by name."""
    ordered = sorted(specs, key=lambda spec: (-_ORDER[spec.dtype], spec.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        offsets = [end, end := end + spec.nbytes]
        header[spec.name] = {"dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return Shard(file, len(text).to_bytes(8, "little") + text, tuple(ordered))


def _reserve(file: FileIO, size: int) -> None:
    """Let a full disk show before the work and not after it."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
                raise


def _write_at(file: FileIO, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    file.seek(offset)
    while len(view):
        view = view[file.write(view) :]
