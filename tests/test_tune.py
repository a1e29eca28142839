from __future__ import annotations

import json

import pytest
import torch

from wemoe_fast import kernels, tune
from wemoe_fast.cli import main
from wemoe_fast.errors import InputError
from wemoe_fast.kernels import tuning
from wemoe_fast.kernels.tuning import Tile

pytest.importorskip("triton")


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """Two candidates a kernel, tables in a directory of their own."""
    monkeypatch.setenv("WEMOE_FAST_TUNING", str(tmp_path))
    monkeypatch.setattr(tune, "seconds_of", lambda function, device: function() is None or 1.0)
    tuning.forget_tables()
    yield tmp_path
    tuning.forget_tables()


def test_what_is_measured_is_what_is_used_afterwards(quick, capsys, monkeypatch):
    """The verb, in the interpreter: the last candidate is made the fastest one."""
    ticks = iter(range(1000, 0, -1))
    monkeypatch.setattr(tune, "seconds_of", lambda function, device: function() is None or next(ticks) * 1e-6)
    assert main(["tune", "--device", "cpu", "--shape", "3,7,40,56,3", "--tries", "2", "--quiet"]) == 0
    shown = capsys.readouterr().out
    path = quick / "interpreter.json"
    assert str(path) in shown
    table = json.loads(path.read_text())
    assert {entry["kernel"] for entry in table["tiles"]} == {"merged_linear", "merged_linear_dw"}
    for entry in table["tiles"]:
        assert entry["tried"] == 2
        assert entry["microseconds"] < entry["default_microseconds"]
        assert entry["relative_rms_error"] < 1e-2
        assert entry["kernel"] in shown
        problem = tuning.Problem(
            entry["kernel"], tuning.device_of(torch.device("cpu")), torch.bfloat16,
            samples=3, tokens=7, rows=56, depth=40, experts=3, kept=3,
        )  # fmt: skip
        assert tuning.choose(problem) == Tile(**entry["tile"]) != tuning.default(problem)
    assert [entry["backward"] for entry in table["strategies"]] == [False, True]
    assert all(set(entry["microseconds"]) == set(tune.STRATEGIES) for entry in table["strategies"])
    assert (
        tuning.measured_strategy(problem.__class__(**{**vars(problem), "kernel": "merged_linear"}), True) == "factored"
    )


def test_a_tile_that_is_wrong_or_does_not_compile_is_refused():
    expected = torch.randn(3, 4)
    run = {16: lambda: expected + 1e-9, 32: lambda: expected + 1, 64: lambda: 1 / 0}
    trials = [tune._try(Tile(rows, 16, 16), lambda tile: run[tile.rows](), expected, 1e-3) for rows in run]
    assert trials[0].seconds is not None
    assert trials[1].seconds is None
    assert "relative RMS error" in trials[1].problem
    assert trials[2].seconds is None
    assert "ZeroDivisionError" in trials[2].problem


def test_shapes_beyond_the_budget_are_listed(quick):
    path, table = tune.tune([tune.Shape(1, 1, 16, 16, 1)], device="cpu", budget=-1.0, progress=False)
    assert table["tiles"] == []
    assert table["not_measured"] == [{"B": 1, "N": 1, "d": 16, "h": 16, "T": 1, "dtype": "bfloat16"}]
    assert "1 shapes keep their defaults" in tune.summary(table)
    assert path.is_file()


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,x", "1,2,3,4,0"])
def test_a_shape_is_five_numbers(text):
    with pytest.raises(InputError, match="expected five numbers B,N,d,h,T"):
        tune.Shape.parse(text)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["tune"]) == 1
    assert "tune: a GPU is needed, found none" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.why_not.cache_clear()
    try:
        assert main(["tune", "--device", "cpu"]) == 1
        assert "a GPU is needed, found device cpu" in capsys.readouterr().err
    finally:
        kernels.why_not.cache_clear()


def test_unknown_dtype():
    with pytest.raises(InputError, match="dtype: expected of bfloat16, float16, float32, found int8"):
        tune.tune(dtypes=["int8"], device="cpu")
