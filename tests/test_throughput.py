from __future__ import annotations

import torch

from wemoe_fast.throughput import interleaved_seconds, medians, relative_rms


def test_calls_are_interleaved_and_warm_up_does_not_count():
    calls: list[str] = []
    seconds = interleaved_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_repeats_by_name():
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = interleaved_seconds(functions, repeats={"a": 1, "b": 3}, warmup=0)
    assert calls == ["a", "b", "b", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 1, "b": 3}


def test_another_clock():
    assert interleaved_seconds({"a": lambda: 5.0}, repeats=2, clock=lambda call: call()) == {"a": [5.0, 5.0]}


def test_medians():
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_relative_rms():
    assert relative_rms(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert abs(relative_rms(torch.tensor([3.3, 4.4]), torch.tensor([3.0, 4.0])) - 0.1) < 1e-6
