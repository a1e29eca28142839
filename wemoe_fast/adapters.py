"""LoRA adapters of the peft library: what their configuration says, their tensors, and the experts they stand for.

An adapter is a directory with ``adapter_config.json`` and ``adapter_model.safetensors``. The expert is the base with
``scaling * B A`` added to the weights it adapts, in float32 or wider, and the tensors it stores whole put in place.
What could not be told from that (other methods, DoRA, weights initialised from the base's) is refused by name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError
from .families import locate_mlps
from .headers import (
    INDEX_FILE,
    WEIGHTS_FILE,
    TensorEntry,
    conversion_command,
    problems_of,
    read_header,
    read_json,
    read_tensor,
)
from .linears import is_transposed
from .operands import LowRank
from .shared import stacks
from .stored_names import StoredNames
from .structure import DTYPES

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_PICKLE = "adapter_model.bin"
WAY_OUT = "merge it into its base with peft (merge_and_unload), save that, and name the result as the expert"

_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "base_model_name_or_path"}
_OF_NO_MATTER = {
    # What was trained, by names; the tensors in the file say it themselves.
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "lora_bias", "fan_in_fan_out", "ensure_weight_tying",
    # Training, and where things come from.
    "lora_dropout", "inference_mode", "task_type", "auto_mapping", "revision", "peft_version", "runtime_config",
    "velora_config", "init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    # Parts of what is refused where it is used.
    "megatron_core", "qalora_group_size",
}  # fmt: skip
_INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
"""Those that leave the base's weights what they are."""
_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_[AB])")


@dataclass(frozen=True)
class Adapter:
    """An adapter as it is stored.

    Attributes:
        directory: where it is.
        base: the base it was trained on, as its configuration calls it.
        parts: module -> the parts of its update ("lora_A.weight", ...).
        whole: names of tensors that it stores whole.
        rank, alpha: of modules that no pattern matches.
        rank_pattern, alpha_pattern: regular expression for the end of a module's path -> what it has instead.
        rslora: scaled by alpha / sqrt(r) instead of alpha / r.
    """

    directory: Path
    base: str | None
    parts: dict[str, dict[str, TensorEntry]]
    whole: dict[str, TensorEntry]
    rank: int
    alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    rslora: bool

    def rank_of(self, module: str) -> int:
        """The rank that the configuration gives to a module."""
        return self.rank_pattern.get(_pattern(self.rank_pattern, module), self.rank)

    def scaling_of(self, module: str) -> float:
        """What the module's ``B A`` is multiplied by."""
        alpha, rank = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass
class Fitted:
    """An adapter against a base: updates and whole tensors by the base's names, what has no place there, problems."""

    updates: dict[str, LowRank] = field(default_factory=dict)
    whole: dict[str, TensorEntry] = field(default_factory=dict)
    twins: list[tuple[TensorEntry, TensorEntry]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_adapter(directory: str | Path) -> bool:
    """True for the directory of an adapter."""
    return (Path(directory) / ADAPTER_CONFIG).is_file()


def adapter_files(directory: Path) -> list[Path]:
    """The files that an adapter consists of."""
    return [directory / ADAPTER_CONFIG, directory / ADAPTER_WEIGHTS]


def read_adapter(directory: Path) -> Adapter:
    """An adapter's configuration and the headers of its tensors.

    Raises:
        CheckpointError: files missing, damaged or pickled; everything in the configuration or among the tensors that
            is not understood, at once.
    """
    weights = _weights(directory)
    config = read_json(directory / ADAPTER_CONFIG)
    problems = [f"{directory / ADAPTER_CONFIG}: {problem}" for problem in _config_problems(config)]
    parts: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, TensorEntry] = {}
    for stored, entry in read_header(weights).items():
        name = stored.removeprefix("base_model.model.")
        found = _PART.fullmatch(name)
        if found:
            parts.setdefault(found["module"], {})[found["part"]] = entry
        elif "lora_" in name or "token_adapter" in name:
            problems.append(f"{weights}: {stored}: expected lora_A and lora_B or whole tensors; {WAY_OUT}")
        else:
            whole[name.replace(".base_layer.", ".")] = entry
    for module, found_parts in parts.items():
        pairs = ({"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"})
        if found_parts.keys() - {"lora_B.bias"} not in pairs:
            problems.append(f"{weights}: {module}: expected A and B, found {', '.join(sorted(found_parts))} alone")
    if not problems and not parts and not whole:
        problems.append(f"{weights}: expected the tensors of an adapter, found none")
    if problems:
        raise problems_of(str(directory), problems)
    return Adapter(
        directory,
        config.get("base_model_name_or_path"),
        parts,
        whole,
        config["r"],
        config["lora_alpha"],
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
        bool(config.get("use_rslora")),
    )


