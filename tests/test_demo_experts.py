from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from wemoe_fast.config import load_recipe, load_task_configs
from wemoe_fast.demo import experts, prepare, texts
from wemoe_fast.demo.experts import Training, expert, expert_key, fine_tune, load_base, zero_shot_head
from wemoe_fast.demo.sources import Sources
from wemoe_fast.errors import CheckpointError, InputError
from wemoe_fast.tasks import Head, load_tasks

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["a", "note", "about", "apples", "pears", "red", "green", "sweet", "ripe", "one", "two", "three"]
TEXTS = [
    f"{colour} {fruit} {extra}" for extra in WORDS[7:] for colour, fruit in [("red", "apples"), ("green", "pears")]
]
LABELS = [0, 1] * 5
PROMPTS = ["a note about apples", "a note about pears"]
ONE_STEP = Training(epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a vocabulary of a dozen words, as an ordinary checkpoint directory."""
    directory = tmp_path_factory.mktemp("models") / "base"
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(directory)
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizer(str(vocabulary)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def head(base_dir: Path) -> Head:
    model, tokenizer = load_base(base_dir)
    return zero_shot_head(model, tokenizer, PROMPTS, ["apples", "pears"])


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_zero_shot_head_is_twenty_times_cosine_with_the_prompt(base_dir: Path, head: Head) -> None:
    model, tokenizer = load_base(base_dir)
    assert (head.scale, head.normalize, head.pooling, head.bias) == (20.0, True, "mean", None)
    assert head.classes == ("apples", "pears")
    with torch.no_grad():
        # alone, so without padding: the masked mean must not notice what the head was computed beside
        features = experts.embed(model, tokenizer, ["a note about pears"])
    logits = head.logits(3 * features)
    assert logits[0, 1].item() == pytest.approx(20.0, abs=1e-3)
    assert logits[0, 0].item() < 20.0


def test_embedding_ignores_padding_and_what_exceeds_the_limit(base_dir: Path) -> None:
    model, tokenizer = load_base(base_dir)
    with torch.no_grad():
        together = experts.embed(model, tokenizer, ["red", "red apples and green pears one two three"])
        alone = experts.embed(model, tokenizer, ["red"])
        cut = experts.embed(model, tokenizer, ["red " * 50, "red " * 60], max_tokens=8)
    torch.testing.assert_close(together[:1], alone)
    torch.testing.assert_close(cut[0], cut[1])


def test_fine_tuning_learns_freezes_the_embeddings_and_saves_a_plain_checkpoint(
    base_dir: Path, head: Head, tmp_path: Path
) -> None:
    swapped = [1 - label for label in LABELS]  # nothing the head would say by itself
    training = Training(epochs=20, batch_size=4, learning_rate=4e-3)
    out = fine_tune(base_dir, TEXTS, swapped, head, tmp_path / "new" / "fruit", seed=0, training=training)
    before, after = weights(base_dir), weights(out)
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any(name.startswith("embeddings.") for name in changed)
    encoder = {name for name in before if name.startswith("encoder.")}
    # the key bias cancels in the softmax, so nothing but weight decay could move it
    assert encoder - changed <= {name for name in encoder if name.endswith("key.bias")}
    model, tokenizer = load_base(out)
    assert not model.training
    assert type(model).__name__ == "BertModel"
    with torch.no_grad():
        predicted = head.logits(experts.embed(model, tokenizer, TEXTS)).argmax(1)
    assert predicted.tolist() == swapped
    losses = json.loads((out / "training.json").read_text())["losses"]
    assert losses[-1] < 0.5 * losses[0]
    assert [path.name for path in out.parent.iterdir()] == ["fruit"]


def test_the_same_seed_gives_the_same_expert_and_leaves_the_global_generator_alone(
    base_dir: Path, head: Head, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    for name, seed in {"a": 1, "b": 1, "c": 2}.items():
        fine_tune(base_dir, TEXTS, LABELS, head, tmp_path / name, seed=seed, training=ONE_STEP)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_bad_training_data_is_refused_at_once(base_dir: Path, head: Head, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        fine_tune(base_dir, ["red"], [0, 2, -1], head, tmp_path / "x", seed=0)
    assert "1 texts but 3 labels" in str(caught.value)
    assert "labels [-1, 2] are outside the head's 2 classes" in str(caught.value)
    with pytest.raises(InputError, match="no texts"):
        fine_tune(base_dir, [], [], head, tmp_path / "x", seed=0)
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        fine_tune(base_dir, TEXTS, LABELS, head, tmp_path / "there", seed=0)


def test_an_interrupted_training_leaves_nothing(
    base_dir: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(experts, "_copy_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        fine_tune(base_dir, TEXTS, LABELS, head, tmp_path / "x", seed=0, training=ONE_STEP)
    assert list(tmp_path.iterdir()) == []


def test_an_expert_is_trained_once(base_dir: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = expert(base_dir, TEXTS, LABELS, head, PROMPTS, tmp_path, name="fruit", seed=0, training=ONE_STEP)
    assert not first.cached
    assert first.path.parent == tmp_path
    (first.path / "training.json").rename(first.path / "moved")  # as if it had been interrupted
    again = expert(base_dir, TEXTS, LABELS, head, PROMPTS, tmp_path, name="fruit", seed=0, training=ONE_STEP)
    assert (again.path, again.cached) == (first.path, False)
    monkeypatch.setattr(experts, "fine_tune", lambda *_, **__: pytest.fail("trained twice"))
    third = expert(base_dir, TEXTS, LABELS, head, PROMPTS, tmp_path, name="fruit", seed=0, training=ONE_STEP)
    assert (third.path, third.cached) == (first.path, True)


def test_an_expert_finished_by_another_process_meanwhile_is_used(
    base_dir: Path, head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tokenizer = experts._copy_tokenizer

    def other_process(source: Path, scratch: Path) -> None:
        save_tokenizer(source, scratch)
        key = expert_key(base_dir, TEXTS, LABELS, PROMPTS, seed=0, training=ONE_STEP)
        (tmp_path / f"fruit-{key}").mkdir()
        (tmp_path / f"fruit-{key}" / "training.json").write_text("the other's")

    monkeypatch.setattr(experts, "_copy_tokenizer", other_process)
    made = expert(base_dir, TEXTS, LABELS, head, PROMPTS, tmp_path, name="fruit", seed=0, training=ONE_STEP)
    assert (made.path / "training.json").read_text() == "the other's"
    assert list(tmp_path.iterdir()) == [made.path]


def test_the_cache_key_covers_all_that_training_depends_on(base_dir: Path, tmp_path: Path) -> None:
    other_base = tmp_path / "base"
    shutil.copytree(base_dir, other_base)
    other_weights = other_base / "model.safetensors"
    other_weights.write_bytes(other_weights.read_bytes()[:-1] + b"\x01")
    plain = {"seed": 0, "training": Training()}
    keys = [
        expert_key(base_dir, TEXTS, LABELS, PROMPTS, **plain),
        expert_key(other_base, TEXTS, LABELS, PROMPTS, **plain),
        expert_key(base_dir, TEXTS[::-1], LABELS, PROMPTS, **plain),
        expert_key(base_dir, TEXTS, LABELS[::-1], PROMPTS, **plain),
        expert_key(base_dir, TEXTS, LABELS, PROMPTS[::-1], **plain),
        expert_key(base_dir, TEXTS, LABELS, PROMPTS, seed=1, training=Training()),
        expert_key(base_dir, TEXTS, LABELS, PROMPTS, seed=0, training=Training(epochs=3)),
    ]
    assert len(set(keys)) == len(keys)
    assert expert_key(base_dir, list(TEXTS), tuple(LABELS), PROMPTS, **plain) == keys[0]


def test_prepare_writes_what_a_user_would_have(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = texts.TaskSpec("fruit", "a note about {}", {"a": "apples", "p": "pears"})
    sizes = texts.Sizes(train=10, adapt=4, tuning=5, test=6)
    rows = [
        (label, f"{word} {other} {i}")
        for i in range(8)
        for label, word in [("a", "red"), ("p", "green")]
        for other in WORDS
    ]
    monkeypatch.setattr(prepare, "locate", lambda cache, progress: Sources(base_dir, *[tmp_path] * 5))
    monkeypatch.setattr(
        prepare,
        "load_texts",
        lambda sources, seed, sizes: [texts.build_task(spec, rows, seed=seed, sizes=sizes)],
    )
    monkeypatch.setattr(prepare, "QUICK_SIZES", sizes)
    made = prepare.prepare(tmp_path / "cache", tmp_path / "out", seed=0, quick=True, progress=False)
    assert capsys.readouterr().err == ""
    assert not made.cached

    recipe = load_recipe(made.recipe)
    assert recipe.base == base_dir
    assert recipe.experts == dict(made.experts)
    assert (recipe.merge_lambda, recipe.router_depth, recipe.normalization) == (0.3, 1, "softmax")
    assert made.experts["fruit"].parent == tmp_path / "cache" / "experts"

    held: list[set[str]] = []
    for path, size in ((made.tasks, sizes.test), (made.tuning_tasks, sizes.tuning)):
        (config,) = load_task_configs(path)
        assert (config.name, config.max_length) == ("fruit", 32)
        (task,) = load_tasks(path, base_dir)
        assert len(task.data) == size
        assert task.unlabelled is not None
        assert len(task.unlabelled) == sizes.adapt
        inputs, labels = task.data.batch(range(size))
        assert labels is not None
        assert task.unlabelled.batch([0])[1] is None
        assert task.logits(load_base(base_dir)[0], inputs).shape == (size, 2)
        assert config.data is not None
        lines = [json.loads(line) for line in Path(config.data).read_text().splitlines()]
        held.append({line["text"] for line in lines})
        assert all((line["label"] == "apples") == line["text"].startswith("red") for line in lines)
    assert not held[0] & held[1]
    assert "label" not in (tmp_path / "out" / "data" / "fruit.adapt.jsonl").read_text()

    again = prepare.prepare(tmp_path / "cache", tmp_path / "out2", seed=0, quick=True)
    assert again.cached
    assert "cached" in capsys.readouterr().err
    assert yaml.safe_load(again.recipe.read_text()) == yaml.safe_load(made.recipe.read_text())
