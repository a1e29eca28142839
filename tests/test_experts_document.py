"""What docs/experts.md shows works as it stands there."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from test_expert_formats import classifiers

from wemoe_fast.config import Recipe, load_recipe
from wemoe_fast.merge import merge_to_directory

pytest.importorskip("transformers")

DOCUMENT = (Path(__file__).parent.parent / "docs" / "experts.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)


def test_the_recipe_is_one(tmp_path):
    [text] = blocks("yaml")
    names = ("acme/bert", "models/sentiment", "adapters/news", "acme/bert-debate@v2")
    for name in names:  # directories of these names win over the Hub
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.base, *recipe.experts.values()) == tuple(tmp_path / name for name in names)
    assert recipe.share


def test_every_key_of_a_recipe_is_in_the_table():
    cells = [row.split("|")[1] for row in re.findall(r"^\| `.*", DOCUMENT, re.MULTILINE)]
    assert {key for cell in cells for key in re.findall(r"`(\w+)`", cell)} == {f.name for f in fields(Recipe)}


def test_an_own_head_on_the_merged_layers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifiers(tmp_path)
    Path("recipe.yaml").write_text("base: base\nexperts: {sentiment: expert0, news: expert1}\nshare: true\n")
    merge_to_directory(load_recipe("recipe.yaml"), "merged")
    scope = {}
    exec(next(block for block in blocks("python") if "model_of" in block), scope)
    assert scope["classifier"](input_ids=torch.arange(10, 24).view(2, 7)).logits.shape == (2, 2)
