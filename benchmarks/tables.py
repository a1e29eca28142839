"""Results of the throughput harness as text.

python -m benchmarks.tables benchmarks/results/bench-cpu-amd-epyc-avx2.json    # as Markdown
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wemoe_fast.report import markdown_table

from . import peers
from .contenders import STRATEGIES

ORDER = (peers.STATIC, peers.PREALLOCATED, *STRATEGIES, peers.FUSION_BENCH, peers.LOOP, peers.VMAP,
         peers.MATERIALISED, peers.COMPILED)  # fmt: skip
COLUMNS = ("ms", "lowest", "highest", "calls", "x static", "samples/s", "peak MiB")
Result = Mapping[str, Any]


def label(name: str) -> str:
    """A contender as a reader knows it."""
    return f"wemoe-fast, {name}" if name in STRATEGIES else name


def block(result: Result) -> str:
    """One workload: a line for every contender, "-" for who was left out."""
    floor = f"; floor {result['floor']:.2f}x" if result["floor"] else ""
    lines = [
        f"{result['name']}{floor}",
        f"  {'':<30}" + "".join(f"{title:>10}" for title in COLUMNS),
    ]
    times = result["milliseconds"]
    for name in ORDER:
        if name in times:
            low, high = result["spread"][name]
            peak = result["peak_extra_bytes"][name]
            cells = [
                *(f"{value:.2f}" for value in (times[name], low, high)),
                f"{result['repeats'][name]}",
                f"{result['ratio_to_static'][name]:.2f}",
                f"{result['samples_per_second'][name]:.1f}",
                "-" if peak is None else f"{peak / 2**20:.0f}",
            ]
            lines.append(f"  {label(name):<30}" + "".join(f"{cell:>10}" for cell in cells))
        elif name in result["left_out"]:
            lines.append(f"  {label(name):<30}{'-':>10}")
    return "\n".join(lines)


def summary(results: Sequence[Result]) -> str:
    """One line a workload: what matters most, as ratios to the static model."""
    columns = (peers.PREALLOCATED, "auto", peers.MATERIALISED, peers.COMPILED, peers.VMAP, peers.FUSION_BENCH)
    titles = ("prealloc.", "auto", "mat+bmm", "compiled", "vmap", "FusionBench")
    width = max(len(result["name"]) for result in results)
    heading = f"{'times the static model':<{width}}{'static ms':>11}{'floor':>6}"
    lines = [heading + "".join(f"{title:>12}" for title in titles) + f"{'auto faster':>12}"]
    for result in results:
        times, ratios = result["milliseconds"], result["ratio_to_static"]
        floor = f"{result['floor']:.2f}" if result["floor"] else "-"
        cells = [f"{ratios[name]:.2f}" if name in ratios else "-" for name in columns]
        both = "auto" in times and peers.FUSION_BENCH in times
        gain = f"{times[peers.FUSION_BENCH] / times['auto']:.1f}x" if both else "-"
        lines.append(
            f"{result['name']:<{width}}{times[peers.STATIC]:>11.2f}{floor:>6}"
            + "".join(f"{cell:>12}" for cell in (*cells, gain))
        )
    return "\n".join(lines)


def markdown(results: Sequence[Result]) -> str:
    """One row a workload that both the static model and ours ran: milliseconds and times the static model."""
    columns = ("auto", peers.MATERIALISED, peers.COMPILED, peers.FUSION_BENCH)
    titles = ("", "static", "wemoe-fast", *columns[1:], "than FusionBench")
    lines: list[Sequence[str]] = [titles]
    for result in results:
        times, ratios = result["milliseconds"], result["ratio_to_static"]
        if peers.STATIC not in times or "auto" not in times:
            continue
        words = [
            result["shape"],
            "whole tower" if result["level"] == "tower" else "",
            "adaptation step" if result["step"] == "adapt" else "",
            "bf16" if result["dtype"] == "bfloat16" else "",
            f"{result['T']} experts" if result["T"] != 8 else "",
        ]
        shape = " x ".join(str(result[key]) for key in ("B", "N", "d", "h"))
        cells = [f"{', '.join(filter(None, words))}: {shape}", f"{times[peers.STATIC]:.0f} ms"]
        cells += [f"{times[name]:.0f} ms, {ratios[name]:.2f}x" if name in times else "-" for name in columns]
        known = peers.FUSION_BENCH in times
        cells.append(f"{times[peers.FUSION_BENCH] / times['auto']:.1f}x" if known else "-")
        lines.append(cells)
    return markdown_table(lines)


def absences(results: Sequence[Result]) -> Iterator[str]:
    """Who was left out, where and why."""
    where: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        for name, reason in result["left_out"].items():
            where[name, reason].append(result["name"])
    for (name, reason), found in where.items():
        places = f"{len(found)} of {len(results)} workloads" if len(found) > 3 else "; ".join(found)
        yield f"not timed: {label(name)}: {reason} ({places})"


if __name__ == "__main__":
    for file in sys.argv[1:]:
        sys.stdout.write(markdown(json.loads(Path(file).read_text(encoding="utf-8"))["results"]) + "\n")
