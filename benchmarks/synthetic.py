"""Small checkpoints made up from a seed, for harnesses that need files and not their meaning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from wemoe_fast.sharded import Piece, TensorSpec, plan_shards, write_shards

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}


def write_recipe(
    directory: Path, *, experts: int = 2, seed: int = 0, max_shard_bytes: int = 5 << 30, **sizes: int
) -> Path:
    """Write a BERT of these sizes and experts of it, random, beside a recipe.yaml; returns the recipe's path.

    Tensors are made and written one at a time.
    """
    import transformers

    all_sizes: dict[str, Any] = {**SIZES, **sizes}
    config = transformers.BertConfig(**all_sizes, architectures=["BertModel"], dtype="float32")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in transformers.BertModel(config).state_dict().items()}
    specs = [TensorSpec(name, torch.float32, shape) for name, shape in shapes.items()]
    names = [f"expert{number}" for number in range(experts)]
    for place, name in enumerate(["base", *names]):
        (directory / name).mkdir(parents=True)
        config.to_json_file(directory / name / "config.json", use_diff=False)
        generator = torch.Generator().manual_seed(1000 * seed + place)

        def values(spec: TensorSpec, generator: torch.Generator = generator) -> Iterator[Piece]:
            yield 0, torch.randn(spec.shape, generator=generator)

        for _ in write_shards(plan_shards(specs, max_shard_bytes), directory / name, values):
            pass
    recipe = directory / "recipe.yaml"
    content = {"base": "base", "experts": {name: name for name in names}, "router_depth": 1}
    recipe.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return recipe
