"""Kernels and strategies on one device: checked against the oracle, then timed beside what else a user could run.

    python -m benchmarks.gpu_check --out DIR                  # a GPU, at most --minutes
    python -m benchmarks.gpu_check --out DIR --device cpu     # tiny shapes in Triton's interpreter: a dry run

Checks come first, then groups of times in order of importance. What the time did not allow is listed by name;
what failed its check gets no time. The JSON is rewritten as results come in. Exit status 1 if a check failed or a group
could not be measured; a missed target is no failure.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checks import Case, Verdict
    from .workers import JobError

CHECKS_SHARE = 0.55
"""Of the time: what checks may take where times are wanted too."""
GROUP_SECONDS = 90.0
"""A group of times that takes longer has gone wrong."""
COLUMNS = ("chunked", "fused", "factored", "auto", "materialise + bmm", "materialise + bmm, compiled",
           "loop over samples", "FusionBench")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(arguments)
    # Read while Triton and cuBLAS are imported, here and in the workers, so before everything else.
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return Session(options, start).run()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--suite", choices=("full", "dry"), help="default: full on a GPU; the CPU has the dry one only")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun that would end later")
    parser.add_argument("--only", choices=("checks", "times"))
    parser.add_argument("--workers", type=int, help="processes that check; they mostly compile")
    options = parser.parse_args(arguments)
    options.suite = "dry" if options.device == "cpu" else options.suite or "full"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options.workers = options.workers or (1 if options.device == "cpu" else max(1, min(12, cores - 2)))
    return options


class Session:
    """One run of the command: its clock, its workers and its report."""

    def __init__(self, options: argparse.Namespace, start: float) -> None:
        from wemoe_fast.kernels.tuning import slug

        from .workers import Pool

        self.options, self.start, self.end = options, start, start + 60 * options.minutes
        self.pool: Pool[Case, Verdict] = Pool(options.workers)
        device = describe(options.device)
        self.path: Path = options.out / f"gpu-check-{slug(device['name'])}.json"
        settings = {name: value for name, value in vars(options).items() if name != "out"}
        self.report: dict[str, Any] = {
            "device": device,
            "settings": settings | {"l2_cache": "cleared before each timed call", "inputs": "standard normal"},
            "checks": {"passed": 0, "failed": [], "skipped": [], "not_run": [], "cases": []},
            "times": [],
            "not_measured": [],
            "not_run": [],
            "targets": [],
        }

    def run(self) -> int:
        try:
            if self.options.only != "times":
                self.check()
            if self.options.only != "checks":
                self.measure()
        finally:
            self.pool.stop()
            self.report["seconds"] = time.monotonic() - self.start
            self.write()
        sys.stdout.write(summary(self.report) + f"\n{self.path}\n")
        return 1 if self.report["checks"]["failed"] or self.report["not_measured"] else 0

    def check(self) -> None:
        from . import checks, timings

        found = [
            *timings.cases_of(timings.groups(self.options.suite)),
            *checks.cases(self.options.suite, self.options.device),
        ]
        share = 1.0 if self.options.only == "checks" else CHECKS_SHARE
        deadline = self.start + share * 60 * self.options.minutes
        waiting = self.pool.map(self._job, found, self._note, deadline=deadline, seconds=150.0)
        self.report["checks"]["not_run"] = [case.name for case in waiting]
        self.report["checks"]["seconds"] = time.monotonic() - self.start
        self.write()

    @property
    def _job(self) -> Any:
        from functools import partial

        from . import checks

        return partial(checks.run, device=self.options.device, enough=64 if self.options.suite == "full" else 4)

    def _note(self, case: Case, result: Verdict | JobError) -> None:
        from .checks import Verdict

        verdict = (
            result
            if isinstance(result, Verdict)
            else Verdict(case.name, case.subject, case.dtype, False, problem=str(result))
        )
        record, kept = verdict.to_json(), self.report["checks"]
        kept["cases"].append(record)
        if verdict.passed is None:
            kept["skipped"].append({"name": verdict.name, "reason": verdict.problem})
        elif verdict.passed:
            kept["passed"] += 1
        else:
            kept["failed"].append(
                {"name": verdict.name, "subject": verdict.subject, "dtype": verdict.dtype, "problem": verdict.problem}
            )
            sys.stderr.write(f"FAILED {verdict.name}\n{verdict.problem}\n")
        if len(kept["cases"]) % 50 == 0:
            sys.stderr.write(f"{len(kept['cases'])} cases, {len(kept['failed'])} failed\n")
            self.write()

    def measure(self) -> None:
        from . import timings
        from .workers import JobError

        quick = self.options.suite == "dry"
        settings = timings.Settings(self.options.device, *((2, 1.0, 5.0) if quick else ()))
        failed = {(case["subject"], case["dtype"]) for case in self.report["checks"]["failed"]}
        waiting = timings.groups(self.options.suite)
        worker = self.pool.workers[0]
        for other in self.pool.workers[1:]:
            other.stop()  # their memory and their contexts
        while waiting and self.end - time.monotonic() > 10.0:
            group = waiting.pop(0)
            left = self.end - time.monotonic()
            try:
                result = worker.run(timings.measure, group, settings, failed, seconds=min(GROUP_SECONDS, left))
            except JobError as error:
                if time.monotonic() >= self.end and left < GROUP_SECONDS:
                    waiting.insert(0, group)
                    break
                self.report["not_measured"].append({"name": group.name, "reason": str(error)})
                sys.stderr.write(f"FAILED {group.name}\n{error}\n")
            else:
                self.report["times"].append(result)
                sys.stderr.write(f"{time.monotonic() - self.start:5.0f} s  {group.name}\n")
            least, experts = (1, 3) if quick else (64, 8)
            self.report["targets"] = [t.to_json() for t in timings.targets(self.report["times"], least, experts)]
            self.write()
        self.report["not_run"] = [group.name for group in waiting]

    def write(self) -> None:
        from wemoe_fast.report import write_json

        write_json(self.path, self.report)


def describe(device: str) -> dict[str, Any]:
    """The device and the versions, without taking hold of it: the workers need its memory."""
    import torch

    from wemoe_fast.comparison import environment

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    if device == "cpu":
        return {"name": "interpreter", "driver": None, "triton": triton, **environment()}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()[0]
        name, driver = (part.strip() for part in listed.split(",")[:2])
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        listed, name, driver = None, torch.cuda.get_device_name(), None
    return {
        "name": name,
        "driver": driver,
        "nvidia_smi": listed,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def summary(report: Mapping[str, Any]) -> str:
    """What a reader wants to know first."""
    kept = report["checks"]
    lines = [table(report["times"], "forward"), table(report["times"], "backward"), *predictions(report["times"])]
    lines += [line for result in report["times"] for line in _details(result)]
    lines += [_target(target) for target in report["targets"]]
    lines += [f"not run: {name}" for name in report["not_run"]]
    lines += [
        f"not measured: {entry['name']}: {entry['reason'].strip().splitlines()[-1]}" for entry in report["not_measured"]
    ]
    counts = [
        f"{kept['passed']} checks passed",
        *(f"{len(kept[kind])} {kind.replace('_', ' ')}" for kind in ("failed", "skipped", "not_run")),
    ]
    lines += [
        ", ".join(counts),
        *(
            f"FAILED {case['name']}: {(case['problem'] or '').strip().splitlines()[-1:]}"
            for case in kept["failed"][:40]
        ),
    ]
    return "\n".join(line for line in lines if line)


def table(results: Sequence[Mapping[str, Any]], kind: str) -> str:
    """Milliseconds and ratios to the static MLP; "-" where a contender was left out."""
    chosen = [result for result in results if result["kind"] == kind]
    if not chosen:
        return ""
    titles = (kind, "static ms", *(name.replace("materialise + bmm", "mat+bmm") for name in COLUMNS))
    lines = [f"{titles[0]:<44}{titles[1]:>10}" + "".join(f"{title:>19}" for title in titles[2:])]
    for result in chosen:
        times, ratios = result["milliseconds"], result["ratio_to_static"]
        label = result["name"].removeprefix(f"{kind} ")
        cells = [f"{times[name]:9.3f} {ratios[name]:7.2f}x" if name in times else "-" for name in COLUMNS]
        lines.append(f"{label:<44}{times['static']:>10.3f}" + "".join(f"{cell:>19}" for cell in cells))
    return "\n".join(lines)


def predictions(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The cost model beside the clock, linear by linear."""
    lines = []
    for result in results:
        for role, linear in result.get("linears", {}).items():
            measured = linear["measured_microseconds"]
            cells = [
                f"{name} {predicted:.0f} -> {measured[name]:.0f}"
                if name in measured
                else f"{name} {predicted:.0f} -> -"
                for name, predicted in linear["predicted_microseconds"].items()
            ]
            lines.append(
                f"{result['name']} {role}: auto is {linear['chosen']}; predicted -> measured us: {', '.join(cells)}"
            )
    return lines


def _details(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, peaks in result.get("peak_extra_bytes", {}).items():
        cells = [f"{name} {'-' if peak is None else f'{peak / 2**20:.0f}'}" for name, peak in peaks.items()]
        lines.append(f"{result['name']}, {kind}: peak extra MiB: {', '.join(cells)}")
    for name, times in result.get("host", {}).items():
        cells = [f"{what} {'-' if value is None else f'{value:.3f}'}" for what, value in times.items()]
        lines.append(f"{result['name']} {name}: ms {', '.join(cells)}")
    return lines


def _target(target: Mapping[str, Any]) -> str:
    sign = "at most" if target["at_most"] else "at least"
    met = "met   " if target["met"] else "MISSED"
    return f"{met} {target['group']}: {target['what']}: {target['value']:.2f}, {sign} {target['limit']:g}"


if __name__ == "__main__":
    sys.exit(main())
