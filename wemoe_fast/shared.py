"""Models that share their layers and differ around them, in heads or vocabularies: the shared part merged.

shared = share(base, experts)                       # what fits, and what is left to each task
model = upscale(base, shared.experts)
classifier = shared.model_of("sentiment", model)    # that expert's own head on the merged layers
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .families import MLPSite, find_mlps
from .upscale import MergeInfo, equip, merge_info, wemoe_layers


@dataclass(frozen=True)
class Shared:
    """What of several models can be merged into the base.

    Attributes:
        experts: name -> a model like the base, with the expert's parameters where they fit and the base's
            elsewhere; it shares their memory. For ``upscale`` and ``task_arithmetic``.
        originals: name -> the expert as given.
        prefixes: name -> (base's, expert's): dotted paths that the shared names begin with.
        left: name -> the expert's parameters that are not merged, by their names in the expert.
        kept: the base's parameters that are not merged, because not all experts have them.
    """

    experts: dict[str, nn.Module]
    originals: dict[str, nn.Module]
    prefixes: dict[str, tuple[str, str]]
    left: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]

    def report(self) -> str:
        """What is left to each task and what is the base's alone, a line each; "everything is merged" if nothing."""
        lines = [f"expert {name!r} keeps its own {', '.join(names)}" for name, names in self.left.items() if names]
        lines += [f"the base keeps its own {', '.join(self.kept)}"] if self.kept else []
        return "\n".join(lines) or "everything is merged"

    def model_of(self, name: str, merged: nn.Module) -> nn.Module:
        """The expert's own class, head and vocabulary on the merged model's layers, which it shares, not copies.

        Raises:
            InputError: no such expert.
        """
        if name not in self.originals:
            raise InputError(f"model_of: expected one of {', '.join(self.originals)}, found {name!r}")
        expert, parameters = self.originals[name], dict(merged.named_parameters())
        memo: dict[int, Any] = {}
        for path, parameter in expert.named_parameters():
            ours = parameters.get(self._in_base(name, path))
            if ours is not None and path not in self.left[name]:
                memo[id(parameter)] = ours
        layers = {self._in_expert(name, path): layer for path, layer in wemoe_layers(merged).items()}
        info = merge_info(merged)
        emptied = tuple(self._in_expert(name, path) for path in info.emptied)
        memo |= {id(expert.get_submodule(path)): nn.Identity() for path in emptied}
        memo |= {id(expert.get_submodule(path)): layer for path, layer in layers.items()}
        return equip(copy.deepcopy(expert, memo), layers, MergeInfo(info.experts, emptied, info.settings))

    def _in_base(self, name: str, path: str) -> str:
        ours, theirs = self.prefixes[name]
        return ours + path.removeprefix(theirs)

    def _in_expert(self, name: str, path: str) -> str:
        ours, theirs = self.prefixes[name]
        return theirs + path.removeprefix(ours)


def share(base: nn.Module, experts: Mapping[str, nn.Module]) -> Shared:
    """Hold experts that may have other heads or another vocabulary against the base.

    Layers are compared with layers, wherever in its model each stack of layers is (``bert.encoder`` of a classifier,
    ``encoder`` of the base). Inside of the stacks everything must fit; outside, parameters that not all models
    have, in the same shape, are left to the base and to each expert. Nothing given is changed.

    Raises:
        UnknownArchitectureError: a model without MLPs of a known family.
        InputError: no expert, or experts whose layers do not fit the base's, everything at once.
    """
    fits = fit(base, experts)
    tensors = {name: dict(expert.named_parameters()) for name, expert in experts.items()}
    return Shared(
        experts={
            name: _like(base, {ours: tensors[name][theirs] for ours, theirs in fits.places[name].items()})
            for name in experts
        },
        originals=dict(experts),
        prefixes=fits.prefixes,
        left=fits.left,
        kept=fits.kept,
    )


@dataclass(frozen=True)
class Fit:
    """What :func:`share` finds, by names; ``places``: name -> the base's name of every shared parameter -> its own."""

    places: dict[str, dict[str, str]]
    prefixes: dict[str, tuple[str, str]]
    left: dict[str, tuple[str, ...]]
    kept: tuple[str, ...]


