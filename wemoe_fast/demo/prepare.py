"""All that a user would bring, made from public parts: base, experts, heads, texts, recipe, task lists."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .experts import MAX_TOKENS, Training, expert, load_base, zero_shot_head
from .sources import CREDITS, Credit, default_cache_dir, locate
from .texts import Example, Sizes, TaskTexts, load_texts

QUICK_SIZES = Sizes(train=96, adapt=96, tuning=40, test=40)
QUICK_TRAINING = Training(epochs=1)
RECIPE = {"merge_lambda": 0.3, "router_depth": 1, "normalization": "softmax"}
BATCH_SIZE = 64


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote and where. Paths are absolute."""

    base: Path
    experts: Mapping[str, Path]  # task -> Hugging Face checkpoint directory, in the cache
    recipe: Path
    tasks: Path  # tasks.yaml: the test texts
    tuning_tasks: Path  # tasks.tuning.yaml: the texts settings may be chosen on
    credits: tuple[Credit, ...]
    cached: bool  # every expert came from the cache
    seconds: Mapping[str, float]  # stage -> seconds


def prepare(
    cache_dir: str | Path | None,
    out_dir: str | Path,
    *,
    seed: int,
    quick: bool = False,
    progress: bool = True,
) -> Prepared:
    """Write recipe.yaml, tasks.yaml, tasks.tuning.yaml, data/*.jsonl and heads/*.safetensors into `out_dir`.

    Experts are fine-tuned on first use and kept in `cache_dir`. `quick` takes few texts and one epoch.
    """
    cache = (Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()).resolve()
    out = Path(out_dir).resolve()
    seconds: dict[str, float] = {}
    note: Callable[[str], Any] = sys.stderr.write if progress else lambda _: None

    started = time.perf_counter()
    sources = locate(cache, progress=progress)
    tasks = load_texts(sources, seed=seed, sizes=QUICK_SIZES if quick else Sizes())
    seconds["data"] = time.perf_counter() - started

    started = time.perf_counter()
    for folder in ("data", "heads"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_base(sources.base)
    training = QUICK_TRAINING if quick else Training()
    experts: dict[str, Path] = {}
    all_cached = True
    for task in tasks:
        spec = task.spec
        head = zero_shot_head(model, tokenizer, spec.prompts, spec.class_names)
        head.save(out / "heads" / f"{spec.name}.safetensors")
        examples = task.splits["train"]
        if progress:
            note(f"expert {spec.name}: {len(examples)} texts, {len(spec.classes)} classes\n")
        made = expert(
            sources.base,
            [e.text for e in examples],
            [e.label for e in examples],
            head,
            spec.prompts,
            cache / "experts",
            name=spec.name,
            seed=seed,
            training=training,
            progress=progress,
        )
        if made.cached:
            note("  cached\n")
        experts[spec.name] = made.path
        all_cached &= made.cached
    seconds["experts"] = time.perf_counter() - started

    for task in tasks:
        for split in ("adapt", "tuning", "test"):
            path = out / "data" / f"{task.spec.name}.{split}.jsonl"
            _write(path, _jsonl(task, task.splits[split], labelled=split != "adapt"))
    return write_lists(
        out, sources.base, experts, recipe=RECIPE, suffix="jsonl",
        settings={"max_length": MAX_TOKENS, "batch_size": BATCH_SIZE}, credits=CREDITS, cached=all_cached,
        seconds=seconds,
    )  # fmt: skip


def write_lists(
    out: Path,
    base: Path,
    experts: Mapping[str, Path],
    *,
    recipe: Mapping[str, Any],
    suffix: str,
    settings: Mapping[str, Any],
    credits: tuple[Credit, ...],
    cached: bool,
    seconds: Mapping[str, float],
) -> Prepared:
    """Write recipe.yaml, tasks.yaml and tasks.tuning.yaml beside the data and heads of the tasks that experts are of.

    Args:
        recipe: beside base and experts.
        suffix: of the data files, ``data/<task>.<split>.<suffix>``.
        settings: of every task.
    """
    base, paths = base.resolve(), {name: str(path.resolve()) for name, path in experts.items()}
    _write(out / "recipe.yaml", _yaml({"base": str(base), "experts": paths} | dict(recipe)))
    lists = {"test": out / "tasks.yaml", "tuning": out / "tasks.tuning.yaml"}
    for split, path in lists.items():
        entries = [
            {
                "name": name,
                "head": f"heads/{name}.safetensors",
                "data": f"data/{name}.{split}.{suffix}",
                "unlabelled": f"data/{name}.adapt.{suffix}",
                **settings,
            }
            for name in experts
        ]
        _write(path, _yaml({"tasks": entries}))
    return Prepared(
        base=base,
        experts=experts,
        recipe=out / "recipe.yaml",
        tasks=lists["test"],
        tuning_tasks=lists["tuning"],
        credits=credits,
        cached=cached,
        seconds=seconds,
    )


def _jsonl(task: TaskTexts, examples: Iterable[Example], *, labelled: bool) -> str:
    names = task.spec.class_names
    rows = ({"text": e.text} | ({"label": names[e.label]} if labelled else {}) for e in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _yaml(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)
