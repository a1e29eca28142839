"""What the Triton kernels compile to, on a machine without a GPU: registers, spills, shared memory, instructions.

    python -m benchmarks.compile_report --subset all --json benchmarks/results/compile-report.json

The launchers run on tensors without data ("meta"), so what is compiled is what they launch: the same constants,
strides and tiles. One line a compiled kernel; exit status 1 if one has a problem: it does not compile, spills, exceeds
the shared memory, or lost its matrix instructions or the pipeline of its loads. Bounds are estimates from data
sheets, not measurements.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it while it is imported

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from wemoe_fast.kernels import merge, merged_linear, merged_linear_dw, router, tuning
from wemoe_fast.kernels.launch import Batch, Routing
from wemoe_fast.kernels.tuning import Device, Problem, Tile
from wemoe_fast.report import write_json

MODULES = {
    "merged_linear_kernel": merged_linear,
    "merged_linear_dw_kernel": merged_linear_dw,
    "reduce_kernel": merged_linear_dw,
    "token_sums_kernel": router,
    "hidden_sums_kernel": router,
    "mean_kernel": router,
    "head_kernel": router,
    "merge_kernel": merge,
}
"""Where launchers find the kernels."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}
TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "uint8": "u8"}
WIDTH, HIDDEN = 768, 3072
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True)
class Target:
    """A GPU to compile for. Limits are those of one multiprocessor (compute unit), rates those of all of them.

    Registers are 32 bits wide and counted over all threads; ``reserved`` is what every program takes of the shared
    memory beside its own. Rates are in 1e12 a second: FLOPs of matrix instructions by dtype, FLOPs of ordinary
    instructions in float32, bytes out of L2.
    """

    gpu: GPUTarget
    device: Device
    shared_memory: int
    reserved: int
    registers: int
    warps: int
    programs: int
    matrix: str
    rates: dict[str, float]
    flops: float
    l2: float
    source: str

    @property
    def nvidia(self) -> bool:
        return bool(self.gpu.backend == "cuda")


