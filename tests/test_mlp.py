from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import relative_rms
from torch import nn

from wemoe_fast import FastWEMoEMLP, ops, reference
from wemoe_fast.activations import ACTIVATIONS, lookup
from wemoe_fast.errors import InputError
from wemoe_fast.normalization import Normalization

EXACT = 1e-12
SMOOTH = [name for name in ACTIVATIONS if name != "none"]


class Activation(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def forward(self, x):
        return lookup(self.name)(x)


class GatedMLP(nn.Module):
    def __init__(self, d, h, activation="silu", bias=False):
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(a, b, bias=bias) for a, b in ((d, h), (d, h), (h, d)))
        self.act = Activation(activation)

    def forward(self, x):
        return self.w3(self.act(self.w1(x)) * self.w2(x))


def plain_mlp(d=13, h=21, activation="gelu", bias=True, out=None):
    return nn.Sequential(nn.Linear(d, h, bias=bias), Activation(activation), nn.Linear(h, out or d, bias=bias))


def family(make, T=3, dtype=torch.float64):
    """A base and T experts around it."""
    base = make().to(dtype)
    experts = [copy.deepcopy(base) for _ in range(T)]
    for expert in experts:
        for p in expert.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return base, experts


def layer_of(make=plain_mlp, T=3, dtype=torch.float64, **options):
    """A layer with a router far from its initialisation."""
    base, experts = family(make, T, dtype)
    layer = FastWEMoEMLP.from_mlps(base, experts, **options)
    with torch.no_grad():
        for p in layer.router.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return layer


def composed(layer, x, mask=None):
    """The layer out of the reference's operations, in float64; x is batch first."""
    exact = copy.deepcopy(layer).double()
    parameters = exact.router.parameters_for_routing().to_dict()
    x = x.double()
    weights = reference.route(x, parameters, layer.router.normalization, mask)
    if layer.batch_reduce:
        weights = weights.mean(0, keepdim=True)

    def linear(which, x, activation=None):
        return reference.merged_linear(x, which.stack, weights, which.bias, activation)

    if exact.gate is None:
        hidden = linear(exact.up, x, layer.activation)
    else:
        hidden = linear(exact.gate, x, layer.activation) * linear(exact.up, x)
    return linear(exact.down, hidden)


