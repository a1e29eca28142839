"""Checkpoints: a WEMoE model as a directory in Hugging Face's layout, and ordinary checkpoints read safely.

    config.json                     of the base model (Hugging Face models)
    model.safetensors               or shards and model.safetensors.index.json
    wemoe.json                      format version, experts, layers and their routers
    tokenizer and processor files   carried along
    README.md                       a model card

safetensors only: a pickle file can run code when it is opened, so none is read.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .atomic import replaced_directory
from .card import model_card
from .errors import CheckpointError
from .headers import TensorEntry, read_checkpoint, read_json, read_tensor
from .mlp import FastWEMoEMLP
from .router import Router
from .sharded import TensorSpec, plan_shards, write_shards
from .task_vectors import MergedLinear
from .upscale import MergeInfo, install, merge_info, wemoe_layers

FORMAT_VERSION = 1
WEMOE_FILE = "wemoe.json"
MAX_SHARD_BYTES = 5 << 30
CARRIED = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
)
"""Files next to a model that belong to its inputs; copied as they are."""


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    files_from: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a model made by ``upscale``, ``merge`` or ``accelerate_``.

    The directory appears under its name only when it is complete; a failure leaves what was there before.

    Args:
        model: holds at least one ``FastWEMoEMLP``.
        directory: new, empty, or replaced as a whole with ``overwrite``.
        files_from: a directory whose tokenizer and processor files are carried along.
        settings: noted in ``wemoe.json`` and on the model card (recipe, adaptation, ...).
        max_shard_bytes: tensors are spread over files of at most this size (one tensor may exceed it).
        overwrite: replace a directory that is not empty.

    Raises:
        CheckpointError: nothing to save, or the directory is not empty.
    """
    if not wemoe_layers(model):
        raise CheckpointError(f"save: expected a model with FastWEMoEMLP layers, found none in {type(model).__name__}")
    tensors, aliases = _distinct_tensors(model)
    with replaced_directory(Path(directory), overwrite=overwrite) as target:
        _write_weights(tensors, target, max_shard_bytes)
        write_description(model, aliases, target, files_from=files_from, settings=settings)
    return Path(directory)