def fit(adapter: Adapter, names: StoredNames, *, share: bool) -> Fitted:
    """Find the places of an adapter's tensors in a base.

    With ``share``, what is outside of the base's layers and does not fit there is left.
    """
    fitted, file = Fitted(), adapter.directory / ADAPTER_WEIGHTS
    inside = stacks(names.model, locate_mlps(names.model))
    tied = {name for pair in names.first.items() if len(set(pair)) > 1 for name in pair}
    for module, parts in adapter.parts.items():
        update, problems = _updates(module, parts, adapter, names, tied)
        problems += [f"{module}: {name} is adapted twice; in {file}" for name in update.keys() & fitted.updates.keys()]
        if problems and share and not any(stack in f"{names.prefix}.{module}." for stack in inside):
            fitted.left.append(module)
        elif problems:
            fitted.problems += problems
        else:
            fitted.updates |= update
    hint = "" if share else "; share: true in the recipe leaves it to the expert"
    given: dict[str, set[str]] = {}
    for name, entry in adapter.whole.items():
        target = names.of(name)
        shape = tuple(names.targets[target].shape) if target is not None and target in names.parameters else None
        if entry.shape != shape and share and not any(stack in f"{names.prefix}.{name}" for stack in inside):
            fitted.left.append(name)
        elif target is None or shape is None:
            fitted.problems.append(
                f"{name} is no part of {type(names.model).__name__}, the class of the base: shape {entry.shape}, "
                f"in {file}{hint}"
            )
        elif entry.shape != shape or entry.dtype not in DTYPES:
            fitted.problems.append(
                f"{name}: expected floating numbers of shape {shape} as in the base, found {entry.shape}, "
                f"{str(entry.dtype).removeprefix('torch.')}, in {file}{hint}"
            )
        else:
            first = names.first[target]
            if first in fitted.whole:
                fitted.twins.append((fitted.whole[first], entry))
            given.setdefault(first, set()).add(target)
            fitted.whole.setdefault(first, entry)
    for first, found in given.items():
        missing = {name for name, other in names.first.items() if other == first} - found
        if missing:
            fitted.problems.append(
                f"{', '.join(sorted(found))}: the base ties it to {', '.join(sorted(missing))}, and the adapter in "
                f"{file} has its own; a merged model could have only one of them"
            )
    return fitted


def with_adapter(base: nn.Module, directory: str | Path, *, share: bool = False) -> nn.Module:
    """The expert that an adapter makes of a base: a copy, in float32 or wider, in evaluation mode.

    Args:
        base: a model of transformers; it is not changed.
        directory: of the adapter.
        share: leave out what the adapter stores of a head or a vocabulary that the base does not have.

    Raises:
        CheckpointError: an adapter that is not understood or does not fit, everything at once.
    """
    adapter = read_adapter(Path(directory))
    dtype = torch.float32
    for parameter in base.parameters():
        dtype = torch.promote_types(dtype, parameter.dtype)
    model = copy.deepcopy(base).to(dtype).eval()
    names = StoredNames(model)
    fitted = fit(adapter, names, share=share)
    if fitted.problems:
        raise CheckpointError.of(f"{directory}, applied to {type(base).__name__}", fitted.problems)
    with torch.no_grad():
        for name, entry in fitted.whole.items():
            names.targets[name].copy_(read_tensor(entry))
        for name, update in fitted.updates.items():
            tensor = names.targets[name]
            tensor += update.rows(0, len(tensor), dtype).view(tensor.shape)
    return model


