"""How a kernel's work is cut into tiles: what fits a device, a default, and tables measured on one.

Tables are JSON files named by device: ``configs/<device>.json`` beside this module, and the user's own, which come
first, in ``$WEMOE_FAST_TUNING`` or ``~/.cache/wemoe-fast/tuning`` (written by ``wemoe-fast tune``). Nothing is measured
here: without a table the default is used. Needs neither Triton nor a GPU.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIGS = Path(__file__).parent / "configs"
SLACK_BYTES = 12 << 10
"""Shared memory a kernel needs beside its pipeline's buffers: conversions of layout, sums across warps."""
WEIGHTS_IN_REGISTERS = {"ampere": 32, "hopper": 80, "cdna": 32}
"""Routing weights a program can keep in registers beside its sums, of 16-bit tensors, by kind of device.

Read off compiled kernels; half of it where numbers have 32 bits."""
FEW_WEIGHTS = 32
"""With more than so many, only tiles of depth 16."""


@dataclass(frozen=True)
class Tile:
    """One program's share: ``rows`` x ``tokens`` of the result for each of ``group`` samples, ``depth`` at a time.

    ``merged_linear_dw`` computes ``rows`` x ``depth`` tiles, ``tokens`` at a time. All but group are powers of 2.
    """

    rows: int
    tokens: int
    depth: int
    group: int = 1
    stages: int = 2
    warps: int = 4

    def constants(self) -> dict[str, int]:
        """As a kernel takes them."""
        return {
            "ROWS": self.rows, "TOKENS": self.tokens, "DEPTH": self.depth, "GROUP": self.group,
            "num_stages": self.stages, "num_warps": self.warps,
        }  # fmt: skip


@dataclass(frozen=True)
class Device:
    """What bounds a tile on a device: name, bytes of shared memory a program may use, and what kind of GPU it is.

    ``ampere`` (sm_80 to sm_89: tensor cores read registers alone), ``hopper`` (sm_90 and later), ``cdna`` (AMD: tiles
    of the stack go straight to registers).
    """

    name: str
    shared_memory: int
    kind: str = "hopper"


@dataclass(frozen=True)
class Problem:
    """What the choice of a tile depends on. ``rows`` and ``depth`` are H and K of the stack; ``kept`` is T or top-k."""

    kernel: str
    device: Device
    dtype: torch.dtype
    samples: int
    tokens: int
    rows: int
    depth: int
    experts: int = 0
    kept: int = 0
    gated: bool = False
    element_size: int = 2
    precision: str = "ieee"

    @classmethod
    def of(
        cls,
        kernel: str,
        x: Tensor,
        stack: Tensor,
        samples: int,
        tokens: int,
        kept: int,
        gated: bool = False,
    ) -> Problem:
        """Of x [B, N, K] (or packed) and stack [1+T, H, K]."""
        experts, rows, depth = stack.shape[0] - 1, stack.shape[1], stack.shape[2]
        return cls(
            kernel,
            device_of(x.device),
            x.dtype,
            samples=samples,
            tokens=tokens,
            rows=rows,
            depth=depth,
            experts=experts,
            kept=min(kept, experts),
            gated=gated,
            element_size=max(x.element_size(), stack.element_size()),
            precision=float32_precision(x.dtype),
        )

    def slots(self, group: int) -> int:
        """Different experts a group may need."""
        return min(self.experts, group * self.kept)

    @property
    def on_tensor_cores(self) -> bool:
        return self.dtype != torch.float32 or self.precision == "tf32"

    def key(self) -> dict[str, Any]:
        """How a table names it: shapes in buckets, so that neighbours share an entry."""
        return {
            "kernel": self.kernel,
            "dtype": str(self.dtype).removeprefix("torch."),
            "precision": self.precision,
            "samples": bucket(self.samples, 64),
            "tokens": bucket(self.tokens, 1024),
            "experts": self.experts,
            "kept": self.kept,
            "gated": self.gated,
        }


