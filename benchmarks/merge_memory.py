"""Peak resident memory of a whole `wemoe-fast merge`, measured by the system, on checkpoints made up for it.

python -m benchmarks.merge_memory --experts 2 8 --layers 12 --width 768 --max-shard-bytes 67108864
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from wemoe_fast.comparison import environment
from wemoe_fast.report import aligned, write_json

from .synthetic import write_recipe

ALLOWANCE = 512 << 20
"""What a merge may take beside two output shards."""


LAUNCHER = """
import os, sys
unseen = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.executable, sys.argv[1:], os.environ, file_actions=unseen)
_, status, usage = os.wait4(child, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A process's peak begins with what the process that started it held: this one holds next to nothing."""


def measure(recipe: Path, out: Path, max_shard_bytes: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of a merge in a process of its own, imports included."""
    command = [sys.executable, "-m", "wemoe_fast", "merge", str(recipe), "--out", str(out), "--quiet"]
    command += ["--max-shard-size", str(max_shard_bytes)]
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LAUNCHER, *command], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the merge ended with {done.returncode}")
    return int(done.stdout) << (0 if sys.platform == "darwin" else 10), time.monotonic() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--max-shard-bytes", type=int, default=64 << 20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    sizes = {"hidden_size": options.width, "intermediate_size": 4 * options.width, "vocab_size": 8000}
    sizes |= {"num_hidden_layers": options.layers, "num_attention_heads": options.width // 64}
    allowed = ALLOWANCE + 2 * options.max_shard_bytes
    rows = []
    for experts in options.experts:
        with tempfile.TemporaryDirectory() as folder:
            recipe = write_recipe(Path(folder), experts=experts, max_shard_bytes=options.max_shard_bytes, **sizes)
            inputs = _bytes(Path(folder))
            peak, seconds = measure(recipe, Path(folder, "out"), options.max_shard_bytes)
            row = {"experts": experts, "inputs": inputs, "output": _bytes(Path(folder, "out")), "peak": peak}
            rows.append({**row, "allowed": allowed, "seconds": round(seconds, 1)})
    sys.stdout.write(_table(rows) + "\n")
    if options.out is not None:
        shape = {"layers": options.layers, "width": options.width, "max_shard_bytes": options.max_shard_bytes}
        write_json(options.out, {**shape, "environment": environment(), "merges": rows})
    return 0 if all(row["peak"] <= allowed for row in rows) else 1


def _table(rows: Sequence[Mapping[str, float]]) -> str:
    heading = ("experts", "inputs, MiB", "output, MiB", "peak, MiB", "allowed, MiB", "seconds")
    sizes = ("inputs", "output", "peak", "allowed")
    cells = [
        [str(row["experts"]), *(f"{row[name] / 2**20:.0f}" for name in sizes), f"{row['seconds']:.1f}"] for row in rows
    ]
    return aligned([heading, *cells])


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


if __name__ == "__main__":
    raise SystemExit(main())
