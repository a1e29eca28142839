"""Recipes and task lists: YAML in, checked dataclasses out, every problem in one ConfigError.

Paths in a file are relative to that file. Nothing they point to is opened here; models of the Hub are downloaded once
everything else is right.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import CheckpointError, ConfigError
from .hub import download, is_id
from .normalization import KINDS
from .prompts import ROUTINGS

TEXT_SUFFIXES = (".jsonl",)
TENSOR_SUFFIXES = (".safetensors",)
MAX_YAML_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32
PARQUET_SUFFIXES = (".parquet",)

_T = TypeVar("_T")
_REQUIRED: Any = object()


@dataclass(frozen=True)
class Recipe:
    """How to merge: a base, named experts fine-tuned from it, and the router to put in front of them.

    ``base`` is the directory of a checkpoint, an expert that of a checkpoint or of a LoRA adapter over the base. With
    ``share`` experts may have other heads or another vocabulary, which are left to them.
    """

    base: Path
    experts: dict[str, Path]
    merge_lambda: float = 0.3
    router_depth: int = 2
    init_lambda: float = 0.3
    normalization: str = "identity"
    temperature: float = 1.0
    top_k: int | None = None
    batch_reduce: bool = False
    decode_routing: str = "prompt"
    share: bool = False
    seed: int = 0


@dataclass(frozen=True)
class TaskConfig:
    """One task: either `entry`, a function that builds it, or a head file and data files.

    `data` is a JSONL, Parquet or safetensors file, or a folder of images by class. `batch_size` None stands for
    the task's own: 32, or what the entry's Task says.
    """

    name: str
    head: Path | None = None
    data: Path | None = None
    unlabelled: Path | None = None
    max_length: int | None = None
    batch_size: int | None = None
    entry: str | None = None


def load_recipe(path: str | Path) -> Recipe:
    """Read recipe.yaml; base and experts are directories, or models of the Hub, which are downloaded.

    Raises:
        ConfigError: everything wrong with the file; CheckpointError: every model that the Hub does not have or give.
    """
    path = Path(path)
    content, problems = _read_yaml(path)
    fields = _Fields(content, "", problems)
    base = fields.take("base", _model(path.parent), None)
    experts = _experts(fields.take("experts", _named_experts, {}), path.parent, problems)
    read: dict[str, Any] = {
        "merge_lambda": fields.take("merge_lambda", _number, 0.3, required=False),
        "router_depth": fields.take("router_depth", _integer(0, 2), 2, required=False),
        "init_lambda": fields.take("init_lambda", _number, 0.3, required=False),
        "normalization": fields.take("normalization", _one_of(KINDS), "identity", required=False),
        "temperature": fields.take("temperature", _positive, 1.0, required=False),
        "top_k": fields.take("top_k", _optional(_integer(1)), None, required=False),
        "batch_reduce": fields.take("batch_reduce", _boolean, False, required=False),
        "decode_routing": fields.take("decode_routing", _one_of(ROUTINGS), "prompt", required=False),
        "share": fields.take("share", _boolean, False, required=False),
        "seed": fields.take("seed", _integer(0, 2**63 - 1), 0, required=False),
    }
    fields.refuse_unknown()
    if read["top_k"] is not None and experts and read["top_k"] > len(experts):
        problems.append(f"top_k: expected at most the number of experts, {len(experts)}, found {read['top_k']}")
    if read["temperature"] != 1.0 and read["normalization"] != "softmax":
        problems.append(f"temperature: only softmax has one, found {read['temperature']} with {read['normalization']}")
    if problems or base is None:
        raise ConfigError.of(str(path), problems)
    directories = _downloaded(path, [base, *experts.values()])
    return Recipe(base=directories[base], experts={n: directories[m] for n, m in experts.items()}, **read)


def load_task_configs(path: str | Path) -> list[TaskConfig]:
    """Read tasks.yaml. Raises ConfigError listing everything wrong with it."""
    path = Path(path)
    content, problems = _read_yaml(path)
    fields = _Fields(content, "", problems)
    entries = fields.take("tasks", _task_list, [])
    fields.refuse_unknown()
    configs = [_task(entry, number, path.parent, problems) for number, entry in enumerate(entries, 1)]
    names = [config.name for config in configs if config.name]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"task {name!r}: the name is used {names.count(name)} times; names must differ")
    if problems:
        raise ConfigError.of(str(path), problems)
    return configs


def data_kind(path: Path) -> str | None:
    """What a path looks like: "text", "parquet", "tensors", "images", or None for none of them."""
    if path.is_dir():
        return "images"
    kinds = {"text": TEXT_SUFFIXES, "parquet": PARQUET_SUFFIXES, "tensors": TENSOR_SUFFIXES}
    return next((kind for kind, suffixes in kinds.items() if path.suffix.lower() in suffixes), None)


def _downloaded(path: Path, models: Iterable[Path | str]) -> dict[Path | str, Path]:
    """The directories of models, which are directories or names on the Hub."""
    directories: dict[Path | str, Path] = {}
    problems = []
    for model in dict.fromkeys(models):
        try:
            directories[model] = model if isinstance(model, Path) else download(model)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError.of(str(path), problems)
    return directories


def _experts(given: dict[Any, Any], root: Path, problems: list[str]) -> dict[str, Path | str]:
    experts: dict[str, Path | str] = {}
    fields = _Fields(given, "experts.", problems)
    for name in given:
        if not isinstance(name, str) or not name.strip():
            problems.append(f"experts: expected a name, found {_shown(name)}; put it in quotes")
            continue
        expert = fields.take(name, _model(root), None)
        if expert is not None:
            experts[name] = expert
    return experts


def _task(entry: Any, number: int, root: Path, problems: list[str]) -> TaskConfig:
    where = f"task {number}"
    if not isinstance(entry, dict):
        problems.append(f"{where}: expected a mapping with name, head and data, found {_shown(entry)}")
        return TaskConfig(name="")
    if isinstance(entry.get("name"), str) and entry["name"].strip():
        where = f"task {entry['name']!r}"
    fields = _Fields(entry, f"{where}: ", problems)
    by_entry = fields.has("entry")
    config = TaskConfig(
        name=fields.take("name", _text, ""),
        head=fields.take("head", _file(root), None, required=not by_entry),
        data=fields.take("data", _data(root), None, required=not by_entry),
        unlabelled=fields.take("unlabelled", _data(root), None, required=False),
        max_length=fields.take("max_length", _integer(1), None, required=False),
        batch_size=fields.take("batch_size", _integer(1), None, required=False),
        entry=fields.take("entry", _entry_point, None, required=False),
    )
    fields.refuse_unknown()
    if by_entry:
        extra = [key for key in ("head", "data", "unlabelled", "max_length") if fields.has(key)]
        if extra:
            problems.append(f"{where}: entry builds the whole task; remove {', '.join(extra)} or remove entry")
    elif fields.has("max_length") and config.data is not None:
        kinds = {data_kind(path) for path in (config.data, config.unlabelled) if path is not None}
        if not kinds <= {"text", "parquet"}:
            problems.append(f"{where}: max_length is for text (.jsonl, .parquet); remove it")
    return config


class _Loader(yaml.SafeLoader):
    """SafeLoader for files from anywhere.

    It remembers equal keys, of which SafeLoader keeps the last without a word, and refuses what would grow beyond
    ``MAX_NODES`` when aliases are written out, or nests deeper than ``MAX_DEPTH``.
    """

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self.repeated: list[str] = []
        self._depth = 0
        self._sizes: dict[Any, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if self._depth >= MAX_DEPTH:
            raise _refused(f"nested too deeply, more than {MAX_DEPTH} levels", event)
        self._depth += 1
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            children = [n for pair in node.value for n in pair] if isinstance(node, yaml.MappingNode) else node.value
            self._sizes[node] = 1 + (0 if isinstance(children, str) else sum(self._sizes[n] for n in children))
        elif node not in self._sizes:
            raise _refused("an alias inside of what it stands for", event)
        if self._sizes[node] > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values", event)
        return node

    def construct_yaml_int(self, node: Any) -> int:
        value: int = super().construct_yaml_int(node)
        if value.bit_length() > 10_000:  # Python refuses to write those out that have thousands of digits
            raise yaml.constructor.ConstructorError(None, None, "an integer of more than 10000 bits", node.start_mark)
        return value

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                self.repeated.append(
                    f"key {key.value!r} appears twice, on lines {lines[key.value]} and {line}; keep one"
                )
            lines[key.value] = line
        return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refused(reason: str, event: Any) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, reason, event.start_mark)


def _read_yaml(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The file's top-level mapping and the repeated keys found; raises ConfigError if there is no mapping."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise ConfigError(f"{path}: expected at most {MAX_YAML_BYTES} bytes of YAML, found {path.stat().st_size}")
        text = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        loader = _Loader(text)
        try:
            content = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        reason = error.problem or error.context or "it cannot be parsed"
        raise ConfigError(f"{path}: not valid YAML: {place}{reason}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(content, dict):
        found = "an empty file" if content is None else _shown(content)
        raise ConfigError(f"{path}: expected a mapping (key: value) at the top, found {found}")
    return content, loader.repeated


class _UnfitError(Exception):
    """Carries what was expected instead; `found` replaces the plain description of the value."""

    def __init__(self, expected: str, found: str | None = None) -> None:
        super().__init__(expected)
        self.expected, self.found = expected, found


_Check = Callable[[Any], _T]


@dataclass
class _Fields:
    """A mapping read key by key; problems are collected, not raised."""

    content: dict[Any, Any]
    where: str
    problems: list[str]
    known: list[str] = field(default_factory=list)

    def has(self, key: str) -> bool:
        return key in self.content

    def take(self, key: str, check: _Check[_T], default: Any, *, required: bool = True) -> _T | Any:
        self.known.append(key)
        if key not in self.content:
            if required:
                self.problems.append(f"{self.where}{key} is missing")
            return default
        value = self.content[key]
        try:
            return check(value)
        except _UnfitError as unfit:
            found = unfit.found or _shown(value)
            self.problems.append(f"{self.where}{key}: expected {unfit.expected}, found {found}")
            return default

    def refuse_unknown(self) -> None:
        for key in self.content:
            if key not in self.known:
                self.problems.append(f"{self.where}unknown key {key!r}{did_you_mean(str(key), self.known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: the nearest known one, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, 1, 0.6)
    return f", did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    text = repr(value)
    text = text if len(text) <= 60 else text[:57] + "..."
    kinds: list[tuple[type, str]] = [
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "a mapping"),
    ]
    kind = next((name for of, name in kinds if isinstance(value, of)), f"a {type(value).__name__}")
    return f"{text} ({kind})"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _UnfitError("a text")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+[eE][-+]?\d+", value):
        raise _UnfitError("a number (YAML takes this form for text: write 0.001 or 1.0e-3)")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _UnfitError("a number")
    try:
        number = float(value)
    except OverflowError:
        raise _UnfitError("a finite number") from None
    if not math.isfinite(number):
        raise _UnfitError("a finite number")
    return number


def _positive(value: Any) -> float:
    number = _number(value)
    if number <= 0:
        raise _UnfitError("a number above 0")
    return number


def _integer(low: int, high: int | None = None) -> _Check[int]:
    expected = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"

    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _UnfitError(expected)
        if value < low or (high is not None and value > high):
            raise _UnfitError(expected)
        return value

    return check


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _UnfitError("true or false")
    return value


def _one_of(choices: Iterable[str]) -> _Check[str]:
    choices = tuple(choices)

    def check(value: Any) -> str:
        if value not in choices:
            close = difflib.get_close_matches(str(value).lower(), choices, 1, 0.6)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise _UnfitError(f"one of {', '.join(choices)}", _shown(value) + hint)
        return value

    return check


def _optional(check: _Check[_T]) -> _Check[_T | None]:
    return lambda value: None if value is None else check(value)


def _named_experts(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict) or not value:
        raise _UnfitError("at least one expert (name: directory)", "none" if not value else None)
    return value


def _task_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _UnfitError("a list of at least one task", "none" if not value else None)
    return value


def _path(value: Any, root: Path) -> Path:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _UnfitError("a path")
    try:
        path = root / Path(value).expanduser()
        path.exists()
    except (OSError, RuntimeError):  # too long a name, a loop of links, no such home
        raise _UnfitError("a path that can be looked up") from None
    return path


def _model(root: Path) -> _Check[Path | str]:
    """A directory, or the name of a model on the Hub, as text."""

    def check(value: Any) -> Path | str:
        path = _path(value, root)
        if is_id(value, root):
            return str(value)
        if not path.is_dir():
            raise _UnfitError("a directory", f"{path}, which {_is_not(path, 'a directory')}")
        return path

    return check


def _file(root: Path) -> _Check[Path]:
    def check(value: Any) -> Path:
        path = _path(value, root)
        if not path.is_file():
            raise _UnfitError("a file", f"{path}, which {_is_not(path, 'a file')}")
        return path

    return check


def _data(root: Path) -> _Check[Path]:
    expected = "a .jsonl, .parquet or .safetensors file or a folder of images"

    def check(value: Any) -> Path:
        path = _path(value, root)
        if not path.exists():
            raise _UnfitError(expected, f"{path}, which does not exist")
        if data_kind(path) is None:
            raise _UnfitError(expected, str(path))
        return path

    return check


def _is_not(path: Path, wanted: str) -> str:
    return f"is not {wanted}" if path.exists() else "does not exist"


def _entry_point(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", value):
        raise _UnfitError('"package.module:function"')
    return value
