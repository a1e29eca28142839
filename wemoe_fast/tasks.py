"""Tasks: a name, a classification head, samples to evaluate on and samples to adapt to.

From files (see `load_tasks`): JSONL with text and label, a folder of images by class, or a safetensors file
of ready model inputs. From Python: any object with ``__len__`` and ``batch(indices)`` is a data set, and a
function that returns a `Task` is an entry point (``entry: my_module:my_task`` in tasks.yaml; the module is
looked for where Python looks and beside tasks.yaml)::

    import torch
    from wemoe_fast.tasks import Head, Task

    class Waves:                                    # 1,000 sine waves of two frequencies
        def __len__(self) -> int:
            return 1000

        def batch(self, indices):                   # -> the model's keyword arguments, labels or None
            labels = torch.tensor([index % 2 for index in indices])
            time = torch.linspace(0, 1, 64)
            waves = torch.sin((1 + labels[:, None]) * 6.283 * time)
            return {"x": waves}, labels

    def my_task() -> Task:
        head = Head.load("heads/waves.safetensors")
        return Task("waves", head, data=Waves(), batch_size=64)

A data set may also have ``lengths``, one number per sample: evaluation then batches samples of like length.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import TaskConfig, data_kind, load_task_configs
from .errors import CheckpointError, InputError, WEMoEError

POOLINGS = ("mean", "cls", "pooler", "none")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
DEFAULT_BATCH_SIZE = 32
_LISTED = 10  # problems quoted from one data file


@dataclass
class Head:
    """A fixed linear classifier over a model's features.

    Logits are ``scale * cosine(features, weight)`` with `normalize` (zero-shot heads), otherwise
    ``features @ weight.T + bias``. `pooling` says how one feature vector per sample comes out of the model:
    "mean" (of last_hidden_state over the tokens that are not padding), "cls" (its first token), "pooler"
    (pooler_output) or "none" (the output is already [B, d]; image_embeds or text_embeds of a Hugging Face
    output).
    """

    weight: Tensor  # [C, d]
    bias: Tensor | None  # [C]
    classes: tuple[str, ...]
    scale: float = 1.0
    normalize: bool = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        self.classes = tuple(self.classes)
        problems = self._problems()
        if problems:
            raise InputError.of("head", problems)

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, d] of any float dtype -> logits [B, C] in fp32."""
        if features.ndim != 2 or features.shape[1] != self.weight.shape[1]:
            raise InputError(
                f"head: expected features of shape [B, {self.weight.shape[1]}], found {list(features.shape)}"
            )
        features = features.float()
        weight = self.weight.detach().to(features.device, torch.float32)
        if self.normalize:
            return self.scale * F.linear(F.normalize(features, dim=-1), F.normalize(weight, dim=-1))
        bias = None if self.bias is None else self.bias.detach().to(features.device, torch.float32)
        return F.linear(features, weight, bias)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: weight, bias, and the settings as JSON values in its metadata."""
        tensors = {"weight": self.weight.detach().cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.detach().cpu().contiguous()
        settings = {
            "classes": self.classes,
            "scale": self.scale,
            "normalize": self.normalize,
            "pooling": self.pooling,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, {key: json.dumps(value) for key, value in settings.items()})

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Read what `save` wrote. Raises CheckpointError if the file is missing, damaged or not a head."""
        tensors, metadata = _read_safetensors(Path(path))
        problems = [f"tensor {name!r} is missing" for name in ("weight",) if name not in tensors]
        problems += [f"unexpected tensor {name!r}" for name in tensors if name not in ("weight", "bias")]
        settings: dict[str, Any] = {}
        for key in ("classes", "scale", "normalize", "pooling"):
            if key not in metadata:
                if key == "classes":
                    problems.append("metadata 'classes' is missing; a head names its classes there")
                continue
            try:
                settings[key] = json.loads(metadata[key])
            except (ValueError, RecursionError):
                problems.append(f"metadata {key!r} is not JSON: {metadata[key][:60]!r}")
        if not isinstance(settings.get("classes", []), list):
            problems.append(f"metadata 'classes' must be a list of texts, found {settings['classes']!r}")
        if problems:
            raise CheckpointError.of(f"{path}: not a classification head", problems)
        try:
            return cls(weight=tensors["weight"], bias=tensors.get("bias"), **settings)
        except InputError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _problems(self) -> list[str]:
        problems = []
        names = self.classes
        if self.weight.ndim != 2 or not self.weight.is_floating_point() or self.weight.numel() == 0:
            problems.append(f"weight: expected floats of shape [C, d], found {_described(self.weight)}")
        elif self.weight.shape[0] != len(names):
            problems.append(f"classes: expected {self.weight.shape[0]} (rows of weight), found {len(names)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            problems.append(f"bias: expected shape {list(self.weight.shape[:1])}, found {_described(self.bias)}")
        if self.bias is not None and self.normalize:
            problems.append("bias: a head with normalize has none")
        for label, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                problems.append(f"{label}: {int((~torch.isfinite(tensor)).sum())} values are not finite")
        if not all(isinstance(name, str) for name in names):
            problems.append("classes: expected texts")
        elif len(set(names)) < len(names):
            repeated = sorted({name for name in names if names.count(name) > 1})
            problems.append(f"classes: {', '.join(map(repr, repeated))} named more than once")
        scale = self.scale
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale):
            problems.append(f"scale: expected a finite number, found {scale!r}")
        if not isinstance(self.normalize, bool):
            problems.append(f"normalize: expected true or false, found {self.normalize!r}")
        if self.pooling not in POOLINGS:
            problems.append(f"pooling: expected one of {', '.join(POOLINGS)}, found {self.pooling!r}")
        return problems


