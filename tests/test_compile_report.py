"""benchmarks/compile_report.py: what it reads off compiled code, and that the kernels compile as they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from wemoe_fast.benchmarks import compile_report, compiled, launches, targets
from wemoe_fast.benchmarks.compile_report import Row
from wemoe_fast.benchmarks.compiled import Code
from wemoe_fast.benchmarks.launches import Case, Launch
from wemoe_fast.benchmarks.targets import TARGETS, Work
from wemoe_fast.kernels.tuning import Problem, Tile

ROOT = Path(__file__).parents[1]
HOPPER = TARGETS["sm_90"]
CLEAN = Code(registers=128, stack=0, spill_loads=0, spill_stores=0, matrix=8, left_operands=("registers",))
CUOBJDUMP = """
Resource usage:
 Common:
  GLOBAL:0
 Function merged_linear_kernel:
  REG:255 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:708 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*0a10*/                   LDL.64 R24, [R1+0x8] ;
        /*0a20*/                   STL [R1], R6 ;
        /*0a30*/                   STL.128 [R1+0x10], R8 ;
        /*0a40*/                   HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24 ;
        /*0a50*/                   LDGSTS.E.BYPASS.128 [R9+0x800], desc[UR10][R2.64] ;
"""
AMDGCN = """
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[2:3], v[4:5], a[0:15]
	v_mfma_f32_32x32x8_bf16_1k a[0:15], v[6:7], v[8:9], a[0:15]
    .private_segment_fixed_size: 16
    .sgpr_count:     40
    .sgpr_spill_count: 2
    .vgpr_count:     164
    .vgpr_spill_count: 3
