from __future__ import annotations

import copy
import itertools
import shutil

import pytest
import torch
import torch._dynamo.testing
from conftest import (
    assert_no_worse,
    gradients,
    in_dtype,
    leaf,
    merged_inputs,
    oracle,
    peak_bytes,
    relative_rms,
    set_plan,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from wemoe_fast import chunked, factored, merged_linear, native, operators, ops, plan, reference, route
from wemoe_fast.activations import ACTIVATIONS, lookup
from wemoe_fast.errors import InputError
from wemoe_fast.normalization import Normalization
from wemoe_fast.ops import RouterParameters, merged_mlp
from wemoe_fast.slabs import blocks

STRATEGIES = ("reference", "shared", "chunked", "native", "factored", "auto")
FAST = ("shared", "chunked", "factored")
EXACT = 1e-12
MEGABYTE = 1 << 20
# (B, N, T): more samples than a group of the plan, more experts than a group, no samples, one token.
SHAPES = [(0, 3, 3), (1, 1, 3), (5, 50, 3), (33, 3, 20), (33, 1, 1), (5, 257, 3), (2, 20, 20)]
LOW = (torch.bfloat16, torch.float16)


def rows_for(strategy, B):
    return 1 if strategy == "shared" else B


def assert_close(actual, expected, tolerance=EXACT):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_rms(actual[name], value) <= tolerance, name


@pytest.fixture
def native_low_precision(monkeypatch):
    """Products in 16 bits, as on a processor that has them."""
    monkeypatch.setattr(plan, "cpu_has_fast_low_precision", lambda: True)


# --- merged_linear: values and gradients ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_merged_linear_is_the_reference_in_float64(strategy, activation, bias, shape):
    B, N, T = shape
    if strategy == "reference" and B == 0:
        return  # no samples, no graph: see test_empty_batch
    inputs = merged_inputs(B, N, T, bias=bias, rows=rows_for(strategy, B), dtype=torch.float64)
    dy = torch.randn(B, N, 21, dtype=torch.float64)
    actual = gradients(merged_linear, inputs, dy, activation=activation, strategy=strategy)
    assert actual["y"].dtype == torch.float64
    if B == 0:
        assert actual["y"].shape == (0, 3, 21)
        assert all(not grad.any() for grad in actual.values())
        return
    assert_close(actual, oracle(inputs, activation, dy))


@pytest.mark.parametrize("strategy", ["reference", "chunked", "factored", "auto"])
def test_one_row_of_routing_weights_serves_the_whole_batch(strategy):
    inputs = merged_inputs(5, 20, 3, rows=1, dtype=torch.float64)
    dy = torch.randn(5, 20, 21, dtype=torch.float64)
    assert_close(gradients(merged_linear, inputs, dy, strategy=strategy), oracle(inputs, dy=dy))


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
@pytest.mark.parametrize("strategy", FAST)
def test_without_gradients_the_operator_applies_the_activation(strategy, activation):
    inputs = merged_inputs(5, 20, 3, rows=rows_for(strategy, 5), dtype=torch.float64)
    expected = oracle(inputs, activation)["y"]
    with torch.no_grad():
        inside = merged_linear(**inputs, activation=activation, strategy=strategy)
    assert relative_rms(inside, expected) <= EXACT


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradcheck(strategy, activation, bias):
    inputs = merged_inputs(2, 3, 2, d=4, h=5, bias=bias, rows=rows_for(strategy, 2), dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *args: merged_linear(*args, *([] if bias else [None]), activation, strategy), tuple(inputs.values())
    )


@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("strategy", FAST)
def test_only_some_inputs_require_grad(strategy, rows):
    everything = merged_inputs(5, 4, 3, rows=1 if rows == "one" or strategy == "shared" else 5, dtype=torch.float64)
    dy = torch.randn(5, 4, 21, dtype=torch.float64)
    expected = oracle(everything, dy=dy)
    for wanted in itertools.product([True, False], repeat=4):
        if not any(wanted):
            continue
        for value, want in zip(everything.values(), wanted, strict=True):
            value.requires_grad_(want)
        actual = gradients(merged_linear, everything, dy, strategy=strategy)
        assert_close(actual, {name: expected[name] for name in actual})
        assert len(actual) == 1 + sum(wanted)


def test_gradients_of_gradients_are_refused_and_not_wrong():
    inputs = merged_inputs(2, 3, 2, dtype=torch.float64)
    y = merged_linear(**inputs, strategy="chunked")
    (dx,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dx.square().sum(), inputs["x"])


# --- merged_mlp ---


def mlp_inputs(B, N, T, *, gated=False, bias=True, rows=None, dtype=torch.float64, d=13, h=70, out=9):
    """Arguments of merged_mlp."""
    first = merged_inputs(B, N, T, d=d, h=h, bias=bias, rows=rows, dtype=dtype)
    gate = merged_inputs(B, N, T, d=d, h=h, bias=bias, dtype=dtype) if gated else None
    down = merged_inputs(B, N, T, d=h, h=out, bias=bias, dtype=dtype)

    def linear(inputs):
        return inputs["stack"], inputs.get("bias")

    inputs = {"x": first["x"], "up": linear(first), "down": linear(down), "gate": gate and linear(gate)}
    return {**inputs, "routing_weights": first["routing_weights"]}


def composed_mlp(x, up, down, routing_weights, gate=None, activation=None, dtype=torch.float64):
    """merged_mlp out of the reference's linears."""

    def linear(x, linear, activation=None):
        stack, bias = (None if t is None else t.detach().to(dtype) for t in linear)
        return reference.merged_linear(x, stack, routing_weights.detach().to(dtype), bias, activation)

    x = x.detach().to(dtype)
    hidden = linear(x, up, activation) if gate is None else linear(x, gate, activation) * linear(x, up)
    return linear(hidden, down)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_merged_mlp_is_the_reference_in_float64(strategy, gated, bias, shape, poisoned):
    B, N, T = shape
    inputs = mlp_inputs(B, N, T, gated=gated, bias=bias, rows=rows_for(strategy, B))
    with torch.no_grad():
        y = merged_mlp(**inputs, activation="gelu", strategy=strategy)
    learning = merged_mlp(**inputs, activation="gelu", strategy=strategy)
    assert y.shape == (B, N, 9)
    if B:
        expected = composed_mlp(**inputs, activation="gelu")
        assert relative_rms(y, expected) <= EXACT
        assert relative_rms(learning, expected) <= EXACT
        assert learning.requires_grad


@pytest.mark.parametrize("rows", [1, 5])
def test_merged_mlp_in_pieces_is_the_same_to_the_bit(rows, monkeypatch):
    """And what each of its linears gives."""
    inputs = mlp_inputs(5, 50, 3, gated=True, rows=rows, dtype=torch.float32, d=40, h=900, out=300)
    monkeypatch.setattr(plan, "WORTH_SHARING", 0)
    found = []
    with torch.no_grad():
        for share in (native.SHARE, 1, 300_000):
            monkeypatch.setattr(native, "SHARE", share)
            found.append(merged_mlp(**inputs, activation="silu", strategy="native"))
        hidden = ops.merged_gated_linear(
            inputs["x"], inputs["gate"][0], inputs["up"][0], inputs["routing_weights"], inputs["gate"][1],
            inputs["up"][1], "silu", "native",
        )  # fmt: skip
        found.append(merged_linear(hidden, inputs["down"][0], inputs["routing_weights"], inputs["down"][1]))
    for y in found[1:]:
        assert torch.equal(y, found[0])


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_merged_mlp_is_no_worse_than_the_plain_formula(dtype, activation):
    inputs = mlp_inputs(4, 50, 3, dtype=dtype)
    with torch.no_grad():
        y = merged_mlp(**inputs, activation=activation)
        plain = composed_mlp(**inputs, activation=activation, dtype=dtype)
    assert y.dtype == dtype
    assert_no_worse({"y": y}, {"y": composed_mlp(**inputs, activation=activation)}, {"y": plain})


def test_merged_mlp_refuses_everything_that_does_not_fit():
    inputs = mlp_inputs(4, 5, 3)
    inputs["up"] = inputs["up"][0], inputs["up"][1][:, :-1]
    inputs["routing_weights"] = inputs["routing_weights"][:, :2]
    with torch.no_grad(), pytest.raises(InputError, match=r"(?s)merged_mlp.*routing_weights: .*up bias: ") as first:
        merged_mlp(**inputs)
    assert "down" not in str(first.value)
    inputs = mlp_inputs(4, 5, 3)
    inputs["down"] = inputs["down"][0][:, :, 1:], inputs["down"][1][:2]
    with torch.no_grad(), pytest.raises(InputError, match=r"(?s)merged_mlp.*down stack: .*70.*down bias: "):
        merged_mlp(**inputs)


@pytest.mark.parametrize("strategy", ["auto", "native", "chunked"])
def test_merged_mlp_of_strided_stacks(strategy):
    inputs = mlp_inputs(4, 50, 3, gated=True)
    for name in ("up", "down", "gate"):
        stack, bias = inputs[name]
        inputs[name] = stack.mT.contiguous().mT, bias
        assert not inputs[name][0].is_contiguous()
    with torch.no_grad():
        y = merged_mlp(**inputs, activation="gelu", strategy=strategy)
    assert relative_rms(y, composed_mlp(**inputs, activation="gelu")) <= EXACT


def test_merged_mlp_under_autocast():
    inputs = mlp_inputs(4, 50, 3, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = merged_mlp(**inputs, activation="gelu")
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, composed_mlp(**inputs, activation="gelu")) <= 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_hidden_states_of_a_batch_do_not_exist_at_once(dtype, monkeypatch):
    """What the kernels keep grows no further from some batch on, and nothing is allocated beside it."""
    monkeypatch.setattr(native, "SHARE", MEGABYTE)
    monkeypatch.setattr(native, "ACTIVATED_BYTES", MEGABYTE // 8)
    kept = []
    for B, N in ((64, 20), (256, 20), (1, 5120)):
        monkeypatch.setattr(native.kernel, "_memory", native.kernel._Memory())
        inputs = mlp_inputs(B, N, 3, gated=True, dtype=dtype, d=64, h=1024, out=64)
        with torch.no_grad():
            peak, _, y = peak_bytes(lambda inputs=inputs: merged_mlp(**inputs, activation="gelu"))
        kept.append(peak - y.nbytes)
    hidden = 64 * 20 * 1024 * 4
    assert max(kept) <= 8 * MEGABYTE < 2 * hidden
    assert kept[1] - kept[0] <= (256 - 64) * 1024


# --- layouts ---


def sequence_first(B, N, d):
    return torch.randn(N, B, d, dtype=torch.float64).transpose(0, 1)


def every_other_token(B, N, d):
    return torch.randn(B, 2 * N, d, dtype=torch.float64)[:, ::2]


def every_other_feature(B, N, d):
    return torch.randn(B, N, 2 * d, dtype=torch.float64)[:, :, 1::2]


def last_tokens_reversed_layout(B, N, d):
    return torch.randn(d, N, B, dtype=torch.float64).permute(2, 1, 0)


def one_sample_for_all(B, N, d):
    return torch.randn(1, N, d, dtype=torch.float64).expand(B, -1, -1)


LAYOUTS = [sequence_first, every_other_token, every_other_feature, last_tokens_reversed_layout, one_sample_for_all]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", FAST)
def test_strided_x_and_strided_dy(strategy, layout):
    inputs = merged_inputs(5, 20, 3, rows=rows_for(strategy, 5), dtype=torch.float64)
    inputs["x"] = layout(5, 20, 13).requires_grad_()
    dy = layout(5, 20, 21)
    assert not inputs["x"].is_contiguous()
    assert_close(gradients(merged_linear, inputs, dy, strategy=strategy), oracle(inputs, dy=dy))


@pytest.mark.parametrize("strategy", FAST)
def test_strided_stack_weights_and_bias(strategy):
    inputs = merged_inputs(5, 20, 3, rows=rows_for(strategy, 5), dtype=torch.float64)
    inputs["stack"] = (torch.randn(4, 13, 21, dtype=torch.float64) * 0.3).mT.requires_grad_()
    inputs["bias"] = torch.randn(21, 4, dtype=torch.float64).mT.requires_grad_()
    inputs["routing_weights"] = torch.randn(rows_for(strategy, 5), 6, dtype=torch.float64)[:, ::2].requires_grad_()
    assert not inputs["stack"].is_contiguous()
    dy = torch.randn(5, 20, 21, dtype=torch.float64)
    assert_close(gradients(merged_linear, inputs, dy, strategy=strategy), oracle(inputs, dy=dy))


@pytest.mark.parametrize("strategy", FAST)
def test_expanded_dy(strategy):
    inputs = merged_inputs(5, 20, 3, rows=rows_for(strategy, 5), dtype=torch.float64)
    expected = oracle(inputs)
    merged_linear(**inputs, strategy=strategy).sum().backward()
    for name, value in inputs.items():
        assert relative_rms(value.grad, expected[name]) <= EXACT, name


def test_inputs_are_left_alone():
    inputs = merged_inputs(5, 20, 3, dtype=torch.float64)
    before = {name: value.detach().clone() for name, value in inputs.items()}
    for strategy in ("chunked", "factored"):
        merged_linear(**inputs, strategy=strategy).sum().backward()
    for name, value in before.items():
        assert torch.equal(inputs[name], value), name


# --- precision ---


@pytest.mark.parametrize("shape", [(5, 50, 3), (20, 3, 8), (3, 257, 20), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("strategy", FAST)
def test_no_less_precise_than_plain_pytorch(strategy, dtype, activation, shape):
    B, N, T = shape
    inputs = merged_inputs(B, N, T, d=67, h=45, rows=rows_for(strategy, B), dtype=dtype)
    dy = torch.randn(B, N, 45).to(dtype)
    actual = gradients(merged_linear, inputs, dy, activation=activation, strategy=strategy)
    assert_no_worse(actual, oracle(inputs, activation, dy), in_dtype(dtype, inputs, activation, dy))
    with torch.no_grad():
        y = merged_linear(**inputs, activation=activation, strategy=strategy)
    assert_no_worse({"y": y}, {"y": oracle(inputs, activation)["y"]}, in_dtype(dtype, inputs, activation))


@pytest.mark.usefixtures("native_low_precision")
@pytest.mark.parametrize("shape", [(5, 50, 3), (20, 3, 8), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("strategy", FAST)
def test_no_less_precise_than_plain_pytorch_with_native_16_bit_products(strategy, dtype, shape):
    B, N, T = shape
    inputs = merged_inputs(B, N, T, d=67, h=45, rows=rows_for(strategy, B), dtype=dtype)
    dy = torch.randn(B, N, 45).to(dtype)
    assert plan.compute_dtype(inputs["x"]) == dtype
    actual = gradients(merged_linear, inputs, dy, strategy=strategy)
    assert_no_worse(actual, oracle(inputs, dy=dy), in_dtype(dtype, inputs, dy=dy))


def test_routing_weights_keep_their_precision():
    """In float32 beside bfloat16 tensors: a weight that bfloat16 cannot tell from 1 moves the output."""
    inputs = merged_inputs(2, 3, 1, bias=False, dtype=torch.bfloat16)
    weights = torch.full((2, 1), 1 + 2**-10)
    inputs["stack"].data[0] = -inputs["stack"].data[1]
    inputs["routing_weights"] = leaf(weights)
    actual = gradients(merged_linear, inputs, strategy="chunked")
    assert actual["routing_weights"].dtype == torch.float32
    assert relative_rms(actual["y"], oracle(inputs)["y"]) < 1e-2


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("shape", [(5, 20, 3), (33, 1, 20), (1, 7, 1), (0, 3, 3), (3, 0, 3)], ids=str)
@pytest.mark.parametrize("strategy", FAST)
def test_no_unwritten_memory_is_read(strategy, shape, dtype):
    B, N, T = shape
    inputs = merged_inputs(B, N, T, rows=rows_for(strategy, B), dtype=dtype)
    actual = gradients(merged_linear, inputs, strategy=strategy)
    assert all(value.isfinite().all() for value in actual.values())
    with torch.no_grad():
        assert merged_linear(**inputs, activation="gelu", strategy=strategy).isfinite().all()
        assert merged_linear(**{**inputs, "bias": None}, strategy=strategy).isfinite().all()


# --- the loops: slabs, groups, blocks, tokens ---


def iterations(x, stack, weights, strategy, width):
    chosen = plan.choose(x, stack, weights, strategy)
    return chosen, list(chunked.blocks(x, width, chosen))


@pytest.mark.usefixtures("tiny_plan", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("shape", [(7, 20, 3), (10, 1, 20), (7, 2, 3), (4, 50, 5)], ids=str)
@pytest.mark.parametrize("strategy", FAST)
def test_every_loop_runs_with_ragged_ends(strategy, shape, dtype):
    B, N, T = shape
    inputs = merged_inputs(B, N, T, rows=rows_for(strategy, B), dtype=dtype)
    x, stack, weights = inputs["x"], inputs["stack"], inputs["routing_weights"]
    chosen = plan.choose(x, stack, weights, strategy)
    assert chosen.rows == 8
    assert stack.shape[1] % chosen.rows
    if strategy != "shared":
        assert chosen.group < B
    dy = torch.randn(B, N, 21).to(dtype)
    for activation in (None, "gelu"):
        actual = gradients(merged_linear, inputs, dy, activation=activation, strategy=strategy)
        expected = oracle(inputs, activation, dy)
        if dtype in LOW:
            assert_no_worse(actual, expected, in_dtype(dtype, inputs, activation, dy))
        else:
            assert_close(actual, expected, EXACT if dtype == torch.float64 else 1e-6)
        with torch.no_grad():
            y = merged_linear(**inputs, activation=activation, strategy=strategy)
        assert relative_rms(y, actual["y"]) <= (EXACT if dtype == torch.float64 else 1e-6 if dtype not in LOW else 1e-2)


@pytest.mark.parametrize(("B", "N"), [(7, 20), (10, 1), (7, 2), (2, 50), (4, 9)])
@pytest.mark.parametrize("limit", [1, 3, 7, 30, 10**6])
@pytest.mark.parametrize("group", [1, 3])
def test_blocks_cover_every_token_once_in_whole_groups(B, N, limit, group):
    seen = torch.zeros(B, N)
    found = list(blocks(B, N, limit, group))
    for samples, tokens in found:
        seen[samples, tokens] += 1
        assert seen[samples, tokens].numel() <= limit
        if limit >= N * group:
            assert samples.start % group == 0
            assert tokens == slice(0, N)
    assert seen.eq(1).all()
    assert (len(found) == 1) == (limit >= B * N)


def test_without_conversion_there_is_one_block():
    x = torch.zeros(7, 20, 13)
    chosen = plan.Plan("chunked", 3, 8, torch.float32, "")
    assert list(chunked._converted(x, 13, chosen)) == [(slice(0, 7), slice(0, 20))]


@pytest.mark.usefixtures("tiny_plan")
def test_what_is_converted_is_converted_in_blocks():
    x = torch.zeros(7, 20, 13, dtype=torch.bfloat16)
    chosen = plan.Plan("chunked", 3, 8, torch.float32, "")
    for samples, tokens in chunked._converted(x, 13, chosen):
        assert x[samples, tokens].numel() * 4 <= plan.WORKSPACE_BYTES // 4
    assert len(list(chunked._converted(x, 13, chosen, sums=13))) > len(list(chunked._converted(x, 13, chosen))) > 1


@pytest.mark.parametrize("rows", [1, 5, 8, 21])
@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("strategy", ["chunked", "factored"])
def test_any_group_and_slab_give_the_same(strategy, group, rows):
    inputs = merged_inputs(5, 4, 3, dtype=torch.float64)
    dy = torch.randn(5, 4, 21, dtype=torch.float64)
    expected = oracle(inputs, dy=dy)
    module = {"chunked": chunked, "factored": factored}[strategy]
    chosen = plan.Plan(strategy, group, rows, torch.float64, "")
    with torch.no_grad():
        y = module.forward(*inputs.values(), "none", chosen)
        grads = module.backward(dy, *inputs.values(), (True,) * 4, chosen)
    assert_close({"y": y, **dict(zip(inputs, grads, strict=True))}, expected)


# --- memory ---


def materialising(x, stack, routing_weights, bias=None, activation=None, strategy=""):
    """What merged_linear must not be: every sample's weights at once."""
    merged = torch.einsum("bt,thd->bhd", torch.nn.functional.pad(routing_weights, (1, 0), value=1.0), stack)
    return lookup(activation or "none")(x @ merged.mT)


def forward_workspace(function, inputs, **settings):
    with torch.no_grad():
        peak, kept, y = peak_bytes(lambda: function(**inputs, **settings))
    assert kept >= y.numel() * y.element_size()
    return peak - kept


def backward_workspace(function, inputs, **settings):
    y = function(**inputs, **settings)
    wanted = [value for value in inputs.values() if value.requires_grad]
    dy = torch.ones_like(y).mul_(0.5)
    peak, kept, _ = peak_bytes(lambda: torch.autograd.grad(y, wanted, dy))
    return peak - kept


WORKSPACES = {"forward": forward_workspace, "backward": backward_workspace}


def measured(function, direction, strategy, dtype, activation, B, frozen=False):
    inputs = merged_inputs(B, 20, 3, d=64, h=96, bias=False, rows=rows_for(strategy, B), dtype=dtype)
    inputs["stack"].requires_grad_(not frozen)
    return WORKSPACES[direction](function, inputs, activation=activation, strategy=strategy)


@pytest.mark.parametrize(
    ("strategy", "activation", "dtype"),
    [
        ("shared", None, torch.float32),
        ("shared", None, torch.bfloat16),
        ("shared", "gelu", torch.float32),
        ("shared", "gelu", torch.bfloat16),
        *itertools.product(["chunked", "factored"], [None, "gelu"], [torch.float32, torch.bfloat16]),
    ],
    ids=str,
)
def test_forward_stays_within_the_workspace(strategy, activation, dtype, monkeypatch):
    set_plan(monkeypatch, WORKSPACE_BYTES=MEGABYTE)
    used = [measured(merged_linear, "forward", strategy, dtype, activation, B) for B in (64, 256)]
    assert max(used) <= MEGABYTE
    # Routing weights and biases of a sample are vectors; its merged weights would be 24 KB.
    assert used[1] - used[0] <= (256 - 64) * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", FAST)
def test_backward_stays_within_the_workspace(strategy, dtype, monkeypatch):
    set_plan(monkeypatch, WORKSPACE_BYTES=MEGABYTE)
    frozen = dtype != torch.float32
    used = [measured(merged_linear, "backward", strategy, dtype, None, B, frozen) for B in (64, 256)]
    assert max(used) <= MEGABYTE
    assert used[1] - used[0] <= (256 - 64) * 1024


@pytest.mark.parametrize("direction", WORKSPACES)
def test_the_memory_check_sees_materialised_weights(direction):
    used = [measured(materialising, direction, "chunked", torch.float32, None, B) for B in (64, 256)]
    assert used[1] > MEGABYTE
    assert used[1] - used[0] > (256 - 64) * 1024


@pytest.mark.parametrize("direction", WORKSPACES)
def test_the_memory_check_sees_inside_of_registered_operators(direction, monkeypatch):
    def forward(x, stack, weights, bias, activation, chosen):
        return materialising(x, stack, weights, bias, activation)

    def backward(dy, x, stack, weights, bias, need, chosen):
        merged = torch.einsum("bt,thd->bhd", torch.nn.functional.pad(weights, (1, 0), value=1.0), stack)
        return dy @ merged, torch.zeros_like(stack), torch.zeros_like(weights), None

    monkeypatch.setattr(chunked, "forward", forward)
    monkeypatch.setattr(chunked, "backward", backward)
    assert measured(merged_linear, direction, "chunked", torch.float32, None, 256) > MEGABYTE


def test_the_stated_workspace_holds_at_full_size():
    inputs = merged_inputs(32, 4, 4, d=768, h=3072, bias=False)
    inputs["stack"].requires_grad_(False)
    assert plan.WORKSPACE_BYTES < 32 * 768 * 3072 * 4 / 4
    assert forward_workspace(merged_linear, inputs, strategy="chunked") <= plan.WORKSPACE_BYTES
    assert backward_workspace(merged_linear, inputs, strategy="chunked") <= plan.WORKSPACE_BYTES


@pytest.mark.parametrize(
    ("strategy", "dtype"),
    [
        ("chunked", torch.float32),
        ("chunked", torch.bfloat16),
        ("factored", torch.float32),
        ("shared", torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["gelu"])
def test_many_tokens_stay_within_the_workspace(strategy, dtype, activation, monkeypatch):
    set_plan(monkeypatch, WORKSPACE_BYTES=MEGABYTE)
    inputs = merged_inputs(4, 2048, 3, d=16, h=128, bias=False, rows=rows_for(strategy, 4), dtype=dtype)
    assert forward_workspace(merged_linear, inputs, activation=activation, strategy=strategy) <= MEGABYTE


@pytest.mark.parametrize(("strategy", "T"), [("shared", 8), ("chunked", 64)])
def test_gradient_of_the_stack_stays_within_the_workspace(strategy, T, monkeypatch):
    set_plan(monkeypatch, WORKSPACE_BYTES=MEGABYTE)
    inputs = merged_inputs(16, 4, T, d=128, h=512, bias=False, rows=rows_for(strategy, 16))
    assert backward_workspace(merged_linear, inputs, strategy=strategy) <= MEGABYTE


@pytest.mark.parametrize("strategy", FAST)
def test_backward_keeps_the_inputs_alone(strategy):
    inputs = merged_inputs(8, 20, 3, rows=rows_for(strategy, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merged_linear(**inputs, strategy=strategy)
    assert sum(t.nbytes for t in saved) == sum(t.nbytes for t in inputs.values())
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in inputs.values()}


def test_route_keeps_no_tensor_of_every_token_but_its_input():
    hidden, parameters = torch.randn(8, 50, 13), router_parameters(2, 13, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        route(hidden, parameters)
    assert [t.shape for t in saved if t.numel() >= 8 * 50] == [hidden.shape]


# --- registration, transformations ---


SETTINGS = ("identity:1.0:0", None, None, 0)  # normalisation, nonzero, cu_seqlens, max_seqlen


def opcheck(operator, *arguments):
    return torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize(
    ("strategy", "bias"), [("auto", True), ("chunked", False), ("factored", True), ("shared", True)]
)
def test_opcheck_merged_linear(strategy, bias):
    inputs = merged_inputs(3, 4, 2, bias=bias, rows=rows_for(strategy, 3))
    x, stack, weights = (inputs[name] for name in ("x", "stack", "routing_weights"))
    opcheck(
        torch.ops.wemoe_fast.merged_linear.default, x, stack, weights, inputs.get("bias"), "none", strategy, *SETTINGS
    )
    frozen = [None if t is None else t.detach() for t in (x, stack, weights, inputs.get("bias"))]
    opcheck(torch.ops.wemoe_fast.merged_linear.default, *frozen, "gelu", strategy, *SETTINGS)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("strategy", ["auto", "chunked"])
def test_opcheck_merged_mlp(strategy, gated, rows):
    inputs = mlp_inputs(3, 4, 2, gated=gated, rows=rows, dtype=torch.float32)
    (up, up_bias), (down, down_bias), (gate, gate_bias) = inputs["up"], inputs["down"], inputs["gate"] or (None, None)
    tensors = (inputs["x"], up, down, inputs["routing_weights"], up_bias, down_bias, gate, gate_bias)
    frozen = [None if t is None else t.detach() for t in tensors]
    opcheck(torch.ops.wemoe_fast.merged_mlp.default, *frozen, "gelu", strategy, None)


@pytest.mark.parametrize("strategy", ["chunked", "factored", "shared"])
def test_opcheck_merged_linear_backward(strategy):
    inputs = [t.detach() for t in merged_inputs(3, 4, 2, rows=rows_for(strategy, 3)).values()]
    for needs in ([True] * 4, [False, False, True, False]):
        arguments = (torch.randn(3, 4, 21), *inputs, strategy, *SETTINGS, needs)
        opcheck(torch.ops.wemoe_fast.merged_linear_backward.default, *arguments)


@pytest.mark.parametrize(("dtype", "hidden_layer"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_opcheck_token_mean(masked, dtype, hidden_layer):
    hidden = torch.randn(3, 4, 13).to(dtype).transpose(0, 1).requires_grad_()
    mask = torch.rand(4, 3) > 0.5 if masked else None
    layer = (leaf(torch.randn(7, 13)), leaf(torch.randn(7))) if hidden_layer else (None, None)
    opcheck(torch.ops.wemoe_fast.token_mean.default, hidden, mask, *layer)
    arguments = (torch.randn(4, 7 if hidden_layer else 13), hidden.detach(), mask)
    detached = tuple(None if t is None else t.detach() for t in layer)
    for needs in ([True, True], [False, True]):
        opcheck(torch.ops.wemoe_fast.token_mean_backward.default, *arguments, *detached, needs)


def test_opcheck_token_mean_of_a_transposed_weight():
    weight, bias = torch.randn(13, 7).T, torch.randn(7)
    arguments = (torch.randn(4, 7), torch.randn(4, 3, 13), None, weight, bias, [True, True])
    opcheck(torch.ops.wemoe_fast.token_mean_backward.default, *arguments)


class Layer(nn.Module):
    """route, then merged_linear twice: what a model is made of."""

    def __init__(self, strategy="auto", depth=2, dtype=torch.float32):
        super().__init__()
        self.strategy = strategy
        self.routing = nn.ParameterDict({n: nn.Parameter(t) for n, t in router_dict(depth, 13, 3).items()})
        for name, h, d in (("up", 21, 13), ("down", 13, 21)):
            self.register_buffer(name, torch.randn(4, h, d) * 0.2)
            self.register_buffer(f"{name}_bias", torch.randn(4, h) * 0.2)
        self.to(dtype)

    def forward(self, x, token_mask=None):
        weights = route(x, RouterParameters(**dict(self.routing.items())), token_mask=token_mask)
        hidden = merged_linear(x, self.up, weights, self.up_bias, "gelu", self.strategy)
        return merged_linear(hidden, self.down, weights, self.down_bias, None, self.strategy)


def layer_gradients(layer, x, call=None, **arguments):
    x = leaf(x)
    y = (layer if call is None else call)(x, **arguments)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    return {"y": y.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_compile_whole_graph_with_any_batch_size(depth):
    torch._dynamo.reset()
    layer = Layer(depth=depth)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for B in (5, 33, 18):
        x = torch.randn(B, 20, 13)
        assert_close(layer_gradients(layer, x, compiled), layer_gradients(layer, x), 1e-6)
    assert counter.frame_count == 1


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="Inductor needs a C++ compiler")
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = Layer(depth=1)
    compiled = torch.compile(layer, fullgraph=True)
    x, mask = torch.randn(5, 20, 13), torch.rand(5, 20) > 0.3
    with torch.no_grad():
        assert relative_rms(compiled(x, mask), layer(x, mask)) <= 1e-5


def test_export_with_any_batch_size():
    layer = Layer().eval()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(5, 20, 13),), dynamic_shapes=dynamic)
        x = torch.randn(9, 20, 13)
        assert relative_rms(exported.module()(x), layer(x)) <= 1e-6
    names = {str(node.target) for node in exported.graph.nodes}
    assert "wemoe_fast.merged_linear.default" in names
    assert "wemoe_fast.route.default" in names


@pytest.mark.parametrize("strategy", FAST)
def test_autocast_gives_bfloat16_of_bfloat16_accuracy(strategy):
    inputs = merged_inputs(5, 20, 3, d=67, h=45, rows=rows_for(strategy, 5))
    dy = torch.randn(5, 20, 45).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = merged_linear(**inputs, activation="gelu", strategy=strategy)
        plain = merged_linear(**inputs, activation="gelu", strategy="reference")
    assert y.dtype == plain.dtype == torch.bfloat16
    expected = oracle(inputs, "gelu", dy)
    names = list(inputs)
    grads = torch.autograd.grad(y, list(inputs.values()), dy)
    plain_grads = torch.autograd.grad(plain, list(inputs.values()), dy)
    assert_no_worse(
        {"y": y, **dict(zip(names, grads, strict=True))},
        expected,
        {"y": plain, **dict(zip(names, plain_grads, strict=True))},
    )
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize("strategy", FAST)
def test_autocast_is_over_where_the_operator_begins(strategy):
    inputs = merged_inputs(5, 20, 3, d=67, h=45, rows=rows_for(strategy, 5))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            y = merged_linear(**inputs, strategy=strategy)
        outside = operators.merged_linear(
            inputs["x"].bfloat16(),
            inputs["stack"],
            inputs["routing_weights"],
            inputs["bias"],
            "none",
            strategy,
            *SETTINGS,
        )
    assert torch.equal(y, outside)


def test_autocast_leaves_the_routing_in_float32():
    hidden, parameters = torch.randn(5, 20, 13), router_parameters(2, 13, 3)
    with torch.autocast("cpu", torch.bfloat16):
        weights = route(hidden, parameters)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, route(hidden.bfloat16(), parameters))


def test_autocast_of_a_layer_and_its_backward():
    layer = Layer()
    x = torch.randn(5, 20, 13)
    expected = layer_gradients(copy.deepcopy(layer).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_rms(y, expected["y"]) < 2e-2
    y.square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad.dtype == torch.float32
        assert relative_rms(p.grad, expected[name]) < 0.1, name


def test_autocast_leaves_float64_alone():
    inputs = merged_inputs(5, 20, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = merged_linear(**inputs, activation="gelu")
    assert y.dtype == torch.float64
    assert relative_rms(y, oracle(inputs, "gelu")["y"]) <= EXACT


def test_inference_mode():
    layer = Layer()
    x = torch.randn(5, 20, 13)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    assert torch.equal(y, layer(x).detach()) or relative_rms(y, layer(x)) < 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    """To the bit, or where the first pass is not recorded to the rounding of the kernels' own activation."""
    layer = Layer()
    x = torch.randn(5, 20, 13)
    again = layer_gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert_close(again, layer_gradients(layer, x), 1e-6 if reentrant else 0.0)


def test_functional_call():
    layer, other = Layer(), Layer()
    x = torch.randn(5, 20, 13)
    state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    assert torch.equal(torch.func.functional_call(layer, state, (x,)), other(x))


# --- route ---


def router_dict(depth, d, T, m=None, dtype=torch.float32):
    m = d if m is None else m
    layers = {"output_bias": torch.randn(T), "output_weight": torch.randn(T, m if depth == 2 else d)}
    layers |= {"hidden_weight": torch.randn(m, d) / d**0.5, "hidden_bias": torch.randn(m) * 0.3}
    kept = {0: 1, 1: 2, 2: 4}[depth]
    return {name: leaf(value.to(dtype)) for name, value in list(layers.items())[:kept]}


def router_parameters(depth, d, T, **options):
    return RouterParameters(**router_dict(depth, d, T, **options))


NORMALIZATIONS = [
    Normalization(kind, 0.7 if kind == "softmax" else 1.0, top_k)
    for kind in ("identity", "softmax", "sigmoid")
    for top_k in (None, 1, 2)
]


def masks(B, N):
    """Kinds of masks: of every dtype people use, one sample without tokens, padding left and right."""
    some = torch.rand(B, N) > 0.4
    some[:, 0] = True
    if B > 1:
        some[1] = False
        some[0, : N // 2] = False
        some[0, N - 1] = True
    return {"none": None, "bool": some, "int": some.long(), "float": some.float() * 0.5}


def compare_routes(hidden, parameters, normalization=None, mask=None, tolerance=EXACT):
    normalization = normalization or Normalization()
    given = {"hidden": leaf(hidden, hidden.dtype), **{n: leaf(p) for n, p in parameters.items()}}
    exact = {name: leaf(value, torch.float64) for name, value in given.items()}

    def fast(hidden, **parameters):
        return route(hidden, RouterParameters(**parameters), normalization, mask).expand(len(hidden), -1)

    def plain(hidden, **parameters):
        return reference.route(hidden, parameters, normalization, mask)

    results = []
    for function, inputs in ((fast, given), (plain, exact)):
        y = function(**inputs)
        cotangent = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        grads = torch.autograd.grad(y, list(inputs.values()), cotangent, allow_unused=True)
        results.append({"y": y, **{n: g for n, g in zip(inputs, grads, strict=True) if g is not None and g.any()}})
    assert_close(results[0], results[1], tolerance)
    return results[0]


@pytest.mark.parametrize("mask", ["none", "bool", "int", "float"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS, ids=lambda n: f"{n.kind}-{n.top_k}")
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_route_is_the_reference_in_float64(depth, normalization, mask):
    parameters = router_dict(depth, 13, 3, m=7, dtype=torch.float64)
    for B, N in ((1, 1), (5, 50), (3, 257)):
        hidden = torch.randn(B, N, 13, dtype=torch.float64)
        compare_routes(hidden, parameters, normalization, masks(B, N)[mask])


@pytest.mark.usefixtures("tiny_plan", "poisoned")
@pytest.mark.parametrize("depth", [1, 2])
def test_route_in_several_groups(depth):
    hidden = torch.randn(7, 2, 13, dtype=torch.float64)
    for mask in (None, masks(7, 2)["bool"]):
        compare_routes(hidden, router_dict(depth, 13, 3, m=2, dtype=torch.float64), mask=mask)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_route_of_strided_hidden_states(layout, depth):
    parameters = router_dict(depth, 13, 3, dtype=torch.float64)
    hidden = layout(5, 20, 13)
    expected = reference.route(hidden, parameters)
    assert relative_rms(route(hidden, RouterParameters(**parameters)), expected) <= EXACT


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_stands_at_masked_tokens_does_not_matter(depth, poison):
    parameters = router_dict(depth, 13, 3)
    hidden, mask = torch.randn(5, 20, 13), masks(5, 20)["bool"]
    clean = compare_routes(hidden, parameters, mask=mask, tolerance=1e-5)
    dirty = leaf(hidden.masked_fill(~mask.unsqueeze(2), poison))
    weights = route(dirty, RouterParameters(**parameters), token_mask=mask)
    assert torch.equal(weights, clean["y"])
    weights.sum().backward()
    assert all(p.grad.isfinite().all() for p in parameters.values())
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~mask].any()


def test_a_sample_without_tokens_is_routed_by_the_last_bias():
    for depth in (1, 2):
        parameters = router_dict(depth, 13, 3)
        weights = route(torch.randn(2, 4, 13), RouterParameters(**parameters), token_mask=torch.zeros(2, 4))
        assert torch.equal(weights, parameters["output_bias"].detach().expand(2, -1))
        empty = route(torch.randn(2, 0, 13), RouterParameters(**parameters))
        assert torch.equal(empty, parameters["output_bias"].detach().expand(2, -1))


@pytest.mark.parametrize("depth", [1, 2])
def test_gradcheck_of_route(depth):
    parameters = router_dict(depth, 4, 3, m=5, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, True]])

    def function(hidden, *values):
        return route(hidden, RouterParameters(*values), Normalization("softmax"), mask)

    assert torch.autograd.gradcheck(function, (leaf(torch.randn(2, 3, 4), torch.float64), *parameters.values()))


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_routing_weights_are_float32_of_float32_accuracy(depth, dtype, parameter_dtype):
    """Whatever the dtype of the hidden states, here multiplied in float32."""
    hidden = torch.randn(5, 50, 67).to(dtype)
    parameters = router_dict(depth, 67, 3, dtype=parameter_dtype)
    actual = compare_routes(hidden, parameters, tolerance=1e-2 if torch.bfloat16 in (dtype, parameter_dtype) else 2e-3)
    assert actual["y"].dtype == torch.float32
    expected = reference.route(hidden.double(), {n: p.double() for n, p in parameters.items()})
    assert relative_rms(actual["y"], expected.expand_as(actual["y"])) < 1e-6
    for name, p in parameters.items():
        assert actual[name].dtype == p.dtype


@pytest.mark.usefixtures("native_low_precision")
def test_routing_with_native_16_bit_products():
    hidden = torch.randn(5, 50, 67).bfloat16()
    parameters = router_dict(2, 67, 3)
    actual = compare_routes(hidden, parameters, tolerance=3e-2)
    assert actual["y"].dtype == torch.float32


def test_route_of_an_empty_batch():
    for depth in (1, 2):
        parameters = router_parameters(depth, 13, 3)
        weights = route(torch.randn(0, 5, 13), parameters)
        assert weights.shape == (0, 3)
        weights.sum().backward()
        assert not parameters.output_bias.grad.any()


# --- errors ---


def test_empty_batch():
    inputs = merged_inputs(0, 5, 3)
    for strategy in ("reference", "chunked", "factored", "auto"):
        y = merged_linear(**inputs, activation="gelu", strategy=strategy)
        assert y.shape == (0, 5, 21)
        assert y.dtype == torch.float32
    assert merged_linear(**merged_inputs(3, 0, 3)).shape == (3, 0, 21)


def test_empty_batch_is_differentiable_by_the_reference():
    merged_linear(**merged_inputs(0, 5, 3), strategy="reference").sum().backward()


def refused(function, *arguments, **keywords):
    with pytest.raises(InputError) as caught:
        function(*arguments, **keywords)
    return str(caught.value)


def test_merged_linear_names_every_shape_that_does_not_fit():
    message = refused(
        merged_linear, torch.zeros(2, 3, 4), torch.zeros(4, 6, 5), torch.zeros(3, 2), torch.zeros(3, 6), None
    )
    assert "merged_linear: 3 problems" in message
    assert "stack: expected [1+T, h, d] with d = 4 as in x, found (4, 6, 5)" in message
    assert "routing_weights: expected [2, 3] or [1, 3], found (3, 2)" in message
    assert "bias: expected [4, 6], found (3, 6)" in message


def test_merged_linear_names_every_number_of_dimensions_that_does_not_fit():
    message = refused(merged_linear, torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(3), None, strategy="quick")
    assert "4 problems" in message
    assert (
        "strategy: expected one of auto, reference, shared, chunked, native, fused, factored, found 'quick'" in message
    )
    assert "x: expected [B, N, d], found shape (3, 4)" in message
    assert "stack: expected [1+T, h, d], found shape (6, 4)" in message
    assert "routing_weights: expected [B, T], found shape (3,)" in message


def test_merged_linear_names_every_dtype_that_does_not_fit():
    x, stack, weights, bias = torch.zeros(2, 3, 4), torch.zeros(3, 6, 4), torch.zeros(2, 2), torch.zeros(3, 6)
    message = refused(merged_linear, x.half(), stack.double(), weights, bias)
    assert "2 problems" in message
    assert "stack: expected dtype torch.float16 as x, found torch.float64" in message
    assert "bias: expected dtype torch.float16 as x, found torch.float32" in message
    assert "x: expected a floating dtype, found torch.int64" in refused(merged_linear, x.long(), stack.long(), weights)


def test_merged_linear_names_the_devices():
    x, stack, weights = torch.zeros(2, 3, 4), torch.zeros(3, 6, 4, device="meta"), torch.zeros(2, 2, device="meta")
    message = refused(merged_linear, x, stack, weights)
    assert "stack: expected device cpu as x, found meta" in message
    assert "routing_weights: expected device cpu as x, found meta" in message


def test_merged_linear_without_experts():
    message = refused(merged_linear, torch.zeros(2, 3, 4), torch.zeros(1, 6, 4), torch.zeros(2, 0))
    assert message == "merged_linear: stack: expected the base and at least one task vector, found (1, 6, 4)"


def test_shared_with_routing_weights_of_every_sample():
    message = refused(merged_linear, torch.zeros(2, 3, 4), torch.zeros(3, 6, 4), torch.zeros(2, 2), strategy="shared")
    assert "strategy 'shared' expects one row for the whole batch, [1, 2], found (2, 2)" in message
    assert "use 'chunked' or 'auto'" in message
    assert merged_linear(torch.ones(1, 3, 4), torch.ones(3, 6, 4), torch.ones(1, 2), strategy="shared").eq(12).all()


def test_unknown_activation():
    message = refused(merged_linear, torch.zeros(2, 3, 4), torch.zeros(3, 6, 4), torch.zeros(2, 2), None, "glue")
    assert "activation" in message
    assert "'glue'" in message
    assert "gelu" in message


def test_unknown_activation_beside_other_problems():
    message = refused(merged_linear, torch.zeros(3, 4), torch.zeros(3, 6, 4), torch.zeros(2, 2), None, "glue")
    assert "x: expected [B, N, d]" in message
    assert "'glue'" in message


def test_route_names_everything_that_does_not_fit():
    hidden = torch.zeros(2, 3, 4)
    parameters = RouterParameters(torch.zeros(2), torch.zeros(2, 5), torch.zeros(6, 3), None)
    message = refused(route, hidden, parameters, Normalization(top_k=3), torch.ones(3, 2))
    assert "route: 5 problems" in message
    assert "output_weight: expected shape (2, 6), found (2, 5)" in message
    assert "hidden_weight: expected shape (6, 4), found (6, 3)" in message
    assert "hidden_weight and hidden_bias: expected both or neither" in message
    assert "token_mask: expected [B, N] = (2, 3), found (3, 2)" in message
    assert "top_k: expected at most T = 2, found 3" in message
    bias = RouterParameters(torch.zeros(2), torch.zeros(2, 6), torch.zeros(6, 4), torch.zeros(5))
    assert "hidden_bias: expected shape (6,), found (5,)" in refused(route, hidden, bias)
    message = refused(route, torch.zeros(3, 4), router_parameters(1, 4, 2))
    assert message == "route: hidden: expected [B, N, d], found shape (3, 4)"


@pytest.mark.parametrize("depth", [1, 2])
def test_route_of_integers(depth):
    assert "floating" in refused(route, torch.ones(2, 3, 4, dtype=torch.long), router_parameters(depth, 4, 2))


def test_route_with_a_hidden_layer_and_no_output_layer():
    parameters = RouterParameters(torch.zeros(2), None, torch.zeros(4, 4), torch.zeros(4))
    assert "output_weight" in refused(route, torch.zeros(2, 3, 4), parameters)