# --- from_mlps ---


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("gated", [False, True], ids=["two linears", "gated"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_from_mlps_is_the_reference(activation, gated, bias):
    make = (lambda: GatedMLP(13, 21, activation, bias)) if gated else (lambda: plain_mlp(13, 21, activation, bias))
    layer = layer_of(make)
    assert layer.activation == activation
    assert (layer.gate is not None) == gated
    assert (layer.up.bias is not None) == bias
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    assert relative_rms(layer(x), composed(layer, x)) <= EXACT


@pytest.mark.parametrize("mask", [None, "bool", "long"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batch_reduce", [True, False])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_forward_is_the_reference(depth, batch_reduce, batch_first, mask):
    layer = layer_of(
        lambda: plain_mlp(out=7), router_depth=depth, batch_first=batch_first, batch_reduce=batch_reduce,
        normalization="softmax", temperature=0.5, top_k=2,
    )  # fmt: skip
    assert layer.router.normalization == Normalization("softmax", 0.5, 2)
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    token_mask = None if mask is None else (torch.rand(5, 20) > 0.4).to(getattr(torch, mask))
    y = layer(x if batch_first else x.transpose(0, 1).contiguous(), token_mask)
    assert y.shape == ((5, 20, 7) if batch_first else (20, 5, 7))
    assert relative_rms(y if batch_first else y.transpose(0, 1), composed(layer, x, token_mask)) <= EXACT


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_reference_s(masked, batch_invariant, gated):
    make = (lambda: GatedMLP(13, 21)) if gated else plain_mlp
    layer = layer_of(make, batch_invariant=batch_invariant)
    x = torch.randn(5, 8, 13, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(5, 8) > 0.4 if masked else None
    wanted = [x, *layer.router.parameters()]
    dy = torch.randn(5, 8, 13, dtype=torch.float64)
    actual = torch.autograd.grad(layer(x, mask), wanted, dy)
    exact = copy.deepcopy(layer)
    parameters = [x, *exact.router.parameters()]
    weights = reference.route(x, exact.router.parameters_for_routing().to_dict(), token_mask=mask)
    act = lookup(layer.activation)
    up = reference.merged_linear(x, exact.up.stack, weights, exact.up.bias)
    hidden = act(up) if not gated else act(reference.merged_linear(x, exact.gate.stack, weights)) * up
    y = reference.merged_linear(hidden, exact.down.stack, weights, exact.down.bias)
    expected = torch.autograd.grad(y, parameters, dy)
    assert all(relative_rms(a, e) <= EXACT for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    layer = layer_of(dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    x = torch.randn(5, 20, 13).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert relative_rms(y, composed(layer, x)) < {torch.float32: 1e-6, torch.bfloat16: 1e-2}.get(dtype, 2e-3)


@pytest.mark.parametrize("gated", [False, True])
def test_routing_weights_pick_the_experts(gated):
    base, experts = family((lambda: GatedMLP(13, 21)) if gated else plain_mlp)
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    layer = FastWEMoEMLP.from_mlps(base, {"a": experts[0], "b": experts[1], "c": experts[2]}, router_depth=0)
    layer.router.constant.data.zero_()
    assert relative_rms(layer(x), base(x)) <= EXACT
    for t, expert in enumerate(experts):
        layer.router.constant.data = torch.eye(3, dtype=torch.float64)[t]
        assert relative_rms(layer(x), expert(x)) <= EXACT
    assert layer.num_experts == 3


def test_nothing_given_is_changed_or_referenced():
    base, experts = family(plain_mlp)
    before = copy.deepcopy([base, *experts])
    layer = FastWEMoEMLP.from_mlps(base, experts)
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    y = layer(x)
    for module, copied in zip([base, *experts], before, strict=True):
        for p, q in zip(module.parameters(), copied.parameters(), strict=True):
            assert torch.equal(p, q)
            assert p.requires_grad
            p.data.zero_()
    assert torch.equal(layer(x), y)


def test_only_the_router_is_trained():
    for depth, count in ((0, 1), (1, 2), (2, 4)):
        layer = layer_of(router_depth=depth)
        trained = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert len(trained) == count
        assert all(name.startswith("router.") for name in trained)


def test_a_router_learns():
    layer = layer_of(dtype=torch.float32, router_depth=1)
    target = layer_of(dtype=torch.float32, router_depth=1)
    target.load_state_dict({**layer.state_dict(), "router.output.bias": torch.tensor([1.0, -1.0, 0.5])})
    x = torch.randn(8, 20, 13)
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target(x).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


# --- the module ---


def test_state_dict_round_trip():
    layer, other = layer_of(), layer_of()
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    assert relative_rms(other(x), layer(x)) > 0.01
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    names = {"up.stack", "up.bias", "down.stack", "down.bias"}
    assert {name for name in layer.state_dict() if not name.startswith("router.")} == names


@pytest.mark.parametrize("gated", [False, True])
def test_copies(gated):
    layer = layer_of((lambda: GatedMLP(13, 21)) if gated else plain_mlp)
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), expected)
        assert {n for n, p in copied.named_parameters() if p.requires_grad} == {
            n for n, p in layer.named_parameters() if p.requires_grad
        }
        copied.router.output.bias.data.add_(1)
        assert torch.equal(layer(x), expected)


def test_to_another_dtype():
    layer = layer_of(dtype=torch.float32)
    x = torch.randn(5, 20, 13)
    expected = composed(layer, x)
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2)):
        moved = copy.deepcopy(layer).to(dtype)
        assert {p.dtype for p in moved.parameters()} == {dtype}
        assert moved(x.to(dtype)).dtype == dtype
        assert relative_rms(moved(x.to(dtype)), expected) < tolerance


def test_float32_router_beside_bfloat16_weights():
    layer = layer_of(dtype=torch.bfloat16)
    layer.router.float()
    x = torch.randn(5, 20, 13).bfloat16()
    assert relative_rms(layer(x), composed(layer, x)) < 1e-2
    assert layer.routing_weights(x).dtype == torch.float32


def test_repr():
    text = repr(layer_of(batch_first=False, batch_reduce=True).extra_repr())
    for part in ("13 -> 21 -> 13", "experts=3", "gelu", "gated=False", "batch_reduce=True", "batch_first=False"):
        assert part in text
    text = layer_of(lambda: GatedMLP(13, 21), batch_invariant=True).extra_repr()
    assert "gated=True" in text
    assert "batch_invariant=True" in text
    assert "batch_reduce" not in text
    assert "batch_first" not in text
    layer = layer_of()
    layer.strategy = "chunked"
    assert "strategy='chunked'" in repr(layer)


@pytest.mark.parametrize("strategy", ["reference", "chunked", "factored"])
def test_strategy_is_an_attribute(strategy, monkeypatch):
    layer = layer_of()
    layer.strategy = strategy
    asked = []
    original = ops.merged_mlp
    monkeypatch.setattr(ops, "merged_mlp", lambda *a, **k: asked.append(a[6]) or original(*a, **k))
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    assert relative_rms(layer(x), composed(layer, x)) <= EXACT
    assert asked == [strategy]


@pytest.mark.parametrize("make", [plain_mlp, lambda: GatedMLP(13, 21)], ids=["plain", "gated"])
@pytest.mark.parametrize("part", ["up", "down"])
def test_whoever_waits_for_a_part_of_it_is_called(part, make):
    """Hooks, and a forward that somebody has put in the place of the part's own, as offloading does."""
    layer, x, calls = layer_of(make), torch.randn(5, 20, 13, dtype=torch.float64), []
    expected = layer(x)
    module = getattr(layer, part)
    if part == "up" and layer.gate is not None:
        module = layer.gate
    for wait in (
        lambda: module.register_forward_hook(lambda *_: calls.append("after")),
        lambda: module.register_forward_pre_hook(lambda *_: calls.append("before")),
    ):
        handle = wait()
        assert torch.equal(layer(x), expected)
        handle.remove()
    original = module.forward
    module.forward = lambda *a, **k: calls.append("instead") or original(*a, **k)
    assert torch.equal(layer(x), expected)
    assert calls == ["after", "before", "instead"]


@pytest.mark.parametrize("make", [plain_mlp, lambda: GatedMLP(13, 21)], ids=["plain", "gated"])
def test_compiled_and_exported_without_gradients_it_is_one_operation(make):
    layer = layer_of(make, dtype=torch.float32).eval()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    shapes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(5, 20, 13),), dynamic_shapes=shapes)
        for B in (5, 9):
            x = torch.randn(B, 20, 13)
            assert relative_rms(compiled(x), layer(x)) <= 1e-6
            assert relative_rms(exported.module()(x), layer(x)) <= 1e-6
    assert "wemoe_fast.merged_mlp.default" in {str(node.target) for node in exported.graph.nodes}


@pytest.mark.parametrize("batch_reduce", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_routing_weights(depth, batch_reduce):
    layer = layer_of(router_depth=depth, batch_reduce=batch_reduce, batch_first=False)
    x = torch.randn(20, 5, 13, dtype=torch.float64)
    mask = torch.rand(5, 20) > 0.4
    weights = layer.routing_weights(x, mask)
    expected = reference.route(x.transpose(0, 1), layer.router.parameters_for_routing().to_dict(), token_mask=mask)
    assert weights.shape == (5, 3)
    assert relative_rms(weights, expected.mean(0, keepdim=True).expand(5, -1) if batch_reduce else expected) <= EXACT


@pytest.mark.parametrize("batch_reduce", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("batch_first", [True, False])
def test_empty_batch(batch_first, depth, batch_reduce):
    layer = layer_of(batch_first=batch_first, router_depth=depth, batch_reduce=batch_reduce)
    y = layer(torch.randn((0, 20, 13) if batch_first else (20, 0, 13), dtype=torch.float64, requires_grad=True))
    assert y.shape == ((0, 20, 13) if batch_first else (20, 0, 13))
    y.sum().backward()
    layer.batch_invariant = not batch_reduce
    assert layer(torch.randn((0, 20, 13) if batch_first else (20, 0, 13), dtype=torch.float64)).numel() == 0


def test_hidden_states_that_do_not_fit():
    with pytest.raises(InputError, match=r"expected hidden states \[B, N, d\] with d = 13, found \(5, 20, 12\)"):
        layer_of()(torch.randn(5, 20, 12))
    with pytest.raises(InputError, match=r"\[N, B, d\] with d = 13, found \(20, 13\)"):
        layer_of(batch_first=False)(torch.randn(20, 13))
    with pytest.raises(InputError, match=r"token_mask: expected \[B, N\] = \(5, 20\), found \(20, 5\)"):
        layer_of()(torch.randn(5, 20, 13, dtype=torch.float64), torch.ones(20, 5))
    with pytest.raises(InputError, match=r"stack: expected dtype torch.float32 as x, found torch.float64"):
        layer_of()(torch.randn(5, 20, 13))


# --- batch invariance ---


def batches(N=7, d=13, dtype=torch.float32):
    """One sample alone, first, last and between others, in every case with the same tokens."""
    sample = torch.randn(N, d, dtype=dtype)
    for B, position in ((1, 0), (2, 1), (5, 0), (33, 17), (33, 32)):
        batch = torch.randn(B, N, d, dtype=dtype)
        batch[position] = sample
        yield batch, position


def padded(N=7, d=13, dtype=torch.float32):
    """The same sample without padding, padded right, left, on both sides and inside, in batches."""
    sample = torch.randn(N, d, dtype=dtype)
    yield sample.unsqueeze(0), None, 0, torch.ones(N, dtype=torch.bool)
    for left, right, B in ((0, 5, 1), (5, 0, 3), (3, 9, 20), (1, 0, 2)):
        width = left + N + right
        batch, mask = torch.randn(B, width, d, dtype=dtype) * 100, torch.rand(B, width) > 0.5
        real = (torch.arange(width) >= left) & (torch.arange(width) < left + N)
        batch[B // 2, real], mask[B // 2] = sample, real
        yield batch, mask, B // 2, real


INVARIANT = [
    pytest.param({"make": plain_mlp}, id="plain"),
    pytest.param({"make": lambda: GatedMLP(13, 21)}, id="gated"),
    pytest.param({"make": plain_mlp, "router_depth": 1, "normalization": "softmax"}, id="depth 1"),
]


@pytest.mark.parametrize("N", [1, 7, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", INVARIANT)
def test_a_sample_is_the_same_in_any_batch(options, dtype, N):
    layer = layer_of(dtype=dtype, **options)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for exact in (False, True):
        layer.batch_invariant = exact
        outputs = [layer(batch)[position] for batch, position in batches(N, dtype=dtype)]
        for y in outputs[1:]:
            assert relative_rms(y, outputs[0]) <= tolerance
            if exact:
                assert torch.equal(y, outputs[0])


@pytest.mark.parametrize("N", [1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", INVARIANT)
def test_a_sample_is_the_same_with_any_padding(options, dtype, N):
    layer = layer_of(dtype=dtype, **options)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for exact in (False, True):
        layer.batch_invariant = exact
        outputs = [layer(batch, mask)[position][real] for batch, mask, position, real in padded(N, dtype=dtype)]
        for y in outputs[1:]:
            assert relative_rms(y, outputs[0]) <= tolerance
            if exact:
                assert torch.equal(y, outputs[0])


def test_without_a_mask_padding_does_change_the_routing():
    """What the token mask is for; and that the tests above would notice its absence."""
    layer = layer_of(dtype=torch.float32)
    outputs = [layer(batch)[position][real] for batch, _, position, real in padded()]
    assert all(relative_rms(y, outputs[0]) > 1e-3 for y in outputs[1:])


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_masked_tokens_are_transformed_with_the_weights_of_their_sample(batch_invariant):
    layer = layer_of(batch_invariant=batch_invariant)
    x, mask = torch.randn(4, 9, 13, dtype=torch.float64), torch.rand(4, 9) > 0.5
    mask[1], mask[2] = False, True
    y = layer(x, mask)
    assert y.isfinite().all()
    assert relative_rms(y, composed(layer, x, mask)) <= EXACT


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_nan_at_masked_tokens_stays_there(batch_invariant):
    layer = layer_of(batch_invariant=batch_invariant)
    x, mask = torch.randn(4, 9, 13, dtype=torch.float64), torch.rand(4, 9) > 0.5
    expected = layer(x, mask)[mask]
    y = layer(x.masked_fill(~mask.unsqueeze(2), float("nan")), mask)
    assert relative_rms(y[mask], expected) <= EXACT
    assert y[~mask].isnan().all()


def test_batch_invariance_and_batch_reduce_exclude_each_other():
    with pytest.raises(InputError, match="batch_invariant: with batch_reduce every output depends on the whole batch"):
        layer_of(batch_reduce=True, batch_invariant=True)


@pytest.mark.parametrize("first", ["batch_reduce", "batch_invariant"])
def test_batch_invariance_and_batch_reduce_exclude_each_other_later_too(first):
    layer = layer_of(**{first: True})
    with pytest.raises(InputError, match="batch_invariant"):
        setattr(layer, {"batch_reduce": "batch_invariant", "batch_invariant": "batch_reduce"}[first], True)


def test_batch_reduce_is_an_attribute():
    layer = layer_of()
    assert not layer.batch_reduce
    layer.batch_reduce = True
    assert layer.router.batch_reduce
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    assert relative_rms(layer(x), composed(layer, x)) <= EXACT


# --- errors of from_mlps ---


def refused(base, experts, **options):
    with pytest.raises(InputError) as caught:
        FastWEMoEMLP.from_mlps(base, experts, **options)
    return str(caught.value)


def test_no_experts():
    assert refused(plain_mlp(), []) == "from_mlps: expected at least one expert, found none"
    assert refused(plain_mlp(), {}) == "from_mlps: expected at least one expert, found none"


def test_experts_of_other_shapes_are_all_named_and_other_floating_dtypes_fit():
    base = plain_mlp()
    experts = {"a": plain_mlp(h=22), "b": plain_mlp(bias=False), "c": plain_mlp().half(), "d": plain_mlp()}
    message = refused(base, experts)
    assert message.startswith("from_mlps: ")
    assert "expert 'a': up.weight: expected shape (21, 13) as in the base, found (22, 13)" in message
    assert "expert 'a': up.bias: expected shape (21,) as in the base, found (22,)" in message
    assert "expert 'a': down.weight: expected shape (13, 21) as in the base, found (13, 22)" in message
    assert "expert 'b': up.bias is missing" in message
    assert "expert 'b': down.bias is missing" in message
    assert "'c'" not in message
    assert "'d'" not in message


def test_a_gated_expert_of_a_plain_base():
    message = refused(plain_mlp(bias=False), [GatedMLP(13, 21, "gelu")])
    assert "expert '0': gate.weight is not in the base" in message


def test_experts_with_another_activation():
    experts = {"a": plain_mlp(activation="relu"), "b": plain_mlp(), "c": plain_mlp(activation="gelu_tanh")}
    message = refused(plain_mlp(), experts)
    assert "expert 'a': expected activation 'gelu' as in the base, found 'relu'" in message
    assert "expert 'c': expected activation 'gelu' as in the base, found 'gelu_tanh'" in message
    assert "'b'" not in message


def test_weights_that_are_not_finite():
    broken = plain_mlp()
    broken[2].weight.data[3, 4] = float("nan")
    for base, experts in ((broken, [plain_mlp()]), (plain_mlp(), [plain_mlp(), broken])):
        message = refused(base, experts)
        assert "finite" in message or "NaN" in message
        assert "weight" in message


def test_modules_that_are_no_mlps():
    for module in (nn.Linear(13, 13), nn.LayerNorm(13), nn.Sequential(nn.Linear(13, 13)), nn.Identity()):
        refused(module, [plain_mlp()])
        refused(plain_mlp(), [plain_mlp(), module])


@pytest.mark.parametrize("second", ["no MLP", "NaN", "activation", "shape"])
def test_every_problem_of_every_expert_at_once(second):
    broken = plain_mlp()
    broken[2].weight.data[3, 4] = float("nan")
    other = {
        "no MLP": nn.LayerNorm(13),
        "NaN": copy.deepcopy(broken),
        "activation": plain_mlp(activation="relu"),
        "shape": plain_mlp(h=22),
    }[second]
    message = refused(plain_mlp(), {"first": broken, "second": other})
    assert "'first'" in message
    assert "'second'" in message


def test_another_activation_beside_another_shape():
    message = refused(plain_mlp(), {"first": plain_mlp(h=22), "second": plain_mlp(activation="relu")})
    assert "'first'" in message
    assert "'second'" in message


def test_router_options_are_checked():
    assert "top_k: expected at most 1" in refused(plain_mlp(), [plain_mlp()], top_k=2)
    assert "depth: expected 0, 1 or 2, found 3" in refused(plain_mlp(), [plain_mlp()], router_depth=3)
    assert "kind: expected one of" in refused(plain_mlp(), [plain_mlp()], normalization="max")
    with pytest.raises(InputError, match="activation"):
        FastWEMoEMLP(**{n: getattr(layer_of(), n) for n in ("router", "up", "down")}, activation="glue")
