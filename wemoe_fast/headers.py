"""Safetensors checkpoints without their tensors: headers, index, and where in which file every tensor lies.

Files come from anywhere. A header is read only after its declared size was held against the file's, and every
number in it is checked before it is used; tensors are read by ordinary reads, so that no file is mapped into memory.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 32 << 20
"""Of a header or a JSON file: far beyond what models have, small enough to be read by anybody."""
SHOWN = 20
"""Problems of one file that are listed; a damaged header can have one per tensor."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""By their names in safetensors headers, in the format's own order."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: row-major from byte ``start`` on."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name; reads the header alone.

    Raises:
        CheckpointError: not a whole safetensors file, with everything that is wrong with its header.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            declared = int.from_bytes(file.read(8), "little")
            if size < 8 or declared > size - 8:
                found = f"{size} bytes in all" if size < 8 else f"{declared} and {size - 8} bytes after it"
                raise _damaged(path, [f"expected a header size of 8 bytes and a header of that size, found {found}"])
            if declared > MAX_HEADER_BYTES:
                raise _damaged(path, [f"expected a header of at most {MAX_HEADER_BYTES} bytes, found {declared}"])
            text = file.read(declared)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    content = parse_json(text, f"{path}: damaged or not a safetensors file: its header")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, [f"__metadata__: expected texts by name, found {metadata!r:.60}"])
    data = size - 8 - declared
    entries, ends, problems = {}, {}, []
    for name, value in content.items():
        entry = _entry(name, value, path, 8 + declared, data)
        if isinstance(entry, str):
            problems.append(entry)
        else:
            entries[name] = entry
            ends[name] = entry.start + entry.nbytes
    if not problems:
        expected = 8 + declared
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, ends[item[0]])):
            if entry.start != expected:
                what = "overlaps what is before it" if entry.start < expected else "leaves a gap before it"
                problems.append(f"{name}: {what}: expected data from byte {expected} on, found {entry.start}")
            expected = max(expected, ends[name])
        if not problems and expected != size:
            problems.append(f"expected {expected} bytes in all, found {size}")
    if problems:
        raise _damaged(path, problems)
    return entries


def _entry(name: str, value: Any, path: Path, begin: int, data: int) -> TensorEntry | str:
    """The entry, or what is wrong with it. ``begin``: where the file's tensors begin; ``data``: their bytes in all."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return f"{name:.80}: expected dtype, shape and data_offsets, found {value!r:.60}"
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        return f"{name:.80}: expected a dtype of {', '.join(DTYPES)}, found {value['dtype']!r:.40}"
    shape, offsets = value["shape"], value["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        return f"{name:.80}: expected a shape and two data_offsets, found {shape!r:.60} and {offsets!r:.60}"
    if offsets[0] > offsets[1] or offsets[1] > data:
        return f"{name:.80}: expected data_offsets rising up to {data}, found {offsets!r:.60}"
    # Sizes of 2^40 do not become numbers of thousands of digits: 64 sizes at most, each of 64 bits at most.
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        return f"{name:.80}: expected data for {value['dtype']} {shape!r:.60}, found {offsets[1] - offsets[0]} bytes"
    return TensorEntry(name, dtype, tuple(shape), path, begin + offsets[0])


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _damaged(path: Path, problems: list[str]) -> CheckpointError:
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return CheckpointError.of(f"{path}: damaged or not a safetensors file", [*problems[:SHOWN], *more])


def read_checkpoint(directory: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint by name, from its headers and index alone.

    Raises:
        CheckpointError: files missing, damaged or pickled; an index that disagrees with its files, everything at once.
    """
    entries: dict[str, TensorEntry] = {}
    problems = []
    for path in weight_files(directory):
        try:
            found = read_header(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{path}: {name} is in another file too ({entries[name].path})" for name in found if name in entries
        ]
        entries |= found
    if not problems and not (directory / WEIGHTS_FILE).is_file():
        problems += _disagreements(directory, entries)
    if problems:
        raise problems_of(str(directory), problems)
    return entries


