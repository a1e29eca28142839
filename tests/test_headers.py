import json

import pytest
import torch
from safetensors.torch import save_file

from wemoe_fast import CheckpointError
from wemoe_fast.headers import read_checkpoint, read_header, read_json, read_tensor

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(4).bfloat16(),
    "c": torch.arange(6).view(2, 3),
    "d": torch.zeros(0, 3),
    "e": torch.tensor(2.5, dtype=torch.float16),
    "f": torch.tensor([True, False]),
    "g": torch.randn(2).to(torch.float8_e4m3fn),
    "h": torch.randn(3, dtype=torch.complex64),
}


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape=(2,), offsets=(0, 8), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_tensors_are_found_where_they_lie(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    entries = read_header(tmp_path / "x.safetensors")
    assert entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        found = read_tensor(entries[name])
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    assert torch.equal(read_tensor(entries["a"], 4, 7), TENSORS["a"].view(-1)[4:11])


@pytest.mark.parametrize(
    ("header", "data", "part"),
    [
        ({"a": entry()}, 7, "rising up to 7"),
        ({"a": entry()}, 9, "bytes in all"),
        ({"a": entry((3,))}, 8, "expected data for F32 [3], found 8 bytes"),
        ({"a": entry((2**40, 2**40), (0, 8))}, 8, "expected data"),
        ({"a": entry((2**62, 4), (0, 0))}, 0, "expected data"),
        ({"a": entry((0, 2**40), (0, 0))}, 0, None),
        ({"a": entry((-1, -2))}, 8, "expected a shape"),
        ({"a": entry((2.0,))}, 8, "expected a shape"),
        ({"a": entry((True, 2))}, 8, "expected a shape"),
        ({"a": entry(offsets=(8, 0))}, 8, "rising"),
        ({"a": entry(offsets=(0, 2**60))}, 8, "rising"),
        ({"a": entry(offsets=(-8, 0))}, 8, "two data_offsets"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "b: overlaps"),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, 20, "b: leaves a gap"),
        ({"a": entry(dtype="F4")}, 8, "expected a dtype of BOOL"),
        ({"a": entry(dtype=[])}, 8, "expected a dtype"),
        ({"a": {**entry(), "x": 1}}, 8, "expected dtype, shape and data_offsets"),
        ({"a": None}, 0, "expected dtype, shape and data_offsets"),
        ({"__metadata__": {"a": 1}}, 0, "__metadata__"),
        ([], 0, "JSON object"),
        (b"{", 0, "JSON"),
        (b"\xff", 0, "JSON"),
        (b"[" * 100_000, 0, "JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "JSON"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
    ],
)
def test_headers_that_cannot_be_right_are_refused(tmp_path, header, data, part):
    path = raw(tmp_path / "x.safetensors", header, bytes(data))
    if part is None:
        assert read_header(path)["a"].shape == (0, 2**40)
        return
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_header(path)
    assert part in str(caught.value)


@pytest.mark.parametrize("size", [2**60, 2**63, 2**64 - 1, 100])
def test_a_declared_size_is_held_against_the_file_before_anything_is_read(tmp_path, size):
    (tmp_path / "x").write_bytes(size.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"found {size} and 2 bytes after it"):
        read_header(tmp_path / "x")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "whole", metadata={"format": "pt"})
    data = (tmp_path / "whole").read_bytes()
    for length in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            read_header(tmp_path / "cut")


def test_a_header_that_is_too_large_is_not_read(tmp_path):
    with (tmp_path / "x").open("wb") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)  # without a byte on the disk
    with pytest.raises(CheckpointError, match="a header of at most"):
        read_header(tmp_path / "x")


def test_every_problem_of_a_header_is_listed_up_to_a_point(tmp_path):
    path = raw(tmp_path / "x", {str(n): entry((n,)) for n in range(50)}, bytes(8))
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert str(caught.value).count("\n") == 21
    assert "and 29 more" in str(caught.value)


def sharded(directory, index=None):
    directory.mkdir()
    save_file({"a": TENSORS["a"]}, directory / "1.safetensors")
    save_file({"b": TENSORS["b"]}, directory / "2.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"} if index is None else index
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_shards_are_one_checkpoint(tmp_path):
    entries = read_checkpoint(sharded(tmp_path / "x"))
    assert {name: entry.path.name for name, entry in entries.items()} == {"a": "1.safetensors", "b": "2.safetensors"}


def test_files_that_are_links_are_followed_as_caches_of_the_hub_need(tmp_path):
    directory = sharded(tmp_path / "x")
    (tmp_path / "blobs").mkdir()
    (directory / "1.safetensors").rename(tmp_path / "blobs" / "abc")
    (directory / "1.safetensors").symlink_to("../blobs/abc")
    assert torch.equal(read_tensor(read_checkpoint(directory)["a"]), TENSORS["a"])


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"}, "2 problems"),
        ({"a": "../x/1.safetensors"}, "same directory"),
        ({"a": "/etc/passwd"}, "same directory"),
        ({"a": "x\\1.safetensors"}, "same directory"),
        ({"a": ".."}, "same directory"),
        ({"a": "\0"}, "same directory"),
        ({"a": "x" * 5000}, "is missing"),
        ({"a": "."}, "same directory"),
    ],
)
def test_an_index_that_disagrees_or_leads_elsewhere_is_refused(tmp_path, index, part):
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(sharded(tmp_path / "x", index))
    assert part in str(caught.value)


def test_json_beyond_any_use_is_not_read(tmp_path):
    with (tmp_path / "x.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="at most"):
        read_json(tmp_path / "x.json")


def test_a_file_that_becomes_shorter_is_noticed(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "x.safetensors")
    found = read_header(tmp_path / "x.safetensors")["a"]
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="ends inside"):
        read_tensor(found)
