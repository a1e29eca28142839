"""Names on the Hub: against a faked download, and against huggingface_hub's own cache on the disk; no network."""

import json
import sys
from pathlib import Path

import pytest
import torch

from wemoe_fast import CheckpointError, ConfigError
from wemoe_fast.cli import main
from wemoe_fast.config import load_recipe
from wemoe_fast.hub import NOT_FILES, download, is_id, located, name_of, origin, same_model
from wemoe_fast.merge import coverage
from wemoe_fast.preflight import plan_merge

hub = pytest.importorskip("huggingface_hub")
transformers = pytest.importorskip("transformers")

COMMITS = {"acme/base": "a" * 40, "acme/one": "b" * 40, "acme/two": "c" * 40, "acme/lora": "d" * 40}


def snapshot(cache, model):
    """Where huggingface_hub keeps a model."""
    return cache / f"models--{model.replace('/', '--')}" / "snapshots" / COMMITS[model]


def lay_out(cache, model):
    """A model in the cache as huggingface_hub leaves it: blobs, links to them, the commit of the branch main."""
    directory = snapshot(cache, model)
    blobs = directory.parent.parent / "blobs"
    for folder in (directory, blobs, directory.parent.parent / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (directory.parent.parent / "refs" / "main").write_text(COMMITS[model])
    return directory, blobs


def into_blobs(directory, blobs):
    for path in list(directory.iterdir()):
        path.rename(blobs / f"hash-of-{path.name}")
        path.symlink_to(Path("../../blobs") / f"hash-of-{path.name}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A base and two experts in the cache; no network."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=40))
    for name in ("acme/base", "acme/one", "acme/two"):
        directory, blobs = lay_out(tmp_path / "cache", name)
        model.save_pretrained(directory)
        (directory / "vocab.txt").write_text("words")
        into_blobs(directory, blobs)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "project").mkdir()
    return tmp_path / "project"


def recipe(root, text="base: acme/base\nexperts: {one: acme/one@main, two: acme/two}\n"):
    (root / "recipe.yaml").write_text(text)
    return root / "recipe.yaml"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("acme/base", True),
        ("acme/base@main", True),
        ("acme/base@refs/pr/1", True),
        ("acme/base@" + "a" * 40, True),
        ("base", False),
        ("./acme/base", False),
        ("/acme/base", False),
        ("acme/base/more", False),
        ("~acme/base", False),
        ("acme/", False),
        ("here/base", False),
        ("organisation/nothing", False),
    ],
)
def test_what_reads_like_a_model_on_the_hub(tmp_path, text, expected):
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "organisation").mkdir()
    assert is_id(text, tmp_path) == expected


def test_a_recipe_of_models_in_the_cache(cache, root, capsys):
    found = load_recipe(recipe(root))
    assert found.base == snapshot(cache, "acme/base")
    assert found.experts == {"one": snapshot(cache, "acme/one"), "two": snapshot(cache, "acme/two")}
    assert main(["merge", str(recipe(root)), "--out", str(root / "out"), "--quiet"]) == 0
    written = json.loads((root / "out" / "merge.json").read_text())["recipe"]
    assert written["base"] == f"acme/base@{'a' * 40}"
    assert written["experts"] == {"one": f"acme/one@{'b' * 40}", "two": f"acme/two@{'c' * 40}"}
    assert (root / "out" / "vocab.txt").read_text() == "words"
    assert str(cache) not in "".join((root / "out" / n).read_text() for n in ("merge.json", "README.md", "wemoe.json"))


def test_a_directory_of_that_name_wins(cache, root):
    for name in ("base", "one", "two"):
        (root / "acme" / name).mkdir(parents=True)
    assert load_recipe(recipe(root, "base: acme/base\nexperts: {one: acme/one}")).base == root / "acme" / "base"
    with pytest.raises(ConfigError, match="acme/three, which does not exist"):  # a mistake, not a model to look for
        load_recipe(recipe(root, "base: acme/base\nexperts: {three: acme/three}"))


def test_models_that_cannot_be_had_offline_are_all_named_with_what_to_do(cache, root):
    text = "base: acme/base\nexperts: {x: nobody/has-it, y: nobody/else@v2, one: acme/one}"
    with pytest.raises(CheckpointError, match="2 problems") as caught:
        load_recipe(recipe(root, text))
    message = str(caught.value)
    assert "nobody/has-it: no such directory here, not wholly in the cache, and the Hub cannot be reached" in message
    assert "run hf download nobody/has-it; with HF_HUB_OFFLINE=1" in message
    assert "run hf download nobody/else --revision v2;" in message


