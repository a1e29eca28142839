"""A penalty on routing weights that move away from those of the routers as they were."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .mlp import FastWEMoEMLP
from .router import Router


class DriftPenalty:
    """The mean squared difference between routing weights and those of copies of the routers, made here.

    Both see the same hidden states; the copies' weights count as constants. The mean is over samples, layers and
    experts. With ``batch_reduce`` a batch counts as one sample, as it has one routing.
    """

    def __init__(self, layers: Mapping[str, FastWEMoEMLP]) -> None:
        routers = {id(layer.router): layer.router for layer in layers.values()}
        self._routers = [(router, copy.deepcopy(router).requires_grad_(False)) for router in routers.values()]
        self._rows: list[Tensor] = []  # [B] of each call

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Take note of every routing while the context is open."""
        handles = []
        for router, reference in self._routers:

            def routed(router: Router, inputs: Any, weights: Tensor, reference: Router = reference) -> None:
                reference.batch_reduce = router.batch_reduce
                with torch.no_grad():
                    before = reference(*inputs)
                self._rows.append((weights - before).square().mean(1))

            handles.append(router.register_forward_hook(routed))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> Tensor:
        """The mean over what was noted since the last call; it is forgotten."""
        rows, self._rows = self._rows, []
        return torch.cat(rows).mean()
