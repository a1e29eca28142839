import json
from dataclasses import replace

import pytest
import torch
from family_models import TEXT
from safetensors.torch import load_file, save_file

from wemoe_fast import CheckpointError, UnknownArchitectureError, headers
from wemoe_fast.merge import coverage, expectation
from wemoe_fast.preflight import plan_merge

transformers = pytest.importorskip("transformers")

from test_streaming import build, write  # noqa: E402


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def edit(directory, **changes):
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**content, **changes}))


@pytest.fixture
def recipe(tmp_path):
    return write(tmp_path, build("BertForMaskedLM"))


def test_no_tensor_is_read(recipe, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tensor was read")

    for directory in (recipe.base, *recipe.experts.values()):  # nothing behind the headers
        path = directory / "model.safetensors"
        data, size = path.read_bytes(), path.stat().st_size
        path.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
        with path.open("rb+") as file:
            file.truncate(size)
    monkeypatch.setattr(headers, "read_tensor", refuse)
    plan = plan_merge(recipe)
    assert all(parameter.is_meta for parameter in plan.model.parameters())


def test_every_tensor_of_every_expert_that_does_not_fit_is_in_one_report(recipe):
    def first(tensors):
        del tensors["bert.encoder.layer.1.output.dense.weight"]
        tensors["bert.pooler.dense.weight"] = torch.zeros(16, 16)
        name = "bert.encoder.layer.0.output.dense.weight"
        tensors[name] = tensors[name][:8].clone()

    def second(tensors):
        name = "bert.embeddings.LayerNorm.weight"
        tensors[name] = tensors[name].to(torch.int8)
        tensors["cls.predictions.bias"] = torch.zeros(41, dtype=torch.float8_e4m3fn)

    one, two = recipe.experts.values()
    rewrite(one, first)
    rewrite(two, second)
    with pytest.raises(CheckpointError, match="6 problems") as caught:
        plan_merge(recipe)
    message, file = str(caught.value), "model.safetensors"
    base = recipe.base / file
    for part in (
        f"'e0': bert.encoder.layer.1.output.dense.weight is missing from {one}: expected shape (16, 24) as in {base}",
        "'e0': bert.pooler.dense.weight is no part of BertForMaskedLM, the class of the base: shape (16, 16), float32, "
        f"in {one / file}",
        f"'e0': bert.encoder.layer.0.output.dense.weight: expected shape (16, 24) as in {base}, found (8, 24) in "
        f"{one / file}",
        f"'e1': bert.embeddings.LayerNorm.weight: expected a dtype like float32 for BertForMaskedLM, found int8 in "
        f"{two / file} (quantised?)",
        f"'e1': cls.predictions.bias: expected shape (40,) as in {base}, found (41,) in {two / file}",
        "'e1': cls.predictions.bias: expected a dtype like float32 for BertForMaskedLM, found float8_e4m3fn in ",
    ):
        assert part in message


def test_a_base_that_does_not_fit_its_class_is_reported_with_the_experts(recipe):
    rewrite(recipe.base, lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    rewrite(recipe.experts["e0"], lambda tensors: tensors.pop("bert.embeddings.LayerNorm.bias"))
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        plan_merge(recipe)
    assert f"base: bert.embeddings.LayerNorm.bias is missing from {recipe.base}" in str(caught.value)


def test_another_class_and_another_activation_are_refused(tmp_path, recipe):
    build("BertModel").save_pretrained(recipe.experts["e0"])
    edit(recipe.experts["e1"], hidden_act="relu")
    with pytest.raises(CheckpointError) as caught:
        plan_merge(recipe)
    assert "expected a BertForMaskedLM as" in str(caught.value)
    (tmp_path / "again").mkdir()
    recipe = write(tmp_path / "again", build("BertModel"))
    edit(recipe.experts["e1"], hidden_act="relu")
    with pytest.raises(CheckpointError, match="expected activation 'gelu' as in the base, found 'relu'"):
        plan_merge(recipe)


def test_an_expert_of_another_size_is_reported_by_its_tensors(recipe):
    small = transformers.BertConfig(**{**TEXT, "num_hidden_layers": 1, "hidden_size": 8})
    transformers.BertForMaskedLM(small).save_pretrained(recipe.experts["e0"])
    with pytest.raises(CheckpointError) as caught:
        plan_merge(recipe)
    assert "bert.encoder.layer.1.intermediate.dense.bias is missing" in str(caught.value)
    assert "bert.pooler" not in str(caught.value)
    assert "found (24, 8)" in str(caught.value)


def test_a_model_without_mlps_is_refused_by_name(tmp_path):
    cls, config = transformers.ResNetModel, transformers.ResNetConfig
    model = cls(config(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic"))
    with pytest.raises(UnknownArchitectureError, match="ResNetModel"):
        plan_merge(write(tmp_path, model))


@pytest.mark.parametrize("stored", ["as they are", "prefix", "legacy"])
def test_names_are_those_under_which_transformers_would_load_them(tmp_path, stored):
    recipe = write(tmp_path, build("BertModel"))
    for directory in (recipe.base, *recipe.experts.values()):

        def change(tensors):
            for name in list(tensors):
                new = f"bert.{name}" if stored == "prefix" else name
                if stored == "legacy":
                    new = new.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[new] = tensors.pop(name)
            tensors["embeddings.position_ids"] = torch.arange(16)[None]

        rewrite(directory, change)
    plan = plan_merge(recipe)
    assert set(plan.ignored.values()) == {("embeddings.position_ids",)}
    assert "ignored: embeddings.position_ids" in coverage(plan)


def test_coverage_says_what_becomes_of_every_tensor(recipe):
    plan = plan_merge(recipe)
    counts = [int(line[33:].split()[0]) for line in coverage(plan).splitlines()[1:]]
    merged, upscaled, routers, copied, tied, ignored = counts
    assert (upscaled, routers, copied, ignored) == (8, 8, 0, 0)
    assert tied == len(plan.aliases) == 2
    assert merged + upscaled + routers == len(plan.tensors)
    assert plan.output_bytes == sum(tensor.nbytes for tensor in set(plan.model.state_dict(keep_vars=True).values()))
    assert "1 file" in expectation(plan)
    assert "files" in expectation(plan, 1000)


def test_the_base_may_be_among_the_experts(recipe):
    plan = plan_merge(replace(recipe, experts={**recipe.experts, "same": recipe.base}))
    assert plan.model.wemoe_info.experts == ("e0", "e1", "same")
