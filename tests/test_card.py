import json

import pytest
import yaml

from wemoe_fast.card import model_card

LAYER = {"router": {"depth": 2, "normalization": "softmax", "top_k": 3, "batch_reduce": False}}


def description(**changes):
    return {
        "model_class": "BertModel",
        "wemoe_fast": "0.1.0",
        "experts": ["sentiment", "topics"],
        "layers": {"0.mlp": LAYER, "1.mlp": LAYER},
        "settings": {"merge_lambda": 0.3, "adaptation": {"steps": 40}},
        **changes,
    }


def test_the_card_says_what_the_model_is():
    card = model_card(description())
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "wemoe-fast"
    for part in (
        "# BertModel merged from 2 experts with WEMoE",
        "- Experts: sentiment, topics",
        "- WEMoE layers: 2",
        "depth 2, normalisation softmax, top 3, one weight per sample",
        "wemoe-fast 0.1.0",
        "licences",
    ):
        assert part in body
    assert card.endswith("\n")


def test_the_settings_can_be_read_back():
    block = model_card(description()).split("```json\n")[1].split("```")[0]
    assert json.loads(block) == {"merge_lambda": 0.3, "adaptation": {"steps": 40}}
    assert "How it was made" not in model_card(description(settings={}))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 'load("this/directory")\n'),
        ({"model_class": None}, 'load("this/directory")  # and base=your_module\n'),
        ({"model_class": None, "layers": {"": LAYER}}, 'load("this/directory")\n'),
    ],
)
def test_the_example_is_how_this_model_is_loaded(changes, code):
    example = model_card(description(**changes)).split("```python\n")[1].split("```")[0]
    assert example.endswith("model = " + code)
    compile(example, "example", "exec")


def test_shared_routing_is_mentioned():
    router = {"depth": 0, "normalization": "identity", "top_k": None, "batch_reduce": True}
    card = model_card(description(layers={"0": {"router": router}}))
    assert "depth 0, normalisation identity, one weight per batch" in card
    assert "top" not in card.split("- Router")[1].split("\n")[0]