CUDA_GUIDE = "CUDA Programming Guide, table of compute capabilities"
TARGETS = {
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), Device("sm_80", 163 << 10, "ampere"),
        shared_memory=164 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="HMMA",
        rates={"float16": 312, "bfloat16": 312, "tf32": 156, "float32": 19.5}, flops=19.5, l2=7.2,
        source=f"{CUDA_GUIDE}; A100 SXM data sheet; L2: A100 white paper, 5120 B a clock at 1.41 GHz",
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), Device("sm_90", 227 << 10, "hopper"),
        shared_memory=228 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="HGMMA",
        rates={"float16": 989, "bfloat16": 989, "tf32": 495, "float32": 67}, flops=67, l2=5.5,
        source=f"{CUDA_GUIDE}; H100 SXM data sheet, dense; L2: assumed, about what micro-benchmarks reach",
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), Device("sm_100", 227 << 10, "hopper"),
        shared_memory=228 << 10, reserved=1 << 10, registers=64 << 10, warps=64, programs=32, matrix="UTCHMMA",
        rates={"float16": 2250, "bfloat16": 2250, "tf32": 1125, "float32": 75}, flops=75, l2=7,
        source=f"{CUDA_GUIDE}; HGX B200 data sheet, dense; L2: assumed, as much a multiprocessor as on H100",
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), Device("gfx942", 64 << 10, "cdna"),
        shared_memory=64 << 10, reserved=0, registers=128 << 10, warps=32, programs=32, matrix="v_mfma",
        rates={"float16": 1307, "bfloat16": 1307, "tf32": 654, "float32": 163}, flops=163, l2=34,
        source="CDNA 3 white paper and MI300X data sheet, dense; L2: assumed, 2 KiB a clock and die, 8 dies, 2.1 GHz",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A launch to compile: which, for which target and problem, and with which tile (the default unless given)."""

    target: str
    variant: str
    dtype: str
    tokens: int
    experts: int
    samples: int = 64
    top_k: int | None = None
    tile: Tile | None = None


@dataclass(frozen=True)
class Launch:
    """What a launcher asked for: a kernel, its arguments by name and options; the problem if it chose a tile."""

    kernel: str
    arguments: dict[str, Any]
    options: dict[str, int]
    problem: Problem | None

    @property
    def tile(self) -> Tile | None:
        sizes = [self.arguments.get(name) for name in ("ROWS", "TOKENS", "DEPTH", "GROUP")]
        return None if None in sizes else Tile(*sizes, self.options["num_stages"], self.options["num_warps"])


def launch(case: Case) -> None:
    """Run the launcher of a case on tensors without data."""
    dtype = DTYPES[case.dtype]

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    B, N, T = case.samples, case.tokens, case.experts
    x, dy = empty(B, N, WIDTH), empty(B, N, HIDDEN)
    stack, bias = empty(1 + T, HIDDEN, WIDTH), empty(1 + T, HIDDEN)
    routing = Routing(empty(B, T, dtype=torch.float32), "softmax", 1.0, case.top_k)
    if case.variant == "forward" or case.variant == "topk":
        merged_linear.merged_linear(x, stack, routing, bias, "gelu")
    elif case.variant == "dx":
        merged_linear.merged_linear(dy, stack.mT, routing)
    elif case.variant == "gated":
        merged_linear.merged_linear(x, stack, routing, None, "silu", gate_stack=stack)
    elif case.variant == "ragged":
        batch = Batch.of(x.flatten(0, 1), empty(B + 1, dtype=torch.int32), N)
        merged_linear.merged_linear(x.flatten(0, 1), stack, routing, bias, "gelu", batch=batch)
    elif case.variant == "dw":
        merged_linear_dw.merged_linear_dw(dy, x, stack, routing, bias)
    elif case.variant == "router":
        router.route(x, empty(T, WIDTH), empty(T), empty(WIDTH, WIDTH), empty(WIDTH), kind="softmax")
    elif case.variant == "mean":
        router.token_mean(x)
    else:
        merge.merge(empty(B, 1 + T, dtype=torch.float32), stack.flatten(1), empty(B, HIDDEN * WIDTH))


VARIANTS = ("forward", "dx", "gated", "ragged", "topk", "dw", "router", "mean", "merge")


class Recorder:
    """Stands in for a kernel and notes its launches."""

    def __init__(self, kernel: Any, note: Callable[[str, dict[str, Any], dict[str, int]], None]) -> None:
        self.kernel = kernel
        self.note = note

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options: dict[str, int] = {n: kwargs.pop(n) for n in ("num_warps", "num_stages") if n in kwargs}
            names = self.kernel.arg_names[: len(args)]
            self.note(self.kernel.__name__, {**dict(zip(names, args, strict=True)), **kwargs}, options)

        return launch


def launches(case: Case) -> list[Launch]:
    """What the launcher of a case would launch on its target."""
    noted: list[Launch] = []
    problems: list[Problem | None] = [None]

    def note(kernel: str, arguments: dict[str, Any], options: dict[str, int]) -> None:
        noted.append(Launch(kernel, arguments, options, problems[-1]))

    def choose(problem: Problem) -> Tile:
        on_target = replace(problem, device=TARGETS[case.target].device)
        problems.append(on_target)
        return case.tile or tuning.default(on_target)

    precision = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, precision)
        torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
        stack.enter_context(patch.object(tuning, "choose", choose))
        for name, module in MODULES.items():
            stack.enter_context(patch.object(module, name, Recorder(getattr(module, name), note)))
        launch(case)
    return noted


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


def resident_programs(registers: int, shared: int, warps: int, target: Target) -> int:
    """How many programs run on a multiprocessor at once."""
    per_program = -(-max(1, registers) // 8) * 8 * target.gpu.warp_size * warps
    return min(
        target.programs,
        target.warps // warps,
        target.registers // per_program,
        target.shared_memory // (shared + target.reserved) if shared + target.reserved else target.programs,
    )


@dataclass(frozen=True)
class Work:
    """Of one program in one step of its loop: FLOPs of matrix products and of merging, bytes read out of L2."""

    products: float
    merging: float
    bytes: float

    def seconds(self, target: Target, dtype: str) -> dict[str, float]:
        """What each would take by itself with the whole GPU, times 1e12; an estimate."""
        times = {"matrix": self.products / target.rates[dtype], "merge": self.merging / target.flops}
        if dtype == "float32" and target.nvidia:  # the same units
            times = {"fp32": sum(times.values())}
        return {**times, "L2": self.bytes / target.l2}


def work(launch: Launch) -> Work | None:
    """None for kernels without a product."""
    tile, problem = launch.tile, launch.problem
    if tile is None or problem is None:
        return None
    G, size = tile.group, problem.element_size
    stacks = 2 if problem.gated else 1
    products = 2.0 * stacks * G * tile.rows * tile.tokens * tile.depth
    if launch.kernel == "merged_linear_kernel":
        slots = problem.slots(G)
        # About what the threads hold between them: warps along the tokens merge the same tile once more.
        merged = tuning.merged_registers(tile, problem) * 32 * tile.warps
        weights = stacks * (1 + slots) * tile.rows * tile.depth
        return Work(products, 2.0 * stacks * slots * merged, size * (weights + G * tile.tokens * tile.depth))
    if launch.kernel == "merged_linear_dw_kernel":
        # Once a program, here spread over its steps.
        task_vectors = problem.kept * tile.rows * tile.depth / -(-problem.tokens // tile.tokens)
        samples = G * tile.tokens * (tile.rows + tile.depth)
        return Work(products, 2 * G * task_vectors, size * (task_vectors + samples))
    return Work(products, 0, size * tile.depth * (tile.rows + G * tile.tokens))


@dataclass
class Row:
    """A line of the report. ``of_peak`` is the share of the matrix rate the bound allows, an estimate."""

    target: str
    kernel: str
    variant: str
    dtype: str
    samples: int
    tokens: int
    experts: int
    tile: Tile | None = None
    code: Code | None = None
    resident: int | None = None
    work: Work | None = None
    bound: str = ""
    of_peak: float | None = None
    seconds: float = 0.0
    error: str = ""
    problems: list[str] = field(default_factory=list)


def problems(code: Code, launch: Launch, target: Target) -> list[str]:
    """What is wrong with a compiled kernel."""
    found = []
    if code.stack or code.spill_loads or code.spill_stores:
        found.append("spills")
    if code.shared > target.device.shared_memory:
        found.append("exceeds the shared memory")
    if launch.tile is None or launch.problem is None or not launch.problem.on_tensor_cores:
        return found
    if not code.matrix:
        found.append(f"no {target.matrix}")
    if launch.kernel == "merged_linear_kernel" and target.nvidia:
        if "shared" in code.left_operands:
            found.append("left operand from shared memory")
        if code.loose_loads and launch.tile.stages > 1:
            found.append("loads outside of the pipeline")
    return found


def measured(row: Row, launch: Launch, code: ASTSource) -> Row:
    """The row with what compiling says; a failure goes into the row."""
    target = TARGETS[row.target]
    start = time.perf_counter()
    try:
        row.code = build(code, launch.options, target)
    except Exception as error:  # whatever the compiler raises is a finding
        return failed(row, error)
    row.seconds = round(time.perf_counter() - start, 2)
    row.resident = resident_programs(row.code.registers, row.code.shared, launch.options.get("num_warps", 4), target)
    row.work = work(launch)
    if row.work is not None:
        times = row.work.seconds(target, row.dtype)
        row.bound = max(times, key=lambda name: times[name])
        row.of_peak = round(row.work.products / target.rates[row.dtype] / times[row.bound], 3)
    row.problems = problems(row.code, launch, target)
    return row


def failed(row: Row, error: Exception) -> Row:
    row.error = f"{type(error).__name__}: {error}"
    row.problems = ["does not compile"]
    return row


def report(cases: Iterable[Case]) -> Iterator[Row]:
    """A row for every different kernel of the cases, compiled one after the other."""
    seen: set[tuple[str, ...]] = set()
    for case in cases:
        about = (case.variant, case.dtype, case.samples, case.tokens, case.experts)
        try:
            found = [(launch, source(launch, TARGETS[case.target].gpu)) for launch in launches(case)]
        except Exception as error:  # a launcher that fails is a row as well
            yield failed(Row(case.target, "-", *about), error)
            continue
        for launch, code in found:
            key = (case.target, launch.kernel, code.hash(), str(launch.options))
            if key not in seen:
                seen.add(key)
                yield measured(Row(case.target, launch.kernel, *about, tile=launch.tile), launch, code)


def ci_cases(targets: Sequence[str], variants: Sequence[str]) -> list[Case]:
    """A dozen that a change is most likely to break."""
    cases = [
        Case("sm_90", variant, "bfloat16", 50, 8) for variant in ("forward", "dx", "gated", "dw", "router", "merge")
    ]
    cases.append(Case("sm_90", "forward", "float32", 50, 8))
    cases += [Case(target, "forward", "bfloat16", 50, 8) for target in ("sm_80", "sm_100", "gfx942")]
    return [case for case in cases if case.target in targets and case.variant in variants]


def all_cases(targets: Sequence[str], variants: Sequence[str]) -> list[Case]:
    """Every target, variant, dtype, and size class of the problem; then the tables' entries."""
    cases = []
    for target, variant, dtype, tokens, experts, samples in product(
        targets, variants, DTYPES, (1, 16, 50, 197), (1, 8, 20), (64, 1)
    ):
        top_k = 2 if variant == "topk" else None
        if variant in ("ragged", "topk") and (tokens < 50 or samples == 1 or experts == 1):
            continue  # the forward with a few instructions more
        cases.append(Case(target, variant, dtype, tokens, experts, samples, top_k))
    return cases + [case for case in table_cases() if case.target in targets and case.variant in variants]


