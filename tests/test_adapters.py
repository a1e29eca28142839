"""LoRA adapters against the library that makes them: our expert is peft's merge_and_unload, streamed and in memory."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import family_models
import pytest
import torch
from safetensors.torch import load_file, save_file

from wemoe_fast import CheckpointError, InputError, streaming
from wemoe_fast.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, read_adapter, with_adapter
from wemoe_fast.config import Recipe
from wemoe_fast.convert import convert
from wemoe_fast.merge import baselines, coverage, load_recipe_models, merge_to_directory
from wemoe_fast.preflight import plan_merge

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="the library that makes adapters")

from test_streaming import files, in_memory, peak_of_merge  # noqa: E402

BERT, GPT2, LLAMA = "BERT", "GPT-2", "LLaMA"
QUERIES = {BERT: ["query", "dense"], GPT2: ["c_attn", "c_fc", "c_proj"], LLAMA: ["q_proj", "up_proj", "down_proj"]}


def base_of(name, dtype=torch.float32):
    return copy.deepcopy(family_models.base(name)).to(dtype)


def adapter(base, directory, seed=0, **options):
    """A trained adapter as peft saves it, and the expert that peft makes of it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model.merge_and_unload().eval()


def project(tmp_path, name, dtype=torch.float32, **options):
    """A base and two adapters; returns the recipe and peft's experts."""
    base = base_of(name, dtype)
    base.save_pretrained(tmp_path / "base")
    options = {"target_modules": QUERIES[name], **options}
    experts = {n: adapter(base, tmp_path / n, seed, **options) for seed, n in enumerate(("one", "two"))}
    return Recipe(tmp_path / "base", {n: tmp_path / n for n in experts}, seed=5), experts


def assert_same(ours, theirs, **tolerance):
    expected = dict(theirs.named_parameters())
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name].to(parameter.dtype), **tolerance)


