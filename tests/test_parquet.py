from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wemoe_fast.errors import CheckpointError, InputError
from wemoe_fast.tasks import Samples, TextSamples, read_parquet

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
CLASSES = ("good", "bad")


class Tokenizer:
    """As much of Hugging Face's as texts need: a token for every letter."""

    pad_token, pad_token_id, model_max_length, padding_side = "-", 0, 8, "right"

    def __call__(self, texts: list[str], truncation: bool, max_length: int) -> dict[str, Any]:
        return {"input_ids": [[ord(letter) for letter in text[:max_length]] for text in texts]}

    def pad(self, rows: list[dict[str, list[int]]], padding: str) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        return {"input_ids": [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]}


def processor(images: list[Any], return_tensors: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([torch.from_numpy(np.array(image)).float().mean((0, 1)) for image in images])}


PROCESSORS: Any = SimpleNamespace(tokenizer=Tokenizer(), image_processor=processor)


def written(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def png(colour: int) -> bytes:
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.fromarray(np.full((2, 3, 3), colour, np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("labels", [["bad", "good", "bad"], [1, 0, 1]])
def test_texts_and_labels(tmp_path: Path, labels: list[Any]) -> None:
    samples = read_parquet(
        written(tmp_path / "d.parquet", text=["ab", "c", "d" * 20], label=labels), PROCESSORS, CLASSES
    )
    assert isinstance(samples, TextSamples)
    inputs, found = samples.batch([2, 1])
    assert inputs["input_ids"].tolist() == [[100] * 8, [99] + [0] * 7]
    assert found is not None
    assert found.tolist() == [1, 0]
    unlabelled = read_parquet(tmp_path / "d.parquet", PROCESSORS, None, max_length=1)
    assert unlabelled.batch([2])[0]["input_ids"].tolist() == [[100]]
    assert unlabelled.batch([2])[1] is None


@pytest.mark.parametrize("struct", [True, False])
def test_images_and_labels(tmp_path: Path, struct: bool) -> None:
    colours = [10, 20, 30, 40, 50]
    images = [{"bytes": png(c), "path": "x"} if struct else png(c) for c in colours]
    path = written(tmp_path / "d.parquet", image=images, label=[0, 1, 0, 1, 0])
    samples = read_parquet(path, PROCESSORS, CLASSES)
    assert isinstance(samples, Samples)
    assert len(samples) == 5
    inputs, labels = samples.batch([4, 0, 3])
    assert inputs["pixel_values"][:, 0].tolist() == [50, 10, 40]
    assert labels is not None
    assert labels.tolist() == [0, 0, 1]
    before = samples.fingerprint()  # type: ignore[attr-defined]
    written(path, image=[*images[:-1], images[0]], label=[0, 1, 0, 1, 0])
    again: Any = read_parquet(path, PROCESSORS, CLASSES)
    assert again.fingerprint() != before
    with pytest.raises(InputError, match="max_length is for texts, found images"):
        read_parquet(path, PROCESSORS, CLASSES, max_length=3)


def test_images_that_are_none(tmp_path: Path) -> None:
    images = pyarrow.array([b"no image", None], pyarrow.binary())
    samples = read_parquet(written(tmp_path / "d.parquet", image=images, label=[0, 0]), PROCESSORS, CLASSES)
    with pytest.raises(InputError, match=r"d\.parquet, row 0: not a readable image"):
        samples.batch([0])
    with pytest.raises(InputError, match=r"d\.parquet, row 1: expected the bytes of an image, found NoneType"):
        samples.batch([1])


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"words": ["a"], "label": [0]}, "expected a column text or a column image, found words, label"),
        ({"text": ["a"], "image": [b"a"]}, "expected a column text or a column image, found text, image"),
        ({"text": [1], "label": [0]}, "column text: expected strings, found int64"),
        ({"text": ["a", None, None]}, "row 1: expected a text, found none"),
        ({"text": ["a", "b"], "label": ["good", "ugly"]}, "row 1: label 'ugly' is not a class"),
        ({"text": ["a", "b"], "label": [0, 2]}, "row 1: label 2 is not a class"),
        ({"text": ["a", "b"], "label": [None, 1]}, "row 0: no label, unlike other rows"),
        ({"text": ["a", "b"], "label": [0.0, 1.0]}, "row 0: label 0.0 is not a class"),
        ({"text": ["a", "b"], "label": [[0], [1]]}, "row 0: label [0] is not a class"),
        ({"text": []}, "expected at least one row, found none"),
    ],
)
def test_columns_that_do_not_fit(tmp_path: Path, columns: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        read_parquet(written(tmp_path / "d.parquet", **columns), PROCESSORS, CLASSES)
    assert part in str(caught.value)
    assert "d.parquet" in str(caught.value)


def test_texts_without_labels(tmp_path: Path) -> None:
    for columns in ({}, {"label": pyarrow.nulls(2)}):
        path = written(tmp_path / "d.parquet", text=["a", "b"], **columns)
        assert read_parquet(path, PROCESSORS, CLASSES).batch([0])[1] is None


def test_damaged_files_each_give_one_error(tmp_path: Path) -> None:
    path = written(tmp_path / "d.parquet", text=["ab", "c", "d"] * 30, label=[0, 1, 0] * 30)
    whole = path.read_bytes()
    cuts = [whole[:size] for size in (0, 3, 4, 12, len(whole) // 2, len(whole) - 1)]
    flips = [whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :] for at in range(0, len(whole), 31)]
    refused: list[str] = []
    for content in cuts + flips:
        path.write_bytes(content)
        try:
            len(read_parquet(path, PROCESSORS, CLASSES))
        except (CheckpointError, InputError) as error:
            refused.append(str(error))
    assert len(refused) >= len(cuts)
    assert all("d.parquet" in text for text in refused)
    with pytest.raises(CheckpointError, match="there is no such file"):
        read_parquet(tmp_path / "nowhere.parquet", PROCESSORS, CLASSES)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "d.parquet", text=["a"])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r'need the package pyarrow: pip install "wemoe-fast\[data\]"'):
        read_parquet(path, PROCESSORS, CLASSES)
