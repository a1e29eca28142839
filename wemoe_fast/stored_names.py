"""The names under which a model's class knows its tensors, and those under which checkpoints may store them."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from torch import Tensor, nn


class StoredNames:
    """Stored names against those of a model, which may be on the meta device.

    Attributes:
        model: whose names they are.
        targets: its tensors by name.
        parameters: the names of those that are parameters.
        first: name -> the first name of the same tensor, where weights are tied.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.parameters = {name for name, tensor in self.targets.items() if isinstance(tensor, nn.Parameter)}
        self.prefix: str = getattr(model, "base_model_prefix", "")
        ids: dict[int, list[str]] = defaultdict(list)
        for name, tensor in self.targets.items():
            ids[id(tensor)].append(name)
        self.first = {name: names[0] for names in ids.values() for name in names}
        self._renamings, self._converters = _transforms(model)
        self._ignored = _patterns(model)

    def of(self, stored: str) -> str | None:
        """The model's name for a stored tensor; None for one that it has no place for."""
        for name in dict.fromkeys([self._renamed(stored), stored]):
            for candidate in (self._without_prefix(name), name, f"{self.prefix}.{name}"):
                if candidate in self.targets:
                    return candidate
        return None

    def ignores(self, stored: str) -> bool:
        """True for what old versions stored and nobody needs."""
        return any(pattern.search(stored) for pattern in self._ignored)

    def converted(self, stored: str) -> bool:
        """True where loading would take the tensor apart or join it with others."""
        return any(converter.rename_source_key(stored)[1] is not None for converter in self._converters)

    def _renamed(self, name: str) -> str:
        for renaming in self._renamings:
            name = renaming(name)
        return name

    def _without_prefix(self, name: str) -> str:
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name


def _transforms(model: Any) -> tuple[list[Any], list[Any]]:
    """What transformers does to stored names: functions of a name, and converters of tensors."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before 5.0
        mapping: dict[str, str] = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        old = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias", **mapping}
        return [lambda name, a=a, b=b: re.sub(a, b, name) for a, b in old.items()], []
    transforms = get_model_conversion_mapping(model)
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    return [lambda name, r=r: r.rename_source_key(name)[0] for r in renamings], converters


def _patterns(model: Any) -> list[re.Pattern[str]]:
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    patterns |= {r"rotary_emb\.inv_freq"} if "inv_freq" in buffers else set()
    patterns |= {r"(^|\.)position_ids$"} if "position_ids" in buffers else set()
    return [re.compile(pattern) for pattern in sorted(patterns)]
