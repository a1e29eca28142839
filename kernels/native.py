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
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import ACTIVATIONS

SOURCE = Path(__file__).with_name("native.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared")
KINDS = {torch.bfloat16: 1, torch.float16: 2}
"""Numbers of what native.c calls a kind; 0 is the dtype it computes with."""
TILE_BYTES = 768 << 10
"""What the tile of the stack and the weights merged from it may take."""
TILES = {False: (1, 256, 768), True: (8, 64, 64)}
"""Panels of a tile, how many of its rows are added up at once, and how many it has at most: long where rows of the
stack run along the sums, wide where they lie across."""
GRADIENT_BYTES = 6 << 20
"""What the samples under way may take in a thread where the gradient of the routing weights is computed."""
ALL_GRADIENT_BYTES = 16 << 20
"""The same in all threads."""


class NativeError(Exception):
    """Why there are no CPU kernels here."""


class _ProductTask(ctypes.Structure):
    """`product_task` of native.c."""

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("x", "stack", "w", "bias", "y", "packed", "sums", "workspace")),
        *((name, ctypes.c_long) for name in (
            "B", "N", "K", "T1", "xb", "xn", "x_kind", "size", "pitch", "stack_kind", "lies", "yb", "yn", "y_kind",
            "bt", "first", "last", "panels", "depth", "reach", "adds", "activation", "room", "threads", "parts",
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
    outer: tuple[int, int]
    """Rows and columns of a tile of outer products."""
    float16: bool

    def tile(self, experts: int, lies: bool, K: int) -> tuple[int, int, int]:
        """(panels, depth, reach) of a tile of 1+T ``experts``, as ``merged_product`` of native.c wants them.

        The depth is a power of two times ``columns``, at most 256, and depends on the experts alone.
        """
        panels, depth, highest = TILES[lies]
        number = panels * self.columns * (experts + self.group) * self.real.itemsize
        fits = max(1, TILE_BYTES // number // self.columns)
        depth = min(depth, self.columns << fits.bit_length() - 1)
        highest = min(highest, fits * self.columns) // depth * depth
        return panels, depth, _steps(K, -(-K // highest), depth)


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


def activates(activation: str, real: torch.dtype) -> bool:
    """Whether products that compute in ``real`` apply this activation themselves."""
    return activation == "none" or (real == torch.float32 and activation in ACTIVATIONS)


def library(real: torch.dtype) -> Library:
    """The kernels that compute in ``real``, float32 or float64; raises ``NativeError``."""
    found = _library(real)
    if isinstance(found, str):
        raise NativeError(found)
    return found


class _Memory(threading.local):
    """What products work in, kept by each thread for the next: fresh pages cost more than what is written to them."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, role: str, numbers: int, dtype: torch.dtype) -> Tensor:
        """So many numbers, not initialised: the same memory each time for a role."""
        kept = self._kept.get((role, dtype))
        if kept is None or kept.numel() < numbers:
            self._kept.pop((role, dtype), None)
            with torch.inference_mode(False):
                kept = self._kept[role, dtype] = torch.empty(numbers, dtype=dtype)
        return kept[:numbers]

    def release(self) -> None:
        self._kept.clear()


_memory = _Memory()


def release() -> None:
    """Give back the memory that products of this thread have kept."""
    _memory.release()


class Packed:
    """Tokens [B, N, K] packed for products with a stack of 1+T ``experts``: sums, or x with its last dimension dense.

    Of each ``role`` there is one at a time in a thread: the next takes its memory.
    """

    def __init__(
        self,
        x: Tensor | Sums,
        real: torch.dtype,
        experts: int,
        *,
        lies: bool = False,
        threads: int = 1,
        role: str = "packed",
    ) -> None:
        found = library(real)
        self.shape, self.lies = x.shape, lies
        B, N, K = x.shape
        self.tile = found.tile(experts, lies, K)
        self.numbers = _memory.take(role, B * N * K, real)
        task = _ProductTask(packed=_at(self.numbers), B=B, N=N, K=K, depth=self.tile[1])
        if isinstance(x, Sums):
            task.sums = _at(x.numbers)
        else:
            task.x, task.xb, task.xn, task.x_kind = _at(x), x.stride(0), x.stride(1), _kind(x, found)
        _together(found.functions.pack_tokens, task, threads)


class Sums:
    """Columns ``span`` of the merged products of B samples of N tokens, added up in the dtype of the coefficients.

    coefficient [B, 1+T], contiguous. Of each ``role`` there are some at a time in a thread: the next take their memory.
    ``numbers``, in an order of their own and padded with zeros, may be changed one by one.
    """

    def __init__(self, coefficient: Tensor, tokens: int, span: slice, *, threads: int = 1, role: str = "sums") -> None:
        found = self._found = library(coefficient.dtype)
        self._coefficient, self._span, self._threads, self._adds = coefficient, span, threads, False
        self.shape = (coefficient.shape[0], tokens, span.stop - span.start)
        columns = _steps(self.shape[2], 1, found.columns)
        self.numbers = _memory.take(role, self.shape[0] * tokens * columns, found.real)

    def add(self, x: Packed, stack: Tensor, bias: Tensor | None = None, activation: str = "none") -> None:
        """x_b W_b^T with W_b = sum_t w_bt S_t, x_b W_b where x was packed for a stack that ``lies``; then act(sums).

        stack [1+T, J, K], or [1+T, K, J], the last dimension side by side. The first product brings w_b bias with it,
        bias [1+T, J]. The order in which numbers are added up is that of one product where all x but the last are
        multiples of 256 long. The activation is one that ``activates`` knows.
        """
        found, (panels, depth, reach), experts = self._found, x.tile, stack.shape[0]
        room = found.functions.product_room(_long(experts), _long(panels), _long(reach))
        workspace = _memory.take("tiles", self._threads * room, found.real)
        task = self._task(
            stack=_at(stack), packed=_at(x.numbers), workspace=_at(workspace), w=_at(self._coefficient), bias=_at(bias),
            bt=0 if bias is None else bias.stride(0), K=x.shape[2], T1=experts, size=stack.stride(0),
            pitch=stack.stride(1), stack_kind=_kind(stack, found), lies=x.lies, panels=panels, depth=depth,
            reach=reach, adds=self._adds, activation=ACTIVATIONS.index(activation), room=room,
        )  # fmt: skip
        _together(found.functions.merged_product, task, self._threads)
        self._adds = True

    def of_samples(self, samples: int, keep: Tensor | None = None) -> Tensor:
        """[samples, columns]: added up over tokens, where each of these B = 1 is so many samples of equal length.

        Tokens where ``keep`` [samples, tokens] is false do not count, whatever there is. Uses up the numbers.
        """
        numbers = self.numbers.view(-1, samples, self.shape[1] // samples, self._found.columns)
        if keep is not None:
            numbers.masked_fill_(~keep.unsqueeze(2), 0)
        return numbers.sum(dim=2).transpose(0, 1).flatten(1)[:, : self.shape[2]]

    def store(self, y: Tensor) -> None:
        """y [B, N, columns of the span] = sums: the last dimension of y side by side."""
        task = self._task(y=_at(y), yb=y.stride(0), yn=y.stride(1), y_kind=_kind(y, self._found))
        _together(self._found.functions.store_sums, task, self._threads)

    def _task(self, **fields: int | None) -> _ProductTask:
        B, N, _ = self.shape
        return _ProductTask(sums=_at(self.numbers), B=B, N=N, first=self._span.start, last=self._span.stop, **fields)


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
    step = max(1, min(GRADIENT_BYTES, ALL_GRADIENT_BYTES // threads) // token)
    whole = torch.zeros_like(dw[0])
    for first in range(0, N, step):
        here = min(step, N - first)
        samples = even(B, step // here)
        room = found.functions.dw_room(*map(_long, (experts, here, across, samples)))
        workspace = _memory.take("gradient", threads * room, real)
        task = _DwTask(
            dy=_at(dy[:, first:]), x=_at(x[:, first:]), stack=_at(stack), dw=_at(dw), workspace=_at(workspace),
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


def even(whole: int, most: int) -> int:
    """The size of equal parts that are no larger than ``most``, at least 1."""
    return -(-whole // -(-whole // max(1, min(whole, most))))


def _together(function: Any, task: ctypes.Structure, threads: int) -> None:
    """Call a function of native.c in so many threads at once, which share out the parts of one task."""
    team = _team()
    if threads > 1 and team is not None:
        team(function, ctypes.byref(task), ctypes.c_uint(threads), ctypes.c_uint(0))
        return
    others = [threading.Thread(target=function, args=(ctypes.byref(task),)) for _ in range(threads - 1)]
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


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


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
    constants = (ctypes.c_long * 5)()
    functions.constants(constants)
    columns, group, *outer, float16 = constants
    return Library(functions, real, columns, group, (outer[0], outer[1]), bool(float16))


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