@runtime_checkable
class Samples(Protocol):
    """A data set: indexable in batches, in any order, as often as asked."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Samples by index -> the model's keyword arguments, and labels [n] (integers) or None."""
        ...


@dataclass
class Task:
    """What `adapt` and `evaluate` work on.

    Without `unlabelled`, adaptation uses `data`, but not its labels.
    """

    name: str
    head: Head
    data: Samples
    unlabelled: Samples | None = None
    batch_size: int = DEFAULT_BATCH_SIZE

    def __post_init__(self) -> None:
        problems = []
        for label, samples in (("data", self.data), ("unlabelled", self.unlabelled)):
            if not isinstance(samples, Samples) and not (samples is None and label == "unlabelled"):
                found = type(samples).__name__
                problems.append(f"{label}: expected an object with __len__ and batch(indices), found {found}")
        if not isinstance(self.head, Head):
            problems.append(f"head: expected a Head, found {type(self.head).__name__}")
        if not isinstance(self.batch_size, int) or self.batch_size < 1:
            problems.append(f"batch_size: expected an integer of at least 1, found {self.batch_size!r}")
        if problems:
            raise InputError.of(f"task {self.name!r}", problems)

    @property
    def adaptation_data(self) -> Samples:
        return self.data if self.unlabelled is None else self.unlabelled

    def features(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model on its keyword arguments -> [B, d].

        Inputs are moved to the device of the model's first parameter, float inputs to its dtype.
        """
        inputs = _placed(model, inputs)
        self._check_arguments(model, inputs)
        output = model(**inputs)
        pooling = self.head.pooling
        if pooling == "none":
            features = output if isinstance(output, Tensor) else _field(output, "image_embeds", "text_embeds")
            wanted = "an output [B, d], image_embeds or text_embeds"
        elif pooling == "pooler":
            features = _field(output, "pooler_output")
            wanted = "pooler_output [B, d]"
        else:
            hidden = output if isinstance(output, Tensor) else _field(output, "last_hidden_state")
            features = None if hidden is None or hidden.ndim != 3 else _pooled(hidden, pooling, inputs)
            wanted = "last_hidden_state [B, N, d]"
        if features is None or features.ndim != 2:
            raise InputError(
                f"task {self.name!r}: pooling {pooling!r} needs {wanted}; the model's output has"
                f" {_fields_of(output)}; choose another pooling for the head or another model class"
            )
        return features

    def logits(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the model on its keyword arguments -> logits [B, C] in fp32."""
        features = self.features(model, inputs)
        if features.shape[1] != self.head.weight.shape[1]:
            raise InputError(
                f"task {self.name!r}: the head expects features of size {self.head.weight.shape[1]},"
                f" the model gives {features.shape[1]}"
            )
        return self.head.logits(features)

    def _check_arguments(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        parameters = inspect.signature(model.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        unknown = [name for name in inputs if name not in parameters]
        if unknown:
            raise InputError(
                f"task {self.name!r}: {type(model).__name__}.forward takes {', '.join(parameters)};"
                f" the data gives {', '.join(unknown)} too"
            )


def _placed(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    like = next(iter(model.parameters()), torch.empty(0))
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def _pooled(hidden: Tensor, pooling: str, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B, N, d] -> [B, d]; "mean" in fp32 and over the tokens of the attention mask, if there is one."""
    if pooling == "cls":
        return hidden[:, 0]
    mask = inputs.get("attention_mask")
    hidden = hidden.float()
    if mask is None:
        return hidden.mean(1)
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # [B, N, 1]
    return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _field(output: object, *names: str) -> Tensor | None:
    values = (getattr(output, name, None) for name in names)
    return next((value for value in values if isinstance(value, Tensor)), None)


def _fields_of(output: object) -> str:
    if isinstance(output, Tensor):
        return f"one tensor {list(output.shape)}"
    if isinstance(output, Mapping):
        found = ", ".join(f"{k} {list(v.shape)}" for k, v in output.items() if isinstance(v, Tensor))
        return found or "no tensor"
    return f"the type {type(output).__name__}"


class TextSamples:
    """Texts and labels; tokenised once, when first needed, and padded to the longest of each batch."""

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: Any,
        max_length: int | None = None,
    ) -> None:
        """`tokenizer` is a Hugging Face tokenizer; `max_length` None stands for its own limit."""
        if not texts:
            raise InputError("texts: expected at least one, found none")
        if labels is not None and len(labels) != len(texts):
            raise InputError(f"labels: expected {len(texts)}, one per text, found {len(labels)}")
        if tokenizer.pad_token is None:
            raise InputError("tokenizer: it has no padding token; set tokenizer.pad_token")
        limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
        if max_length is not None and limit is not None and max_length > limit:
            raise InputError(f"max_length: the tokenizer's limit is {limit}, found {max_length}")
        self._texts: list[str] = list(texts)
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.long)
        self._tokenizer = tokenizer
        self._max_length = limit if max_length is None else max_length

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Any,
        classes: Sequence[str] | None,
        max_length: int | None = None,
    ) -> TextSamples:
        """From JSONL, one {"text": ..., "label": class name or index} a line.

        Labels are all there or all missing; with `classes` None they are ignored. Raises InputError naming
        file and line.
        """
        texts, labels = _read_jsonl(Path(path), classes)
        try:
            return cls(texts, labels, tokenizer, max_length)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        return np.diff(self._tokens[0]).tolist()

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        offsets, fields = self._tokens
        rows = [{name: flat[offsets[i] : offsets[i + 1]].tolist() for name, flat in fields.items()} for i in indices]
        inputs = dict(self._tokenizer.pad(rows, padding="longest", return_tensors="pt"))
        return inputs, None if self._labels is None else self._labels[list(indices)]

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Offsets [n + 1], and each field (input_ids, attention_mask, ...) of all samples end to end."""
        settings = {"truncation": self._max_length is not None, "max_length": self._max_length}
        chunks: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        for start in range(0, len(self._texts), 1024):
            encoded = self._tokenizer(self._texts[start : start + 1024], **settings)
            sizes = [len(ids) for ids in encoded["input_ids"]]
            for name, values in encoded.items():
                flat = np.fromiter(itertools.chain.from_iterable(values), np.int32, sum(sizes))
                chunks.setdefault(name, []).append(flat)
            lengths += sizes
        if min(lengths) == 0:
            raise InputError(f"sample {lengths.index(0)}: the tokenizer makes no token of its text")
        # transformers 4 would advise against pad(), meant for those who call it right after tokenising
        vars(self._tokenizer).setdefault("deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return offsets, {name: np.concatenate(parts) for name, parts in chunks.items()}


class ImageFolderSamples:
    """Images in one folder per class, decoded when asked for, prepared by a Hugging Face image processor."""

    def __init__(self, directory: str | Path, processor: Any, classes: Sequence[str] | None) -> None:
        """With `classes` None the samples are unlabelled: every image below `directory`, classes or not."""
        root = Path(directory)
        self._processor = processor
        self._labels: Tensor | None = None
        if not root.is_dir():
            raise InputError(f"{root}: expected a folder of images, found none")
        if classes is None:
            self._paths = _images(root, deep=True)
        else:
            folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
            problems = [
                f"folder {folder.name!r} is not a class of the head ({', '.join(classes)})"
                for folder in folders
                if folder.name not in classes
            ]
            stray = _images(root, deep=False)
            if stray:
                problems.append(f"{len(stray)} images outside class folders, such as {stray[0].name}")
            if problems:
                raise InputError.of(str(root), problems)
            index = {name: number for number, name in enumerate(classes)}
            found = [(path, index[folder.name]) for folder in folders for path in _images(folder, deep=True)]
            self._paths = [path for path, _ in found]
            self._labels = torch.tensor([label for _, label in found], dtype=torch.long)
        if not self._paths:
            raise InputError(f"{root}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none")

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        images = [_decode(self._paths[i]) for i in indices]
        inputs = dict(self._processor(images=images, return_tensors="pt"))
        return inputs, None if self._labels is None else self._labels[list(indices)]


class TensorSamples:
    """Ready model inputs: tensors named as the model's forward arguments, samples in the first dimension."""

    def __init__(self, inputs: Mapping[str, Tensor], labels: Tensor | None = None) -> None:
        problems = []
        sizes = {name: value.shape[0] if value.ndim else None for name, value in inputs.items()}
        if not inputs:
            problems.append("expected at least one model input, found none")
        elif None in sizes.values() or len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            problems.append(f"inputs must agree in their first dimension, the samples; found {listed}")
        elif 0 in sizes.values():
            problems.append("expected at least one sample, found none")
        elif labels is not None and labels.shape != (next(iter(sizes.values())),):
            problems.append(f"labels: expected one per sample, found shape {list(labels.shape)}")
        if labels is not None and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            problems.append(f"labels: expected integers, found {labels.dtype}")
        if problems:
            raise InputError.of("tensor samples", problems)
        self._inputs = dict(inputs)
        self._labels = None if labels is None else labels.long()

    @classmethod
    def read(cls, path: str | Path, classes: Sequence[str] | None) -> TensorSamples:
        """From safetensors; "labels" [n] is optional, and ignored with `classes` None."""
        tensors, _ = _read_safetensors(Path(path))
        labels = tensors.pop("labels", None)
        try:
            samples = cls(tensors, None if classes is None else labels)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        if samples._labels is not None and classes is not None:
            bad = ((samples._labels < 0) | (samples._labels >= len(classes))).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"{path}: label {int(samples._labels[bad[0]])} of sample {bad[0]} ({len(bad)} in all) is"
                    f" outside the head's {len(classes)} classes ({', '.join(classes)})"
                )
        return samples

    def __len__(self) -> int:
        return next(iter(self._inputs.values())).shape[0]

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        rows = torch.as_tensor(indices, dtype=torch.long)
        inputs = {name: value[rows] for name, value in self._inputs.items()}
        return inputs, None if self._labels is None else self._labels[rows]


def load_tasks(path: str | Path, model_dir: str | Path) -> list[Task]:
    """Tasks of a tasks.yaml; tokenizers and image processors come from the model's directory.

    Raises ConfigError for the YAML, CheckpointError for heads and tensor files, InputError for data; what is
    wrong with several tasks comes in one error.
    """
    path, model_dir = Path(path), Path(model_dir)
    configs = load_task_configs(path)
    tools = _Tools(model_dir)
    tasks: list[Task] = []
    errors: dict[str, WEMoEError] = {}
    for config in configs:
        try:
            tasks.append(_from_entry(config, path.parent) if config.entry else _from_files(config, tools))
        except WEMoEError as error:
            errors[config.name] = error
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        kinds = {type(error) for error in errors.values()}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        raise kind.of(str(path), [f"task {name!r}: {error}" for name, error in errors.items()])
    return tasks


def load_tokenizer(directory: str | Path) -> Any:
    """The Hugging Face tokenizer of a model directory, without network. Raises CheckpointError."""
    transformers = _transformers("texts")
    tokenizer = _from_directory(transformers.AutoTokenizer, Path(directory), "tokenizer")
    # transformers 5 makes up a tokenizer of special tokens alone when the files are missing
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise CheckpointError(f"{directory}: the tokenizer's files are missing; copy them from the base model")
    return tokenizer


def load_image_processor(directory: str | Path) -> Any:
    """The Hugging Face image processor of a model directory, without network. Raises CheckpointError."""
    transformers = _transformers("images")
    # PIL, not torchvision where it happens to be installed: the two differ in the last bits
    backend = {"backend": "pil"} if int(transformers.__version__.split(".")[0]) >= 5 else {"use_fast": False}
    return _from_directory(transformers.AutoImageProcessor, Path(directory), "image processor", **backend)


class _Tools:
    """A model directory's tokenizer and image processor, loaded once and only if a task needs them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.directory)

    @cached_property
    def image_processor(self) -> Any:
        return load_image_processor(self.directory)

    def samples(self, path: Path, classes: Sequence[str] | None, max_length: int | None) -> Samples:
        kind = data_kind(path)
        if kind == "text":
            return TextSamples.read(path, self.tokenizer, classes, max_length)
        if kind == "images":
            return ImageFolderSamples(path, self.image_processor, classes)
        return TensorSamples.read(path, classes)


def _from_files(config: TaskConfig, tools: _Tools) -> Task:
    assert config.head is not None
    assert config.data is not None
    head = Head.load(config.head)
    unlabelled = config.unlabelled
    return Task(
        name=config.name,
        head=head,
        data=tools.samples(config.data, head.classes, config.max_length),
        unlabelled=None if unlabelled is None else tools.samples(unlabelled, None, config.max_length),
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
    )


def _from_entry(config: TaskConfig, root: Path) -> Task:
    assert config.entry is not None
    module_name, _, attribute = config.entry.partition(":")
    subject = f"task {config.name!r}: entry {config.entry!r}"
    sys.path.append(str(root.resolve()))
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if not callable(found):
            raise InputError(f"{subject}: expected a function returning a Task, found {type(found).__name__}")
        task = found()
    except WEMoEError:
        raise
    except Exception as error:
        raise InputError(f"{subject}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(root.resolve()))
    if not isinstance(task, Task):
        raise InputError(f"{subject}: expected it to return a Task, found {type(task).__name__}")
    return replace(task, name=config.name, batch_size=config.batch_size or task.batch_size)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if start == b"PK" or start[:1] == b"\x80":
            raise CheckpointError(
                f"{path}: a pickle file, which can run any code when opened; only safetensors is read"
            )
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error


def _read_jsonl(path: Path, classes: Sequence[str] | None) -> tuple[list[str], list[int] | None]:
    texts: list[str] = []
    labels: list[int | None] = []
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text, label = _record(line, classes)
                except InputError as error:
                    problems.append(f"{path}:{number}: {error}")
                    continue
                texts.append(text)
                labels.append(label)
                if label is None and labels[0] is not None:
                    problems.append(f"{path}:{number}: no label, unlike the lines before it")
                elif label is not None and labels[0] is None:
                    problems.append(f"{path}:{number}: a label, unlike the lines before it")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(problems) > _LISTED:
        problems[_LISTED:] = [f"and {len(problems) - _LISTED} more"]
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError.of(str(path), problems)
    if not texts:
        raise InputError(f'{path}: no sample; expected lines such as {{"text": "...", "label": "..."}}')
    known = [label for label in labels if label is not None]
    return texts, known or None


def _record(line: bytes, classes: Sequence[str] | None) -> tuple[str, int | None]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f'expected {{"text": ..., "label": ...}}, found {type(record).__name__}')
    text = record.get("text")
    if not isinstance(text, str):
        found = type(text).__name__ if "text" in record else f"the keys {', '.join(record) or 'none'}"
        raise InputError(f'expected a string under "text", found {found}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text has half of a surrogate pair and is not valid Unicode") from None
    if classes is None or record.get("label") is None:
        return text, None
    return text, _class_index(record["label"], classes)


def _class_index(label: object, classes: Sequence[str]) -> int:
    if isinstance(label, str) and label in classes:
        return classes.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(classes):
        return label
    raise InputError(
        f"label {label!r} is not a class of the head: expected one of {', '.join(classes)},"
        f" or an index from 0 to {len(classes) - 1}"
    )


def _images(directory: Path, *, deep: bool) -> list[Path]:
    entries = directory.rglob("*") if deep else directory.iterdir()
    return sorted(path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _decode(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("images", "Pillow") from error
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not a readable image: {error}") from error


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise _missing(what, "transformers") from error
    return transformers


def _missing(what: str, package: str) -> InputError:
    return InputError(f'{what} need the package {package}: pip install "wemoe-fast[hf]"')


def _from_directory(auto: Any, directory: Path, what: str, **settings: Any) -> Any:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: expected a model directory with its {what}, found none")
    load: Callable[..., Any] = auto.from_pretrained
    try:
        return load(str(directory), local_files_only=True, trust_remote_code=False, **settings)
    except Exception as error:  # anything: damaged JSON, unknown classes, missing optional packages
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{directory}: its {what} cannot be loaded ({type(error).__name__}: {reason});"
            f" copy the {what}'s files from the base model"
        ) from error


def _described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
