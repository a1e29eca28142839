"""What a recipe will become, and everything that stands against it, from configurations and headers alone.

The models are built on the meta device: no tensor of any checkpoint is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import shared
from .adapters import Adapter, fit, is_adapter, read_adapter
from .checkpoint import is_wemoe_directory
from .config import Recipe
from .errors import CheckpointError, WEMoEError
from .families import MLPSite, locate_mlps
from .headers import TensorEntry, read_checkpoint
from .hub import name_of, same_model
from .linears import bias_of, is_transposed, sizes, weight_of
from .mlp import FastWEMoEMLP
from .operands import LowRank, Operand
from .router import Router
from .sharded import TensorSpec
from .skeletons import Skeletons
from .stored_names import StoredNames
from .structure import DTYPES
from .task_vectors import MergedLinear
from .upscale import MergeInfo, expert_parts, install

BASE = ""
"""Stands for the base where experts are named; no expert has an empty name."""


@dataclass(frozen=True)
class Merged:
    """A tensor merged by task arithmetic: that of the base and those of the experts, in their order."""

    base: TensorEntry
    experts: tuple[Operand, ...]


@dataclass(frozen=True)
class Stacked:
    """The stack [1+T, ...] of base and task vectors, each transposed first where the inputs are [in, out]."""

    base: TensorEntry
    experts: tuple[Operand, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Copied:
    """A buffer, which is the base's."""

    base: TensorEntry


@dataclass(frozen=True)
class Initialised:
    """A tensor of the router at ``layer``, made from the recipe's seed."""

    layer: str
    name: str


Source = Merged | Stacked | Copied | Initialised


@dataclass(frozen=True)
class MergePlan:
    """A merge that can be carried out.

    Attributes:
        recipe: what was asked for.
        model: the merged model, on the meta device.
        tensors: what is stored, in the model's order -> where it comes from.
        aliases: names that stand for a stored tensor (tied weights) -> its name.
        twins: tensors that are stored twice though the model ties them: (kept, other), which must be equal.
        ignored: what checkpoints store and their class has no use for, by the checkpoint's directory.
        left: expert -> what of it is not merged, by its own names: heads and vocabularies, with ``recipe.share``.
        kept: the base's parameters that are not merged, because not all experts have them.
        notes: what is worth knowing of the inputs, a sentence each.
    """

    recipe: Recipe
    model: nn.Module
    tensors: dict[TensorSpec, Source]
    aliases: dict[str, str]
    twins: tuple[tuple[TensorEntry, TensorEntry], ...]
    ignored: dict[Path, tuple[str, ...]]
    left: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Of the tensors written, without headers."""
        return sum(spec.nbytes for spec in self.tensors)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The directories of the base and the experts, in the recipe's order."""
        return (self.recipe.base, *self.recipe.experts.values())


@dataclass(frozen=True)
class _Checkpoint:
    """The tensors of one model by the names its class gives them, those that it ignores, and what adapters add."""

    directory: Path
    entries: dict[str, TensorEntry]
    ignored: tuple[str, ...]
    twins: tuple[tuple[TensorEntry, TensorEntry], ...]
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    left: tuple[str, ...] = ()


def plan_merge(recipe: Recipe) -> MergePlan:
    """Hold the experts against the base.

    Raises:
        CheckpointError: every file that is missing, damaged or pickled; if there is none, every tensor of base and
            experts that is missing, extra, mis-shaped or mis-typed, in one report.
        UnknownArchitectureError: no MLP in the base.
    """
    directories = {BASE: recipe.base, **recipe.experts}
    stored: dict[str, dict[str, TensorEntry]] = {}
    skeletons: dict[str, nn.Module] = {}
    adapters: dict[str, Adapter] = {}
    made = Skeletons()
    problems: list[str] = []
    for name, directory in directories.items():
        try:
            if is_wemoe_directory(directory):
                raise CheckpointError(f"{directory}: expected an ordinary checkpoint, found a WEMoE model")
            if is_adapter(directory) and name == BASE:
                raise CheckpointError(f"{directory}: expected a whole checkpoint as the base, found an adapter")
            if is_adapter(directory):
                adapters[name] = read_adapter(directory)
                continue
            stored[name] = read_checkpoint(directory)
            skeletons[name] = made.of(directory, stored[name].values())
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of("recipe", problems)
    base = skeletons[BASE]
    names = StoredNames(base)
    own = {name: names if name == BASE or not recipe.share else StoredNames(m) for name, m in skeletons.items()}
    found = {name: _assign(name, directories[name], stored[name], own[name], recipe.share, problems) for name in stored}
    for name, adapter in adapters.items():
        found[name] = _adapted(name, adapter, found[BASE], names, recipe.share, problems)
    problems += [] if recipe.share else _class_problems(skeletons, directories)
    for name in stored:
        problems += _tensor_problems(name, found[name], None if recipe.share else found[BASE], own[name])
    if problems:
        raise CheckpointError(
            f"{CheckpointError.of(f'merging into {type(base).__name__}', problems)}{_way_out(recipe, skeletons)}"
        )
    return _plan(recipe, skeletons, adapters, found, names)


