"""The tokenizer and image processor of a model directory, without network."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError


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


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise missing(what, "transformers") from error
    return transformers


def missing(what: str, package: str, extra: str = "hf") -> InputError:
    return InputError(f'{what} need the package {package}: pip install "wemoe-fast[{extra}]"')


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


class Processors:
    """A model directory's tokenizer and image processor, loaded once and only if a task needs them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.directory)

    @cached_property
    def image_processor(self) -> Any:
        return load_image_processor(self.directory)
