import copy
import errno
import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from wemoe_fast import CheckpointError, InputError, load, sharded, task_arithmetic, upscale, wemoe_layers
from wemoe_fast.config import Recipe
from wemoe_fast.merge import baselines, check_merge, load_recipe_models, merge, merge_to_directory

transformers = pytest.importorskip("transformers")

IDS = torch.arange(10, 24).view(2, 7)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40
    )
    return transformers.BertModel(config).eval()


@pytest.fixture
def recipe(tmp_path):
    base = bert()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "vocab.txt").write_text("words")
    for name in ("one", "two"):
        expert = copy.deepcopy(base)
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        expert.save_pretrained(tmp_path / name)
    return Recipe(base=tmp_path / "base", experts={name: tmp_path / name for name in ("one", "two")})


def changed(recipe, **changes):
    return Recipe(**{**vars(recipe), **changes})


def run(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def test_a_recipe_becomes_a_directory(recipe, tmp_path):
    options = {"merge_lambda": 0.2, "init_lambda": 0.4, "router_depth": 1, "seed": 3}
    options |= {"normalization": "softmax", "temperature": 2.0, "top_k": 1}
    recipe = changed(recipe, **options)
    model = merge(recipe, tmp_path / "out")
    assert torch.equal(run(model), run(upscale(*load_recipe_models(recipe), **options)))
    assert torch.equal(run(load(tmp_path / "out")), run(model))
    assert (tmp_path / "out" / "vocab.txt").read_text() == "words"
    settings = json.loads((tmp_path / "out" / "wemoe.json").read_text())["settings"]
    names = {"base": "base", "experts": {"one": "one", "two": "two"}}
    assert settings == {"merge_lambda": 0.2, "init_lambda": 0.4, "seed": 3, **names}
    for name in ("README.md", "wemoe.json", "config.json", "merge.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_batch_reduce_reaches_the_routers(recipe, tmp_path):
    model = merge(changed(recipe, batch_reduce=True), tmp_path / "out")
    assert all(layer.batch_reduce for layer in wemoe_layers(model).values())


def test_the_same_recipe_gives_the_same_bytes(recipe, tmp_path):
    torch.manual_seed(1)
    merge(recipe, tmp_path / "a")
    torch.manual_seed(2)
    merge(recipe, tmp_path / "b")
    merge(changed(recipe, seed=1), tmp_path / "c")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["README.md", "config.json", "merge.json", "model.safetensors", "vocab.txt", "wemoe.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert {name for name in a if not torch.equal(a[name], c[name])} == {
        name for name in a if "router" in name and name.endswith("weight")
    }


@pytest.mark.parametrize("where", ["base", "one", "base/inside", "two/a/b", "", "link", "base/../one"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_an_output_at_in_or_around_an_input_is_refused(recipe, tmp_path, where, overwrite):
    (tmp_path / "link").symlink_to(tmp_path / "two")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match="apart from the inputs"):
        merge(recipe, tmp_path / where, overwrite=overwrite)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_output_that_holds_something_is_refused_before_anything_is_read(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="new or empty"):
        merge(changed(recipe, base=tmp_path / "nowhere"), tmp_path / "out")
    merge(recipe, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "x").exists()


def test_an_expert_with_nan_is_refused_and_nothing_is_written(recipe, tmp_path):
    expert = bert()
    expert.pooler.dense.bias.data[0] = float("nan")
    expert.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match=r"'two': pooler.dense.bias: expected finite"):
        merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


def test_every_checkpoint_that_cannot_be_read_is_named(recipe, tmp_path):
    (tmp_path / "one" / "model.safetensors").write_bytes(b"")
    (tmp_path / "two" / "model.safetensors").unlink()
    (tmp_path / "two" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        merge(recipe, tmp_path / "out")
    assert "damaged" in str(caught.value)
    assert "pickle" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_merged_model_is_no_expert(recipe, tmp_path):
    merge(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="WEMoE model"):
        merge(changed(recipe, experts={"one": tmp_path / "one", "merged": tmp_path / "out"}), tmp_path / "again")


def test_baselines_are_what_a_merged_model_is_compared_with(recipe):
    base, experts = load_recipe_models(recipe)
    rows = dict(baselines(recipe))
    assert list(rows) == ["pretrained", "weight average", "task arithmetic 0.3"]
    assert torch.equal(run(rows["pretrained"]), run(base))
    assert torch.equal(run(rows["task arithmetic 0.3"]), run(task_arithmetic(base, experts, 0.3)))
    mean = (experts["one"].pooler.dense.weight + experts["two"].pooler.dense.weight) / 2
    torch.testing.assert_close(rows["weight average"].pooler.dense.weight, mean)
    everything = dict(baselines(changed(recipe, merge_lambda=0.25), experts=True))
    assert list(everything) == ["pretrained", "expert one", "expert two", "weight average", "task arithmetic 0.25"]
    assert torch.equal(run(everything["expert two"]), run(experts["two"]))


def test_a_dry_run_checks_everything_and_writes_nothing(recipe, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    plan = check_merge(recipe, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    merge_to_directory(recipe, tmp_path / "out", max_shard_bytes=5000)
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert plan.output_bytes < written < plan.output_bytes + 20000
    with pytest.raises(CheckpointError, match="new or empty"):
        check_merge(recipe, tmp_path / "out")
    with pytest.raises(CheckpointError, match="apart from the inputs"):
        check_merge(recipe, tmp_path / "one", overwrite=True)


def test_the_manifest_names_inputs_by_their_hashes(recipe, tmp_path):
    merge_to_directory(recipe, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    content = (recipe.experts["two"] / "model.safetensors").read_bytes()
    found = manifest["inputs"]["experts"]["two"]["model.safetensors"]
    assert found == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    assert manifest["recipe"]["experts"] == {"one": "one", "two": "two"}
    assert manifest["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("when", range(0, 60, 7))
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_the_old_model(recipe, tmp_path, monkeypatch, when, error):
    merge(recipe, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write, calls = sharded._write_at, []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > when:
            raise error
        write(*arguments)

    monkeypatch.setattr(sharded, "_write_at", fail)
    expected = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        merge_to_directory(changed(recipe, seed=1), tmp_path / "out", overwrite=True, max_shard_bytes=3000)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_system_that_takes_no_more_is_said_so(recipe, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written: File too large; nothing was left behind"):
            merge_to_directory(recipe, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "one", "two"]


def test_too_little_space_is_said_before_the_work(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100}))
    with pytest.raises(CheckpointError, match="bytes of free space, found 100"):
        check_merge(recipe, tmp_path / "out")
