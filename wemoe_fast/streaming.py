"""A planned merge, carried out slab by slab: memory depends on neither the model's size nor the number of experts."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .adapters import adapter_files, is_adapter
from .errors import CheckpointError, InputError
from .headers import INDEX_FILE, TensorEntry, read_columns, read_tensor, weight_files
from .operands import Operand
from .preflight import Copied, Initialised, Merged, MergePlan, Stacked, new_router
from .sharded import Piece, Shard, TensorSpec, write_shards
from .upscale import seeded, wemoe_layers

SLAB = 1 << 20
"""Elements of a tensor that are held at once, of the base and of one expert."""


def write_tensors(
    plan: MergePlan, shards: list[Shard], directory: Path, *, allow_nonfinite: bool = False
) -> Iterator[int]:
    """Write the merged tensors; yields the bytes written piece by piece. Every input is read once, in slabs.

    Raises:
        InputError: inputs that are not finite (unless ``allow_nonfinite``), all of them, at the end.
        CheckpointError: an input that cannot be read, or stores twice, with different values, what its class ties.
    """
    inputs = _Inputs()
    routers = _Routers(plan)
    sources = {spec.name: source for spec, source in plan.tensors.items()}

    def pieces(spec: TensorSpec) -> Iterator[Piece]:
        source = sources[spec.name]
        if isinstance(source, Initialised):
            yield 0, routers.tensor(source)
        elif isinstance(source, Copied):
            yield from ((first, inputs.read(source.base, first, n).to(spec.dtype)) for first, n in _slabs(source.base))
        elif isinstance(source, Merged):
            yield from _merged(spec, source, inputs, plan.recipe.merge_lambda)
        else:
            yield from _stacked(spec, source, inputs)

    _check_twins(plan)
    yield from write_shards(shards, directory, pieces)
    if inputs.nonfinite and not allow_nonfinite:
        raise InputError.of("merge", _nonfinite_problems(plan, inputs.nonfinite))


def workspace_bytes(plan: MergePlan) -> int:
    """What :func:`write_tensors` takes beside what is resident before it, at most."""
    sources = [source for source in plan.tensors.values() if isinstance(source, (Merged, Stacked))]
    operands = [operand for source in sources for operand in source.experts]
    widest = max((spec.dtype.itemsize for spec in plan.tensors), default=4)
    widest = max([widest, *(operand.entry.dtype.itemsize for operand in operands)])
    updates = max((o.update.workspace_bytes for o in operands if o.update is not None), default=0)
    routers = [
        sum(p.numel() * p.element_size() for p in m.router.parameters()) for m in wemoe_layers(plan.model).values()
    ]
    # Read, converted and wide, of base and expert; their sum and the result; what is finite and what is not.
    return 10 * SLAB * max(4, widest) + updates + 2 * max(routers, default=0) + (16 << 20)


def resident_bytes() -> int:
    """Most memory this process has had so far: Python, PyTorch and transformers themselves; 0 where nobody tells."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def input_files(plan: MergePlan) -> dict[Path, list[Path]]:
    """The files that a merge depends on, by directory."""
    found: dict[Path, list[Path]] = {}
    for directory in plan.inputs:
        if is_adapter(directory):
            found[directory] = adapter_files(directory)
            continue
        others = [directory / name for name in ("config.json", INDEX_FILE)]
        found[directory] = [path for path in others if path.is_file()] + weight_files(directory)
    return found


def stamps(plan: MergePlan) -> dict[Path, tuple[int, int, int]]:
    """What tells whether an input file was touched: inode, size and time of the last change."""
    return {
        path: ((status := path.stat()).st_ino, status.st_size, status.st_mtime_ns)
        for paths in input_files(plan).values()
        for path in paths
    }


def sha256(path: Path, tick: Callable[[int], object]) -> str:
    """The file's SHA-256 in hexadecimal; ``tick`` is called with the bytes of every piece read."""
    digest = hashlib.sha256()
    piece = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while read := file.readinto(piece):
            digest.update(memoryview(piece)[:read])
            tick(read)
    return digest.hexdigest()


def input_bytes(plan: MergePlan) -> int:
    """Size of all input files."""
    return sum(os.path.getsize(path) for paths in input_files(plan).values() for path in paths)


