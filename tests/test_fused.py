"""The kernels behind the public operations, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from conftest import assert_no_worse, gradients, in_dtype, leaf, merged_inputs, oracle, relative_rms
from test_ops import SETTINGS, opcheck, router_parameters
from torch import nn

from wemoe_fast import FastWEMoEMLP, fused, kernels, merged_linear, ops, route
from wemoe_fast.activations import ACTIVATIONS
from wemoe_fast.errors import InputError
from wemoe_fast.normalization import Normalization

pytest.importorskip("triton")

SHAPES = [(1, 1, 3), (5, 7, 3), (3, 65, 8), (9, 3, 1)]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Operations take the kernels wherever a GPU would."""
    monkeypatch.setattr(fused, "available", lambda tensor: kernels.why_not(tensor.device, tensor.dtype) is None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", [None, "gelu", "mish"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_every_gradient(shape, bias, activation):
    B, N, T = shape
    inputs = merged_inputs(B, N, T, bias=bias)
    dy = torch.randn(B, N, 21)
    actual, expected = gradients(merged_linear, inputs, dy, activation=activation, strategy="fused"), None
    expected = oracle(inputs, activation, dy)
    for name, value in expected.items():
        assert relative_rms(actual[name], value) < 2e-6, name
    with torch.no_grad():
        y = merged_linear(**inputs, activation=activation, strategy="fused")
    assert relative_rms(y, expected["y"]) < 2e-6


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_less_precise_than_plain_pytorch(dtype, activation):
    inputs, dy = merged_inputs(5, 20, 3, d=67, h=45, dtype=dtype), torch.randn(5, 20, 45).to(dtype)
    actual = gradients(merged_linear, inputs, dy, activation=activation, strategy="fused")
    assert_no_worse(actual, oracle(inputs, activation, dy), in_dtype(dtype, inputs, activation, dy))


@pytest.mark.parametrize("rows", ["one", "all"])
def test_one_row_of_routing_weights_collects_the_gradient_of_all(rows):
    inputs, dy = merged_inputs(5, 7, 3, rows=1 if rows == "one" else 5), torch.randn(5, 7, 21)
    actual, expected = gradients(merged_linear, inputs, dy, strategy="fused"), oracle(inputs, dy=dy)
    for name, value in expected.items():
        assert relative_rms(actual[name], value) < 2e-6, name


@pytest.mark.parametrize("strategy", ["reference", "shared", "chunked", "factored", "fused", "auto"])
@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("kind", ["identity", "softmax", "sigmoid"])
def test_router_logits_are_normalised_on_the_way(kind, top_k, strategy):
    normalization = Normalization(kind, 0.7 if kind == "softmax" else 1.0, top_k)
    dtype = torch.float32 if strategy == "fused" else torch.float64
    inputs = merged_inputs(5, 7, 4, rows=1 if strategy == "shared" else 5, dtype=dtype)
    dy = torch.randn(5, 7, 21, dtype=dtype)
    actual = gradients(merged_linear, inputs, dy, strategy=strategy, normalization=normalization)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    logits = exact.pop("routing_weights")
    y = merged_linear(**exact, routing_weights=normalization(logits), strategy="reference")
    exact["routing_weights"] = logits
    grads = torch.autograd.grad(y, list(exact.values()), dy.double())
    for name, value in {"y": y.detach(), **dict(zip(exact, grads, strict=True))}.items():
        assert relative_rms(actual[name], value) < (5e-6 if strategy == "fused" else 1e-12), name


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("strategy", ["reference", "chunked", "factored", "fused", "auto"])
def test_gated_pair(strategy, activation):
    inputs = merged_inputs(3, 7, 3)
    x, stack, weights, bias = inputs.values()
    gate, gate_bias = leaf(torch.randn_like(stack) * 0.3), leaf(torch.randn_like(bias))
    given = (x, gate, stack, weights, gate_bias, bias)
    first, second = (oracle({"x": x, "stack": s, "routing_weights": weights, "bias": b}, a)["y"]
                     for s, b, a in ((gate, gate_bias, activation), (stack, bias, None)))  # fmt: skip
    with torch.no_grad():
        y = ops.merged_gated_linear(*given, activation, strategy)
    assert relative_rms(y, first * second) < 2e-6
    learning = ops.merged_gated_linear(*given, activation, strategy)
    assert relative_rms(learning, first * second) < 2e-6
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(learning.sum(), given))


