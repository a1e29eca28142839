from __future__ import annotations

import pytest
import torch
from conftest import relative_rms

from wemoe_fast import chunked, fused, merged_linear
from wemoe_fast.plan import Plan

pytest.importorskip("triton")
from wemoe_fast.kernels import merge as module
from wemoe_fast.kernels.merge import merge

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 100, 1500])
@pytest.mark.parametrize("T", [1, 3, 8, 20])
@pytest.mark.parametrize("B", [1, 5])
def test_it_is_the_product_rounded_once(B, T, columns, dtype):
    stack, coefficients = torch.randn(1 + T, columns).to(dtype), torch.randn(B, 1 + T)
    merged = merge(coefficients, stack, torch.empty(B, columns, dtype=dtype))
    expected = coefficients.double() @ stack.double()
    assert relative_rms(merged, expected) <= 1.05 * relative_rms(expected.to(dtype), expected) + 1e-6


def test_slabs_coefficients_and_results_that_are_part_of_something_larger():
    whole, coefficients, out = torch.randn(4, 90), torch.randn(5, 8)[:, ::2], torch.full((5, 100), 7.0)
    merge(coefficients.expand(5, -1), whole[:, 20:60], out[:, 10:50])
    assert relative_rms(out[:, 10:50], coefficients @ whole[:, 20:60]) < 1e-6
    assert out[:, :10].eq(7).all()
    assert out[:, 50:].eq(7).all()
    one = merge(coefficients[:1].expand(5, -1), whole[:, 20:60], out[:, 10:50])
    assert relative_rms(one, (coefficients[:1] @ whole[:, 20:60]).expand(5, -1)) < 1e-6


@pytest.mark.parametrize("programs", [1, 3, 10_000])
def test_samples_shared_out_among_programs(programs, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", programs)
    stack, coefficients = torch.randn(4, 1100), torch.randn(7, 4)
    assert relative_rms(merge(coefficients, stack, torch.empty(7, 1100)), coefficients @ stack) < 1e-6


def test_no_samples():
    assert merge(torch.randn(0, 4), torch.randn(4, 9), torch.empty(0, 9)).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_chunked_merges_with_it_on_a_gpu(dtype, monkeypatch):
    """As on a GPU, here in the interpreter: values and gradients are those of PyTorch's products."""
    x, stack = torch.randn(5, 7, 13).to(dtype), torch.randn(4, 21, 13).to(dtype)
    weights, bias, dy = torch.randn(5, 3), torch.randn(4, 21).to(dtype), torch.randn(5, 7, 21).to(dtype)
    plan = Plan("chunked", 2, 8, torch.float32, "")
    needs = (True, True, True, True)

    def run():
        return (
            chunked.forward(x, stack, weights, bias, "gelu", plan),
            *chunked.backward(dy, x, stack, weights, bias, needs, plan),
        )

    expected = run()
    calls = []
    monkeypatch.setattr(fused, "available", lambda tensor: True)
    original = fused.merge
    monkeypatch.setattr(fused, "merge", lambda *arguments: calls.append(1) or original(*arguments))
    for actual, plain in zip(run(), expected, strict=True):
        assert relative_rms(actual, plain) < (1e-6 if dtype == torch.float32 else 5e-3)
    assert calls


def test_shared_merges_the_whole_tensor_once(monkeypatch):
    calls = []
    monkeypatch.setattr(fused, "available", lambda tensor: True)
    original = fused.merge
    monkeypatch.setattr(fused, "merge", lambda c, s, o: calls.append(s.shape) or original(c, s, o))
    x, stack, weights = torch.randn(5, 7, 13), torch.randn(4, 21, 13), torch.randn(1, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        y = merged_linear(x, stack, weights, strategy="shared")
    finally:
        torch.set_num_threads(threads)
    assert relative_rms(y, merged_linear(x, stack, weights, strategy="reference")) < 1e-6
    assert {shape[0] for shape in calls} == {4}
    assert sum(shape[1] for shape in calls) == 21 * 13
