import copy
import ctypes
import gc
import json
from pathlib import Path

import family_models
import pytest
import torch
from family_models import PIXELS, TEXT
from safetensors.torch import load_file, save_file

from wemoe_fast import CheckpointError, InputError, load, save, streaming, upscale
from wemoe_fast.config import Recipe
from wemoe_fast.merge import load_recipe_models, merge, merge_to_directory
from wemoe_fast.preflight import plan_merge
from wemoe_fast.shared import share

transformers = pytest.importorskip("transformers")


def build(name, dtype=torch.float32, **options):
    torch.manual_seed(0)
    known = PIXELS if name.startswith(("CLIPVision", "ViT", "Siglip")) else TEXT
    cls = getattr(transformers, name)
    return cls(cls.config_class(**known, **options)).to(dtype).eval()


def write(directory, base, experts=2, **options):
    """Save a base and experts; returns the recipe."""
    base.save_pretrained(directory / "base", **options)
    for number in range(experts):
        expert = copy.deepcopy(base)
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        expert.save_pretrained(directory / f"expert{number}", **options)
    return Recipe(base=directory / "base", experts={f"e{n}": directory / f"expert{n}" for n in range(experts)}, seed=5)


def in_memory(recipe, directory):
    """What merging whole models gives."""
    base, experts = load_recipe_models(recipe)
    if recipe.share:
        experts = share(base, experts).experts
    settings = {name: value for name, value in vars(recipe).items() if name not in ("base", "experts", "share")}
    settings["router_depth"] = recipe.router_depth
    model = upscale(base, experts, **settings)
    names = {"base": recipe.base.name, "experts": {n: p.name for n, p in recipe.experts.items()}, "seed": recipe.seed}
    return save(model, directory, files_from=recipe.base, settings=names)


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "merge.json"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("BertModel", torch.float32),
        ("BertModel", torch.float64),
        ("BertForMaskedLM", torch.bfloat16),
        ("CLIPVisionModel", torch.float16),
        ("CLIPVisionModelWithProjection", torch.float32),
        ("SiglipVisionModel", torch.float32),
        ("ViTModel", torch.bfloat16),
        ("LlamaForCausalLM", torch.float32),
    ],
)
def test_the_bytes_are_those_of_merging_whole_models(tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr(streaming, "SLAB", 100)  # most tensors take several slabs, with ragged ends
    recipe = write(tmp_path, build(name, dtype))
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))


@pytest.mark.parametrize("name", ["GPT-2", "T5", "T5 1.1", "Whisper", "DistilBERT", "Qwen3"])
def test_the_bytes_of_other_families_are_too(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streaming, "SLAB", 100)
    recipe = write(tmp_path, copy.deepcopy(family_models.base(name)))
    merge_to_directory(recipe, tmp_path / "out")
    assert files(tmp_path / "out") == files(in_memory(recipe, tmp_path / "expected"))


@pytest.mark.parametrize("depth", [0, 1])
def test_routers_are_those_of_upscale(tmp_path, depth):
    recipe = write(tmp_path, build("BertModel"))
    recipe = Recipe(**{**vars(recipe), "router_depth": depth, "init_lambda": 0.7, "merge_lambda": -0.2})
    merge_to_directory(recipe, tmp_path / "out", max_shard_bytes=3000)
    expected = load_file(in_memory(recipe, tmp_path / "expected") / "model.safetensors")
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_shards_in_and_out_make_no_difference_to_what_is_in_them(tmp_path):
    base = build("BertModel")
    (tmp_path / "many").mkdir()
    one, many = write(tmp_path, base), write(tmp_path / "many", base, max_shard_size="8KB")
    for name in vars(one)["experts"]:  # the same experts, in other files
        source = load_file(one.experts[name] / "model.safetensors")
        index = json.loads((many.experts[name] / "model.safetensors.index.json").read_text())["weight_map"]
        for file in set(index.values()):
            save_file({key: source[key] for key in source if index[key] == file}, many.experts[name] / file)
    for recipe, out in ((one, "a"), (many, "b")):
        merge_to_directory(recipe, tmp_path / out, max_shard_bytes=9000)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 3
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    whole = merge(one, tmp_path / "whole")
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.state_dict().values())
    again = load(tmp_path / "a").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.state_dict().items())


def test_numbers_that_are_not_finite_are_named_with_file_and_count(tmp_path):
    recipe = write(tmp_path, build("BertModel"))
    path = recipe.experts["e1"] / "model.safetensors"
    tensors = load_file(path)
    tensors["pooler.dense.bias"][2:5] = float("nan")
    tensors["encoder.layer.0.intermediate.dense.weight"][0, 0] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="2 problems") as caught:
        merge_to_directory(recipe, tmp_path / "out")
    message = str(caught.value)
    assert f"expert 'e1': pooler.dense.bias: expected finite numbers, found 3 NaN or infinite in {path}" in message
    assert "encoder.layer.0.intermediate.dense.weight: expected finite numbers, found 1 NaN" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "expert0", "expert1"]
    merge_to_directory(recipe, tmp_path / "out", allow_nonfinite=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["pooler.dense.bias"].isnan().sum() == 3


def test_tied_tensors_that_are_stored_twice_must_be_equal(tmp_path):
    recipe = write(tmp_path, build("BertForMaskedLM"))
    for name, change in (("e0", 0.0), ("e1", 1.0)):
        path = recipe.experts[name] / "model.safetensors"
        tensors = load_file(path)
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + change
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="as the model ties them") as caught:
        merge_to_directory(recipe, tmp_path / "out")
    assert "expert1" in str(caught.value)
    assert "expert0" not in str(caught.value)


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path, monkeypatch):
    recipe = write(tmp_path, build("BertModel"))
    check = streaming._check_twins

    def touched(plan):
        check(plan)
        (recipe.base / "config.json").write_text((recipe.base / "config.json").read_text() + " ")

    monkeypatch.setattr(streaming, "_check_twins", touched)
    with pytest.raises(CheckpointError, match="changed during the merge"):
        merge_to_directory(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_does_not_grow_with_the_model_and_the_number_of_experts(tmp_path, monkeypatch):
    """Six models of 9 MiB: a merge of whole models would take 100 MiB and more."""
    monkeypatch.setattr(streaming, "SLAB", 1 << 16)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2000}
    recipe = write(tmp_path, transformers.BertModel(transformers.BertConfig(**{**TEXT, **sizes})), 5)
    assert peak_of_merge(recipe, tmp_path) <= streaming.workspace_bytes(plan_merge(recipe)) < 24 << 20


def peak_of_merge(recipe, folder):
    """What a merge takes beside what is resident before it, once everything is imported."""
    merge_to_directory(recipe, folder / "warm", max_shard_bytes=4 << 20)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmHWM")
    merge_to_directory(recipe, folder / "out", max_shard_bytes=4 << 20)
    return resident("VmHWM") - before


def resident(name):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10
