"""What a recipe will become, and everything that stands against it, from configurations and headers alone.

The models are built on the meta device: no tensor of any checkpoint is read.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import (
    architecture,
    import_transformers,
    is_wemoe_directory,
    quiet_transformers,
    transformers_class,
)
from .config import Recipe
from .errors import CheckpointError, WEMoEError
from .families import MLPSite, locate_mlps
from .headers import TensorEntry, read_checkpoint
from .linears import bias_of, is_transposed, sizes, weight_of
from .mlp import FastWEMoEMLP
from .router import Router
from .sharded import TensorSpec
from .task_vectors import MergedLinear
from .upscale import MergeInfo, expert_parts, install

BASE = ""
"""Stands for the base where experts are named; no expert has an empty name."""


@dataclass(frozen=True)
class Merged:
    """A tensor merged by task arithmetic: that of the base and those of the experts, in their order."""

    base: TensorEntry
    experts: tuple[TensorEntry, ...]


@dataclass(frozen=True)
class Stacked:
    """The stack [1+T, ...] of base and task vectors, each transposed first where the inputs are [in, out]."""

    base: TensorEntry
    experts: tuple[TensorEntry, ...]
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
    """

    recipe: Recipe
    model: nn.Module
    tensors: dict[TensorSpec, Source]
    aliases: dict[str, str]
    twins: tuple[tuple[TensorEntry, TensorEntry], ...]
    ignored: dict[Path, tuple[str, ...]]

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
    """The tensors of one model by the names its class gives them, and those that it ignores."""

    directory: Path
    entries: dict[str, TensorEntry]
    ignored: tuple[str, ...]
    twins: tuple[tuple[TensorEntry, TensorEntry], ...]


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
    made = _Skeletons()
    problems: list[str] = []
    for name, directory in directories.items():
        try:
            if is_wemoe_directory(directory):
                raise CheckpointError(f"{directory}: expected an ordinary checkpoint, found a WEMoE model")
            stored[name] = read_checkpoint(directory)
            skeletons[name] = made.of(directory, stored[name].values())
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of("recipe", problems)
    base = skeletons[BASE]
    shared = _Names(base)
    found = {name: _assign(name, directories[name], stored[name], shared, problems) for name in directories}
    problems += _class_problems(skeletons, directories)
    problems += _tensor_problems(found, base, shared)
    if problems:
        raise CheckpointError.of(f"merging into {type(base).__name__}", problems)
    return _plan(recipe, skeletons, found, shared)


class _Skeletons:
    """Models on the meta device, one for all checkpoints of the same configuration."""

    def __init__(self) -> None:
        self._made: dict[str, nn.Module] = {}

    def of(self, directory: Path, entries: Iterable[TensorEntry]) -> nn.Module:
        """The model of a Hugging Face checkpoint in the dtype it would be loaded in.

        ``entries``: its tensors, the first of which give the dtype where ``config.json`` does not.

        Raises:
            CheckpointError: no ``config.json``, or one that cannot be understood.
        """
        transformers = import_transformers()
        cls = transformers_class(directory, architecture(directory))
        try:
            with quiet_transformers():
                config = cls.config_class.from_pretrained(str(directory), local_files_only=True)
                dtype = _dtype(config) or next((e.dtype for e in entries if e.dtype.is_floating_point), torch.float32)
                major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
                setattr(config, "dtype" if (major, minor) >= (4, 56) else "torch_dtype", dtype)
                content = {**config.to_dict(), "_name_or_path": "", "transformers_version": ""}
                key = f"{cls.__name__} {json.dumps(content, sort_keys=True, default=str)}"
                if key not in self._made:
                    with _default_dtype(dtype), torch.device("meta"), torch.random.fork_rng(devices=[]):
                        self._made[key] = cls(config).eval()
                    _keep_in_float32(self._made[key], dtype)
        except Exception as error:  # a damaged config.json can fail anywhere in another package
            reason = f"could not be read as {cls.__name__}: {error}"
            raise CheckpointError(f"{directory / 'config.json'}: {reason}") from error
        return self._made[key]