def _assign(
    owner: str, directory: Path, stored: Mapping[str, TensorEntry], names: StoredNames, own: bool, problems: list[str]
) -> _Checkpoint:
    """Give the stored tensors the model's names, an expert's ``own`` or the base's; tied tensors that of the first."""
    entries: dict[str, TensorEntry] = {}
    ignored, twins = [], []
    for name, entry in stored.items():
        target = names.of(name)
        if target is None and names.ignores(name):
            ignored.append(name)
        elif target is None:
            whose = "" if owner == BASE or own else ", the class of the base"
            reason = f"is no part of {type(names.model).__name__}{whose}"
            if names.converted(name):
                reason = "is one that transformers takes apart or joins when it loads, which a merge cannot"
            problems.append(
                f"{_who(owner)}: {name} {reason}: shape {entry.shape}, {_name(entry.dtype)}, in {entry.path}"
            )
        elif names.first[target] in entries:
            twins.append((entries[names.first[target]], entry))
        else:
            entries[names.first[target]] = entry
    return _Checkpoint(directory, entries, tuple(ignored), tuple(twins))


def _class_problems(skeletons: Mapping[str, nn.Module], directories: Mapping[str, Path]) -> list[str]:
    base = type(skeletons[BASE]).__name__
    return [
        f"{_who(name)}: expected a {base} as {directories[BASE] / 'config.json'} says, found a {type(model).__name__} "
        f"in {directories[name] / 'config.json'}"
        for name, model in skeletons.items()
        if type(model).__name__ != base
    ]


def _adapted(
    owner: str, adapter: Adapter, base: _Checkpoint, names: StoredNames, share: bool, problems: list[str]
) -> _Checkpoint:
    """The base with what an adapter adds and replaces."""
    fitted = fit(adapter, names, share=share)
    problems += [f"{_who(owner)}: {problem}" for problem in fitted.problems]
    entries = {**base.entries, **fitted.whole}
    return _Checkpoint(adapter.directory, entries, (), tuple(fitted.twins), fitted.updates, tuple(fitted.left))


def _way_out(recipe: Recipe, skeletons: Mapping[str, nn.Module]) -> str:
    """A line that names ``share`` where experts differ from the base in what could be left to them."""
    if recipe.share:
        return ""
    try:
        fits = shared.fit(skeletons[BASE], {n: m for n, m in skeletons.items() if n != BASE}, locate_mlps)
    except WEMoEError:
        return ""
    outside = list(dict.fromkeys([*fits.kept, *(path for paths in fits.left.values() for path in paths)]))
    more = f" and {len(outside) - 4} more" if len(outside) > 4 else ""
    return (
        f"\nshare: true in the recipe merges the layers alone, without {', '.join(outside[:4])}{more}"
        if outside
        else ""
    )


