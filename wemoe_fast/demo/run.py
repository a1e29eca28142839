"""The demo: the public verbs on what ``prepare`` wrote."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapt import adapt
from ..checkpoint import load, load_pretrained, save
from ..comparison import compare, environment, table, write_comparison
from ..config import Recipe, load_recipe
from ..curves import adaptation_curves
from ..errors import WEMoEError
from ..evaluate import Evaluation, evaluate
from ..merge import baselines, load_recipe_models, merge
from ..report import write_json
from ..tasks import Task, load_tasks
from ..throughput import interleaved_seconds, medians, relative_rms
from ..upscale import task_arithmetic, wemoe_layers
from .prepare import Prepared, prepare

ADAPTATION: dict[str, Any] = {"steps": 70, "lr": 5e-3, "batch_size": 8, "routing": "per_sample"}
QUICK_STEPS = 3
EXPERTS_ROW = "experts, each on its own task"


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    cache_dir: str | Path | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Merge four fine-tuned MiniLMs, adapt the routers without labels, evaluate, time; print what came out.

    Args:
        out: everything is written below; files of an earlier run are replaced.
        seed: of data, experts, routers and adaptation.
        quick: a smoke test: little data, few steps.
        cache_dir: where downloads and experts are kept.
        device: torch device of adaptation and evaluation.

    Returns:
        the content of ``demo.json``.
    """
    out = Path(out)
    seconds: dict[str, float] = {}
    with stage("prepare data and experts", seconds, progress):
        prepared = prepare(cache_dir, out, seed=seed, quick=quick, progress=progress)
    settings = ADAPTATION | ({"steps": QUICK_STEPS} if quick else {})
    results, files = merge_adapt_evaluate(
        prepared, out, seed=seed, adaptation=settings, noted={"quick": quick}, device=device, seconds=seconds,
        progress=progress,
    )  # fmt: skip
    with stage("measure throughput", seconds, progress):
        model = load(out / "adapted").to(device)
        throughput = _throughput(model, prepared, load_tasks(prepared.tasks, prepared.base), repeats=3 if quick else 5)

    content = {
        "environment": environment(),
        "seed": seed,
        "quick": quick,
        "adaptation": settings,
        "accuracy": {name: row.accuracy | {"mean": row.mean} for name, row in results.items()},
        "throughput": throughput,
        "seconds": seconds | {f"prepare: {k}": v for k, v in prepared.seconds.items()},
        "experts_cached": prepared.cached,
    }
    write_json(out / "demo.json", content)
    _print_summary(content, results, prepared, files["routing WEMoE, adapted"], out)
    return content


def merge_adapt_evaluate(
    prepared: Prepared,
    out: Path,
    *,
    seed: int,
    adaptation: Mapping[str, Any],
    noted: Mapping[str, Any],
    seconds: dict[str, float],
    device: str = "cpu",
    progress: bool = True,
) -> tuple[dict[str, Evaluation], dict[str, Path]]:
    """The three verbs on what is prepared, beside the baselines and the experts; all is written below `out`.

    Args:
        adaptation: settings of ``adapt``.
        noted: written beside the accuracies, with the seed and these settings.
        seconds: of every stage, added here.

    Returns:
        the evaluations by row, and the files of ``write_comparison``.
    """
    recipe = replace(load_recipe(prepared.recipe), seed=seed)
    merged_dir, adapted_dir = out / "merged", out / "adapted"
    with stage("merge", seconds, progress):
        merge(recipe, merged_dir, overwrite=True)
    with stage("adapt", seconds, progress):
        model = load(merged_dir).to(device)
        tasks = load_tasks(prepared.tasks, merged_dir)
        result = adapt(model, tasks, seed=seed, progress=progress, **adaptation)
        save(model, adapted_dir, files_from=merged_dir, settings={"adaptation": dict(adaptation)}, overwrite=True)
        write_json(out / "adaptation.json", result.to_json())
        adaptation_curves(result, out / "adaptation.png")

    def rows() -> Iterator[tuple[str, nn.Module]]:
        yield from baselines(recipe)
        yield "WEMoE, before adaptation", load(merged_dir)
        yield "WEMoE, adapted", load(adapted_dir)

    with stage("evaluate", seconds, progress):
        results, names = compare(rows(), tasks, device=device, progress=progress)
        results[EXPERTS_ROW] = experts_on_their_own_tasks(recipe, tasks, device=device, progress=progress)
        settings = {"seed": seed, **noted, **adaptation}
        files = write_comparison(results, names, out / "results", settings=settings, overwrite=True)
    return results, files