OPTIONS = {
    "BERT": (BERT, {}),
    "GPT-2, Conv1D": (GPT2, {}),
    "LLaMA": (LLAMA, {}),
    "rank-stabilised": (BERT, {"use_rslora": True}),
    "patterns": (
        LLAMA,
        {"rank_pattern": {"q_proj": 1, r"layers\.1\.mlp\.up_proj": 2}, "alpha_pattern": {"^model.layers.0.*": 7}},
    ),
    "biases of its own": (BERT, {"bias": "lora_only"}),
    "all biases": (GPT2, {"bias": "all"}),
    "a bias with B": (GPT2, {"lora_bias": True}),
    "modules stored whole": (BERT, {"modules_to_save": ["pooler", "LayerNorm"]}),
    "embeddings": (LLAMA, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "all linears": (LLAMA, {"target_modules": "all-linear"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", OPTIONS)
def test_experts_are_those_of_peft_and_streamed_bit_for_bit(tmp_path, monkeypatch, case):
    name, options = OPTIONS[case]
    recipe, experts = project(tmp_path, name, **options)
    base, ours = load_recipe_models(recipe)
    for expert in experts:
        assert_same(ours[expert], experts[expert], rtol=1e-6, atol=1e-6)
        changed = [n for n, p in ours[expert].named_parameters() if not torch.equal(p, base.get_parameter(n))]
        assert len(changed) >= 4
    monkeypatch.setattr(streaming, "SLAB", 100)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapters_are_added_in_float32_or_wider(tmp_path, monkeypatch, dtype):
    recipe, experts = project(tmp_path, GPT2, dtype)
    _, ours = load_recipe_models(recipe)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in ours["one"].parameters()} == {wide}
    for expert in experts:  # peft rounds to the base's dtype, twice
        assert_same(
            ours[expert], experts[expert], rtol=2.5 * torch.finfo(dtype).eps, atol=2e-3 * (wide != dtype) + 1e-6
        )
    monkeypatch.setattr(streaming, "SLAB", 100)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}


@pytest.mark.filterwarnings("ignore")
def test_an_update_too_small_for_the_dtype_of_the_base_is_kept(tmp_path):
    recipe, _ = project(tmp_path, BERT, torch.bfloat16)
    path = recipe.experts["one"] / ADAPTER_WEIGHTS
    tensors = {name: t * (1e-4 if "lora_B" in name else 1) for name, t in load_file(path).items()}
    module = "base_model.model.encoder.layer.0.intermediate.dense"
    base = load_file(recipe.base / "model.safetensors")
    base["encoder.layer.0.intermediate.dense.bias"].fill_(1)
    save_file(base, recipe.base / "model.safetensors", metadata={"format": "pt"})
    tensors[f"{module}.bias"] = torch.full((24,), 1 + 2.0**-12)  # stored whole, in float32
    save_file(tensors, path)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stack = stored["encoder.layer.0.intermediate.up.stack"]
    assert (stored["encoder.layer.0.intermediate.up.bias"][1] == 2.0**-12).all()
    update = 5 / 3 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
    torch.testing.assert_close(stack[1].float(), update, rtol=2**-7, atol=2e-7)


@pytest.mark.filterwarnings("ignore")
def test_adapters_beside_whole_experts(tmp_path):
    recipe, experts = project(tmp_path, LLAMA)
    experts["two"].save_pretrained(tmp_path / "whole")
    recipe = replace(recipe, experts={**recipe.experts, "whole": tmp_path / "whole"})
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stack = stored["model.layers.1.mlp.up.stack"]
    torch.testing.assert_close(stack[2], stack[3], rtol=1e-4, atol=1e-6)
    rows = dict(baselines(recipe, experts=True))
    assert torch.equal(rows["expert one"].lm_head.weight, load_recipe_models(recipe)[1]["one"].lm_head.weight)
    found = json.loads((tmp_path / "out" / "merge.json").read_text())["inputs"]["experts"]["one"]
    assert found.keys() == {ADAPTER_CONFIG, ADAPTER_WEIGHTS}


@pytest.mark.filterwarnings("ignore")
def test_convolutions_are_adapted_too(tmp_path):
    config = transformers.ViTConfig(**family_models.PIXELS)
    base = transformers.ViTModel(config).eval()
    expected = adapter(base, tmp_path / "a", target_modules=["projection", "fc1", "dense"])
    ours = with_adapter(base, tmp_path / "a")
    assert_same(ours, expected, rtol=1e-6, atol=1e-6)
    patches = "embeddings.patch_embeddings.projection.weight"
    assert ours.get_parameter(patches).dim() == 4
    assert not torch.equal(ours.get_parameter(patches), base.get_parameter(patches))


@pytest.mark.filterwarnings("ignore")
def test_the_adapter_of_a_classifier_needs_share(tmp_path):
    base = base_of(BERT)
    base.save_pretrained(tmp_path / "base")
    config = transformers.BertConfig(**family_models.TEXT, num_labels=3)
    classifier = transformers.BertForSequenceClassification(config)
    classifier.bert.load_state_dict(base.state_dict())
    expert = adapter(classifier, tmp_path / "one", task_type="SEQ_CLS", target_modules=["query", "dense"])
    recipe = Recipe(tmp_path / "base", {"one": tmp_path / "one"})
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        plan_merge(recipe)
    assert "'one': classifier.weight is no part of BertModel, the class of the base" in str(caught.value)
    assert "share: true in the recipe leaves it" in str(caught.value)
    recipe = replace(recipe, share=True)
    plan = plan_merge(recipe)
    assert plan.left == {"one": ("classifier.bias", "classifier.weight")}
    assert "left to expert 'one': classifier.bias, classifier.weight" in coverage(plan)
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))
    assert_same(load_recipe_models(recipe)[1]["one"], expert.bert, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_what_is_adapted_of_a_head_that_the_base_lacks_is_left_too(tmp_path):
    base = base_of(BERT)
    base.save_pretrained(tmp_path / "base")
    model = transformers.BertForMaskedLM(transformers.BertConfig(**family_models.TEXT, tie_word_embeddings=False))
    model.bert.load_state_dict(base.state_dict(), strict=False)
    expert = adapter(model, tmp_path / "one", target_modules=["query", "dense"])
    recipe = Recipe(tmp_path / "base", {"one": tmp_path / "one"})
    head = "cls.predictions.transform.dense"
    with pytest.raises(CheckpointError, match=f"{head} is no linear layer or embedding of BertModel"):
        plan_merge(recipe)
    recipe = replace(recipe, share=True)
    assert plan_merge(recipe).left == {"one": (head,)}
    _, ours = load_recipe_models(recipe)
    found = ours["one"].encoder.layer[1].output.dense.weight
    torch.testing.assert_close(found, expert.bert.encoder.layer[1].output.dense.weight)


@pytest.fixture
def one(tmp_path):
    """A recipe with one adapter over a BERT, easily broken."""
    base = base_of(BERT)
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "one", target_modules=["query"])
    return Recipe(tmp_path / "base", {"one": tmp_path / "one"})