def bucket(number: int, largest: int) -> int:
    """Rounded up to a power of 2, at most ``largest``."""
    return min(largest, 1 << max(0, number - 1).bit_length())


def shared_bytes(tile: Tile, problem: Problem) -> int:
    """Shared memory of the pipeline, about: stages - 1 buffers of the stack's tiles, ``stages`` of the samples'."""
    size = problem.element_size
    if problem.kernel == "merged_linear_dw":
        operands = tile.group * tile.tokens * (tile.rows + tile.depth) * size
        return tile.stages * operands + SLACK_BYTES
    stacks = 2 if problem.gated else 1
    weights = stacks * (1 + problem.slots(tile.group)) * tile.rows * tile.depth * size
    samples = tile.group * tile.tokens * tile.depth * size
    buffers = tile.stages - 1 if problem.kernel == "merged_linear" else tile.stages
    if problem.device.kind == "cdna":
        buffers = 0
    return buffers * weights + tile.stages * samples + SLACK_BYTES


def accumulators(tile: Tile, problem: Problem) -> int:
    """32-bit registers a thread needs for its sums (a warp has 32 threads; more on AMD only leaves room)."""
    columns = tile.depth if problem.kernel == "merged_linear_dw" else tile.tokens
    return (2 if problem.gated else 1) * tile.group * tile.rows * columns // (32 * tile.warps)


def merged_registers(tile: Tile, problem: Problem) -> int:
    """Those for the merged tiles, which a second warpgroup along the tokens holds once more."""
    if problem.kernel != "merged_linear":
        return 0
    return tile.group * tile.rows * tile.depth // (32 * min(tile.warps, max(4, tile.rows // 16)))


def fits(tile: Tile, problem: Problem) -> bool:
    """Whether a tile is worth compiling: its shared memory exists, its sums and merged tiles fit the registers."""
    if shared_bytes(tile, problem) > problem.device.shared_memory:
        return False
    if problem.kernel == "merged_linear" and tile.group > _largest_group(problem, tile.group):
        return False
    return accumulators(tile, problem) + merged_registers(tile, problem) <= 160


def default(problem: Problem) -> Tile:
    """The tile where no table says otherwise: from compiled kernels and counted traffic, not from measured time."""
    tile = _wanted(problem)
    while not fits(tile, problem):
        smaller = _smaller(tile, problem)
        if smaller is None:
            break
        tile = smaller
    return tile


