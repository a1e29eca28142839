"""Compiles a noted launch for a target, and reads registers, spills and instructions off the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from .launches import MODULES, Launch
from .targets import Target

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint8": "u8"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def source(launch: Launch, gpu: GPUTarget) -> ASTSource:
    """Specialised as Triton does at a launch: None and 1 become constants, multiples of 16 are known as such."""
    kernel = getattr(MODULES[launch.kernel], launch.kernel)
    backend = make_backend(gpu)
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        known = ""
        if isinstance(value, Tensor):
            kind = "*" + TYPES[str(value.dtype).removeprefix("torch.")]
            known = backend.get_tensor_specialization(value, align=True)
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, int):
            kind = "i32" if value < 1 << 31 else "i64"
            known = backend.get_int_specialization(value, align=True)
        else:
            kind = "fp32"
        signature[parameter.name] = kind
        if known:
            attributes[(i,)] = backend.parse_attr(known)
    return ASTSource(kernel, signature, constants, attributes)


@dataclass(frozen=True)
class Code:
    """Read off a compiled kernel. Stack in bytes a thread, shared memory in bytes a program.

    ``spill_loads`` and ``spill_stores`` are instructions on NVIDIA, spilled vector and scalar registers on AMD;
    ``left_operands`` says where the left operands of wgmma lie ("registers", "shared"); ``loose_loads`` are loads of
    tiles outside of the pipeline.
    """

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    matrix: int
    shared: int = 0
    left_operands: tuple[str, ...] = ()
    loose_loads: int = 0


def nvidia_code(text: str, matrix: str) -> Code:
    """From what ``cuobjdump -res-usage -sass`` says."""
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)", text)
    if usage is None:
        raise ValueError("no resource usage in the output of cuobjdump")
    loads, stores, products = (len(re.findall(rf"\b{name}\b", text)) for name in ("LDL", "STL", matrix))
    return Code(int(usage[1]), int(usage[2]), loads, stores, products)


def amd_code(text: str, matrix: str) -> Code:
    """From AMD assembly with its metadata."""

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        if found is None:
            raise ValueError(f"no .{name} in the assembly")
        return int(found[1])

    return Code(
        number("vgpr_count"), number("private_segment_fixed_size"), number("vgpr_spill_count"),
        number("sgpr_spill_count"), len(re.findall(matrix, text)),
    )  # fmt: skip


def left_operands(ttgir: str) -> tuple[str, ...]:
    """Where the left operand of every wgmma lies."""
    operands = re.findall(r"warp_group_dot .* : (tensor|!ttg\.memdesc)<.*\* ", ttgir)
    return tuple("registers" if operand == "tensor" else "shared" for operand in operands)


def loose_loads(ttgir: str) -> int:
    """Loads of two-dimensional tiles that are not asynchronous copies."""
    return len(re.findall(r"tt\.load .* : tensor<\d+x\d+x!tt\.ptr<", ttgir))


def disassembled(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [str(CUOBJDUMP), "-res-usage", "-sass", str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def build(code: ASTSource, options: dict[str, int], target: Target) -> Code:
    """Compile, and read off the result."""
    kernel = triton.compile(code, target=target.gpu, options=options)
    if target.nvidia:
        read = nvidia_code(disassembled(kernel.asm["cubin"]), target.matrix)
    else:
        read = amd_code(kernel.asm["amdgcn"], target.matrix)
    ttgir = kernel.asm["ttgir"]
    return replace(
        read, shared=kernel.metadata.shared, left_operands=left_operands(ttgir), loose_loads=loose_loads(ttgir)
    )
