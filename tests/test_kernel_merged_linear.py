from __future__ import annotations

import pytest
import torch
from conftest import assert_no_worse, peak_bytes, relative_rms

from wemoe_fast import reference
from wemoe_fast.activations import ACTIVATIONS as OURS
from wemoe_fast.kernels import ACTIVATIONS
from wemoe_fast.normalization import Normalization

pytest.importorskip("triton")
from wemoe_fast.kernels import merged_linear as module
from wemoe_fast.kernels.launch import Batch, Routing
from wemoe_fast.kernels.merged_linear import merged_linear
from wemoe_fast.kernels.tuning import Tile

pytestmark = pytest.mark.usefixtures("poisoned")

TILE = Tile(rows=16, tokens=32, depth=16, group=2)
D, H = 35, 21  # more than one tile, and no multiple of it
NORMALIZATIONS = [
    Normalization(kind, temperature, top_k)
    for kind, temperature in (("identity", 1.0), ("softmax", 0.7), ("sigmoid", 1.0))
    for top_k in (None, 1, 2)
]


def inputs(B, N, T, dtype=torch.float32, d=D, h=H):
    stack = torch.randn(1 + T, h, d) / d**0.5
    stack[1:] *= 0.3
    values = torch.randn(B, N, d), stack, torch.randn(B, T), torch.randn(1 + T, h)
    x, stack, logits, bias = (value.to(dtype) for value in values)
    return x, stack, logits.float(), bias


def routing(logits, normalization=None, nonzero=None):
    n = normalization or Normalization()
    return Routing(logits, n.kind, n.temperature, n.top_k, nonzero)


def oracle(x, stack, weights, bias=None, activation=None):
    bias = None if bias is None else bias.double()
    return reference.merged_linear(x.double(), stack.double(), weights.double(), bias, activation)


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("T", [1, 3, 8])
@pytest.mark.parametrize("N", [1, 7, 50, 65])
def test_it_is_the_reference(N, T, with_bias):
    x, stack, logits, bias = inputs(3, N, T)
    bias = bias if with_bias else None
    y = merged_linear(x, stack, routing(logits), bias, tile=TILE)
    assert relative_rms(y, oracle(x, stack, logits, bias)) < 1e-6


@pytest.mark.parametrize(
    "tile",
    [Tile(16, 16, 16, 1), Tile(32, 16, 32, 4), Tile(16, 64, 64, 8), Tile(16, 16, 16, 3, stages=1, warps=8)],
    ids=str,
)
def test_any_tile_gives_the_same(tile):
    x, stack, logits, bias = inputs(5, 20, 3)
    y = merged_linear(x, stack, routing(logits), bias, "relu", tile=tile)
    assert relative_rms(y, oracle(x, stack, logits, bias, "relu")) < 1e-6


def test_sizes_that_fill_their_tiles_need_no_masks():
    x, stack, logits, bias = inputs(4, 32, 3, d=32, h=32)
    y = merged_linear(x, stack, routing(logits), bias, tile=TILE)
    assert relative_rms(y, oracle(x, stack, logits, bias)) < 1e-6


@pytest.mark.parametrize(("d", "h", "even"), [(32, 48, True), (32, 40, False), (40, 48, False)])
def test_masks_are_left_out_only_where_every_tile_is_full(d, h, even, monkeypatch):
    """What lies beyond the last row of the last expert may not be memory at all."""
    x, stack, logits, _ = inputs(2, 7, 3, d=d, h=h)
    flags, kernel = [], module.merged_linear_kernel

    class Noting:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: flags.append(kwargs["EVEN"]) or kernel[grid](*args, **kwargs)

    monkeypatch.setattr(module, "merged_linear_kernel", Noting())
    merged_linear(x, stack, routing(logits), tile=TILE)
    assert flags == [even]


def test_the_default_tile():
    x, stack, logits, bias = inputs(3, 50, 8)
    y = merged_linear(x, stack, routing(logits), bias, "gelu")
    assert relative_rms(y, oracle(x, stack, logits, bias, "gelu")) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    x, stack, logits, bias = inputs(3, 7, 3)
    bias = 5 * bias  # far out, where a formula may overflow
    y = merged_linear(x, stack, routing(logits), bias, activation, tile=TILE)
    assert relative_rms(y, oracle(x, stack, logits, bias, activation)) < 2e-6