def write_description(
    model: nn.Module,
    aliases: Mapping[str, str],
    target: Path,
    *,
    files_from: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Everything of a WEMoE directory but its weights; ``model`` may be on the meta device.

    ``aliases``: names of tensors that are not stored -> the name under which they are. The rest as in :func:`save`.
    """
    info = merge_info(model)
    description = {
        "format_version": FORMAT_VERSION,
        "wemoe_fast": __version__,
        **_model_class(model),
        "experts": list(info.experts),
        "emptied": list(info.emptied),
        "layers": {path: _describe(layer) for path, layer in wemoe_layers(model).items()},
        "aliases": dict(aliases),
        "settings": {**info.settings, **(settings or {})},
    }
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_file"):
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config.to_json_file(target / "config.json")
    if files_from is not None:
        carry_files(Path(files_from), target)
    _write_json(target / WEMOE_FILE, description)
    (target / "README.md").write_text(model_card(description), encoding="utf-8")


def load(directory: str | Path, base: nn.Module | None = None) -> nn.Module:
    """Read a directory written by :func:`save`; in evaluation mode, on the CPU, in the dtypes stored.

    Args:
        directory: holds ``wemoe.json``.
        base: for models that are not from Hugging Face: a module of the base's architecture; it is copied.

    Raises:
        CheckpointError: files missing, damaged or of another format version; every tensor that is missing,
            left over or of another shape, at once.
    """
    return _assemble(Path(directory), base, read_tensor, "cpu")


def outline(directory: str | Path) -> nn.Module:
    """What :func:`load` reads, on the meta device: everything but the weights, which are not read."""

    def placeholder(entry: TensorEntry) -> Tensor:
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    return _assemble(Path(directory), None, placeholder, "meta")


def _assemble(directory: Path, base: nn.Module | None, read: Callable[[TensorEntry], Tensor], device: str) -> nn.Module:
    description = read_description(directory)
    try:
        check_description(description)
        with torch.device("meta"):
            layers = {path: _build(layer) for path, layer in description["layers"].items()}
    except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{directory / WEMOE_FILE}: {error}") from error
    info = MergeInfo(tuple(description["experts"]), tuple(description["emptied"]), description["settings"])
    if set(layers) == {""}:
        skeleton: nn.Module = layers[""]
    else:
        with torch.device(device):
            skeleton = _skeleton(directory, description) if base is None else copy.deepcopy(base).cpu()
    try:
        model = install(skeleton, layers, info)
    except (AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{directory}: its layers do not fit {type(skeleton).__name__}: {error}. It was saved with "
            f"{_versions(description)}"
        ) from error
    stored = {name: read(entry) for name, entry in read_checkpoint(directory).items()}
    _fill(model, stored, description["aliases"], f"{directory}, saved with {_versions(description)}")
    return model.eval()


def is_wemoe_directory(directory: str | Path) -> bool:
    """True where :func:`load` applies, not :func:`load_pretrained`."""
    return (Path(directory) / WEMOE_FILE).is_file()


def load_pretrained(directory: str | Path, model_class: str | None = None) -> nn.Module:
    """Read an ordinary Hugging Face checkpoint (safetensors), in evaluation mode, in the dtype stored.

    Args:
        directory: a local directory with ``config.json`` and safetensors weights.
        model_class: a class of ``transformers``; by default the one ``config.json`` names.

    Raises:
        CheckpointError: files missing, damaged or pickled; weights the class needs and the files lack.
    """
    directory = Path(directory)
    if is_wemoe_directory(directory):
        raise CheckpointError(f"{directory}: expected an ordinary checkpoint, found a WEMoE model ({WEMOE_FILE})")
    read_checkpoint(directory)
    transformers = import_transformers()
    cls = transformers_class(directory, model_class or architecture(directory))
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    dtype = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    try:
        with quiet_transformers():
            model, report = cls.from_pretrained(
                str(directory), local_files_only=True, use_safetensors=True, output_loading_info=True, **{dtype: "auto"}
            )
    except Exception as error:  # a damaged config.json can fail anywhere in another package
        raise CheckpointError(f"{directory}: could not be read as {cls.__name__}: {error}") from error
    problems = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    problems += [f"{name} is not part of {cls.__name__}" for name in sorted(report["unexpected_keys"])]
    problems += [f"{mismatch} does not fit" for mismatch in report["mismatched_keys"]]
    if problems:
        raise CheckpointError.of(f"{directory}, read as {cls.__name__}", problems)
    module: nn.Module = model.eval()
    return module


def read_description(directory: Path) -> dict[str, Any]:
    """The content of ``wemoe.json``; CheckpointError where there is none or of another format version."""
    path = directory / WEMOE_FILE
    if not path.is_file():
        found = "no such directory" if not directory.is_dir() else "an ordinary directory"
        raise CheckpointError(f"{directory}: expected a WEMoE checkpoint with {WEMOE_FILE}, found {found}")
    description = read_json(path)
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format_version {FORMAT_VERSION}, found {version!r}; it was written by another "
            "version of wemoe-fast"
        )
    return description


def check_description(description: dict[str, Any]) -> None:
    """Raise ``CheckpointError`` with everything in the content of ``wemoe.json`` that cannot be right."""
    problems = _unlike(description, _DESCRIPTION, "")
    layers = {} if problems else description["layers"]
    if not problems and not layers:
        problems.append("layers: expected at least one, found none")
    for path, layer in layers.items():
        problems += _unlike({**_LAYER_DEFAULTS, **layer}, _LAYER, f"layers.{path}.")
        if not isinstance(layer.get("router"), dict):
            continue
        problems += _unlike(layer["router"], _ROUTER, f"layers.{path}.router.")
        expected, found = len(description["experts"]), layer["router"].get("num_experts")
        if found != expected:
            problems.append(f"layers.{path}.router.num_experts: expected {expected} as named, found {found!r}")
    if problems:
        raise CheckpointError.of("not the description of a WEMoE model", problems)


def _unlike(content: dict[str, Any], kinds: dict[str, str], where: str) -> list[str]:
    problems = []
    for name, kind in kinds.items():
        if name not in content:
            problems.append(f"{where}{name} is missing")
        elif not any(_KINDS[option](content[name]) for option in kind.split(" or ")):
            problems.append(f"{where}{name}: expected {kind}, found {content[name]!r:.80}")
    return problems


_KINDS: dict[str, Callable[[Any], bool]] = {
    "a count": lambda value: type(value) is int and 0 <= value < 1 << 40,
    "a number": lambda value: type(value) in (int, float),
    "text": lambda value: isinstance(value, str),
    "true/false": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    "an object": lambda value: isinstance(value, dict),
    "a list of texts": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
    "texts by name": lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    "objects by name": lambda value: isinstance(value, dict) and all(isinstance(item, dict) for item in value.values()),
}
_DESCRIPTION = {
    "model_class": "text or null",
    "experts": "a list of texts",
    "emptied": "a list of texts",
    "layers": "objects by name",
    "aliases": "texts by name",
    "settings": "an object",
}
_LAYER = {
    "in_features": "a count",
    "hidden_features": "a count",
    "out_features": "a count",
    "activation": "text",
    "gated": "true/false",
    "bias": "a list of texts",
    "batch_first": "true/false",
    "batch_invariant": "true/false",
    "decode_routing": "text",
    "router": "an object",
}
_LAYER_DEFAULTS = {"decode_routing": "prompt"}
"""What a file written before there was such a setting means."""
_ROUTER = {
    "num_experts": "a count",
    "depth": "a count",
    "normalization": "text",
    "temperature": "a number",
    "top_k": "a count or null",
    "batch_reduce": "true/false",
    "in_features": "a count",
    "hidden_features": "a count or null",
    "prefix_features": "a count or null",
}


def carry_files(source: Path, target: Path) -> None:
    """Copy the tokenizer and processor files of a model directory."""
    for pattern in CARRIED:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def import_transformers() -> Any:
    """The transformers package, or a CheckpointError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            'transformers is needed for Hugging Face checkpoints: pip install "wemoe-fast[hf]"'
        ) from error
    return transformers