def _wanted(problem: Problem) -> Tile:
    tokens = max(16, bucket(problem.tokens, 128))
    if not problem.on_tensor_cores:
        # Without tensor cores products run on the registers' own units, from shared memory.
        return Tile(rows=32, tokens=min(tokens, 32), depth=16, group=1, stages=2, warps=4)
    kind = problem.device.kind
    stages = 2 if kind == "cdna" else 3
    group = bucket(problem.samples, min(2 if kind == "cdna" else 4, 256 // tokens))
    if problem.kernel == "router":
        return Tile(rows=64, tokens=tokens, depth=64, group=min(group, 2), stages=stages, warps=4)
    if problem.kernel == "merged_linear_dw":
        # The sums of every expert need registers too.
        return Tile(rows=64, tokens=min(tokens, 64), depth=64, group=min(group, 2), stages=2, warps=8)
    group = _largest_group(problem, min(group, 2) if problem.gated else group)
    crowded = problem.slots(group) * group > FEW_WEIGHTS or problem.element_size > 2
    crowded = crowded or (problem.gated and tokens > 64 and kind != "cdna")
    crowded = crowded or (kind == "ampere" and (group > 2 or problem.gated))
    if tokens <= 16:
        # With more warps a tile of x is too small for asynchronous copies.
        return Tile(rows=64, tokens=tokens, depth=16, group=group, stages=stages, warps=4)
    return Tile(rows=64, tokens=tokens, depth=16 if crowded else 32, group=group, stages=stages, warps=8)


def _largest_group(problem: Problem, group: int) -> int:
    """A group, or the largest half of it, quarter ... whose routing weights fit the registers."""
    room = WEIGHTS_IN_REGISTERS[problem.device.kind] * 2 // max(2, problem.element_size)
    while group > 1 and problem.slots(group) * group > room:
        group //= 2
    return group


def _smaller(tile: Tile, problem: Problem) -> Tile | None:
    """The next smaller tile, dearest first; None at the smallest."""
    if tile.stages > 2:
        return replace(tile, stages=tile.stages - 1)
    if tile.group > 1:
        return replace(tile, group=tile.group // 2)
    for name, least in (("depth", 16), ("tokens", 16), ("rows", 16)):
        if getattr(tile, name) > least:
            return replace(tile, **{name: getattr(tile, name) // 2})
    if tile.stages > 1:
        return replace(tile, stages=1)
    return None


def candidates(problem: Problem) -> Iterator[Tile]:
    """Every tile worth measuring for a problem, the default first."""
    first = default(problem)
    yield first
    for rows in (32, 64, 128):
        for tokens in sorted({min(size, max(16, bucket(problem.tokens, 256))) for size in (16, 32, 64, 128, 256)}):
            for depth in (16, 32, 64):
                for group in (1, 2, 4, 8):
                    for stages in (2, 3, 4):
                        for warps in (4, 8):
                            tile = Tile(rows, tokens, depth, group, stages, warps)
                            if tile != first and group < 2 * max(1, problem.samples) and fits(tile, problem):
                                yield tile


@lru_cache(maxsize=4096)
def choose(problem: Problem) -> Tile:
    """The tile of the device's table for this problem, or the default."""
    key = problem.key()
    for entry in table(problem.device.name).get("tiles", ()):
        if all(entry.get(name) == value for name, value in key.items()):
            return Tile(**entry["tile"])
    return default(problem)


@lru_cache(maxsize=4096)
def measured_strategy(problem: Problem, backward: bool) -> str | None:
    """The fastest strategy of the device's table for this problem, None where it was not measured."""
    key = strategy_key(problem, backward)
    for entry in table(problem.device.name).get("strategies", ()):
        if all(entry.get(name) == value for name, value in key.items()):
            return str(entry["strategy"])
    return None


def strategy_key(problem: Problem, backward: bool) -> dict[str, Any]:
    """How a table names a choice of strategy: the tile's key and the size of the linear."""
    key = problem.key()
    del key["kernel"], key["gated"]
    return {**key, "rows": bucket(problem.rows, 1 << 20), "depth": bucket(problem.depth, 1 << 20), "backward": backward}


def float32_precision(dtype: torch.dtype) -> str:
    """Products of float32 in full, unless the user allowed TensorFloat-32 (``torch.set_float32_matmul_precision``)."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


@lru_cache(maxsize=16)
def table(device: str) -> dict[str, Any]:
    """The measured table of a device: the user's, else the shipped one, else an empty one."""
    for path in (user_table(device), CONFIGS / f"{slug(device)}.json"):
        if path.is_file():
            contents: dict[str, Any] = json.loads(path.read_text())
            return contents
    return {}


def forget_tables() -> None:
    """Read the tables again at the next choice."""
    table.cache_clear()
    choose.cache_clear()
    measured_strategy.cache_clear()


def user_table(device: str) -> Path:
    """Where ``wemoe-fast tune`` writes."""
    directory = os.environ.get("WEMOE_FAST_TUNING")
    root = Path(directory) if directory else Path.home() / ".cache" / "wemoe-fast" / "tuning"
    return root / f"{slug(device)}.json"


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def entry(problem: Problem, tile: Tile) -> dict[str, Any]:
    """A line of a table."""
    return {**problem.key(), "tile": asdict(tile)}


@lru_cache(maxsize=16)
def device_of(device: torch.device) -> Device:
    """The limits of a GPU; of the interpreter on the CPU those of an H100."""
    if device.type != "cuda":
        return Device("interpreter", 227 << 10)
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or (64 << 10)
    kind = "cdna" if torch.version.hip is not None else "ampere" if properties.major < 9 else "hopper"
    return Device(properties.name, shared, kind)
