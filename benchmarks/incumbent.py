"""FastWEMoEMLP beside FusionBench's WeightEnsemblingMoE and the static MLP, on one machine in one run.

    python -m benchmarks.incumbent --out benchmarks/results/cpu-incumbent.json

A figure appears only for what agreed with the float64 oracle in the same run. All three are timed in turn;
the figures are medians. Without the package fusion-bench its column is left out, and that is said.
"""

from __future__ import annotations

import argparse
import copy
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_fast import FastWEMoEMLP
from wemoe_fast.comparison import environment
from wemoe_fast.report import write_json
from wemoe_fast.throughput import interleaved_seconds, medians, relative_rms

SHAPES = ((32, 50, 768, 3072), (16, 197, 768, 3072), (8, 257, 1024, 4096), (1, 50, 768, 3072), (64, 1, 768, 3072))
EXPERTS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def mlp(d: int, h: int) -> nn.Sequential:
    """The static MLP: what one merged model runs."""
    return nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))


def expert_of(base: nn.Module) -> nn.Module:
    """A version of ``base`` as far away as fine-tuning takes it: a tenth of the weights' own size."""
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
    return expert


def contenders(d: int, h: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The modules to time, from the same weights; every router with the same random parameters."""
    torch.manual_seed(0)
    base = mlp(d, h)
    experts = [expert_of(base) for _ in range(EXPERTS)]
    modules: dict[str, nn.Module] = {"static": copy.deepcopy(base)}
    fast = FastWEMoEMLP.from_mlps(base, experts, router_depth=2)
    with torch.no_grad():
        for parameter in fast.router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    modules["wemoe-fast"] = fast
    try:
        from fusion_bench.models.we_moe import WeightEnsemblingMoE
    except ImportError:
        sys.stderr.write("fusion-bench is not installed: its module is left out\n")
    else:
        theirs = WeightEnsemblingMoE(d, base, experts, batch_first=True, router_hidden_layers=2)
        for ours, other in zip(fast.router.parameters(), theirs.gate.parameters(), strict=True):
            other.data.copy_(ours)
        modules["FusionBench"] = theirs
    return {name: module.to(dtype).eval() for name, module in modules.items()}


def oracle(fast: FastWEMoEMLP, x: Tensor) -> Tensor:
    """The paper's loop in float64 over the same (rounded) numbers, for the first samples."""
    exact = copy.deepcopy(fast).double()
    exact.strategy = "reference"
    return exact(x[:2].double())


@torch.inference_mode()
def measure(shape: tuple[int, int, int, int], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    B, N, d, h = shape
    modules = contenders(d, h, dtype)
    fast = modules["wemoe-fast"]
    assert isinstance(fast, FastWEMoEMLP)
    x = torch.randn(B, N, d).to(dtype)
    expected = oracle(fast, x)
    errors = {name: relative_rms(m(x)[:2], expected) for name, m in modules.items() if name != "static"}
    wrong = [name for name, error in errors.items() if not error < TOLERANCE[dtype]]
    runs = {name: (lambda m=m: m(x)) for name, m in modules.items() if name not in wrong}
    seconds = interleaved_seconds(runs, repeats=repeats)
    middle = medians(seconds)
    return {
        "B": B, "N": N, "d": d, "h": h, "T": EXPERTS,
        "dtype": str(dtype).removeprefix("torch."),
        "relative_rms_error": errors,
        "failed_check": wrong,
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "spread": {name: [1e3 * min(values), 1e3 * max(values)] for name, values in seconds.items()},
        "ratio_to_static": {name: value / middle["static"] for name, value in middle.items()},
    }  # fmt: skip


def row(result: dict[str, Any]) -> str:
    cells = [f"{result['B']:>3} x {result['N']:>3} x {result['d']:>4}  {result['dtype']:<9}"]
    for name in ("static", "wemoe-fast", "FusionBench"):
        if name in result["milliseconds"]:
            cells.append(f"{result['milliseconds'][name]:9.1f} ms {result['ratio_to_static'][name]:6.2f}x")
        else:
            cells.append(f"{'-':>20}")
    times = result["milliseconds"]
    if "FusionBench" in times and "wemoe-fast" in times:
        cells.append(f"{times['FusionBench'] / times['wemoe-fast']:6.1f}x")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many shapes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    sys.stdout.write(f"{'B x   N x    d  dtype':<28}{'static':>20}{'wemoe-fast':>22}{'FusionBench':>22}  faster by\n")
    for dtype in options.dtypes:
        for shape in SHAPES[: options.shapes]:
            results.append(measure(shape, DTYPES[dtype], options.repeats))
            sys.stdout.write(row(results[-1]) + "\n")
            sys.stdout.flush()
    try:
        peer = version("fusion-bench")
    except PackageNotFoundError:
        peer = None
    settings = {"repeats": options.repeats, "fusion_bench": peer, "inputs": "standard normal", "router_depth": 2}
    write_json(options.out, {"environment": environment(), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
