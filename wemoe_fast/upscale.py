"""Model surgery: turn a model and its fine-tuned versions into one WEMoE model, or speed up one there is."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import nn

from .errors import InputError
from .families import MLPSite, find_mlps, parts_of
from .generation import connect_generation
from .interop import is_wemoe
from .linears import is_linear, sizes
from .masks import connect
from .mlp import FastWEMoEMLP
from .prompts import check_routing
from .structure import MLPParts
from .task_vectors import check_experts


@dataclass(frozen=True)
class MergeInfo:
    """What a merged model knows about its making; its attribute ``wemoe_info``.

    ``experts``: names in the order of the routing weights. ``emptied``: paths of the modules replaced by
    ``nn.Identity``. ``settings``: how it was merged and adapted, for people to read.
    """

    experts: tuple[str, ...]
    emptied: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def upscale(
    base: nn.Module,
    experts: Mapping[str, nn.Module],
    *,
    merge_lambda: float = 0.3,
    router_depth: int = 2,
    init_lambda: float | None = None,
    normalization: str = "identity",
    temperature: float = 1.0,
    top_k: int | None = None,
    batch_reduce: bool = False,
    batch_invariant: bool = False,
    decode_routing: str = "prompt",
    seed: int | None = None,
) -> nn.Module:
    """One WEMoE model of a pretrained model and T models fine-tuned from it (paper, section 3).

    Every MLP becomes a ``FastWEMoEMLP``; everything else is merged by task arithmetic,
    ``theta_0 + merge_lambda * sum_t (theta_t - theta_0)``.

    Args:
        base: the pretrained model; its MLPs are found by structure (``wemoe_fast.families``).
        experts: name -> fine-tuned model of the same architecture, in any floating dtype: the base's is the
            result's, and differences are formed in float32 or wider. Nothing given is changed or referenced.
        merge_lambda: task arithmetic's coefficient outside the MLPs.
        router_depth, init_lambda, normalization, temperature, top_k, batch_reduce: see ``Router``;
            ``init_lambda`` is ``merge_lambda`` unless given.
        batch_invariant, decode_routing: see ``FastWEMoEMLP``.
        seed: makes the routers' initialisation repeatable; the global generator is used without.

    Returns:
        A copy of ``base`` in evaluation mode; only its routers require gradients. Attention masks given to it
        reach the routers as token masks. Hugging Face's ``chunk_size_feed_forward`` is 0 in it: a router needs
        all tokens of a sample at once.

    Raises:
        UnknownArchitectureError: no MLP found; lists what looks like one.
        InputError: experts that do not fit the base, everything at once; models merged already.
    """
    check_routing(decode_routing)
    _refuse_merged({"base": base, **{f"expert {name!r}": expert for name, expert in experts.items()}})
    check_models(base, experts)
    sites = find_mlps(base)
    parts = {name: expert_parts(name, expert, base, sites) for name, expert in experts.items()}
    model = task_arithmetic(base, experts, merge_lambda)
    with seeded(seed):
        layers = {
            site.path: FastWEMoEMLP.from_parts(
                site.parts,
                {name: found[site.path] for name, found in parts.items()},
                router_depth=router_depth,
                init_lambda=merge_lambda if init_lambda is None else init_lambda,
                normalization=normalization,
                temperature=temperature,
                top_k=top_k,
                batch_reduce=batch_reduce,
                batch_invariant=batch_invariant,
                decode_routing=decode_routing,
                batch_first=site.batch_first,
                subject=f"MLP {site.path!r}",
            )
            for site in sites
        }
    settings = {"merge_lambda": merge_lambda, "init_lambda": merge_lambda if init_lambda is None else init_lambda}
    emptied = tuple(path for site in sites for path in site.emptied)
    return install(model, layers, MergeInfo(tuple(experts), emptied, settings))


def install(model: nn.Module, layers: Mapping[str, FastWEMoEMLP], info: MergeInfo) -> nn.Module:
    """Put WEMoE layers into a model in place: replace ``layers``' paths, empty others, equip what is around.

    Returns the model (the layer itself where its path is "").
    """
    for path in info.emptied:
        set_module(model, path, nn.Identity())
    for path, layer in layers.items():
        if path == "":
            model = layer
        else:
            _keep_names(layer, model.get_submodule(path))
            set_module(model, path, layer)
    return equip(model, layers, info)


def equip(model: nn.Module, layers: Mapping[str, FastWEMoEMLP], info: MergeInfo) -> nn.Module:
    """Fit a model around the WEMoE layers in it, in place: evaluation mode, only the routers require gradients, whole
    samples, masks and generation reach the layers. Returns the model."""
    _whole_samples(model)
    model.eval().requires_grad_(False)
    for layer in layers.values():
        layer.router.requires_grad_(True)
    connect(model, layers)
    connect_generation(model)
    object.__setattr__(model, "wemoe_info", info)
    return model


def _keep_names(layer: FastWEMoEMLP, original: nn.Module) -> None:
    """Let the model around go on reading dtypes and shapes of its linears under their names, as open_clip does."""
    merged = [linear for linear in (layer.up, layer.down, layer.gate) if linear is not None]
    for name, child in original.named_children():
        alike = [m for m in merged if is_linear(child) and m.stack.shape[1:] == sizes(child)[::-1]]
        if alike and not hasattr(layer, name):
            object.__setattr__(layer, name, alike[0])


def _whole_samples(model: nn.Module) -> None:
    """Let every MLP see all tokens of a sample at once, in place: Hugging Face's can be fed some at a time."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            if getattr(owner, "chunk_size_feed_forward", 0):
                setattr(owner, "chunk_size_feed_forward", 0)  # noqa: B010


