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
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import triton
from tqdm import tqdm
from triton.compiler import ASTSource

from wemoe_fast.kernels import tuning
from wemoe_fast.kernels.tuning import Tile
from wemoe_fast.report import write_json

from .compiled import Code, build, source
from .launches import DTYPES, VARIANTS, Case, Launch, launches, work
from .targets import TARGETS, Target, Work, resident_programs


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


def all_cases(targets: Sequence[str], variants: Sequence[str], dtypes: Sequence[str] = tuple(DTYPES)) -> list[Case]:
    """Every target, variant, dtype, and size class of the problem; then the tables' entries."""
    cases = []
    for target, variant, dtype, tokens, experts, samples in product(
        targets, variants, dtypes, (1, 16, 50, 197), (1, 8, 20), (64, 1)
    ):
        top_k = 2 if variant == "topk" else None
        if variant in ("ragged", "topk") and (tokens < 50 or samples == 1 or experts == 1):
            continue  # the forward with a few instructions more
        cases.append(Case(target, variant, dtype, tokens, experts, samples, top_k))
    shipped = [case for case in table_cases() if case.target in targets and case.variant in variants]
    return cases + [case for case in shipped if case.dtype in dtypes]


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
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of --subset all")
    parser.add_argument("--subset", choices=("ci", "all"), default="ci", help="a dozen kernels, or all (hours)")
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    options = parser.parse_args(arguments)
    if options.subset == "ci":
        cases = ci_cases(options.targets, options.kernels)
    else:
        cases = all_cases(options.targets, options.kernels, options.dtypes)
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
