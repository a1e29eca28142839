"""Digests of models, tasks and data: equal if and only if every byte that can move a result is equal."""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import __version__
from .kernels import native

BLOCK = 1 << 22  # elements copied at once, where memory is not ready to be hashed as it lies


class Digest:
    """SHA-256 of a sequence of values, each with its kind and size, so that no two sequences run together."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def text(self, text: str) -> Digest:
        content = text.encode("utf-8", "surrogatepass")
        self._hash.update(b"text %d\n" % len(content))
        self._hash.update(content)
        return self

    def plain(self, value: Any) -> Digest:
        """Plain JSON types; others by their text."""
        return self.text(json.dumps(value, sort_keys=True, default=str))

    def data(self, content: bytes) -> Digest:
        self._hash.update(b"data %d\n" % len(content))
        self._hash.update(content)
        return self

    def array(self, array: np.ndarray) -> Digest:
        """Of one dimension."""
        self._hash.update(f"array {array.dtype.str} {array.shape}\n".encode())
        for start in range(0, len(array), BLOCK):
            self._hash.update(array[start : start + BLOCK].tobytes())
        return self

    def tensor(self, tensor: Tensor) -> Digest:
        self._hash.update(f"tensor {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in tensor.detach().reshape(-1).split(BLOCK):
            self._hash.update(block.cpu().contiguous().view(torch.uint8).numpy())
        return self

    def tensors(self, tensors: dict[str, Tensor]) -> Digest:
        for name in sorted(tensors):
            self.text(name).tensor(tensors[name])
        return self

    def hex(self) -> str:
        return self._hash.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Of every parameter and buffer (name, dtype, bytes), the modules' own descriptions and the configuration.

    The versions of the packages the modules come from count too: they are the code that runs.
    """
    digest = Digest().text(f"{type(model).__module__}.{type(model).__qualname__}").text(repr(model))
    packages = {type(module).__module__.partition(".")[0] for module in model.modules()}
    digest.plain({name: getattr(sys.modules.get(name), "__version__", None) for name in packages})
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        # where a model was read from, and by which version, is no part of it
        digest.plain({k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")})
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return digest.tensors(dict(named)).hex()


def head_digest(head: Any) -> str:
    """Of a task's head: weight, bias, classes, and how it is applied."""
    digest = Digest().plain([head.classes, head.scale, head.normalize, head.pooling]).tensor(head.weight)
    return (digest if head.bias is None else digest.tensor(head.bias)).hex()


def batch_digest(inputs: dict[str, Tensor], labels: Tensor | None) -> str:
    """Of one batch as a data set gave it."""
    digest = Digest().tensors(inputs)
    return (digest if labels is None else digest.tensor(labels)).hex()


def numerics(device: torch.device) -> dict[str, Any]:
    """What the last bits of a result hang on besides model and data: versions, and what computes."""
    cpu = device.type == "cpu"
    return {
        "wemoe_fast": __version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": torch.backends.cpu.get_cpu_capability() if cpu else None,
        "threads": torch.get_num_threads() if cpu else None,
        "native": native.why_not(torch.float32, torch.float32) is None if cpu else None,
        "matmul": torch.get_float32_matmul_precision(),
    }