def _disagreements(directory: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    index, path = _weight_map(directory), directory / INDEX_FILE
    problems = [f"{path}: {name} is in no file" for name in index if name not in entries]
    problems += [
        f"{path}: {name}, which {entries[name].path} holds, is missing" for name in entries if name not in index
    ]
    return problems + [
        f"{path}: {name}: expected {entries[name].path.name}, which holds it, found {file!r}"
        for name, file in index.items()
        if name in entries and entries[name].path.name != file
    ]


def problems_of(subject: str, problems: list[str]) -> CheckpointError:
    """One error; the problem itself where there is only one, which names its file."""
    return CheckpointError(problems[0]) if len(problems) == 1 else CheckpointError.of(subject, problems)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in a fixed order.

    Raises:
        CheckpointError: none, files that are missing, pickles only, or an index that names a file elsewhere.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        pickles = pickle_files(directory)
        if pickles:
            raise CheckpointError(
                f"{directory}: expected safetensors, found pickle files ({', '.join(p.name for p in pickles)}), "
                "which can run code when opened. Convert them, without running any: "
                f"{conversion_command(directory)}"
            )
        raise CheckpointError(f"{directory}: expected {WEIGHTS_FILE} or {INDEX_FILE}, found neither")
    names = sorted(set(_weight_map(directory).values()))
    problems = []
    for name in names:
        if Path(name).name != name or name == ".." or "\\" in name or "\0" in name:
            problems.append(f"{name!r:.80}: expected the name of a file in the same directory")
        elif len(name) > 255 or not (directory / name).is_file():
            problems.append(f"{name:.80} is missing")
    if problems:
        raise CheckpointError.of(str(directory / INDEX_FILE), problems)
    return [directory / name for name in names]


def pickle_files(directory: Path) -> list[Path]:
    """The files in PyTorch's own format, which are never opened here, but see ``convert``."""
    return sorted(path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))


def conversion_command(directory: Path) -> str:
    """The shell command that turns a directory of pickles into one of safetensors."""
    source = directory.resolve()
    return f"wemoe-fast convert {shlex.quote(str(source))} --out {shlex.quote(f'{source}-safetensors')}"


def _weight_map(directory: Path) -> dict[str, str]:
    names = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()) or not names:
        raise CheckpointError(f"{directory / INDEX_FILE}: expected a weight_map of tensor names to file names")
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object; CheckpointError for anything else, in form or size."""
    try:
        size = path.stat().st_size
        if size > MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_HEADER_BYTES} bytes of JSON, found {size}")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: could not be read as JSON: {error}") from error
    return parse_json(text, str(path))


def parse_json(text: bytes, subject: str) -> dict[str, Any]:
    """A JSON object without repeated keys."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{subject}: could not be read as JSON: {error!s:.200}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{subject}: expected a JSON object, found {type(content).__name__}")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})[:3] if len(names) < 1000 else ["a key"]
        raise ValueError(f"keys are used twice: {', '.join(repeated):.120}")
    return content


def read_tensor(entry: TensorEntry, first: int = 0, count: int | None = None) -> Tensor:
    """Elements [first, first + count) of a tensor in row-major order, [count]; all of it, in its shape, by default.

    Raises:
        CheckpointError: the file cannot be read or became shorter.
    """
    tensor = torch.empty(entry.shape if count is None else (count,), dtype=entry.dtype)
    _read_into(entry, tensor.view(1, -1), [first])
    return tensor


def read_columns(entry: TensorEntry, first: int, count: int) -> Tensor:
    """Columns [first, first + count) of a matrix: [rows, count].

    Raises:
        CheckpointError: the file cannot be read or became shorter.
    """
    rows, columns = entry.shape
    block = torch.empty(rows, count, dtype=entry.dtype)
    _read_into(entry, block, range(first, first + rows * columns, columns))
    return block


def _read_into(entry: TensorEntry, block: Tensor, places: Iterable[int]) -> None:
    """Fill the rows of a block [n, count] from the elements at n places on."""
    if block.numel() == 0:
        return
    try:
        with entry.path.open("rb", buffering=0) as file:
            for row, first in zip(block.view(torch.uint8).numpy(), places, strict=True):
                into, done = memoryview(row.data), 0
                file.seek(entry.start + first * entry.dtype.itemsize)
                while done < len(into):
                    read = file.readinto(into[done:])
                    if not read:
                        raise CheckpointError(f"{entry.path}: {entry.name}: the file ends inside of it; it was changed")
                    done += read
    except OSError as error:
        raise CheckpointError(f"{entry.path}: {entry.name}: cannot be read: {error.strerror or error}") from error
