"""Every way to run WEMoE side by side in one run: a table, JSON and plots.

    wemoe-fast bench --suite quick
    python -m benchmarks.throughput --suite cpu --out results --compare results/bench-cpu-amd-epyc.json

Everyone is held against the float64 oracle first; who fails gets no time. Then a call each tells memory and how
many repeats there is time for, then come the repeats in turn. Figures are medians; ratios are to the static model of
the same run. Exit status 1 if a contender was wrong or broke; who was left out is listed with the reason.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from wemoe_fast.comparison import environment
from wemoe_fast.errors import InputError
from wemoe_fast.kernels.tuning import slug
from wemoe_fast.report import write_json
from wemoe_fast.throughput import interleaved_seconds, medians, wall_seconds

from . import comparison, peers, tables
from .contenders import OWN_LOOPS, Contest, mlp_contest
from .judging import float32_products
from .memory import peak_extra_bytes
from .plots import write_plots
from .towers import tower_contest
from .workloads import SUITES, Suite, Workload

SHARE = 0.25
"""Of a workload's part of the time: what one contender may take. Of all the time: what compiling may."""
COMPILING_SECONDS = 25.0
FEWEST = 2
ALWAYS = (peers.STATIC, "auto")
QUICK = 1.0
"""Seconds of a call below which the second call tells memory and time: the first may have met memory left over."""
EVENTS_BELOW = 0.1
"""Seconds of a call below which a GPU's own clock measures it, by many calls."""


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> int:
    options = _parser(prog).parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    old = None if options.compare is None else comparison.load(options.compare)
    session = Session(options)
    session.run()
    lines = [*session.report_lines(), *session.plot()]
    if old is not None:
        lines += [f"against {options.compare}:", *(list(comparison.moved(old, session.report)) or ["nothing moved"])]
    sys.stdout.write("\n".join(lines) + f"\nresults: {session.path}\n")
    return 1 if session.report["failed"] else 0


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Time every way to run WEMoE side by side.")
    parser.add_argument("--suite", choices=list(SUITES), default="quick", help="default: quick, two minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for JSON and plots (default: results)"
    )
    parser.add_argument("--device", default="cpu", help="torch device, such as cuda (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--minutes", type=float, help="what the suite may take (default: its own measure)")
    parser.add_argument("--only", default="", metavar="TEXT", help="workloads with this in their name alone")
    parser.add_argument(
        "--compare", type=Path, metavar="JSON", help="an earlier run: print what moved beyond the noise"
    )
    parser.add_argument(
        "--without", action="append", default=[], choices=tables.ORDER[1:], metavar="NAME", help="do not time this one"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")
    return parser


@dataclass(frozen=True)
class Allowance:
    """Seconds that one contender of a workload may take for a few calls, and that compiling may take."""

    contender: float = math.inf
    compiling: float = math.inf

    @classmethod
    def of(cls, left: float, workloads: int) -> Allowance:
        """With so many seconds left for so many workloads, of which the next may take twice the mean."""
        return cls(SHARE * left * 2 / (1 + workloads), SHARE * left)


class Session:
    """One run of the command: its clock, its device and its report."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, torch.device(options.device)
        self.suite: Suite = SUITES[options.suite]
        self.workloads = [one for one in self.suite.workloads if options.only in one.name]
        if not self.workloads:
            raise InputError(f"--only {options.only}: no workload of the suite {options.suite} has this in its name")
        minutes = self.suite.minutes if options.minutes is None else options.minutes
        self.start = time.monotonic()
        self.end = self.start + 60 * minutes
        found = describe(self.device)
        self.path: Path = options.out / f"bench-{options.suite}-{slug(found['gpu'] or found['cpu'])}.json"
        self.report: dict[str, Any] = {
            "environment": found,
            "settings": {
                "suite": options.suite,
                "device": options.device,
                "minutes": minutes,
                "repeats": self.suite.repeats,
                "patience": self.suite.patience,
                "only": options.only,
                "without": options.without,
                "inputs": "standard normal",
                "router_depth": 2,
            },
            "results": [],
            "failed": [],
            "not_run": [],
        }

    def run(self) -> None:
        """Measure workload after workload; the file is rewritten as results come in."""
        for number, workload in enumerate(tqdm(self.workloads, desc="bench", disable=self.options.quiet)):
            if self.left() <= self._usual():
                self.report["not_run"].append(workload.name)
                continue
            allowance = Allowance.of(self.left(), len(self.workloads) - number)
            try:
                result = measure(workload, self.device, self.suite, allowance, self.options.without)
            except (InputError, torch.OutOfMemoryError) as error:
                self.report["not_run"].append(f"{workload.name}: {str(error).splitlines()[0]}")
                continue
            self.report["results"].append(result)
            self.report["failed"] += [
                f"{workload.name}: {tables.label(name)}: {reason}" for name, reason in result["failed"].items()
            ]
            with tqdm.external_write_mode(file=sys.stdout):
                sys.stdout.write(tables.block(result) + "\n\n")
                sys.stdout.flush()
            self._write()
        self._write()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def _usual(self) -> float:
        """Seconds a workload has taken so far, on average: what does not fit any more is not begun."""
        found = [result["seconds"] for result in self.report["results"]]
        return sum(found) / len(found) if found else 0.0

    def report_lines(self) -> list[str]:
        results = self.report["results"]
        return [
            *([tables.summary(results)] if results else []),
            *tables.absences(results),
            *(f"not run: {name}" for name in self.report["not_run"]),
            *(f"FAILED {line}" for line in self.report["failed"]),
        ]

    def plot(self) -> list[str]:
        """Draw what can be drawn; a line for every picture."""
        try:
            written = write_plots(self.report["results"], self.path.with_suffix(""))
        except InputError as error:
            return [f"no plots: {error}"]
        return [f"plot: {path}" for path in written.values()]

    def _write(self) -> None:
        self.report["seconds"] = time.monotonic() - self.start
        write_json(self.path, self.report)


def describe(device: torch.device) -> dict[str, Any]:
    """The device, the threads and the versions behind the figures."""
    found = environment() | {"system": platform.system()}
    if device.type != "cuda":
        found["gpu"] = None
    for package in ("fusion-bench", "transformers", "triton"):
        try:
            found[package.replace("-", "_")] = version(package)
        except PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found


def measure(
    workload: Workload,
    device: torch.device,
    suite: Suite,
    allowance: Allowance = Allowance(),
    without: Sequence[str] = (),
) -> dict[str, Any]:
    """The figures of a workload."""
    start = time.perf_counter()
    gc.collect()
    torch.manual_seed(0)
    with float32_products("high" if workload.dtype == "tf32" else "highest"):
        contest = (tower_contest if workload.level == "tower" else mlp_contest)(workload, device)
        for name in without:
            if name in contest.contenders or (name == peers.COMPILED and contest.compiler is not None):
                contest.leave_out(name, "as asked for")
        contest.verify()
        _compile(contest, allowance)
        calls = _affordable(contest, allowance)
        once, peaks = _call_once(contest, calls, device)
        repeats = _repeats(contest, calls, once, suite, allowance)
        seconds = interleaved_seconds(calls, repeats=repeats, warmup=0, clock=_clock(device, once))
    middle = medians(seconds)
    return {
        **workload.to_json(),
        "milliseconds": {name: 1e3 * value for name, value in middle.items()},
        "spread": {name: [1e3 * min(values), 1e3 * max(values)] for name, values in seconds.items()},
        "repeats": {name: len(values) for name, values in seconds.items()},
        "ratio_to_static": {name: value / middle[peers.STATIC] for name, value in middle.items()},
        "samples_per_second": {name: workload.B / value for name, value in middle.items()},
        "peak_extra_bytes": {name: peaks[name] for name in middle},
        "relative_rms_error": {name: e if math.isfinite(e) else None for name, e in contest.errors.items()},
        "left_out": contest.left_out,
        "failed": contest.failed,
        "seconds": time.perf_counter() - start,
    }


def _compile(contest: Contest, allowance: Allowance) -> None:
    """Take in who has to be compiled, where there is time for it."""
    if contest.compiler is None or peers.COMPILED in contest.left_out:
        return
    if allowance.compiling < COMPILING_SECONDS:
        reason = f"compiling takes about {COMPILING_SECONDS:.0f} s, more than a quarter of the suite's time left"
        contest.leave_out(peers.COMPILED, reason)
        return
    contest.contenders[peers.COMPILED] = contest.compiler()
    contest.check(peers.COMPILED)


def _affordable(contest: Contest, allowance: Allowance) -> dict[str, Callable[[], object]]:
    """The calls to time: loops only where a few calls on the whole batch fit into the time."""
    for name in OWN_LOOPS:
        if name in contest.contenders:
            _leave_out_slow(contest, name, contest.seconds[name] * contest.workload.B / len(contest.rows), allowance)
    return {name: contest.call(name) for name in contest.contenders}


def _leave_out_slow(contest: Contest, name: str, seconds: float, allowance: Allowance) -> bool:
    """Whether the fewest calls there can be would take too much of the time."""
    slow = (1 + FEWEST) * seconds > allowance.contender
    if slow:
        contest.leave_out(name, f"{seconds:.1f} s a call, {1 + FEWEST} calls are more than its share of the time left")
    return slow


def _call_once(
    contest: Contest, calls: dict[str, Callable[[], object]], device: torch.device
) -> tuple[dict[str, float], dict[str, int | None]]:
    """Seconds and peak memory of one call of each; who runs out of memory is taken out."""
    seconds: dict[str, float] = {}
    peaks: dict[str, int | None] = {}
    for name, call in list(calls.items()):
        try:
            seconds[name], peaks[name] = _timed_peak(call, device)
            if seconds[name] < QUICK:
                seconds[name], peaks[name] = _timed_peak(call, device)
        except torch.OutOfMemoryError:
            contest.leave_out(name, "out of memory")
            del calls[name]
    return seconds, peaks


def _timed_peak(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    seconds: list[float] = []
    peak = peak_extra_bytes(lambda: seconds.append(wall_seconds(call)), device)
    return seconds[0], peak


def _repeats(
    contest: Contest,
    calls: dict[str, Callable[[], object]],
    once: dict[str, float],
    suite: Suite,
    allowance: Allowance,
) -> dict[str, int]:
    """How often to call each: as patience allows."""
    found = {}
    for name in list(calls):
        if name not in ALWAYS and _leave_out_slow(contest, name, once[name], allowance):
            del calls[name]
        else:
            found[name] = max(FEWEST, min(suite.repeats, int(suite.patience / once[name])))
    return found


def _clock(device: torch.device, once: dict[str, float]) -> Callable[[Callable[[], object]], float]:
    """Seconds of a call: by the clock on the wall, or on a GPU, for short calls, by its own."""
    if device.type != "cuda" or max(once.values()) > EVENTS_BELOW:
        return wall_seconds

    def on_device(call: Callable[[], object]) -> float:
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(call, warmup=10, rep=50, return_mode="median"))

    return on_device


if __name__ == "__main__":
    sys.exit(main())