def fit(
    base: nn.Module, experts: Mapping[str, nn.Module], find: Callable[[nn.Module], list[MLPSite]] = find_mlps
) -> Fit:
    """:func:`share` without its models; with ``families.locate_mlps`` for models on the meta device."""
    if not experts:
        raise InputError("share: expected at least one expert, found none")
    sites = find(base)
    ours = dict(base.named_parameters())
    layers = stacks(base, sites)
    prefixes: dict[str, tuple[str, str]] = {}
    fitting: dict[str, dict[str, str]] = {}
    problems = []
    for name, expert in experts.items():
        try:
            prefixes[name] = _prefixes(base, sites, expert, find(expert))
        except InputError as error:
            problems.append(f"expert {name!r}: {error}")
            continue
        before, after = prefixes[name]
        theirs = {
            before + path.removeprefix(after): (path, parameter)
            for path, parameter in expert.named_parameters()
            if path.startswith(after)
        }
        fitting[name] = {p: theirs[p][0] for p in ours if p in theirs and theirs[p][1].shape == ours[p].shape}
        inside = [p for p in {**ours, **theirs} if p.startswith(layers)]
        problems += [
            f"expert {name!r}: {p}: expected {_what(ours.get(p))} as in the base's layers, "
            f"found {_what(theirs[p][1] if p in theirs else None)}"
            for p in inside
            if p not in fitting[name]
        ]
    if problems:
        raise InputError.of(f"sharing the layers of {type(base).__name__}", problems)
    shared = [p for p in ours if all(p in places for places in fitting.values())]
    places = {name: {p: fitting[name][p] for p in shared} for name in experts}
    left = {}
    for name, expert in experts.items():
        merged = set(places[name].values())
        left[name] = tuple(path for path, _ in expert.named_parameters() if path not in merged)
    return Fit(places, prefixes, left, tuple(p for p in ours if p not in set(shared)))


def stacks(model: nn.Module, sites: list[MLPSite]) -> tuple[str, ...]:
    """What the names of the parameters in the stacks of layers around a model's MLPs begin with."""
    return tuple(dict.fromkeys(_stack(model, site) for site in sites))


def _stack(model: nn.Module, site: MLPSite) -> str:
    """The path, with a dot at its end, of the innermost container around an MLP, or of the module around it."""
    parts = site.host.split(".")[:-1] if site.host else []
    for end in range(len(parts), 0, -1):
        path = ".".join(parts[:end])
        if isinstance(model.get_submodule(path), (nn.ModuleList, nn.Sequential)):
            return f"{path}."
    return f"{'.'.join(parts)}." if parts else ""


def _prefixes(base: nn.Module, sites: list[MLPSite], expert: nn.Module, theirs: list[MLPSite]) -> tuple[str, str]:
    """What the paths of the base's and of the expert's layers begin with before they are the same."""
    if len(theirs) != len(sites):
        raise InputError(f"expected {len(sites)} MLPs as in the base, found {len(theirs)}")
    one, other = sites[0].host.split("."), theirs[0].host.split(".")
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    before, after = (f"{'.'.join(parts)}." if any(parts) else "" for parts in (one, other))
    problems = []
    for site, found in zip(sites, theirs, strict=True):
        roles = [_roles(base, site, before), _roles(expert, found, after)]
        if roles[0] != roles[1]:
            problems.append(f"MLP {site.host!r}: expected the linears {roles[0]} as in the base, found {roles[1]}")
        elif site.parts.activation != found.parts.activation:
            problems.append(
                f"MLP {site.host!r}: expected activation {site.parts.activation!r} as in the base, "
                f"found {found.parts.activation!r}"
            )
    if problems:
        raise InputError("; ".join(problems))
    return before, after


def _roles(model: nn.Module, site: MLPSite, prefix: str) -> dict[str, str]:
    paths = {module: path for path, module in model.named_modules()}
    return {role: paths[linear].removeprefix(prefix) for role, linear in site.parts.linears().items()}


def _like(base: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """A model of the base's modules with some parameters of another; no parameter is copied."""
    memo: dict[int, Any] = {id(p): parameters.get(path, p) for path, p in base.named_parameters()}
    return copy.deepcopy(base, memo)


def _what(parameter: Tensor | None) -> str:
    return "none" if parameter is None else f"shape {tuple(parameter.shape)}"