def _distinct_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors, each memory once, and which names stand for which (tied weights, shared routers)."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def _model_class(model: nn.Module) -> dict[str, Any]:
    if type(model).__module__.startswith("transformers."):
        return {"model_class": type(model).__name__, "transformers": import_transformers().__version__}
    return {"model_class": None}


def _describe(layer: FastWEMoEMLP) -> dict[str, Any]:
    router = layer.router
    return {
        "in_features": layer.up.stack.shape[2],
        "hidden_features": layer.up.stack.shape[1],
        "out_features": layer.down.stack.shape[1],
        "activation": layer.activation,
        "gated": layer.gate is not None,
        "bias": [role for role in ("up", "down", "gate") if getattr(getattr(layer, role), "bias", None) is not None],
        "batch_first": layer.batch_first,
        "batch_invariant": layer.batch_invariant,
        "decode_routing": layer.decode_routing,
        "router": {
            "num_experts": router.num_experts,
            "depth": router.depth,
            **router.normalization.to_dict(),
            "batch_reduce": router.batch_reduce,
            "in_features": router.in_features,
            "hidden_features": None if router.hidden is None else router.hidden.out_features,
            "prefix_features": None if router.prefix is None else router.prefix.numel(),
        },
    }


def _build(layer: dict[str, Any]) -> FastWEMoEMLP:
    """An uninitialised layer of that description."""
    layer = {**_LAYER_DEFAULTS, **layer}
    settings = {name: layer["router"][name] for name in _ROUTER}
    prefix = settings.pop("prefix_features")
    experts, in_features = settings.pop("num_experts"), settings.pop("in_features")
    router = Router(in_features + (prefix or 0), experts, **settings)
    router.in_features = in_features
    if prefix is not None:
        router.register_buffer("prefix", torch.empty(prefix))
    d, h, out = layer["in_features"], layer["hidden_features"], layer["out_features"]
    bias = set(layer["bias"])
    return FastWEMoEMLP(
        router=router,
        up=MergedLinear.empty(experts, h, d, "up" in bias),
        down=MergedLinear.empty(experts, out, h, "down" in bias),
        gate=MergedLinear.empty(experts, h, d, "gate" in bias) if layer["gated"] else None,
        activation=layer["activation"],
        batch_first=layer["batch_first"],
        batch_invariant=layer["batch_invariant"],
        decode_routing=layer["decode_routing"],
    )


