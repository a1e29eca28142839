"""``python -m benchmarks.faults --kills 40``: merge, adapt and evaluate killed at random moments, and run again.

Each verb has a command of its own (``benchmarks.faults_merge``, ``faults_adapt``, ``faults_evaluate``), which says what
must hold after a kill; this one runs all three, with as many kills each.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

VERBS = ("merge", "adapt", "evaluate")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 where anything was lost, left over or different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="of each verb (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--out", type=Path, help="directory for faults-merge.json and so on")
    options = parser.parse_args(arguments)
    package = (__spec__.parent if __spec__ else None) or "benchmarks"
    statuses = []
    for verb in VERBS:
        out = [] if options.out is None else ["--out", str(options.out / f"faults-{verb}.json")]
        command = [sys.executable, "-m", f"{package}.faults_{verb}", "--kills", str(options.kills)]
        sys.stdout.write(f"{verb}:\n")
        sys.stdout.flush()
        statuses.append(subprocess.run([*command, "--seed", str(options.seed), *out], check=False).returncode)
    return int(any(statuses))


if __name__ == "__main__":
    raise SystemExit(main())
