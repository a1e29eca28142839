"""What a task is: a name, a head, samples; and how a model's output becomes logits."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import InputError
from .head import Head

DEFAULT_BATCH_SIZE = 32


@runtime_checkable
class Samples(Protocol):
    """A data set: indexable in batches, in any order, as often as asked, from any one thread at a time.

    It may also have ``lengths``, one number per sample (evaluation then batches samples of like length), and
    ``fingerprint()``, a text that changes whenever the data does (evaluation then need not read a batch again to
    know that what it recorded about it still holds).
    """

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Samples by index -> the model's keyword arguments, and labels [n] (integers) or None."""
        ...


@dataclass
class Task:
    """What `adapt` and `evaluate` work on.

    Without `unlabelled`, adaptation uses `data`, but not its labels. `batch_size` counts samples of the data's
    greatest length: as many tokens of shorter ones go through at once.
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
