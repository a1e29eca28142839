from __future__ import annotations

import pytest
import torch
from conftest import relative_rms

from wemoe_fast.activations import lookup
from wemoe_fast.kernels import ACTIVATIONS
from wemoe_fast.normalization import KINDS, Normalization

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from wemoe_fast.kernels import functions  # noqa: E402


@triton.jit
def span_kernel(cu_seqlens, out, N, total, RAGGED: tl.constexpr):
    b = tl.program_id(0)
    first, length = functions.sample_span(cu_seqlens, b, N, total, RAGGED)
    tl.store(out + 2 * b, first)
    tl.store(out + 2 * b + 1, length.to(tl.int64))


@triton.jit
def normalize_kernel(logits, d_weights, weights, d_logits, temperature, T: tl.constexpr, TP: tl.constexpr,
                     KIND: tl.constexpr, TOP_K: tl.constexpr):  # fmt: skip
    t = tl.arange(0, TP)
    values = tl.load(logits + t, mask=t < T, other=0.0)
    tl.store(weights + t, functions.normalize(values, temperature, T, KIND, TOP_K))
    given = tl.load(d_weights + t, mask=t < T, other=0.0)
    tl.store(d_logits + t, functions.normalize_backward(given, values, temperature, T, KIND, TOP_K))


@triton.jit
def activate_kernel(x, y, SIZE: tl.constexpr, ACTIVATION: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, functions.activate(tl.load(x + i), ACTIVATION))


@pytest.mark.parametrize(
    ("ends", "spans"),
    [
        ([0, 3, 3, 5], [(0, 3), (3, 0), (3, 2)]),
        ([0, 5, 5], [(0, 5), (4, 0)]),  # the last sample is empty: what is read for it lies inside
        ([-7, 2], [(0, 2)]),
        ([3, 1], [(3, 0)]),
        ([0, 100], [(0, 5)]),
        ([90, 100], [(4, 0)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_spans_of_packed_samples_stay_inside(ends, spans, dtype):
    out = torch.full((len(spans), 2), -1, dtype=torch.int64)
    span_kernel[(len(spans),)](torch.tensor(ends, dtype=dtype), out, 8, 5, RAGGED=True)
    assert [tuple(row) for row in out.tolist()] == spans


def test_a_span_is_no_longer_than_the_longest_sample():
    out = torch.full((1, 2), -1, dtype=torch.int64)
    span_kernel[(1,)](torch.tensor([0, 5]), out, 3, 5, RAGGED=True)
    assert out.tolist() == [[0, 3]]


def test_spans_of_padded_samples_count_from_0():
    out = torch.full((3, 2), -1, dtype=torch.int64)
    span_kernel[(3,)](None, out, 7, 0, RAGGED=False)
    assert out.tolist() == [[0, 7]] * 3


@pytest.mark.parametrize("top_k", [None, 1, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", ["random", "equal", "zeros and negatives", "large"])
def test_normalization_and_its_gradient(values, kind, top_k):
    T, TP = 5, 8
    logits = {
        "random": torch.randn(T),
        "equal": torch.ones(T),
        "zeros and negatives": torch.tensor([-1.0, 0.0, -2.0, 0.0, -3.0]),
        "large": torch.tensor([80.0, -80.0, 79.0, 0.0, 5.0]),
    }[values]
    norm, d_weights = Normalization(kind, 0.7 if kind == "softmax" else 1.0, top_k), torch.randn(T)
    weights, d_logits = torch.full((TP,), 7.0), torch.full((TP,), 7.0)
    normalize_kernel[(1,)](
        logits, d_weights, weights, d_logits, norm.temperature, T=T, TP=TP, KIND=kind, TOP_K=top_k or T
    )
    exact = logits.double().requires_grad_()
    expected = norm(exact)
    (gradient,) = torch.autograd.grad(expected, exact, d_weights.double())
    assert relative_rms(weights[:T], expected) <= 1.05 * relative_rms(norm(logits), expected) + 5e-7
    assert not weights[T:].any()
    assert float((d_logits[:T] - gradient).abs().max()) < 5e-6
    assert torch.equal(weights[:T] == 0, norm(logits) == 0)


def test_nan_ranks_first():
    logits = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    weights, d_logits = torch.zeros(4), torch.zeros(4)
    normalize_kernel[(1,)](logits, logits, weights, d_logits, 1.0, T=4, TP=4, KIND="identity", TOP_K=2)
    assert weights.isnan().tolist() == Normalization(top_k=2)(logits).isnan().tolist()
    assert weights.tolist()[0] == weights.tolist()[2] == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    x = torch.cat([torch.linspace(-12, 12, 58), torch.tensor([0.0, -0.0, 90.0, -90.0, float("nan"), float("inf")])])
    y = torch.empty_like(x)
    activate_kernel[(1,)](x, y, SIZE=64, ACTIVATION=activation)
    expected = lookup(activation)(x.double())
    finite = expected.isfinite()
    assert relative_rms(y[finite], expected[finite]) < 1e-6
    assert torch.equal(y.isnan(), lookup(activation)(x).isnan())
