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
from threading import Thread
from typing import Any, ClassVar

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
KINDS = {torch.bfloat16: 1, torch.float16: 2}
"""Numbers of what native.c calls a kind; 0 is the dtype it computes with."""
TILE_BYTES = 768 << 10
"""What the tile of the stack and the weights merged from it may take."""
SUMS_BYTES = 6 << 20
"""What the sums of the samples under way may take, and what is used of their x at once."""
ALL_SUMS_BYTES = 16 << 20
"""What each of the two may take in all threads."""
TILES = {False: (1, 768), True: (8, 64)}
"""Panels and greatest depth of a tile: long where rows of the stack run along the sums, wide where they lie across."""


class NativeError(Exception):
    """Why there are no CPU kernels here."""


class _ProductTask(ctypes.Structure):
    """`product_task` of native.c."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("x", "stack", "w", "bias", "y", "workspace")),
        *((name, ctypes.c_long) for name in (
            "xb", "xn", "x_kind", "stack_kind", "T1", "J", "K", "lies", "yb", "yn", "B", "N",
            "first", "last", "across", "panels", "depth", "most", "room", "threads", "parts",
        )),
    ]  # fmt: skip


class _DwTask(ctypes.Structure):
    """`dw_task` of native.c."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("dy", "x", "stack", "dw", "workspace")),
        *((name, ctypes.c_long) for name in (
            "yb", "yn", "xb", "xn", "x_kind", "stack_kind", "T1", "J", "K", "B", "N",
            "first", "last", "across", "most", "room", "threads", "parts",
        )),
    ]  # fmt: skip


