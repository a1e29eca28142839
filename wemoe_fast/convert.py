"""Pickle checkpoints made safe: the tensors of PyTorch files as safetensors, without running what pickles can hold."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapters import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS, is_adapter
from .atomic import check_output, replaced_directory
from .checkpoint import MAX_SHARD_BYTES, carry_files
from .errors import CheckpointError
from .headers import pickle_files
from .sharded import TensorSpec, plan_shards, write_shards


def convert(
    source: str | Path, out: str | Path, *, overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write a checkpoint of pickle files anew as safetensors, with its configuration, tokenizer and processor.

    PyTorch's restricted unpickler reads the files (``weights_only``): it makes tensors and plain containers, and
    refuses anything that would call other code.

    Args:
        source: a directory with ``pytorch_model*.bin``, a LoRA adapter's ``adapter_model.bin``, or one other pickle
            file (.bin, .pt, .pth, .ckpt).
        out: a new directory, see ``checkpoint.save``.

    Returns:
        the files converted.

    Raises:
        CheckpointError: nothing to convert, or a file that holds more than named tensors.
    """
    source, out = Path(source), Path(out)
    adapter = (source / ADAPTER_PICKLE).is_file() and is_adapter(source)
    files = [source / ADAPTER_PICKLE] if adapter else sorted(source.glob("pytorch_model*.bin")) or pickle_files(source)
    if not files:
        raise CheckpointError(f"{source}: expected pickle files (.bin, .pt, .pth, .ckpt), found none")
    if len(files) > 1 and not files[0].name.startswith("pytorch_model"):
        raise CheckpointError(
            f"{source}: expected pytorch_model*.bin or one pickle file, found {', '.join(p.name for p in files)}; "
            "leave the model's in a directory of its own"
        )
    if out.resolve() == source.resolve():
        raise CheckpointError(f"{out}: expected an output apart from the input")
    check_output(out, overwrite=overwrite)
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _named_tensors(path)
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with replaced_directory(out, overwrite=overwrite) as target:
        shards = plan_shards(specs, sum(spec.nbytes for spec in specs) if adapter else max_shard_bytes)
        shards = [replace(shard, file=ADAPTER_WEIGHTS) for shard in shards] if adapter else shards
        for _ in write_shards(shards, target, lambda spec: iter([(0, tensors[spec.name].detach())])):
            pass
        for name in (ADAPTER_CONFIG,) if adapter else ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        carry_files(source, target)
    return files


def _named_tensors(path: Path) -> dict[str, Tensor]:
    try:
        content = _unpickled(path)
    except Exception as error:  # whatever a damaged or hostile file makes the unpickler raise
        raise CheckpointError(f"{path}: cannot be read without running code in it: {error!s:.200}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: expected named tensors, found {type(content).__name__}")
    others = [name for name, value in content.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise CheckpointError(f"{path}: expected named tensors only, found {others[0]!r:.80}{more}")
    return content


def _unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of before PyTorch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
