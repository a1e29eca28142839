"""Six image tasks on one small ViT: prepare, merge, adapt without labels, evaluate.

    python -m benchmarks.vision --seed 0 --out vision-out

A ViT (4 layers, d = 96, 4 x 4 patches of 7 x 7 pixels) is pretrained without labels, to tell orientations apart, on
images of MNIST and Fashion-MNIST that no task has; an expert of each task then fine-tunes its MLPs under a linear probe
of the pretrained features. Everything else is the library: a recipe, `merge`, `adapt`, `evaluate`. Images come from
packages (`vision_data`), models are kept in the cache; nothing is downloaded but those packages.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wemoe_fast.comparison import environment, table
from wemoe_fast.demo.prepare import Prepared, write_lists
from wemoe_fast.demo.run import EXPERTS_ROW, merge_adapt_evaluate
from wemoe_fast.demo.sources import default_cache_dir
from wemoe_fast.errors import WEMoEError
from wemoe_fast.report import write_json

from .vision_data import CREDITS, FASHION_DIR, SIZES, TASKS, Images, Pools, draw, load_pools
from .vision_models import VisionTraining, base_model, expert, linear_probe, pixel_values

RECIPE = {"merge_lambda": 0.3, "router_depth": 1, "normalization": "softmax"}
ADAPTATION: dict[str, Any] = {"steps": 90, "lr": 5e-3, "batch_size": 8, "routing": "per_sample", "drift_penalty": 1.0}
BATCH_SIZE = 128
QUICK_SIZES = {source: {"train": 64, "adapt": 32, "tuning": 32, "test": 32} for source in SIZES}
QUICK_TRAINING = VisionTraining(pretraining_images=512, pretraining_epochs=1, epochs=1)


def prepare(
    pools: Pools,
    cache: Path,
    out: Path,
    *,
    seed: int,
    sizes: Mapping[str, Mapping[str, int]] = SIZES,
    training: VisionTraining | None = None,
    progress: bool = True,
) -> Prepared:
    """Write recipe.yaml, tasks.yaml, tasks.tuning.yaml, data/*.safetensors and heads/*.safetensors into `out`.

    The base model and the experts are trained on first use and kept in `cache`.
    """
    training = training or VisionTraining()
    out = out.resolve()
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    base = base_model(pools, cache / "experts", training, progress=progress)
    seconds["base"] = time.perf_counter() - started
    started = time.perf_counter()
    for folder in ("data", "heads"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    experts, all_cached = {}, base.cached
    for name, splits in draw(pools, seed, sizes).items():
        head = linear_probe(base.path, splits["train"], TASKS[name].classes)
        head.save(out / "heads" / f"{name}.safetensors")
        made = expert(
            base.path, splits["train"], head, cache / "experts", training, name=name, seed=seed, progress=progress
        )
        experts[name] = made.path
        all_cached &= made.cached
        for split in ("adapt", "tuning", "test"):
            save_file(_tensors(splits[split], labelled=split != "adapt"), out / "data" / f"{name}.{split}.safetensors")
    seconds["experts"] = time.perf_counter() - started
    return write_lists(
        out, base.path, experts, recipe=RECIPE, suffix="safetensors", settings={"batch_size": BATCH_SIZE},
        credits=CREDITS, cached=all_cached, seconds=seconds,
    )  # fmt: skip


def run_vision(
    out: Path,
    *,
    seed: int = 0,
    quick: bool = False,
    fashion: Path = FASHION_DIR,
    cache: Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The experiment; returns the content of ``vision.json`` and prints what came out.

    Raises CheckpointError before anything is trained where a data file is missing or not the pinned one.
    """
    cache = cache or default_cache_dir()
    started = time.perf_counter()
    pools = load_pools(cache, fashion, progress=progress)
    seconds = {"data": time.perf_counter() - started}
    chosen: dict[str, Any] = {"sizes": QUICK_SIZES, "training": QUICK_TRAINING} if quick else {}
    prepared = prepare(pools, cache, out, seed=seed, progress=progress, **chosen)
    seconds |= prepared.seconds
    adaptation = ADAPTATION | ({"steps": 3} if quick else {})
    results, files = merge_adapt_evaluate(
        prepared, out, seed=seed, adaptation=adaptation, noted={"quick": quick}, seconds=seconds, progress=progress
    )
    content = {
        "environment": environment(),
        "seed": seed,
        "quick": quick,
        "recipe": RECIPE,
        "adaptation": adaptation,
        "accuracy": {name: row.accuracy | {"mean": row.mean} for name, row in results.items()},
        "n": results[EXPERTS_ROW].n,
        "seconds": seconds,
        "models_cached": prepared.cached,
    }
    write_json(out / "vision.json", content)
    adapted, best = results["WEMoE, adapted"].mean, results[EXPERTS_ROW].mean
    lines = [
        "",
        "Accuracy in percent on test images, per-sample routing" + (" (quick: little data)" if quick else ""),
        "",
        table(results),
        "",
        f"WEMoE keeps {100 * adapted / best:.1f} % of the experts' mean.",
        "Seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()),
        "Models were " + ("cached." if prepared.cached else "trained in this run."),
        "",
        f"Routing heat map: {files['routing WEMoE, adapted']}",
        f"Everything else:  {out.resolve()}",
        "",
        "Made from:",
        *(f"  {c.name}: {c.what}; {c.licence}; {c.origin}" for c in prepared.credits),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
    return content


def _tensors(images: Images, *, labelled: bool) -> dict[str, torch.Tensor]:
    labels = {"labels": torch.from_numpy(images.labels)} if labelled else {}
    return {"pixel_values": pixel_values(images), **labels}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vision", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="files of an earlier run are replaced")
    parser.add_argument("--seed", type=int, default=0, help="of data, experts, routers and adaptation (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a smoke test: little data, few steps")
    parser.add_argument(
        "--fashion-mnist", type=Path, default=FASHION_DIR, metavar="DIR",
        help=f"folder of Fashion-MNIST's four .gz files (default: {FASHION_DIR}, Debian's dataset-fashion-mnist)",
    )  # fmt: skip
    parser.add_argument("--cache-dir", type=Path, help="where packages and models are kept")
    options = parser.parse_args(arguments)
    try:
        run_vision(
            options.out, seed=options.seed, quick=options.quick, fashion=options.fashion_mnist, cache=options.cache_dir
        )
    except WEMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
