"""Images in one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..fingerprint import Digest
from .processors import missing

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


class ImageFolderSamples:
    """Images in one folder per class, decoded when asked for, prepared by a Hugging Face image processor."""

    def __init__(self, directory: str | Path, processor: Any, classes: Sequence[str] | None) -> None:
        """With `classes` None the samples are unlabelled: every image below `directory`, classes or not."""
        root = Path(directory)
        self._processor = processor
        self._labels: Tensor | None = None
        if not root.is_dir():
            raise InputError(f"{root}: expected a folder of images, found none")
        if classes is None:
            self._paths = _images(root, deep=True)
        else:
            folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
            problems = [
                f"folder {folder.name!r} is not a class of the head ({', '.join(classes)})"
                for folder in folders
                if folder.name not in classes
            ]
            stray = _images(root, deep=False)
            if stray:
                problems.append(f"{len(stray)} images outside class folders, such as {stray[0].name}")
            if problems:
                raise InputError.of(str(root), problems)
            index = {name: number for number, name in enumerate(classes)}
            found = [(path, index[folder.name]) for folder in folders for path in _images(folder, deep=True)]
            self._paths = [path for path, _ in found]
            self._labels = torch.tensor([label for _, label in found], dtype=torch.long)
        if not self._paths:
            raise InputError(f"{root}: expected images ({', '.join(IMAGE_SUFFIXES)}), found none")

    def __len__(self) -> int:
        return len(self._paths)

    def fingerprint(self) -> str:
        """Of every file's bytes, the labels and the processor."""
        digest = processor_digest(self._processor)
        for path in self._paths:
            try:
                digest.data(path.read_bytes())
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
        return digest.tensors({} if self._labels is None else {"labels": self._labels}).hex()

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        images = [decode(self._paths[i], str(self._paths[i])) for i in indices]
        inputs = dict(self._processor(images=images, return_tensors="pt"))
        return inputs, None if self._labels is None else self._labels[list(indices)]


def _images(directory: Path, *, deep: bool) -> list[Path]:
    entries = directory.rglob("*") if deep else directory.iterdir()
    return sorted(path for path in entries if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def processor_digest(processor: Any) -> Digest:
    """Of an image processor's class and settings."""
    settings = processor.to_dict() if hasattr(processor, "to_dict") else repr(processor)
    return Digest().text(type(processor).__name__).plain(settings)


def decode(file: Path | BytesIO, where: str) -> Any:
    """An image as RGB. Raises InputError that begins with `where`."""
    try:
        from PIL import Image
    except ImportError as error:
        raise missing("images", "Pillow") from error
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a readable image: {error}") from error
