from __future__ import annotations

import copy
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from wemoe_fast.adapt import adapt
from wemoe_fast.errors import CheckpointError, ConfigError, InputError
from wemoe_fast.evaluate import evaluate
from wemoe_fast.tasks import (
    Head,
    ImageFolderSamples,
    Samples,
    Task,
    TensorSamples,
    TextSamples,
    load_image_processor,
    load_tasks,
    load_tokenizer,
)
from wemoe_fast.upscale import upscale

CLASSES = ("good", "bad")


def head(d: int = 4, **settings: Any) -> Head:
    weight = torch.randn(2, d, generator=torch.Generator().manual_seed(0))
    return Head(weight=weight, bias=settings.pop("bias", None), classes=CLASSES, **settings)


class Rows:
    """The least a data set can be."""

    def __init__(self, n: int = 3, **inputs: Tensor) -> None:
        self.n, self.inputs = n, inputs

    def __len__(self) -> int:
        return self.n

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        return {name: value[list(indices)] for name, value in self.inputs.items()}, None


# heads


def test_head_logits_are_the_formula_in_fp32() -> None:
    features = torch.randn(5, 4)
    linear = head(bias=torch.tensor([1.0, -2.0]))
    torch.testing.assert_close(linear.logits(features), features @ linear.weight.T + linear.bias)
    cosine = head(normalize=True, scale=20.0)
    expected = 20 * F.cosine_similarity(features[:, None], cosine.weight[None], dim=-1)
    torch.testing.assert_close(cosine.logits(features), expected)
    assert cosine.logits(features.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 4), (4,)])
def test_head_refuses_features_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected features of shape \[B, 4\], found"):
        head().logits(torch.zeros(shape))


def test_head_round_trip(tmp_path: Path) -> None:
    saved = Head(torch.randn(3, 4), torch.randn(3), ("a", "ü", 'c "d"'), 20.0, False, "cls")
    saved.save(tmp_path / "new" / "head.safetensors")
    loaded = Head.load(tmp_path / "new" / "head.safetensors")
    assert torch.equal(loaded.weight, saved.weight)
    assert loaded.bias is not None
    assert torch.equal(loaded.bias, saved.bias)
    assert (loaded.classes, loaded.scale, loaded.normalize, loaded.pooling) == (
        saved.classes,
        20.0,
        False,
        "cls",
    )
    head(normalize=True).save(tmp_path / "cosine.safetensors")
    assert Head.load(tmp_path / "cosine.safetensors").bias is None
    assert Head.load(tmp_path / "cosine.safetensors").normalize


def test_all_problems_of_a_head_come_at_once() -> None:
    with pytest.raises(InputError) as caught:
        Head(torch.tensor([[1.0, torch.nan]]), torch.zeros(3), ("a", "a"), torch.inf, 1, "max")  # type: ignore[arg-type]
    for part in (
        "classes: expected 1 (rows of weight), found 2",
        "bias: expected shape [1], found torch.float32 [3]",
        "weight: 1 values are not finite",
        "classes: 'a' named more than once",
        "scale: expected a finite number, found inf",
        "normalize: expected true or false, found 1",
        "pooling: expected one of mean, cls, pooler, none, found 'max'",
    ):
        assert part in str(caught.value)


def test_a_normalised_head_has_no_bias() -> None:
    with pytest.raises(InputError, match="a head with normalize has none"):
        head(bias=torch.zeros(2), normalize=True)


def test_loading_a_missing_pickled_or_damaged_head(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        Head.load(path)
    torch.save({"weight": torch.zeros(2, 4)}, path)
    with pytest.raises(CheckpointError, match="a pickle file"):
        Head.load(path)
    path.write_bytes(b"\x80\x04}q\x00.")
    with pytest.raises(CheckpointError, match="a pickle file"):
        Head.load(path)
    head().save(path)
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"head\.safetensors: not a readable safetensors file"):
            Head.load(path)
    with pytest.raises(CheckpointError, match="not a readable"):
        Head.load(tmp_path)


