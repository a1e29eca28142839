"""The throughput harness on tiny shapes: checks first, times only for what is right, a budget, plots, comparison."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wemoe_fast import FastWEMoEMLP, chunked, native
from wemoe_fast.benchmarks import comparison, contenders, memory, peers, plots, tables, throughput, workloads
from wemoe_fast.benchmarks.throughput import Allowance
from wemoe_fast.benchmarks.workloads import SUITES, TINY, Workload
from wemoe_fast.errors import InputError
from wemoe_fast.kernels.native import why_not

CPU = torch.device("cpu")
DRY = SUITES["dry"]
NATIVE = why_not(torch.float32, torch.float32) is None
OURS = {"auto", "chunked", "factored", "reference", *(["native"] if NATIVE else [])}
PLAIN = {peers.LOOP, peers.VMAP, peers.MATERIALISED}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny products on several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def measure(workload: Workload, *, seconds: float = math.inf, compiled: bool = False) -> dict[str, Any]:
    allowance = Allowance(seconds, seconds)
    return throughput.measure(workload, CPU, DRY, allowance, () if compiled else (peers.COMPILED,))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """Report, text and folder of the whole dry suite."""
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    out, text = tmp_path_factory.mktemp("bench"), io.StringIO()
    before = torch.get_num_threads()
    options = ["--suite", "dry", "--out", str(out), "--quiet", "--threads", "1", "--without", peers.COMPILED]
    with redirect_stdout(text):
        status = throughput.main(options)
    torch.set_num_threads(before)
    assert status == 0, text.getvalue()
    (path,) = out.glob("bench-dry-*.json")
    return json.loads(path.read_text()), text.getvalue(), out


def test_every_workload_of_the_suite_is_measured(run: tuple[dict[str, Any], str, Path]) -> None:
    report, text, _ = run
    assert [result["name"] for result in report["results"]] == [one.name for one in DRY.workloads]
    assert not report["failed"]
    assert not report["not_run"]
    for result in report["results"]:
        timed = set(result["milliseconds"])
        wanted = {peers.STATIC, "auto"} if result["level"] == "tower" else {peers.STATIC, *OURS, *PLAIN}
        assert wanted <= timed
        assert (peers.PREALLOCATED in timed) == (result["level"] == "mlp" and result["step"] == "forward")
        assert not timed & set(result["left_out"])
        assert result["ratio_to_static"][peers.STATIC] == 1
        for name in timed:
            low, high = result["spread"][name]
            assert 0 < low <= result["milliseconds"][name] <= high
            assert result["repeats"][name] == 2
            expected = 1e3 * result["B"] / result["milliseconds"][name]
            assert result["samples_per_second"][name] == pytest.approx(expected)
        assert timed <= {*result["relative_rms_error"], peers.STATIC}, "timed unchecked"
        assert result["name"] in text
    assert {"threads", "torch", "cpu", "fusion_bench"} <= set(report["environment"])


def test_fusion_bench_runs_in_towers_too(run: tuple[dict[str, Any], str, Path]) -> None:
    pytest.importorskip("fusion_bench.models.we_moe")
    assert all(peers.FUSION_BENCH in result["milliseconds"] for result in run[0]["results"])


def test_whoever_is_left_out_is_named_with_the_reason(run: tuple[dict[str, Any], str, Path]) -> None:
    report, text, _ = run
    for result in report["results"]:
        for name, reason in result["left_out"].items():
            assert f"not timed: {tables.label(name)}: {reason}" in text


def test_markdown_has_a_row_for_every_workload(run: tuple[dict[str, Any], str, Path]) -> None:
    results = run[0]["results"]
    head, _, *rows = tables.markdown(results).splitlines()
    assert len(rows) == len(results)
    for row, result in zip(rows, results, strict=True):
        assert row.count("|") == head.count("|")
        assert f"{result['milliseconds']['auto']:.0f} ms, {result['ratio_to_static']['auto']:.2f}x" in row
        assert ("whole tower" in row) == (result["level"] == "tower")
        assert ("experts" in row) == (result["T"] != 8)
    assert tables.markdown([{**results[0], "milliseconds": {}}]).count("\n") == 1


def test_plots_are_written_and_not_empty(run: tuple[dict[str, Any], str, Path]) -> None:
    from matplotlib.image import imread

    report, _, out = run
    written = {path.name.partition("-ratio")[0] for path in out.glob("*ratio-by-*.png")}
    assert len(written) == 1
    for figure in plots.FIGURES:
        if figure.name != "memory-by-batch":  # tiny calls may take no memory at all
            (path,) = out.glob(f"*-{figure.name}.png")
            pixels = imread(path)[..., :3].reshape(-1, 3)
            coloured = (pixels.max(1) - pixels.min(1) > 0.2).mean()
            assert coloured > 0.002, path
    assert not plots.write_plots(report["results"][:1], out / "one")
    for result in report["results"]:
        result["peak_extra_bytes"] = dict.fromkeys(result["milliseconds"], 1 << 20)
    assert "memory-by-batch" in plots.write_plots(report["results"], out / "all")


@pytest.mark.parametrize("step", ["forward", "adapt"])
def test_a_wrong_strategy_gets_no_time(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    module, name = (native, "native") if NATIVE else (chunked, "chunked")
    whole = NATIVE and step == "forward"  # a whole MLP at a time
    right = native.mlp if whole else module.forward

    def wrong(*arguments: Any) -> Tensor:
        y = right(*arguments)
        y[-1, -1, -1] += 0.25
        return y

    monkeypatch.setattr(module, "mlp" if whole else "forward", wrong)
    result = measure(Workload(TINY, 3, step=step))
    assert set(result["failed"]) == {"auto", name}
    assert not {"auto", name} & set(result["milliseconds"])
    assert {"reference", "factored", *PLAIN} <= set(result["milliseconds"])


@pytest.mark.parametrize(
    ("peer", "name"),
    [
        (peers.VmapOverSamples, peers.VMAP),
        (peers.LoopOverSamples, peers.LOOP),
        (peers.Preallocated, peers.PREALLOCATED),
    ],
)
def test_a_wrong_peer_gets_no_time(monkeypatch: pytest.MonkeyPatch, peer: Any, name: str) -> None:
    method = "forward" if issubclass(peer, nn.Module) else "__call__"
    right = getattr(peer, method)
    monkeypatch.setattr(peer, method, lambda self, x: right(self, x) * 1.001)
    result = measure(Workload(TINY, 3))
    assert set(result["failed"]) == {name}
    assert name not in result["milliseconds"]


def test_a_peer_that_breaks_is_reported_and_costs_nobody_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.VmapOverSamples, "forward", lambda self, x: 1 / 0)
    only = "tiny mlp forward B1"
    options = ["--suite", "dry", "--only", only, "--out", str(tmp_path), "--quiet", "--without", peers.COMPILED]
    assert throughput.main(options) == 1
    shown = capsys.readouterr().out
    assert f"FAILED {only} N5 d16 T8 float32: {peers.VMAP}: ZeroDivisionError" in shown
    assert "wemoe-fast, auto" in shown


def test_without_fusion_bench_its_absence_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "fusion_bench", lambda *_, **__: None)
    for workload in (Workload(TINY, 2), Workload(TINY, 2, T=2, level="tower")):
        assert measure(workload)["left_out"][peers.FUSION_BENCH] == contenders.NO_FUSION_BENCH


def test_what_would_break_the_budget_is_left_out_by_name() -> None:
    result = measure(Workload(TINY, 3), seconds=1e-6, compiled=True)
    assert set(result["milliseconds"]) == {peers.STATIC, "auto"}
    assert "3 calls are more than its share" in result["left_out"][peers.LOOP]
    assert "3 calls are more than its share" in result["left_out"]["chunked"]
    assert "compiling takes" in result["left_out"][peers.COMPILED]


def test_repeats_go_as_far_as_patience() -> None:
    suite = workloads.Suite((), minutes=1, repeats=9, patience=1.0)
    calls = dict.fromkeys([peers.STATIC, "auto", peers.LOOP], lambda: None)
    once = {peers.STATIC: 0.01, "auto": 0.25, peers.LOOP: 3.0}
    contest = contenders.mlp_contest(Workload(TINY, 2), CPU)
    assert throughput._repeats(contest, calls, once, suite, Allowance(10.0)) == {
        peers.STATIC: 9,
        "auto": 4,
        peers.LOOP: 2,
    }
    assert throughput._repeats(contest, calls, once, suite, Allowance(8.0)) == {peers.STATIC: 9, "auto": 4}
    assert contest.left_out[peers.LOOP].startswith("3.0 s a call")


def test_time_is_shared_out_among_workloads() -> None:
    assert Allowance.of(120, 7) == Allowance(7.5, 30)
    assert Allowance.of(120, 1) == Allowance(30, 30)


def test_without_time_every_workload_is_listed_as_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--suite", "dry", "--out", str(tmp_path), "--minutes", "0", "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert all(f"not run: {one.name}" in shown for one in DRY.workloads)


def test_compiled_is_checked_and_timed_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "why_not_compiled", lambda device: None)
    monkeypatch.setattr(peers, "compiled", lambda plain: plain)
    assert peers.COMPILED in measure(Workload(TINY, 2), compiled=True)["milliseconds"]
    monkeypatch.setattr(peers, "compiled", lambda plain: lambda x: 1.001 * plain(x))
    assert peers.COMPILED in measure(Workload(TINY, 2), compiled=True)["failed"]
    monkeypatch.undo()
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert "C++ compiler" in measure(Workload(TINY, 2), compiled=True)["left_out"][peers.COMPILED]


def test_the_oracle_leaves_the_model_as_it_was() -> None:
    model = FastWEMoEMLP.from_mlps(peers.static_mlp(8, 16), [peers.static_mlp(8, 16) for _ in range(2)])
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    with contenders.in_float64(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
        assert model.strategy == "reference"
    assert model.strategy == "auto"
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gated", [False, True])
def test_preallocated_computes_the_static_mlp(gated: bool) -> None:
    base, x = peers.static_mlp(8, 16, gated), torch.randn(2, 3, 8)
    fast = peers.Preallocated(base)
    with torch.inference_mode():
        first = fast(x)
        assert torch.allclose(first, base(x), atol=1e-6)
        assert fast(2 * x).data_ptr() == first.data_ptr()


def test_floor() -> None:
    floors = [Workload(shape, 8).floor for shape in (workloads.B32, workloads.B16, workloads.L14)]
    assert floors == [pytest.approx(value, abs=0.006) for value in (1.29, 1.17, 1.16)]
    assert Workload(workloads.B32, 8, level="tower").floor is None


@pytest.mark.parametrize("suite", list(SUITES))
def test_workloads_are_named_once(suite: str) -> None:
    names = [one.name for one in SUITES[suite].workloads]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("shape", [workloads.B32, workloads.B16, workloads.L14, workloads.L14_336])
def test_images_make_the_tokens(shape: workloads.Shape) -> None:
    assert (shape.image // shape.patch) ** 2 + 1 == shape.N
    assert shape.image == (336 if "336" in shape.name else 224)


def test_peak_memory_of_a_call() -> None:
    if not memory.PROCESS.exists():
        pytest.skip("only Linux tells")
    size = 64 << 20
    assert memory.peak_extra_bytes(lambda: None, CPU) is not None
    peak = memory.peak_extra_bytes(lambda: torch.ones(size // 4), CPU)
    again = memory.peak_extra_bytes(lambda: None, CPU)
    assert peak is not None
    assert again is not None
    assert 0.9 * size < peak < 1.5 * size
    assert again < size // 4, "the peak before counts no more"


def figures(static: float = 10.0, auto: float = 20.0, noise: float = 0.05) -> dict[str, Any]:
    """A report of one workload."""
    times = {peers.STATIC: static, "auto": auto}
    spread = {name: [(1 - noise) * value, (1 + noise) * value] for name, value in times.items()}
    result = {"name": "one", "milliseconds": times, "spread": spread}
    return {"environment": {"cpu": "a", "gpu": None, "threads": 2, "torch": "2"}, "results": [result]}


def test_compare_tells_what_moved_beyond_the_noise() -> None:
    old = figures()
    assert list(comparison.moved(old, figures())) == []
    assert list(comparison.moved(old, figures(auto=21))) == [], "within the noise"
    assert list(comparison.moved(old, figures(auto=20.4, noise=0.001))) == [], "too little"
    (line,) = comparison.moved(old, figures(auto=30))
    assert line == "one: wemoe-fast, auto: 2.00 -> 3.00x static, 1.50 times slower"
    (line,) = comparison.moved(old, figures(static=20, auto=40))
    assert line == "one: static: 10.00 -> 20.00 ms, 2.00 times slower"
    (line,) = comparison.moved(old, {**figures(), "environment": {**old["environment"], "threads": 4}})
    assert line == "threads differs: 2 -> 4"


def test_compare_with_a_file(
    run: tuple[dict[str, Any], str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (path,) = run[2].glob("bench-dry-*.json")
    only = ["--suite", "dry", "--only", "tiny mlp forward B1", "--out", str(tmp_path), "--quiet"]
    assert throughput.main([*only, "--compare", str(path), "--without", peers.COMPILED]) == 0
    assert f"against {path}:" in capsys.readouterr().out
    for content in ("{}", "no json"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(InputError, match=r"other\.json"):
            throughput.main([*only, "--compare", str(tmp_path / "other.json")])


def test_an_unknown_workload_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no workload"):
        throughput.main(["--suite", "dry", "--only", "nothing", "--out", str(tmp_path)])
