"""One batch through a model: in halves where memory does not suffice, its copy to a GPU beside the batch before."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import InputError, WEMoEError
from .routing import RoutingRecord
from .tasks import Task
from .upscale import wemoe_layers

Inputs = Mapping[str, Tensor]
NOT_A_NUMBER = -1  # in the place of a class


class Forward:
    """Predictions of a model on batches of one task, and the sums of its routing weights.

    A batch that runs out of GPU memory is done in halves, each again in halves where it must be. Where a batch is
    halved depends on its own shape and the memory alone, not on what ran before: a shape is spared the attempt only
    if another with no more samples, none of them larger, has failed.
    """

    def __init__(self, model: nn.Module, task: Task, routing: RoutingRecord) -> None:
        self._model, self._task, self._routing = model, task, routing
        self._device = next(iter(model.parameters()), torch.empty(0)).device
        self._copies = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._divisible = not any(layer.batch_reduce for layer in wemoe_layers(model).values())
        self._failed: list[tuple[int, int]] = []  # samples and elements of one, of batches that did not fit

    def __call__(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Class indices [B] or `NOT_A_NUMBER`, and by layer the summed routing weights and rows [T + 1] in float64.

        Both are on the device.

        Raises:
            WEMoEError: one sample alone does not fit into memory, or a batch that cannot be divided.
        """
        predictions: list[Tensor] = []
        totals: dict[str, Tensor] = {}
        waiting = [inputs]
        while waiting:
            piece = waiting.pop()
            found = None if self._hopeless(piece) else self._attempt(piece)
            if found is None:
                waiting += reversed(self._halves(piece))
                continue
            predictions.append(found)
            for layer, sums in self._routing.sums().items():
                totals[layer] = totals[layer] + sums if layer in totals else sums
        return torch.cat(predictions), totals

    def _attempt(self, inputs: Inputs) -> Tensor | None:
        """None where memory ran out; nothing of the attempt is left then."""
        self._routing.reset()
        try:
            logits = self._task.logits(self._model, self._on_device(inputs))
            return logits.argmax(-1).masked_fill(logits.isnan().any(-1), NOT_A_NUMBER)
        except torch.OutOfMemoryError:
            self._failed.append(_shape(inputs))
        gc.collect(1)  # the attempt's tensors may hang on the error's frames
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _hopeless(self, inputs: Inputs) -> bool:
        samples, elements = _shape(inputs)
        return samples > 1 and any(samples >= failed and elements >= size for failed, size in self._failed)

    def _halves(self, inputs: Inputs) -> list[Inputs]:
        samples = _shape(inputs)[0]
        subject = f"task {self._task.name!r}: out of memory on {self._device} with {samples} samples"
        if samples == 1:
            raise WEMoEError(f"{subject}: not even one fits; use a device with more memory or a smaller dtype")
        if not self._divisible:
            raise WEMoEError(
                f"{subject}: the model routes whole batches (batch_reduce), so halving one would change its results;"
                " choose a smaller batch_size"
            )
        if any(value.ndim == 0 or value.shape[0] != samples for value in inputs.values()):
            listed = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise InputError(
                f"{subject}: to be halved, inputs need the samples in their first dimension, found {listed};"
                " choose a smaller batch_size"
            )
        middle = samples // 2
        return [{n: v[:middle] for n, v in inputs.items()}, {n: v[middle:] for n, v in inputs.items()}]

    def _on_device(self, inputs: Inputs) -> Inputs:
        if self._copies is None:
            return inputs
        compute = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            placed = {name: value.to(self._device, non_blocking=True) for name, value in inputs.items()}
        compute.wait_stream(self._copies)
        for value in placed.values():
            value.record_stream(compute)
        return placed


def _shape(inputs: Inputs) -> tuple[int, int]:
    """Samples, and elements of the inputs of one."""
    samples = next(iter(inputs.values())).shape[0]
    return samples, sum(value.numel() for value in inputs.values()) // max(samples, 1)