def task_arithmetic(base: nn.Module, experts: Mapping[str, nn.Module], scaling: float = 0.3) -> nn.Module:
    """theta_0 + scaling * sum_t (theta_t - theta_0) (Ilharco et al., ICLR 2023); a new model in evaluation mode.

    Sums are formed in float32 or wider. Integer tensors and buffers are the base's.
    """
    check_models(base, experts)
    merged = copy.deepcopy(base).eval()
    others = [dict(expert.named_parameters()) for expert in experts.values()]
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            wide = torch.promote_types(parameter.dtype, torch.float32)
            pretrained = parameter.to(wide)
            total = torch.zeros_like(pretrained)
            for tensors in others:
                total += tensors[name].to(wide) - pretrained
            parameter.copy_(pretrained + scaling * total)
    return merged


def weight_average(base: nn.Module, experts: Mapping[str, nn.Module]) -> nn.Module:
    """The mean of the experts' weights."""
    return task_arithmetic(base, experts, 1 / max(1, len(experts)))


def check_models(base: nn.Module, experts: Mapping[str, nn.Module]) -> None:
    """Raise ``InputError`` with every parameter in which an expert does not fit the base."""
    check_experts(
        dict(base.named_parameters()),
        {name: dict(expert.named_parameters()) for name, expert in experts.items()},
        f"merging into {type(base).__name__}",
    )


def wemoe_layers(model: nn.Module) -> dict[str, FastWEMoEMLP]:
    """The WEMoE layers of a model by dotted path, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FastWEMoEMLP)}


def merge_info(model: nn.Module) -> MergeInfo:
    """What the model knows about its making; experts are numbered where nobody named them."""
    info = getattr(model, "wemoe_info", None)
    if isinstance(info, MergeInfo):
        return info
    layer = next(iter(wemoe_layers(model).values()), None)
    return MergeInfo(tuple(str(t) for t in range(0 if layer is None else layer.num_experts)))


def expert_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the experts merged into a model, in the order of its routing weights."""
    return merge_info(model).experts