def test_a_safetensors_file_that_is_no_head(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"w": torch.zeros(2, 4)}, path, {"scale": "one"})
    with pytest.raises(CheckpointError) as caught:
        Head.load(path)
    for part in (
        "tensor 'weight' is missing",
        "unexpected tensor 'w'",
        "metadata 'classes' is missing",
        "metadata 'scale' is not JSON: 'one'",
    ):
        assert part in str(caught.value)
    save_file({"weight": torch.zeros(2, 4)}, path, {"classes": '"good"'})
    with pytest.raises(CheckpointError, match="must be a list of texts, found 'good'"):
        Head.load(path)
    save_file({"weight": torch.zeros(2, 4)}, path, {"classes": '["good", [1]]'})
    with pytest.raises(CheckpointError, match="classes: expected texts"):
        Head.load(path)
    save_file({"weight": torch.full((2, 4), torch.nan)}, path, {"classes": '["good", "bad"]'})
    with pytest.raises(CheckpointError, match="weight: 8 values are not finite"):
        Head.load(path)


# features


class Output(dict):  # type: ignore[type-arg]
    """As Hugging Face's: a mapping with attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Returns(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(1))
        self.output = output
        self.seen: dict[str, Tensor] = {}

    def forward(self, **inputs: Tensor) -> Any:
        self.seen = inputs
        return self.output


def task(pooling: str = "mean", **settings: Any) -> Task:
    return Task("t", head(pooling=pooling), Rows(), **settings)


def test_mean_pooling_leaves_padding_out() -> None:
    hidden = torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = task().features(Returns(Output(last_hidden_state=hidden)), {"attention_mask": mask})
    torch.testing.assert_close(found, torch.stack([hidden[0, :2].mean(0), hidden[1, 0]]))
    found = task().features(Returns(hidden), {})
    torch.testing.assert_close(found, hidden.mean(1))


def test_mean_pooling_of_a_fully_masked_sample_is_zero() -> None:
    found = task().features(Returns(torch.ones(1, 3, 4)), {"attention_mask": torch.zeros(1, 3)})
    assert torch.equal(found, torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("pooling", "field", "shape"),
    [
        ("cls", "last_hidden_state", (2, 3, 4)),
        ("pooler", "pooler_output", (2, 4)),
        ("none", "image_embeds", (2, 4)),
    ],
)
def test_other_poolings(pooling: str, field: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape)
    found = task(pooling).features(Returns(Output({field: value})), {})
    assert torch.equal(found, value[:, 0] if pooling == "cls" else value)


def test_pooling_none_takes_a_tensor() -> None:
    value = torch.randn(2, 4)
    assert torch.equal(task("none").features(Returns(value), {}), value)


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler", "none"])
def test_an_output_that_does_not_fit_the_pooling(pooling: str) -> None:
    with pytest.raises(InputError, match=rf"pooling '{pooling}' needs .* output has logits \[2, 4\]"):
        task(pooling).features(Returns(Output(logits=torch.zeros(2, 4))), {})
    with pytest.raises(InputError, match=r"has one tensor \[2, 3, 4, 5\]"):
        task(pooling).features(Returns(torch.zeros(2, 3, 4, 5)), {})


def test_a_head_for_another_width() -> None:
    with pytest.raises(InputError, match="task 't': the head expects features of size 4, the model gives 5"):
        task("none").logits(Returns(torch.zeros(2, 5)), {})


def test_float_inputs_follow_the_model_and_integers_stay() -> None:
    model = Returns(torch.zeros(2, 3, 4)).to(torch.bfloat16)
    task().features(model, {"x": torch.zeros(2, 3), "input_ids": torch.zeros(2, 3, dtype=torch.int32)})
    assert model.seen["x"].dtype == torch.bfloat16
    assert model.seen["input_ids"].dtype == torch.int32


def test_inputs_the_model_does_not_take() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match=r"Model\.forward takes x; the data gives pixels too"):
        task().features(Model(), {"x": torch.zeros(1, 2, 4), "pixels": torch.zeros(1)})


def test_a_task_of_the_wrong_parts() -> None:
    with pytest.raises(InputError) as caught:
        Task("t", None, [1, 2], unlabelled=3, batch_size=0)  # type: ignore[arg-type]
    for part in (
        "task 't': 4 problems",
        "data: expected an object with __len__ and batch(indices), found list",
        "unlabelled: expected an object",
        "head: expected a Head, found NoneType",
        "batch_size: expected an integer of at least 1, found 0",
    ):
        assert part in str(caught.value)


def test_adaptation_uses_data_where_there_is_nothing_unlabelled() -> None:
    data, other = Rows(), Rows()
    assert Task("t", head(), data).adaptation_data is data
    assert Task("t", head(), data, other).adaptation_data is other


# texts


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a WordPiece tokenizer of the letters and a few words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    directory = tmp_path_factory.mktemp("text")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters), *CLASSES]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    wordpiece = tokenizers.BertWordPieceTokenizer(str(directory / "vocab.txt"), lowercase=True)
    wordpiece.save(str(directory / "built.json"))
    transformers.BertTokenizerFast(tokenizer_file=str(directory / "built.json"), model_max_length=8).save_pretrained(
        directory
    )
    transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(text_model: Path) -> Any:
    return load_tokenizer(text_model)


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_texts_are_padded_to_the_longest_of_their_batch(tokenizer: Any) -> None:
    samples = TextSamples(["good", "good ab", "bad"], [0, 0, 1], tokenizer)
    assert isinstance(samples, Samples)
    assert len(samples) == 3
    assert list(samples.lengths) == [3, 5, 3]
    inputs, labels = samples.batch([2, 1])
    expected = tokenizer(["bad", "good ab"], padding="longest", return_tensors="pt")
    assert set(inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(inputs[name], value)
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert samples.batch([0, 2])[0]["input_ids"].shape == (2, 3)


def test_texts_are_cut_to_max_length_or_the_tokenizers_limit(tokenizer: Any) -> None:
    text = "a b c d e f g h i j k l"
    assert TextSamples([text], None, tokenizer).batch([0])[0]["input_ids"].shape == (1, 8)
    samples = TextSamples([text], None, tokenizer, max_length=5)
    assert samples.batch([0])[0]["input_ids"].tolist() == [[2, 5, 6, 7, 3]]
    assert samples.batch([0])[1] is None
    with pytest.raises(InputError, match="the tokenizer's limit is 8, found 9"):
        TextSamples([text], None, tokenizer, max_length=9)


def test_many_texts_cross_the_chunks_of_tokenising(tokenizer: Any) -> None:
    texts = ["good" + " a" * (i % 3) for i in range(2500)]
    samples = TextSamples(texts, None, tokenizer)
    assert list(samples.lengths) == [3 + i % 3 for i in range(2500)]
    for i in (0, 1023, 1024, 2499):
        assert samples.batch([i])[0]["input_ids"].tolist() == [tokenizer(texts[i])["input_ids"]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_the_tokenizers_own(text_model: Path, side: str) -> None:
    tokenizer = load_tokenizer(text_model)
    tokenizer.padding_side = side
    texts = ["good", "good ab c", "a b", "bad"]
    inputs, _ = TextSamples(texts, None, tokenizer).batch([1, 3, 0])
    expected = tokenizer([texts[i] for i in (1, 3, 0)], padding="longest", return_tensors="pt")
    assert set(inputs) == set(expected)
    for name, value in expected.items():
        assert torch.equal(inputs[name], value), name


def test_texts_have_a_fingerprint(tokenizer: Any) -> None:
    def fingerprint(texts: Sequence[str] = ("good", "a b"), labels: Any = (0, 1), length: int | None = None) -> str:
        return TextSamples(texts, labels, tokenizer, length).fingerprint()

    others = {
        fingerprint(["good", "a c"]),
        fingerprint(["good a", "b"]),
        fingerprint(labels=[0, 0]),
        fingerprint(labels=None),
        fingerprint(length=3),
    }
    assert len(others) == 5
    assert fingerprint() not in others
    assert fingerprint() == fingerprint(length=8), "where nothing is cut, nothing differs"


def test_texts_that_do_not_fit(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="at least one, found none"):
        TextSamples([], None, tokenizer)
    with pytest.raises(InputError, match="expected 1, one per text, found 2"):
        TextSamples(["a"], [0, 1], tokenizer)


def test_a_tokenizer_without_padding(text_model: Path) -> None:
    bare = load_tokenizer(text_model)
    bare.pad_token = None
    with pytest.raises(InputError, match="no padding token"):
        TextSamples(["a"], None, bare)


def test_jsonl_labels_are_class_names_or_indices(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(
        tmp_path / "d.jsonl",
        {"text": "a", "label": "bad"},
        "",
        {"text": "b", "label": 0, "id": 7},
        {"text": "c", "label": "good"},
    )
    labels = TextSamples.read(path, tokenizer, CLASSES).batch([0, 1, 2])[1]
    assert labels is not None
    assert labels.tolist() == [1, 0, 0]
    assert TextSamples.read(path, tokenizer, None).batch([0])[1] is None


@pytest.mark.parametrize(
    ("record", "part"),
    [
        (
            {"text": "b", "label": "ugly"},
            "label 'ugly' is not a class of the head: expected one of good, bad",
        ),
        (
            {"text": "b", "label": 2},
            "label 2 is not a class of the head: expected one of good, bad, or an index",
        ),
        ({"text": "b", "label": -1}, "label -1 is not"),
        ({"text": "b", "label": True}, "label True is not"),
        ({"text": "b", "label": [0]}, r"label [0] is not"),
        ({"label": 0}, 'expected a string under "text", found the keys label'),
        ({"text": 3, "label": 0}, 'expected a string under "text", found int'),
        ({"text": "b"}, "no label, unlike the lines before it"),
        ('{"text": "b", "label"', "not JSON"),
        ("[1]", "found list"),
        ('{"text": "\\ud800", "label": 0}', "not valid Unicode"),
        ("[" * 100000, "not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: Any, record: Any, part: str) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "a", "label": 0}, record)
    with pytest.raises(InputError) as caught:
        TextSamples.read(path, tokenizer, CLASSES)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert part in str(caught.value)


def test_a_label_where_others_have_none(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", {"text": "a"}, {"text": "b", "label": 0})
    with pytest.raises(InputError, match=r"d\.jsonl:2: a label, unlike the lines before it"):
        TextSamples.read(path, tokenizer, CLASSES)
    assert len(TextSamples.read(path, tokenizer, None)) == 2


def test_many_bad_lines_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "d.jsonl", *[{"text": "a", "label": 9}] * 30)
    with pytest.raises(InputError) as caught:
        TextSamples.read(path, tokenizer, CLASSES)
    assert f"{path}:10: label 9" in str(caught.value)
    assert f"{path}:11" not in str(caught.value)
    assert "and 20 more" in str(caught.value)


def test_jsonl_that_is_empty_missing_or_not_utf8(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=r"d\.jsonl: no sample"):
        TextSamples.read(jsonl(tmp_path / "d.jsonl", ""), tokenizer, CLASSES)
    with pytest.raises(InputError, match=r"no\.jsonl: cannot be read"):
        TextSamples.read(tmp_path / "no.jsonl", tokenizer, CLASSES)
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"d\.jsonl:1: not JSON"):
        TextSamples.read(tmp_path / "d.jsonl", tokenizer, CLASSES)


def test_a_directory_without_tokenizer_files(tmp_path: Path, text_model: Path) -> None:
    (tmp_path / "config.json").write_text((text_model / "config.json").read_text())
    with pytest.raises(CheckpointError, match="copy"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="expected a model directory with its tokenizer, found none"):
        load_tokenizer(tmp_path / "org" / "model")


def test_without_transformers_the_error_says_what_to_install(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'texts need .* transformers: pip install "wemoe-fast\[hf\]"'):
        load_tokenizer(text_model)
    with pytest.raises(InputError, match=r'images need .* transformers: pip install "wemoe-fast\[hf\]"'):
        load_image_processor(text_model)


# images


@pytest.fixture
def image_model(tmp_path: Path) -> Path:
    pytest.importorskip("transformers")
    directory = tmp_path / "model"
    directory.mkdir()
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 8},
        "crop_size": {"height": 8, "width": 8},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture
def images(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    root = tmp_path / "images"
    for name, colours in {"good": [255, 127], "bad": [0]}.items():
        (root / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            pixels = np.full((10, 12, 3), colour, dtype=np.uint8)
            image.fromarray(pixels).save(root / name / f"{number}.png")
    (root / ".cache").mkdir()
    (root / "good" / "notes.txt").touch()
    return root


def test_images_by_class_folder(images: Path, image_model: Path) -> None:
    samples = ImageFolderSamples(images, load_image_processor(image_model), CLASSES)
    assert len(samples) == 3
    inputs, labels = samples.batch([0, 1, 2])
    assert labels is not None
    assert labels.tolist() == [1, 0, 0]
    assert set(inputs) == {"pixel_values"}
    assert inputs["pixel_values"].shape == (3, 3, 8, 8)
    expected = torch.tensor([-1.0, 1.0, 2 * 127 / 255 - 1]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    torch.testing.assert_close(inputs["pixel_values"], expected, atol=1e-5, rtol=0)


def test_images_have_a_fingerprint(images: Path, image_model: Path) -> None:
    def fingerprint(classes: Sequence[str] | None = CLASSES) -> str:
        samples = ImageFolderSamples(images, load_image_processor(image_model), classes)
        return samples.fingerprint()

    before = fingerprint()
    assert fingerprint() == before != fingerprint(None)
    settings = json.loads((image_model / "preprocessor_config.json").read_text())
    (image_model / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.5, 0.5, 0.6]}))
    assert fingerprint() != before
    (image_model / "preprocessor_config.json").write_text(json.dumps(settings))
    assert fingerprint() == before
    path = images / "bad" / "0.png"
    path.write_bytes(path.read_bytes() + b"0")
    assert fingerprint() != before


def test_every_image_becomes_rgb(images: Path) -> None:
    from PIL import Image

    Image.fromarray(np.zeros((10, 12), dtype=np.uint8)).save(images / "bad" / "1.png")
    seen: list[str] = []

    def processor(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        seen.extend(image.mode for image in images)
        return {}

    ImageFolderSamples(images, processor, CLASSES).batch([0, 1, 2])
    assert seen == ["RGB"] * 3


def test_unlabelled_images_may_lie_anywhere(images: Path, image_model: Path) -> None:
    (images / "bad" / "0.png").rename(images / "loose.PNG")
    samples = ImageFolderSamples(images, load_image_processor(image_model), None)
    assert len(samples) == 3
    assert samples.batch([0])[1] is None


def test_folders_that_are_no_class_and_loose_images(images: Path, image_model: Path) -> None:
    (images / "bad").rename(images / "ugly")
    (images / "good" / "0.png").rename(images / "loose.png")
    with pytest.raises(InputError) as caught:
        ImageFolderSamples(images, load_image_processor(image_model), CLASSES)
    assert "folder 'ugly' is not a class of the head (good, bad)" in str(caught.value)
    assert "1 images outside class folders, such as loose.png" in str(caught.value)


def test_image_folders_without_images(tmp_path: Path, image_model: Path) -> None:
    (tmp_path / "empty" / "good").mkdir(parents=True)
    processor = load_image_processor(image_model)
    with pytest.raises(InputError, match=r"expected images .* found none"):
        ImageFolderSamples(tmp_path / "empty", processor, CLASSES)
    with pytest.raises(InputError, match="expected a folder of images, found none"):
        ImageFolderSamples(tmp_path / "nowhere", processor, CLASSES)


def test_a_damaged_image_is_named(images: Path, image_model: Path) -> None:
    path = images / "bad" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    samples = ImageFolderSamples(images, load_image_processor(image_model), CLASSES)
    with pytest.raises(InputError, match=r"bad.0\.png: not a readable image"):
        samples.batch([0])


def test_a_directory_without_image_processor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"image processor cannot be loaded .* from the base model"):
        load_image_processor(tmp_path)


# tensors


def test_tensor_samples(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    save_file({"x": x, "labels": torch.tensor([0, 1, 1])}, tmp_path / "d.safetensors")
    samples = TensorSamples.read(tmp_path / "d.safetensors", CLASSES)
    assert len(samples) == 3
    inputs, labels = samples.batch([2, 0])
    assert set(inputs) == {"x"}
    assert torch.equal(inputs["x"], x[[2, 0]])
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert TensorSamples.read(tmp_path / "d.safetensors", None).batch([0])[1] is None


def test_tensors_have_a_fingerprint() -> None:
    x, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    found = {
        TensorSamples({"x": x}, labels).fingerprint(),
        TensorSamples({"x": x}).fingerprint(),
        TensorSamples({"y": x}, labels).fingerprint(),
        TensorSamples({"x": x + 1e-30}, labels).fingerprint(),
        TensorSamples({"x": x}, labels.flip(0)).fingerprint(),
    }
    assert len(found) == 5
    assert TensorSamples({"x": x.clone()}, labels.int()).fingerprint() in found


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "expected at least one model input, found none"),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(2, 2)}, "found x [3, 2], y [2, 2]"),
        ({"x": torch.tensor(1.0)}, "must agree in their first dimension"),
        ({"x": torch.zeros(0, 2)}, "expected at least one sample, found none"),
        (
            {"x": torch.zeros(3), "labels": torch.zeros(2, dtype=torch.int64)},
            "one per sample, found shape [2]",
        ),
        ({"x": torch.zeros(3), "labels": torch.zeros(3)}, "labels: expected integers, found torch.float32"),
        (
            {"x": torch.zeros(3), "labels": torch.tensor([0, 5, -1])},
            "label 5 of sample 1 (2 in all) is outside the head's 2 classes (good, bad)",
        ),
    ],
)
def test_tensor_files_that_do_not_fit(tmp_path: Path, tensors: dict[str, Tensor], part: str) -> None:
    path = tmp_path / "d.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError) as caught:
        TensorSamples.read(path, CLASSES)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


# tasks.yaml


def test_load_tasks_from_files(tmp_path: Path, text_model: Path) -> None:
    head().save(tmp_path / "head.safetensors")
    jsonl(tmp_path / "test.jsonl", {"text": "good", "label": "good"}, {"text": "bad ab", "label": "bad"})
    jsonl(tmp_path / "adapt.jsonl", {"text": "ab", "label": "not a class, and not read"}, {"text": "a"})
    save_file({"x": torch.zeros(2, 4)}, tmp_path / "x.safetensors")
    (tmp_path / "tasks.yaml").write_text(
        "tasks:\n"
        "  - {name: texts, head: head.safetensors, data: test.jsonl, unlabelled: adapt.jsonl, max_length: 4,"
        " batch_size: 7}\n"
        "  - {name: tensors, head: head.safetensors, data: x.safetensors}\n"
    )
    texts, tensors = load_tasks(tmp_path / "tasks.yaml", text_model)
    assert (texts.name, texts.batch_size, tensors.name, tensors.batch_size) == ("texts", 7, "tensors", 32)
    assert texts.head.classes == CLASSES
    inputs, labels = texts.data.batch([0, 1])
    assert inputs["input_ids"].shape == (2, 4)
    assert labels is not None
    assert labels.tolist() == [0, 1]
    assert texts.adaptation_data.batch([0, 1])[1] is None
    assert tensors.adaptation_data is tensors.data


def test_problems_of_several_tasks_come_at_once(tmp_path: Path, text_model: Path) -> None:
    head().save(tmp_path / "head.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    jsonl(tmp_path / "test.jsonl", {"text": "good", "label": "ugly"})
    (tmp_path / "tasks.yaml").write_text(
        "tasks:\n"
        "  - {name: one, head: head.safetensors, data: test.jsonl}\n"
        "  - {name: two, head: broken.safetensors, data: test.jsonl}\n"
    )
    with pytest.raises(InputError) as caught:
        load_tasks(tmp_path / "tasks.yaml", text_model)
    assert "task 'one': " in str(caught.value)
    assert "label 'ugly'" in str(caught.value)
    assert "task 'two': " in str(caught.value)
    assert "not a readable safetensors file" in str(caught.value)
    with pytest.raises(ConfigError):
        load_tasks(tmp_path / "nothing.yaml", text_model)


ENTRY = """
import torch
from wemoe_fast.tasks import Head, Task
from wemoe_fast.errors import InputError

