"""The driver's first verb: a recipe in, a WEMoE model directory out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from .checkpoint import check_output, load_pretrained, save
from .config import Recipe
from .errors import CheckpointError
from .upscale import task_arithmetic, upscale, weight_average


def load_recipe_models(recipe: Recipe) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The base and the experts of a recipe; every checkpoint that cannot be read is reported at once."""
    problems = []
    models: dict[str, nn.Module] = {}
    for name, directory in {"": recipe.base, **recipe.experts}.items():
        try:
            models[name] = load_pretrained(directory)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of("recipe", problems)
    return models.pop(""), models


def merge(recipe: Recipe, out: str | Path, *, overwrite: bool = False) -> nn.Module:
    """Merge the models of a recipe and save the result.

    Args:
        recipe: what to merge and the router in front, see ``wemoe_fast.config.Recipe``.
        out: the new directory, see ``checkpoint.save``; tokenizer and processor files come from the base.

    Returns:
        the merged model, in evaluation mode.

    Raises:
        CheckpointError: checkpoints that cannot be read, or ``out`` is not empty.
        InputError: experts that do not fit the base.
    """
    out = Path(out)
    for source in (recipe.base, *recipe.experts.values()):
        ours, theirs = out.resolve(), source.resolve()
        if ours == theirs or ours in theirs.parents or theirs in ours.parents:
            raise CheckpointError(f"{out}: expected an output apart from the inputs, found the input {source}")
    check_output(out, overwrite=overwrite)
    base, experts = load_recipe_models(recipe)
    model = upscale(
        base,
        experts,
        merge_lambda=recipe.merge_lambda,
        router_depth=recipe.router_depth,
        init_lambda=recipe.init_lambda,
        normalization=recipe.normalization,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        batch_reduce=recipe.batch_reduce,
        seed=recipe.seed,
    )
    settings = {
        "base": recipe.base.name,
        "experts": {name: path.name for name, path in recipe.experts.items()},
        "seed": recipe.seed,
    }
    save(model, out, files_from=recipe.base, settings=settings, overwrite=overwrite)
    return model


def baselines(recipe: Recipe, *, experts: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """What a WEMoE model is compared with, one after the other: (row name, model)."""
    base, tuned = load_recipe_models(recipe)
    yield "pretrained", base
    if experts:
        for name, model in tuned.items():
            yield f"expert {name}", model
    yield "weight average", weight_average(base, tuned)
    yield f"task arithmetic {recipe.merge_lambda:g}", task_arithmetic(base, tuned, recipe.merge_lambda)
