"""Parquet: the columns text and label, or image and label, as the datasets library writes them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from .images import decode, processor_digest
from .labels import class_index, listed
from .processors import Processors, missing
from .task import Samples
from .texts import TextSamples


def read_parquet(
    path: str | Path, processors: Processors, classes: Sequence[str] | None, max_length: int | None = None
) -> Samples:
    """Samples of a Parquet file with a column "text" (strings) or "image" (bytes, or a struct with the field bytes).

    The column "label" holds class names or indices, for all rows or for none; with `classes` None it is not read.

    Raises:
        InputError: pyarrow is not installed, columns that are missing or of another type, rows that do not fit.
        CheckpointError: a file that is missing or damaged.
    """
    path = Path(path)
    parquet = _open(path)
    columns = parquet.schema_arrow.names
    if ("text" in columns) == ("image" in columns):
        raise InputError(f"{path}: expected a column text or a column image, found {', '.join(columns) or 'none'}")
    if parquet.metadata.num_rows == 0:
        raise InputError(f"{path}: expected at least one row, found none")
    labels = None if classes is None or "label" not in columns else _labels(path, parquet, classes)
    if "text" in columns:
        try:
            return TextSamples(_texts(path, parquet), labels, processors.tokenizer, max_length)
        except InputError as error:
            raise error if str(error).startswith(str(path)) else InputError(f"{path}: {error}") from error
    if max_length is not None:
        raise InputError(f"{path}: max_length is for texts, found images; remove it")
    return ParquetImages(path, parquet, labels, processors.image_processor)


class ParquetImages:
    """Encoded images in a Parquet file, read by row group and decoded when asked for."""

    def __init__(self, path: Path, parquet: Any, labels: Sequence[int] | None, processor: Any) -> None:
        self._path, self._parquet, self._processor = path, parquet, processor
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.long)
        rows = (parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
        self._starts = list(accumulate(rows, initial=0))
        self._loaded: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> str:
        """Of the file's bytes, the labels and the processor."""
        digest = processor_digest(self._processor).data(self._path.read_bytes())
        return digest.tensors({} if self._labels is None else {"labels": self._labels}).hex()

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        images = [decode(BytesIO(self._encoded(i)), f"{self._path}, row {i}") for i in indices]
        inputs = dict(self._processor(images=images, return_tensors="pt"))
        return inputs, None if self._labels is None else self._labels[list(indices)]

    def _encoded(self, index: int) -> bytes:
        group = bisect_right(self._starts, index) - 1
        if self._loaded[0] != group:
            self._loaded = (group, _read(self._path, self._parquet, "image", group))
        value = self._loaded[1][index - self._starts[group]].as_py()
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise InputError(
                f"{self._path}, row {index}: expected the bytes of an image, found {type(content).__name__}"
            )
        return content


class _Texts(Sequence[str]):
    """A column of strings, turned into Python's slice by slice."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        found = self._column[index]
        return found.to_pylist() if isinstance(index, slice) else found.as_py()


def _texts(path: Path, parquet: Any) -> Sequence[str]:
    import pyarrow

    column = _read(path, parquet, "text")
    if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        raise InputError(f"{path}: column text: expected strings, found {column.type}")
    if column.null_count:
        rows = [row for row, value in enumerate(column.is_null().to_pylist()) if value]
        raise listed(path, [f"{path}, row {row}: expected a text, found none" for row in rows])
    return _Texts(column)


def _labels(path: Path, parquet: Any, classes: Sequence[str]) -> list[int] | None:
    values = _read(path, parquet, "label").to_pylist()
    if all(value is None for value in values):
        return None
    known: dict[Any, int] = {}
    problems = []
    for row, value in enumerate(values):
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value in known:
            continue
        try:
            if value is None:
                raise InputError("no label, unlike other rows")
            index = class_index(value, classes)
        except InputError as error:
            problems.append(f"{path}, row {row}: {error}")
            continue
        known[value] = index
    if problems:
        raise listed(path, problems)
    return [known[value] for value in values]


def _open(path: Path) -> Any:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise missing("Parquet files", "pyarrow", "data") from error
    try:
        return ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: not a readable Parquet file: {' '.join(str(error).split())}") from error


def _read(path: Path, parquet: Any, column: str, group: int | None = None) -> Any:
    import pyarrow

    try:
        table = parquet.read([column]) if group is None else parquet.read_row_group(group, [column])
    except (pyarrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{path}: column {column} cannot be read: {' '.join(str(error).split())}") from error
    return table.column(column)