def _tensor_problems(owner: str, checkpoint: _Checkpoint, base: _Checkpoint | None, names: StoredNames) -> list[str]:
    """What is missing, mis-shaped or mis-typed; an expert is held against the base, where that has the tensor."""
    problems = []
    for name, target in names.targets.items():
        if names.first[name] != name or (owner != BASE and name not in names.parameters):
            continue
        entry = checkpoint.entries.get(name)
        reference = None if base is None or owner == BASE else base.entries.get(name)
        where = f"{reference.path}" if reference else f"{(base or checkpoint).directory / 'config.json'}"
        shape = reference.shape if reference else tuple(target.shape)
        if entry is None:
            missing = f"{name} is missing from {checkpoint.directory}"
            problems.append(f"{_who(owner)}: {missing}: expected shape {shape} as in {where}")
            continue
        if entry.shape != shape:
            problems.append(
                f"{_who(owner)}: {name}: expected shape {shape} as in {where}, found {entry.shape} in {entry.path}"
            )
        fits = entry.dtype in DTYPES if target.is_floating_point() else not entry.dtype.is_floating_point
        if not fits:
            problems.append(
                f"{_who(owner)}: {name}: expected a dtype like {_name(target.dtype)} for "
                f"{type(names.model).__name__}, found {_name(entry.dtype)} in {entry.path} (quantised?)"
            )
    return problems


