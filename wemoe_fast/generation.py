"""Generation with the routing weights that the prompts fix.

A router sees the tokens of a forward. In a decoding loop those are the prompt at first, then single tokens (with a
cache) or everything so far (without): the weights, and with them the text, would depend on what is cached. With
``decode_routing="prompt"`` the first forward of a generation, the prompts', decides for all that follow; with
``"step"`` every forward decides anew. Both concern generations alone: ``generate`` and ``PromptRouting``.

Beam search exchanges sequences of one prompt, whose weights are the same, so nothing has to follow the beams. A
cache that outlives ``generate`` carries the weights of its prompts, and a generation that goes on from it uses them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from .errors import InputError
from .mlp import FastWEMoEMLP
from .prompts import PromptWeights
from .sequences import MERGED_BYTES, Budget

_REMEMBERED = "_wemoe_prompts"


class PromptRouting:
    """A generation: the first forward inside of the context fixes the routing weights of all that follow.

    ``model.generate`` opens one by itself; for decoding loops of one's own. It may be left and entered again, so
    several generations can take turns:

        routing = PromptRouting(model)
        with routing:
            out = model(input_ids=prompts, attention_mask=mask, use_cache=True)
        with routing:
            out = model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True)

    Args:
        model: an upscaled model. It concerns the decoder's layers (all where the model names no decoder with
            ``get_decoder``) whose ``decode_routing`` is "prompt".
        tokens: how many tokens of the first forward are the prompt; all unless given.
        mask: [B, N], the padding of the prompts, for forwards that are given no mask of two dimensions.
        merged_bytes: memory for weights merged once per sequence, where there are few enough for it to pay (where
            no gradients are recorded).

    Raises:
        InputError: on entering, where another thread generates with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: int | None = None,
        mask: Tensor | None = None,
        merged_bytes: int = MERGED_BYTES,
    ) -> None:
        find: Any = getattr(model, "get_decoder", None)
        decoder = find() if callable(find) else model
        decoding = set((decoder if isinstance(decoder, nn.Module) else model).modules())
        self._layers = {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, FastWEMoEMLP) and layer in decoding and layer.decode_routing == "prompt"
        }
        budget = Budget(merged_bytes)
        self._prompts = {path: PromptWeights(tokens, mask, budget) for path in self._layers}
        self._before: list[dict[str, PromptWeights | None]] = []

    def __bool__(self) -> bool:
        """False where no layer is concerned."""
        return bool(self._layers)

    @property
    def weights(self) -> dict[str, Tensor]:
        """By layer, the routing weights [B, T] (or [1, T], shared) fixed so far."""
        return {path: prompt.weights.detach() for path, prompt in self._prompts.items() if prompt.weights is not None}

    def __enter__(self) -> PromptRouting:
        before = {path: layer.prompt for path, layer in self._layers.items()}
        if any(prompt is not None and prompt.thread != threading.get_ident() for prompt in before.values()):
            raise InputError(
                "generation: another thread generates with this model; wait for it, or give each thread a copy"
            )
        self._before.append(before)
        for path, layer in self._layers.items():
            layer.prompt = self._prompts[path]
            layer.prompt.thread = threading.get_ident()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before.pop()
        for path, layer in self._layers.items():
            layer.prompt = before[path]

    def leave_with(self, cache: Any) -> None:
        """Let a cache of this generation carry the routing weights, for one that goes on from it."""
        keys, weights = _keys(cache), self.weights
        if keys is not None and weights.keys() == self._prompts.keys():
            setattr(cache, _REMEMBERED, _Remembered(weights, keys))

    def go_on_from(self, cache: Any) -> None:
        """Use the routing weights that a cache carries.

        Raises:
            InputError: it carries none, or its sequences are not those it was left with.
        """
        remembered, keys = getattr(cache, _REMEMBERED, None), _keys(cache)
        if (
            not isinstance(remembered, _Remembered)
            or keys is None
            or keys.data_ptr() != remembered.keys.data_ptr()
            or remembered.weights.keys() != self._prompts.keys()
        ):
            raise InputError(
                f"generate: past_key_values: expected a cache that generate of this model returned, unchanged, cropped "
                f"or copied, because its prompts fixed the routing weights; found a {type(cache).__name__} filled or "
                "changed by something else. Give the whole prompt without a cache, or set decode_routing = 'step'"
            )
        for path, prompt in self._prompts.items():
            prompt.weights = remembered.weights[path]


