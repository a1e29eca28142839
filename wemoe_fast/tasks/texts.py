"""Texts and labels, from Python, JSONL or Parquet."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..fingerprint import Digest
from .labels import class_index, listed


class TextSamples:
    """Texts and labels; tokenised once, when first needed, and padded to the longest of each batch."""

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int] | None,
        tokenizer: Any,
        max_length: int | None = None,
    ) -> None:
        """`tokenizer` is a Hugging Face tokenizer; `max_length` None stands for its own limit."""
        if len(texts) == 0:
            raise InputError("texts: expected at least one, found none")
        if labels is not None and len(labels) != len(texts):
            raise InputError(f"labels: expected {len(texts)}, one per text, found {len(labels)}")
        if tokenizer.pad_token is None:
            raise InputError("tokenizer: it has no padding token; set tokenizer.pad_token")
        limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None
        if max_length is not None and limit is not None and max_length > limit:
            raise InputError(f"max_length: the tokenizer's limit is {limit}, found {max_length}")
        self._texts: Sequence[str] | None = texts  # let go when tokenised
        self._n = len(texts)
        self._labels = None if labels is None else torch.tensor(labels, dtype=torch.long)
        self._tokenizer = tokenizer
        self._max_length = limit if max_length is None else max_length

    @classmethod
    def read(
        cls,
        path: str | Path,
        tokenizer: Any,
        classes: Sequence[str] | None,
        max_length: int | None = None,
    ) -> TextSamples:
        """From JSONL, one {"text": ..., "label": class name or index} a line.

        Labels are all there or all missing; with `classes` None they are ignored. Raises InputError naming
        file and line.
        """
        texts, labels = _read_jsonl(Path(path), classes)
        try:
            return cls(texts, labels, tokenizer, max_length)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def __len__(self) -> int:
        return self._n

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample."""
        return np.diff(self._tokens[0])

    def fingerprint(self) -> str:
        """Of every token and label: the tokenizer and `max_length` show in them."""
        digest = Digest().array(self._tokens[0]).plain([self._tokenizer.padding_side, self._tokenizer.pad_token_id])
        for name, flat in sorted(self._tokens[1].items()):
            digest.text(name).array(flat)
        return digest.tensors({} if self._labels is None else {"labels": self._labels}).hex()

    def batch(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], Tensor | None]:
        offsets, fields = self._tokens
        chosen = np.asarray(indices, np.int64)
        starts, lengths = offsets[chosen, None], (offsets[chosen + 1] - offsets[chosen])[:, None]
        column = np.arange(lengths.max())
        if self._padding_side == "left":
            column = column - (len(column) - lengths)
        real = (column >= 0) & (column < lengths)
        source = (starts + column)[real]
        inputs = {}
        for name, flat in fields.items():
            padded = np.full(real.shape, self._padding[name], np.int64)
            padded[real] = flat[source]
            inputs[name] = torch.from_numpy(padded)
        return inputs, None if self._labels is None else self._labels[torch.from_numpy(chosen)]

    @cached_property
    def _tokens(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Offsets [n + 1], and each field (input_ids, attention_mask, ...) of all samples end to end."""
        assert self._texts is not None
        settings = {"truncation": self._max_length is not None, "max_length": self._max_length}
        chunks: dict[str, list[np.ndarray]] = {}
        lengths: list[int] = []
        for start in range(0, self._n, 1024):
            encoded = self._tokenizer(self._texts[start : start + 1024], **settings)
            sizes = [len(ids) for ids in encoded["input_ids"]]
            for name, values in encoded.items():
                flat = np.fromiter(itertools.chain.from_iterable(values), np.int32, sum(sizes))
                chunks.setdefault(name, []).append(flat)
            lengths += sizes
        if min(lengths) == 0:
            raise InputError(f"sample {lengths.index(0)}: the tokenizer makes no token of its text")
        self._texts = None
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return offsets, {name: _compact(parts) for name, parts in chunks.items()}

    @property
    def _padding_side(self) -> str:
        return str(self._tokenizer.padding_side)

    @cached_property
    def _padding(self) -> dict[str, int]:
        """What the tokenizer pads each field with."""
        # transformers 4 would advise against pad(), meant for those who call it right after tokenising
        vars(self._tokenizer).setdefault("deprecation_warnings", {})["Asking-to-pad-a-fast-tokenizer"] = True
        rows = [{name: [1] * length for name in self._tokens[1]} for length in (1, 2)]
        padded = self._tokenizer.pad(rows, padding="longest")
        cell = 0 if self._padding_side == "left" else 1
        return {name: padded[name][0][cell] for name in self._tokens[1]}


def _compact(parts: list[np.ndarray]) -> np.ndarray:
    """The parts end to end; what is the same everywhere (attention_mask, token types) takes no memory."""
    value = parts[0][0]
    if all((part == value).all() for part in parts):
        return np.broadcast_to(value, sum(map(len, parts)))
    return np.concatenate(parts)


def _read_jsonl(path: Path, classes: Sequence[str] | None) -> tuple[list[str], list[int] | None]:
    texts: list[str] = []
    labels: list[int | None] = []
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    text, label = _record(line, classes)
                except InputError as error:
                    problems.append(f"{path}:{number}: {error}")
                    continue
                texts.append(text)
                labels.append(label)
                if label is None and labels[0] is not None:
                    problems.append(f"{path}:{number}: no label, unlike the lines before it")
                elif label is not None and labels[0] is None:
                    problems.append(f"{path}:{number}: a label, unlike the lines before it")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if problems:
        raise listed(path, problems)
    if not texts:
        raise InputError(f'{path}: no sample; expected lines such as {{"text": "...", "label": "..."}}')
    known = [label for label in labels if label is not None]
    return texts, known or None


def _record(line: bytes, classes: Sequence[str] | None) -> tuple[str, int | None]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise InputError(f'expected {{"text": ..., "label": ...}}, found {type(record).__name__}')
    text = record.get("text")
    if not isinstance(text, str):
        found = type(text).__name__ if "text" in record else f"the keys {', '.join(record) or 'none'}"
        raise InputError(f'expected a string under "text", found {found}')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the text has half of a surrogate pair and is not valid Unicode") from None
    if classes is None or record.get("label") is None:
        return text, None
    return text, class_index(record["label"], classes)