@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=str)
@pytest.mark.parametrize("T", [3, 8])
def test_every_normalization_of_logits(normalization, T):
    x, stack, logits, bias = inputs(3, 7, T)
    y = merged_linear(x, stack, routing(3 * logits, normalization), bias, tile=TILE)
    assert relative_rms(y, oracle(x, stack, normalization(3 * logits.double()), bias)) < 1e-6


def test_of_equal_logits_those_with_the_lower_index_are_kept():
    x, stack, logits, _ = inputs(3, 7, 8)
    normalization = Normalization("sigmoid", top_k=3)
    weights = normalization(torch.zeros_like(logits))
    assert weights[0].tolist() == [0.5] * 3 + [0.0] * 5
    y = merged_linear(x, stack, routing(torch.zeros_like(logits), normalization), tile=TILE)
    assert relative_rms(y, oracle(x, stack, weights)) < 1e-6


def test_one_row_of_logits_serves_the_whole_batch():
    x, stack, logits, bias = inputs(3, 7, 3)
    y = merged_linear(x, stack, routing(logits[:1]), bias, tile=TILE)
    assert relative_rms(y, oracle(x, stack, logits[:1], bias)) < 1e-6


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("N", [1, 50])
def test_gated_pair(N, with_bias):
    x, up, logits, up_bias = inputs(3, N, 3)
    _, gate, _, gate_bias = inputs(3, N, 3)
    if not with_bias:
        up_bias = gate_bias = None
    y = merged_linear(x, up, routing(logits), up_bias, "silu", gate_stack=gate, gate_bias=gate_bias, tile=TILE)
    expected = oracle(x, gate, logits, gate_bias, "silu") * oracle(x, up, logits, up_bias)
    assert relative_rms(y, expected) < 2e-6


def test_gated_pair_of_stacks_that_lie_differently_in_memory():
    x, up, logits, _ = inputs(3, 7, 3)
    gate = inputs(3, 7, 3)[1].mT.contiguous().mT
    y = merged_linear(x, up, routing(logits), None, "relu", gate_stack=gate, tile=TILE)
    assert relative_rms(y, oracle(x, gate, logits, None, "relu") * oracle(x, up, logits)) < 2e-6


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("N", [1, 50])
def test_dx_is_the_same_kernel_with_exchanged_strides(N, T):
    x, stack, logits, _ = inputs(3, N, T)
    dy = torch.randn(3, N, H)
    x64 = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(oracle(x64, stack, logits), x64, dy.double())
    assert relative_rms(merged_linear(dy, stack.mT, routing(logits), tile=TILE), expected) < 1e-6


