"""Models of checkpoints on the meta device: class, shapes and dtypes as they would be loaded, without a tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .checkpoint import architecture, import_transformers, quiet_transformers, transformers_class
from .errors import CheckpointError
from .headers import TensorEntry
from .structure import DTYPES


class Skeletons:
    """Models on the meta device, one for all checkpoints of the same configuration."""

    def __init__(self) -> None:
        self._made: dict[str, nn.Module] = {}

    def of(self, directory: Path, entries: Iterable[TensorEntry]) -> nn.Module:
        """The model of a Hugging Face checkpoint in the dtype it would be loaded in.

        ``entries``: its tensors, which give the dtype where ``config.json`` does not.

        Raises:
            CheckpointError: no ``config.json``, or one that cannot be understood.
        """
        transformers = import_transformers()
        cls = transformers_class(directory, architecture(directory))
        try:
            with quiet_transformers():
                config = cls.config_class.from_pretrained(str(directory), local_files_only=True)
                dtype = _dtype(config) or _first_dtype(entries)
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


def _first_dtype(entries: Iterable[TensorEntry]) -> torch.dtype:
    """That of the first tensor of the first file, by name, as transformers has it."""
    found = min((e for e in entries if e.dtype in DTYPES), key=lambda e: (e.path.name, e.name), default=None)
    return torch.float32 if found is None else found.dtype


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