def _who(owner: str) -> str:
    return f"expert {owner!r}" if owner != BASE else "base"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(
    recipe: Recipe,
    skeletons: Mapping[str, nn.Module],
    adapters: Mapping[str, Adapter],
    found: Mapping[str, _Checkpoint],
    names: StoredNames,
) -> MergePlan:
    model = skeletons[BASE]
    sites = locate_mlps(model)
    whole = {name: skeletons[name] for name in recipe.experts if name in skeletons}
    places: dict[str, dict[str, str]] = {}
    left = {name: found[name].left for name in recipe.experts}
    kept: tuple[str, ...] = ()
    problems = []
    if recipe.share and whole:
        try:
            fits = shared.fit(model, whole, locate_mlps)
            places, kept = fits.places, fits.kept
            left |= fits.left
        except WEMoEError as error:
            problems.append(str(error))
    for name in [] if recipe.share else whole:
        try:
            problems += _activation_problems(name, skeletons[name], model, sites)
        except WEMoEError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of(f"merging into {type(model).__name__}", problems)
    dtypes = {name: {n: t.dtype for n, t in m.state_dict().items()} for name, m in skeletons.items()}

    def operand(expert: str, name: str) -> Operand:
        """The expert's tensor of that name; the base's where it is not shared."""
        checkpoint = found[expert]
        if expert in adapters:
            wide = torch.promote_types(dtypes[BASE][name], torch.float32)
            return Operand(checkpoint.entries[name], wide, checkpoint.updates.get(name))
        own = places.get(expert, {}).get(name) if recipe.share else name
        if own is None:
            return Operand(found[BASE].entries[name], dtypes[BASE][name])
        return Operand(checkpoint.entries[own], dtypes[expert].get(own, dtypes[BASE][name]))

    paths = {module: path for path, module in model.named_modules()}
    sources: dict[str, Source] = {}
    for name, kept_as in names.first.items():
        entry = found[BASE].entries[kept_as]
        if name in names.parameters:
            sources[name] = Merged(entry, tuple(operand(expert, kept_as) for expert in recipe.experts))
        else:
            sources[name] = Copied(entry)
    layers = {}
    for site in sites:
        layers[site.path] = _layer(site, recipe)
        for role, linear in site.parts.linears().items():
            for kind, stacked in (("weight", "stack"), ("bias", "bias")):
                merged = sources.pop(f"{paths[linear]}.{kind}", None)
                if isinstance(merged, Merged):
                    transposed = kind == "weight" and is_transposed(linear)
                    sources[f"{site.path}.{role}.{stacked}"] = Stacked(merged.base, merged.experts, transposed)
        for name in layers[site.path].router.state_dict():
            sources[f"{site.path}.router.{name}"] = Initialised(site.path, name)
    emptied = tuple(path for site in sites for path in site.emptied)
    settings = {"merge_lambda": recipe.merge_lambda, "init_lambda": recipe.init_lambda}
    model = install(model, layers, MergeInfo(tuple(recipe.experts), emptied, settings))
    tensors: dict[TensorSpec, Source] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.numel() and id(tensor) in first:
            aliases[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[TensorSpec(name, tensor.dtype, tuple(tensor.shape))] = sources[name]
    twins = tuple(pair for checkpoint in found.values() for pair in checkpoint.twins)
    ignored = {checkpoint.directory: checkpoint.ignored for checkpoint in found.values()}
    notes = _notes(recipe, adapters, found, dtypes, tensors)
    return MergePlan(recipe, model, tensors, aliases, twins, ignored, left, kept, tuple(notes))


def _notes(
    recipe: Recipe,
    adapters: Mapping[str, Adapter],
    found: Mapping[str, _Checkpoint],
    dtypes: Mapping[str, Mapping[str, torch.dtype]],
    tensors: Mapping[TensorSpec, Source],
) -> list[str]:
    """Dtypes other than the base's or than stored, and what adapters are."""
    notes = []
    for name, checkpoint in found.items():
        held = dtypes.get(name, {})
        stored = Counter(
            (entry.dtype, held[key])
            for key, entry in checkpoint.entries.items()
            if key in held and entry.dtype.is_floating_point and entry.dtype != held[key]
        )
        notes += [
            f"{_who(name)}: {count} of {len(checkpoint.entries)} tensors are stored in {_name(before)} and taken as "
            f"{_name(after)}, as transformers loads them"
            for (before, after), count in stored.items()
        ]
    for place, name in enumerate(recipe.experts):
        if name in adapters:
            adapter, checkpoint = adapters[name], found[name]
            ranks = sorted({adapter.rank_of(module) for module in adapter.parts})
            of = f" of rank {', '.join(map(str, ranks))}" if ranks else ""
            replaced = len(set(checkpoint.entries.values()) - set(found[BASE].entries.values()))
            notes.append(
                f"{_who(name)} is a LoRA adapter{of}: {len(checkpoint.updates)} tensors adapted, {replaced} replaced"
            )
            if adapter.base and not same_model(adapter.base, recipe.base):
                notes.append(
                    f"{_who(name)}: its adapter was trained on {adapter.base!r:.120}, the recipe's base is "
                    f"{name_of(recipe.base)!r}; nothing in it tells whether they are the same"
                )
            continue
        others = {
            (source.experts[place].dtype, spec.dtype)
            for spec, source in tensors.items()
            if isinstance(source, (Merged, Stacked))
        }
        notes += [
            f"{_who(name)} is {_name(theirs)}, the base {_name(ours)}: they are subtracted in "
            f"{_name(torch.promote_types(ours, torch.float32))}, and the result is {_name(ours)}"
            for theirs, ours in sorted(others, key=str)
            if theirs != ours
        ]
    return notes


def _activation_problems(name: str, expert: nn.Module, base: nn.Module, sites: list[MLPSite]) -> list[str]:
    parts = expert_parts(name, expert, base, sites)
    return [
        f"expert {name!r}: MLP {site.path!r}: expected activation {site.parts.activation!r} as in the base, "
        f"found {parts[site.path].activation!r}"
        for site in sites
        if parts[site.path].activation != site.parts.activation
    ]


def _layer(site: MLPSite, recipe: Recipe) -> FastWEMoEMLP:
    """The site's WEMoE layer on the meta device."""
    experts, dtype = len(recipe.experts), weight_of(site.parts.up).dtype
    with torch.device("meta"):
        linears: dict[str, Any] = {
            role: MergedLinear.empty(experts, *sizes(linear)[::-1], bias_of(linear) is not None)
            for role, linear in site.parts.linears().items()
        }
        router = new_router(site.parts.in_features, recipe, dtype)
        return FastWEMoEMLP(
            router=router,
            activation=site.parts.activation,
            batch_first=site.batch_first,
            decode_routing=recipe.decode_routing,
            **linears,
        ).to(dtype)


def new_router(in_features: int, recipe: Recipe, dtype: torch.dtype) -> Router:
    """The router that a recipe puts in front of an MLP; on the default device."""
    return Router(
        in_features,
        len(recipe.experts),
        depth=recipe.router_depth,
        init_lambda=recipe.init_lambda,
        normalization=recipe.normalization,
        temperature=recipe.temperature,
        top_k=recipe.top_k,
        batch_reduce=recipe.batch_reduce,
        dtype=dtype,
    )
