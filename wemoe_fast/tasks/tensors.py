"""Ready model inputs, and the safetensors files they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError, InputError
from ..fingerprint import Digest


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
        tensors, _ = read_safetensors(Path(path))
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

    def fingerprint(self) -> str:
        """Of every input and label."""
        return Digest().tensors(self._inputs | ({} if self._labels is None else {" labels": self._labels})).hex()

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        rows = torch.as_tensor(indices, dtype=torch.long)
        inputs = {name: value[rows] for name, value in self._inputs.items()}
        return inputs, None if self._labels is None else self._labels[rows]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