@dataclass
class _Remembered:
    """What a cache carries. Its first keys tell, by their memory, whether its sequences were changed since."""

    weights: dict[str, Tensor]
    keys: Tensor


def connect_generation(model: nn.Module) -> None:
    """Give the modules of a model that can generate a ``generate`` that fixes the routing, on this instance only."""
    for module in model.modules():
        if callable(getattr(type(module), "generate", None)):
            object.__setattr__(module, "generate", _Generate(module))


class _Generate:
    """``generate`` of one model. Copied and pickled with it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.__doc__ = getattr(type(model), "generate").__doc__  # noqa: B009

    def __reduce__(self) -> tuple[type, tuple[nn.Module | None]]:
        return type(self), (self._model(),)

    def __call__(self, inputs: Any = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model()
        if model is None:
            raise InputError("generate: expected the model it was made for, which is gone; keep a reference to it")
        routing = _begin(model, inputs, generation_config, kwargs)
        with routing:
            result = type(model).generate(model, inputs, generation_config, *args, **kwargs)
        for cache in (kwargs.get("past_key_values"), getattr(result, "past_key_values", None)):
            routing.leave_with(cache)
        return result


def _begin(model: Any, inputs: Any, generation_config: Any, kwargs: Mapping[str, Any]) -> PromptRouting:
    """The generation that a call of ``generate`` is; InputError for what prompts cannot fix the routing of."""

    def setting(name: str) -> Any:
        sources = (kwargs.get(name), getattr(generation_config, name, None))
        given = next((value for value in sources if value is not None), None)
        return getattr(getattr(model, "generation_config", None), name, None) if given is None else given

    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    kind = "decoder_" if encoder_decoder else ""
    mask = kwargs.get(f"{kind}attention_mask")
    drafting = (setting("prompt_lookup_num_tokens"), setting("use_mtp"), kwargs.get("assistant_model"))
    assisted = any(value not in (None, False) for value in drafting)
    prompt = kwargs.get(f"{kind}inputs_embeds")
    if prompt is None:
        prompt = kwargs.get(f"{kind}input_ids")
    if prompt is None and not encoder_decoder:
        prompt = inputs
    # The first forward of assisted decoding holds more than the prompt: drafted tokens.
    tokens = (prompt.shape[1] if isinstance(prompt, Tensor) else 1) if assisted else None
    routing = PromptRouting(model, tokens=tokens, mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    if not routing:
        return routing
    found = {
        "prefill_chunk_size": (setting("prefill_chunk_size") is not None, "the prompt in one forward"),
        "guidance_scale": (setting("guidance_scale") not in (None, 1), "one prompt per sequence"),
        "assistant_early_exit": (setting("assistant_early_exit") is not None, "all layers in every forward"),
        "cache_implementation": (setting("cache_implementation") == "paged", "a row per sequence"),
        "decoder_input_ids": (
            assisted and encoder_decoder and prompt is not None,
            "the default start token with assisted decoding",
        ),
    }
    problems = [
        f"{name}: expected {expected}, which fixes its routing weights; leave it out, or set decode_routing = 'step'"
        for name, (present, expected) in found.items()
        if present
    ]
    if problems:
        raise InputError.of("generate", problems)
    cache = kwargs.get("past_key_values")
    if cache is not None and _length(cache):
        routing.go_on_from(cache)
    return routing


def _length(cache: Any) -> int:
    """Tokens in a cache."""
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else len(cache)


def _keys(cache: Any) -> Tensor | None:
    """The first keys [B, heads, tokens, size] in a cache of Hugging Face's."""
    cache = getattr(cache, "self_attention_cache", cache)
    listed = [getattr(layer, "keys", None) for layer in getattr(cache, "layers", None) or ()]
    listed += getattr(cache, "key_cache", None) or ()
    return next((keys for keys in listed if isinstance(keys, Tensor)), None)
