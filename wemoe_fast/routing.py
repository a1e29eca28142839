"""Watching what the routers of a model decide, without keeping anything but sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .upscale import wemoe_layers


class RoutingRecord:
    """Sums of routing weights by layer. A router output of one row for a whole batch counts once."""

    def __init__(self, layers: list[str]) -> None:
        self._layers = layers
        self.reset()

    def reset(self) -> None:
        """Forget everything seen so far."""
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._counts = dict.fromkeys(self._layers, 0)

    def add(self, layer: str, weights: Tensor) -> None:
        """Add routing weights [B, T] of one call."""
        weights = weights.detach()
        weights = weights.to(torch.float32 if weights.device.type == "mps" else torch.float64)
        signed, absolute = weights.sum(0), weights.abs().sum(0)
        if layer in self._sums:
            signed, absolute = self._sums[layer][0] + signed, self._sums[layer][1] + absolute
        self._sums[layer] = (signed, absolute)
        self._counts[layer] += weights.shape[0]

    def sums(self) -> dict[str, Tensor]:
        """Sums of routing weights by layer, for the layers that ran: [T + 1], the number of rows at the end."""
        return {name: torch.cat([s[0], s[0].new_tensor([self._counts[name]])]) for name, s in self._in_order()}

    def means(self) -> dict[str, list[float]]:
        """Mean routing weight by layer and expert, for the layers that ran."""
        return {name: (s[0] / self._counts[name]).tolist() for name, s in self._in_order()}

    def totals(self) -> dict[str, tuple[float, int]]:
        """By layer, the sum over rows of mean |routing weight|, and the number of rows."""
        ran = {name: float(s[1].mean()) for name, s in self._in_order()}
        return {name: (ran.get(name, 0.0), self._counts[name]) for name in self._layers}

    def _in_order(self) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        return [(name, self._sums[name]) for name in self._layers if self._counts[name]]


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the routing weights of every WEMoE layer while the context is open.

    Layers may share one router (a shared gate): the layer that is running tells whose decision it is.
    """
    layers = wemoe_layers(model)
    record = RoutingRecord(list(layers))
    running: list[str] = []
    handles = []
    for name, layer in layers.items():

        def enter(_module: nn.Module, _inputs: object, name: str = name) -> None:
            running.append(name)

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            if running:
                running.pop()

        handles.append(layer.register_forward_pre_hook(enter))
        handles.append(layer.register_forward_hook(leave, always_call=True))

    def routed(_module: nn.Module, _inputs: object, weights: Tensor) -> None:
        if running:
            record.add(running[-1], weights)

    for router in {id(layer.router): layer.router for layer in layers.values()}.values():
        handles.append(router.register_forward_hook(routed))
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