def _skeleton(directory: Path, description: dict[str, Any]) -> nn.Module:
    name = description["model_class"]
    if name is None:
        raise CheckpointError(
            f"{directory}: it was made from a model outside of Hugging Face transformers; pass a module of the base's "
            "architecture: load(directory, base=module)"
        )
    transformers = import_transformers()
    cls = transformers_class(directory, name)
    try:
        config = transformers.AutoConfig.from_pretrained(str(directory), local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = cls(config)
    except Exception as error:  # a damaged config.json can fail anywhere in another package
        raise CheckpointError(f"{directory / 'config.json'}: could not be read as {name}: {error}") from error
    return model


def _fill(model: nn.Module, stored: dict[str, Tensor], aliases: dict[str, str], subject: str) -> None:
    """Give the model the tensors, in their dtypes, all of them or none."""
    targets = model.state_dict(keep_vars=True)
    tensors = {**stored, **{name: stored[other] for name, other in aliases.items() if other in stored}}
    problems = [
        f"{name} is said to be {other}, which is missing" for name, other in aliases.items() if other not in stored
    ]
    problems += [f"{name} is stored and said to be {aliases[name]}" for name in aliases if name in stored]
    problems += [f"{name} is missing" for name in targets if name not in tensors and name not in aliases]
    problems += [f"{name} is not part of the model" for name in tensors.keys() - targets.keys()]
    for name in targets.keys() & tensors.keys():
        ours, theirs = targets[name], tensors[name]
        if ours.shape != theirs.shape:
            problems.append(f"{name}: expected shape {tuple(ours.shape)}, found {tuple(theirs.shape)}")
        elif ours.is_floating_point() != theirs.is_floating_point():
            problems.append(f"{name}: expected a dtype like {ours.dtype}, found {theirs.dtype}")
    first: dict[Tensor, str] = {}
    for name in targets.keys() & stored.keys():
        other = first.setdefault(targets[name], name)
        if other != name and not (stored[name].is_meta or torch.equal(stored[name], stored[other])):
            problems.append(f"{name}: expected what {other} is, as the model ties them, found other values")
    if problems:
        raise CheckpointError.of(subject, sorted(problems))
    for layer in wemoe_layers(model).values():
        layer.to_empty(device=next(iter(stored.values())).device)
    targets = model.state_dict(keep_vars=True)
    for name, tensor in stored.items():
        targets[name].data = tensor
    for name, other in aliases.items():
        if targets[name] is not targets[other]:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, targets[other])


def _write_weights(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    for _ in write_shards(plan_shards(specs, max_shard_bytes), directory, lambda spec: iter([(0, tensors[spec.name])])):
        pass


def architecture(directory: Path) -> str:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: expected a Hugging Face checkpoint with config.json, found none")
    architectures = read_json(path).get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        raise CheckpointError(f'{path}: expected "architectures" to name the model\'s class, found {architectures!r}')
    return architectures[0]


def transformers_class(directory: Path, name: str) -> Any:
    transformers = import_transformers()
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise CheckpointError(f"{directory}: expected a model class of transformers, found {name!r}")
    return cls


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _versions(description: dict[str, Any]) -> str:
    used = [f"wemoe-fast {description.get('wemoe_fast')}"]
    if description.get("transformers"):
        used.append(f"transformers {description['transformers']}")
    return ", ".join(used)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and notes on unused weights."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
