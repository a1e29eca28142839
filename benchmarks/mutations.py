"""Files from anywhere: mutate valid ones and see that each still works or gives one clear error.

    python -m benchmarks.mutations --cases 10000

A target is a kind of file and what reads it, named in TARGETS. A case that ends in anything but a result or a
`WEMoEError`, takes longer than SECONDS, grows memory by more than MEMORY bytes or leaves something behind is a failure;
it is repeated from its seed.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import save_file

from wemoe_fast.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from wemoe_fast.errors import WEMoEError
from wemoe_fast.fingerprint import Digest

from .faults_adapt import write_problem
from .memory import peak_extra_bytes
from .project import write_project
from .synthetic import write_recipe

SECONDS = 20
MEMORY = 256 << 20
NUMBERS = (0, 1, -1, 7, 2**31, 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 10**30, 10**400, 0.5, 1e308, -0.0)
NAMES = ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "model.safetensors", "x" * 300, "\0", "é", "\ud800")


@dataclass(frozen=True)
class Target:
    """Files and who reads them.

    Attributes:
        make: writes a valid set of files into an empty folder.
        files: those to mutate, as patterns relative to the folder.
        read: reads the folder; returns, or raises a WEMoEError.
        structured: mutates the parsed content, where there is one, beside the bytes.
    """

    make: Callable[[Path], object]
    files: tuple[str, ...]
    read: Callable[[Path], object]
    structured: Callable[[bytes, random.Random], bytes] | None = None


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Truncate, flip bits, overwrite, insert, remove or repeat; mostly near the beginning, where headers are."""
    if not data:
        return rng.randbytes(9)
    changed = bytearray(data)
    reach = len(data) if rng.random() < 0.3 else min(len(data), 600)
    at = rng.randrange(reach)
    length = rng.randrange(1, 1 + min(64, len(data)))
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == 2:
        changed[at : at + length] = rng.randbytes(len(changed[at : at + length]))
    elif kind == 3:
        changed[at:at] = rng.randbytes(length)
    elif kind == 4:
        del changed[at : at + length]
    elif kind == 5:
        changed[at:at] = changed[at : at + length] * rng.choice((1, 2, 50))
    else:
        number = min(max(int(rng.choice(NUMBERS[:-3])), 0), 2**64 - 1)
        changed[:8] = number.to_bytes(8, "little")
    return bytes(changed)