def test_nothing_is_downloaded_for_a_recipe_with_mistakes(cache, root, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    with pytest.raises(ConfigError, match="unknown key 'colour'"):
        load_recipe(recipe(root, "base: acme/base\nexperts: {one: acme/one}\ncolour: red"))


def test_what_is_downloaded(tmp_path, monkeypatch):
    asked = {}

    def fake(name, **options):
        asked.update(options, name=name)
        directory, _ = lay_out(tmp_path, name)
        (directory / "adapter_model.safetensors").touch()
        return str(directory)

    monkeypatch.setattr(hub, "snapshot_download", fake)
    assert located("acme/lora@v2") == snapshot(tmp_path, "acme/lora")
    assert (asked["name"], asked["revision"]) == ("acme/lora", "v2")
    files = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "vocab.txt", "wemoe.json",
    ]  # fmt: skip
    others = [
        "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "fp16/model.safetensors", "run.py",
        "consolidated.safetensors",
    ]  # fmt: skip
    patterns = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(hub.utils.filter_repo_objects(files + others, **patterns)) == files
    assert asked["ignore_patterns"] == list(NOT_FILES)


@pytest.mark.parametrize(
    ("error", "part"),
    [
        ("RepositoryNotFoundError", "neither a directory here nor a model that the Hub shows you"),
        ("RevisionNotFoundError", "the Hub has acme/base, but no revision 'v2' of it"),
        ("GatedRepoError", "access has to be asked for on https://huggingface.co/acme/base"),
        ("LocalEntryNotFoundError", "the Hub cannot be reached (LocalEntryNotFoundError: some reason)"),
        ("OfflineModeIsEnabled", "the Hub cannot be reached (OfflineModeIsEnabled: some reason)"),
        ("HFValidationError", "nor a name that the Hub allows: some reason"),
    ],
)
def test_why_a_model_cannot_be_had(monkeypatch, error, part):
    def fail(*_, **__):
        kind = getattr(hub.errors, error)
        made = kind.__new__(kind)
        made.args = ("some reason",)
        raise made

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError) as caught:
        download("acme/base@v2")
    assert part in str(caught.value)


def test_without_huggingface_hub_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r'acme/base: .* pip install "wemoe-fast\[hf\]"'):
        located("acme/base")


@pytest.mark.parametrize("listed", [["config.json", "pytorch_model.bin"], None])
def test_a_model_without_safetensors_is_refused(tmp_path, monkeypatch, listed):
    directory, _ = lay_out(tmp_path, "acme/base")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(directory))

    def files(*_, **__):
        if listed is None:
            raise ConnectionError
        return listed

    monkeypatch.setattr(hub.HfApi, "list_repo_files", files)
    with pytest.raises(CheckpointError, match="expected safetensors") as caught:
        download("acme/base")
    assert ("found pickle files only (pytorch_model.bin)" in str(caught.value)) == bool(listed)
    assert ("wemoe-fast convert" in str(caught.value)) == bool(listed)


def test_models_of_the_cache_have_their_names_on_the_hub(cache, tmp_path):
    directory = snapshot(cache, "acme/base")
    assert origin(directory) == name_of(directory) == f"acme/base@{'a' * 40}"
    assert origin(tmp_path) is None
    assert name_of(tmp_path / "x") == "x"
    assert same_model("acme/base", directory)
    assert not same_model("others/base", directory)
    assert same_model("acme/base", tmp_path / "base")
    assert same_model("/elsewhere/base", directory)
    assert not same_model("/elsewhere/large", tmp_path / "base")


def test_notes_and_the_command_line_use_them_too(cache, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    plan = plan_merge(load_recipe(recipe(root)))
    assert "merged by task arithmetic" in coverage(plan)
    assert main(["inspect", "nobody/has-it"]) == 1
    assert "hf download nobody/has-it" in capsys.readouterr().err
    assert main(["inspect", "acme/base"]) == 1
    assert "expected a WEMoE checkpoint with wemoe.json, found an ordinary directory" in capsys.readouterr().err
