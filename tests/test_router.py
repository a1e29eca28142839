from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import relative_rms
from torch import nn

from wemoe_fast import Router, reference
from wemoe_fast.errors import InputError
from wemoe_fast.normalization import Normalization

DEPTHS = [0, 1, 2]


def named(router):
    return router.parameters_for_routing().to_dict()


def perturbed(depth, **options):
    """A router far from its initialisation."""
    router = Router(13, 3, depth=depth, **options)
    with torch.no_grad():
        for p in router.parameters():
            p.normal_()
    return router


def test_published_initialisation():
    router = Router(256, 40, depth=2, init_lambda=0.2)
    assert router.hidden.weight.shape == (256, 256)
    assert router.output.weight.shape == (40, 256)
    for weight in (router.hidden.weight, router.output.weight):
        assert abs(weight.mean()) < 5e-4
        assert 0.0095 < weight.std() < 0.0105
        assert 0.03 < weight.abs().max() < 0.06  # normal, not uniform
    assert router.hidden.bias.eq(0).all()
    assert router.output.bias.eq(0.2).all()
    shallow = Router(256, 40, depth=1)
    assert shallow.hidden is None
    assert 0.0095 < shallow.output.weight.std() < 0.0105
    assert shallow.output.bias.eq(0.3).all()
    constant = Router(256, 40, depth=0, init_lambda=0.7)
    assert [tuple(p.shape) for p in constant.parameters()] == [(40,)]
    assert constant.constant.eq(0.7).all()


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_fresh_router_is_close_to_task_arithmetic(depth):
    weights = Router(64, 5, depth=depth, init_lambda=0.3)(torch.randn(4, 50, 64))
    assert weights.shape == (1 if depth == 0 else 4, 5)
    assert (weights - 0.3).abs().max() < 0.1


@pytest.mark.parametrize("normalization", ["identity", "softmax", "sigmoid"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_router_is_the_reference(depth, normalization):
    router = perturbed(depth, normalization=normalization, top_k=2).double()
    hidden, mask = torch.randn(5, 20, 13, dtype=torch.float64), torch.rand(5, 20) > 0.3
    expected = reference.route(hidden, named(router), Normalization(normalization, top_k=2), mask)
    assert relative_rms(router(hidden, mask).expand(5, -1), expected) <= 1e-12


@pytest.mark.parametrize("depth", DEPTHS)
def test_batch_reduce_is_the_mean_over_the_batch(depth):
    router = perturbed(depth).double()
    hidden = torch.randn(5, 20, 13, dtype=torch.float64)
    each = router(hidden)
    router.batch_reduce = True
    together = router(hidden)
    assert together.shape == (1, 3)
    assert relative_rms(together, each.mean(0, keepdim=True)) <= 1e-12


def test_hidden_features_and_temperature():
    router = perturbed(2, hidden_features=7, normalization="softmax", temperature=0.5)
    assert router.hidden.weight.shape == (7, 13)
    assert router.output.weight.shape == (3, 7)
    hidden = torch.randn(5, 20, 13)
    expected = reference.route(hidden, named(router), Normalization("softmax", 0.5))
    assert relative_rms(router(hidden), expected) <= 1e-6


@pytest.mark.parametrize("depth", DEPTHS)
def test_dtype_and_conversions(depth):
    hidden = torch.randn(5, 20, 13)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert {p.dtype for p in Router(13, 3, depth=depth, dtype=dtype).parameters()} == {dtype}
    router = perturbed(depth)
    expected = router(hidden)
    assert relative_rms(copy.deepcopy(router)(hidden), expected) == 0
    assert relative_rms(pickle.loads(pickle.dumps(router))(hidden), expected) == 0
    other = perturbed(depth)
    assert relative_rms(other(hidden), expected) > 0.1
    other.load_state_dict(router.state_dict())
    assert relative_rms(other(hidden), expected) == 0
    assert all(p.requires_grad for p in router.parameters())


@pytest.mark.parametrize("depth", [1, 2])
def test_around_shares_layers_and_folds_the_prefix_in(depth):
    """A constant in front of every token's features: the same as feeding it."""
    hidden = nn.Linear(4 + 13, 9, dtype=torch.float64) if depth == 2 else None
    output = nn.Linear(9 if depth == 2 else 17, 3, dtype=torch.float64)
    prefix = torch.randn(4)
    router = Router.around(hidden=hidden, output=output, prefix=prefix)
    assert router.output is output
    assert router.hidden is hidden
    assert (router.depth, router.in_features, router.num_experts) == (depth, 13, 3)
    x = torch.randn(5, 20, 13, dtype=torch.float64)
    fed = torch.cat([prefix.double().expand(5, 20, -1), x], dim=2)
    plain = output(fed if hidden is None else hidden(fed).relu()).mean(1)
    assert relative_rms(router(x), plain) <= 1e-12
    layers = [output.weight, output.bias] + ([] if hidden is None else [hidden.weight, hidden.bias])
    expected = torch.autograd.grad(plain.square().sum(), layers)
    actual = torch.autograd.grad(router(x).square().sum(), layers)
    assert all(relative_rms(a, e) <= 1e-12 for a, e in zip(actual, expected, strict=True))


def test_around_a_constant():
    constant = nn.Parameter(torch.tensor([0.1, 0.2]))
    router = Router.around(constant=constant)
    assert router.constant is constant
    assert torch.equal(router(torch.randn(5, 4, 13)), constant.detach().unsqueeze(0))


def test_the_prefix_is_part_of_the_state_and_moves_with_the_module():
    router = Router.around(output=nn.Linear(17, 3), prefix=torch.randn(4))
    assert "prefix" in router.state_dict()
    assert router.to(torch.float64).prefix.dtype == torch.float64


def test_around_brings_the_prefix_to_the_layers_device():
    router = Router.around(output=nn.Linear(17, 3, device="meta"), prefix=torch.randn(4))
    assert router.prefix.device.type == "meta"


def test_repr():
    router = Router(13, 3, depth=2, normalization="softmax", temperature=0.5, top_k=2, batch_reduce=True)
    for part in ("depth=2", "in_features=13", "num_experts=3", "'softmax'", "temperature=0.5", "top_k=2"):
        assert part in repr(router)
    assert "batch_reduce=True" in repr(router)
    assert "batch_reduce" not in repr(Router(13, 3))


def test_every_problem_at_once():
    with pytest.raises(InputError) as caught:
        Router(13, 0, depth=3, top_k=1)
    message = str(caught.value)
    assert "router: 3 problems" in message
    assert "depth: expected 0, 1 or 2, found 3" in message
    assert "num_experts: expected at least 1, found 0" in message
    assert "top_k: expected at most 0 (the experts), found 1" in message
    with pytest.raises(InputError, match="kind: expected one of identity"):
        Router(13, 3, normalization="sofmax")
