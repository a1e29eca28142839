import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from family_models import TEXT
from safetensors.torch import load_file, save_file
from torch import nn

import wemoe_fast.checkpoint as checkpoint
from wemoe_fast import CheckpointError, accelerate_, atomic, expert_names, load, save, upscale, wemoe_layers
from wemoe_fast.checkpoint import is_wemoe_directory, load_pretrained, outline
from wemoe_fast.inspection import inspect
from wemoe_fast.upscale import merge_info

IDS = torch.arange(10, 24).view(2, 7)
MASK = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])


def bert(name="BertModel", dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**TEXT)).to(dtype).eval()


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)), nn.LayerNorm(6))


def perturbed(base, scale=0.1):
    expert = copy.deepcopy(base)
    for parameter in expert.parameters():
        parameter.data += scale * torch.randn_like(parameter)
    return expert


def merged(base, **options):
    model = upscale(base, {name: perturbed(base) for name in ("one", "two")}, **options)
    for layer in wemoe_layers(model).values():
        for parameter in layer.router.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def run(model):
    with torch.no_grad():
        if hasattr(model, "config"):
            return model(input_ids=IDS, attention_mask=MASK)[0]
        return model(torch.linspace(-1, 1, 60).view(2, 5, 6))


def edit(directory, change, file="wemoe.json"):
    content = json.loads((directory / file).read_text())
    changed = change(content)
    (directory / file).write_text(json.dumps(content if changed is None else changed))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def snapshot(directory):
    return {path.relative_to(directory): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.fixture
def saved(tmp_path):
    return save(merged(stack()), tmp_path / "saved")


@pytest.fixture
def saved_bert(tmp_path):
    return save(merged(bert()), tmp_path / "saved")


def refused(directory, match=None, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        load(directory, **options)
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"router_depth": 0},
        {"router_depth": 1},
        {"router_depth": 2},
        {"normalization": "softmax", "temperature": 0.5, "top_k": 1},
        {"normalization": "sigmoid", "batch_reduce": True},
        {"batch_invariant": True, "router_depth": 1},
    ],
)
def test_a_loaded_model_is_the_same_bit_for_bit(tmp_path, dtype, options):
    model = merged(bert(dtype=dtype), **options)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    twin = load(save(model, tmp_path / "a", settings={"note": "x"}))
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(run(twin), run(model))
    assert {n: (p.dtype, p.requires_grad) for n, p in twin.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()
    }
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    assert repr(twin) == repr(model)
    assert type(twin) is type(model)
    assert expert_names(twin) == ("one", "two")
    assert merge_info(twin).settings == {"merge_lambda": 0.3, "init_lambda": 0.3, "note": "x"}
    assert not any(module.training for module in twin.modules())
    again = save(twin, tmp_path / "b")
    assert snapshot(again) == snapshot(tmp_path / "a")


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM"])
def test_an_outline_is_what_load_reads_without_the_weights(tmp_path, name):
    directory = save(merged(bert(name, torch.bfloat16)), tmp_path / "a", max_shard_bytes=5000)
    found, expected = outline(directory), load(directory)
    assert {n: (t.shape, t.dtype) for n, t in found.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in expected.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in found.parameters())
    assert inspect(found) == inspect(expected)


def test_gated_mlps_and_masks_survive(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = merged(transformers.LlamaModel(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)))
    twin = load(save(model, tmp_path / "a"))
    assert torch.equal(run(twin), run(model))
    with torch.no_grad():
        assert not torch.equal(twin(input_ids=IDS)[0][0], run(twin)[0])


@pytest.mark.parametrize("limit", [1, 5000, 20000])
def test_shards_hold_what_one_file_holds(tmp_path, limit):
    model = merged(bert())
    directory = save(model, tmp_path / "shards", max_shard_bytes=limit)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for name in files:
        tensors = load_file(directory / name)
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
        assert {index["weight_map"][key] for key in tensors} == {name}
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert torch.equal(run(load(directory)), run(model))


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT"])
def test_tied_weights_are_stored_once_and_stay_tied(tmp_path, name):
    if name == "GPT":
        model = merged(Tied())
        twin = load(save(model, tmp_path / "a"), base=Tied())
        pair = (twin.head.weight, twin.embedding.weight)
        ids = {"ids": IDS}
    else:
        model = merged(bert(name))
        twin = load(save(model, tmp_path / "a"))
        pair = (twin.cls.predictions.decoder.weight, twin.bert.embeddings.word_embeddings.weight)
        ids = {"input_ids": IDS}
    assert pair[0] is pair[1]
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert sum(tensor.shape == (40, 16) for tensor in stored.values()) == 1
    with torch.no_grad():
        ours, theirs = (m(**ids) for m in (twin, model))
        assert torch.equal(getattr(ours, "logits", ours), getattr(theirs, "logits", theirs))


