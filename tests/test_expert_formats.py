"""Whole checkpoints that differ from the base in dtype, head or vocabulary: merged as the loaded models would be."""

import json
from dataclasses import replace

import pytest
import torch
from family_models import TEXT
from safetensors.torch import load_file

from wemoe_fast import CheckpointError, share, streaming, wemoe_layers
from wemoe_fast.config import Recipe
from wemoe_fast.merge import baselines, coverage, load_recipe_models, merge, merge_to_directory
from wemoe_fast.preflight import plan_merge

transformers = pytest.importorskip("transformers")

from test_preflight import edit, rewrite  # noqa: E402
from test_streaming import build, files, in_memory, write  # noqa: E402


@pytest.fixture
def recipe(tmp_path):
    return write(tmp_path, build("BertForMaskedLM"))


def retype(directory, dtype, chosen=lambda name: True):
    """Store tensors in another dtype; the configuration stays what it is."""
    rewrite(directory, lambda tensors: tensors.update({n: t.to(dtype) for n, t in tensors.items() if chosen(n)}))


def declare(directory, dtype):
    """The dtype in which a checkpoint is loaded; None leaves it to the first tensor."""
    content = json.loads((directory / "config.json").read_text())
    content.pop("dtype", None)
    content.pop("torch_dtype", None)
    (directory / "config.json").write_text(json.dumps({**content, **({"dtype": dtype} if dtype else {})}))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize(("base", "expert"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "float64")])
def test_experts_of_another_dtype_are_merged_as_loaded_models_are(tmp_path, monkeypatch, name, base, expert):
    recipe = write(tmp_path, build(name), max_shard_size="4KB")
    for number, directory in enumerate((recipe.base, *recipe.experts.values())):
        dtype = base if number == 0 else expert
        getattr(transformers, name).from_pretrained(directory, dtype=getattr(torch, dtype)).save_pretrained(
            directory, max_shard_size="4KB"
        )
    monkeypatch.setattr(streaming, "SLAB", 100)
    plan = plan_merge(recipe)
    wide = "float32"
    assert plan.notes == tuple(
        f"expert {e!r} is {expert}, the base {base}: they are subtracted in {wide}, and the result is {base}"
        for e in recipe.experts
    )
    assert plan.notes[0] in coverage(plan)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {f"torch.{base}"}


@pytest.mark.parametrize("declared", ["bfloat16", "float32", None])
def test_an_expert_of_mixed_dtypes_is_taken_as_transformers_loads_it(tmp_path, monkeypatch, recipe, declared):
    one, _ = recipe.experts.values()
    retype(one, torch.bfloat16, lambda name: "LayerNorm" not in name)
    declare(one, declared)
    monkeypatch.setattr(streaming, "SLAB", 100)
    plan = plan_merge(recipe)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    stored = "tensors are stored in float32 and taken as bfloat16, as transformers loads them"
    assert any(stored in note for note in plan.notes) == (declared == "bfloat16")
    assert any("stored in bfloat16 and taken as float32" in note for note in plan.notes) == (declared != "bfloat16")


def test_the_dtype_that_nothing_declares_is_that_of_the_first_tensor_by_name(tmp_path, recipe):
    one, two = recipe.experts.values()
    first = "bert.embeddings.LayerNorm.bias"
    for directory, dtype in ((one, torch.float16), (two, torch.float64)):
        declare(directory, None)
        retype(directory, dtype, lambda name: name == first)
    plan = plan_merge(recipe)
    assert [note.partition(",")[0] for note in plan.notes if " is " in note] == [
        "expert 'e0' is float16", "expert 'e1' is float64"
    ]  # fmt: skip
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))


def classifiers(tmp_path, **changes):
    """A base without a head, and classifiers of two and five labels over it."""
    base = build("BertModel")
    base.save_pretrained(tmp_path / "base")
    for number, labels in enumerate((2, 5)):
        config = transformers.BertConfig(**{**TEXT, **(changes if number else {})}, num_labels=labels)
        expert = transformers.BertForSequenceClassification(config)
        for path, parameter in expert.named_parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
            if path.startswith("bert.encoder"):
                parameter.data += base.get_parameter(path.removeprefix("bert.")).data
        expert.save_pretrained(tmp_path / f"expert{number}", max_shard_size="6KB")
    return Recipe(tmp_path / "base", {f"e{n}": tmp_path / f"expert{n}" for n in range(2)}, seed=5)


@pytest.mark.parametrize("changes", [{}, {"vocab_size": 43}])
def test_with_share_heads_and_vocabularies_are_left(tmp_path, monkeypatch, changes):
    recipe = classifiers(tmp_path, **changes)
    words = ("embeddings.word_embeddings.weight",)
    with pytest.raises(CheckpointError) as caught:
        plan_merge(recipe)
    assert "expected a BertModel as" in str(caught.value)
    assert "share: true in the recipe merges the layers alone, without" in str(caught.value)
    recipe = replace(recipe, share=True)
    plan = plan_merge(recipe)
    base, experts = load_recipe_models(recipe)
    expected = share(base, experts)
    assert (plan.left, plan.kept) == (expected.left, expected.kept)
    assert plan.kept == (words if changes else ())
    assert "left to expert 'e0': " in coverage(plan)
    assert "classifier.weight, classifier.bias" in coverage(plan)
    assert ("the base's alone: embeddings.word_embeddings.weight" in coverage(plan)) == bool(changes)
    monkeypatch.setattr(streaming, "SLAB", 100)
    model = merge(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["left"]["e1"] == list(expected.left["e1"])
    own = expected.model_of("e1", model)
    assert own(input_ids=torch.arange(10, 24).view(2, 7)).logits.shape == (2, 5)
    rows = dict(baselines(recipe, experts=True))
    assert {type(row).__name__ for row in rows.values()} == {"BertModel"}


def test_share_changes_nothing_where_everything_fits(tmp_path, recipe):
    for name, asked in (("a", recipe), ("b", replace(recipe, share=True))):
        merge_to_directory(asked, tmp_path / name)
    a, b = (files(tmp_path / name) for name in "ab")
    assert a == b


def test_share_does_not_leave_layers(tmp_path):
    recipe = replace(classifiers(tmp_path), share=True)
    rewrite(recipe.base, lambda tensors: tensors.pop("encoder.layer.0.output.dense.bias"))
    edit(recipe.experts["e0"], hidden_act="relu")
    with pytest.raises(CheckpointError, match=r"base: encoder.layer.0.output.dense.bias is missing"):
        plan_merge(recipe)
    recipe = replace(recipe, base=recipe.experts["e1"])
    with pytest.raises(CheckpointError, match="expected activation 'gelu' as in the base, found 'relu'"):
        plan_merge(recipe)


def test_tensors_missing_inside_of_layers_get_no_advice_to_share(recipe):
    rewrite(recipe.experts["e0"], lambda tensors: tensors.pop("bert.encoder.layer.0.output.dense.bias"))
    with pytest.raises(CheckpointError) as caught:
        plan_merge(recipe)
    assert "share" not in str(caught.value)


@pytest.mark.parametrize("routing", ["prompt", "step"])
def test_how_a_model_routes_while_it_generates_is_in_the_recipe(tmp_path, routing):
    recipe = replace(write(tmp_path, build("LlamaForCausalLM")), decode_routing=routing)
    model = merge(recipe, tmp_path / "out")
    assert {layer.decode_routing for layer in wemoe_layers(model).values()} == {routing}
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
