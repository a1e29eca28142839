import json

import pytest
import torch

pytest.importorskip("transformers")

from wemoe_fast.benchmarks import merge_memory


def test_a_merge_is_measured_and_written(tmp_path, capsys):
    held = torch.ones(150 << 20)  # 600 MiB, which are none of the merge's
    sizes = ["--experts", "1", "--layers", "1", "--width", "64", "--max-shard-bytes", str(1 << 20)]
    assert merge_memory.main([*sizes, "--out", str(tmp_path / "memory.json")]) == 0
    content = json.loads((tmp_path / "memory.json").read_text())
    (row,) = content["merges"]
    assert content["environment"]["torch"] == torch.__version__
    assert row["experts"] == 1
    assert row["inputs"] > row["output"] > 1 << 20
    assert 50 << 20 < row["peak"] < held.nbytes
    assert capsys.readouterr().out.splitlines()[0].startswith("experts  inputs, MiB")


def test_more_than_is_allowed_is_a_failure(monkeypatch):
    monkeypatch.setattr(merge_memory, "measure", lambda recipe, out, size: (1 << 40, 1.0))
    assert merge_memory.main(["--layers", "1", "--width", "64"]) == 1


def test_a_failed_merge_is_no_measurement(tmp_path):
    with pytest.raises(RuntimeError, match=r"the merge ended with [1-9]"):
        merge_memory.measure(tmp_path / "none.yaml", tmp_path / "out", 1 << 20)