def test_gated_pair_without_one_of_the_biases():
    x, stack, weights, bias = (t.detach() for t in merged_inputs(3, 7, 3).values())
    for strategy in ("chunked", "fused"):
        y = ops.merged_gated_linear(x, stack, 2 * stack, weights, None, bias, "silu", strategy)
        gate = merged_linear(x, stack, weights, None, "silu", strategy)
        assert relative_rms(y, gate * merged_linear(x, 2 * stack, weights, bias, None, strategy)) < 1e-6


@pytest.mark.parametrize("layer", ["up_stack", "up_bias", "gate_bias"])
def test_gated_pair_names_what_does_not_fit(layer):
    x, stack, weights, bias = (t.detach() for t in merged_inputs(3, 7, 3).values())
    given = {"x": x, "gate_stack": stack, "up_stack": stack, "routing_weights": weights}
    given |= {"gate_bias": bias, "up_bias": bias}
    given[layer] = given[layer][:, :-1]
    with pytest.raises(InputError, match=layer):
        ops.merged_gated_linear(**given)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_route_with_and_without_gradients(depth, masked):
    hidden, parameters = leaf(torch.randn(3, 20, 13)), router_parameters(depth, 13, 3)
    mask = torch.rand(3, 20) > 0.3 if masked else None
    normalization = Normalization("softmax", 0.7, 2)
    learning = route(hidden, parameters, normalization, mask)
    with torch.no_grad():
        assert relative_rms(route(hidden, parameters, normalization, mask), learning) < 1e-6
    tensors = [t for t in (hidden if depth else None, *parameters.to_dict().values()) if t is not None]
    actual = torch.autograd.grad(learning.square().sum(), tensors)
    exact = {name: value.detach().double().requires_grad_() for name, value in parameters.to_dict().items()}
    hidden64 = hidden.detach().double().requires_grad_()
    expected = route(hidden64, ops.RouterParameters(**exact), normalization, mask)
    assert relative_rms(learning, expected) < 1e-6
    wanted = [t for t in (hidden64 if depth else None, *exact.values()) if t is not None]
    for ours, theirs in zip(actual, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert relative_rms(ours, theirs) < 1e-5


def mlp(gated=False):
    if not gated:
        return nn.Sequential(nn.Linear(13, 21), nn.GELU(), nn.Linear(21, 13))

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(13, 21, bias=False), nn.Linear(13, 21, bias=False)
            self.down_proj = nn.Linear(21, 13, bias=False)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    return Gated()


def wemoe(gated=False, **settings):
    base = mlp(gated)
    experts = [copy.deepcopy(base) for _ in range(4)]
    for expert in experts:
        for parameter in expert.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    layer = FastWEMoEMLP.from_mlps(base, experts, **settings)
    for parameter in layer.router.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return layer


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("settings", [{}, {"normalization": "softmax", "top_k": 2}, {"batch_reduce": True}], ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_the_module_with_kernels(gated, settings):
    layer = wemoe(gated, **settings)
    x = torch.randn(5, 7, 13)
    exact = copy.deepcopy(layer).double()
    exact.strategy, layer.strategy = "reference", "fused"
    with torch.no_grad():
        assert relative_rms(layer(x), exact(x.double())) < 2e-6
    layer(x).square().sum().backward()
    exact(x.double()).square().sum().backward()
    for ours, theirs in zip(layer.router.parameters(), exact.router.parameters(), strict=True):
        assert relative_rms(ours.grad, theirs.grad) < 1e-4


def test_top_k_routers_promise_few_experts(monkeypatch):
    layer, promised = wemoe(top_k=2), []
    original = ops.merged_linear
    monkeypatch.setattr(
        ops, "merged_linear", lambda *a, nonzero=None, **k: promised.append(nonzero) or original(*a, **k)
    )
    layer(torch.randn(3, 7, 13))
    assert promised == [2, 2]
    layer.batch_reduce = True  # a mean over the batch may have more
    layer(torch.randn(3, 7, 13))
    assert promised[2:] == [None, None]


def test_without_a_gpu_it_is_refused_by_name(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    kernels.why_not.cache_clear()
    x, stack, weights, bias = (t.detach() for t in merged_inputs(3, 7, 3).values())
    try:
        with pytest.raises(InputError, match=r"strategy 'fused': a GPU is needed, found device cpu; use 'auto'"):
            merged_linear(x, stack, weights, bias, strategy="fused")
        assert merged_linear(x, stack, weights, bias).isfinite().all()
    finally:
        kernels.why_not.cache_clear()


def test_float64_is_refused_by_name():
    x, stack, weights, bias = (t.detach() for t in merged_inputs(3, 7, 3, dtype=torch.float64).values())
    with pytest.raises(InputError, match=r"torch.float64 is not supported; use 'auto'"):
        merged_linear(x, stack, weights, bias, strategy="fused")


@pytest.mark.parametrize("found", [None, "3.2.0"])
def test_without_triton_everything_else_works(found, monkeypatch):
    def version(name):
        if found is None:
            raise kernels.PackageNotFoundError
        return found

    monkeypatch.setattr(kernels, "version", version)
    kernels.why_not.cache_clear()
    try:
        reason = "Triton is not installed" if found is None else "Triton 3.6 or newer is needed, found 3.2.0"
        assert kernels.why_not(torch.device("cpu"), torch.float32) == reason
        x, stack, weights, bias = (t.detach() for t in merged_inputs(3, 7, 3).values())
        with pytest.raises(InputError, match=reason):
            merged_linear(x, stack, weights, bias, strategy="fused")
        assert merged_linear(x, stack, weights, bias).isfinite().all()
    finally:
        kernels.why_not.cache_clear()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_opcheck(bias):
    inputs = merged_inputs(3, 4, 2, bias=bias)
    x, stack, weights = (inputs[name] for name in ("x", "stack", "routing_weights"))
    opcheck(
        torch.ops.wemoe_fast.merged_linear.default, x, stack, weights, inputs.get("bias"), "none", "fused", *SETTINGS
    )
    frozen = [t.detach() for t in (x, stack, stack, weights)]
    opcheck(torch.ops.wemoe_fast.merged_gated_linear.default, *frozen, None, None, "silu", "fused", *SETTINGS)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_opcheck_route():
    hidden, parameters = (
        torch.randn(3, 4, 13),
        {n: t.detach() for n, t in router_parameters(2, 13, 3).to_dict().items()},
    )
    layers = [parameters[n] for n in ("hidden_weight", "hidden_bias", "output_weight", "output_bias")]
    opcheck(torch.ops.wemoe_fast.route.default, hidden, torch.rand(3, 4) > 0.5, *layers, "softmax:0.5:2", None, 0)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_compile_whole_graph(gated):
    torch._dynamo.reset()
    layer = wemoe(gated, normalization="softmax", top_k=2)
    layer.strategy = "fused"
    x = torch.randn(5, 7, 13)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_rms(compiled(x), layer(x)) < 1e-6
    with torch.no_grad():
        assert relative_rms(compiled(x), layer(x)) < 1e-6
    with torch.inference_mode():
        assert relative_rms(layer(x), compiled(x)) < 1e-6


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_graph_break_in_a_whole_vision_tower():
    transformers = pytest.importorskip("transformers")
    from wemoe_fast import upscale, wemoe_layers

    torch._dynamo.reset()
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    base = transformers.CLIPVisionModel(config).eval()
    experts = {str(t): copy.deepcopy(base) for t in range(2)}
    for expert in experts.values():
        for parameter in expert.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    model = upscale(base, experts)
    for layer in wemoe_layers(model).values():
        layer.strategy = "fused"
    images = torch.randn(3, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_rms(compiled(images).last_hidden_state, model(images).last_hidden_state) < 1e-5


def test_autocast():
    inputs, dy = merged_inputs(5, 20, 3, d=67, h=45), torch.randn(5, 20, 45).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(merged_linear, inputs, dy, strategy="fused")
    assert actual["y"].dtype == torch.bfloat16
    assert actual["x"].dtype == torch.float32
    for name, value in oracle(inputs, dy=dy).items():
        assert relative_rms(actual[name], value) < 1e-2, name
