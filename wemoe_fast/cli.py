"""``wemoe-fast``: a thin skin over the driver. Progress goes to stderr, results to files and stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import __version__
from .adapt import ROUTINGS, adapt
from .checkpoint import check_output, is_wemoe_directory, load, load_pretrained, save
from .comparison import RECORDS, check_resumable, compare, speeds, table, write_comparison
from .config import load_recipe
from .distributed import world
from .errors import InputError, WEMoEError
from .inspection import inspect
from .merge import baselines, merge
from .report import write_json
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
    model = merge(recipe, options.out, overwrite=options.overwrite)
    _say(inspect(model))
    _say(f"\nwritten to {options.out}")


def _adapt(options: argparse.Namespace) -> None:
    check_output(options.out, overwrite=options.overwrite)
    model = load(options.model).to(device=options.device, dtype=DTYPES.get(options.dtype))
    tasks = load_tasks(options.tasks, options.model)
    result = adapt(
        model,
        tasks,
        steps=options.steps,
        lr=options.lr,
        batch_size=options.batch_size,
        seed=options.seed or 0,
        routing=options.routing,
        progress=not options.quiet,
    )
    settings = {
        "steps": result.steps,
        "lr": result.lr,
        "batch_size": result.batch_size,
        "seed": result.seed,
        "routing": result.routing,
        "tasks": list(result.entropy),
    }
    save(model, options.out, files_from=options.model, settings={"adaptation": settings}, overwrite=options.overwrite)
    write_json(options.out / "adaptation.json", result.to_json())
    if result.steps:
        for name, values in result.entropy.items():
            _say(f"entropy of {name}: {values[0]:.3f} -> {values[-1]:.3f}")
    _say(f"{result.steps} steps in {result.seconds:.1f} s, written to {options.out}")


def _evaluate(options: argparse.Namespace) -> None:
    if options.experts and options.recipe is None:
        raise InputError("--experts: their rows come from a recipe; pass --recipe recipe.yaml")
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
    _say(inspect(load(options.model)))


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
    """A short name for each model: its directory's name, or the path where names repeat."""
    short = [directory.name or str(directory) for directory in directories]
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
    verb.set_defaults(run=_merge)

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
