"""Peak resident memory of a whole `wemoe-fast merge`, measured by the system, on checkpoints made up for it.

python -m benchmarks.merge_memory --experts 4 --layers 12 --width 768 --max-shard-bytes 67108864
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .synthetic import write_recipe

ALLOWANCE = 512 << 20
"""What a merge may take beside two output shards."""


def measure(recipe: Path, out: Path, max_shard_bytes: int) -> tuple[int, float]:
    """Peak resident bytes and seconds of a merge in a process of its own, imports included."""
    command = [sys.executable, "-m", "wemoe_fast", "merge", str(recipe), "--out", str(out), "--quiet"]
    command += ["--max-shard-size", str(max_shard_bytes)]
    begun = time.monotonic()
    child = os.posix_spawn(sys.executable, command, os.environ)
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        raise RuntimeError(f"the merge ended with {status}")
    return usage.ru_maxrss << (0 if sys.platform == "darwin" else 10), time.monotonic() - begun


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--max-shard-bytes", type=int, default=64 << 20)
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
    sys.stdout.write(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["peak"] <= allowed for row in rows) else 1


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


if __name__ == "__main__":
    raise SystemExit(main())