DEVICES = {"a100": "sm_80", "h100": "sm_90", "h200": "sm_90", "b200": "sm_100", "mi300": "gfx942"}


def table_cases() -> list[Case]:
    """The entries of the tables that come with the package, for devices among the targets."""
    cases = []
    for path in sorted(tuning.CONFIGS.glob("*.json")):
        target = next((target for name, target in DEVICES.items() if name in path.stem), None)
        for entry in json.loads(path.read_text()).get("tiles", ()) if target else ():
            top_k = entry["kept"] if entry["kept"] < entry["experts"] else None
            dtype = "tf32" if entry["precision"] == "tf32" else entry["dtype"]
            sizes = (dtype, entry["tokens"], entry["experts"], entry["samples"], top_k, Tile(**entry["tile"]))
            cases += [Case(str(target), variant, *sizes) for variant in variants_of(entry)]
    return cases


def variants_of(entry: dict[str, Any]) -> tuple[str, ...]:
    """Those that a table's entry decides."""
    if entry["kernel"] == "merged_linear_dw":
        return ("dw",)
    if entry["kernel"] == "router":
        return ("router",)
    if entry["gated"]:
        return ("gated",)
    return ("topk",) if entry["kept"] < entry["experts"] else ("forward", "dx")


COLUMNS = {
    "target": -6, "kernel": -23, "variant": -7, "dtype": -8, "BxNxT": -9, "tile": -22, "regs": 4, "stack": 5,
    "spills": 6, "shared": 6, "resident": 8, "matrix": 6, "MFLOP": 6, "merge": 5, "KiB": 5, "bound (estimate)": -20,
}  # fmt: skip
"""Headings and their widths, negative for what is aligned to the left. FLOPs and bytes are a program's in one step."""


