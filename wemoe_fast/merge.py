"""The driver's first verb: a recipe in, a WEMoE model directory out."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from . import __version__
from .adapters import is_adapter, with_adapter
from .atomic import check_output, remove_leftovers, replaced_directory
from .checkpoint import MAX_SHARD_BYTES, import_transformers, load, load_pretrained, write_description
from .config import Recipe
from .errors import CheckpointError
from .hub import name_of
from .inspection import aligned, readable_size
from .preflight import Copied, Initialised, Merged, MergePlan, Stacked, plan_merge
from .report import write_json
from .sharded import plan_shards
from .shared import share
from .streaming import input_bytes, input_files, resident_bytes, sha256, stamps, workspace_bytes, write_tensors
from .upscale import task_arithmetic, weight_average

MANIFEST_FILE = "merge.json"


def load_recipe_models(recipe: Recipe) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The base and the experts of a recipe; every checkpoint that cannot be read is reported at once.

    An expert is in the dtype of its own checkpoint; one that is an adapter in float32 or wider. With ``recipe.share``
    hand both to ``share``.
    """
    problems = []
    models: dict[str, nn.Module] = {}
    for name, directory in {"": recipe.base, **recipe.experts}.items():
        try:
            if not is_adapter(directory):
                models[name] = load_pretrained(directory)
            elif "" in models:
                models[name] = with_adapter(models[""], directory, share=recipe.share)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of("recipe", problems)
    return models.pop(""), models


def merge(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
) -> nn.Module:
    """:func:`merge_to_directory`, and the merged model, in evaluation mode."""
    merge_to_directory(
        recipe, out, overwrite=overwrite, max_shard_bytes=max_shard_bytes, allow_nonfinite=allow_nonfinite
    )
    return load(out)