def _weights(directory: Path) -> Path:
    whole = [name for name in (WEIGHTS_FILE, INDEX_FILE) if (directory / name).is_file()]
    if whole:
        raise CheckpointError(
            f"{directory}: expected an adapter or a whole checkpoint, found both, {ADAPTER_CONFIG} and {whole[0]}; "
            "move one of them elsewhere"
        )
    path = directory / ADAPTER_WEIGHTS
    if path.is_file():
        return path
    if (directory / ADAPTER_PICKLE).is_file():
        raise CheckpointError(
            f"{directory}: expected {ADAPTER_WEIGHTS}, found {ADAPTER_PICKLE}, a pickle, which can run code when "
            f"opened. Convert it, without running any: {conversion_command(directory)}"
        )
    raise CheckpointError(f"{directory}: expected {ADAPTER_WEIGHTS} beside {ADAPTER_CONFIG}, found none")


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type: expected LORA, found {kind!r:.40}; {WAY_OUT}"]
    beyond = {key: value for key, value in config.items() if value and key not in _READ | _OF_NO_MATTER}
    start = config.get("init_lora_weights")
    if start not in _INITIALISATIONS:
        beyond["init_lora_weights"] = start
    found = ", ".join(f"{key} = {value!r:.60}" for key, value in beyond.items())
    problems = [f"{found}: the expert is more than its base and these tensors; {WAY_OUT}"] if beyond else []
    kinds: dict[str, tuple[str, bool]] = {
        "r": ("an integer of at least 1", _is_rank(config.get("r"))),
        "lora_alpha": ("a number", _is_alpha(config.get("lora_alpha"))),
        "rank_pattern": ("integers of at least 1 by module", _is_pattern(config.get("rank_pattern"), _is_rank)),
        "alpha_pattern": ("numbers by module", _is_pattern(config.get("alpha_pattern"), _is_alpha)),
        "base_model_name_or_path": (
            "a name or null",
            isinstance(config.get("base_model_name_or_path"), (str, type(None))),
        ),
    }
    return problems + [
        f"{key}: expected {what}, found {config.get(key)!r:.60}" for key, (what, right) in kinds.items() if not right
    ]


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 31


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _is_pattern(value: Any, fits: Any) -> bool:
    if value is None:
        return True
    try:
        return isinstance(value, dict) and all(re.compile(key) and fits(found) for key, found in value.items())
    except (re.error, RecursionError, OverflowError):
        return False


def _pattern(patterns: Iterable[str], module: str) -> str:
    """The first pattern that the end of a module's path matches, as peft chooses it."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), module)


def _updates(
    module: str, parts: Mapping[str, TensorEntry], adapter: Adapter, names: StoredNames, tied: set[str]
) -> tuple[dict[str, LowRank], list[str]]:
    """What an adapter adds to a module's weight and bias, by their names in the base, and what does not fit."""
    file = adapter.directory / ADAPTER_WEIGHTS
    target = names.of(f"{module}.weight")
    if target not in names.parameters or target is None:
        cls = type(names.model).__name__
        return {}, [f"{module} is no linear layer or embedding of {cls}, the class of the base; adapted in {file}"]
    if target in tied:
        others = sorted(name for name, first in names.first.items() if first == names.first[target] and name != target)
        return {}, [
            f"{module}: the base ties its weight to {', '.join(others)}, which would change with it, unlike in "
            f"training; adapted in {file}"
        ]
    layer = names.model.get_submodule(target.rpartition(".")[0])
    embedding = isinstance(layer, nn.Embedding)
    kind = "lora_embedding_A" if embedding else "lora_A.weight"
    if kind not in parts:
        found = ", ".join(sorted(parts))
        return {}, [f"{module}: expected {kind} for a {type(layer).__name__}, found {found} in {file}"]
    a, b, shift = parts[kind], parts[kind.replace("A", "B")], parts.get("lora_B.bias")
    transposed, rank = embedding or is_transposed(layer), adapter.rank_of(module)
    shape = tuple(names.targets[target].shape)
    out, inputs = (shape[1], shape[:1]) if transposed else (shape[0], shape[1:])
    expected = {a: (rank, *inputs), b: (out, rank, *(1,) * (len(inputs) - 1))} | ({shift: (out,)} if shift else {})
    problems = [
        f"{part.name}: expected floating numbers of shape {wanted} for rank {rank}, found {part.shape}, "
        f"{str(part.dtype).removeprefix('torch.')}, in {file}"
        for part, wanted in expected.items()
        if part.shape != wanted or part.dtype not in DTYPES
    ]
    bias = names.of(f"{module}.bias")
    if shift is not None and bias not in names.parameters:
        problems.append(f"{shift.name}: expected a bias in the base to add it to, found none; in {file}")
    scaling = adapter.scaling_of(module)
    updates = {target: LowRank(_matrix(a, rank), _matrix(b, out), scaling, transposed)}
    if shift is not None and bias is not None:
        updates[bias] = LowRank(None, replace(shift, shape=(shift.numel, 1)), scaling)
    return updates, problems


def _matrix(entry: TensorEntry, rows: int) -> TensorEntry:
    """The same numbers as a matrix of so many rows."""
    return replace(entry, shape=(rows, entry.numel // rows))
