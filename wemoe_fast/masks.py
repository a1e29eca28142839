"""How the attention mask given to a model reaches its routers as a token mask.

A router averages over a sample's tokens, so it has to know which of them are padding. The modules of a model
that take an ``attention_mask`` note the two-dimensional mask of the call in a ``TokenMasks`` shared with the
MLPs below them, and drop it when the call ends.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InputError

_REMEMBERED = 4096


class TokenMasks:
    """The masks of the calls under way, innermost last. Copied and pickled with the model, without content."""

    def __init__(self) -> None:
        self.calls: list[Tensor | None] = []
        self._recalled: Tensor | None = None
        self._by_input: OrderedDict[tuple[int, torch.Size], Tensor] = OrderedDict()

    def for_tokens(self, hidden: Tensor) -> Tensor | None:
        """The mask [B, N] of hidden states [B, N, d], or None; of a longer mask (cached tokens) the last N."""
        remembered = self._recalled if _recomputing() else None
        mask = self.calls[-1] if self.calls else remembered
        if mask is None:
            return None
        if mask.shape[0] != hidden.shape[0] or mask.shape[1] < hidden.shape[1]:
            raise InputError(
                f"attention_mask: expected [B, N] = {tuple(hidden.shape[:2])} or longer, found {tuple(mask.shape)}; "
                "pass token_mask to the FastWEMoEMLP where the model changes the number of tokens"
            )
        return mask[:, mask.shape[1] - hidden.shape[1] :]

    def enter(self, mask: Tensor | None, hidden: Tensor | None) -> None:
        """Begin a call. Without a [B, N] mask of its own it inherits that of the call around it."""
        if mask is None and self.calls:
            mask = self.calls[-1]
        elif mask is None and _recomputing():
            self.recall(hidden)
            mask = self._recalled
        self.calls.append(mask)
        if mask is not None and hidden is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._by_input[hidden.data_ptr(), hidden.shape] = mask
            while len(self._by_input) > _REMEMBERED:
                self._by_input.popitem(last=False)

    def recall(self, hidden: Tensor | None) -> None:
        """The mask that a layer had when it first ran on this input.

        Activation checkpointing runs a layer again during backward, outside of the model's call. It keeps the
        layer's input alive for that, so the input's address identifies the first run.
        """
        if hidden is not None and not self.calls and _recomputing():
            key = (hidden.data_ptr(), hidden.shape)
            if key in self._by_input:
                self._recalled = self._by_input[key]

    def leave(self) -> None:
        """End the innermost call."""
        if self.calls:
            self.calls.pop()

    def __getstate__(self) -> dict[str, Any]:
        return vars(TokenMasks())

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMasks:
        copy = TokenMasks()
        memo[id(self)] = copy
        return copy


class _Enter:
    """Forward pre-hook."""

    def __init__(self, masks: TokenMasks, position: int) -> None:
        self.masks, self.position = masks, position

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = args[self.position] if len(args) > self.position else kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.masks.enter(mask, _input(args, kwargs))


class _Leave:
    """Forward hook, called even when the call fails."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.masks.leave()


class _Recall:
    """Forward pre-hook of a layer's children: some checkpoint a layer inside of its hooks."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.masks.recall(_input(args, kwargs))


def connect(model: nn.Module, paths: Iterable[str]) -> list[RemovableHandle]:
    """Connect the FastWEMoEMLPs at ``paths`` to the masks of the modules above them; returns the hooks' handles.

    A module above that takes images and no attention mask ends the search: a text mask further up is not its.
    """
    handles: list[RemovableHandle] = []
    by_outermost: dict[str, TokenMasks] = {}
    hooked: set[str] = set()
    for path in paths:
        above = _listening(model, path)
        if not above:
            continue
        masks = by_outermost.setdefault(above[-1], TokenMasks())
        setattr(model.get_submodule(path), "token_masks", masks)  # noqa: B010 (a module, for mypy, holds tensors)
        layer = model.get_submodule(above[0])
        if above[0] not in hooked:
            for child in layer.children():
                handles.append(child.register_forward_pre_hook(_Recall(masks), with_kwargs=True))
        for name in above:
            if name in hooked:
                continue
            hooked.add(name)
            module = model.get_submodule(name)
            enter = _Enter(masks, _signature(module).index("attention_mask"))
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(_Leave(masks), always_call=True))
    return handles


def _listening(model: nn.Module, path: str) -> list[str]:
    """Dotted names of the modules above ``path``, innermost first, whose call may carry its token mask."""
    names = []
    parts = path.split(".") if path else []
    for end in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:end])
        module = model.get_submodule(name)
        if "attention_mask" in _signature(module):
            names.append(name)
        elif "pixel_values" in _signature(module):
            break
    return names


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    hidden = args[0] if args else kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _recomputing() -> bool:
    """True while autograd runs backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _signature(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
