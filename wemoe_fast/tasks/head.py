"""Classification heads: fixed linear classifiers over a model's features."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError, InputError
from .tensors import described, read_safetensors

POOLINGS = ("mean", "cls", "pooler", "none")


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
        tensors, metadata = read_safetensors(Path(path))
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
            problems.append(f"weight: expected floats of shape [C, d], found {described(self.weight)}")
        elif self.weight.shape[0] != len(names):
            problems.append(f"classes: expected {self.weight.shape[0]} (rows of weight), found {len(names)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            problems.append(f"bias: expected shape {list(self.weight.shape[:1])}, found {described(self.bias)}")
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
