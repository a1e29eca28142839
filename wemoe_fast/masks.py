"""How the attention mask given to a model reaches its routers as a token mask.

A router averages over a sample's tokens, so it has to know which of them are padding. The modules of a model
that take an ``attention_mask`` note the two-dimensional mask of the call in a ``TokenMasks`` shared with the
MLPs below them, and drop it when the call ends. Masks of other shapes ([B, 1, N, N], dictionaries) say nothing
about padding by themselves: the two-dimensional one of the call around counts.

Activation checkpointing runs layers again during backward, outside of the model's call. It keeps the layers'
inputs alive for that, so an input that is alive, known by its address, identifies the first run and its mask.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InputError

_FRAMES = {"input_features", "input_values"}
"""Arguments of a model of sounds: its masks count frames, of which several become a token, and are no token masks."""

_INPUTS = {"input_ids", "pixel_values"} | _FRAMES
"""Arguments of a whole model: called without a mask it has none, whatever the model around it was given."""

_Key = tuple[int, torch.Size]


@dataclass
class _FirstRun:
    """The input of a module's call and the mask it had; ``ambiguous`` once it had another one."""

    hidden: weakref.ref[Tensor]
    mask: Tensor | None
    ambiguous: bool = False


class TokenMasks:
    """The masks of the calls under way, innermost last. Copied and pickled with the model, without content."""

    def __init__(self) -> None:
        self.calls: list[Tensor | None] = []
        self._by_input: dict[_Key, _FirstRun] = {}
        self._recalled: tuple[int, Tensor | None] | None = None
        self._masked = False
        self._last_hook = -1

    def for_tokens(self, hidden: Tensor) -> Tensor | None:
        """The mask [B, N] of hidden states [B, N, d], or None; of a longer mask (cached tokens) the last N."""
        mask = self.calls[-1] if self.calls else self._recall(hidden)
        if mask is None:
            return None
        if mask.shape[0] != hidden.shape[0] or mask.shape[1] < hidden.shape[1]:
            raise InputError(
                f"attention_mask: expected [B, N] = {tuple(hidden.shape[:2])} or longer, found {tuple(mask.shape)}; "
                "pass token_mask to the FastWEMoEMLP where the model changes the number of tokens"
            )
        return mask[:, mask.shape[1] - hidden.shape[1] :]

    def enter(self, mask: Tensor | None, hidden: Tensor | None, inherits: bool) -> None:
        """Begin a call. Without a [B, N] mask of its own it may inherit that of the call around it."""
        self.calls.append(mask)
        if mask is None and inherits:
            self.calls[-1] = self.calls[-2] if len(self.calls) > 1 else self._recall(hidden)
        self._remember(hidden, self.calls[-1])

    def leave(self) -> None:
        """End the innermost call."""
        if self.calls:
            self.calls.pop()

    def note(self, hidden: Tensor | None) -> None:
        """Remember, or in a second run recall, the mask that goes with an input."""
        if self.calls or not _recomputing():
            self._remember(hidden, self.calls[-1] if self.calls else None)
        elif self._known(hidden) is not None:
            self._recall(hidden)

    def _recall(self, hidden: Tensor | None) -> Tensor | None:
        """The mask that went with an input in the first run, or with the last input known in this backward."""
        if not _recomputing():
            return None
        run, task = self._known(hidden), torch._C._current_graph_task_id()
        if run is not None and not run.ambiguous:
            self._recalled = (task, run.mask)
        elif run is not None or (self._masked and (self._recalled is None or self._recalled[0] != task)):
            raise InputError(
                "activation checkpointing: expected the layer's input of the forward pass, which its attention mask "
                f"is known by, found {'one tensor used with several masks' if run else 'another tensor'}; give every "
                "forward pass a tensor of its own and leave it where it is, or pass token_mask to the FastWEMoEMLP"
            )
        return None if self._recalled is None else self._recalled[1]

    def _known(self, hidden: Tensor | None) -> _FirstRun | None:
        key = _key(hidden)
        return None if key is None else self._by_input.get(key)

    def _remember(self, hidden: Tensor | None, mask: Tensor | None) -> None:
        key = _key(hidden)
        if key is None or hidden is None:
            return
        self._masked |= mask is not None
        known = self._known(hidden)
        if known is not None:
            known.ambiguous |= not _same(known.mask, mask)
            return
        runs = self._by_input

        def forget(reference: weakref.ref[Tensor]) -> None:
            if key in runs and runs[key].hidden is reference:
                del runs[key]

        runs[key] = _FirstRun(weakref.ref(hidden, forget), mask)

    def __getstate__(self) -> dict[str, Any]:
        return vars(TokenMasks()) | {"_last_hook": self._last_hook}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In a new process numbers start again, and a new hook would take the place of one of ours.
        vars(self).update(state)
        RemovableHandle.next_id = max(RemovableHandle.next_id, self._last_hook + 1)

    def __deepcopy__(self, memo: dict[int, Any]) -> TokenMasks:
        return TokenMasks()


