import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from wemoe_fast.sharded import TensorSpec, plan_shards, write_shards

TENSORS = {
    "z": torch.randn(3, 5),
    "a": torch.randn(4).bfloat16(),
    "c": torch.arange(6).view(2, 3),
    "n": torch.zeros(0, 3),
    "s": torch.tensor(2.5, dtype=torch.float16),
    "t": torch.tensor([True, False, True]),
    "u": torch.arange(3, dtype=torch.uint8),
    "i": torch.arange(5, dtype=torch.int16),
    "d": torch.randn(2, dtype=torch.float64),
    "h": torch.randn(3, dtype=torch.complex64),
    'quote" é': torch.randn(2),
}
SPECS = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()]


def in_two(spec):
    """The second half first."""
    flat = TENSORS[spec.name].reshape(-1)
    half = flat.numel() // 2
    yield half, flat[half:]
    yield 0, flat[:half]


def test_the_bytes_are_those_of_safetensors(tmp_path):
    written = sum(write_shards(plan_shards(SPECS, 1 << 30), tmp_path, in_two))
    save_file(TENSORS, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert written == sum(spec.nbytes for spec in SPECS)


@pytest.mark.parametrize("limit", [1, 50, 100])
def test_shards_are_filled_in_order(tmp_path, limit):
    shards = plan_shards(SPECS, limit)
    for _ in write_shards(shards, tmp_path, in_two):
        pass
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(spec.nbytes for spec in SPECS)}
    found = {}
    for shard in shards:
        tensors = load_file(tmp_path / shard.file)
        assert (tmp_path / shard.file).stat().st_size == shard.nbytes
        assert len(tensors) == 1 or sum(t.numel() * t.element_size() for t in tensors.values()) <= limit
        assert {name for name, file in index["weight_map"].items() if file == shard.file} == tensors.keys()
        found |= tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    places = {name: number for number, shard in enumerate(shards) for name in load_file(tmp_path / shard.file)}
    assert [places[name] for name in TENSORS] == sorted(places.values())
