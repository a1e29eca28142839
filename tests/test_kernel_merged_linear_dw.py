from __future__ import annotations

import pytest
import torch
from conftest import relative_rms
from test_kernel_merged_linear import NORMALIZATIONS, H, inputs, routing

from wemoe_fast import reference
from wemoe_fast.normalization import Normalization

pytest.importorskip("triton")
from wemoe_fast.kernels import merged_linear_dw as module
from wemoe_fast.kernels.launch import Batch
from wemoe_fast.kernels.merged_linear_dw import merged_linear_dw
from wemoe_fast.kernels.tuning import Tile

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = Tile(rows=16, tokens=32, depth=16, group=2)


def oracle(dy, x, stack, logits, bias=None, normalization=None):
    leaf = logits.double().requires_grad_()
    weights = (normalization or Normalization())(leaf)
    bias = None if bias is None else bias.double()
    y = reference.merged_linear(x.double(), stack.double(), weights.expand(x.shape[0], -1), bias)
    return torch.autograd.grad(y, leaf, dy.double())[0]


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("T", [1, 3, 8])
@pytest.mark.parametrize("N", [1, 7, 50, 65])
def test_it_is_the_gradient_of_the_reference(N, T, with_bias):
    x, stack, logits, bias = inputs(3, N, T)
    bias, dy = bias if with_bias else None, torch.randn(3, N, H)
    actual = merged_linear_dw(dy, x, stack, routing(logits), bias, tile=TILE)
    assert actual.dtype == torch.float32
    assert relative_rms(actual, oracle(dy, x, stack, logits, bias)) < 2e-6


@pytest.mark.parametrize("tile", [None, Tile(16, 16, 16, 1), Tile(32, 16, 64, 4), Tile(16, 64, 32, 8)], ids=str)
def test_any_tile_gives_the_same(tile):
    x, stack, logits, bias = inputs(5, 20, 3)
    dy = torch.randn(5, 20, H)
    actual = merged_linear_dw(dy, x, stack, routing(logits), bias, tile=tile)
    assert relative_rms(actual, oracle(dy, x, stack, logits, bias)) < 2e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=str)
def test_through_every_normalization_to_the_logits(normalization):
    x, stack, logits, bias = inputs(3, 7, 8)
    dy = torch.randn(3, 7, H)
    logits = -logits.abs()
    logits[0, 3], logits[1, 3] = 0.0, -9.0  # the largest of its sample: a weight of exactly 0 that has a gradient
    actual = merged_linear_dw(dy, x, stack, routing(logits, normalization), bias, tile=TILE)
    expected = oracle(dy, x, stack, logits, bias, normalization)
    assert relative_rms(actual, expected) < 5e-6
    assert torch.equal(actual == 0, expected == 0) or normalization.kind == "softmax"


def test_task_vectors_of_dropped_experts_are_not_read():
    x, stack, logits, bias = inputs(4, 7, 8)
    logits = -logits.abs()
    logits[:, [2, 5]] = 1 + torch.rand(4, 2)
    normalization, dy = Normalization("sigmoid", top_k=2), torch.randn(4, 7, H)
    expected = oracle(dy, x, stack, logits, bias, normalization)
    dropped = torch.ones(9, dtype=torch.bool)
    dropped[[0, 3, 6]] = False
    stack[dropped], bias[dropped] = float("nan"), float("nan")
    actual = merged_linear_dw(dy, x, stack, routing(logits, normalization), bias, tile=TILE)
    assert relative_rms(actual, expected) < 2e-6


def test_more_tiles_than_are_added_up_at_once(monkeypatch):
    monkeypatch.setattr(module, "TILES_AT_ONCE", 4)
    x, stack, logits, bias = inputs(2, 7, 3)
    dy = torch.randn(2, 7, H)
    actual = merged_linear_dw(dy, x, stack, routing(logits), bias, tile=Tile(16, 16, 16, 1))
    assert relative_rms(actual, oracle(dy, x, stack, logits, bias)) < 2e-6


def test_one_row_of_logits_has_a_gradient_per_sample():
    x, stack, logits, bias = inputs(3, 7, 3)
    dy = torch.randn(3, 7, H)
    actual = merged_linear_dw(dy, x, stack, routing(logits[:1], Normalization("softmax")), bias, tile=TILE)
    assert actual.shape == (3, 3)
    expected = oracle(dy, x, stack, logits[:1], bias, Normalization("softmax"))
    assert relative_rms(actual.sum(0, keepdim=True), expected) < 5e-6


@pytest.mark.parametrize("lengths", [[5, 0, 33, 1, 7], [40]], ids=str)
def test_packed_samples(lengths):
    x, stack, _, bias = inputs(1, sum(lengths), 3)
    x, logits, dy = x[0], torch.randn(len(lengths), 3), torch.randn(sum(lengths), H)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    batch = Batch.of(x, ends, max(lengths))
    actual = merged_linear_dw(dy, x, stack, routing(logits), bias, batch=batch, tile=TILE)
    for b, (sample, d_sample) in enumerate(zip(x.split(lengths), dy.split(lengths), strict=True)):
        if len(sample):
            expected = oracle(d_sample[None], sample[None], stack, logits[b : b + 1], bias)
            assert relative_rms(actual[b : b + 1], expected) < 2e-6
        else:
            assert not actual[b].any()


def test_what_stands_behind_a_packed_sample_does_not_matter():
    x, stack, _, bias = inputs(1, 12, 3)
    x, logits, dy = x[0], torch.randn(3, 3), torch.randn(12, H)
    x[5:] = dy[5:] = float("nan")
    actual = merged_linear_dw(
        dy, x, stack, routing(logits), bias, batch=Batch.of(x, torch.tensor([0, 5, 5, 12]), 7), tile=TILE
    )
    assert relative_rms(actual[:1], oracle(dy[None, :5], x[None, :5], stack, logits[:1], bias)) < 2e-6
    assert not actual[1].any()
    assert actual[2].isnan().all()


def test_strided_inputs():
    x, stack, logits, bias = inputs(3, 7, 3)
    dy = torch.randn(3, 7, H)
    expected = oracle(dy, x, stack, logits, bias)
    far_x, far_dy = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy))
    apart = torch.stack([stack, stack], dim=-1)[..., 1]
    assert relative_rms(merged_linear_dw(far_dy, far_x, apart, routing(logits), bias, tile=TILE), expected) < 2e-6
    ones = torch.ones(()).expand(3, 7, H)
    expected = oracle(ones, x, stack, logits, bias)
    assert relative_rms(merged_linear_dw(ones, x, stack, routing(logits), bias, tile=TILE), expected) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_of_16_bit_tensors(dtype):
    """Products and sums are in float32, so it is as exact as its inputs."""
    x, stack, logits, bias = inputs(3, 50, 3, dtype)
    dy = torch.randn(3, 50, H).to(dtype)
    actual = merged_linear_dw(dy, x, stack, routing(logits), bias, tile=TILE)
    assert relative_rms(actual, oracle(dy, x, stack, logits, bias)) < 2e-6


@pytest.mark.parametrize(("B", "N", "h"), [(0, 5, 21), (3, 0, 21), (3, 5, 0)])
def test_of_nothing_it_is_zero(B, N, h):
    x, stack, logits, bias = inputs(B, N, 3, h=h)
    actual = merged_linear_dw(x.new_zeros(B, N, h), x, stack, routing(logits), bias)
    assert actual.shape == (B, 3)
    assert not actual.any()
