"""``python -m benchmarks.faults_merge --kills 40``: kill -9 during ``wemoe-fast merge``, then the same again.

After every kill the output is what was there before or complete, and the rerun makes what an undisturbed run makes,
byte for byte, with nothing left over. Runs are forked from a warm process, so that kills fall into the work and not
into imports.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wemoe_fast.report import write_json

from .kills import child
from .synthetic import write_recipe

Files = dict[str, bytes]


@dataclass(frozen=True)
class Scenario:
    """Work that may be killed.

    Attributes:
        run: does it, and does it again or goes on with it after a kill; deterministic.
        out: what it writes; compared byte by byte. Its parent holds nothing but `out` in the end.
        prepare: brings the folder to the state before a run; called before every round.
        intact: what `out` may be after a kill, beside what the whole run makes: None for nothing at all.
        compared: leaves out of the files what may differ between two runs, such as times.
    """

    run: Callable[[], object]
    out: Path
    prepare: Callable[[], object]
    intact: Callable[[], Files | None]
    compared: Callable[[Files], Files] = lambda files: files


@dataclass(frozen=True)
class Outcome:
    """What kills did. `states`: how often `out` was found how; `problems`: what must not be."""

    states: dict[str, int]
    problems: list[str]


def merge(folder: Path) -> Scenario:
    """`wemoe-fast merge` over an older merge, half of the time; inputs and output in several shards."""
    from wemoe_fast.config import load_recipe
    from wemoe_fast.merge import merge_to_directory

    sizes = {"hidden_size": 64, "intermediate_size": 256, "vocab_size": 500, "num_hidden_layers": 8}
    recipe = load_recipe(write_recipe(folder / "inputs", experts=3, max_shard_bytes=1 << 18, **sizes))
    out, old = folder / "outputs" / "merged", folder / "old"
    merge_to_directory(load_recipe(write_recipe(folder / "older", seed=1)), old)
    rounds = [0]

    def prepare() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        rounds[0] += 1
        if rounds[0] % 2:
            shutil.copytree(old, out)

    return Scenario(
        run=lambda: merge_to_directory(recipe, out, overwrite=True, max_shard_bytes=1 << 19),
        out=out,
        prepare=prepare,
        intact=lambda: contents(old) if rounds[0] % 2 else None,
    )


def contents(directory: Path) -> Files | None:
    """The files below a directory by their paths in it; None where there is none."""
    if not directory.exists():
        return None
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def kill_at_random(scenario: Scenario, kills: int, *, seed: int = 0, sig: int = signal.SIGKILL) -> Outcome:
    """Kill `scenario.run` at moments spread evenly over its duration, and run it again each time."""
    torch.set_num_threads(1)  # a process with threads cannot be forked
    rng = random.Random(seed)
    scenario.prepare()
    scenario.run()  # imports and caches, in the parent once for all children
    scenario.prepare()
    _, seconds = _timed(scenario)
    whole = _compared(scenario)
    states: Counter[str] = Counter()
    problems = []
    for number in range(kills):
        scenario.prepare()
        before = scenario.intact()
        moment = seconds * (number + rng.random()) / kills
        status = child(scenario.run, moment, sig)
        found = contents(scenario.out)
        complete = found is not None and scenario.compared(found) == whole
        state = "complete" if complete else "as before" if found == before else "broken"
        states[f"{'ended' if status == 0 else 'killed'}, {state}"] += 1
        where = f"kill {number + 1}, after {moment:.3f} s of {seconds:.3f}"
        if state == "broken" or (status == 0 and not complete):
            problems.append(f"{where}: found neither what was there before nor a complete result")
        again, seconds = _timed(scenario)  # the machine is not equally fast all the time
        if again != 0:
            problems.append(f"{where}: the next run failed")
        elif _compared(scenario) != whole:
            problems.append(f"{where}: the next run made something else")
        left = sorted(path.name for path in scenario.out.parent.iterdir() if path != scenario.out)
        if left:
            problems.append(f"{where}: left over: {', '.join(left)}")
    return Outcome(dict(states), problems)


def _timed(scenario: Scenario) -> tuple[int, float]:
    begun = time.monotonic()
    return child(scenario.run), time.monotonic() - begun


def _compared(scenario: Scenario) -> Files:
    return scenario.compared(contents(scenario.out) or {})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_at_random(merge(Path(folder)), options.kills, seed=options.seed)
    sys.stdout.write(f"{options.kills} kills: {', '.join(f'{n} {state}' for state, n in outcome.states.items())}\n")
    sys.stdout.writelines(f"{problem}\n" for problem in outcome.problems)
    if options.out is not None:
        write_json(options.out, {"kills": options.kills, "seed": options.seed, **vars(outcome)})
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