class _Inputs:
    """Reads slabs and counts what is not finite in them."""

    def __init__(self) -> None:
        self.nonfinite: Counter[TensorEntry] = Counter()

    def read(self, entry: TensorEntry, first: int, count: int) -> Tensor:
        return self._counted(entry, read_tensor(entry, first, count))

    def read_transposed(self, entry: TensorEntry, first: int, count: int) -> Tensor:
        """Elements [first, first + count), whole rows, of the transposed matrix."""
        rows = entry.shape[0]
        return self._counted(entry, read_columns(entry, first // rows, count // rows).t().reshape(-1))

    def expert(self, operand: Operand, source: Merged | Stacked, first: int, base: Tensor) -> Tensor:
        """The elements of an expert where those of the base are ``base``, from ``first`` on, in its dtype."""
        transposed = isinstance(source, Stacked) and source.transposed
        tuned = base
        if operand.entry != source.base:
            read = self.read_transposed if transposed else self.read
            tuned = read(operand.entry, first, base.numel()).to(operand.dtype).to(base.dtype)
        if operand.update is None:
            return tuned
        return self._counted(operand.update.result, tuned + _added(operand, first, base, transposed))

    def _counted(self, entry: TensorEntry, slab: Tensor) -> Tensor:
        if slab.is_floating_point() or slab.is_complex():
            values = torch.view_as_real(slab) if slab.is_complex() else slab
            values = values if values.dtype.itemsize > 1 else values.float()
            if not all(end.isfinite() for end in torch.aminmax(values)):
                self.nonfinite[entry] += int((~values.isfinite()).sum())
        return slab


class _Routers:
    """The routers of a plan as ``upscale`` makes them, one after the other from one seed, but only one is held."""

    def __init__(self, plan: MergePlan) -> None:
        self._recipe = plan.recipe
        self._shapes = {path: layer.up.stack for path, layer in wemoe_layers(plan.model).items()}
        self._states: dict[str, Tensor] = {}
        self._held: tuple[str, Mapping[str, Tensor]] | None = None

    def tensor(self, source: Initialised) -> Tensor:
        if not self._states:
            with seeded(self._recipe.seed):
                for path in self._shapes:
                    self._states[path] = torch.get_rng_state()
                    self._make(path)
        if self._held is None or self._held[0] != source.layer:
            self._held = None
            with seeded(self._recipe.seed):
                torch.set_rng_state(self._states[source.layer])
                self._held = source.layer, self._make(source.layer)
        return self._held[1][source.name]

    def _make(self, path: str) -> Mapping[str, Tensor]:
        stack = self._shapes[path]
        return new_router(stack.shape[2], self._recipe, stack.dtype).state_dict()


def _added(operand: Operand, first: int, base: Tensor, transposed: bool) -> Tensor:
    """What an adapter adds to these elements; a transposed matrix is read in whole rows."""
    assert operand.update is not None
    shape = operand.entry.shape
    if transposed:
        rows = shape[0]
        return operand.update.rows(first // rows, base.numel() // rows, base.dtype, transposed=True).view(-1)
    return operand.update.elements(first, base.numel(), math.prod(shape[1:]), base.dtype)


def _slabs(entry: TensorEntry, multiple: int = 1) -> Iterator[tuple[int, int]]:
    step = max(1, SLAB // max(1, multiple)) * max(1, multiple)
    return ((first, min(step, entry.numel - first)) for first in range(0, entry.numel, step))


def _merged(spec: TensorSpec, source: Merged, inputs: _Inputs, scaling: float) -> Iterator[Piece]:
    """``upscale.task_arithmetic``, the same operations in the same order."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    for first, count in _slabs(source.base):
        pretrained = inputs.read(source.base, first, count).to(spec.dtype).to(wide)
        total = torch.zeros_like(pretrained)
        for expert in source.experts:
            total += inputs.expert(expert, source, first, pretrained) - pretrained
        yield first, (pretrained + scaling * total).to(spec.dtype)


def _stacked(spec: TensorSpec, source: Stacked, inputs: _Inputs) -> Iterator[Piece]:
    """``task_vectors.task_vectors``, the same operations."""
    wide = torch.promote_types(spec.dtype, torch.float32)
    read = inputs.read_transposed if source.transposed else inputs.read
    for first, count in _slabs(source.base, source.base.shape[0] if source.transposed else 1):
        base = read(source.base, first, count).to(spec.dtype)
        yield first, base
        reference = base.to(wide)
        for place, expert in enumerate(source.experts, 1):
            tuned = inputs.expert(expert, source, first, reference)
            yield place * source.base.numel + first, (tuned - reference).to(spec.dtype)


def _check_twins(plan: MergePlan) -> None:
    problems = [
        f"{other.path}: {other.name}: expected what {kept.name} is, as the model ties them, found other values"
        for kept, other in plan.twins
        if kept.shape != other.shape or kept.dtype != other.dtype or not _equal(kept, other)
    ]
    if problems:
        raise CheckpointError.of("merge", problems)


def _equal(one: TensorEntry, other: TensorEntry) -> bool:
    slabs = ((read_tensor(one, *slab), read_tensor(other, *slab)) for slab in _slabs(one))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in slabs)


def _nonfinite_problems(plan: MergePlan, nonfinite: Mapping[TensorEntry, int]) -> list[str]:
    owners = {directory: f"expert {name!r}" for name, directory in plan.recipe.experts.items()}
    owners[plan.recipe.base] = "base"
    return [
        f"{owners[entry.path.parent]}: {entry.name}: expected finite numbers, found {count} NaN or infinite in "
        f"{entry.path}; repair the checkpoint or pass allow_nonfinite (--allow-nonfinite)"
        for entry, count in nonfinite.items()
    ]
