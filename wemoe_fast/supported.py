"""What can be merged, as the tables of the README."""

from __future__ import annotations

from collections.abc import Sequence

from .families import FAMILIES, Family

EXPERT_FORMATS: tuple[tuple[str, str], ...] = (
    ("a model in memory", "`upscale`; PyTorch modules of any package"),
    ("a Hugging Face directory", "`merge`; safetensors in one file or in shards, float16 to float64"),
    ("a directory of pickles", "`wemoe-fast convert` makes it safetensors first, without running code in it"),
    ("a model with a head or a vocabulary of its own", "`share`; the layers are merged, the rest stays per task"),
)
"""What an expert may come as -> how it is merged."""


def table() -> str:
    """The families of architectures and the formats of experts, in Markdown."""
    families = [
        (family.name, _formula(family), ", ".join(f"`{name}`" for name in family.examples)) for family in FAMILIES
    ]
    return "\n".join(
        [
            *_rows(("models", "their MLP", "tested on"), families),
            "",
            *_rows(("an expert is", "it is merged by"), EXPERT_FORMATS),
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
