from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wemoe_fast import FastWEMoEMLP, load, save
from wemoe_fast import fingerprint as module
from wemoe_fast.fingerprint import Digest, batch_digest, model_digest, numerics


def merged() -> FastWEMoEMLP:
    torch.manual_seed(0)
    base, *experts = (nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(3))
    return FastWEMoEMLP.from_mlps(base, experts)


def test_a_model_read_again_has_the_same_digest(tmp_path: Path) -> None:
    model = merged().eval()
    save(model, tmp_path / "model")
    assert model_digest(load(tmp_path / "model")) == model_digest(load(tmp_path / "model"))
    assert model_digest(copy.deepcopy(model)) == model_digest(model)


def test_every_byte_of_every_tensor_counts() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    seen = {model_digest(model)}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        for position in range(len(flat)):
            flat[position] ^= 1
            seen.add(model_digest(model))
            flat[position] ^= 1
    assert len(seen) == 1 + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model, "batch_invariant", True),
        lambda model: setattr(model, "strategy", "reference"),
        lambda model: setattr(model, "activation", "relu"),
        lambda model: setattr(model.router, "normalization", replace(model.router.normalization, top_k=1)),
        lambda model: setattr(model, "config", Config(eps=1e-6)),
    ],
)
def test_what_else_makes_another_model(change: Any) -> None:
    model = merged()
    before = model_digest(model)
    change(model)
    assert model_digest(model) != before


class Config:
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def to_dict(self) -> dict[str, Any]:
        return self.settings


def test_where_a_model_was_read_from_does_not_count() -> None:
    one, other = merged(), merged()
    one.config, other.config = Config(a=1, _name_or_path="here"), Config(a=1, _name_or_path="there")  # type: ignore[assignment]
    assert model_digest(one) == model_digest(other)
    other.config = Config(a=2)  # type: ignore[assignment]
    assert model_digest(one) != model_digest(other)


def test_the_version_of_the_code_that_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = merged()
    before = model_digest(model)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="other"))
    assert model_digest(model) == before, "none of its modules are from there"
    monkeypatch.setattr("wemoe_fast.__version__", "other")
    assert model_digest(model) != before


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    array, tensor = np.arange(100), torch.randn(10, 10).t()
    expected = Digest().array(array).tensor(tensor).hex()
    monkeypatch.setattr(module, "BLOCK", 7)
    assert Digest().array(array).tensor(tensor).hex() == expected


def test_values_do_not_run_together() -> None:
    assert Digest().text("ab").text("c").hex() != Digest().text("a").text("bc").hex()
    assert Digest().tensor(torch.zeros(4)).hex() != Digest().tensor(torch.zeros(2, 2)).hex()
    assert Digest().tensor(torch.zeros(4)).hex() != Digest().tensor(torch.zeros(4, dtype=torch.int32)).hex()
    assert Digest().array(np.zeros(4)).hex() != Digest().array(np.zeros(4, np.int64)).hex()
    assert Digest().array(np.broadcast_to(np.int32(1), 3)).hex() == Digest().array(np.ones(3, np.int32)).hex()
    assert Digest().tensor(torch.zeros(0)).hex() != Digest().hex()


def test_a_batch_is_its_inputs_and_labels() -> None:
    inputs, labels = {"x": torch.zeros(2), "y": torch.ones(2)}, torch.tensor([0, 1])
    digests = {
        batch_digest(inputs, labels),
        batch_digest(inputs, None),
        batch_digest(inputs, labels + 1),
        batch_digest({"x": inputs["x"]}, labels),
        batch_digest({"z": inputs["x"], "y": inputs["y"]}, labels),
    }
    assert len(digests) == 5
    assert batch_digest(dict(reversed(inputs.items())), labels) in digests


def test_numerics_tell_threads_apart_on_the_cpu() -> None:
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(numerics(torch.device("cpu")))
    finally:
        torch.set_num_threads(before)
    assert found[0] != found[1]
    assert found[0] | {"threads": 2} == found[1]