class _Enter:
    """Forward pre-hook."""

    def __init__(self, masks: TokenMasks, parameters: list[str], outermost: bool) -> None:
        self.masks, self.position = masks, parameters.index("attention_mask")
        self.outermost, self.whole_model = outermost, not _INPUTS.isdisjoint(parameters)
        self.frames = not _FRAMES.isdisjoint(parameters)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[self.position] if len(args) > self.position else kwargs.get("attention_mask")
        mask = given if isinstance(given, Tensor) and given.dim() == 2 and not self.frames else None
        inherits = not self.outermost and not self.frames and not (given is None and self.whole_model)
        self.masks.enter(mask, _input(args, kwargs), inherits)


class _Leave:
    """Forward hook, called even when the call fails."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.masks.leave()


class _Note:
    """Forward pre-hook of the MLPs and of a layer's children: they may be what is run again."""

    def __init__(self, masks: TokenMasks) -> None:
        self.masks = masks

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.masks.note(_input(args, kwargs))


def connect(model: nn.Module, paths: Iterable[str]) -> list[RemovableHandle]:
    """Connect the FastWEMoEMLPs at ``paths`` to the masks of the modules above them; returns the hooks' handles.

    A module above that takes images and no attention mask ends the search: a text mask further up is not its.
    """
    handles: list[RemovableHandle] = []
    by_outermost: dict[str, TokenMasks] = {}
    listening: set[nn.Module] = set()
    noting: set[nn.Module] = set()
    for path in paths:
        above = _listening(model, path)
        if not above:
            continue
        mlp = model.get_submodule(path)
        known = getattr(mlp, "token_masks", None)  # of a layer that several models share
        masks = by_outermost.setdefault(above[-1], known or TokenMasks())
        setattr(mlp, "token_masks", masks)  # noqa: B010 (a module, for mypy, holds tensors)
        for name in above:
            module = model.get_submodule(name)
            if module in listening:
                continue
            listening.add(module)
            enter = _Enter(masks, _signature(module), outermost=name == above[-1])
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(_Leave(masks), always_call=True))
        for module in (*model.get_submodule(above[0]).children(), mlp):
            if module not in noting | listening and (module is not mlp or known is None):
                noting.add(module)
                handles.append(module.register_forward_pre_hook(_Note(masks), with_kwargs=True))
    for masks in by_outermost.values():
        masks._last_hook = handles[-1].id
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
    hidden = args[0] if args else kwargs.get("hidden_states", kwargs.get("inputs_embeds"))
    return hidden if isinstance(hidden, Tensor) and hidden.is_floating_point() else None


def _key(hidden: Tensor | None) -> _Key | None:
    """Identifies a tensor as long as it lives; None where it has no memory of its own or nobody will ask."""
    if hidden is None or torch.compiler.is_compiling():
        return None
    try:
        return (hidden.data_ptr(), hidden.shape) if hidden.data_ptr() else None
    except RuntimeError:  # inside of torch.func and tracers
        return None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one is other:
        return one is other
    return one.shape == other.shape and one.device == other.device and bool((one == other).all())


def _recomputing() -> bool:
    """True while autograd runs backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _signature(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