"""
TTGIR = """
%1 = ttng.warp_group_dot %a, %b, %c {inputPrecision = 0 : i32} : tensor<64x32xbf16, #op> * !ttg.memdesc<32x64xbf16> -> x
%2 = ttng.warp_group_dot %d, %b, %c : !ttg.memdesc<64x32xbf16, #shared> * !ttg.memdesc<32x64xbf16> -> x
%3 = tt.load %p, %m, %z : tensor<64x32x!tt.ptr<bf16>, #blocked>
%4 = tt.load %q : tensor<64x!tt.ptr<bf16>, #blocked>
"""


def forward(dtype: torch.dtype = torch.bfloat16, **changes: int) -> Launch:
    tile = replace(Tile(64, 64, 32, group=2, stages=3, warps=8), **changes)
    constants = tile.constants()
    options = {name: constants.pop(name) for name in ("num_stages", "num_warps")}
    problem = Problem(
        "merged_linear", HOPPER.device, dtype, samples=64, tokens=50, rows=3072, depth=768, experts=8, kept=8
    )
    return Launch("merged_linear_kernel", constants, options, problem)


def row(problems: list[str]) -> Row:
    return Row("sm_90", "merged_linear_kernel", "forward", "bfloat16", 64, 50, 8, problems=problems)


def test_reads_registers_spills_and_matrix_instructions_of_nvidia() -> None:
    assert compiled.nvidia_code(CUOBJDUMP, "HGMMA") == Code(255, 24, spill_loads=1, spill_stores=2, matrix=1)
    assert compiled.nvidia_code(CUOBJDUMP, "HMMA").matrix == 0
    with pytest.raises(ValueError, match="resource usage"):
        compiled.nvidia_code("", "HGMMA")


def test_reads_registers_spills_and_matrix_instructions_of_amd() -> None:
    assert compiled.amd_code(AMDGCN, "v_mfma") == Code(164, 16, spill_loads=3, spill_stores=2, matrix=2)
    with pytest.raises(ValueError, match="vgpr_count"):
        compiled.amd_code("", "v_mfma")


def test_reads_operands_and_loads() -> None:
    assert compiled.left_operands(TTGIR) == ("registers", "shared")
    assert compiled.loose_loads(TTGIR) == 1


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 128, 0, 8, 2),  # 64 K registers / (128 * 256)
        ("sm_90", 129, 0, 8, 1),  # allocated by eights
        ("sm_90", 16, 0, 8, 8),  # 64 warps
        ("sm_90", 16, 0, 1, 32),
        ("sm_90", 32, 75 << 10, 4, 3),  # 228 KiB / (75 + 1)
        ("sm_90", 32, 76 << 10, 4, 2),
        ("sm_80", 32, 163 << 10, 4, 1),
        ("gfx942", 128, 0, 4, 4),  # 512 registers of each of 4 SIMDs
        ("gfx942", 64, 32 << 10, 4, 2),
        ("gfx942", 16, 0, 4, 8),
    ],
)
def test_resident_programs(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert targets.resident_programs(registers, shared, warps, TARGETS[target]) == programs


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"stack": 8}, "spills"),
        ({"spill_loads": 1}, "spills"),
        ({"spill_stores": 1}, "spills"),
        ({"shared": (227 << 10) + 1}, "exceeds the shared memory"),
        ({"matrix": 0}, "no HGMMA"),
        ({"left_operands": ("registers", "shared")}, "left operand from shared memory"),
        ({"loose_loads": 9}, "loads outside of the pipeline"),
    ],
)
def test_problems(changes: dict[str, int], problem: str) -> None:
    assert compile_report.problems(CLEAN, forward(), HOPPER) == []
    assert compile_report.problems(replace(CLEAN, **changes), forward(), HOPPER) == [problem]


def test_what_float32_and_one_stage_cannot_have_is_no_problem() -> None:
    plain = replace(CLEAN, matrix=0, left_operands=(), loose_loads=9)
    assert compile_report.problems(plain, forward(torch.float32), HOPPER) == []
    assert compile_report.problems(replace(CLEAN, loose_loads=9), forward(stages=1), HOPPER) == []


def test_work_of_a_step() -> None:
    products = 2 * 2 * 64 * 64 * 32
    # 8 warps on 64 rows: two warpgroups, each of which merges the tile.
    merging = 2 * 8 * (2 * 64 * 32) * 2
    read = 2 * (9 * 64 * 32 + 2 * 64 * 32)
    assert launches.work(forward()) == Work(products, merging, read)
    assert launches.work(Launch("merge_kernel", {}, {}, None)) is None
    times = Work(1978.0, 67.0, 11.0).seconds(HOPPER, "bfloat16")
    assert times == pytest.approx({"matrix": 2.0, "merge": 1.0, "L2": 2.0})
    assert Work(67.0, 67.0, 0).seconds(HOPPER, "float32")["fp32"] == pytest.approx(2.0)


@pytest.mark.parametrize(("problems", "status"), [([], 0), (["spills"], 1)])
def test_exit_status(
    problems: list[str],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(compile_report, "report", lambda cases: [row(problems)])
    assert compile_report.main(["--json", str(tmp_path / "report.json")]) == status
    assert ("PROBLEM: spills" in capsys.readouterr().out) == bool(status)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["problems"] == problems


def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Code:
        raise RuntimeError("no such layout")

    monkeypatch.setattr(compile_report, "build", fail)
    result = compile_report.measured(row([]), forward(), None)  # type: ignore[arg-type]
    assert result.problems == ["does not compile"]
    assert result.error == "RuntimeError: no such layout"


def test_a_launcher_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(case: Case) -> None:
        raise TypeError("unexpected argument")

    monkeypatch.setattr(launches, "launch", fail)
    (result,) = compile_report.report([Case("sm_90", "forward", "bfloat16", 50, 8)])
    assert result.problems == ["does not compile"]
    assert "unexpected argument" in result.error


def test_launches_are_those_of_the_launchers() -> None:
    (dx,) = launches.launches(Case("sm_90", "dx", "bfloat16", 50, 8))
    assert (dx.arguments["stack_row"], dx.arguments["K"], dx.arguments["H"]) == (1, 3072, 768)
    assert [one.kernel for one in launches.launches(Case("sm_90", "dw", "tf32", 50, 8))] == [
        "merged_linear_dw_kernel",
        "reduce_kernel",
    ]
    small = launches.launches(Case("gfx942", "forward", "bfloat16", 197, 20))[0]
    assert small.problem is not None
    assert small.problem.device == TARGETS["gfx942"].device


def test_a_tables_entry_becomes_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {
        "kernel": "merged_linear", "dtype": "bfloat16", "precision": "ieee", "samples": 64, "tokens": 256,
        "experts": 8, "kept": 8, "gated": False,
        "tile": {"rows": 64, "tokens": 64, "depth": 16, "group": 2, "stages": 2, "warps": 8},
    }  # fmt: skip
    (tmp_path / "nvidia-h100-80gb-hbm3.json").write_text(json.dumps({"tiles": [entry, {**entry, "kept": 2}]}))
    (tmp_path / "some-other-gpu.json").write_text(json.dumps({"tiles": [entry]}))
    monkeypatch.setattr(compile_report.tuning, "CONFIGS", tmp_path)
    cases = compile_report.table_cases()
    assert [(case.target, case.variant, case.top_k) for case in cases] == [
        ("sm_90", "forward", None),
        ("sm_90", "dx", None),
        ("sm_90", "topk", 2),
    ]
    (launch,) = launches.launches(cases[0])
    assert launch.tile == Tile(64, 64, 16, 2, 2, 8)


def test_kernels_compile_without_problems(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile_report", "--subset", "ci", "--json", str(tmp_path / "ci.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (tmp_path / "ci.json").is_file(), result.stderr
    rows = json.loads((tmp_path / "ci.json").read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert {"merged_linear_kernel", "merged_linear_dw_kernel", "hidden_sums_kernel", "merge_kernel"} <= kernels
    assert {row["target"] for row in rows} == set(TARGETS)
    assert [row for row in rows if row["problems"]] == [], result.stdout
    assert result.returncode == 0
