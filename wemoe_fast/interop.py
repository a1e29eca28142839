"""Existing WEMoE modules as FastWEMoEMLP: recognised by structure, without importing their packages.

- FusionBench's ``WeightEnsemblingMoE``, ``SparseWeightEnsemblingMoE`` and ``..._ShardGate``: a ``base_model``,
  a ``ModuleList`` ``task_vectors`` of MLPs that hold task vectors, a ``gate``;
- the authors' ``DictMoE``: a ``base_model``, a ``ParameterList`` ``expert_parms`` with one [T, ...] tensor for
  every entry of the base's state dict, in its order, and a ``gate``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError
from .linears import is_transposed
from .mlp import FastWEMoEMLP
from .router import Router
from .structure import parse_mlp
from .task_vectors import MergedLinear


def is_wemoe(module: nn.Module) -> bool:
    """True for a WEMoE module that :func:`from_wemoe` takes (the packages' own, not ours)."""
    has_vectors = isinstance(getattr(module, "task_vectors", None), nn.ModuleList) or isinstance(
        getattr(module, "expert_parms", None), nn.ParameterList
    )
    gate = getattr(module, "gate", None)
    return (
        has_vectors
        and isinstance(getattr(module, "base_model", None), nn.Module)
        and isinstance(gate, nn.Module)
        and hasattr(gate, "num_hidden_layers")
        and not isinstance(module, FastWEMoEMLP)
    )


def from_wemoe(module: nn.Module) -> FastWEMoEMLP:
    """The same function of the hidden states, with the same router parameters (shared, not copied).

    Outputs and router gradients agree to rounding. Base weights and task vectors are copied into stacks; the
    given module is not changed. Raises ``InputError`` for anything that is not such a module.
    """
    if not is_wemoe(module):
        raise InputError(
            f"from_wemoe: expected a WEMoE module (base_model, gate, and task_vectors or expert_parms), found "
            f"{type(module).__name__} with {', '.join(name for name, _ in module.named_children()) or 'no children'}"
        )
    base = module.base_model
    assert isinstance(base, nn.Module)
    parts = parse_mlp(base)
    vectors = _task_vectors(module, base)
    names = {id(parameter): name for name, parameter in base.named_parameters()}
    merged = {}
    for role, linear in parts.linears().items():
        stacks = {kind: _stack(p, vectors, names[id(p)]) for kind, p in linear.named_parameters()}
        weight = stacks["weight"].mT.contiguous() if is_transposed(linear) else stacks["weight"]
        merged[role] = MergedLinear(weight, stacks.get("bias"))
    result = FastWEMoEMLP(
        router=_router(module, len(vectors), parts.in_features),
        up=merged["up"],
        down=merged["down"],
        gate=merged.get("gate"),
        activation=parts.activation,
        batch_first=bool(getattr(module, "batch_first", False)),
        decode_routing="step",
    )
    return result.train(module.training)


def _task_vectors(module: nn.Module, base: nn.Module) -> list[dict[str, Tensor]]:
    """One mapping from parameter name to task vector per expert; what it lacks is zero."""
    listed = getattr(module, "task_vectors", None)
    if isinstance(listed, nn.ModuleList):
        return [dict(vector.named_parameters()) for vector in listed]
    stacked = list(module.expert_parms)  # type: ignore[arg-type]
    names = list(base.state_dict())
    if len(names) != len(stacked):
        raise InputError(
            f"from_wemoe: expected one entry of expert_parms for each of the base's {len(names)} tensors, "
            f"found {len(stacked)}"
        )
    count = {tensor.shape[0] for tensor in stacked}
    if len(count) != 1:
        raise InputError(f"from_wemoe: expected expert_parms of one number of experts, found {sorted(count)}")
    return [{name: tensor[t] for name, tensor in zip(names, stacked, strict=True)} for t in range(count.pop())]


def _stack(base: Tensor, vectors: list[dict[str, Tensor]], name: str) -> Tensor:
    missing = torch.zeros_like(base)
    return torch.stack([base.detach(), *(v.get(name, missing).detach().to(base) for v in vectors)])


def _router(module: nn.Module, experts: int, in_features: int) -> Router:
    gate = module.gate
    assert isinstance(gate, nn.Module)
    depth = gate.num_hidden_layers
    batch_reduce = bool(getattr(module, "batch_reduce", False))
    if depth == 0:
        constant = gate.weight
        assert isinstance(constant, nn.Parameter)
        router = Router.around(constant=constant, in_features=in_features, batch_reduce=batch_reduce)
    else:
        linears = [layer for layer in gate.modules() if isinstance(layer, nn.Linear)]
        if depth not in (1, 2) or len(linears) != depth:
            raise InputError(
                f"from_wemoe: gate: expected depth 0, 1 or 2 with as many linears, found depth {depth} with "
                f"{len(linears)} linears"
            )
        prefix = (
            getattr(module, "layer_positional_encoding", None) if getattr(module, "position_encoding", False) else None
        )
        router = Router.around(
            hidden=linears[0] if depth == 2 else None,
            output=linears[-1],
            prefix=prefix,
            batch_reduce=batch_reduce,
        )
    if router.num_experts != experts:
        raise InputError(f"from_wemoe: gate: expected {experts} routing weights, found {router.num_experts}")
    return router
