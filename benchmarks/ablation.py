"""What of the adaptation decides how much of the experts is kept: settings side by side, over seeds.

    python -m benchmarks.ablation vision --out ablation-out
    python -m benchmarks.ablation text --out ablation-out --settings published softmax --minutes 10
    python -m benchmarks.ablation table --out ablation-out

Every setting is adapted on unlabelled samples and judged on tuning samples after two numbers of steps; the better is
its own. Then test samples are read, once: for the published recipe (the better of its learning rates), for the best
setting, for the best one with a drift penalty, and for what they are compared with. Each result is stored when it is
known, and each adaptation's routers: the same command goes on where it was ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wemoe_fast.adapt import adapt
from wemoe_fast.adapt_state import Checkpoints
from wemoe_fast.comparison import environment
from wemoe_fast.config import load_recipe
from wemoe_fast.demo.prepare import Prepared
from wemoe_fast.demo.prepare import prepare as prepare_text
from wemoe_fast.demo.run import EXPERTS_ROW, experts_on_their_own_tasks
from wemoe_fast.demo.sources import default_cache_dir
from wemoe_fast.errors import InputError, WEMoEError
from wemoe_fast.evaluate import evaluate
from wemoe_fast.fingerprint import Digest
from wemoe_fast.merge import baselines, load_recipe_models
from wemoe_fast.report import aligned, markdown_table, write_json
from wemoe_fast.tasks import Samples, Task, load_tasks
from wemoe_fast.upscale import upscale, wemoe_layers

from .vision import prepare as prepare_vision
from .vision_data import FASHION_DIR, load_pools

MERGE_LAMBDA, BATCH_SIZE = 0.3, 8
TOLD = "routers told the task"


@dataclass(frozen=True)
class Setting:
    """Of the routers (arguments of ``upscale``) and of ``adapt``."""

    name: str
    lr: float
    router: Mapping[str, Any] = field(default_factory=dict)
    adapt: Mapping[str, Any] = field(default_factory=dict)

    @property
    def published(self) -> bool:
        return not self.router and not self.adapt


DEPTH_1 = {"router_depth": 1}
SOFTMAX = {"normalization": "softmax"}
SETTINGS = (
    Setting("published, lr 1e-4", 1e-4),
    Setting("published, lr 1e-3", 1e-3),
    Setting("published and drift penalty 1", 1e-3, {}, {"drift_penalty": 1.0}),
    Setting("depth 1, lr 1e-3", 1e-3, DEPTH_1),
    Setting("depth 1, batch-reduced", 1e-3, DEPTH_1, {"routing": "batch_reduce"}),
    Setting("depth 1, drift penalty 1", 1e-3, DEPTH_1, {"drift_penalty": 1.0}),
    Setting("depth 1, drift penalty 10", 1e-3, DEPTH_1, {"drift_penalty": 10.0}),
    Setting("softmax, lr 1e-3", 1e-3, DEPTH_1 | SOFTMAX),
    Setting("softmax, lr 5e-3", 5e-3, DEPTH_1 | SOFTMAX),
    Setting("softmax, temperature 3", 5e-3, DEPTH_1 | SOFTMAX | {"temperature": 3.0}),
    Setting("softmax, batch-reduced", 5e-3, DEPTH_1 | SOFTMAX, {"routing": "batch_reduce"}),
    Setting("softmax, drift penalty 1", 5e-3, DEPTH_1 | SOFTMAX, {"drift_penalty": 1.0}),
)


@dataclass(frozen=True)
class Experiment:
    """Where data and models come from, after how many steps to look, and how many tuning samples to look at."""

    name: str
    prepare: Callable[[Path, int], Prepared]
    steps: tuple[int, int]
    tuning: int | None = None  # of each task; None for all


class First:
    """The first n samples."""

    def __init__(self, samples: Samples, n: int) -> None:
        self._samples, self._n = samples, min(n, len(samples))

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        return self._samples.batch(indices)


class OutOfTimeError(Exception):
    """The minutes are over."""


class Ablation:
    """The cells of one experiment, each computed once and kept in a file of its own below `out`."""

    def __init__(
        self,
        experiment: Experiment,
        out: Path,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        settings: Sequence[Setting] = SETTINGS,
        minutes: float = float("inf"),
    ) -> None:
        self.experiment, self.seeds, self.settings = experiment, tuple(seeds), tuple(settings)
        self._out = out / experiment.name
        self._until = time.monotonic() + 60 * minutes
        self._loaded: tuple[int, _Problem] | None = None

    def run(self) -> dict[str, Any]:
        """Compute what is missing; returns what came out. Raises OutOfTimeError where time is over before the end."""
        marks = self.experiment.steps
        for seed in self.seeds:  # in this order one seed's models are loaded at a time
            for setting in self.settings:
                for n in marks:
                    self.cell(setting, n, seed, "tuning")
        tuning = {s.name: {n: [self.cell(s, n, k, "tuning") for k in self.seeds] for n in marks} for s in self.settings}
        steps = {name: max(marks, key=lambda n: _mean(found[n])) for name, found in tuning.items()}
        judged = {name: _mean(tuning[name][n]) for name, n in steps.items()}
        chosen = self._chosen(judged)
        others = []
        for seed in self.seeds:
            others.append(self.others(seed))
            for setting in chosen:
                self.cell(setting, steps[setting.name], seed, "test")
        test = {s.name: [self.cell(s, steps[s.name], seed, "test") for seed in self.seeds] for s in chosen}
        compared = {name: [row[name] for row in others] for name in others[0]}
        problem = self._problem(self.seeds[-1])
        return {
            "experiment": self.experiment.name,
            "environment": environment(),
            "seeds": list(self.seeds),
            "batch_size": BATCH_SIZE,
            "merge_lambda": MERGE_LAMBDA,
            "n": {split: {t.name: len(t.data) for t in problem.tasks(split)} for split in ("tuning", "test")},
            "settings": {s.name: asdict(s) for s in self.settings},
            "steps": steps,
            "chosen": [s.name for s in chosen],
            "tuning": {name: {str(n): _summary(cells) for n, cells in found.items()} for name, found in tuning.items()},
            "test": {name: _summary(cells) for name, cells in (compared | test).items()},
        }

    def _chosen(self, judged: Mapping[str, float]) -> list[Setting]:
        """The published recipe, the best setting, and the best with a drift penalty, by their tuning accuracy."""
        chosen: dict[str, Setting] = {}
        kinds: tuple[Callable[[Setting], bool], ...] = (
            lambda s: s.published,
            lambda s: True,
            lambda s: "drift_penalty" in s.adapt,
        )
        for kind in kinds:
            found = [s for s in self.settings if kind(s)]
            if found:
                best = max(found, key=lambda s: judged[s.name])
                chosen[best.name] = best
        return list(chosen.values())

    def cell(self, setting: Setting, steps: int, seed: int, split: str) -> dict[str, Any]:
        """Accuracy of one adapted model on one split, and how far its routing drifted."""
        key = Digest().plain([asdict(setting), BATCH_SIZE, MERGE_LAMBDA, self.experiment.tuning]).hex()[:12]
        name = f"{seed}-{key}"

        def compute() -> dict[str, Any]:
            problem = self._problem(seed)
            model = upscale(
                problem.base, problem.experts, merge_lambda=MERGE_LAMBDA, init_lambda=MERGE_LAMBDA, seed=seed,
                **setting.router,
            )  # fmt: skip
            store = Checkpoints(self._out / "routers" / name, every=10**9)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "adapt: step", UserWarning)  # drift is reported
                found = adapt(
                    model, problem.tasks(split), steps=steps, lr=setting.lr, batch_size=BATCH_SIZE, seed=seed,
                    checkpoints=store, progress=False, **setting.adapt,
                )  # fmt: skip
            row = evaluate(model, problem.tasks(split), progress=False)
            return {
                "setting": setting.name, "mean": row.mean, "accuracy": row.accuracy, "drift": found.routing_drift[-1],
                "entropy": statistics.fmean(values[-1] for values in found.entropy.values()),
            }  # fmt: skip

        return self._kept(f"{name}-{steps}-{split}", compute, f"{setting.name}, {steps} steps, seed {seed}, {split}")

    def others(self, seed: int) -> dict[str, dict[str, Any]]:
        """On the test samples: what a merged model is compared with."""

        def compute() -> dict[str, Any]:
            problem = self._problem(seed)
            base, experts, tasks = problem.base, problem.experts, problem.tasks("test")
            recipe = replace(problem.recipe, merge_lambda=MERGE_LAMBDA)
            rows = {name: evaluate(model, tasks, progress=False).accuracy for name, model in baselines(recipe)}
            told = upscale(base, experts, router_depth=0, merge_lambda=MERGE_LAMBDA, seed=seed)
            rows[TOLD] = {}
            for number, name in enumerate(experts):
                task = [task for task in tasks if task.name == name]
                for layer in wemoe_layers(told).values():
                    assert layer.router.constant is not None
                    with torch.no_grad():
                        layer.router.constant.copy_(torch.eye(len(experts))[number])
                rows[TOLD] |= evaluate(told, task, progress=False).accuracy
            rows[EXPERTS_ROW] = experts_on_their_own_tasks(recipe, tasks, progress=False).accuracy
            return {name: {"mean": statistics.fmean(row.values()), "accuracy": row} for name, row in rows.items()}

        return self._kept(f"{seed}-others-test", compute, f"what they are compared with, seed {seed}, test")

    def _kept(self, name: str, compute: Callable[[], dict[str, Any]], told: str) -> dict[str, Any]:
        path = self._out / "cells" / f"{name}.json"
        if not path.is_file():
            if time.monotonic() > self._until:
                raise OutOfTimeError
            started = time.monotonic()
            content = compute()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            mean = f" {100 * content['mean']:.2f}" if "mean" in content else ""
            sys.stderr.write(f"{told}:{mean} ({time.monotonic() - started:.0f} s)\n")
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept

    def _problem(self, seed: int) -> _Problem:
        if self._loaded is None or self._loaded[0] != seed:
            self._loaded = None
            prepared = self.experiment.prepare(self._out / f"seed{seed}", seed)
            self._loaded = seed, _Problem(prepared, self.experiment.tuning)
        return self._loaded[1]


class _Problem:
    """The models and tasks of one seed."""

    def __init__(self, prepared: Prepared, tuning: int | None) -> None:
        self.recipe = load_recipe(prepared.recipe)
        self.base, self.experts = load_recipe_models(self.recipe)
        for model in (self.base, *self.experts.values()):
            model.eval()
        self._prepared, self._tuning = prepared, tuning
        self._tasks: dict[str, list[Task]] = {}

    def tasks(self, split: str) -> list[Task]:
        """Those of "tuning" or "test"; what is adapted on is the same."""
        if split not in self._tasks:
            file = self._prepared.tuning_tasks if split == "tuning" else self._prepared.tasks
            tasks = load_tasks(file, self._prepared.base)
            if split == "tuning" and self._tuning is not None:
                tasks = [replace(task, data=First(task.data, self._tuning)) for task in tasks]
            self._tasks[split] = tasks
        return self._tasks[split]


def experiments(fashion: Path = FASHION_DIR, cache: Path | None = None) -> dict[str, Experiment]:
    """The two experiments, by name."""
    folder = cache or default_cache_dir()
    pools: list[Any] = []

    def vision(out: Path, seed: int) -> Prepared:
        if not pools:
            pools.append(load_pools(folder, fashion))
        return prepare_vision(pools[0], folder, out, seed=seed)

    def text(out: Path, seed: int) -> Prepared:
        out.mkdir(parents=True, exist_ok=True)
        return prepare_text(folder, out, seed=seed)

    return {"vision": Experiment("vision", vision, (30, 90)), "text": Experiment("text", text, (30, 70), tuning=150)}


def table(*contents: Mapping[str, Any], markdown: bool = False) -> str:
    """Settings down; of each experiment the steps, tuning accuracy then, drift, and test accuracy where it was read."""
    own = [{n: c["tuning"][n][str(steps)] for n, steps in c["steps"].items()} for c in contents]
    settings = [name for name in own[0] if all(name in of for of in own)]
    settings.sort(key=lambda name: statistics.fmean(of[name]["mean"] for of in own))
    others = [
        name for name in contents[0]["test"] if all(name in c["test"] and name not in c["steps"] for c in contents)
    ]
    before = [f"{c['experiment']}: " if len(contents) > 1 else "" for c in contents]
    lines = [["setting", *(f"{b}{word}" for b in before for word in ("steps", "tuning", "drift", "test"))]]
    for name in [*settings, *others]:
        line = [name]
        for content, of in zip(contents, own, strict=True):
            if name in of:
                line += [str(content["steps"][name]), _percent(of[name]), f"{of[name]['drift']:.1f}"]
            else:
                line += [""] * 3
            line.append(_percent(content["test"][name]) if name in content["test"] else "")
        lines.append(line)
    return markdown_table(lines) if markdown else aligned(lines)


def _summary(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, by task too."""
    values = [cell["mean"] for cell in cells]
    summary: dict[str, Any] = {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "by_seed": values,
        "accuracy": {t: statistics.fmean(cell["accuracy"][t] for cell in cells) for t in cells[0]["accuracy"]},
    }
    if "drift" in cells[0]:
        summary["drift"] = max(cell["drift"] for cell in cells)
    return summary


