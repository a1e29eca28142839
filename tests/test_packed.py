from __future__ import annotations

import pytest
import torch
from conftest import leaf, merged_inputs, relative_rms
from test_ops import router_parameters

from wemoe_fast import merged_linear, ops, packed, route
from wemoe_fast.errors import InputError
from wemoe_fast.normalization import Normalization

LENGTHS = [5, 0, 9, 1]
ENDS = torch.tensor([0, *LENGTHS]).cumsum(0)
STRATEGIES = ["reference", "shared", "chunked", "factored", "fused", "auto"]


def inputs(rows=4, dtype=torch.float64):
    values = merged_inputs(1, sum(LENGTHS), 3, rows=rows, dtype=dtype)
    values["x"] = leaf(values["x"][0])
    return values


def one_by_one(x, stack, routing_weights, bias=None, activation=None, gate=None):
    """Every sample by itself."""
    weights = routing_weights.expand(len(LENGTHS), -1)
    parts = [
        merged_linear(sample[None], stack, w[None], bias, activation, "reference")[0]
        for sample, w in zip(x.split(LENGTHS), weights, strict=True)
    ]
    return torch.cat(parts)


@pytest.mark.parametrize("given", [True, False], ids=["max_seqlen", "measured"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_and_gradients_are_those_of_each_sample_alone(strategy, given):
    dtype = torch.float32 if strategy == "fused" else torch.float64
    values = inputs(1 if strategy == "shared" else len(LENGTHS), dtype)
    dy = torch.randn(sum(LENGTHS), 21, dtype=dtype)
    length = {"max_seqlen": max(LENGTHS)} if given else {}
    y = merged_linear(**values, activation="gelu", strategy=strategy, cu_seqlens=ENDS, **length)
    grads = torch.autograd.grad(y, list(values.values()), dy)
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    expected = one_by_one(**exact, activation="gelu")
    wanted = torch.autograd.grad(expected, list(exact.values()), dy.double())
    tolerance = 2e-6 if strategy == "fused" else 1e-12
    assert relative_rms(y, expected) < tolerance
    for name, ours, theirs in zip(values, grads, wanted, strict=True):
        assert relative_rms(ours, theirs) < tolerance, name
    with torch.no_grad():
        y = merged_linear(**values, activation="gelu", strategy=strategy, cu_seqlens=ENDS, **length)
    assert relative_rms(y, expected) < tolerance


@pytest.mark.parametrize("strategy", ["chunked", "fused"])
def test_gated_pair(strategy):
    x, stack, weights, bias = (t.detach().float() for t in inputs().values())
    y = ops.merged_gated_linear(
        x, 2 * stack, stack, weights, bias, bias, "silu", strategy, cu_seqlens=ENDS, max_seqlen=max(LENGTHS)
    )
    expected = one_by_one(x, 2 * stack, weights, bias, "silu") * one_by_one(x, stack, weights, bias)
    assert relative_rms(y, expected) < 1e-6


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_route(depth, masked):
    hidden, parameters = torch.randn(sum(LENGTHS), 13), router_parameters(depth, 13, 3)
    mask = torch.rand(sum(LENGTHS)) > 0.3 if masked else torch.ones(sum(LENGTHS), dtype=torch.bool)
    normalization = Normalization("softmax")
    weights = route(hidden, parameters, normalization, mask if masked else None, cu_seqlens=ENDS)
    with torch.no_grad():
        again = route(hidden, parameters, normalization, mask if masked else None, cu_seqlens=ENDS, max_seqlen=9)
    assert relative_rms(again, weights) < 1e-6
    for b, (sample, kept) in enumerate(zip(hidden.split(LENGTHS), mask.split(LENGTHS), strict=True)):
        assert relative_rms(weights[b : b + 1], route(sample[None], parameters, normalization, kept[None])) < 1e-6


def test_no_samples_and_no_tokens():
    values = {name: value.detach() for name, value in inputs().items()}
    values["x"] = values["x"][:0]
    for strategy in STRATEGIES[2:]:
        y = merged_linear(**values, strategy=strategy, cu_seqlens=torch.zeros(5, dtype=torch.int32))
        assert y.shape == (0, 21)
    values["routing_weights"] = values["routing_weights"][:0]
    assert merged_linear(**values, cu_seqlens=torch.zeros(1, dtype=torch.int64)).shape == (0, 21)


@pytest.mark.parametrize(
    ("ends", "max_seqlen"),
    [([0, 5, 5, 14, 16], 9), ([1, 5, 5, 14, 15], 9), ([0, 5, 4, 14, 15], 10), ([0, 5, 5, 14, 15], 8)],
    ids=["beyond the end", "not from 0", "falling", "longer than max_seqlen"],
)
def test_numbers_that_do_not_fit_are_refused(ends, max_seqlen):
    values = inputs()
    with pytest.raises(RuntimeError, match="cu_seqlens: expected numbers from 0 to 15"):
        merged_linear(**values, cu_seqlens=torch.tensor(ends), max_seqlen=max_seqlen)


@pytest.mark.parametrize(
    ("ends", "max_seqlen", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), None, r"cu_seqlens: expected \[B \+ 1\], found shape \(2, 2\)"),
        (ENDS.float(), None, "cu_seqlens: expected int32 or int64, found torch.float32"),
        (ENDS.to("meta"), 9, "cu_seqlens: expected device cpu as x, found meta"),
        (ENDS, -1, "max_seqlen: expected the length of the longest sample, found -1"),
        (ENDS[:-1], 9, r"routing_weights: expected \[3, 3\] or \[1, 3\], found \(4, 3\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(ends, max_seqlen, message):
    with pytest.raises(InputError, match=message):
        merged_linear(**inputs(), cu_seqlens=ends, max_seqlen=max_seqlen)


def test_max_seqlen_without_cu_seqlens_is_refused():
    with pytest.raises(InputError, match="max_seqlen: expected only with cu_seqlens"):
        merged_linear(**merged_inputs(2, 3, 3), max_seqlen=3)


def test_pad_and_unpad():
    x = leaf(torch.randn(sum(LENGTHS), 4, dtype=torch.float64))
    padded = packed.pad(x, ENDS, 9)
    assert padded.shape == (4, 9, 4)
    for b, sample in enumerate(x.split(LENGTHS)):
        assert torch.equal(padded[b, : len(sample)], sample)
        assert not padded[b, len(sample) :].any()
    assert torch.equal(packed.unpad(padded, ENDS, sum(LENGTHS)), x)
    assert torch.autograd.gradcheck(lambda t: packed.pad(t, ENDS, 9), (x,))
