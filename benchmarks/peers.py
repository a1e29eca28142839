"""What a user could run instead of ``FastWEMoEMLP``, from the same weights: the static MLP, merged weights that are
materialised, vmap, and the published loop over samples."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemoe_fast import FastWEMoEMLP
from wemoe_fast.activations import lookup
from wemoe_fast.linears import bias_of, weight_of
from wemoe_fast.router import Router
from wemoe_fast.structure import parse_mlp
from wemoe_fast.task_vectors import MergedLinear

from .judging import DTYPES

LOOP = "loop over samples"
FUSION_BENCH = "FusionBench"
MATERIALISED = "materialise + bmm"
COMPILED = "materialise + bmm, compiled"
STATIC = "static"
PREALLOCATED = "static, preallocated"
VMAP = "vmap(functional_call)"


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as in LLaMA."""

    def __init__(self, d: int, h: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d, h, bias=False)
        self.up_proj = nn.Linear(d, h, bias=False)
        self.down_proj = nn.Linear(h, d, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(hidden)
        return y


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_,
    "silu": torch.ops.aten.silu_,
}


def static_mlp(d: int, h: int, gated: bool = False) -> nn.Module:
    """One merged model: what any WEMoE is measured against."""
    return GatedMLP(d, h) if gated else nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, d))


def modules(case: Any, device: torch.device) -> tuple[nn.Module, list[nn.Module], FastWEMoEMLP]:
    """Base, experts and the WEMoE module of them, for anything with T, d, h, dtype and gated."""
    dtype = DTYPES[case.dtype]
    with device:
        base = static_mlp(case.d, case.h, case.gated)
        experts = [expert_of(base).to(dtype).eval() for _ in range(case.T)]
        base = base.to(dtype).eval()
        fast = FastWEMoEMLP.from_mlps(base, experts, router_depth=2).eval()
        perturbed(fast.router)
    return base, experts, fast


def with_strategy(fast: FastWEMoEMLP, strategy: str) -> FastWEMoEMLP:
    """The same module, parameters shared, that runs by another strategy."""
    module = copy.copy(fast)
    module.strategy = strategy
    return module


def expert_of(base: nn.Module) -> nn.Module:
    """A version of ``base`` as far away as fine-tuning takes it: a tenth of the weights' own size."""
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.1)
    return expert


def perturbed(router: Router) -> Router:
    """A router that no longer treats all samples alike."""
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return router


def plain_route(hidden: Tensor, router: Router) -> Tensor:
    """Routing weights [B, T] as the formula says, in the dtype of ``hidden``."""
    if router.hidden is not None:
        hidden = F.relu(router.hidden(hidden))
    assert router.output is not None
    logits: Tensor = router.output(hidden).mean(dim=1)
    return router.normalization(logits)


