"""The GPU check, end to end on the CPU in Triton's interpreter, and what it says of something broken."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from wemoe_fast import chunked
from wemoe_fast.benchmarks import checks, gpu_check, timings
from wemoe_fast.benchmarks.checks import Case
from wemoe_fast.benchmarks.timings import Group, Settings
from wemoe_fast.benchmarks.workers import JobError, Pool, Worker

ROOT = Path(__file__).parents[1]
GROUP = Group("forward", 3, 7, 40, 56, 3, "bfloat16")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the dry run, in a process of its own: Triton reads at its import that it is to interpret."""
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=570, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "MISSED" in done.stdout  # an interpreter is not fast
    contents: dict[str, Any] = json.loads((out / "gpu-check-interpreter.json").read_text())
    return contents


def test_dry_run_passes_every_check(report: dict[str, Any]) -> None:
    kept = report["checks"]
    assert kept["passed"] == len(kept["cases"]) > 80
    assert not kept["failed"]
    assert not kept["not_run"]
    subjects = {case["subject"].split("/")[0] for case in kept["cases"]}
    assert subjects == set(checks.SUBJECTS) - {"capture", "wide"}, "those need a GPU"


def test_dry_run_measures_every_group(report: dict[str, Any]) -> None:
    assert [result["name"] for result in report["times"]] == [group.name for group in timings.groups("dry")]
    assert not report["not_run"]
    assert not report["not_measured"]
    for result in report["times"]:
        assert not set(result["left_out"]) - {"FusionBench"}
        if result["kind"] in ("forward", "backward"):
            times = result["milliseconds"]
            assert {"static", "loop over samples", *checks.STRATEGIES} <= set(times)
            assert all(math.isfinite(value) and value > 0 for value in times.values())
    linears = next(result["linears"] for result in report["times"] if result["kind"] == "linears")
    assert set(linears["up"]["predicted_microseconds"]) == {"chunked", "fused", "factored"}


def test_dry_run_evaluates_the_targets(report: dict[str, Any]) -> None:
    assert {target["what"] for target in report["targets"]} == {
        "times the static MLP",
        "faster than materialise + bmm, compiled",
        "faster than loop over samples",
        "forward and backward, times the static MLP",
    }


def break_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.forward

    def wrong(*arguments: Any) -> Tensor:
        y = right(*arguments)
        y[-1, -1, -1] += 0.25
        return y

    monkeypatch.setattr(chunked, "forward", wrong)


@pytest.mark.parametrize("dtype", list(checks.DTYPES))
def test_one_wrong_number_fails_its_check(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    case = Case("ops/chunked", dtype, 3, 7, 3, 40, 56, strategy="chunked")
    assert checks.run(case, "cpu").passed
    break_chunked(monkeypatch)
    verdict = checks.run(case, "cpu")
    assert verdict.passed is False
    assert verdict.problem is not None
    assert verdict.problem.startswith("y: rms")


def test_an_unwritten_element_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "forward", lambda x, stack, *_: x.new_empty(*x.shape[:2], stack.shape[1]))
    assert checks.run(Case("ops/chunked", "float32", 3, 7, 3, 40, 56, strategy="chunked"), "cpu").passed is False


def test_results_that_change_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    right = chunked.forward
    monkeypatch.setattr(chunked, "forward", lambda *a: right(*a) * (1 + 1e-7 * torch.rand(())))
    verdict = checks.run(Case("ops/chunked", "float32", 3, 7, 3, 40, 56, strategy="chunked"), "cpu")
    assert verdict.passed is False
    assert verdict.outputs["y"]["identical"] is False


def test_an_exception_fails_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "forward", lambda *_: 1 / 0)
    verdict = checks.run(Case("ops/chunked", "float32", 3, 7, 3, 40, 56, strategy="chunked"), "cpu")
    assert verdict.passed is False
    assert "ZeroDivisionError" in str(verdict.problem)


def test_what_failed_its_check_gets_no_time() -> None:
    failed = {("ops/chunked", "bfloat16"), ("dw", "bfloat16"), ("merged_linear", "float16")}
    assert set(timings.excluded(GROUP, failed)) == {"chunked"}
    backward = Group("backward", *list(vars(GROUP).values())[1:])
    assert set(timings.excluded(backward, failed)) == {"chunked", "fused", "auto"}


def test_what_is_wrong_at_the_timed_shape_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    break_chunked(monkeypatch)
    failed = {("ops/fused", "bfloat16")}  # the interpreter may be off in this process
    result = timings.measure(GROUP, Settings("cpu"), failed)
    assert set(result["left_out"]) >= {"chunked", "fused"}
    assert set(result["milliseconds"]) & set(checks.STRATEGIES) == {"factored", "auto"}  # which takes factored here


def test_shapes_and_kinds_of_the_full_suite() -> None:
    cases, groups = checks.cases("full", "cuda"), timings.groups("full")
    assert len({case.name for case in cases}) == len(cases)
    assert len({group.name for group in groups}) == len(groups)
    assert {case.N for case in cases} >= {1, 7, 50, 65, 197, 257}
    assert {case.T for case in cases} >= {1, 3, 8, 20}
    assert {case.B for case in cases} >= {1, 3, 64}
    assert {case.layout for case in cases} >= set(checks.LAYOUTS)


def test_without_time_everything_is_listed_as_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_check.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 0
    report = json.loads((tmp_path / "gpu-check-interpreter.json").read_text())
    assert report["not_run"] == [group.name for group in timings.groups("dry")]
    assert len(report["checks"]["not_run"]) > 80


def _die(code: int) -> None:
    os._exit(code)


def test_a_lost_process_costs_one_job() -> None:
    worker = Worker()
    try:
        with pytest.raises(JobError, match="exit code 3"):
            worker.run(_die, 3, seconds=60)
        with pytest.raises(JobError, match="not done after"):
            worker.run(time.sleep, 60, seconds=0.1)
        with pytest.raises(JobError, match="ZeroDivisionError"):
            worker.run(divmod, 1, 0, seconds=60)
        assert worker.run(divmod, 7, 2, seconds=60) == (3, 1)
    finally:
        worker.stop()


def test_a_pool_gives_every_job_a_result_or_names_it() -> None:
    pool: Pool[int, Any] = Pool(2)
    results: dict[int, Any] = {}
    try:
        left = pool.map(hex, [1, 2, 3], results.__setitem__, deadline=time.monotonic() + 60, seconds=60)
        late = pool.map(hex, [4], results.__setitem__, deadline=time.monotonic() - 1, seconds=60)
    finally:
        pool.stop()
    assert results == {1: "0x1", 2: "0x2", 3: "0x3"}
    assert (left, late) == ([], [4])