class Acceleration:
    """What :func:`accelerate_` did to one model; a context manager that undoes it at the end."""

    def __init__(self, model: nn.Module, originals: dict[str, nn.Module], handles: list[Any]) -> None:
        self.model, self.originals, self._handles = model, originals, handles

    @property
    def replaced(self) -> tuple[str, ...]:
        """Dotted paths of the modules replaced."""
        return tuple(self.originals)

    def undo(self) -> nn.Module:
        """Put the original modules back, the very same objects; a second call does nothing.

        What was trained meanwhile stays: routers share their parameters with the originals.
        """
        for handle in self._handles:
            handle.remove()
        for path, module in self.originals.items():
            set_module(self.model, path, module)
        self.originals, self._handles = {}, []
        return self.model

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def accelerate_(model: nn.Module, *, token_masks: bool = False) -> Acceleration:
    """Replace every WEMoE module of FusionBench or of the authors in a model, in place, on this instance only.

    Outputs and router gradients stay what they were, to rounding; routers keep their parameters, so an
    optimiser made before goes on working.

    Args:
        model: holds at least one such module below it (for a single module see ``FastWEMoEMLP.from_wemoe``).
        token_masks: let attention masks reach the routers. Off by default, because it changes the result for
            the better: the modules replaced average padding tokens into the routing.

    Returns:
        A handle: ``handle.undo()`` puts everything back; or use it as a context manager.

    Raises:
        InputError: no such module in the model.
    """
    places: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        inside_another = any(path.startswith(found + ".") for found in places)
        if path and not inside_another and is_wemoe(module):
            places[path] = module
    if not places:
        raise InputError(
            f"accelerate_: expected WEMoE modules below {type(model).__name__}, found none; for a single module "
            "use FastWEMoEMLP.from_wemoe, to merge models use upscale"
        )
    replacements: dict[int, FastWEMoEMLP] = {}
    for module in places.values():
        if id(module) not in replacements:
            replacements[id(module)] = FastWEMoEMLP.from_wemoe(module)
    for path, module in places.items():
        set_module(model, path, replacements[id(module)])
    return Acceleration(model, places, connect(model, places) if token_masks else [])


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the submodule at a dotted path, in containers too."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    if name not in owner._modules:
        raise InputError(f"{type(model).__name__} has no submodule {path!r}")
    owner._modules[name] = module


def _refuse_merged(models: Mapping[str, nn.Module]) -> None:
    problems = []
    for owner, model in models.items():
        merged = [path for path, module in model.named_modules() if isinstance(module, FastWEMoEMLP)]
        others = [path for path, module in model.named_modules() if is_wemoe(module)]
        for paths, what in ((merged, "FastWEMoEMLP"), (others, "WEMoE module, see accelerate_")):
            if paths:
                where = (paths[0] or "the model itself") + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
                problems.append(f"{owner}: expected a model that is not merged yet, found {where} ({what})")
    if problems:
        raise InputError.of("upscale", problems)


def expert_parts(name: str, expert: nn.Module, base: nn.Module, sites: Sequence[MLPSite]) -> dict[str, MLPParts]:
    """The expert's MLPs at the base's sites, by the sites' paths; taken apart anew only where they look different."""
    paths = {module: path for path, module in base.named_modules()}
    found, problems = {}, []
    for site in sites:
        where = {role: paths[linear] for role, linear in site.parts.linears().items()}
        try:
            if _alike(base.get_submodule(site.host), expert.get_submodule(site.host)):
                linears: dict[str, Any] = {role: expert.get_submodule(path) for role, path in where.items()}
                found[site.path] = MLPParts(activation=site.parts.activation, **linears)
                continue
            parts = parts_of(expert.get_submodule(site.host), site.family)
            if parts is None or parts.linears() != {role: expert.get_submodule(path) for role, path in where.items()}:
                raise InputError(f"expected the linears in the roles {where}, found them in others")
            found[site.path] = parts
        except (AttributeError, InputError) as error:
            problems.append(f"expert {name!r}: MLP {site.path!r}: {error}")
    if problems:
        raise InputError.of("upscale", problems)
    return found


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """True for modules of the same classes and settings all the way down; weights aside, the same function."""
    ours, theirs = ([(path, _settings(m)) for path, m in module.named_modules()] for module in (one, other))
    return ours == theirs


def _settings(module: nn.Module) -> tuple[type, str, dict[str, Any]]:
    plain = (bool, int, float, str, type(None))
    attributes = {
        name: value
        for name, value in vars(module).items()
        if name != "training" and (callable(value) or isinstance(value, plain))
    }
    return type(module), module.extra_repr(), attributes


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """The global generator as if seeded, and afterwards as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