def test_strided_inputs():
    x, stack, logits, bias = inputs(3, 7, 3)
    expected = oracle(x, stack, logits, bias)
    layouts = {
        "sequence first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "features apart": torch.stack([x, x], dim=-1)[..., 0],
        "tokens apart": torch.stack([x, x], dim=2)[:, :, 1],
        "features first": x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    for name, layout in layouts.items():
        assert not layout.is_contiguous()
        y = merged_linear(layout, stack, routing(logits), bias, tile=TILE)
        assert relative_rms(y, expected) < 1e-6, name
        strided = torch.stack([stack, stack], dim=1)[:, 1]
        y = merged_linear(layout.bfloat16(), strided.bfloat16(), routing(logits), bias.bfloat16(), tile=TILE)
        assert relative_rms(y, expected) < 1e-2, name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("lengths", [[5, 0, 33, 1, 7], [0, 0], [40], [3, 0]], ids=str)
def test_packed_samples(lengths, dtype):
    total = sum(lengths)
    x, stack, logits, bias = inputs(1, max(1, total), 3)
    x, logits = x[0, :total], torch.randn(len(lengths), 3)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    batch = Batch.of(x, ends, max(lengths))
    y = merged_linear(x, stack, routing(logits), bias, "gelu", batch=batch, tile=TILE)
    assert y.shape == (total, H)
    for b, sample in enumerate(x.split(lengths)):
        if len(sample):
            expected = oracle(sample[None], stack, logits[b : b + 1], bias, "gelu")[0]
            assert relative_rms(y[ends[b] : ends[b + 1]], expected) < 1e-6


def test_wrong_cu_seqlens_lead_nowhere_outside():
    x, stack, logits, _ = inputs(1, 5, 3)
    guarded = torch.full((15, D), float("nan"))
    guarded[5:10] = x[0]
    x = guarded[5:10]
    for ends in ([0, 100], [-7, 5], [3, 1], [5, 5], [90, 100]):
        y = merged_linear(x, stack, routing(logits), batch=Batch.of(x, torch.tensor(ends), 8), tile=TILE)
        assert y[~y.isnan()].isfinite().all()


@pytest.mark.parametrize("group", [1, 2])
def test_experts_without_a_weight_are_not_read(group):
    x, stack, logits, bias = inputs(4, 7, 8)
    logits[:, [2, 5, 6]] = 9 + torch.rand(4, 3)
    normalization = Normalization("softmax", top_k=2)
    weights = normalization(logits.double())
    used = weights.sum(dim=0) > 0
    assert 2 <= used.sum() <= 3
    expected = oracle(x, stack, weights, bias)
    stack[1:][~used], bias[1:][~used] = float("nan"), float("nan")
    tile = Tile(16, 16, 16, group)
    y = merged_linear(x, stack, routing(logits, normalization), bias, tile=tile)
    assert relative_rms(y, expected) < 1e-6
    y = merged_linear(x, stack, routing(weights.float(), nonzero=2), bias, tile=tile)
    assert relative_rms(y, expected) < 1e-6


def test_a_broken_promise_of_few_experts_shows():
    x, stack, logits, _ = inputs(2, 7, 8)
    logits[0, :6] = 0
    y = merged_linear(x, stack, routing(logits, nonzero=2), tile=Tile(16, 16, 16, 1))
    assert relative_rms(y[0], oracle(x, stack, logits)[0]) < 1e-6
    assert y[1].isnan().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stay_with_their_sample(bad):
    x, stack, logits, bias = inputs(3, 7, 3)
    logits[1, 2] = bad
    expected = oracle(x, stack, logits, bias)
    y = merged_linear(x, stack, routing(logits), bias, tile=TILE)
    assert relative_rms(y[[0, 2]], expected[[0, 2]]) < 1e-6
    assert not y[1].isfinite().any()


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["y", "dx"])
def test_no_less_precise_than_plain_pytorch(direction, dtype, activation):
    x, stack, logits, bias = inputs(3, 50, 3, dtype)
    if direction == "dx":
        x, stack, bias = torch.randn(3, 50, H).to(dtype), stack.mT, None
    plain = reference.merged_linear(x, stack, logits, bias, activation)
    y = merged_linear(x, stack, routing(logits), bias, activation or "none", tile=TILE)
    assert y.dtype == dtype
    assert_no_worse({"y": y}, {"y": oracle(x, stack, logits, bias, activation)}, {"y": plain})


def test_a_stack_of_another_dtype_is_converted_tile_by_tile():
    x, stack, logits, bias = inputs(3, 7, 3)
    half = x.half()
    y = merged_linear(half, stack, routing(logits), bias, tile=TILE)
    assert y.dtype == torch.float16
    assert relative_rms(y, oracle(half, stack, logits, bias)) < 1e-3


def test_offsets_beyond_32_bits():
    """x and the stack spread over more than 2^31 elements; only the pages touched are ever there."""
    far = (1 << 31) + 64
    torch.use_deterministic_algorithms(False)  # it would fill all of them
    x, stack, logits, _ = inputs(2, 3, 1, torch.float16, d=16, h=16)
    wide_x = torch.empty(far + 3 * 1024, dtype=torch.float16).as_strided((2, 3, 16), (far, 1024, 1))
    wide_stack = torch.empty(far + 16 * 1024, dtype=torch.float16).as_strided((2, 16, 16), (far, 1024, 1))
    tokens_apart = torch.empty(2 * (far // 2) + 1024, dtype=torch.float16).as_strided((2, 3, 16), (16, far // 2, 1))
    for layout in (wide_x, tokens_apart):
        layout.copy_(x)
        wide_stack.copy_(stack)
        y = merged_linear(layout, wide_stack, routing(logits), tile=Tile(16, 16, 16, 1))
        assert relative_rms(y, oracle(x, stack, logits)) < 1e-3


@pytest.mark.parametrize(("B", "N", "h"), [(0, 5, 21), (3, 0, 21), (3, 5, 0)])
def test_nothing_in_nothing_out(B, N, h):
    x, stack, logits, bias = inputs(B, N, 3, h=h)
    assert merged_linear(x, stack, routing(logits), bias).shape == (B, N, h)


def test_nothing_but_the_result_is_allocated():
    x, stack, logits, bias = inputs(4, 7, 3)
    peak, kept, y = peak_bytes(lambda: merged_linear(x, stack, routing(logits), bias, "gelu", tile=TILE))
    assert peak == kept == y.numel() * 4


def test_every_activation_of_the_kernels_is_one_of_ours():
    assert set(ACTIVATIONS) <= set(OURS)