def merge_to_directory(
    recipe: Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> MergePlan:
    """Merge the models of a recipe, tensor by tensor, into a directory; no model is ever in memory.

    The directory appears under its name only when it is complete and on the disk; ``merge.json`` in it, written last,
    names every input with its SHA-256. The tensors are those that ``upscale`` makes, bit for bit.

    Args:
        recipe: what to merge and the router in front, see ``wemoe_fast.config.Recipe``.
        out: the new directory, see ``checkpoint.save``; tokenizer and processor files come from the base.
        overwrite: replace a directory that is not empty.
        max_shard_bytes: tensors are spread over files of at most this size (one tensor may exceed it).
        allow_nonfinite: merge NaN and infinite numbers like any others.
        progress: a bar on stderr.

    Returns:
        what was merged.

    Raises:
        CheckpointError: checkpoints that cannot be read or do not fit, see ``preflight.plan_merge``; ``out`` is not
            empty, is an input, or cannot be written.
        InputError: inputs that are not finite.
    """
    out = Path(out)
    plan = check_merge(recipe, out, overwrite=overwrite, max_shard_bytes=max_shard_bytes)
    shards = plan_shards(plan.tensors, max_shard_bytes)
    before = stamps(plan)
    total = plan.output_bytes + input_bytes(plan)
    bar = tqdm(desc="merge", total=total, unit="B", unit_scale=True, disable=not progress, file=sys.stderr)
    try:
        with bar, replaced_directory(out, overwrite=overwrite) as target:
            for written in write_tensors(plan, shards, target, allow_nonfinite=allow_nonfinite):
                bar.update(written)
            settings = {name: value for name, value in _named(recipe).items() if name in ("base", "experts", "seed")}
            write_description(plan.model, plan.aliases, target, files_from=recipe.base, settings=settings)
            manifest = _manifest(plan, bar.update)
            if stamps(plan) != before:
                raise CheckpointError(f"{out}: not written: an input was changed during the merge; merge again")
            write_json(target / MANIFEST_FILE, manifest)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise CheckpointError(
            f"{out}: could not be written: {error.strerror or error}{where}; nothing was left behind, and "
            "what was there before is untouched"
        ) from error
    return plan


def check_merge(
    recipe: Recipe, out: str | Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> MergePlan:
    """Everything of :func:`merge_to_directory` that can be told without reading or writing a tensor."""
    out = Path(out)
    _check_apart(recipe, out)
    check_output(out, overwrite=overwrite)
    plan = plan_merge(recipe)
    _check_space(out, sum(shard.nbytes for shard in plan_shards(plan.tensors, max_shard_bytes)))
    return plan


def coverage(plan: MergePlan) -> str:
    """A readable table of what becomes of the tensors."""
    kinds: dict[type, str] = {
        Merged: "merged by task arithmetic",
        Stacked: "upscaled: base and task vectors",
        Initialised: "routers, new",
        Copied: "copied from the base",
    }
    rows = [["", "tensors", "numbers", "size"]]
    for kind, what in kinds.items():
        specs = [spec for spec, source in plan.tensors.items() if type(source) is kind]
        numbers = sum(spec.nbytes // spec.dtype.itemsize for spec in specs)
        rows.append([what, str(len(specs)), f"{numbers:,}", readable_size(sum(spec.nbytes for spec in specs))])
    rows.append(["tied to one of these, not stored", str(len(plan.aliases))])
    rows.append(["ignored, of no use to the model", str(sum(map(len, plan.ignored.values())))])
    names = sorted({name for ignored in plan.ignored.values() for name in ignored})
    more = [f"{len(names) - 8} more"] if len(names) > 8 else []
    listed = [f"ignored: {', '.join(names[:8] + more)}"] if names else []
    listed += [f"left to expert {name!r}: {', '.join(left)}" for name, left in plan.left.items() if left]
    listed += [f"the base's alone: {', '.join(plan.kept)}"] if plan.kept else []
    listed += plan.notes
    return "\n".join([*aligned([row + [""] * (4 - len(row)) for row in rows]), *listed])


def expectation(plan: MergePlan, max_shard_bytes: int = MAX_SHARD_BYTES) -> str:
    """What carrying out a plan will take on the disk and in memory."""
    shards = plan_shards(plan.tensors, max_shard_bytes)
    size = readable_size(sum(shard.nbytes for shard in shards))
    work = workspace_bytes(plan)
    whole = readable_size(resident_bytes() + work)
    files = f"{len(shards)} file{'s' if len(shards) > 1 else ''}"
    return (
        f"output       {size} of weights in {files}\n"
        f"peak memory  {whole} at most, {readable_size(work)} of it for merging\n"
        "nothing was written (--dry-run)"
    )


def _check_apart(recipe: Recipe, out: Path) -> None:
    for source in (recipe.base, *recipe.experts.values()):
        ours, theirs = out.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise CheckpointError(f"{out}: expected an output apart from the inputs, found the input {source}")


def _check_space(out: Path, needed: int) -> None:
    """Leftovers of killed runs go first, as their space is free for this one."""
    remove_leftovers(out.resolve())
    there = next(parent for parent in out.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise CheckpointError(f"{out}: expected {needed:,} bytes of free space, found {free:,} in {there}")


def _named(recipe: Recipe) -> dict[str, Any]:
    """The recipe with names for the directories: their own, or the name on the Hub and the commit."""
    experts = {name: name_of(path) for name, path in recipe.experts.items()}
    return {**vars(recipe), "base": name_of(recipe.base), "experts": experts}


def _manifest(plan: MergePlan, tick: Callable[[int], object]) -> dict[str, Any]:
    """Recipe, inputs and versions: nothing that differs between two runs of the same merge."""
    hashes = {
        directory: {path.name: {"sha256": sha256(path, tick), "bytes": path.stat().st_size} for path in paths}
        for directory, paths in input_files(plan).items()
    }
    experts = {name: hashes[directory] for name, directory in plan.recipe.experts.items()}
    return {
        "format_version": 1,
        "recipe": _named(plan.recipe),
        "inputs": {"base": hashes[plan.recipe.base], "experts": experts},
        "left": plan.left,
        "kept": plan.kept,
        "versions": {
            "wemoe_fast": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": import_transformers().__version__,
        },
    }


def baselines(recipe: Recipe, *, experts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """What a WEMoE model is compared with, one after the other: (row name, model)."""
    base, tuned = load_recipe_models(recipe)
    if recipe.share:
        tuned = share(base, tuned).experts
    yield "pretrained", base
    if experts:
        for name, model in tuned.items():
            yield f"expert {name}", model
    yield "weight average", weight_average(base, tuned)
    yield f"task arithmetic {recipe.merge_lambda:g}", task_arithmetic(base, tuned, recipe.merge_lambda)