def materialised_linear(
    x: Tensor, stack: Tensor, weights: Tensor, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """act(x_b W_b^T + c_b) with every W_b written down: x [B, N, d], stack [1+T, h, d], weights [B, T]."""
    weights = weights.to(x.dtype).expand(x.shape[0], -1)
    coefficients = torch.cat([weights.new_ones(weights.shape[0], 1), weights], dim=1)
    merged = torch.einsum("be,ehd->bhd", coefficients, stack)
    if bias is None:
        return lookup(activation)(torch.bmm(x, merged.mT))
    return lookup(activation)(torch.baddbmm((coefficients @ bias).unsqueeze(1), x, merged.mT))


class Preallocated:
    """The static MLP into memory that is there already: what the products alone take. Forward only."""

    def __init__(self, base: nn.Module) -> None:
        parts = parse_mlp(base)
        self.up, self.down, self.gate = parts.up, parts.down, parts.gate
        self.activate = IN_PLACE[parts.activation]
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        if self.gate is None:
            hidden = self.activate(self._product("up", self.up, rows))
        else:
            hidden = self.activate(self._product("gate", self.gate, rows)).mul_(self._product("up", self.up, rows))
        return self._product("down", self.down, hidden).unflatten(0, x.shape[:2])

    def _product(self, name: str, linear: nn.Module, rows: Tensor) -> Tensor:
        weight, bias = weight_of(linear), bias_of(linear)
        out = self.buffers.get(name)
        if out is None or out.shape[0] != rows.shape[0]:
            out = self.buffers[name] = rows.new_empty(rows.shape[0], len(weight))
        return torch.mm(rows, weight.mT, out=out) if bias is None else torch.addmm(bias, rows, weight.mT, out=out)


class Materialised(nn.Module):
    """The same module in plain PyTorch: an einsum for the weights of every sample, then a batched product."""

    def __init__(self, fast: FastWEMoEMLP) -> None:
        super().__init__()
        self.router, self.up, self.down, self.gate = fast.router, fast.up, fast.down, fast.gate
        self.activation = fast.activation

    def forward(self, x: Tensor) -> Tensor:
        weights = plain_route(x, self.router)
        if self.gate is None:
            hidden = self._linear(x, self.up, weights, self.activation)
        else:
            hidden = self._linear(x, self.gate, weights, self.activation) * self._linear(x, self.up, weights)
        return self._linear(hidden, self.down, weights)

    @staticmethod
    def _linear(x: Tensor, linear: MergedLinear, weights: Tensor, activation: str = "none") -> Tensor:
        return materialised_linear(x, linear.stack, weights, linear.bias, activation)

    def merged_bytes(self, samples: int) -> int:
        """What the merged weights of a batch take."""
        linears = [linear for linear in (self.up, self.down, self.gate) if linear is not None]
        return samples * sum(linear.stack[0].numel() * linear.stack.element_size() for linear in linears)


def task_vectors(base: nn.Module, experts: list[nn.Module]) -> list[dict[str, Tensor]]:
    """Expert minus base by parameter name."""
    return [
        {
            name: theirs.detach() - ours.detach()
            for (name, ours), theirs in zip(base.named_parameters(), expert.parameters(), strict=True)
        }
        for expert in experts
    ]


class LoopOverSamples(nn.Module):
    """WEMoE as its authors and FusionBench run it: for every sample a state dict, summed up and called with."""

    def __init__(self, fast: FastWEMoEMLP, base: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.router, self.base = fast.router, base.requires_grad_(False)
        self.task_vectors = task_vectors(base, experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = plain_route(x, self.router)
        outputs = []
        for sample, row in zip(x, weights, strict=True):
            state: dict[str, Tensor] = dict(self.base.named_parameters())
            for weight, task_vector in zip(row, self.task_vectors, strict=True):
                state = {name: value + weight * task_vector[name] for name, value in state.items()}
            outputs.append(torch.func.functional_call(self.base, state, (sample.unsqueeze(0),)))
        return torch.cat(outputs)


class VmapOverSamples(nn.Module):
    """``torch.func.vmap`` over a function of one sample that merges its weights and calls the MLP with them."""

    def __init__(self, fast: FastWEMoEMLP, base: nn.Module, experts: list[nn.Module]) -> None:
        super().__init__()
        self.router, self.base = fast.router, base.requires_grad_(False)
        vectors = task_vectors(base, experts)
        self.stacks = {name: torch.stack([vector[name] for vector in vectors]) for name in vectors[0]}

    def forward(self, x: Tensor) -> Tensor:
        parameters = dict(self.base.named_parameters())

        def one(sample: Tensor, weights: Tensor) -> Tensor:
            state = {name: parameters[name] + torch.tensordot(weights, stack, 1) for name, stack in self.stacks.items()}
            y: Tensor = torch.func.functional_call(self.base, state, (sample,))
            return y

        y: Tensor = torch.func.vmap(one)(x, plain_route(x, self.router))
        return y


def fusion_bench(
    fast: FastWEMoEMLP, base: nn.Module, experts: list[nn.Module], copied: bool = True
) -> nn.Module | None:
    """FusionBench's own module with the same router; None where the package is not installed.

    It turns the experts into task vectors in place, and leaves out what is frozen in the base: it gets copies, unless
    nobody needs them afterwards.
    """
    try:
        from fusion_bench.models.we_moe import WeightEnsemblingMoE
    except ImportError:
        return None
    if copied:
        base, experts = copy.deepcopy(base).requires_grad_(True), copy.deepcopy(experts)
    theirs = WeightEnsemblingMoE(fast.up.stack.shape[2], base, experts, batch_first=True, router_hidden_layers=2)
    for ours, other in zip(fast.router.parameters(), theirs.gate.parameters(), strict=True):
        other.data.copy_(ours)
    module: nn.Module = theirs.to(fast.up.stack)
    return module


def router_parameters(module: object, router: list[nn.Parameter]) -> list[nn.Parameter]:
    """The router's parameters; FusionBench's module has a router of its own."""
    gate = getattr(module, "gate", None)
    return list(gate.parameters()) if isinstance(gate, nn.Module) and not hasattr(module, "router") else router


def compiled(module: nn.Module, backend: str = "inductor") -> Callable[[Tensor], Tensor]:
    """torch.compile for one shape."""
    torch._dynamo.reset()
    function: Callable[[Tensor], Tensor] = torch.compile(module, dynamic=False, backend=backend)
    return function


def why_not_compiled(device: torch.device) -> str | None:
    """What keeps inductor from generating code, if anything."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler, found none"
    return None


def dry_backend(device: torch.device) -> str:
    """What a dry run on the CPU compiles with: code generation would take longer than the run itself."""
    return "inductor" if device.type == "cuda" else "aot_eager"
