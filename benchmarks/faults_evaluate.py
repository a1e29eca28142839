"""``python -m benchmarks.faults_evaluate --kills 40``: kill -9 during ``wemoe-fast evaluate``, then the same again.

Each kill comes at a moment drawn uniformly over the time an uninterrupted run takes, start to end. The rerun must end
well, compute nothing that had been recorded, and write the same metrics.json, predictions.jsonl and routing.json as
the uninterrupted run, byte for byte. Runs are forked from a process that has imported everything, so that kills fall
on the work and not on imports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from wemoe_fast.cli import main as wemoe_fast
from wemoe_fast.report import write_json

from .kills import child
from .project import write_project

COMPARED = ("metrics.json", "predictions.jsonl", "routing.json")


@dataclass
class Kill:
    """One kill: when, what was on the disk then, and what was wrong after the rerun (nothing, if all is well)."""

    seconds: float
    recorded: int
    finished: bool
    problems: list[str]


def evaluate(project: Path, out: Path) -> None:
    """The verb, its table unseen; RuntimeError where it fails."""
    arguments = ["evaluate", str(project / "model"), "--tasks", str(project / "tasks.yaml"), "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = wemoe_fast([*arguments, "--threads", "1", "--quiet", "--overwrite"])
    if status:
        raise RuntimeError(f"evaluate ended with {status}")


def recorded_samples(out: Path) -> int:
    """Samples in the whole lines of the records."""
    lines = [line for path in out.glob("records/*/*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return sum(len(json.loads(line.partition(b" ")[2])["samples"]) for line in lines if line.endswith(b"\n"))


def kill_once(project: Path, expected: dict[str, bytes], total: int, seconds: float, out: Path) -> Kill:
    """Evaluate, kill after `seconds`, evaluate again, compare."""
    finished = child(lambda: evaluate(project, out), seconds) == 0
    recorded = recorded_samples(out)
    problems = []
    if child(lambda: evaluate(project, out)):
        problems.append("the rerun failed")
    else:
        (row,) = json.loads((out / "timing.json").read_text())["rows"].values()
        computed = sum(row["computed"].values())
        if computed != total - recorded:
            problems.append(f"the rerun computed {computed} samples; {recorded} of {total} had been recorded")
        problems += [f"{name} differs" for name, content in expected.items() if (out / name).read_bytes() != content]
    return Kill(seconds, recorded, finished, problems)


def run(kills: int, seed: int, samples: int, directory: Path) -> list[Kill]:
    """Prepare, evaluate once in peace, then kill; what came of each kill."""
    torch.set_num_threads(1)  # before anything computes: a process with a pool of threads must not fork
    project = directory / "project"
    write_project(project, samples)
    evaluate(project, directory / "expected")  # in this process: what is imported on the way is there for all
    begun = time.perf_counter()
    if child(lambda: evaluate(project, directory / "timed")):
        raise RuntimeError("the uninterrupted run failed")
    duration = time.perf_counter() - begun
    expected = {name: (directory / "expected" / name).read_bytes() for name in COMPARED}
    moments = random.Random(seed)
    results = []
    for number in range(kills):
        out = directory / f"out-{number}"
        results.append(kill_once(project, expected, 2 * samples, moments.uniform(0, duration), out))
        shutil.rmtree(out)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--samples", type=int, default=1200, help="of each of the two tasks (default: 1200)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        results = run(options.kills, options.seed, options.samples, Path(directory))
    bad = [result for result in results if result.problems]
    partly = sum(0 < result.recorded < 2 * options.samples for result in results)
    sys.stdout.write(
        f"{len(results)} kills, {len(results) - len(bad)} resumed to the same bytes; {partly} fell between the first"
        f" and the last record, {sum(result.finished for result in results)} after the end\n"
    )
    for result in bad:
        sys.stdout.write(f"killed after {result.seconds:.3f} s: {'; '.join(result.problems)}\n")
    if options.out:
        content = {"seed": options.seed, "samples": 2 * options.samples, "kills": [asdict(kill) for kill in results]}
        write_json(options.out, {"killed": len(results), "same": len(results) - len(bad)} | content)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