class Waves:
    def __len__(self):
        return 10

    def batch(self, indices):
        labels = torch.tensor([index % 2 for index in indices])
        return {"x": labels[:, None].float()}, labels

def make():
    return Task("its own name", Head(torch.zeros(2, 4), None, ("a", "b")), Waves(), batch_size=5)

def returns_none(): return None
def raises(): raise KeyError("gone")
def refuses(): raise InputError("waves: no good")
value = 3
"""


def entry_tasks(root: Path, entry: str, more: str = "") -> list[Task]:
    (root / "waves_of_a_test.py").write_text(ENTRY)
    (root / "tasks.yaml").write_text(f"tasks:\n  - {{name: waves, entry: '{entry}'{more}}}\n")
    return load_tasks(root / "tasks.yaml", root)


def test_an_entry_point_beside_the_yaml(tmp_path: Path) -> None:
    before = list(sys.path)
    (found,) = entry_tasks(tmp_path, "waves_of_a_test:make")
    assert (found.name, found.batch_size, len(found.data)) == ("waves", 5, 10)
    (found,) = entry_tasks(tmp_path, "waves_of_a_test:make", ", batch_size: 3")
    assert found.batch_size == 3
    assert sys.path == before


@pytest.mark.parametrize(
    ("entry", "part"),
    [
        ("no_such_module_here:make", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("waves_of_a_test:nothing", "AttributeError"),
        ("waves_of_a_test:value", "expected a function returning a Task, found int"),
        ("waves_of_a_test:returns_none", "expected it to return a Task, found NoneType"),
        ("waves_of_a_test:raises", "KeyError: 'gone'"),
    ],
)
def test_entry_points_that_fail(tmp_path: Path, entry: str, part: str) -> None:
    with pytest.raises(InputError) as caught:
        entry_tasks(tmp_path, entry)
    assert f"task 'waves': entry '{entry}': " in str(caught.value)
    assert part in str(caught.value)


def test_an_entry_points_own_refusal_passes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^waves: no good$"):
        entry_tasks(tmp_path, "waves_of_a_test:refuses")


# through models of the real classes


def merged(base: nn.Module, **options: Any) -> nn.Module:
    experts = {name: copy.deepcopy(base) for name in ("a", "b")}
    generator = torch.Generator().manual_seed(5)
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return upscale(base, experts, **options).eval()


def test_texts_through_a_merged_bert(tmp_path: Path, text_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig.from_pretrained(text_model))
    head(normalize=True, scale=20.0).save(tmp_path / "head.safetensors")
    texts = ["good", "bad ab cde", "a", "b c d e f", "good bad good"]
    jsonl(tmp_path / "test.jsonl", *({"text": text, "label": i % 2} for i, text in enumerate(texts)))
    line = "head: head.safetensors, data: test.jsonl, batch_size:"
    (tmp_path / "tasks.yaml").write_text(f"tasks:\n  - {{name: one, {line} 1}}\n  - {{name: all, {line} 5}}\n")
    tasks = load_tasks(tmp_path / "tasks.yaml", text_model)
    model = merged(base, router_depth=1)
    adapt(model, tasks, steps=3, lr=0.01, batch_size=3, progress=False)
    found = evaluate(model, tasks, progress=False)
    assert found.predictions["one"] == found.predictions["all"]
    for layer, mean in found.routing["one"].items():
        assert found.routing["all"][layer] == pytest.approx(mean, abs=1e-5)  # padding does not reach the routers
    with torch.no_grad():
        alone = [tasks[0].logits(model, tasks[0].data.batch([i])[0]) for i in range(5)]
        together = tasks[0].logits(model, tasks[0].data.batch(range(5))[0])
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-4, rtol=1e-4)


def test_images_through_a_merged_clip(tmp_path: Path, images: Path, image_model: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(**settings, image_size=8, patch_size=4, projection_dim=4)
    torch.manual_seed(0)
    model = merged(transformers.CLIPVisionModelWithProjection(config), router_depth=0)
    head(pooling="none", normalize=True).save(tmp_path / "head.safetensors")
    (tmp_path / "tasks.yaml").write_text("tasks:\n  - {name: t, head: head.safetensors, data: images}\n")
    tasks = load_tasks(tmp_path / "tasks.yaml", image_model)
    adapt(model, tasks, steps=1, batch_size=2, progress=False)
    found = evaluate(model, tasks, progress=False)
    assert found.n == {"t": 3}
    assert len(found.routing["t"]) == 1
