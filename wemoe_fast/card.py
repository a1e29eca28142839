"""The model card written next to a merged model."""

from __future__ import annotations

import json
from typing import Any


def model_card(description: dict[str, Any]) -> str:
    """README.md of a WEMoE directory, from the content of its wemoe.json."""
    layers = description["layers"]
    router = next(iter(layers.values()))["router"]
    base = description["model_class"] or "a PyTorch module"
    experts = description["experts"]
    lines = [
        "---",
        "library_name: wemoe-fast",
        "tags: [model-merging, wemoe, mixture-of-experts]",
        "---",
        "",
        f"# {base} merged from {len(experts)} experts with WEMoE",
        "",
        "Models fine-tuned from one pretrained model, merged into one (Tang et al., *Merging Multi-Task Models via",
        "Weight-Ensembling Mixture of Experts*, ICML 2024, arXiv 2402.00433). Outside the MLPs weights are merged by",
        "task arithmetic; inside, a router merges base weights and task vectors for every sample.",
        "",
        f"- Experts: {', '.join(experts)}",
        f"- WEMoE layers: {len(layers)}",
        f"- Router: depth {router['depth']}, normalisation {router['normalization']}"
        + (f", top {router['top_k']}" if router["top_k"] else "")
        + (", one weight per batch" if router["batch_reduce"] else ", one weight per sample"),
        f"- Written by wemoe-fast {description['wemoe_fast']}",
        "",
        "```python",
        "from wemoe_fast import load",
        "",
        'model = load("this/directory")'
        + ("" if description["model_class"] or "" in layers else "  # and base=your_module"),
        "```",
    ]
    if description["settings"]:
        lines += ["", "## How it was made", "", "```json", json.dumps(description["settings"], indent=2), "```"]
    lines += ["", "The licences of the base model and of every expert apply to this model."]
    return "\n".join(lines) + "\n"
