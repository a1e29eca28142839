"""Whole models: the statically merged one, ours, and FusionBench's modules in the same tower."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wemoe_fast.errors import InputError
from wemoe_fast.upscale import set_module, task_arithmetic, upscale, wemoe_layers

from . import peers
from .contenders import NO_FUSION_BENCH, Contender, Contest
from .judging import DTYPES
from .memory import available_bytes, free_bytes
from .workloads import Shape, Workload

HEAD_SIZE = 64
INPUTS = {"clip": "pixel_values", "bert": "inputs_embeds"}
LOOPS_KEEP = 4
"""Times the merged weights: what a loop over samples keeps of one for its backward pass."""
NO_BERT = "FusionBench has no WEMoE for an MLP that is spread over two modules, as BERT's is"


def tower(shape: Shape) -> nn.Module:
    """A model of this shape with random weights."""
    try:
        import transformers
    except ImportError as error:
        raise InputError('whole towers need the package transformers: pip install "wemoe-fast[hf]"') from error
    sizes: dict[str, Any] = {
        "hidden_size": shape.d,
        "intermediate_size": shape.h,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": max(1, shape.d // HEAD_SIZE),
    }
    if shape.family == "bert":
        model: nn.Module = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64))
    else:
        config = transformers.CLIPVisionConfig(**sizes, image_size=shape.image, patch_size=shape.patch)
        model = transformers.CLIPVisionModel(config)
    return model.eval()


def last_hidden_state(model: nn.Module, argument: str, x: Tensor) -> Tensor:
    y: Tensor = model(**{argument: x}).last_hidden_state
    return y


def tower_contest(workload: Workload, device: torch.device) -> Contest:
    shape, dtype = workload.shape, DTYPES[workload.dtype]
    with device:
        base = tower(shape).to(dtype)
        _check_memory(base, workload.T, device)
        experts = {str(t): peers.expert_of(base) for t in range(workload.T)}
        ours = upscale(base, experts)
        for layer in wemoe_layers(ours).values():
            peers.perturbed(layer.router)
    static = task_arithmetic(base, experts).requires_grad_(False)
    argument = INPUTS[shape.family]
    router = [parameter for layer in wemoe_layers(ours).values() for parameter in layer.router.parameters()]
    contender = Contender(partial(last_hidden_state, ours, argument), router)
    contenders = {peers.STATIC: Contender(partial(last_hidden_state, static, argument)), "auto": contender}
    left_out = {}
    if shape.family == "bert":
        left_out[peers.FUSION_BENCH] = NO_BERT
    elif workload.step == "adapt" and LOOPS_KEEP * workload.B * _mlp_bytes(ours) > free_bytes(device):
        left_out[peers.FUSION_BENCH] = "the weights of every sample, kept for the backward pass, do not fit"
    else:
        theirs = _with_fusion_bench(static, ours, base, list(experts.values()))
        if theirs is None:
            left_out[peers.FUSION_BENCH] = NO_FUSION_BENCH
        else:
            model, gates = theirs
            contenders[peers.FUSION_BENCH] = Contender(partial(last_hidden_state, model, argument), gates)
    size = (workload.N, shape.d) if shape.family == "bert" else (3, shape.image, shape.image)
    x = torch.randn(workload.B, *size, device=device, dtype=dtype)
    dy = torch.randn(workload.B, workload.N, shape.d, device=device, dtype=dtype)
    return Contest(workload, x, dy, ours, contender, contender, contenders, left_out)


def _check_memory(base: nn.Module, experts: int, device: torch.device) -> None:
    """Base and experts, ours as the float64 oracle, and two static models."""
    sizes = [parameter.numel() * parameter.element_size() for parameter in base.parameters()]
    widened = 8 // next(base.parameters()).element_size()
    needed = sum(sizes) * ((1 + experts) * (1 + widened) + 2)
    if needed > 0.9 * available_bytes(device):
        raise InputError(f"does not fit: needs about {needed >> 30} GiB")


def _mlp_bytes(model: nn.Module) -> int:
    """One set of the weights of all MLPs."""
    return sum(peers.Materialised(layer).merged_bytes(1) for layer in wemoe_layers(model).values())


def _with_fusion_bench(
    static: nn.Module, ours: nn.Module, base: nn.Module, experts: list[nn.Module]
) -> tuple[nn.Module, list[nn.Parameter]] | None:
    """The merged tower with FusionBench's modules, and the parameters of their gates; uses up base and experts."""
    model, gates = copy.deepcopy(static), []
    base.requires_grad_(True)
    for path, layer in wemoe_layers(ours).items():
        theirs = peers.fusion_bench(
            layer, base.get_submodule(path), [expert.get_submodule(path) for expert in experts], copied=False
        )
        if theirs is None:
            return None
        set_module(model, path, theirs)
        gates += peers.router_parameters(theirs, [])
    return model, gates
