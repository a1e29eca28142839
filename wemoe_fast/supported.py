"""What can be merged, as the tables of the README."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, WAY_OUT
from .families import FAMILIES, Family
from .headers import INDEX_FILE, WEIGHTS_FILE
from .structure import DTYPES


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


EXPERT_FORMATS: tuple[tuple[str, str], ...] = (
    ("a model in memory", "`upscale`; PyTorch modules of any package, with adapters merged by peft or not"),
    ("a Hugging Face directory", f"`merge`; `{WEIGHTS_FILE}`, or shards with `{INDEX_FILE}`"),
    (
        "of another dtype, or of several",
        f"{_listed(DTYPES)}: the result has the base's; differences are formed in float32 or wider",
    ),
    (
        "a LoRA adapter over the base",
        f"`merge`; `{ADAPTER_CONFIG}` and `{ADAPTER_WEIGHTS}` of peft: ranks and alphas by module, rank-stabilised, "
        "biases, embeddings, convolutions, modules stored whole",
    ),
    ("a model or adapter on the Hub", "`merge`; `org/name` or `org/name@revision`; a directory of that name wins"),
    (
        "a model with a head or a vocabulary of its own",
        "`share: true` in the recipe, or `share`; the layers are merged, the rest stays per task",
    ),
    ("a directory of pickles", "`wemoe-fast convert` makes it safetensors first, without running code in it"),
)
"""What an expert may come as -> how it is merged."""

REFUSED: tuple[tuple[str, str], ...] = (
    ("weights of fewer than 16 bits", "load the model in a floating dtype, save that"),
    (
        "DoRA, methods other than LoRA, adapters that begin with the base's weights changed (PiSSA, OLoRA, LoftQ)",
        WAY_OUT,
    ),
    ("an adapter of weights that the base ties", "train it with the weights untied, or leave them out"),
    ("layers of another number, shape or activation", "experts are fine-tuned from one base"),
    ("a WEMoE model", "merge its experts"),
)
"""What is refused by name -> what to do."""


def table() -> str:
    """The families of architectures, the formats of experts and what is refused, in Markdown."""
    families = [
        (family.name, _formula(family), ", ".join(f"`{name}`" for name in family.examples)) for family in FAMILIES
    ]
    return "\n".join(
        [
            *_rows(("models", "their MLP", "tested on"), families),
            "",
            *_rows(("an expert is", "it is merged by"), EXPERT_FORMATS),
            "",
            *_rows(("refused, with its name", "what to do"), REFUSED),
        ]
    )


def _formula(family: Family) -> str:
    if not family.up:
        return "two linears and an activation, three if gated, whatever their names"
    act = family.activation or "act"
    hidden = f"{act}({family.up}(x))" if family.gate is None else f"{act}({family.gate}(x)) * {family.up}(x)"
    return f"`{family.down}({hidden})`"


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