@dataclass(frozen=True)
class Library:
    """The compiled kernels for one dtype, and the constants of ``native.c``."""

    functions: ctypes.CDLL
    real: torch.dtype
    columns: int
    """NR: columns of a panel."""
    group: int
    long: int
    """Numbers of a row that are used at once for a sample by itself."""
    outer: tuple[int, int]
    """Rows and columns of a tile of outer products."""
    float16: bool

    def tile(self, experts: int, lies: bool) -> tuple[int, int]:
        """(panels, depth) of a tile of 1+T ``experts``."""
        panels, deepest = TILES[lies]
        number = panels * self.columns * (experts + self.group) * self.real.itemsize
        return panels, max(1, min(deepest, TILE_BYTES // number) // self.columns) * self.columns


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
    x: Tensor,
    stack: Tensor,
    coefficient: Tensor,
    bias: Tensor | None,
    y: Tensor,
    span: slice,
    *,
    lies: bool = False,
    most: int | None = None,
    threads: int = 1,
) -> None:
    """y_b[:, span] = x_b W_b^T + w_b bias with W_b = sum_t w_bt S_t; x_b W_b + w_b bias where ``lies``.

    x [B, N, K] and y [B, N, J] of one dtype, neighbours of a row side by side; stack [1+T, J, K] ([1+T, K, J] where
    ``lies``), contiguous; coefficient [B, 1+T] and bias [1+T, J] in the dtype that is computed with, contiguous.
    A part is at most ``most`` columns.
    """
    found = library(coefficient.dtype)
    B, N, K = x.shape
    experts, J, here = stack.shape[0], y.shape[2], span.stop - span.start
    panels, depth = found.tile(experts, lies)
    depth = min(depth, _steps(K, 1, found.columns))
    width, columns = panels * found.columns, min(most or J, here)
    sums = min(SUMS_BYTES, ALL_SUMS_BYTES // threads) // coefficient.element_size()
    alone = B == 1 and not lies and stack.dtype == found.real
    step = max(1, sums // max(width, found.long if alone else depth))
    for first in range(0, N, step):
        tokens = min(step, N - first)
        # Sums for as many columns as make reading x for each of them and the stack for each `samples` cost the same,
        # but parts of one size for every thread, and as many samples each time.
        across = min(columns, max((sums / experts) ** 0.5, sums / (B * tokens)))
        parts = max(threads * max(1, round(here / across / threads)), -(-here // columns))
        across = _steps(here, parts, width)
        samples = _even(B, sums // (tokens * max(across, depth)))
        room = found.functions.product_room(*map(_long, (experts, tokens, across, panels, depth, samples)))
        workspace = coefficient.new_empty(threads * room)
        task = _ProductTask(
            x=_at(x, first), stack=_at(stack), w=_at(coefficient), bias=_at(bias), y=_at(y, first),
            workspace=_at(workspace), xb=x.stride(0), xn=x.stride(1), x_kind=_kind(x, found),
            stack_kind=_kind(stack, found), T1=experts, J=J, K=K, lies=lies, yb=y.stride(0), yn=y.stride(1),
            B=B, N=tokens, first=span.start, last=span.stop, across=across, panels=panels, depth=depth,
            most=samples, room=room,
        )  # fmt: skip
        _together(found.functions.merged_product, task, threads)


def merged_product_dw(
    dy: Tensor, x: Tensor, stack: Tensor, real: torch.dtype, span: slice, *, most: int | None = None, threads: int = 1
) -> Tensor:
    """dw_bt = <dy_b[:, span]^T x_b, S_t[span]> in float64 [B, 1+T].

    dy [B, N, J] and x [B, N, K] of one dtype, neighbours of a row side by side; stack [1+T, J, K], contiguous.
    A part is at most ``most`` columns of dy.
    """
    found = library(real)
    B, N, K = x.shape
    experts, J = stack.shape[0], stack.shape[1]
    across = min(most or J, span.stop - span.start)
    dw = x.new_empty(-(-(span.stop - span.start) // across), B, experts, dtype=torch.float64)
    rows, columns = found.outer
    token = (_steps(across, 1, rows) + columns) * real.itemsize
    step = max(1, min(SUMS_BYTES, ALL_SUMS_BYTES // threads) // token)
    whole = torch.zeros_like(dw[0])
    for first in range(0, N, step):
        here = min(step, N - first)
        samples = _even(B, step // here)
        room = found.functions.dw_room(*map(_long, (experts, here, across, samples)))
        workspace = x.new_empty(threads * room, dtype=real)
        task = _DwTask(
            dy=_at(dy, first), x=_at(x, first), stack=_at(stack), dw=_at(dw), workspace=_at(workspace),
            yb=dy.stride(0), yn=dy.stride(1), xb=x.stride(0), xn=x.stride(1), x_kind=_kind(x, found),
            stack_kind=_kind(stack, found), T1=experts, J=J, K=K, B=B, N=here, first=span.start, last=span.stop,
            across=across, most=samples, room=room,
        )  # fmt: skip
        _together(found.functions.merged_product_dw, task, threads)
        whole += dw.sum(dim=0)
    return whole


_long = ctypes.c_long


def _steps(whole: int, parts: int, multiple: int) -> int:
    """The size of so many equal parts, rounded up to a multiple."""
    return -(-whole // (parts * multiple)) * multiple


def _even(whole: int, most: int) -> int:
    """The size of equal parts that are no larger, at least 1."""
    return -(-whole // -(-whole // max(1, min(whole, most))))


def _together(function: Any, task: ctypes.Structure, threads: int) -> None:
    """Call a function of native.c in so many threads at once, which share out the parts of one task."""
    team = _team()
    if threads > 1 and team is not None:
        team(function, ctypes.byref(task), ctypes.c_uint(threads), ctypes.c_uint(0))
        return
    others = [Thread(target=function, args=(ctypes.byref(task),)) for _ in range(threads - 1)]
    for thread in others:
        thread.start()
    function(ctypes.byref(task))
    for thread in others:
        thread.join()


@lru_cache(maxsize=1)
def _team() -> Any:
    """OpenMP's entry into PyTorch's own threads; None where PyTorch was built without, or hides it.

    After its work PyTorch's threads wait busily for more: threads of our own would compete with them.
    """
    if "OpenMP" not in torch.__config__.parallel_info().split("backend:")[-1]:
        return None
    return getattr(ctypes.CDLL(None), "GOMP_parallel", None)


def _at(tensor: Tensor | None, token: int = 0) -> int | None:
    """Where a tensor [B, N, ...] begins, from some token on."""
    return None if tensor is None else tensor.data_ptr() + (token and token * tensor.stride(1) * tensor.element_size())


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
    for name in ("product_room", "dw_room"):
        getattr(functions, name).restype = ctypes.c_long
    constants = (ctypes.c_long * 6)()
    functions.constants(constants)
    columns, group, long, *outer, float16 = constants
    return Library(functions, real, columns, group, long, (outer[0], outer[1]), bool(float16))


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