def _dtype(config: Any) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else None


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Modules that transformers keeps in float32 in a model of half precision."""
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ()) if dtype != torch.float32 else set()
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if any(re.search(rf"(^|\.){re.escape(part)}($|\.)", name) for part in kept):
            parameter.data = parameter.data.float()


class _Names:
    """The names under which a model's class knows its tensors, and those under which files may store them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.parameters = {name for name, tensor in self.targets.items() if isinstance(tensor, nn.Parameter)}
        self.prefix: str = getattr(model, "base_model_prefix", "")
        ids: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.targets.items():
            ids[id(tensor)].append(name)
        self.first = {name: names[0] for names in ids.values() for name in names}
        self._renamings, self._converters = _transforms(model)
        self._ignored = _patterns(model)

    def of(self, stored: str) -> str | None:
        """The model's name for a stored tensor; None for one that it has no place for."""
        for name in dict.fromkeys([self._renamed(stored), stored]):
            for candidate in (self._without_prefix(name), name, f"{self.prefix}.{name}"):
                if candidate in self.targets:
                    return candidate
        return None

    def ignores(self, stored: str) -> bool:
        """True for what old versions stored and nobody needs."""
        return any(pattern.search(stored) for pattern in self._ignored)

    def converted(self, stored: str) -> bool:
        """True where loading would take the tensor apart or join it with others."""
        return any(converter.rename_source_key(stored)[1] is not None for converter in self._converters)

    def _renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming(name)
        return name

    def _without_prefix(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to stored names: functions of a name, and converters of tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before 5.0
        mapping: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        old = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias", **mapping}
        return [lambda name, a=a, b=b: re.sub(a, b, name) for a, b in old.items()], []
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    return [lambda name, r=r: r.rename_source_key(name)[0] for r in renamings], converters


def _patterns(model: Any) -> list[re.Pattern[str]]:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    patterns |= {r"rotary_emb\.inv_freq"} if "inv_freq" in buffers else set()
    patterns |= {r"(^|\.)position_ids$"} if "position_ids" in buffers else set()
    return [re.compile(pattern) for pattern in sorted(patterns)]


def _assign(
    owner: str, directory: Path, stored: Mapping[str, TensorEntry], names: _Names, problems: list[str]
) -> _Checkpoint:
    """Give the stored tensors the model's names; tied tensors that of the first."""
    entries: dict[str, TensorEntry] = {}
    ignored, twins = [], []
    for name, entry in stored.items():
        target = names.of(name)
        if target is None and names.ignores(name):
            ignored.append(name)
        elif target is None:
            reason = f"is no part of {type(names.model).__name__}{'' if owner == BASE else ', the class of the base'}"
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


def _tensor_problems(found: Mapping[str, _Checkpoint], base: nn.Module, names: _Names) -> list[str]:
    problems = []
    ours = found[BASE]
    for owner, checkpoint in found.items():
        for name, target in names.targets.items():
            if names.first[name] != name or (owner != BASE and name not in names.parameters):
                continue
            entry, reference = checkpoint.entries.get(name), ours.entries.get(name)
            # The base is held against its class, an expert against the base, where the base has the tensor.
            where = f"{reference.path}" if owner != BASE and reference else f"{ours.directory / 'config.json'}"
            shape = reference.shape if owner != BASE and reference else tuple(target.shape)
            if entry is None:
                missing = f"{name} is missing from {checkpoint.directory}"
                problems.append(f"{_who(owner)}: {missing}: expected shape {shape} as in {where}")
                continue
            if entry.shape != shape:
                problems.append(
                    f"{_who(owner)}: {name}: expected shape {shape} as in {where}, found {entry.shape} in {entry.path}"
                )
            if owner != BASE and reference and entry.dtype != reference.dtype:
                problems.append(
                    f"{_who(owner)}: {name}: expected dtype {_name(reference.dtype)} as in {where}, found "
                    f"{_name(entry.dtype)} in {entry.path}; convert the expert to the base's dtype"
                )
            elif entry.dtype.is_floating_point != target.is_floating_point():
                problems.append(
                    f"{_who(owner)}: {name}: expected a dtype like {_name(target.dtype)} for {type(base).__name__}, "
                    f"found {_name(entry.dtype)} in {entry.path} (quantised?)"
                )
    return problems


def _who(owner: str) -> str:
    return f"expert {owner!r}" if owner != BASE else "base"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plan(
    recipe: Recipe, skeletons: Mapping[str, nn.Module], found: Mapping[str, _Checkpoint], names: _Names
) -> MergePlan:
    model = skeletons[BASE]
    sites = locate_mlps(model)
    problems = []
    for name in recipe.experts:
        try:
            problems += _activation_problems(name, skeletons[name], model, sites)
        except WEMoEError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of(f"merging into {type(model).__name__}", problems)
    paths = {module: path for path, module in model.named_modules()}
    sources: dict[str, Source] = {}
    for name in names.targets:
        entry = found[BASE].entries[names.first[name]]
        if name in names.parameters:
            sources[name] = Merged(entry, tuple(found[e].entries[names.first[name]] for e in recipe.experts))
        else:
            sources[name] = Copied(entry)
    layers = {}
    for site in sites:
        layers[site.path] = _layer(site, recipe)
        for role, linear in site.parts.linears().items():
            for kind, stacked in (("weight", "stack"), ("bias", "bias")):
                whole = sources.pop(f"{paths[linear]}.{kind}", None)
                if isinstance(whole, Merged):
                    transposed = kind == "weight" and is_transposed(linear)
                    sources[f"{site.path}.{role}.{stacked}"] = Stacked(whole.base, whole.experts, transposed)
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
    return MergePlan(recipe, model, tensors, aliases, twins, {c.directory: c.ignored for c in found.values()})


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
            router=router, activation=site.parts.activation, batch_first=site.batch_first, **linears
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
