"""The kernels for CPUs: ``native.c``, compiled when it is first needed, kept, and called without Python's lock.

It takes a C compiler (``$CC``, cc, gcc or clang), as Triton and torch.compile do. What was compiled is kept in
``$WEMOE_FAST_NATIVE`` or ``~/.cache/wemoe-fast/native``, under a name that stands for source, compiler and processor;
``WEMOE_FAST_NATIVE=0`` switches these kernels off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
KINDS = {torch.bfloat16: 1, torch.float16: 2}
"""Numbers of what native.c calls a kind; 0 is the dtype it computes with."""
TILE_BYTES = 512 << 10
"""What the tile of the stack and the weights merged from it may take: about the size of an L2 cache."""
SUMS_BYTES = 4 << 20
"""What the sums of the samples under way may take."""
DEEPEST = 256


class NativeError(Exception):
    """Why there are no CPU kernels here."""


@dataclass(frozen=True)
class Library:
    """The compiled kernels for one dtype, and the constants of ``native.c``."""

    functions: ctypes.CDLL
    real: torch.dtype
    columns: int
    """NR: columns of a panel."""
    tokens: int
    group: int
    outer: tuple[int, int]
    float16: bool

    def tile(self, experts: int, lies: bool) -> tuple[int, int]:
        """(panels, depth) of a tile of 1+T ``experts``: deep where rows of the stack run along the sums, else wide."""
        width, deepest = self.width(lies), DEEPEST // 4 if lies else DEEPEST
        number = width * (experts + self.group) * self.real.itemsize
        return width // self.columns, max(1, min(deepest, TILE_BYTES // number) // self.columns) * self.columns

    def width(self, lies: bool) -> int:
        """Columns of a tile."""
        return (8 if lies else 2) * self.columns


def why_not(x: torch.dtype, stack: torch.dtype) -> str | None:
    """Why the kernels cannot run with x and a stack of these dtypes; None where they can."""
    real = torch.float64 if x == torch.float64 else torch.float32
    for dtype in (x, stack):
        if dtype != real and dtype not in KINDS:
            return f"{dtype} is not supported beside {real}"
    try:
        found = library(real)
    except NativeError as reason:
        return str(reason)
    if torch.float16 in (x, stack) and not found.float16:
        return "the C compiler does not know float16"
    return None


def library(real: torch.dtype) -> Library:
    """The kernels that compute in ``real``, float32 or float64; raises ``NativeError``."""
    found = _library(real)
    if isinstance(found, str):
        raise NativeError(found)
    return found


def merged_product(
    x: Tensor, stack: Tensor, coefficient: Tensor, bias: Tensor | None, y: Tensor, span: slice, *, lies: bool = False
) -> None:
    """y_b[:, span] = x_b W_b^T + w_b bias with W_b = sum_t w_bt S_t; x_b W_b + w_b bias where ``lies``.

    x [B, N, K] and y [B, N, J] of one dtype, neighbours of a row side by side; stack [1+T, J, K] ([1+T, K, J] where
    ``lies``), contiguous; coefficient [B, 1+T] and bias [1+T, J] in the dtype that is computed with, contiguous.
    """
    found = library(coefficient.dtype)
    B, N, K = x.shape
    experts, J = stack.shape[0], y.shape[2]
    panels, depth = found.tile(experts, lies)
    width = panels * found.columns
    sums = SUMS_BYTES // coefficient.element_size()
    step = max(1, sums // width)
    for first in range(0, N, step):
        tokens = min(step, N - first)
        # Sums for as many columns as make reading x for each of them and the stack for each `most` cost the same.
        across = max((sums / experts) ** 0.5, sums / (B * tokens))
        across = min(span.stop - span.start, max(1, int(across) // width) * width)
        most = max(1, min(B, sums // (tokens * across)))
        pitch = -(-across // found.columns) * found.columns
        workspace = coefficient.new_empty(
            depth * width * (experts + found.group) + most * tokens * pitch + found.tokens * depth
        )
        for start in range(span.start, span.stop, across):
            found.functions.merged_product(
                _at(x, first), _long(x.stride(0)), _long(x.stride(1)), _kind(x, found),
                _at(stack), _kind(stack, found), _long(experts), _long(J), _long(K), int(lies),
                _at(coefficient), _at(bias), _at(y, first), _long(y.stride(0)), _long(y.stride(1)),
                _long(B), _long(tokens), _long(start), _long(min(start + across, span.stop)),
                _long(panels), _long(depth), _long(most), _at(workspace),
            )  # fmt: skip


def merged_product_dw(dy: Tensor, x: Tensor, stack: Tensor, real: torch.dtype, span: slice) -> Tensor:
    """dw_bt = <dy_b[:, span]^T x_b, S_t[span]> in float64 [B, 1+T].

    dy [B, N, J] and x [B, N, K] of one dtype, neighbours of a row side by side; stack [1+T, J, K], contiguous.
    """
    found = library(real)
    B, N, K = x.shape
    experts, J = stack.shape[0], stack.shape[1]
    rows, columns = found.outer
    dw = x.new_empty(B, experts, dtype=torch.float64)
    workspace = x.new_empty(
        (experts + found.group) * rows * columns + found.tokens * (rows + columns), dtype=real
    )  # fmt: skip
    found.functions.merged_product_dw(
        _at(dy), _long(dy.stride(0)), _long(dy.stride(1)), _at(x), _long(x.stride(0)), _long(x.stride(1)),
        _kind(x, found), _at(stack), _kind(stack, found), _long(experts), _long(J), _long(K), _at(dw),
        _long(B), _long(N), _long(span.start), _long(span.stop), _at(workspace),
    )  # fmt: skip
    return dw


_long = ctypes.c_long


def _at(tensor: Tensor | None, token: int = 0) -> ctypes.c_void_p:
    """Where a tensor [B, N, ...] begins, from some token on."""
    if tensor is None:
        return ctypes.c_void_p(None)
    return ctypes.c_void_p(tensor.data_ptr() + (token * tensor.stride(1) * tensor.element_size() if token else 0))


def _kind(tensor: Tensor, found: Library) -> int:
    return 0 if tensor.dtype == found.real else KINDS[tensor.dtype]


@lru_cache(maxsize=2)
def _library(real: torch.dtype) -> Library | str:
    try:
        functions = ctypes.CDLL(str(_compiled(real)))
    except NativeError as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled kernels cannot be loaded: {error}"
    constants = (ctypes.c_long * 6)()
    functions.constants(constants)
    columns, tokens, group, rows, across, float16 = constants
    return Library(functions, real, columns, tokens, group, (rows, across), bool(float16))


def _compiled(real: torch.dtype) -> Path:
    """The shared library, compiled unless it was before; several processes may do so at once."""
    wanted = os.environ.get("WEMOE_FAST_NATIVE", "")
    if wanted == "0":
        raise NativeError("the CPU kernels are switched off (WEMOE_FAST_NATIVE=0)")
    folder = Path(wanted) if wanted else Path.home() / ".cache" / "wemoe-fast" / "native"
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))), None)
    if compiler is None:
        raise NativeError("no C compiler was found: install gcc or clang, or set CC")
    flags = (*FLAGS, *(("-DDOUBLE",) if real == torch.float64 else ()))
    try:
        version = _run([compiler, "--version"])
        parts = (SOURCE.read_text(), compiler, version, *flags, platform.machine(), _processor())
        path = folder / f"native-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:20]}.so"
        if path.exists():
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            _run([compiler, *flags, "-o", str(made), str(SOURCE)])
            made.replace(path)
    except OSError as error:
        raise NativeError(f"the CPU kernels cannot be kept in {folder}: {error}") from error
    return path


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        raise NativeError(f"{Path(command[0]).name} failed: {said[0] if said else error}") from error
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{Path(command[0]).name} took longer than {error.timeout:.0f} s") from error
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: homes are shared by machines that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(told))
