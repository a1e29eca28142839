"""Families of architectures as data, and the search for a model's MLPs.

A family says where, relative to a host module, the linears of one MLP are; `find_mlps` believes it only after
the module has been run and gives what the formula says. To add a family, add an entry to FAMILIES
(CONTRIBUTING.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from wemoe_fast.errors import InputError, UnknownArchitectureError
from wemoe_fast.linears import is_linear
from wemoe_fast.structure import MLPParts, check_chain, mlp_like, recognise, recognise_split, value_problems


@dataclass(frozen=True)
class Family:
    """Where an MLP is in its host module; all paths are attribute paths relative to the host.

    up, down, gate: the linears; all empty: any module `parse_mlp` accepts.
    site: the module that FastWEMoEMLP replaces, "" for the host itself.
    activation: the activation's module, where the host calls it between the site, which is `up`, and `down`.
    emptied: the modules that nn.Identity replaces. With any, the site computes act(up(x)), or up(x) alone, and
        the host then applies what is emptied.
    examples: classes with such an MLP.
    """

    name: str
    up: str = ""
    down: str = ""
    gate: str | None = None
    site: str = ""
    activation: str = ""
    emptied: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family(
        "BERT, MiniLM, RoBERTa, ViT of transformers 4",
        up="intermediate.dense",
        down="output.dense",
        site="intermediate",
        emptied=("output.dense",),
        examples=("transformers.BertModel", "transformers.RobertaForSequenceClassification"),
    ),
    Family(
        "CLIP, SigLIP, DINOv2, ViT of transformers 5 and of timm",
        up="fc1",
        down="fc2",
        examples=("transformers.CLIPModel", "transformers.Dinov2Model", "timm.models.VisionTransformer"),
    ),
    Family(
        "LLaMA, Mistral, Qwen, Gemma",
        up="up_proj",
        down="down_proj",
        gate="gate_proj",
        examples=(
            "transformers.LlamaForCausalLM",
            "transformers.MistralModel",
            "transformers.Qwen2Model",
            "transformers.Qwen3Model",
            "transformers.GemmaModel",
        ),
    ),
    Family("DistilBERT", up="lin1", down="lin2", examples=("transformers.DistilBertModel",)),
    Family("GPT-2, open_clip", up="c_fc", down="c_proj", examples=("transformers.GPT2LMHeadModel", "open_clip.CLIP")),
    Family("T5", up="wi", down="wo", examples=("transformers.T5Model",)),
    Family(
        "T5 1.1, Flan-T5, mT5",
        up="wi_1",
        down="wo",
        gate="wi_0",
        examples=("transformers.T5ForConditionalGeneration",),
    ),
    Family(
        "Whisper, BART",
        up="fc1",
        down="fc2",
        site="fc1",
        activation="activation_fn",
        emptied=("activation_fn", "fc2"),
        examples=("transformers.WhisperModel", "transformers.BartModel"),
    ),
    Family("any other, ViT of torchvision", examples=("torchvision.models.VisionTransformer", "torch.nn.Sequential")),
)


@dataclass(frozen=True)
class MLPSite:
    """One MLP of a model.

    host: its dotted path in the model, "" for the model itself.
    batch_first: hidden states are [B, N, d] there; if False [N, B, d].
    """

    host: str
    family: Family
    parts: MLPParts
    batch_first: bool = True

    @property
    def path(self) -> str:
        """Dotted path in the model of the module to replace."""
        return _join(self.host, self.family.site)

    @property
    def emptied(self) -> tuple[str, ...]:
        """Dotted paths in the model of the modules to replace by nn.Identity."""
        return tuple(_join(self.host, path) for path in self.family.emptied)


def find_mlps(model: nn.Module) -> list[MLPSite]:
    """The MLPs of a model, in module order: those that map d to d and belong to a family of FAMILIES.

    The outermost match counts, and no linear is in two MLPs. Every match is verified by running it once.

    Raises UnknownArchitectureError if there is none, listing the modules that look like one and what speaks
    against each. Raises InputError, all problems at once, for an MLP that does not fit though others of its
    class do, that is registered twice or has linears that are (replaced at one place, they would live on at the
    other), or whose weights are not finite, on the meta device, or of several dtypes or devices.
    """
    sites, problems = _search(model)
    problems += _value_problems(dict(model.named_modules()), sites)
    if problems:
        raise InputError.of(f"model ({type(model).__name__})", problems)
    return sites


def locate_mlps(model: nn.Module) -> list[MLPSite]:
    """`find_mlps` without a look at the weights' values, dtypes and devices: for models on the meta device."""
    sites, problems = _search(model)
    if problems:
        raise InputError.of(f"model ({type(model).__name__})", problems)
    return sites