class Tied(nn.Module):
    """A model outside of Hugging Face whose head is its embedding."""

    def __init__(self, tie=True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embedding(ids)))


def test_a_base_that_ties_what_was_stored_apart_is_refused(tmp_path):
    directory = save(merged(Tied(tie=False)), tmp_path / "a")
    assert "ties" in refused(directory, base=Tied())
    assert load(directory, base=Tied(tie=False)).head.weight.shape == (40, 16)


def test_a_base_that_does_not_tie_is_tied_as_the_saved_model_was(tmp_path):
    twin = load(save(merged(Tied()), tmp_path / "a"), base=Tied(tie=False))
    assert twin.head.weight is twin.embedding.weight


def test_routers_that_were_shared_stay_shared(tmp_path):
    pytest.importorskip("fusion_bench")
    from test_upscale import router_gradients, with_fusion_bench

    model, inputs = with_fusion_bench(kind="shared")
    accelerate_(model)
    twin = load(save(model, tmp_path / "a"))
    one, two = (layer.router for layer in wemoe_layers(twin).values())
    assert one.hidden.weight is two.hidden.weight
    assert one.output.bias is two.output.bias
    assert one.prefix is not two.prefix
    with torch.no_grad():
        assert torch.equal(twin(**inputs)[0], model(**inputs)[0])
    for ours, theirs in zip(router_gradients(twin, inputs), router_gradients(model, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert expert_names(twin) == ("0", "1")


def test_a_model_outside_of_hugging_face_needs_its_base(tmp_path):
    model, base = merged(stack()), stack()
    directory = save(model, tmp_path / "a")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    assert torch.equal(run(load(directory, base=base)), run(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert "base=module" in refused(directory, "outside of Hugging Face")
    assert "1" in refused(directory, "do not fit Linear", base=nn.Linear(2, 2))
    assert not (directory / "config.json").exists()
    assert "base=your_module" in (directory / "README.md").read_text()


def test_a_model_that_is_one_layer_needs_no_base(tmp_path):
    model = merged(stack()[1])
    directory = save(model, tmp_path / "a")
    assert torch.equal(run(load(directory)), run(model))
    assert "base" not in (directory / "README.md").read_text().split("```")[1]


def test_files_of_the_tokenizer_are_carried_along(tmp_path):
    source = tmp_path / "source"
    (source / "nested").mkdir(parents=True)
    carried = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "preprocessor_config.json"]
    for name in [*carried, "pytorch_model.bin", "model.safetensors.index.json", "secret.txt"]:
        (source / name).write_text(name)
    directory = save(merged(stack()), tmp_path / "a", files_from=source)
    assert all((directory / name).read_text() == name for name in carried)
    others = sorted({path.name for path in directory.iterdir()} - set(carried))
    assert others == ["README.md", "model.safetensors", "wemoe.json"]


def test_the_description_says_what_was_merged(saved_bert):
    content = json.loads((saved_bert / "wemoe.json").read_text())
    assert content["format_version"] == 1
    assert content["model_class"] == "BertModel"
    assert content["experts"] == ["one", "two"]
    layer = content["layers"]["encoder.layer.1.intermediate"]
    assert (layer["in_features"], layer["hidden_features"], layer["out_features"]) == (16, 24, 16)
    assert layer["router"]["depth"] == 2
    assert content["emptied"] == ["encoder.layer.0.output.dense", "encoder.layer.1.output.dense"]
    assert json.loads((saved_bert / "config.json").read_text())["architectures"] == ["BertModel"]
    assert is_wemoe_directory(saved_bert)


def test_saving_does_not_change_the_model(tmp_path):
    model = merged(bert())
    before = copy.deepcopy(vars(model.config))
    save(model, tmp_path / "a")
    assert vars(model.config) == before


# Where to


def test_a_model_without_layers_is_not_saved(tmp_path):
    with pytest.raises(CheckpointError, match="FastWEMoEMLP"):
        save(stack(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="new or empty"):
        save(merged(stack()), tmp_path / "a")
    assert snapshot(tmp_path) == {Path("a/thesis.tex"): b"years of work"}


def test_overwrite_replaces_the_directory_as_a_whole(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old.safetensors").write_text("old")
    model = merged(stack())
    save(model, tmp_path / "a", overwrite=True)
    assert not (tmp_path / "a" / "old.safetensors").exists()
    assert torch.equal(run(load(tmp_path / "a", base=stack())), run(model))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_loaded_model_can_be_saved_over_its_own_directory(tmp_path):
    directory = save(merged(bert()), tmp_path / "a")
    (directory / "vocab.txt").write_text("words")
    model = load(directory)
    expected = run(model)
    save(model, directory, files_from=directory, overwrite=True)
    assert (directory / "vocab.txt").read_text() == "words"
    assert torch.equal(run(load(directory)), expected)
    assert torch.equal(run(model), expected)


def test_an_empty_directory_and_new_parents_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "x" / "y" / "z"):
        assert save(merged(stack()), target) == target
        assert (target / "wemoe.json").is_file()


def test_a_link_to_a_directory_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(merged(stack()), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "wemoe.json").is_file()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_the_directorys_place_is_left_alone(tmp_path, overwrite):
    (tmp_path / "a").write_text("a file")
    with pytest.raises(CheckpointError, match="found a file"):
        save(merged(stack()), tmp_path / "a", overwrite=overwrite)
    assert (tmp_path / "a").read_text() == "a file"


@pytest.mark.parametrize("failing", ["write_shards", "model_card", "_write_json", "carry_files"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path, monkeypatch, failing, error):
    directory = save(merged(stack()), tmp_path / "a")
    before = snapshot(tmp_path)

    def fail(*_, **__):
        raise error("disk full")

    monkeypatch.setattr(checkpoint, failing, fail)
    for target in (directory, tmp_path / "new"):
        with pytest.raises(error):
            save(merged(stack()), target, files_from=directory, overwrite=True)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failure_at_the_last_step_puts_the_old_directory_back(tmp_path, monkeypatch):
    directory = save(merged(stack()), tmp_path / "a")
    before, replace, calls = snapshot(tmp_path), os.replace, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    monkeypatch.setattr(atomic.os, "replace", second_fails)
    with pytest.raises(OSError, match="no"):
        save(merged(stack()), directory, overwrite=True)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_directory_filled_by_someone_else_meanwhile_is_left_alone(tmp_path, monkeypatch):
    def slow(description):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "theirs").write_text("theirs")
        return ""

    monkeypatch.setattr(checkpoint, "model_card", slow)
    with pytest.raises(CheckpointError, match="new or empty"):
        save(merged(stack()), tmp_path / "a")
    assert snapshot(tmp_path) == {Path("a/theirs"): b"theirs"}


def test_settings_that_are_no_json_leave_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        save(merged(stack()), tmp_path / "a", settings={"x": object()})
    assert not list(tmp_path.iterdir())


# What is refused


@pytest.mark.parametrize("part", [0, 0.001, 0.01, 0.3, 0.9, 0.9999])
def test_truncated_weights_are_refused(saved, part):
    path = saved / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    assert "model.safetensors" in refused(saved, "damaged", base=stack())


def test_a_header_that_lies_is_refused(saved):
    path = saved / "model.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    refused(saved, "damaged", base=stack())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "\xff", "[" * 100000])
def test_corrupt_json_is_refused(saved, text):
    (saved / "wemoe.json").write_text(text, encoding="latin-1")
    refused(saved, "wemoe.json", base=stack())


@pytest.mark.parametrize("version", [0, 2, "1", None, []])
def test_other_format_versions_are_refused(saved, version):
    edit(saved, lambda content: content.update(format_version=version))
    refused(saved, "format_version 1, found", base=stack())


def test_every_tensor_that_does_not_fit_is_listed(saved):
    def change(tensors):
        del tensors["0.weight"]
        tensors["1.up.stack"] = tensors["1.up.stack"][:, :5].contiguous()
        tensors["1.router.output.bias"] = torch.zeros(2, dtype=torch.int64)
        tensors["2.bias"] = torch.zeros(7)
        tensors["extra"] = torch.zeros(1)

    rewrite(saved, change)
    base = stack()
    expected = run(base)
    message = refused(saved, "5 problems", base=base)
    for part in (
        "0.weight is missing",
        "1.up.stack: expected shape (3, 9, 6), found (3, 5, 6)",
        "1.router.output.bias: expected a dtype like torch.float32, found torch.int64",
        "2.bias: expected shape (6,), found (7,)",
        "extra is not part of the model",
        "wemoe-fast 0.1.0",
    ):
        assert part in message
    assert torch.equal(run(base), expected)


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path, saved_bert):
    (saved_bert / "model.safetensors").unlink()
    (saved_bert / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert "wemoe-fast convert" in refused(saved_bert, "pickle")
    (saved_bert / "wemoe.json").unlink()
    with pytest.raises(CheckpointError, match=r"pickle files \(pytorch_model.bin\).*wemoe-fast convert"):
        load_pretrained(saved_bert)


def test_missing_files_are_refused_by_name(tmp_path, saved_bert):
    refused(tmp_path / "nowhere", "no such directory")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "an ordinary directory")
    weights = (saved_bert / "model.safetensors").read_bytes()
    (saved_bert / "model.safetensors").unlink()
    refused(saved_bert, "found neither")
    (saved_bert / "model.safetensors").write_bytes(weights)
    (saved_bert / "config.json").unlink()
    refused(saved_bert, "config.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "bert", "hidden_size": "x"}', '{"model_type": 3}'])
def test_a_corrupt_config_is_refused(saved_bert, text):
    (saved_bert / "config.json").write_text(text)
    refused(saved_bert, "config.json")


@pytest.mark.parametrize("name", ["NoSuchModel", "__version__", "BertConfig", "AutoModel", "", "os"])
def test_unknown_classes_are_refused(saved_bert, name):
    edit(saved_bert, lambda content: content.update(model_class=name))
    refused(saved_bert)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b.safetensors", "gone.safetensors"]
)
def test_an_index_names_files_of_its_directory_only(tmp_path, saved, name):
    shutil.copy(saved / "model.safetensors", tmp_path / "model.safetensors")
    (saved / "model.safetensors").rename(saved / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(saved, "index.json", base=stack())


@pytest.mark.parametrize("content", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 1}}])
def test_a_malformed_index_is_refused(saved, content):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(saved, "weight_map", base=stack())


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    directory = save(merged(stack()), tmp_path / "a", max_shard_bytes=400)
    shards = sorted(directory.glob("model-*.safetensors"))
    tensors = load_file(shards[0]) | load_file(shards[1])
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, shards[1])
    refused(directory, "in another file too", base=stack())


BAD = [
    lambda c: c.clear(),
    lambda c: c.pop("layers"),
    lambda c: c.pop("aliases"),
    lambda c: c.update(layers=[]),
    lambda c: c.update(layers={}),
    lambda c: c.update(layers={"1": None}),
    lambda c: c.update(layers={"1": {}}),
    lambda c: c.update(experts="ab"),
    lambda c: c.update(experts=["one"]),
    lambda c: c.update(experts=[1, 2]),
    lambda c: c.update(emptied=[3]),
    lambda c: c.update(emptied=["nowhere"]),
    lambda c: c.update(emptied=["0"]),
    lambda c: c.update(emptied=[""]),
    lambda c: c.update(aliases={"0.weight": ["0.bias"]}),
    lambda c: c.update(aliases={"0.weight": "0.bias"}),
    lambda c: c.update(aliases={"nowhere": "0.bias"}),
    lambda c: c.update(aliases={"0.weight": "nowhere"}),
    lambda c: c.update(settings=[]),
    lambda c: c["layers"].update({"9": c["layers"]["1"]}),
    lambda c: c["layers"].update({"": c["layers"]["1"]}),
    lambda c: c["layers"].update({"0": c["layers"].pop("1")}),
    lambda c: c["layers"]["1"].update(in_features=10**30),
    lambda c: c["layers"]["1"].update(in_features=10**11, hidden_features=10**11),
    lambda c: c["layers"]["1"].update(in_features=-1),
    lambda c: c["layers"]["1"].update(in_features=6.0),
    lambda c: c["layers"]["1"].update(hidden_features=10),
    lambda c: c["layers"]["1"].update(activation="softplus"),
    lambda c: c["layers"]["1"].update(activation=None),
    lambda c: c["layers"]["1"].update(bias=[]),
    lambda c: c["layers"]["1"].update(bias="updown"),
    lambda c: c["layers"]["1"].update(gated=True),
    lambda c: c["layers"]["1"].update(gated="no"),
    lambda c: c["layers"]["1"].update(batch_first=None),
    lambda c: c["layers"]["1"].update(router=[]),
    lambda c: c["layers"]["1"]["router"].update(depth=7),
    lambda c: c["layers"]["1"]["router"].update(depth=1),
    lambda c: c["layers"]["1"]["router"].update(depth=True),
    lambda c: c["layers"]["1"]["router"].update(num_experts=3),
    lambda c: c["layers"]["1"]["router"].update(num_experts=0),
    lambda c: c["layers"]["1"]["router"].update(normalization="max"),
    lambda c: c["layers"]["1"]["router"].update(temperature=0),
    lambda c: c["layers"]["1"]["router"].update(temperature="hot"),
    lambda c: c["layers"]["1"]["router"].update(top_k=9),
    lambda c: c["layers"]["1"]["router"].update(top_k=0),
    lambda c: c["layers"]["1"]["router"].update(hidden_features=5),
    lambda c: c["layers"]["1"]["router"].update(prefix_features=2),
    lambda c: c["layers"]["1"]["router"].update(in_features=5),
    lambda c: c["layers"]["1"]["router"].pop("top_k"),
    lambda c: c["layers"]["1"].pop("router"),
    lambda c: c["layers"]["1"].update(batch_invariant=True) or c["layers"]["1"]["router"].update(batch_reduce=True),
]


@pytest.mark.parametrize("change", BAD, ids=range(len(BAD)))
def test_a_malformed_description_is_refused(saved, change):
    edit(saved, lambda content: change(content) and None)
    refused(saved, base=stack())


def test_everything_wrong_with_a_description_is_listed(saved):
    def change(content):
        content["layers"]["1"].update(gated="no", activation=3)
        content["layers"]["1"]["router"]["depth"] = "deep"

    edit(saved, change)
    message = refused(saved, base=stack())
    for part in ("layers.1.gated: expected", "layers.1.activation: expected text, found 3", "layers.1.router.depth"):
        assert part in message


def test_any_change_of_the_description_loads_or_is_refused(saved):
    original, base = (saved / "wemoe.json").read_text(), stack()
    rng = random.Random(0)
    values = [None, True, 0, 1, -3, 2.5, 1e300, "", "x", [], ["x"], {}, {"x": 1}, 10**40, "../x", "1.up"]
    outcomes = set()
    for _ in range(300):
        content = json.loads(original)
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = rng.choice(keys)
            if not isinstance(node[key], dict | list) or not node[key] or rng.random() < 0.2:
                break
            node = node[key]
        if rng.random() < 0.2:
            del node[key]
        else:
            node[key] = rng.choice(values)
        (saved / "wemoe.json").write_text(json.dumps(content))
        try:
            load(saved, base=base)
            outcomes.add("loaded")
        except CheckpointError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


# Ordinary checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_checkpoints_are_read_as_they_are(tmp_path, dtype):
    model = bert("BertForSequenceClassification", dtype)
    model.save_pretrained(tmp_path / "a")
    twin = load_pretrained(tmp_path / "a")
    assert type(twin) is type(model)
    assert not twin.training
    assert not is_wemoe_directory(tmp_path / "a")
    assert {name: t.dtype for name, t in twin.state_dict().items()} == {
        n: t.dtype for n, t in model.state_dict().items()
    }
    assert torch.equal(run(twin), run(model))


def test_ordinary_checkpoints_that_do_not_fit_are_refused(tmp_path):
    bert().save_pretrained(tmp_path / "a")

    def refused(match, **options):
        with pytest.raises(CheckpointError, match=match):
            load_pretrained(tmp_path / "a", **options)

    refused("classifier.weight is missing", model_class="BertForSequenceClassification")
    refused("NoSuchModel", model_class="NoSuchModel")
    edit(tmp_path / "a", lambda c: c.update(hidden_size=32), "config.json")
    refused("BertModel")
    edit(tmp_path / "a", lambda c: c.update(hidden_size="x"), "config.json")
    refused("BertModel")
    edit(tmp_path / "a", lambda c: c.pop("architectures") and None, "config.json")
    refused("architectures")
    data = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "a" / "model.safetensors").write_bytes(data[:-10])
    refused("damaged")
    (tmp_path / "a" / "model.safetensors").write_bytes(data)
    (tmp_path / "a" / "config.json").unlink()
    refused("config.json")


def test_a_merged_model_is_no_ordinary_checkpoint(saved_bert):
    with pytest.raises(CheckpointError, match="WEMoE model"):
        load_pretrained(saved_bert)
