from __future__ import annotations

import copy

import pytest
import torch
from conftest import relative_rms
from torch import nn
from torch.nn import functional as F

from wemoe_fast import FastWEMoEMLP
from wemoe_fast.errors import InputError
from wemoe_fast.interop import is_wemoe

D, H, T = 13, 21, 3


class MLP(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def mlps(bias=True):
    base = MLP(bias)
    experts = [copy.deepcopy(base) for _ in range(T)]
    for expert in experts:
        for p in expert.parameters():
            p.data += 0.2 * torch.randn_like(p)
    return base, experts


def stirred(module):
    """Routers far from their initialisation, so that every sample is routed in its own way."""
    with torch.no_grad():
        for p in module.gate.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def published(**options):
    we_moe = pytest.importorskip("fusion_bench.models.we_moe", reason="parity needs fusion-bench")
    return stirred(we_moe.WeightEnsemblingMoE(D, *mlps(), **options))


def sparse(**options):
    module = pytest.importorskip("fusion_bench.models.sparse_we_moe", reason="parity needs fusion-bench")
    return stirred(module.SparseWeightEnsemblingMoE(D, *mlps(), tv_prune_ratio=0.4, **options))


def shared_gate(layers=2, encoding=0, **options):
    """Layers with one gate between them; ``encoding`` numbers tell it which layer asks."""
    module = pytest.importorskip("fusion_bench.models.sparse_we_moe", reason="parity needs fusion-bench")
    depth = options.get("router_hidden_layers", 2)
    gate = module.construct_weight_ensembling_gate(D + encoding, T, 0.3, num_hidden_layers=depth)
    extra = {"position_encoding": True, "position_encoding_dim": encoding} if encoding else {}
    made = [
        module.SparseWeightEnsemblingMoE_ShardGate(
            D, *mlps(), layer_idx=i + 1, tv_prune_ratio=0.4, sharedgate=gate, **extra, **options
        )
        for i in range(layers)
    ]
    stirred(made[0])
    return made


class DictGate(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.num_hidden_layers = depth
        if depth == 0:
            self.weight = nn.Parameter(torch.full((T,), 0.3))
            return
        self.fc1 = nn.Linear(D, D) if depth == 2 else nn.Identity()
        self.fc2 = nn.Linear(D, T)

    def forward(self, x):
        if self.num_hidden_layers == 0:
            return self.weight
        return self.fc2(self.fc1(x).relu() if self.num_hidden_layers == 2 else x)


class DictMoE(nn.Module):
    """The authors' module after its definition: one ParameterList entry [T, ...] for every tensor of the base."""

    def __init__(self, base, experts, router_hidden_layers=2, batch_first=False):
        super().__init__()
        self.batch_first = batch_first
        self.gate = DictGate(router_hidden_layers)
        self.base_model = copy.deepcopy(base).requires_grad_(False)
        states = [expert.state_dict() for expert in experts]
        vectors = [torch.stack([s[n] - value for s in states]) for n, value in base.state_dict().items()]
        self.expert_parms = nn.ParameterList([nn.Parameter(v, requires_grad=False) for v in vectors])

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        weights = self.gate(x)
        weights = weights.expand(len(x), -1) if weights.dim() == 1 else weights.mean(dim=1)
        y = [self.transform(x[b], weights[b]) for b in range(len(x))]
        return torch.stack(y, dim=0 if self.batch_first else 1)

    def transform(self, tokens, weights):
        base = self.base_model.state_dict(keep_vars=True)
        merged = {
            name: value + torch.tensordot(weights, vectors, dims=1)
            for (name, value), vectors in zip(base.items(), self.expert_parms, strict=True)
        }
        return torch.func.functional_call(self.base_model, merged, (tokens,))


def dict_moe(**options):
    return stirred(DictMoE(*mlps(), **options))


def results(modules, x, gate):
    """Output of a chain of modules, gradients of the input and of the gate's parameters."""
    x = x.detach().clone().requires_grad_()
    y = x
    for module in modules:
        y = module(y)
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    gate.zero_grad()
    y.backward(dy)
    grads = {name: p.grad.clone() for name, p in gate.named_parameters()}
    gate.zero_grad()
    return {"y": y.detach(), "x": x.grad, **grads}


def assert_parity(modules, x):
    """In float64 to the last bits; in float32 both are as far from the float64 results."""
    gate = modules[0].gate
    theirs = results(modules, x, gate)
    ours = results([FastWEMoEMLP.from_wemoe(module) for module in modules], x, gate)
    exact_modules = copy.deepcopy(modules)
    for module in exact_modules:
        module.double()
        if hasattr(module, "layer_positional_encoding"):
            module.layer_positional_encoding = module.layer_positional_encoding.double()
    exact_gate = exact_modules[0].gate
    exact = results(exact_modules, x.double(), exact_gate)
    ours_exact = results([FastWEMoEMLP.from_wemoe(m) for m in exact_modules], x.double(), exact_gate)
    assert exact.keys() == ours.keys() == theirs.keys()
    for name, value in exact.items():
        assert relative_rms(ours_exact[name], value) <= 1e-12, name
        assert relative_rms(ours[name], value) <= 2 * relative_rms(theirs[name], value) + 1e-6, name
        assert ours[name].dtype == torch.float32


def inputs(batch_first):
    return torch.randn((5, 20, D) if batch_first else (20, 5, D))


@pytest.mark.parametrize("batch_reduce", [False, True], ids=["per sample", "batch_reduce"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("make", [published, sparse])
def test_parity_with_fusion_bench(make, depth, batch_first, batch_reduce):
    module = make(router_hidden_layers=depth, batch_first=batch_first, batch_reduce=batch_reduce)
    assert_parity([module], inputs(batch_first))


@pytest.mark.parametrize("batch_reduce", [False, True], ids=["per sample", "batch_reduce"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("encoding", [0, 4])
@pytest.mark.parametrize("depth", [1, 2])
def test_parity_of_layers_that_share_a_gate(depth, encoding, batch_first, batch_reduce):
    modules = shared_gate(
        encoding=encoding, router_hidden_layers=depth, batch_first=batch_first, batch_reduce=batch_reduce
    )
    assert_parity(modules, inputs(batch_first))


def test_parity_of_a_shared_constant_gate():
    assert_parity(shared_gate(router_hidden_layers=0, batch_first=True), inputs(True))


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "sequence first"])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_parity_with_dict_moe(depth, batch_first):
    assert_parity([dict_moe(router_hidden_layers=depth, batch_first=batch_first)], inputs(batch_first))


def test_frozen_parameters_of_the_base_have_no_task_vector():
    """FusionBench takes the experts' copies of parameters away that the base does not train."""
    we_moe = pytest.importorskip("fusion_bench.models.we_moe", reason="parity needs fusion-bench")
    base, experts = mlps()
    base.fc1.requires_grad_(False)
    module = stirred(we_moe.WeightEnsemblingMoE(D, base, experts, batch_first=True))
    fast = FastWEMoEMLP.from_wemoe(module)
    assert not fast.up.stack[1:].any()
    assert fast.down.stack[1:].any()
    assert_parity([module], inputs(True))


def test_every_decoding_step_is_routed_as_the_module_did_it():
    assert FastWEMoEMLP.from_wemoe(dict_moe()).decode_routing == "step"


def test_without_bias():
    we_moe = pytest.importorskip("fusion_bench.models.we_moe", reason="parity needs fusion-bench")
    module = stirred(we_moe.WeightEnsemblingMoE(D, *mlps(bias=False), batch_first=True))
    assert FastWEMoEMLP.from_wemoe(module).up.bias is None
    assert_parity([module], inputs(True))


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("make", [published, sparse, dict_moe, lambda **o: shared_gate(**o)[0]])
def test_the_router_s_parameters_are_shared(make, depth):
    module = make(router_hidden_layers=depth)
    fast = FastWEMoEMLP.from_wemoe(module)
    theirs = {id(p) for p in module.gate.parameters()}
    assert {id(p) for p in fast.router.parameters()} == theirs
    assert {id(p) for p in fast.parameters() if p.requires_grad} == theirs


@pytest.mark.parametrize("make", [published, dict_moe])
def test_an_optimizer_made_before_the_conversion_trains(make):
    module = make(batch_first=True)
    optimizer = torch.optim.SGD(module.gate.parameters(), lr=0.1)
    fast = FastWEMoEMLP.from_wemoe(module)
    x = inputs(True)
    before = fast(x).detach()
    fast(x).square().mean().backward()
    optimizer.step()
    assert relative_rms(fast(x), before) > 1e-5
    assert relative_rms(fast(x), module(x)) < 1e-5


@pytest.mark.parametrize("make", [published, sparse, dict_moe])
def test_the_given_module_is_not_changed(make):
    module = make()
    state = {name: value.clone() for name, value in module.state_dict().items()}
    fast = FastWEMoEMLP.from_wemoe(module)
    with torch.no_grad():
        fast.up.stack.zero_()
        fast.down.bias.zero_()
    assert module.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("make", [published, dict_moe])
def test_settings_are_taken_over(make):
    for batch_first in (True, False):
        module = make(batch_first=batch_first).eval()
        fast = FastWEMoEMLP.from_wemoe(module)
        assert fast.batch_first == batch_first
        assert fast.num_experts == T
        assert not fast.training
        assert FastWEMoEMLP.from_wemoe(module.train()).training
    if make is published:
        assert FastWEMoEMLP.from_wemoe(published(batch_reduce=True)).batch_reduce


def test_a_converted_module_round_trips_its_state():
    first, second = (FastWEMoEMLP.from_wemoe(shared_gate(encoding=4)[0]) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = inputs(False)
    assert torch.equal(first(x), second(x))


def test_is_wemoe():
    assert is_wemoe(dict_moe())
    assert is_wemoe(published())
    for other in (MLP(), nn.Identity(), nn.ModuleList(), FastWEMoEMLP.from_mlps(MLP(), [MLP()])):
        assert not is_wemoe(other)


@pytest.mark.parametrize(
    "module", [MLP(), nn.Identity(), nn.TransformerEncoderLayer(8, 2)], ids=lambda m: type(m).__name__
)
def test_other_modules_are_refused(module):
    with pytest.raises(InputError, match=f"from_wemoe: expected a WEMoE module .* found {type(module).__name__}"):
        FastWEMoEMLP.from_wemoe(module)


def test_a_fast_module_is_not_converted_again():
    with pytest.raises(InputError, match="found FastWEMoEMLP"):
        FastWEMoEMLP.from_wemoe(FastWEMoEMLP.from_mlps(MLP(), [MLP()]))


def test_modules_that_contradict_themselves_are_refused():
    module = dict_moe()
    module.expert_parms = nn.ParameterList(list(module.expert_parms)[:-1])
    with pytest.raises(InputError, match="one entry of expert_parms for each of the base's 4 tensors, found 3"):
        FastWEMoEMLP.from_wemoe(module)
    module = dict_moe()
    module.expert_parms[1] = nn.Parameter(module.expert_parms[1][:2])
    with pytest.raises(InputError, match=r"one number of experts, found \[2, 3\]"):
        FastWEMoEMLP.from_wemoe(module)
    module = dict_moe()
    module.gate.fc2 = nn.Linear(D, T + 1)
    with pytest.raises(InputError, match="gate: expected 3 routing weights, found 4"):
        FastWEMoEMLP.from_wemoe(module)
    module = dict_moe()
    module.gate.num_hidden_layers = 3
    with pytest.raises(InputError, match="found depth 3 with 2 linears"):
        FastWEMoEMLP.from_wemoe(module)
