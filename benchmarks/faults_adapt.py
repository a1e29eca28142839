"""kill -9 at random moments of ``wemoe-fast adapt``, then the same command until it is done: nothing may differ.

    python -m benchmarks.faults_adapt --kills 40

A small model and three tasks, 30 steps, a checkpoint after every step or every other one. Each time the run is killed
at a moment drawn uniformly over its duration and started again; then the output must be, byte for byte, that of a run
nobody disturbed, and no other file may be left over. Processes are forked from one that has imported everything, so
that most of the duration is the run itself.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from wemoe_fast import FastWEMoEMLP, save
from wemoe_fast.report import write_json
from wemoe_fast.tasks import Head

STEPS = 30
EVERY = (1, 2)
ATTEMPTS = 3
PRELOADED = ["wemoe_fast.cli", "matplotlib.figure", "torch._dynamo"]
"""torch._dynamo, which takes longest, is imported by PyTorch where a tensor without data is initialised."""


@dataclass(frozen=True)
class Kill:
    """One kill: when, what was there at that moment, and whether the run that followed gave what it should."""

    every: int
    after_seconds: float
    moment: str
    identical: bool
    differences: tuple[str, ...]


def write_problem(directory: Path) -> None:
    """A WEMoE MLP of three experts and three tasks of random tokens: the directory ``merged`` and ``tasks.yaml``."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.copy_(0.5 * draw(*parameter.shape))
        experts = [copy.deepcopy(base) for _ in range(3)]
        for parameter in (p for expert in experts for p in expert.parameters()):
            parameter.add_(0.3 * draw(*parameter.shape))
        model = FastWEMoEMLP.from_mlps(base, experts, router_depth=1)
        for parameter in model.router.parameters():
            parameter.copy_(0.3 + 0.01 * draw(*parameter.shape))
    save(model, directory / "merged")
    lines = ["tasks:"]
    for name, classes in (("one", 3), ("two", 4), ("three", 2)):
        head = Head(draw(classes, 8), None, tuple(map(str, range(classes))), pooling="mean")
        head.save(directory / f"{name}.safetensors")
        save_file({"hidden_states": draw(20, 5, 8)}, directory / f"{name}-data.safetensors")
        lines.append(f"  - {{name: {name}, head: {name}.safetensors, data: {name}-data.safetensors}}")
    (directory / "tasks.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def command(problem: Path, out: Path, every: int, *more: str, steps: int | None = None) -> list[str]:
    """The arguments of ``wemoe-fast`` for the problem that :func:`write_problem` wrote."""
    options = {
        "--tasks": problem / "tasks.yaml",
        "--out": out,
        "--steps": STEPS if steps is None else steps,
        "--lr": 0.01,
        "--batch-size": 3,
        "--checkpoint-every": every,
        "--threads": 1,
    }
    listed = [str(part) for option in options.items() for part in option]
    return ["adapt", str(problem / "merged"), "--quiet", *listed, *more]


def start(arguments: Sequence[str]) -> BaseProcess:
    """``wemoe-fast`` with these arguments in a process forked from a server that has imported it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_wemoe_fast, args=(list(arguments),))
    process.start()
    return process


def _wemoe_fast(arguments: list[str]) -> None:
    from wemoe_fast.cli import main

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = nowhere
        raise SystemExit(main(arguments))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below, hidden ones too, and every empty directory. Of checkpoints the name alone: they hold the states
    of random number generators, which are each process's own."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_file():
            found[name] = b"" if ".checkpoints" in name else path.read_bytes()
        elif not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def kill_and_finish(
    problem: Path, directory: Path, every: int, after: float, expected: dict[str, bytes]
) -> Kill | None:
    """Kill a run ``after`` seconds, run it again until it is done, compare all that is in ``directory``; None where the
    run ended before."""
    arguments = command(problem, directory / "adapted", every)
    process = start(arguments)
    process.join(after)
    if process.exitcode is not None:
        return None
    process.kill()
    process.join()
    moment = _moment(directory)
    statuses: list[int | None] = []
    while not statuses or (statuses[-1] != 0 and len(statuses) < ATTEMPTS):
        process = start(arguments)
        process.join()
        statuses.append(process.exitcode)
    found = contents(directory)
    differences = [f"exit status {status}" for status in statuses if status]
    differences += [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return Kill(every, after, moment, not differences, tuple(differences))


def faults(kills: int, directory: Path, *, seed: int = 0, progress: bool = True) -> tuple[list[Kill], dict[int, float]]:
    """That many kills below a directory, and the seconds of an undisturbed run by number of steps per checkpoint."""
    problem = directory / "problem"
    write_problem(problem)
    _undisturbed(problem, directory / "warm", EVERY[0])  # pays for what the server imports
    expected, seconds = {}, {}
    for every in EVERY:
        seconds[every] = _undisturbed(problem, directory / f"undisturbed-{every}", every)
        expected[every] = contents(directory / f"undisturbed-{every}")
    if _output(expected[EVERY[0]]) != _output(expected[EVERY[1]]):
        raise RuntimeError("the undisturbed runs differ")
    draws = random.Random(seed)
    done = []
    for number in tqdm(range(kills), desc="kills", disable=not progress, file=sys.stderr):
        every = EVERY[number % len(EVERY)]
        kill = None
        while kill is None:
            after = draws.uniform(0, seconds[every])
            begun = time.perf_counter()
            kill = kill_and_finish(problem, directory / f"kill-{number}", every, after, expected[every])
            if kill is None:  # a faster run than the one that was timed
                seconds[every] = min(seconds[every], time.perf_counter() - begun)
                shutil.rmtree(directory / f"kill-{number}")
        done.append(kill)
    return done, seconds


def _undisturbed(problem: Path, directory: Path, every: int) -> float:
    """Seconds of a run to its end."""
    begun = time.perf_counter()
    process = start(command(problem, directory / "adapted", every))
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the undisturbed run ended with exit status {process.exitcode}")
    return time.perf_counter() - begun


def _output(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name.startswith("adapted/")}


def _moment(directory: Path) -> str:
    """What of a run was there when it was killed."""
    if (directory / "adapted").exists():
        return "output in place"
    steps = sorted(path.name for path in (directory / "adapted.checkpoints").glob("step-*"))
    if not steps:
        return "before the first checkpoint"
    newest = int(steps[-1].removeprefix("step-"))
    return "all steps done, no output yet" if newest == STEPS else f"between step 1 and {STEPS}"


def main(argv: Sequence[str] | None = None) -> int:
    """The scenario as a command; the exit status is 1 where anything differed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults_adapt", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--kills", type=int, default=40, help="default: 40")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(argv)
    # the semaphores of killed processes
    os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")
    with tempfile.TemporaryDirectory(prefix="faults-adapt-") as directory:
        kills, seconds = faults(options.kills, Path(directory), seed=options.seed)
    identical = sum(kill.identical for kill in kills)
    for every, duration in seconds.items():
        sys.stdout.write(f"undisturbed, a checkpoint every {every}: {STEPS} steps in {duration:.2f} s\n")
    for moment, count in sorted(Counter(kill.moment for kill in kills).items()):
        sys.stdout.write(f"killed {moment}: {count}\n")
    sys.stdout.write(f"{identical} of {len(kills)} kills: same output to the byte, nothing left over\n")
    for kill in kills:
        if not kill.identical:
            sys.stdout.write(f"  after {kill.after_seconds:.3f} s, {kill.moment}: {', '.join(kill.differences)}\n")
    if options.out is not None:
        write_json(options.out, {"steps": STEPS, "seconds": seconds, "kills": [asdict(kill) for kill in kills]})
    return 0 if identical == len(kills) else 1


if __name__ == "__main__":
    raise SystemExit(main())
