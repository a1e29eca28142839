"""``wemoe-fast``: a thin skin over the driver. Progress goes to stderr, results to files and stdout."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import __version__
from .adapt import ROUTINGS, SETTINGS
from .adapt_run import adapt_directory
from .checkpoint import MAX_SHARD_BYTES, is_wemoe_directory, load, load_pretrained, outline
from .comparison import RECORDS, check_resumable, compare, speeds, table, write_comparison
from .config import load_recipe
from .convert import convert
from .distributed import world
from .errors import InputError, WEMoEError
from .hub import located, name_of
from .inspection import inspect
from .merge import baselines, check_merge, coverage, expectation, merge_to_directory
from .prompts import ROUTINGS as DECODE_ROUTINGS
from .tasks import load_tasks
from .tune import DTYPES as TUNED_DTYPES
from .tune import SHAPES, Shape, summary, tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 where something was refused, 130 when interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.verb == "bench":
        options.arguments = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        status: int | None = options.run(options)
    except WEMoEError as error:
        sys.stderr.write(f"wemoe-fast {options.verb}: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"wemoe-fast {options.verb}: interrupted\n")
        return 130
    return status or 0


def _merge(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    if options.decode_routing is not None:
        recipe = replace(recipe, decode_routing=options.decode_routing)
    if options.dry_run:
        plan = check_merge(recipe, options.out, overwrite=options.overwrite, max_shard_bytes=options.max_shard_size)
    else:
        plan = merge_to_directory(
            recipe,
            options.out,
            overwrite=options.overwrite,
            max_shard_bytes=options.max_shard_size,
            allow_nonfinite=options.allow_nonfinite,
            progress=not options.quiet,
        )
    _say(f"{inspect(plan.model)}\n\n{coverage(plan)}\n")
    _say(expectation(plan, options.max_shard_size) if options.dry_run else f"written to {options.out}")


def _convert(options: argparse.Namespace) -> None:
    files = convert(options.directory, options.out, overwrite=options.overwrite)
    _say(f"{', '.join(path.name for path in files)} as safetensors in {options.out}")


def _adapt(options: argparse.Namespace) -> None:
    options.seed = options.seed or 0
    with world(options.device) as processes:
        result = adapt_directory(
            located(options.model),
            options.tasks,
            options.out,
            steps=options.steps,
            settings={name: getattr(options, name) for name in SETTINGS},
            checkpoint_every=options.checkpoint_every,
            restart=options.restart,
            overwrite=options.overwrite,
            dtype=DTYPES.get(options.dtype),
            world=processes,
            progress=not options.quiet,
        )
    if not processes.first:
        return
    for name, values in result.entropy.items() if result.steps else ():
        _say(f"entropy of {name}: {values[0]:.3f} -> {values[-1]:.3f}")
    plateau = ", stopped on a plateau" if result.stopped_early else ""
    before = f", {result.resumed} of them done before" if result.resumed else ""
    _say(f"{result.steps} steps{plateau}{before}, in {result.seconds:.1f} s, written to {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    if options.experts and options.recipe is None:
        raise InputError("--experts: their rows come from a recipe; pass --recipe recipe.yaml")
    options.models = [located(model) for model in options.models]
    names = _row_names(options.models)

    def models() -> Iterator[tuple[str, nn.Module]]:
        if options.recipe is not None:
            yield from baselines(load_recipe(options.recipe), experts=options.experts)
        for name, directory in names.items():
            yield name, load(directory) if is_wemoe_directory(directory) else load_pretrained(directory)

    with world(options.device) as processes:
        if processes.first:
            check_resumable(options.out, overwrite=options.overwrite)
        processes.wait()
        rows, experts = compare(
            models(),
            load_tasks(options.tasks, options.models[0]),
            device=processes.device,
            dtype=DTYPES.get(options.dtype),
            records=options.out / RECORDS,
            batch_tokens=options.batch_tokens,
            batch_invariant=options.batch_invariant,
            world=processes,
            progress=not options.quiet,
        )
        if not processes.first:
            return
        settings = {
            "models": list(names),
            "tasks": options.tasks.name,
            "dtype": options.dtype,
            "batch_tokens": options.batch_tokens,
            "batch_invariant": options.batch_invariant,
        }
        files = write_comparison(rows, experts, options.out, settings=settings, overwrite=options.overwrite)
    _say(f"{table(rows)}\n\n{speeds(rows)}\n")
    for what, path in files.items():
        _say(f"{what}: {path}")


def _inspect(options: argparse.Namespace) -> None:
    _say(inspect(outline(located(options.model))))


def _tune(options: argparse.Namespace) -> None:
    path, table = tune(
        [Shape.parse(text) for text in options.shape] or SHAPES,
        options.dtype or ("bfloat16",),
        device=options.device,
        out=options.out,
        tries=options.tries,
        budget=options.seconds,
        progress=not options.quiet,
    )
    _say(summary(table))
    _say(f"\nwritten to {path}")


def _bench(options: argparse.Namespace) -> int:
    from .benchmarks.throughput import main as bench

    status: int = bench(options.arguments, prog="wemoe-fast bench")
    return status


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    run_demo(
        options.out,
        seed=options.seed or 0,
        quick=options.quick,
        cache_dir=options.cache,
        device=options.device,
        progress=not options.quiet,
    )


def _row_names(directories: Sequence[Path]) -> dict[str, Path]:
    """A short name for each model: its directory's name or that on the Hub, or the path where names repeat."""
    short = [name_of(directory) or str(directory) for directory in directories]
    return {
        name if short.count(name) == 1 else str(directory): directory
        for name, directory in zip(short, directories, strict=True)
    }


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 2GB or 500MiB, found {text!r}")
    return size


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wemoe-fast", description="Merge fine-tuned models into one WEMoE model, adapt and evaluate it."
    )
    parser.add_argument("--version", action="version", version=f"wemoe-fast {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=_positive, help="CPU threads (default: PyTorch's)")
    running = argparse.ArgumentParser(add_help=False, parents=[common])
    running.add_argument("--device", default="cpu", help="torch device, such as cuda (default: cpu)")
    running.add_argument("--quiet", action="store_true", help="no progress on stderr")
    typed = argparse.ArgumentParser(add_help=False)
    typed.add_argument("--dtype", choices=list(DTYPES), help="run in this dtype (default: as stored)")
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--out", type=Path, required=True, help="directory to write, new or empty")
    writing.add_argument("--overwrite", action="store_true", help="replace what is in --out")
    seeded = argparse.ArgumentParser(add_help=False)
    seeded.add_argument("--seed", type=int, help="makes the result repeatable (default: 0, or the recipe's)")

    verb = verbs.add_parser("merge", parents=[common, writing, seeded], help="recipe -> WEMoE model")
    verb.add_argument("recipe", type=Path, help="recipe.yaml: base, experts, lambda, router")
    verb.add_argument("--dry-run", action="store_true", help="check everything that can be told without the weights")
    verb.add_argument(
        "--max-shard-size",
        type=_size,
        default=MAX_SHARD_BYTES,
        metavar="SIZE",
        help="largest file to write, such as 2GB or 500MiB (default: 5GiB)",
    )
    verb.add_argument(
        "--decode-routing",
        choices=DECODE_ROUTINGS,
        help="while generating: by the prompt, or step by step (the recipe's)",
    )
    verb.add_argument("--allow-nonfinite", action="store_true", help="merge NaN and infinite numbers like any others")
    verb.add_argument("--quiet", action="store_true", help="no progress on stderr")
    verb.set_defaults(run=_merge)

    verb = verbs.add_parser("convert", parents=[common, writing], help="pickle checkpoint -> safetensors, safely")
    verb.add_argument("directory", type=Path, help="directory with pytorch_model*.bin")
    verb.set_defaults(run=_convert)

    verb = verbs.add_parser(
        "adapt", parents=[running, typed, writing, seeded], help="train the routers on unlabelled samples"
    )
    verb.add_argument("model", type=Path, help="directory of a WEMoE model")
    verb.add_argument("--tasks", type=Path, required=True, help="tasks.yaml")
    verb.add_argument("--steps", type=int, default=1000, help="default: 1000, as published")
    verb.add_argument("--lr", type=float, default=1e-4, help="Adam's learning rate (default: 1e-4, as published)")
    verb.add_argument("--batch-size", type=_positive, default=16, help="samples per task and step (default: 16)")
    verb.add_argument(
        "--routing", choices=ROUTINGS, default="per_sample", help="routing while adapting (default: per_sample)"
    )
    verb.add_argument(
        "--patience", type=_positive, metavar="P",
        help="stop when the mean entropy of P steps is not below that of the P before; no accuracy (default: off)",
    )  # fmt: skip
    verb.add_argument("--min-delta", type=float, default=0.0, help="nats that count as below (default: 0)")
    verb.add_argument(
        "--drift-penalty", type=float, default=0.0, metavar="P",
        help="weight of the mean squared difference from the routing weights at the start (default: 0, as published)",
    )  # fmt: skip
    verb.add_argument(
        "--checkpoint-every", type=_positive, metavar="K",
        help="keep a checkpoint every K steps in OUT.checkpoints; the same command then goes on where it stopped",
    )  # fmt: skip
    verb.add_argument("--restart", action="store_true", help="delete the checkpoints and begin anew")
    verb.set_defaults(run=_adapt)

    verb = verbs.add_parser("evaluate", parents=[running, typed, writing], help="accuracy on labelled samples")
    verb.add_argument("models", type=Path, nargs="+", help="directories: WEMoE models or ordinary checkpoints")
    verb.add_argument("--tasks", type=Path, required=True, help="tasks.yaml")
    verb.add_argument("--recipe", type=Path, help="adds rows: pretrained, weight average, task arithmetic")
    verb.add_argument("--experts", action="store_true", help="adds a row for every expert of the recipe")
    verb.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help="tokens in a batch, padding included, where samples have lengths (default: batch_size times the longest)",
    )
    verb.add_argument(
        "--batch-invariant", action="store_true", help="run every sample by itself: bits that hang on no batch; slow"
    )
    verb.set_defaults(run=_evaluate)

    verb = verbs.add_parser("inspect", parents=[common], help="layers, parameters, memory, routers")
    verb.add_argument("model", type=Path, help="directory of a WEMoE model")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser(
        "tune", parents=[common], help="measure the kernels on this GPU, choose tiles and strategies"
    )
    verb.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    verb.add_argument(
        "--shape", action="append", default=[], metavar="B,N,d,h,T", help="tune for this linear; repeatable"
    )
    verb.add_argument("--dtype", action="append", choices=list(TUNED_DTYPES), help="repeatable (default: bfloat16)")
    verb.add_argument("--tries", type=_positive, default=12, help="tiles to measure per kernel and shape (default: 12)")
    verb.add_argument(
        "--seconds", type=float, default=1800.0, help="stop starting new shapes after this (default: 1800)"
    )
    verb.add_argument("--out", type=Path, help="JSON file to write (default: where wemoe-fast looks for it)")
    verb.add_argument("--quiet", action="store_true", help="no progress on stderr")
    verb.set_defaults(run=_tune)

    verb = verbs.add_parser(
        "bench", add_help=False, help="time this beside everything else that runs WEMoE; see bench --help"
    )
    verb.set_defaults(run=_bench, threads=None)

    verb = verbs.add_parser("demo", parents=[running, seeded], help="real model, real data, all of the above")
    verb.add_argument("--out", type=Path, default=Path("demo-out"), help="directory to write (default: demo-out)")
    verb.add_argument("--quick", action="store_true", help="a smoke test on little data")
    verb.add_argument("--cache", type=Path, help="downloads and experts (default: ~/.cache/wemoe-fast)")
    verb.set_defaults(run=_demo)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