def cells(row: Row) -> list[str]:
    """What stands in the columns."""
    tile, code, step = row.tile, row.code, row.work
    shape = f"{tile.rows}x{tile.tokens}x{tile.depth} g{tile.group} s{tile.stages} w{tile.warps}" if tile else "-"
    text = [row.target, row.kernel, row.variant, row.dtype, f"{row.samples}x{row.tokens}x{row.experts}", shape]
    if code is None:
        return text
    text += [str(code.registers), str(code.stack), f"{code.spill_loads}/{code.spill_stores}", str(code.shared)]
    text += [str(row.resident), str(code.matrix)]
    if step is None:
        return text
    text += [f"{step.products / 1e6:.2f}", f"{step.merging / 1e6:.2f}", f"{step.bytes / 1024:.0f}"]
    return [*text, f"{row.bound}, {row.of_peak:.0%} of peak"]


def line(texts: Iterable[str]) -> str:
    """A line of the table."""
    return "  ".join(
        text.rjust(width) if width > 0 else text.ljust(-width)
        for text, width in zip(texts, COLUMNS.values(), strict=False)
    )


def remark(row: Row) -> str:
    """What is wrong, behind the columns."""
    text = f"  PROBLEM: {', '.join(row.problems)}" if row.problems else ""
    return f"{text}: {' '.join(row.error.split())[:200]}" if row.error else text


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, write the JSON; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--kernels", nargs="+", choices=VARIANTS, default=VARIANTS, help="what to launch")
    parser.add_argument("--subset", choices=("ci", "all"), default="ci", help="a dozen kernels, or all (hours)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    cases = (ci_cases if options.subset == "ci" else all_cases)(options.targets, options.kernels)
    rows = []
    sys.stdout.write(line(COLUMNS) + "\n")
    for row in report(tqdm(cases, unit="launch", file=sys.stderr)):
        rows.append(row)
        sys.stdout.write(line(cells(row)) + remark(row) + "\n")
        sys.stdout.flush()
    wrong = sum(bool(row.problems) for row in rows)
    sys.stdout.write(f"{len(rows)} kernels, {wrong} with problems. Bounds are estimates, from:\n")
    for name in options.targets:
        sys.stdout.write(f"  {name}: {TARGETS[name].source}\n")
    if options.json is not None:
        sources = {name: TARGETS[name].source for name in options.targets}
        write_json(
            options.json,
            {"triton": triton.__version__, "bounds": sources, "rows": [asdict(row) for row in rows]},
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