def _search(model: nn.Module) -> tuple[list[MLPSite], list[str]]:
    """The sites, and what is wrong with their structure."""
    sites: list[MLPSite] = []
    inside: set[nn.Module] = set()
    skipped: dict[str, list[str]] = {}
    modules = dict(model.named_modules())
    for path, module in modules.items():
        if module in inside:
            continue
        found = _match(module)
        if isinstance(found, list):
            skipped[path] = found
            continue
        family, parts = found
        site = MLPSite(path, family, parts, _batch_first(modules, path))
        sites.append(site)
        inside.update(modules[site.path].modules())
    if not sites:
        raise _unknown(model, skipped)
    return sites, [*_odd_ones_out(modules, sites, skipped), *_registered_twice(modules, sites)]


def _match(host: nn.Module) -> tuple[Family, MLPParts] | list[str]:
    """The first family the host belongs to, or what speaks against those whose paths it has."""
    reasons: list[str] = []
    for family in FAMILIES:
        try:
            parts = parts_of(host, family)
        except InputError as error:
            if str(error) not in reasons and (family.up or not reasons):
                reasons.append(str(error))
            continue
        if parts is not None and parts.in_features == parts.out_features:
            return family, parts
    return reasons


def parts_of(host: nn.Module, family: Family) -> MLPParts | None:
    """The parts of the family's MLP in this host; None without such paths, InputError if it does not fit."""
    if not family.up:
        return recognise(host)
    named = _named(host, family)
    site, activation = _get(host, family.site), _get(host, family.activation)
    if named is None or (family.activation and activation is None):
        return None
    if not family.emptied or site is None:
        parts = recognise(host)
    elif not is_linear(named["down"]):
        raise InputError(f"{family.down}: expected nn.Linear; found {type(named['down']).__name__}")
    elif activation is None:
        parts = recognise_split(site, named["down"])
    else:
        parts = recognise_split(nn.Sequential(site, activation), named["down"])
        check_chain(host, (parts.up, activation, parts.down))
    return parts if parts.linears() == named else None


def _named(host: nn.Module, family: Family) -> dict[str, nn.Module] | None:
    """The modules at the family's paths, by role, if the host has them all."""
    paths = {"up": family.up, "down": family.down} | ({"gate": family.gate} if family.gate else {})
    named = {role: _get(host, path) for role, path in paths.items() if path}
    found = {role: module for role, module in named.items() if module is not None}
    return found if len(found) == len(paths) else None


def _get(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _batch_first(modules: dict[str, nn.Module], path: str) -> bool:
    """False where the nearest attention of PyTorch's own at or above a module takes [N, B, d]."""
    names = path.split(".") if path else []
    for end in range(len(names), -1, -1):
        children = modules[".".join(names[:end])].children()
        attention = [child for child in children if isinstance(child, nn.MultiheadAttention)]
        if attention:
            return attention[0].batch_first
    return True


def _odd_ones_out(modules: dict[str, nn.Module], sites: Iterable[MLPSite], skipped: dict[str, list[str]]) -> list[str]:
    """Modules that are no MLP although others of their class are: never leave those out silently."""
    classes = {type(modules[site.host]) for site in sites}
    return [
        f"{path}: expected an MLP like others of its class; {'; '.join(reasons)}"
        for path, reasons in skipped.items()
        if reasons and type(modules[path]) in classes and not type(modules[path]).__module__.startswith("torch.nn")
    ]


def _registered_twice(modules: dict[str, nn.Module], sites: Iterable[MLPSite]) -> list[str]:
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for path, parent in modules.items():
        for name, child in parent._modules.items():
            if child is not None:
                places[child].append(_join(path, name))
    replaced: dict[nn.Module, None] = {}
    for site in sites:
        replaced |= dict.fromkeys([modules[site.path], *site.parts.linears().values()])
    return [
        f"{places[module][0]}: expected one place in the model; it is also {', '.join(places[module][1:])}"
        for module in replaced
        if len(places[module]) > 1
    ]


def _value_problems(modules: dict[str, nn.Module], sites: Iterable[MLPSite]) -> list[str]:
    names = {module: path for path, module in modules.items()}
    problems = []
    for site in sites:
        parameters = {
            _join(names[linear], kind): parameter
            for linear in site.parts.linears().values()
            for kind, parameter in linear.named_parameters()
        }
        problems += value_problems(parameters)
    return problems


def _unknown(model: nn.Module, skipped: dict[str, list[str]]) -> UnknownArchitectureError:
    alike: dict[str, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        what = mlp_like(module)
        if what is None and any(_named(module, family) for family in FAMILIES):
            what = "has the attributes of a known family"
        if what is not None:
            why = "; ".join(skipped.get(path, [])).replace("\n", "\n  ") or "it does not map d to d"
            alike[f"({type(module).__name__}, {what}): {why}"].append(path or "the model itself")
    listed = []
    for what, paths in alike.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        listed.append(f"  - {paths[0]}{more} {what}")
    return UnknownArchitectureError(
        "\n".join(
            [
                f"model ({type(model).__name__}): expected MLPs of a known family "
                f"({'; '.join(family.name for family in FAMILIES)}); found none.",
                "Modules that look like an MLP:" if listed else "No module has two nn.Linear d -> h, h -> d.",
                *listed,
                "CONTRIBUTING.md says how to add a family.",
            ]
        )
    )


def _join(host: str, path: str) -> str:
    return f"{host}.{path}" if host and path else host or path
