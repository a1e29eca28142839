"""tasks.yaml -> tasks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import TaskConfig, data_kind, load_task_configs
from ..errors import InputError, WEMoEError
from .head import Head
from .images import ImageFolderSamples
from .parquet import read_parquet
from .processors import Processors
from .task import DEFAULT_BATCH_SIZE, Samples, Task
from .tensors import TensorSamples
from .texts import TextSamples


def load_tasks(path: str | Path, model_dir: str | Path) -> list[Task]:
    """Tasks of a tasks.yaml; tokenizers and image processors come from the model's directory.

    Raises ConfigError for the YAML, CheckpointError for heads and tensor files, InputError for data; what is
    wrong with several tasks comes in one error.
    """
    path, model_dir = Path(path), Path(model_dir)
    configs = load_task_configs(path)
    processors = Processors(model_dir)
    tasks: list[Task] = []
    errors: dict[str, WEMoEError] = {}
    for config in configs:
        try:
            tasks.append(_from_entry(config, path.parent) if config.entry else _from_files(config, processors))
        except WEMoEError as error:
            errors[config.name] = error
    if len(errors) == 1:
        raise next(iter(errors.values()))
    if errors:
        kinds = {type(error) for error in errors.values()}
        kind = kinds.pop() if len(kinds) == 1 else InputError
        raise kind.of(str(path), [f"task {name!r}: {error}" for name, error in errors.items()])
    return tasks


def _samples(path: Path, processors: Processors, classes: Sequence[str] | None, max_length: int | None) -> Samples:
    kind = data_kind(path)
    if kind == "text":
        return TextSamples.read(path, processors.tokenizer, classes, max_length)
    if kind == "images":
        return ImageFolderSamples(path, processors.image_processor, classes)
    if kind == "parquet":
        return read_parquet(path, processors, classes, max_length)
    return TensorSamples.read(path, classes)


def _from_files(config: TaskConfig, processors: Processors) -> Task:
    assert config.head is not None
    assert config.data is not None
    head = Head.load(config.head)
    unlabelled = config.unlabelled
    return Task(
        name=config.name,
        head=head,
        data=_samples(config.data, processors, head.classes, config.max_length),
        unlabelled=None if unlabelled is None else _samples(unlabelled, processors, None, config.max_length),
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