def configure(recipe, **changes):
    path = recipe.experts["one"] / ADAPTER_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(recipe, change):
    path = recipe.experts["one"] / ADAPTER_WEIGHTS
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, found 'IA3'; merge it into its base with peft"),
        ({"peft_type": None}, "peft_type: expected LORA, found None"),
        (
            {"use_dora": True},
            "use_dora = True: the expert is more than its base and these tensors; merge it into its base",
        ),
        ({"megatron_config": {"a": 1}}, "megatron_config = {'a': 1}: the expert"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication = [[0, 2], [1, 2]]:"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices = [3]:"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"of_the_future": 0.5}, "of_the_future = 0.5:"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa':"),
        ({"r": 0}, "r: expected an integer of at least 1, found 0"),
        ({"lora_alpha": "big"}, "lora_alpha: expected a number, found 'big'"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: expected integers of at least 1 by module"),
        ({"alpha_pattern": [3]}, "alpha_pattern: expected numbers by module, found [3]"),
        ({"r": 4}, "lora_A.weight: expected floating numbers of shape (4, 16) for rank 4, found (3, 16)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(one, changes, part):
    configure(one, **changes)
    with pytest.raises(CheckpointError) as caught:
        plan_merge(one)
    assert part in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load_recipe_models(one)
    assert part in str(caught.value)


def test_everything_wrong_with_a_configuration_comes_at_once(one):
    configure(one, use_dora=True, r=None, init_lora_weights="olora")
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        read_adapter(one.experts["one"])
    assert "use_dora = True, init_lora_weights = 'olora': the expert is more" in str(caught.value)
    assert "r: expected an integer of at least 1, found None" in str(caught.value)


QUERY = "base_model.model.encoder.layer.{}.attention.self.query.lora_{}.weight"


def without_a(tensors):
    del tensors[QUERY.format(0, "A")]


def elsewhere(tensors):
    for part in "AB":
        tensors[QUERY.format(7, part)] = tensors[QUERY.format(1, part)].clone()


def twice(tensors):
    for part in "AB":
        tensors[f"base_model.model.bert.{QUERY.format(1, part)[17:]}"] = tensors[QUERY.format(1, part)].clone()


def magnitude(tensors):
    tensors["base_model.model.encoder.layer.0.attention.self.query.lora_magnitude_vector"] = torch.ones(16)


def mis_shaped(tensors):
    tensors[QUERY.format(0, "B")] = torch.ones(17, 3)
    tensors["base_model.model.pooler.dense.bias"] = torch.ones(3)


def integers(tensors):
    tensors[QUERY.format(0, "B")] = torch.ones(16, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (without_a, "encoder.layer.0.attention.self.query: expected A and B, found lora_B.weight alone"),
        (elsewhere, "encoder.layer.7.attention.self.query is no linear layer or embedding of BertModel"),
        (twice, "encoder.layer.1.attention.self.query.weight is adapted twice"),
        (magnitude, "lora_magnitude_vector: expected lora_A and lora_B"),
        (mis_shaped, "expected floating numbers of shape (16, 3) for rank 3, found (17, 3)"),
        (mis_shaped, "pooler.dense.bias: expected floating numbers of shape (16,) as in the base, found (3,)"),
        (integers, "found (16, 3), int8"),
        (dict.clear, "expected the tensors of an adapter, found none"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_in_memory_and_before_a_merge(one, change, part):
    rewrite(one, change)
    for attempt in (plan_merge, load_recipe_models):
        with pytest.raises(CheckpointError) as caught:
            attempt(one)
        assert part in str(caught.value)


def test_share_does_not_leave_what_belongs_to_the_layers(one):
    rewrite(one, lambda tensors: tensors.update({"base_model.model.encoder.layer.9.output.dense.bias": torch.ones(16)}))
    with pytest.raises(CheckpointError, match=r"encoder.layer.9.output.dense.bias is no part of BertModel"):
        plan_merge(replace(one, share=True))


@pytest.mark.filterwarnings("ignore")
def test_tied_weights_are_not_adapted_apart(tmp_path):
    base = base_of(GPT2)
    base.save_pretrained(tmp_path / "base")
    adapter(base, tmp_path / "update", target_modules=["wte", "c_attn"])
    adapter(base, tmp_path / "whole", target_modules=["c_attn"], modules_to_save=["lm_head"])
    for name, part in (("update", "which would change with it"), ("whole", "could have only one of them")):
        with pytest.raises(CheckpointError, match=part):
            plan_merge(Recipe(tmp_path / "base", {"x": tmp_path / name}))


def test_numbers_that_are_not_finite_are_refused(one, tmp_path):
    rewrite(one, lambda tensors: tensors[QUERY.format(1, "A")].__setitem__((0, 2), float("nan")))
    with pytest.raises(InputError) as caught:
        merge_to_directory(one, tmp_path / "out")
    assert "expert 'one': base + scaling * B A, with B base_model.model.encoder.layer.1" in str(caught.value)
    assert "found 16 NaN or infinite" in str(caught.value)


def test_files_that_are_missing_pickled_or_too_many_are_named(one, tmp_path):
    directory = one.experts["one"]
    assert is_adapter(directory)
    with pytest.raises(CheckpointError, match="whole checkpoint as the base, found an adapter"):
        plan_merge(replace(one, base=directory))
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found both, adapter_config.json and model.safetensors"):
        plan_merge(one)
    (directory / "model.safetensors").unlink()
    expected = load_file(directory / ADAPTER_WEIGHTS)
    torch.save(expected, directory / "adapter_model.bin")
    (directory / "optimizer.pt").write_bytes(b"of the training")
    (directory / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model.bin, a pickle"):
        plan_merge(one)
    convert(directory, tmp_path / "safe")
    assert sorted(path.name for path in (tmp_path / "safe").iterdir()) == [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    found = load_file(tmp_path / "safe" / ADAPTER_WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    plan_merge(replace(one, experts={"one": tmp_path / "safe"}))
    (directory / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_model.safetensors beside adapter_config.json"):
        plan_merge(one)


def test_what_an_adapter_is_and_another_base_are_reported(one):
    assert plan_merge(one).notes == ("expert 'one' is a LoRA adapter of rank 3: 2 tensors adapted, 0 replaced",)
    configure(one, base_model_name_or_path="somebody/bert-large")
    _, other = plan_merge(one).notes
    assert "its adapter was trained on 'somebody/bert-large', the recipe's base is 'base'" in other
    assert other in coverage(plan_merge(one))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
@pytest.mark.filterwarnings("ignore")
def test_memory_does_not_grow_with_the_model_and_the_number_of_adapters(tmp_path, monkeypatch):
    """A base of 12 MiB in bfloat16 and four adapters: whole models would take 100 MiB and more."""
    monkeypatch.setattr(streaming, "SLAB", 1 << 16)
    sizes = {"hidden_size": 256, "intermediate_size": 2048, "vocab_size": 8000}
    base = transformers.BertModel(transformers.BertConfig(**{**family_models.TEXT, **sizes})).bfloat16()
    base.save_pretrained(tmp_path / "base")
    for number in range(4):
        adapter(base, tmp_path / f"a{number}", number, r=8, target_modules=["query", "dense", "word_embeddings"])
    recipe = Recipe(tmp_path / "base", {f"a{n}": tmp_path / f"a{n}" for n in range(4)})
    assert peak_of_merge(recipe, tmp_path) <= streaming.workspace_bytes(plan_merge(recipe)) < 24 << 20