def experts_on_their_own_tasks(
    recipe: Recipe, tasks: Sequence[Task], *, device: str = "cpu", progress: bool = True
) -> Evaluation:
    """What merging tries to keep: every task by the expert trained for it."""
    own = Evaluation()
    for task in tasks:
        row = evaluate(load_pretrained(recipe.experts[task.name]).to(device), [task], progress=progress)
        own.add(row)
    return own


def _throughput(model: nn.Module, prepared: Prepared, tasks: list[Task], repeats: int) -> dict[str, Any]:
    """Samples per second on one mixed batch: WEMoE, the plain loop over samples, the statically merged model."""
    base, experts = load_recipe_models(load_recipe(prepared.recipe))
    device = next(model.parameters()).device
    static = task_arithmetic(base, experts).to(device)
    task = tasks[0]
    inputs = {name: tensor.to(device) for name, tensor in task.data.batch(range(min(64, len(task.data))))[0].items()}
    batch, tokens = inputs["input_ids"].shape
    layers = list(wemoe_layers(model).values())

    def run(module: nn.Module, strategy: str | None = None) -> torch.Tensor:
        for layer in layers if strategy else ():
            layer.strategy = strategy or "auto"
        with torch.inference_mode():
            result: torch.Tensor = module(**inputs).last_hidden_state
        return result

    error = relative_rms(run(model, "auto"), run(model, "reference"))
    if not error < 1e-4:
        raise WEMoEError(f"demo: the fast path differs from the plain loop by a relative RMS of {error:.1e}")
    seconds = medians(
        interleaved_seconds(
            {
                "statically merged model": lambda: run(static),
                "WEMoE, wemoe-fast": lambda: run(model, "auto"),
                "WEMoE, plain loop over samples": lambda: run(model, "reference"),
            },
            repeats=repeats,
        )
    )
    return {
        "batch": batch,
        "tokens": tokens,
        "relative_rms_to_loop": error,
        "repeats": repeats,
        "samples_per_second": {name: batch / value for name, value in seconds.items()},
    }


def _print_summary(
    content: dict[str, Any], results: dict[str, Evaluation], prepared: Prepared, heatmap: Path, out: Path
) -> None:
    speeds = content["throughput"]["samples_per_second"]
    static = speeds["statically merged model"]
    adapted, best = results["WEMoE, adapted"].mean, results[EXPERTS_ROW].mean
    lines = [
        "",
        "Accuracy in percent on test texts, per-sample routing" + (" (quick: little data)" if content["quick"] else ""),
        "",
        table(results),
        "",
        f"WEMoE keeps {100 * adapted / best:.1f} % of the experts' mean.",
        "",
        f"Samples per second, batch of {content['throughput']['batch']} texts of {content['throughput']['tokens']} "
        f"tokens, {content['environment']['threads']} threads:",
        *(f"  {name:<32}{speed:8.1f}   {speed / static:5.2f} x static" for name, speed in speeds.items()),
        "",
        "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in content["seconds"].items()),
        "Experts were " + ("cached." if content["experts_cached"] else "fine-tuned in this run."),
        "",
        f"Routing heat map: {heatmap}",
        f"Everything else:  {out.resolve()}",
        "",
        "Made from:",
        *(f"  {c.name}: {c.what}; {c.licence}; {c.origin}" for c in prepared.credits),
    ]
    sys.stdout.write("\n".join(lines) + "\n")


@contextmanager
def stage(name: str, seconds: dict[str, float], progress: bool) -> Iterator[None]:
    """Announce a stage on stderr and note how long it takes."""
    if progress:
        sys.stderr.write(f"\n== {name}\n")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