def mutate_value(content: Any, rng: random.Random) -> Any:
    """A copy of JSON-like content in which one place holds something else, is gone, renamed or there twice."""
    content = json.loads(json.dumps(content))
    places = list(_places(content))
    if not places:
        return _odd_value(rng)
    node, key = rng.choice(places)
    kind = rng.randrange(6)
    if kind == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[rng.choice((*NAMES[:-1], *map(str, node)))] = node.pop(key)
    elif kind == 2:
        other, place = rng.choice(places)
        node[key] = json.loads(json.dumps(other[place]))
    elif kind == 3 and isinstance(node[key], int):
        node[key] += rng.choice((-1, 1, 8, 2**32))
    else:
        node[key] = _odd_value(rng)
    return content


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON file changed."""
    return json.dumps(mutate_value(json.loads(data), rng)).encode()


def mutate_header(data: bytes, rng: random.Random) -> bytes:
    """One value of a safetensors header changed, its size made to fit."""
    size = int.from_bytes(data[:8], "little")
    header = mutate_json(data[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def mutate_yaml(data: bytes, rng: random.Random) -> bytes:
    """One value of a recipe changed, or a bomb."""
    steps = list(zip("abcdefghij", "bcdefghijk", strict=True))
    bombs = (
        "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in steps),
        "a: &a {x: 1}\n" + "".join(f"{b}: &{b} {{<<: [*{a}, *{a}], k: *{a}}}\n" for a, b in steps),
        "a: &a [*a]\n",
        "a: *a\n",
        "[" * rng.choice((10, 100, 100_000)),
        "{a: " * rng.choice((10, 100, 100_000)),
        "- " * rng.choice((10, 100, 100_000)),
        "? " * rng.choice((10, 100, 50_000)),
        "base: !!python/object/apply:os.system [touch hacked]\n",
        f"seed: {'1' * rng.choice((10, 5000))}\n",
        f"seed: {':'.join(['59'] * rng.choice((3, 3000)))}\n",
        "a: " + "x" * (1 << 21),
    )
    bomb = rng.choice(bombs).encode()
    kind = rng.randrange(3)
    if kind == 0:
        return bomb
    if kind == 1:
        return data.rstrip(b"}") + b"\n" + bomb
    return json.dumps(mutate_value(yaml.safe_load(data), rng)).encode()


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []:
        yield node, key
        yield from _places(node[key])


def _odd_value(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice((3, 200))):
        deep = [deep]
    kinds: tuple[Callable[[], Any], ...] = (
        lambda: rng.choice(NUMBERS),
        lambda: rng.choice(NAMES[:-1]),
        lambda: rng.choice((None, True, [], {}, [[]], {"": {}}, float("nan"), float("inf"))),
        lambda: [rng.choice(NUMBERS) for _ in range(rng.randrange(1, 5))],
        lambda: rng.choice(("F32", "F64", "BF16", "F4", "I64")),
        lambda: [1] * rng.choice((5, 5000)),
        lambda: deep,
    )
    return rng.choice(kinds)()


def _checkpoint(folder: Path) -> None:
    write_recipe(folder, experts=1, num_hidden_layers=1, vocab_size=8)


def _sharded(folder: Path) -> None:
    write_recipe(folder, experts=1, num_hidden_layers=1, vocab_size=8, max_shard_bytes=4000)


def _adapter(folder: Path) -> None:
    """The expert is a LoRA adapter."""
    _checkpoint(folder)
    expert = folder / "expert0"
    shutil.rmtree(expert)
    expert.mkdir()
    query = "base_model.model.encoder.layer.0.attention.self.query"
    tensors = {f"{query}.lora_A.weight": torch.ones(2, 16), f"{query}.lora_B.weight": torch.ones(16, 2)}
    save_file({**tensors, "base_model.model.pooler.dense.bias": torch.ones(16)}, expert / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"query": 2}, "alpha_pattern": {"x": 1.5}}
    config |= {"use_rslora": True, "target_modules": ["query"], "base_model_name_or_path": "base", "use_dora": False}
    (expert / ADAPTER_CONFIG).write_text(json.dumps(config))


def _merged(folder: Path) -> None:
    from wemoe_fast.config import load_recipe
    from wemoe_fast.merge import merge_to_directory

    _checkpoint(folder)
    merge_to_directory(load_recipe(folder / "recipe.yaml"), folder / "out", max_shard_bytes=6000)


def _merge(folder: Path) -> None:
    from wemoe_fast.config import load_recipe
    from wemoe_fast.merge import merge_to_directory

    before = sorted(folder.iterdir())
    out = folder / "out"
    try:
        merge_to_directory(load_recipe(folder / "recipe.yaml"), out, allow_nonfinite=True)
        shutil.rmtree(out)
    finally:
        left = [path.name for path in sorted(folder.iterdir()) if path not in before]
        if left:
            raise AssertionError(f"left behind: {', '.join(left)}")


def _load(folder: Path) -> None:
    from wemoe_fast.checkpoint import load

    load(folder / "out")


def _recipe(folder: Path) -> None:
    import huggingface_hub

    from wemoe_fast.config import load_recipe

    with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):  # names on the Hub come up too
        load_recipe(folder / "recipe.yaml")


def _evaluated(folder: Path) -> None:
    write_project(folder, samples=20, batch_size=4)
    _expect(folder, _evaluation(folder))


def _evaluation(folder: Path) -> str:
    """Resumes from the records; a digest of what comes out, without times."""
    from wemoe_fast.checkpoint import load
    from wemoe_fast.evaluate import evaluate
    from wemoe_fast.tasks import load_tasks

    tasks = load_tasks(folder / "tasks.yaml", folder / "model")
    result = evaluate(load(folder / "model"), tasks, records=folder / "records", progress=False)
    plain = result.to_json(predictions=True)
    return Digest().plain([plain[name] for name in ("accuracy", "n", "routing", "predictions")]).hex()


def _resume_evaluation(folder: Path) -> None:
    _compare(folder, _evaluation(folder))


def _tasks(folder: Path) -> None:
    from wemoe_fast.tasks import load_tasks

    load_tasks(folder / "tasks.yaml", folder / "model")


def _adapted(folder: Path) -> None:
    write_problem(folder)
    _expect(folder, _adaptation(folder, folder / "checkpoints"))


def _adaptation(folder: Path, checkpoints: Path) -> str:
    """Goes on from the newest sound checkpoint; a digest of the routers."""
    from wemoe_fast.adapt import adapt
    from wemoe_fast.adapt_state import Checkpoints
    from wemoe_fast.checkpoint import load
    from wemoe_fast.tasks import load_tasks

    model = load(folder / "merged")
    tasks = load_tasks(folder / "tasks.yaml", folder / "merged")
    store = Checkpoints(checkpoints, every=1)
    adapt(model, tasks, steps=3, lr=0.01, batch_size=2, checkpoints=store, progress=False)
    return Digest().tensors({name: tensor.detach() for name, tensor in model.named_parameters()}).hex()


def _resume_adaptation(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        copied = shutil.copytree(folder / "checkpoints", Path(scratch, "checkpoints"))
        _compare(folder, _adaptation(folder, copied))


def _expect(folder: Path, digest: str) -> None:
    (folder / EXPECTED).write_text(digest)


def _compare(folder: Path, digest: str) -> None:
    if (folder / EXPECTED).read_text() != digest:
        raise AssertionError("the result is another one than that of the run nobody disturbed")


WEIGHTS, INDEX, EXPECTED = "model.safetensors", "model.safetensors.index.json", "expected"
TARGETS: dict[str, Target] = {
    "weights of an expert": Target(_checkpoint, (f"expert0/{WEIGHTS}",), _merge, mutate_header),
    "weights of the base": Target(_checkpoint, (f"base/{WEIGHTS}",), _merge, mutate_header),
    "configuration of an adapter": Target(_adapter, (f"expert0/{ADAPTER_CONFIG}",), _merge, mutate_json),
    "weights of an adapter": Target(_adapter, (f"expert0/{ADAPTER_WEIGHTS}",), _merge, mutate_header),
    "index of an expert": Target(_sharded, (f"expert0/{INDEX}",), _merge, mutate_json),
    "index of a merged model": Target(_merged, (f"out/{INDEX}",), _load, mutate_json),
    "wemoe.json": Target(_merged, ("out/wemoe.json",), _load, mutate_json),
    "recipe": Target(_checkpoint, ("recipe.yaml",), _recipe, mutate_yaml),
    "tasks": Target(_evaluated, ("tasks.yaml",), _tasks, mutate_yaml),
    "records of an evaluation": Target(_evaluated, ("records/*/*.jsonl",), _resume_evaluation),
    "checkpoints of an adaptation": Target(_adapted, ("checkpoints/step-*/state.*",), _resume_adaptation),
}


@dataclass
class Tally:
    """How the cases of a target ended."""

    worked: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)


class Bench:
    """A target's valid files, ready to be mutated again and again."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target, self.folder = target, folder
        target.make(folder)
        paths = sorted(path for pattern in target.files for path in folder.glob(pattern))
        self.originals = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
        target.read(folder)

    def case(self, seed: int) -> tuple[str, str]:
        """("worked", "") or ("refused", the message); anything else is raised."""
        rng = random.Random(seed)
        name = rng.choice(list(self.originals))
        data = self.originals[name]
        if self.target.structured is not None and rng.random() < 0.5:
            data = self.target.structured(data, rng)
        else:
            data = mutate_bytes(data, rng)
        return self.read(name, data)

    def read(self, name: str, data: bytes) -> tuple[str, str]:
        """The same for one file replaced by ``data``."""
        (self.folder / name).write_bytes(data)
        try:
            with _time_limit(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of records and checkpoints that are passed over
                self.target.read(self.folder)
            return "worked", ""
        except WEMoEError as error:
            message = str(error)
            if not message or "Traceback" in message:
                raise AssertionError(f"not one clear message: {message!r}") from error
            return "refused", message
        finally:
            (self.folder / name).write_bytes(self.originals[name])


class HangError(BaseException):
    """More time than reading any file may take; no Exception, so that nobody between takes it for his own."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise HangError(f"more than {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run(names: Sequence[str], cases: int, *, seed: int = 0) -> dict[str, Tally]:
    """Spread the cases over the targets; every case has a seed of its own, named where it fails."""
    tallies = {name: Tally() for name in names}
    for name, tally in tallies.items():
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(TARGETS[name], Path(folder))
            share = range(names.index(name), cases, len(names))

            run_share = partial(_run_share, bench, [seed + number for number in share], tally)
            extra = peak_extra_bytes(run_share, torch.device("cpu"))
            if extra is not None and extra > MEMORY:
                tally.failures.append(f"memory grew by {extra >> 20} MiB")
    return tallies


def _run_share(bench: Bench, seeds: Sequence[int], tally: Tally) -> None:
    for seed in seeds:
        try:
            outcome, _ = bench.case(seed)
            tally.worked += outcome == "worked"
            tally.refused += outcome == "refused"
        except (Exception, HangError) as error:
            tally.failures.append(f"seed {seed}: {type(error).__name__}: {error!s:.300}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutations", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="targets whose name matches this regular expression")
    options = parser.parse_args(arguments)
    names = [name for name in TARGETS if re.search(options.only, name)]
    if not names:
        parser.error(f"--only: expected to match one of {', '.join(TARGETS)}")
    tallies = run(names, options.cases, seed=options.seed)
    total = Counter(cases=sum(t.worked + t.refused + len(t.failures) for t in tallies.values()))
    found = {**total, "seed": options.seed, "targets": {name: vars(tally) for name, tally in tallies.items()}}
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    return 1 if any(tally.failures for tally in tallies.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