def _mean(cells: Sequence[Mapping[str, Any]]) -> float:
    return statistics.fmean(cell["mean"] for cell in cells)


def _percent(summary: Mapping[str, Any]) -> str:
    return f"{100 * summary['mean']:.1f} ± {100 * summary['std']:.1f}"


def _picked(words: Sequence[str]) -> list[Setting]:
    """The settings whose names begin with one of the words."""
    picked = [s for s in SETTINGS if any(s.name.startswith(word) for word in words)]
    unknown = [word for word in words if not any(s.name.startswith(word) for s in SETTINGS)]
    if unknown:
        names = "; ".join(s.name for s in SETTINGS)
        raise InputError(f"--settings: no name begins with {', '.join(unknown)}; there are {names}")
    return picked


def main(arguments: Sequence[str] | None = None) -> int:
    known = ("vision", "text", "table")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.split("\n")[0])
    parser.add_argument("experiment", choices=known, help="table: Markdown of the results of both that lie in --out")
    parser.add_argument("--out", type=Path, required=True, help="keeps every result; the same command goes on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--settings", nargs="+", default=[""], metavar="NAME", help="beginnings of names (default: all)"
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--fashion-mnist", type=Path, default=FASHION_DIR, metavar="DIR")
    parser.add_argument("--cache-dir", type=Path, help="where packages and models are kept")
    options = parser.parse_args(arguments)
    if options.experiment == "table":
        found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("ablation-*.json"))]
        if not found:
            sys.stderr.write(f"error: no ablation-*.json in {options.out}; run an experiment first\n")
            return 1
        sys.stdout.write(table(*found, markdown=True) + "\n")
        return 0
    try:
        ablation = Ablation(
            experiments(options.fashion_mnist, options.cache_dir)[options.experiment],
            options.out,
            seeds=options.seeds,
            settings=_picked(options.settings),
            minutes=options.minutes,
        )
        content = ablation.run()
    except OutOfTimeError:
        sys.stderr.write("time is over; the same command goes on\n")
        return 2
    except WEMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    write_json(options.out / f"ablation-{options.experiment}.json", content)
    sys.stdout.write(table(content) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
